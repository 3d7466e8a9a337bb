"""What an optimizer is, before anything runs it: pure maths and the names of its numbers."""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor


class State(NamedTuple):
    """One number that an optimizer remembers for each element of a parameter.

    Attributes:
        name: What the field calls it, such as ``exp_avg``.
        nonnegative: Whether it is a sum or mean of squares, or something else that is never negative.
        maximum: Whether it is the largest so far of something: it is never rounded stochastically, as the
            largest of noise grows.
        over: Of a mean, the name of the state that is the mean of the squares of the same. Its root bounds
            the mean if it forgets at most as fast as the square of the mean does, see `decays`.
        decays: Names of the hyperparameters that both keep: of this state, and of `over`.
        impulse: ``(lost, root, scalars) -> direction``, elementwise: how far, in the unit of a rule's
            direction, a part of the state would move the parameter in all the steps to come, `root` being
            that of `over`. None if it cannot be said, or is not small.
    """

    name: str
    nonnegative: bool = False
    maximum: bool = False
    over: str | None = None
    decays: tuple[str, str] | None = None
    impulse: Callable[[Tensor, Tensor, Any], Tensor] | None = None


def extended(scalars: Any, *names: str) -> Any:
    """A NamedTuple with further fields, for a rule that has another one's scalars and more."""
    return collections.namedtuple(scalars.__name__, (*scalars._fields, *names))


@dataclass(frozen=True)
class Rule:
    """An optimization algorithm.

    Both functions are ordinary tensor code without branches, so that one text can be run on whole
    tensors and printed into a kernel.

    Attributes:
        name: Lower case; part of the operators' names.
        hyper: NamedTuple of the numeric hyperparameters; its order is the order of a row of `hyper`.
        states: What is remembered for each element.
        scalars: ``(hyper, step) -> NamedTuple``: what the elements of a parameter share, such as bias
            corrections. Arguments and results are float64 and broadcast; `step` counts from 1. Three fields
            are read by name, the others only by `direction`:

            - `keep`: factor on the parameter (decoupled weight decay);
            - `step_size`: factor on the direction, learning rate included;
            - `unit`: the same without the learning rate; the trust ratio compares ``unit * |direction|`` with
              the parameter's norm.
        direction: ``(param, grad, *states, scalars) -> (direction, *states)``, elementwise: each tensor is
            float32 of shape ``(numel,)``, each scalar broadcasts.
    """

    name: str
    hyper: type[Any]
    states: tuple[State, ...]
    scalars: Callable[[Any, Tensor], Any]
    direction: Callable[..., tuple[Tensor, ...]]

    def place_of(self, state: str) -> int:
        """Which of the states has a name."""
        return [own.name for own in self.states].index(state)

    def update(self, param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        """``(param, grad, *states, scalars) -> (param, *states)``."""
        scalars = rest[-1]
        direction, *states = self.direction(param, grad, *rest)
        return scalars.keep * param - scalars.step_size * direction, *states

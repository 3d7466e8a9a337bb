"""What an optimizer is, before anything runs it: pure maths and the names of its numbers."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
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
        format: Name of the format that the state has whatever is asked for, such as "float32".
        initial: What it begins with: a number, or "param" for the parameter.
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
    format: str | None = None
    initial: float | str = 0.0


@functools.cache
def extended(scalars: Any, *names: str) -> Any:
    """A NamedTuple with further fields, for a rule that has another one's scalars and more."""
    return collections.namedtuple(scalars.__name__, (*scalars._fields, *names))


@dataclass(frozen=True)
class Rule:
    """An optimization algorithm.

    All functions are ordinary tensor code without branches, so that one text can be run on whole tensors and
    printed into a kernel. What one of the last two does follows from the other.

    Attributes:
        name: Lower case; part of the operators' names.
        hyper: NamedTuple of the numeric hyperparameters; its order is the order of a row of `hyper`.
        states: What is remembered for each element.
        scalars: ``(hyper, step) -> NamedTuple``: what the elements of a parameter share, such as bias
            corrections. Arguments and results are float64 and broadcast; `step` counts from 1. Three fields
            are read by name, the others only by `direction` or `update`; see `shared` for what they are if
            they are left out:

            - `keep`: factor on the parameter (decoupled weight decay);
            - `step_size`: factor on the direction, learning rate included;
            - `unit`: the same without the learning rate; the trust ratio compares ``unit * |direction|`` with
              the parameter's norm.
        direction: ``(param, grad, *states, scalars) -> (direction, *states)``, elementwise: each tensor is
            float32 of shape ``(numel,)``, each scalar broadcasts. What is subtracted of the parameter, before
            the learning rate.
        update: ``(param, grad, *states, scalars) -> (param, *states)``, elementwise, where there is no such
            direction.
        means: Pairs of a name and a function ``(param, grad, *states, scalars) -> number``, elementwise, of
            which `direction` or `update` is given the mean over the elements of a parameter whose gradient is
            used, as a scalar of that name; and the number of these elements as the scalar `elements`. A step
            then reads everything twice.
        rounds_to: The dtype to which `update` rounds parameters itself; those of another one are refused.
    """

    name: str
    hyper: type[Any]
    states: tuple[State, ...]
    scalars: Callable[[Any, Tensor], Any]
    direction: Callable[..., tuple[Tensor, ...]] = None  # type: ignore[assignment]
    update: Callable[..., tuple[Tensor, ...]] = None  # type: ignore[assignment]
    means: tuple[tuple[str, Callable[..., Tensor]], ...] = ()
    rounds_to: torch.dtype | None = None

    def __post_init__(self) -> None:
        if (self.direction is None) == (self.update is None):
            raise ValueError(f"rule {self.name}: must have a direction or an update, and not both")
        if self.update is None:
            object.__setattr__(self, "update", functools.partial(_update_by, self.direction))
        else:
            object.__setattr__(self, "direction", functools.partial(_direction_by, self.update))

    @property
    def own_function(self) -> Callable[..., Any]:
        """The one that was given of `direction` and `update`."""
        return self.update if self.has_update else self.direction

    @property
    def origin(self) -> tuple[str, str]:
        """Where it was written: a module, and a function there."""
        return self.own_function.__module__, self.own_function.__qualname__

    @property
    def has_update(self) -> bool:
        """Whether `update` was given, so that there is no direction for a trust ratio to measure."""
        return isinstance(self.direction, functools.partial)

    def shared(self, hyper: Any, step: Tensor) -> Any:
        """The `scalars`, with what may be left out of them.

        `keep` is 1, `step_size` of a rule with an `update` is 1, and `unit` is `step_size` without the factor
        `lr`.

        Raises:
            ValueError: If there is a direction but no `step_size`.
        """
        found = self.scalars(hyper, step)
        more: dict[str, Any] = {}
        if not hasattr(found, "keep"):
            more["keep"] = torch.ones_like(step)
        if not hasattr(found, "step_size"):
            if not self.has_update:
                raise ValueError(
                    f"rule {self.name}: scalars has no 'step_size', only {list(found._fields)}: it is the "
                    "factor on the direction, learning rate included"
                )
            more["step_size"] = torch.ones_like(step)
        if not hasattr(found, "unit"):
            size = more.get("step_size", getattr(found, "step_size", None))
            more["unit"] = size / hyper.lr if hasattr(hyper, "lr") else size
        kind: Any = type(found)
        return extended(kind, *more)(*found, **more) if more else found

    @property
    def measured(self) -> tuple[str, ...]:
        """Names of the scalars that are known only when a whole parameter has been looked at."""
        return (*(name for name, _ in self.means), "elements") if self.means else ()

    def with_measured(self, scalars: Any, values: Sequence[Any]) -> Any:
        """The scalars as `direction` and `update` are given them."""
        kind: Any = type(scalars)
        return extended(kind, *self.measured)(*scalars, *values) if self.measured else scalars

    def place_of(self, state: str) -> int:
        """Which of the states has a name."""
        return [own.name for own in self.states].index(state)


def _update_by(direction: Callable[..., Any], param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    scalars = rest[-1]
    moved, *states = direction(param, grad, *rest)
    return scalars.keep * param - scalars.step_size * moved, *states


def _direction_by(update: Callable[..., Any], param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    moved, *states = update(param, grad, *rest)
    return param - moved, *states

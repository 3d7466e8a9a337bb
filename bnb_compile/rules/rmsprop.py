"""RMSprop, with or without momentum and centering.

Hinton, lecture 6 of https://www.cs.toronto.edu/~hinton/coursera_lectures.html; Graves,
https://arxiv.org/abs/1308.0850, for the centered form; weight decay is added to the gradient, as in
``torch.optim.RMSprop``. The centered form keeps the variance itself instead of the mean of squares: the same
number, but rounding a state to 8 bits can neither make it negative nor drown it in the square of the mean.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of RMSprop."""

    lr: Any = 0.01
    alpha: Any = 0.99
    eps: Any = 1e-08
    weight_decay: Any = 0.0
    momentum: Any = 0.9


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    step_size: Tensor
    unit: Tensor
    weight_decay: Tensor
    alpha: Tensor
    one_minus_alpha: Tensor
    eps: Tensor
    momentum: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    return Scalars(
        keep=torch.ones_like(h.lr),
        step_size=h.lr,
        unit=torch.ones_like(h.lr),
        weight_decay=h.weight_decay,
        alpha=h.alpha,
        one_minus_alpha=1 - h.alpha,
        eps=h.eps,
        momentum=h.momentum,
    )


def _rule(centered: bool, momentum: bool) -> Rule:
    def direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *states, s = rest
        grad = grad + s.weight_decay * param
        if centered:
            # The variance around an exponential mean, West, https://doi.org/10.1145/359146.359153.
            variance, grad_avg, *others = states
            deviation = grad - grad_avg
            variance = s.alpha * (variance + s.one_minus_alpha * deviation * deviation)
            fresh = [variance, grad_avg + s.one_minus_alpha * deviation]
        else:
            square_avg, *others = states
            fresh = [s.alpha * square_avg + s.one_minus_alpha * grad * grad]
        scaled = grad / (fresh[0].sqrt() + s.eps)
        if momentum:
            scaled = s.momentum * others[0] + scaled
            fresh.append(scaled)
        return scaled, *fresh

    states = [State("variance", nonnegative=True), State("grad_avg")]
    states = states if centered else [State("square_avg", nonnegative=True)]
    if momentum:
        states.append(State("momentum_buffer"))
    name = "rmsprop" + "_centered" * centered + "_momentum" * momentum
    return Rule(name, Hyper, tuple(states), _scalars, direction)


#: By whether it is centered and whether it has momentum.
RMSPROP = {(c, m): _rule(c, m) for c in (False, True) for m in (False, True)}

"""Stochastic gradient descent with or without momentum, as in ``torch.optim.SGD``.

Weight decay is added to the gradient. The first step puts the gradient into the buffer, whatever
`dampening` is. Nesterov's form follows Sutskever et al., https://proceedings.mlr.press/v28/sutskever13.html.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of SGD; `nesterov` is 0 or 1."""

    lr: Any = 0.001
    momentum: Any = 0.9
    dampening: Any = 0.0
    weight_decay: Any = 0.0
    nesterov: Any = 0.0


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    step_size: Tensor
    unit: Tensor
    weight_decay: Tensor
    momentum: Tensor
    of_grad: Tensor  # the gradient's share in the buffer
    nesterov: Tensor
    of_buffer: Tensor  # the buffer's share in the direction


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    return Scalars(
        keep=torch.ones_like(h.lr),
        step_size=h.lr,
        unit=torch.ones_like(h.lr),
        weight_decay=h.weight_decay,
        momentum=h.momentum,
        of_grad=torch.where(step == 1, 1.0, 1 - h.dampening),
        nesterov=h.nesterov,
        of_buffer=torch.where(h.nesterov == 1, h.momentum, 1.0),
    )


def _direction(param: Tensor, grad: Tensor, momentum_buffer: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    grad = grad + s.weight_decay * param
    momentum_buffer = s.momentum * momentum_buffer + s.of_grad * grad
    return s.nesterov * grad + s.of_buffer * momentum_buffer, momentum_buffer


def _direction_plain(param: Tensor, grad: Tensor, s: Scalars) -> tuple[Tensor]:
    return (grad + s.weight_decay * param,)


SGD = Rule("sgd", Hyper, (State("momentum_buffer"),), _scalars, _direction)
#: Without momentum, and so without any state.
SGD_PLAIN = Rule("sgd_plain", Hyper, (), _scalars, _direction_plain)

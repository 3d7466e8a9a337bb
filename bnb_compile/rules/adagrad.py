"""Adagrad, Duchi et al., https://jmlr.org/papers/v12/duchi11a.html, as in ``torch.optim.Adagrad``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of Adagrad."""

    lr: Any = 0.01
    lr_decay: Any = 0.0
    eps: Any = 1e-10
    weight_decay: Any = 0.0


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    step_size: Tensor
    unit: Tensor
    weight_decay: Tensor
    eps: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    return Scalars(
        keep=torch.ones_like(h.lr),
        step_size=h.lr / (1 + (step - 1) * h.lr_decay),
        unit=torch.ones_like(h.lr),
        weight_decay=h.weight_decay,
        eps=h.eps,
    )


def _direction(param: Tensor, grad: Tensor, square_sum: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    grad = grad + s.weight_decay * param
    square_sum = square_sum + grad * grad
    return grad / (square_sum.sqrt() + s.eps), square_sum


ADAGRAD = Rule("adagrad", Hyper, (State("sum", nonnegative=True),), _scalars, _direction)

"""Lion: the sign of a momentum, with decoupled weight decay. Chen et al., https://arxiv.org/abs/2302.06675."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of Lion."""

    lr: Any = 0.0001
    beta1: Any = 0.9
    beta2: Any = 0.99
    weight_decay: Any = 0.0


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    unit: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    return Scalars(
        keep=1 - h.lr * h.weight_decay,
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        step_size=h.lr,
        unit=torch.ones_like(h.lr),
    )


def _direction(param: Tensor, grad: Tensor, exp_avg: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    direction = (s.beta1 * exp_avg + s.one_minus_beta1 * grad).sign()
    return direction, s.beta2 * exp_avg + s.one_minus_beta2 * grad


LION = Rule("lion", Hyper, (State("exp_avg"),), _scalars, _direction)

"""ADOPT: Adam that divides by the second moment of earlier steps, and so converges with any `beta2`.

Taniguchi et al., https://arxiv.org/abs/2411.02853, algorithm 2, with decoupled weight decay. The first step
only begins the second moment.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of ADOPT."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    limit: Tensor  # of a normalised gradient's magnitude
    step_size: Tensor
    eps: Tensor
    unit: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    first = step == 1
    return Scalars(
        keep=torch.where(first, 1.0, 1 - h.lr * h.weight_decay),
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=torch.where(first, 0.0, h.beta2),
        one_minus_beta2=torch.where(first, 1.0, 1 - h.beta2),
        limit=(step - 1) ** 0.25,
        step_size=torch.where(first, 0.0, h.lr),
        eps=h.eps,
        unit=torch.ones_like(h.lr),
    )


def _direction(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars
) -> tuple[Tensor, Tensor, Tensor]:
    normalised = grad / torch.maximum(exp_avg_sq.sqrt(), s.eps)
    clipped = torch.maximum(torch.minimum(normalised, s.limit), -s.limit)
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * clipped
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    return exp_avg, exp_avg, exp_avg_sq


ADOPT = Rule(
    "adopt",
    Hyper,
    (State("exp_avg", signed=True), State("exp_avg_sq", signed=False)),
    _scalars,
    _direction,
)

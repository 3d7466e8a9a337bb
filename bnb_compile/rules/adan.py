"""Adan: Nesterov's momentum from gradients and their differences.

Xie et al., https://arxiv.org/abs/2208.06677, algorithm 1 with bias corrections, in the notation of the
authors' code: `betas` are what the averages keep, and weight decay is proximal, ``param / (1 + lr *
weight_decay)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of Adan."""

    lr: Any = 0.001
    beta1: Any = 0.98
    beta2: Any = 0.92
    beta3: Any = 0.99
    eps: Any = 1e-08
    weight_decay: Any = 0.0


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    beta3: Tensor
    one_minus_beta3: Tensor
    after_first: Tensor  # 0 in the first step, which has no difference, then 1
    of_diff: Tensor  # the differences' share in the direction
    step_size: Tensor
    eps: Tensor
    unit: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    correction1, correction2 = 1 - h.beta1**step, 1 - h.beta2**step
    correction3 = (1 - h.beta3**step).sqrt()
    keep = 1 / (1 + h.lr * h.weight_decay)
    return Scalars(
        keep=keep,
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        beta3=h.beta3,
        one_minus_beta3=1 - h.beta3,
        after_first=torch.where(step == 1, 0.0, 1.0),
        of_diff=h.beta2 * correction1 / correction2,
        step_size=keep * h.lr * correction3 / correction1,
        eps=h.eps * correction3,
        unit=correction3 / correction1,
    )


def _direction(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_diff: Tensor,
    previous_grad: Tensor,
    s: Scalars,
) -> tuple[Tensor, ...]:
    diff = s.after_first * (grad - previous_grad)
    ahead = grad + s.beta2 * diff
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    exp_avg_diff = s.beta2 * exp_avg_diff + s.one_minus_beta2 * diff
    exp_avg_sq = s.beta3 * exp_avg_sq + s.one_minus_beta3 * ahead * ahead
    direction = (exp_avg + s.of_diff * exp_avg_diff) / (exp_avg_sq.sqrt() + s.eps)
    return direction, exp_avg, exp_avg_sq, exp_avg_diff, grad


ADAN = Rule(
    "adan",
    Hyper,
    (
        State("exp_avg"),
        State("exp_avg_sq", nonnegative=True),
        State("exp_avg_diff"),
        State("previous_grad"),
    ),
    _scalars,
    _direction,
)

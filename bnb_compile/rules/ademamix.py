"""AdEMAMix: Adam with a second, slower first moment.

Pagliardini et al., https://arxiv.org/abs/2409.03137. The slow moment has no bias correction; `alpha` and
`beta3` can grow over the first `t_alpha` and `t_beta3` steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of AdEMAMix; `t_alpha` and `t_beta3` are 0 where there is no schedule."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    beta3: Tensor
    alpha: Tensor
    t_alpha: Tensor
    t_beta3: Tensor
    eps: Tensor
    weight_decay: Tensor


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    beta3: Tensor
    one_minus_beta3: Tensor
    of_slow: Tensor  # the slow moment's share, beside the fast one
    step_size: Tensor
    eps: Tensor
    unit: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    correction1 = 1 - h.beta1**step
    correction2 = (1 - h.beta2**step).sqrt()
    alpha = torch.where(
        h.t_alpha > 0, torch.minimum(step / h.t_alpha, torch.ones_like(step)) * h.alpha, h.alpha
    )
    # beta3 grows so that its half-life grows linearly.
    log1, log3, passed = h.beta1.log(), h.beta3.log(), step / h.t_beta3
    scheduled = (log1 * log3 / ((1 - passed) * log3 + passed * log1)).exp()
    beta3 = torch.where(h.t_beta3 > 0, torch.minimum(scheduled, h.beta3), h.beta3)
    return Scalars(
        keep=1 - h.lr * h.weight_decay,
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        beta3=beta3,
        one_minus_beta3=1 - beta3,
        of_slow=alpha * correction1,
        step_size=h.lr * correction2 / correction1,
        eps=h.eps * correction2,
        unit=correction2 / correction1,
    )


def _direction(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_slow: Tensor, s: Scalars
) -> tuple[Tensor, ...]:
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    exp_avg_slow = s.beta3 * exp_avg_slow + s.one_minus_beta3 * grad
    direction = (exp_avg + s.of_slow * exp_avg_slow) / (exp_avg_sq.sqrt() + s.eps)
    return direction, exp_avg, exp_avg_sq, exp_avg_slow


ADEMAMIX = Rule(
    "ademamix",
    Hyper,
    (
        State("exp_avg", signed=True),
        State("exp_avg_sq", signed=False),
        State("exp_avg_slow", signed=True),
    ),
    _scalars,
    _direction,
)

"""AdEMAMix: Adam with a second, slower first moment.

Pagliardini et al., https://arxiv.org/abs/2409.03137. The slow moment has no bias correction; `alpha` and
`beta3` can grow over the first `t_alpha` and `t_beta3` steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import adam
from .rule import Rule, State, extended


class Hyper(NamedTuple):
    """Hyperparameters of AdEMAMix; `t_alpha` and `t_beta3` are 0 where there is no schedule."""

    lr: Any = 0.001
    beta1: Any = 0.9
    beta2: Any = 0.999
    beta3: Any = 0.9999
    alpha: Any = 5.0
    t_alpha: Any = 0.0
    t_beta3: Any = 0.0
    eps: Any = 1e-08
    weight_decay: Any = 0.0


#: Adam's; and the slow moment's decay rate and its share in the direction.
Scalars = extended(adam.Scalars, "beta3", "one_minus_beta3", "of_slow")


def _scalars(h: Hyper, step: Tensor) -> Any:
    grown = torch.minimum(step / h.t_alpha, torch.ones_like(step))
    alpha = torch.where(h.t_alpha > 0, grown * h.alpha, h.alpha)
    # beta3 grows so that its half-life grows linearly.
    log1, log3, passed = h.beta1.log(), h.beta3.log(), step / h.t_beta3
    scheduled = (log1 * log3 / ((1 - passed) * log3 + passed * log1)).exp()
    beta3 = torch.where(h.t_beta3 > 0, torch.minimum(scheduled, h.beta3), h.beta3)
    # `unit` corrects the fast moment's bias, which the slow one does not have.
    of_slow = alpha * (1 - h.beta1**step)
    return Scalars(*adam.scalars(h, step), beta3=beta3, one_minus_beta3=1 - beta3, of_slow=of_slow)


def _direction(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, exp_avg_slow: Tensor, s: Any
) -> tuple[Tensor, ...]:
    exp_avg, exp_avg_sq = adam.moments(grad, exp_avg, exp_avg_sq, s)
    exp_avg_slow = s.beta3 * exp_avg_slow + s.one_minus_beta3 * grad
    direction = (exp_avg + s.of_slow * exp_avg_slow) / (exp_avg_sq.sqrt() + s.eps)
    return direction, exp_avg, exp_avg_sq, exp_avg_slow


ADEMAMIX = Rule(
    "ademamix",
    Hyper,
    (*adam.STATES, State("exp_avg_slow")),
    _scalars,
    _direction,
)

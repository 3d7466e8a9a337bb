"""Adam with decoupled weight decay, and its variant AMSGrad.

Kingma & Ba, https://arxiv.org/abs/1412.6980; Loshchilov & Hutter, https://arxiv.org/abs/1711.05101; Reddi et
al., https://arxiv.org/abs/1904.09237. The decay comes before the update and `eps` is added to the
bias-corrected root, as in ``torch.optim.AdamW``; bitsandbytes' ``Adam`` and ``AdamW`` are both this, with
other defaults.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of Adam."""

    lr: Any = 0.001
    beta1: Any = 0.9
    beta2: Any = 0.999
    eps: Any = 1e-08
    weight_decay: Any = 0.0


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    eps: Tensor
    unit: Tensor


def scalars(h: Any, step: Tensor) -> Scalars:
    """Adam's scalars, of hyperparameters that have at least its own."""
    correction1 = 1 - h.beta1**step
    correction2 = (1 - h.beta2**step).sqrt()
    return Scalars(
        keep=1 - h.lr * h.weight_decay,
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        step_size=h.lr * correction2 / correction1,
        eps=h.eps * correction2,
        unit=correction2 / correction1,
    )


def moments(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Both moments after a step."""
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    return exp_avg, exp_avg_sq


def direction(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars
) -> tuple[Tensor, Tensor, Tensor]:
    """Adam's update, before the bias correction of its size."""
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, s)
    return exp_avg / (exp_avg_sq.sqrt() + s.eps), exp_avg, exp_avg_sq


def direction_amsgrad(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor, s: Scalars
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `direction`, with the largest second moment so far."""
    exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, s)
    max_exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq)
    return exp_avg / (max_exp_avg_sq.sqrt() + s.eps), exp_avg, exp_avg_sq, max_exp_avg_sq


def impulse(lost: Tensor, root: Tensor, s: Scalars) -> Tensor:
    """What a part of the first moment adds to the directions of all the steps to come."""
    steps = s.beta1 / s.one_minus_beta1
    return torch.where(root > 0, lost / (root + s.eps) * steps, 0.0)


STATES = (
    State("exp_avg", over="exp_avg_sq", decays=("beta1", "beta2"), impulse=impulse),
    State("exp_avg_sq", nonnegative=True),
)
STATES_AMSGRAD = (*STATES, State("max_exp_avg_sq", nonnegative=True, maximum=True))

ADAM = Rule("adam", Hyper, STATES, scalars, direction)
ADAM_AMSGRAD = Rule("adam_amsgrad", Hyper, STATES_AMSGRAD, scalars, direction_amsgrad)

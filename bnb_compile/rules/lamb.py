"""LAMB: Adam whose update a trust ratio limits.

You et al., https://arxiv.org/abs/1904.00962. The trust ratio is not a part of the rule: every step operator
can apply one (`max_unorm`). Bias correction can be left out, and weight decay can be added to the gradient
instead of being decoupled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import adam
from .rule import Rule


class Hyper(NamedTuple):
    """Hyperparameters of LAMB; the last two are 0 or 1."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor
    bias_correction: Tensor
    adam_w_mode: Tensor


class Scalars(NamedTuple):
    """Adam's, and what is added of a parameter to its gradient."""

    keep: Tensor
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    eps: Tensor
    unit: Tensor
    l2: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    correction1 = torch.where(h.bias_correction == 1, 1 - h.beta1**step, 1.0)
    correction2 = torch.where(h.bias_correction == 1, (1 - h.beta2**step).sqrt(), 1.0)
    return Scalars(
        keep=1 - h.lr * h.weight_decay * h.adam_w_mode,
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        step_size=h.lr * correction2 / correction1,
        eps=h.eps * correction2,
        unit=correction2 / correction1,
        l2=h.weight_decay * (1 - h.adam_w_mode),
    )


def _direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    s = rest[-1]
    return adam.direction(param, grad + s.l2 * param, *rest)


def _direction_amsgrad(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    s = rest[-1]
    return adam.direction_amsgrad(param, grad + s.l2 * param, *rest)


LAMB = Rule("lamb", Hyper, adam.STATES, _scalars, _direction)
LAMB_AMSGRAD = Rule("lamb_amsgrad", Hyper, adam.STATES_AMSGRAD, _scalars, _direction_amsgrad)

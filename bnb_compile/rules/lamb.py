"""LAMB: Adam whose update a trust ratio limits.

You et al., https://arxiv.org/abs/1904.00962. The trust ratio is not a part of the rule: every step operator
can apply one (`max_unorm`). Bias correction can be left out, and weight decay can be added to the gradient
instead of being decoupled.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import adam
from .rule import Rule, extended


class Hyper(NamedTuple):
    """Hyperparameters of LAMB; the last two are 0 or 1."""

    lr: Any = 0.001
    beta1: Any = 0.9
    beta2: Any = 0.999
    eps: Any = 1e-08
    weight_decay: Any = 0.0
    bias_correction: Any = 1.0
    adam_w_mode: Any = 1.0


#: Adam's, and what is added of a parameter to its gradient.
Scalars = extended(adam.Scalars, "l2")


def _scalars(h: Hyper, step: Tensor) -> Any:
    # After infinitely many steps there is no bias.
    step = torch.where(h.bias_correction == 1, step, math.inf)
    decoupled = h.weight_decay * h.adam_w_mode
    return Scalars(*adam.scalars(h._replace(weight_decay=decoupled), step), l2=h.weight_decay - decoupled)


def _direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    s = rest[-1]
    return adam.direction(param, grad + s.l2 * param, *rest)


def _direction_amsgrad(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    s = rest[-1]
    return adam.direction_amsgrad(param, grad + s.l2 * param, *rest)


LAMB = Rule("lamb", Hyper, adam.STATES, _scalars, _direction)
LAMB_AMSGRAD = Rule("lamb_amsgrad", Hyper, adam.STATES_AMSGRAD, _scalars, _direction_amsgrad)

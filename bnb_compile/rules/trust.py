"""The trust ratio, which limits an update's norm to a share of its parameter's.

It is the clip of bitsandbytes' `max_unorm`, You et al.'s LARS (https://arxiv.org/abs/1708.03888) with an
upper bound of 1. A parameter that is zero has no norm to compare with, and moves freely instead of never.
"""

from __future__ import annotations

import torch
from torch import Tensor


def trust_ratio(max_unorm: Tensor, param_norm: Tensor, update_norm: Tensor) -> Tensor:
    """What an update is multiplied by; 1 where `max_unorm` is 0."""
    limit = max_unorm * param_norm
    ratio = torch.where(update_norm > limit, limit / update_norm, 1.0)
    return torch.where(limit > 0, ratio, 1.0)

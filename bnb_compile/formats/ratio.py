"""A mean divided by the root of the mean of squares: what some formats store of a first moment.

Whatever the scales of the gradients in a block are, the ratio is of the order of 1: at most
``(1 - beta1) / sqrt((1 - beta2) * (1 - beta1 ** 2 / beta2))`` by Cauchy's inequality, 7.3 for Adam's
defaults, if ``beta1 ** 2 < beta2``. The divisor is the root of the second moment *as it is stored*, so that
what is decoded needs nothing else, and a first moment that is not 0 has a second moment that is not 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def roots(over: Tensor) -> tuple[Tensor, Tensor]:
    """The root of a state as stored, and what a mean is multiplied by to be divided by it.

    Where squares are below all normal numbers, because a checkpoint or another format has rounded them to 0,
    the ratio is 0.
    """
    root = over.sqrt()
    return root, torch.where(over >= _TINY, root.reciprocal(), 0.0)


def most(decay: float, decay_over: float) -> float:
    """The largest ratio of a mean to the root of the mean of squares of the same numbers, after any steps.

    Args:
        decay: What the mean keeps in a step.
        decay_over: What the mean of squares keeps.

    Returns:
        float: Infinity if there is no bound, because the mean forgets too slowly.
    """
    if decay_over <= decay**2 or decay_over == 1:
        return math.inf
    return (1 - decay) / math.sqrt((1 - decay_over) * (1 - decay**2 / decay_over))

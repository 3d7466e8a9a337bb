"""Percentile clipping: a gradient is scaled down to a percentile of the norms of the last 100.

bitsandbytes 0.49 has it per parameter, as here. Everything stays on the device, so it is a part of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops.norms import norms_op

NORMS = 100  # of earlier gradients that are remembered


def clipping_scale(ring: Tensor, grads: Sequence[Tensor | None], step: Tensor, percentile: int) -> Tensor:
    """Record the norms of gradients, and say what to multiply them by.

    The norm of step t goes to entry t modulo 100; the first one to all entries. A norm that is not finite is
    not recorded, and nothing is scaled then.

    Args:
        ring: ``(n, 100)`` float32, squared norms of each parameter's gradients; updated.
        grads: The n gradients, or None, not all of them; of one dtype.
        step: ``(n,)`` float32, steps taken so far.
        percentile: In [0, 99]: which of the 100 sorted norms is the largest allowed.

    Returns:
        Tensor: ``(n,)`` float32, at most 1.
    """
    (some, *_) = [grad for grad in grads if grad is not None]
    absent = some.new_full((), math.nan)
    squares = norms_op([absent if grad is None else grad for grad in grads]).square()
    active = squares.isfinite()
    entry = torch.arange(NORMS, device=step.device) == (step[:, None] + 1) % NORMS
    # An empty ring, not the first step: that one may have had no finite gradient.
    entry = entry | (ring == 0).all(1, keepdim=True)
    ring.copy_(torch.where(active[:, None] & entry, squares[:, None], ring))
    limit = ring.sort(1).values[:, percentile]
    return torch.where(active & (squares > limit), (limit / squares).sqrt(), 1.0)

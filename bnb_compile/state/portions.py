"""Which parameters are updated together where gradients are released while the backward pass runs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence

from torch import Tensor

#: Of the gradients of all parameters, how many bytes may wait, where nothing else is asked for.
SHARE = 1 / 20


def portions(params: Sequence[Tensor], kinds: Sequence[Hashable], most: int | bool) -> list[int]:
    """Cut parameters into portions that are small, and whose gradients appear one after another.

    Parameters of different kinds cannot be updated together, so that of each kind a portion waits for its
    last gradient. For the fewest portions, a kind of t bytes may have portions in proportion to sqrt(t).
    DTensors count as whole tensors, so that the portions are the same in all processes.

    Args:
        params: In the order in which their gradients appear, first to last.
        kinds: Of each.
        most: Bytes of gradients that may wait; True for `SHARE` of all. A tensor that is larger is a
            portion of its own.

    Returns:
        list[int]: For each parameter the number of its portion, which counts from 0 for each kind.
    """
    sizes = [param.numel() * param.dtype.itemsize for param in params]
    total: dict[Hashable, int] = defaultdict(int)
    for kind, size in zip(kinds, sizes):
        total[kind] += size
    allowed = SHARE * sum(sizes) if most is True else most
    roots = max(sum(map(math.sqrt, total.values())), 1.0)
    limits = {kind: allowed * math.sqrt(x) / roots for kind, x in total.items()}
    number: dict[Hashable, int] = defaultdict(int)
    filled: dict[Hashable, int] = defaultdict(int)
    found = []
    for kind, size in zip(kinds, sizes):
        if filled[kind] and filled[kind] + size > limits[kind]:
            number[kind] += 1
            filled[kind] = 0
        filled[kind] += size
        found.append(number[kind])
    return found

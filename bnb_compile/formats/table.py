"""Tables of numbers that codes of 8 bits stand for."""

from __future__ import annotations

import torch
from torch import Tensor


class AbstractTable:
    """What the codes of a part stand for.

    Attributes:
        name: As kernels call it.
    """

    name: str

    def values(self, device: torch.device) -> Tensor:
        """``(256,)`` float32: the number of each code. One of them is 0."""
        raise NotImplementedError

    def nearest(self, x: Tensor) -> Tensor:
        """The codes, uint8, of numbers."""
        raise NotImplementedError

    def code(self, x: Tensor) -> Tensor:
        """`nearest` as kernels compute it, which print it: a code as float32, or one next to it."""
        raise NotImplementedError

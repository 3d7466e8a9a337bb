"""Whole numbers times a scale for each block: what ratios are stored in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .arena import BLOCK, Part
from .format import AbstractFormat


class Linear(AbstractFormat):
    """Codes of a ratio from ``-most`` to ``most``, times the block's largest magnitude over `most`.

    Args:
        name: Of the format.
        bits: Of a code: 8, or 4, of which two are packed into a byte.
        block: Elements that share a scale.
    """

    maxima = 1
    ratio = True

    def __init__(self, name: str, bits: int, block: int = BLOCK) -> None:
        self.name = name
        self.most = 2 ** (bits - 1) - 1
        self.parts = (Part("codes", torch.int8, 8 // bits), Part("scale", torch.float32, block))
        self.keys = {"codes": "state" if bits == 8 else "nibbles", "scale": "scale"}

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """See `AbstractFormat`."""
        return numbers[0].float() * shared[0]

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        return [state.abs()]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `AbstractFormat`; what is too small to be divided by counts as 0."""
        return [torch.where(maxima[0] < 2.0**-100, 0.0, maxima[0] * (1 / self.most))]

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        """See `AbstractFormat`; rounds to nearest."""
        scale = shared[0]
        per_unit = torch.where(scale > 0, scale.reciprocal(), 0.0)
        return [torch.floor(state * per_unit + 0.5).to(torch.int32)]

"""Floating-point numbers of 8 bits under a scale for each block: torchao's AdamWFp8 without its floor.

A first moment has e4m3, a second one e5m2, whose range is larger ("FP8 Formats for Deep Learning",
https://arxiv.org/abs/2209.05433). What is above 0 is never rounded to 0. Three bits of a mantissa, or two,
are few for an average that moves by a thousandth of itself: prefer "ratio8", which is as large, or
"dynamic8".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..rules import State
from .arena import BLOCK, Part
from .format import AbstractFormat, Stored


class Float8(AbstractFormat):
    """Numbers of a dtype of 8 bits, the largest of a block being the largest of the dtype.

    Args:
        dtype: The dtype.
        signed: Whether the state can be negative.
    """

    maxima = 1
    keys: Mapping[str, str] = {"values": "state", "unit": "unit"}

    def __init__(self, dtype: torch.dtype, signed: bool) -> None:
        self.name = str(dtype).removeprefix("torch.")
        self.most, self.signed = torch.finfo(dtype).max, signed
        self.least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        self.parts = (Part("values", dtype), Part("unit", torch.float32, BLOCK))

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """See `AbstractFormat`."""
        return numbers[0] * shared[0]

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        return [state.abs() if self.signed else state]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `AbstractFormat`; what is too small to be divided by counts as 0."""
        return [torch.where(maxima[0] < 2.0**-100, 0.0, maxima[0] * (1 / self.most))]

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        """See `AbstractFormat`; rounds to nearest."""
        x = state * torch.where(shared[0] > 0, shared[0].reciprocal(), 0.0)
        x = torch.minimum(x, torch.full_like(x, self.most))
        if self.signed:
            return [torch.maximum(x, torch.full_like(x, -self.most))]
        return [torch.where(x > 0, torch.maximum(x, torch.full_like(x, self.least)), 0.0)]


E4M3, E5M2 = Float8(torch.float8_e4m3fn, signed=True), Float8(torch.float8_e5m2, signed=False)


def choose(states: Sequence[State]) -> tuple[Stored, ...]:
    """The format of each state of a rule."""
    return tuple(Stored(E5M2 if s.nonnegative else E4M3, k) for k, s in enumerate(states))

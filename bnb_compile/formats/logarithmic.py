"""Codes of equal steps between the logarithms of a block's least and greatest positive number.

The bits of a positive float, read as an integer, are a piecewise linear logarithm to the base 2: exponent and
mantissa are its digits. So the steps are equal in those bits, and neither a logarithm nor an exponential is
computed. Code 0 is exactly 0, and every positive number has another code, whatever is next to it in the
block.

Both ends are kept as bfloat16, rounded outwards. The steps are fine enough for one step of an average, but an
average that moves by less than half of one, as a second moment with a large beta2 does, would stand still if
it was rounded to nearest: it is rounded stochastically, which is unbiased within a binade, and above it errs
upwards, by at most a few per cent with 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .arena import BLOCK, Part
from .format import AbstractFormat

_LOW_HALF = 0xFFFF  # of a float32, which a bfloat16 does not have
_SMALLEST_NORMAL = 0x00800000
#: No state is as large (state/checkpoint.py); subtracted from it, the least of positive numbers is the
#: largest.
_TOP = 0x7F000000


class Logarithmic(AbstractFormat):
    """A state that is never negative.

    Args:
        name: Of the format.
        bits: Of a code: 8, or 4, of which two are packed into a byte.
        octaves: The most that the ends are apart; what is further below the greatest is raised. That makes a
            step of Adam smaller, never larger.
        block: Elements that share both ends.
        random: Whether it is rounded stochastically.
    """

    maxima = 2

    def __init__(self, name: str, bits: int, octaves: int, block: int = BLOCK, random: bool = True) -> None:
        self.name, self.octaves, self.random = name, octaves, random
        self.last = 2**bits - 1
        self.parts = (
            Part("codes", torch.uint8, 8 // bits),
            Part("low", torch.bfloat16, block),
            Part("high", torch.bfloat16, block),
        )
        self.keys = {"codes": "state" if bits == 8 else "nibbles", "low": "low", "high": "high"}

    def _scale(self, shared: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Bits of the number of code 1, and of a step: whole numbers, so that all languages have the same."""
        low, high = (x.view(torch.int32) for x in shared)
        return low, ((high - low).float() * (1 / (self.last - 1))).to(torch.int32)

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """See `AbstractFormat`."""
        (code,) = numbers
        low, step = self._scale(shared)
        bits = code * step + (low - step)
        return torch.where(code > 0, bits, torch.zeros_like(bits)).view(torch.float32)

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        return [state, torch.where(state > 0, (_TOP - state.view(torch.int32)).view(torch.float32), 0.0)]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        greatest, least = maxima
        high = greatest.view(torch.int32) + _LOW_HALF
        low = _TOP - least.view(torch.int32)
        low = torch.maximum(low, torch.full_like(low, _SMALLEST_NORMAL))
        low, high = low - (low & _LOW_HALF), high - (high & _LOW_HALF)
        high = torch.maximum(high, low + (_LOW_HALF + 1))
        low = torch.maximum(low, high - (self.octaves << 23))
        return [torch.where(greatest > 0, x.view(torch.float32), 0.0) for x in (low, high)]

    def _checked(self, saved: Mapping[str, Any], number: int, numel: int) -> tuple[dict[str, Tensor], int]:
        parts, row = super()._checked(saved, number, numel)
        if not backends.replaces_tensors() and bool((parts["low"] > parts["high"]).any()):
            raise ValueError(f"low{number} has numbers that are above those of high{number}")
        return parts, row

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        low, step = self._scale(shared)
        per_unit = torch.maximum(step, torch.ones_like(step)).float().reciprocal()
        above = (state.view(torch.int32) - low).float()
        code = (above * per_unit + noise).to(torch.int32).clamp(1, self.last)
        return [torch.where(state > 0, code, torch.zeros_like(code))]

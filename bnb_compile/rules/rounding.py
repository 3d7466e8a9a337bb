"""Stochastic rounding from a counter, so that it needs no generator and can be repeated.

A number between two neighbours becomes the upper one as often as it is near to it, so that updates far below
the spacing of bfloat16 are not lost on average (Gupta et al., https://arxiv.org/abs/1502.02551). The random
bits are a hash of an element's place and of the step: the same on every replica, and other ones for each step
in a replayed CUDA graph. The hash is Wellons' lowbias32, https://nullprogram.com/blog/2018/07/31/.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: The noise that rounds to nearest.
NEAREST = 1.5


def _signed(bits: int) -> int:
    """32 bits as an int32."""
    return bits - 2**32 if bits >= 2**31 else bits


def _xor_shifted(x: Tensor, shift: int) -> Tensor:
    # int32 has no unsigned shift: the sign is masked away.
    return x ^ torch.bitwise_and(torch.bitwise_right_shift(x, shift), 2 ** (32 - shift) - 1)


def random_bits(index: Tensor, step: Tensor) -> Tensor:
    """32 random bits for an element in a step: the low ones for its parameter, the high ones for its states.

    Args:
        index: int32, another one for each element.
        step: int32, another one for each step.

    Returns:
        Tensor: int32.
    """
    return _xor_shifted(high_bits(index, step), 16)


def high_bits(index: Tensor, step: Tensor) -> Tensor:
    """As `random_bits`, but only the high 16 are random: an operation less."""
    x = index ^ (step * _signed(0x9E3779B9))
    x = _xor_shifted(x, 16) * 0x7FEB352D
    return _xor_shifted(x, 15) * _signed(0x846CA68B)


def round_bits(bits: Tensor, random: Tensor) -> Tensor:
    """Round float32 numbers to bfloat16.

    Args:
        bits: float32 numbers as int32.
        random: Their `random_bits`.

    Returns:
        Tensor: int32, the bits of float32 numbers that are bfloat16 numbers.
    """
    return torch.bitwise_and(bits + torch.bitwise_and(random, 0xFFFF), _signed(0xFFFF0000))


def to_bfloat16(x: Tensor) -> Tensor:
    """Finite float32 numbers rounded to the nearest bfloat16 number, or to the even one of two."""
    bits = x.view(torch.int32)
    even = torch.bitwise_and(torch.bitwise_right_shift(bits, 16), 1)
    return torch.bitwise_and(bits + even + 0x7FFF, _signed(0xFFFF0000)).view(torch.float32)


def noise_of(random: Tensor) -> Tensor:
    """A number in [1, 2), float32, from `random_bits` or `high_bits`; it depends on the high half only."""
    mantissa = torch.bitwise_and(torch.bitwise_right_shift(random, 9), 0x7FFF80)
    return torch.bitwise_or(mantissa, 0x3F800000).view(torch.float32)

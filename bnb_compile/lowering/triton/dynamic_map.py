"""The dynamic map with NVIDIA's instructions."""

import math
import struct

import triton
import triton.language as tl

from ...formats import codebook
from .device import add_down, exp2_fast, fma_down, log2_fast

LOG10_2 = tl.constexpr(math.log10(2))
LOG2_5 = tl.constexpr(math.log2(5))
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it leaves an integer in the low bits
_SIGNED, _UNSIGNED = codebook.LOGARITHMIC[True], codebook.LOGARITHMIC[False]
SIGNED_LEAST, UNSIGNED_LEAST = tl.constexpr(_SIGNED.least), tl.constexpr(_UNSIGNED.least)
SIGNED_LOG2_SLOPE = tl.constexpr(_SIGNED.log2_slope)
UNSIGNED_LOG2_SLOPE = tl.constexpr(_UNSIGNED.log2_slope)


def _bits(x: float) -> int:
    return struct.unpack("<i", struct.pack("<f", x))[0]


SIGNED_START, UNSIGNED_START = (tl.constexpr(_bits(m.first_start)) for m in (_SIGNED, _UNSIGNED))
SIGNED_ONE = tl.constexpr(_SIGNED.one)
# The thousandth lets 1.0 reach 256 in spite of rounding.
ONE_CELL = tl.constexpr(_UNSIGNED.one_cell - 0.001)


@triton.jit
def encode_fast(x, SIGNED: tl.constexpr):
    """Code of the dynamic map for `x` in [-1, 1], in the low byte of an int32.

    The cells of a decade are the integers of a binade (formats/codebook.py: Logarithmic); logarithm and power
    are one instruction each. Nearest but for values within rounding of a midpoint, and for those just above
    half of the smallest code, which become 0.
    """
    START: tl.constexpr = SIGNED_START if SIGNED else UNSIGNED_START
    # Without a sign a number above 0 is not rounded to 0 (codebook.never_zero).
    a = tl.maximum(tl.abs(x) if SIGNED else x, SIGNED_LEAST if SIGNED else UNSIGNED_LEAST)
    shifted = fma_down(log2_fast(a), LOG10_2, MAGIC + 7)  # low bits: i = floor(log10(a)) + 7
    slope = exp2_fast(tl.fma(shifted - MAGIC, -LOG2_5, SIGNED_LOG2_SLOPE if SIGNED else UNSIGNED_LOG2_SLOPE))
    start = ((shifted.to(tl.int32, bitcast=True) << 23) + START).to(tl.float32, bitcast=True)  # times 2**i
    y = tl.fma(a, slope, start)
    # Just above a power of ten, up to start * 9/8 + 0.2, the nearest code is still the last one of the decade
    # below: this line is less than y there, and more than the next integer everywhere else.
    y = tl.minimum(y, tl.fma(y, 1.25, tl.fma(start, -0.28125, -0.25)))
    if SIGNED:
        cell = add_down(tl.minimum(y, 127.5), MAGIC) - MAGIC
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        signed = (cell.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        code = (signed + (MAGIC + 127)).to(tl.int32, bitcast=True)
        return tl.where(x > SIGNED_ONE, 255, code)
    # The cell of 1.0 begins a quarter early: this line is more than y there and nowhere else.
    y = tl.maximum(y, tl.fma(y, 4 / 3, 256 - ONE_CELL * (4 / 3)))
    code = add_down(y, MAGIC - 1).to(tl.int32, bitcast=True)
    return tl.where(x > 0, code, 0)

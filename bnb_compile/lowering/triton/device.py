"""What every Triton step kernel calls: the dynamic map in few instructions, and small helpers.

`FAST` selects NVIDIA's approximate instructions through inline PTX; without it the functions are portable
Triton, which also runs under the interpreter. An approximate instruction is right to about 2**-22, and what
it computes here is rounded to a code or to 8 bits of a moment afterwards.
"""

# ruff: noqa: D103
import triton
import triton.language as tl


@triton.jit
def _log2(x):
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _exp2(x):
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _add_down(x, y):
    return tl.inline_asm_elementwise(
        "add.rm.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _fma_down(x, y, z):
    return tl.inline_asm_elementwise(
        "fma.rm.ftz.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sqrt(x, FAST: tl.constexpr):
    if FAST:
        root = tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        root = tl.sqrt_rn(x)
    return root


@triton.jit
def div(x, y, FAST: tl.constexpr):
    if FAST:
        quotient = x * tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        quotient = tl.div_rn(x, y)
    return quotient


@triton.jit
def encode_fast(x, SIGNED: tl.constexpr):
    """Code of the dynamic map for `x` in [-1, 1], in the low byte of an int32.

    The cells of decade i, scaled by 5**-i * 1e6 / 0.9 and shifted by 2**i * 8/9, are the integers of a
    binade (ops/codebook.py); logarithm and power are one instruction each. Nearest but for values within
    rounding of a midpoint, and for those just above half of the smallest code, which become 0.
    """
    MAGIC: tl.constexpr = 12582912.0  # 1.5 * 2**23: adding it leaves an integer in the low bits
    DOUBLE: tl.constexpr = 0 if SIGNED else 1  # the unsigned map has twice the cells
    # Without a sign a number above 0 is not rounded to 0 (quantize_state in ops/step.py): all that are
    # smaller are encoded as the smallest code's value.
    a = tl.maximum(tl.abs(x) if SIGNED else x, 1.2e-7 if SIGNED else 3.25e-7)
    shifted = _fma_down(_log2(a), 0.30102999566, MAGIC + 7)  # low bits: i = floor(log10(a)) + 7
    slope = _exp2(tl.fma(shifted - MAGIC, -2.321928094887362, 20.083570778 + DOUBLE))
    start = ((shifted.to(tl.int32, bitcast=True) << 23) + (0x3F638E39 + (DOUBLE << 23))).to(
        tl.float32, bitcast=True
    )  # 2**(i + DOUBLE) * 8/9
    y = tl.fma(a, slope, start)
    # Just above a power of ten, up to start * 9/8 + 0.2, the nearest code is still the last one of the decade
    # below: this line lies below y there, and above the next integer everywhere else.
    y = tl.minimum(y, tl.fma(y, 1.25, tl.fma(start, -0.28125, -0.25)))
    if SIGNED:
        cell = _add_down(tl.minimum(y, 127.5), MAGIC) - MAGIC
        sign = x.to(tl.int32, bitcast=True) & -0x80000000
        signed = (cell.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        code = (signed + (MAGIC + 127)).to(tl.int32, bitcast=True)
        return tl.where(x > 0.99648434, 255, code)
    # The cell of 1.0 begins a quarter early: this line lies above y there and nowhere else. (The thousandth
    # lets 1.0 reach 256 in spite of rounding.)
    y = tl.maximum(y, tl.fma(y, 4 / 3, 256 - 255.749 * (4 / 3)))
    code = _add_down(y, MAGIC - 1).to(tl.int32, bitcast=True)
    return tl.where(x > 0, code, 0)

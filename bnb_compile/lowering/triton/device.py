"""Arithmetic of the kernels.

`FAST` selects NVIDIA's approximate instructions through inline PTX; without it the functions are portable
Triton, which also runs under the interpreter. An approximate instruction is right to about 2**-22, and what
it computes here is rounded to a code or to 8 bits of a moment afterwards.
"""

# ruff: noqa: D103
import triton
import triton.language as tl


@triton.jit
def log2_fast(x):
    return tl.inline_asm_elementwise(
        "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exp2_fast(x):
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def add_down(x, y):
    return tl.inline_asm_elementwise(
        "add.rm.ftz.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fma_down(x, y, z):
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
def reciprocal(x, FAST: tl.constexpr):
    if FAST:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def rsqrt(x, FAST: tl.constexpr):
    if FAST:
        inverse = tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1.0 / tl.sqrt_rn(x)
    return inverse


@triton.jit
def div(x, y, FAST: tl.constexpr):
    if FAST:
        quotient = x * reciprocal(y, True)
    else:
        quotient = tl.div_rn(x, y)
    return quotient

"""Block-wise quantisation to 8 bits as operators: one scale, the largest magnitude, for each block.

See `formats.dynamic8` for what they compute, and for what non-finite and vanishing values do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.dynamic8 import dequantize, dynamic_map, quantize
from .library import define

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _check_map(code: Tensor | None, block_size: int) -> None:
    torch._check_value(
        code is None or (code.dtype == torch.float32 and code.shape == (256,)),
        lambda: f"code must be None or 256 ascending float32 values, got {code}",
    )
    torch._check_value(block_size >= 1, lambda: f"block_size must be at least 1, got {block_size}")


def _check_quantize(x: Tensor, code: Tensor | None, block_size: int) -> None:
    _check_map(code, block_size)
    torch._check_value(x.dtype in _FLOATS, lambda: f"x must be float32, float16 or bfloat16, got {x.dtype}")


def _check_dequantize(
    codes: Tensor, absmax: Tensor, code: Tensor | None, block_size: int, dtype: torch.dtype
) -> None:
    _check_map(code, block_size)
    torch._check_value(codes.dtype == torch.uint8, lambda: f"codes must be uint8, got {codes.dtype}")
    torch._check_value(dtype in _FLOATS, lambda: f"dtype must be float32, float16 or bfloat16, got {dtype}")
    count = -(-codes.numel() // block_size)
    torch._check_value(
        absmax.dtype == torch.float32 and absmax.numel() == count,
        lambda: (
            f"absmax must be {count} float32 scales, one for each block of {block_size} "
            f"codes, got {absmax.numel()} of {absmax.dtype}"
        ),
    )


def _quantize_eager(
    x: Tensor, code: Tensor | None, block_size: int, signed: bool = True
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, code, block_size)
    return quantize(x, dynamic_map(signed, x.device) if code is None else code, block_size)


def _quantize_fake(
    x: Tensor, code: Tensor | None, block_size: int, signed: bool = True
) -> tuple[Tensor, Tensor]:
    _check_quantize(x, code, block_size)
    count = -(-x.numel() // block_size)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(count, dtype=torch.float32)


def _dequantize_eager(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor | None,
    block_size: int,
    dtype: torch.dtype,
    signed: bool = True,
) -> Tensor:
    _check_dequantize(codes, absmax, code, block_size, dtype)
    values = dynamic_map(signed, codes.device).values if code is None else code
    return dequantize(codes, absmax, values, block_size).to(dtype)


def _dequantize_fake(
    codes: Tensor,
    absmax: Tensor,
    code: Tensor | None,
    block_size: int,
    dtype: torch.dtype,
    signed: bool = True,
) -> Tensor:
    _check_dequantize(codes, absmax, code, block_size, dtype)
    return codes.new_empty(codes.shape, dtype=dtype)


quantize_op = define(
    "quantize_blockwise(Tensor x, Tensor? code, int block_size, bool signed=True)"
    " -> (Tensor codes, Tensor absmax)",
    _quantize_eager,
    _quantize_fake,
)
dequantize_op = define(
    "dequantize_blockwise(Tensor codes, Tensor absmax, Tensor? code, int block_size,"
    " ScalarType dtype, bool signed=True) -> Tensor",
    _dequantize_eager,
    _dequantize_fake,
)

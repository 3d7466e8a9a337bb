"""Block-wise quantisation to 8 bits: one scale, the largest magnitude, for each block of elements.

What non-finite and vanishing values do:

- A block that holds a NaN or an infinity has it as its absmax, the code of zero everywhere, and
  decodes to NaN everywhere (to an infinity with a table that has no exact zero): nothing non-finite turns
  into a number.
- A block whose largest magnitude is below 2**-126 (the smallest normal float32) counts as zero:
  absmax 0, and it decodes to exactly 0.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import codebook
from .library import define

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class DynamicMap(NamedTuple):
    """The two tables that quantise with and decode the dynamic map, on one device."""

    signed: bool
    values: Tensor  # (256,) float32, by code
    outward: Tensor  # (256,) or (257,) float32, see codebook.outward_bounds


@functools.cache
def dynamic_map(signed: bool, device: torch.device) -> DynamicMap:
    """The dynamic map's tables on a device; made once for each device."""
    values = codebook.create_dynamic_map(signed)
    outward = codebook.outward_bounds(signed)
    return DynamicMap(signed, values.to(device), outward.to(device))


def _spread(scales: Tensor, numel: int, block_size: int) -> Tensor:
    """The scale of each element."""
    if numel % block_size == 0:
        return scales[:, None].expand(-1, block_size).reshape(-1)
    # (2 i + 1) // (2 b) is i // b. Inductor's C++ backend splits a loop over i at a division of i itself,
    # and then leaves out the last, partial block (CppScheduling.try_loop_split, torch 2.13).
    element = torch.arange(numel, device=scales.device)
    return scales[(2 * element + 1) // (2 * block_size)]


def quantize(x: Tensor, code: DynamicMap | Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`quantize_blockwise` as plain torch code; `code` is the dynamic map or a table of values."""
    flat = x.reshape(-1).float()
    numel, count = flat.numel(), -(-flat.numel() // block_size)
    blocks = torch.nn.functional.pad(flat, (0, count * block_size - numel))
    absmax = blocks.view(count, block_size).abs().amax(1)
    absmax = torch.where(absmax < SMALLEST_NORMAL, 0.0, absmax)
    normalised = flat / _spread(torch.where(absmax == 0, 1.0, absmax), numel, block_size)
    if isinstance(code, DynamicMap):
        codes = codebook.nearest(normalised, code.signed, code.outward)
    else:
        # A NaN belongs to no cell and would be given the last one; it shall have the code of zero.
        normalised = torch.where(normalised.isnan(), 0.0, normalised)
        codes = torch.bucketize(normalised, codebook.bounds(code)).to(torch.uint8)
    return codes.view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """`dequantize_blockwise` as plain torch code, to float32."""
    flat = codes.reshape(-1)
    value = values[flat.int()] * _spread(absmax, flat.numel(), block_size)
    return value.view(codes.shape)


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

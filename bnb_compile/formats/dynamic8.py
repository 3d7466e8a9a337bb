"""bitsandbytes' 8 bits: codes of the dynamic map, and one scale for each block of elements.

"8-bit Optimizers via Block-wise Quantization", Dettmers et al., https://arxiv.org/abs/2110.02861. A state
that is never negative has the unsigned map, which is twice as fine.

What non-finite and vanishing values do:

- A block that holds a NaN or an infinity has it as its absmax, the code of zero everywhere, and
  decodes to NaN everywhere (to an infinity with a table that has no exact zero): nothing non-finite turns
  into a number.
- A block whose largest magnitude is below 2**-126 (the smallest normal float32) counts as zero:
  absmax 0, and it decodes to exactly 0.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..rules import State
from . import codebook
from .arena import BLOCK, Part, layout
from .format import (
    AbstractFormat,
    Stored,
    block_maxima,
    check_dense,
    check_finite,
    same_blocks,
    spread,
)
from .table import AbstractTable

SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_OLD_BLOCK = 2048  # of bitsandbytes before 0.44


class DynamicMap(NamedTuple):
    """The two tables that quantise with and decode the dynamic map, on one device."""

    signed: bool
    values: Tensor  # (256,) float32, by code
    outward: Tensor  # (256,) or (257,) float32, see codebook.outward_bounds


#: Made here, because no tensor can be made while something traces.
_ON_CPU = {
    signed: DynamicMap(signed, codebook.create_dynamic_map(signed), codebook.outward_bounds(signed))
    for signed in (True, False)
}


@functools.cache
def _on_device(signed: bool, device: torch.device) -> DynamicMap:
    return _to(device, signed)


def _to(device: torch.device, signed: bool) -> DynamicMap:
    _, values, outward = _ON_CPU[signed]
    return DynamicMap(signed, values.to(device), outward.to(device))


def dynamic_map(signed: bool, device: torch.device) -> DynamicMap:
    """The dynamic map's tables on a device; made once for each device."""
    # A stand-in must not be kept.
    return _to(device, signed) if backends.replaces_tensors() else _on_device(signed, device)


def _scale(largest: Tensor) -> Tensor:
    """A block's absmax from its largest magnitude."""
    return torch.where(largest < SMALLEST_NORMAL, 0.0, largest)


def quantize(x: Tensor, code: DynamicMap | Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`quantize_blockwise` as plain torch code; `code` is the dynamic map or a table of values."""
    flat = x.reshape(-1).float()
    absmax = _scale(block_maxima(flat.abs(), block_size))
    normalised = flat / spread(torch.where(absmax == 0, 1.0, absmax), flat.numel(), block_size)
    if isinstance(code, DynamicMap):
        codes = codebook.nearest(normalised, code.signed, code.outward)
    else:
        # NaN compares false with every bound and would get the last code; map it to zero.
        normalised = torch.where(normalised.isnan(), 0.0, normalised)
        codes = torch.bucketize(normalised, codebook.bounds(code)).to(torch.uint8)
    return codes.view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, values: Tensor, block_size: int) -> Tensor:
    """`dequantize_blockwise` as plain torch code, to float32."""
    flat = codes.reshape(-1)
    value = values[flat.int()] * spread(absmax, flat.numel(), block_size)
    return value.view(codes.shape)


class DynamicTable(AbstractTable):
    """The dynamic map as a table of a state's codes.

    A number above 0 does not get the code of 0 of the unsigned map, see `codebook.never_zero`.

    Args:
        signed: Which map.
    """

    def __init__(self, signed: bool) -> None:
        self.signed = signed
        self.name = "signed_map" if signed else "unsigned_map"

    def values(self, device: torch.device) -> Tensor:
        """See `AbstractTable`."""
        return dynamic_map(self.signed, device).values

    def nearest(self, x: Tensor) -> Tensor:
        """See `AbstractTable`."""
        codes = codebook.nearest(x, self.signed, dynamic_map(self.signed, x.device).outward)
        return codes if self.signed else codebook.never_zero(codes, x)

    def code(self, x: Tensor) -> Tensor:
        """See `AbstractTable`."""
        return codebook.code(x, self.signed)


class Dynamic8(AbstractFormat):
    """One state as codes of the dynamic map.

    Args:
        signed: Whether the state can be negative, and so has the signed map.
        random: Whether it is rounded stochastically, which bitsandbytes does not do, but reads; only without
            a sign.
    """

    parts = (Part("codes", torch.uint8), Part("absmax", torch.float32, per=BLOCK))
    maxima = 1
    keys: Mapping[str, str] = {"codes": "state", "absmax": "absmax"}

    def __init__(self, signed: bool, random: bool = False) -> None:
        self.signed, self.random = signed, random
        self.name = "dynamic8sr" if random else "dynamic8"
        self.tables = {"codes": DynamicTable(signed)}

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """See `AbstractFormat`."""
        return numbers[0] * shared[0]

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        return [state.abs() if self.signed else state]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        return [_scale(maxima[0])]

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        absmax = shared[0]
        x = state * torch.where(absmax > 0, absmax.reciprocal(), 0.0)
        return [codebook.stochastic(x, noise) if self.random else x]

    def is_in(self, saved: Mapping[str, Any], number: int) -> bool:
        """See `AbstractFormat`; a tensor of codes without anything else is a damaged one of these."""
        codes = saved.get(f"state{number}")
        return isinstance(codes, Tensor) and codes.dtype == torch.uint8 and f"low{number}" not in saved

    def entries(self, parts: Mapping[str, Tensor], number: int, shape: torch.Size) -> dict[str, Tensor]:
        """See `AbstractFormat`."""
        codes, absmax = parts["codes"], parts["absmax"]
        return {
            f"state{number}": codes.view(shape),
            f"qmap{number}": dynamic_map(self.signed, codes.device).values,
            f"absmax{number}": absmax,
        }

    def parts_of(
        self, saved: Mapping[str, Any], number: int, numel: int, row: int = 0
    ) -> dict[str, Tensor] | None:
        """See `AbstractFormat`."""
        if not self.is_in(saved, number):
            return None
        found = _blockwise(saved, number, numel, self.signed)
        if found.block != BLOCK or found.signed != self.signed or not same_blocks(found.row, row):
            return None
        return {"codes": found.codes, "absmax": found.absmax}

    def decode_saved(self, saved: Mapping[str, Any], number: int, numel: int) -> Tensor:
        """See `AbstractFormat`; reads either map, blocks of 2048 elements, and blocks that end with rows."""
        found = _blockwise(saved, number, numel, self.signed)
        values = dynamic_map(found.signed, found.codes.device).values
        if not found.row:
            return dequantize(found.codes, found.absmax, values, found.block)
        (slot,) = layout([numel], (found.row, 0, 0)).slots
        return slot.unpadded(dequantize(slot.padded(found.codes), found.absmax, values, BLOCK))


class _Blockwise(NamedTuple):
    codes: Tensor
    absmax: Tensor
    signed: bool
    block: int
    row: int  # elements, if blocks end with rows; 0 if not


def _blockwise(saved: Mapping[str, Any], number: int, numel: int, expected: bool) -> _Blockwise:
    """A state of a checkpoint as bitsandbytes writes it, checked.

    Args:
        saved: The entry.
        number: Of the state in its keys.
        numel: Of the parameter.
        expected: Whether its map should be the signed one, which a tensor without values is taken to be.
    """
    codes = check_dense(f"state{number}", saved.get(f"state{number}"))
    counts = {-(-numel // size): size for size in (_OLD_BLOCK, BLOCK)}
    name = f"absmax{number}"
    if name in saved or f"max{number}" not in saved:
        absmax = check_dense(name, saved.get(name))
    else:  # bitsandbytes up to 0.49 with block_wise=False
        name = f"max{number}"
        absmax = check_dense(name, saved[name])
        absmax = absmax.expand(-(-numel // BLOCK)) if absmax.numel() == 1 else absmax
    row, block = 0, 0
    if absmax.dim() == 2:
        rows, row_blocks = absmax.shape
        row = numel // max(rows, 1)
        leading = itertools.accumulate(codes.shape[:-1], operator.mul)
        if rows not in leading or (numel and -(-row // BLOCK) != row_blocks):
            raise ValueError(
                f"{name} has shape {tuple(absmax.shape)}, must be a scale for each block of each row of "
                f"{tuple(codes.shape)} codes"
            )
        absmax, block, row = absmax.reshape(-1), BLOCK, row if rows > 1 else 0
    elif absmax.dim() != 1 or len(absmax) not in counts:
        raise ValueError(
            f"{name} has shape {tuple(absmax.shape)}, must be a scale for each of "
            f"{' or '.join(f'{count} blocks of {size}' for count, size in counts.items())}"
        )
    absmax = check_finite(name, absmax)
    signed, qmap = expected, check_dense(f"qmap{number}", saved.get(f"qmap{number}"))
    if not backends.replaces_tensors():
        if bool((absmax < 0).any()):
            raise ValueError(f"{name} has negative scales, the least is {absmax.min().item()}")
        signed = _which_map(qmap, f"qmap{number}")
    return _Blockwise(codes.reshape(-1), absmax, signed, block or counts[len(absmax)], row)


def _which_map(qmap: Tensor, name: str) -> bool:
    for signed in (True, False):
        values = dynamic_map(signed, qmap.device).values
        if qmap.shape == values.shape and torch.allclose(qmap.float(), values, rtol=0, atol=1e-6):
            return signed
    raise ValueError(
        f"{name}, shape {tuple(qmap.shape)}, is not a dynamic map, neither the signed nor the unsigned one: "
        f"it begins with {qmap.flatten()[:3].tolist()}"
    )


SIGNED, UNSIGNED = Dynamic8(signed=True), Dynamic8(signed=False)
STOCHASTIC = Dynamic8(signed=False, random=True)


def choose(states: Sequence[State]) -> tuple[Stored, ...]:
    """The format of each state of a rule."""
    return tuple(Stored(UNSIGNED if s.nonnegative else SIGNED, k) for k, s in enumerate(states))


def choose_stochastic(states: Sequence[State]) -> tuple[Stored, ...]:
    """As `choose`, with means of squares rounded stochastically."""
    return tuple(
        Stored(STOCHASTIC, stored.state) if s.nonnegative and not s.maximum else stored
        for stored, s in zip(choose(states), states)
    )

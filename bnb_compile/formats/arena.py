"""How the states of many parameters share a few flat tensors, their arenas.

An arena holds the parameters one after another in the order of their list, each in its own row-major
(logical) order, whatever the parameter's strides are. A format says which arenas there are (`Part`): one may
have an entry for each element, another one for each block of elements. What elements share begins anew with
each block, two of which are never in one entry.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

BLOCK = 256  # elements: what a kernel works on at a time; no format has larger blocks
ALIGN = 16  # elements: a parameter's states begin where vector loads want them


class Part(NamedTuple):
    """One tensor of a format.

    Attributes:
        name: As it is called in the names of arenas.
        dtype: Of its entries.
        per: Elements that share an entry: a divisor of BLOCK. Of 2 elements an entry of 8 bits has a code of
            4 bits each, that of the first in its low half; signed if the dtype is.
    """

    name: str
    dtype: torch.dtype
    per: int = 1

    @property
    def packed(self) -> bool:
        """Whether an entry has codes of two elements."""
        return self.per == 2

    @property
    def of_elements(self) -> bool:
        """Whether an element has something of its own in it."""
        return self.per == 1 or self.packed

    def unpacked(self, entries: torch.Tensor) -> torch.Tensor:
        """Codes, int32, of entries of two each."""
        bytes_ = entries.to(torch.int32) & 0xFF
        codes = torch.stack([bytes_ & 15, bytes_ >> 4], -1).flatten(-2)
        return (codes ^ 8) - 8 if self.dtype == torch.int8 else codes

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """The reverse of `unpacked`."""
        low, high = codes.to(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
        return (low & 15 | high << 4).to(torch.uint8).view(self.dtype)


class Geometry(NamedTuple):
    """Which elements of a tensor a parameter is, where it is a part of one that several processes hold.

    Attributes:
        row: Elements of a row, at whose end a block ends too; 0 if the parameter is one row.
        stride: Elements of the whole tensor from the begin of a row to that of the next.
        first: Number of the first element, from which stochastic rounding takes its bits.
    """

    row: int
    stride: int
    first: int


class Slot(NamedTuple):
    """A parameter's place in the arenas."""

    offset: int  # first element
    numel: int
    block: int  # first block
    blocks: int
    row: int  # elements, at least 1
    row_blocks: int  # at least 1
    stride: int  # see Geometry
    first: int

    def span(self, per: int) -> slice:
        """The parameter's entries in an arena with an entry for each `per` elements."""
        if per == 1:
            return slice(self.offset, self.offset + self.numel)
        each = BLOCK // per
        return slice(self.block * each, (self.block + self.blocks) * each)

    @property
    def padded_numel(self) -> int:
        """Elements with those that `padded` adds."""
        return self.numel if self.row >= self.numel else self.blocks * BLOCK

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """``(numel,)`` entries with zeros between rows, so that every row begins with a block."""
        if self.row >= self.numel:
            return x
        missing = self.row_blocks * BLOCK - self.row
        return torch.nn.functional.pad(x.view(-1, self.row), (0, missing)).view(-1)

    def padded_part(self, entries: torch.Tensor, per: int) -> torch.Tensor:
        """`padded`, of entries that `per` elements share; those of blocks are where they are already."""
        return self.padded(entries) if per == 1 else entries

    def unpadded_part(self, entries: torch.Tensor, per: int) -> torch.Tensor:
        """The reverse of `padded_part`."""
        return self.unpadded(entries) if per == 1 else entries

    def unpadded(self, x: torch.Tensor) -> torch.Tensor:
        """The reverse of `padded`."""
        if self.row >= self.numel:
            return x
        return x.view(-1, self.row_blocks * BLOCK)[:, : self.row].reshape(-1)

    def indices(self, device: torch.device) -> torch.Tensor:
        """``(numel,)`` int64, the number of each element in the whole tensor, counted from `first`."""
        i = torch.arange(self.numel, device=device)
        return self.first + i // self.row * self.stride + i % self.row


class Layout(NamedTuple):
    """The places of all parameters of a list."""

    slots: tuple[Slot, ...]
    elements: int
    blocks: int

    def length(self, per: int) -> int:
        """Length of a row of an arena with an entry for each `per` elements, so that every row is aligned."""
        entries = self.elements if per == 1 else self.blocks * (BLOCK // per)
        return -(-entries // ALIGN) * ALIGN


def layout(numels: Iterable[int], geometry: Sequence[int] | None = None) -> Layout:
    """Places of parameters with these numbers of elements.

    Args:
        numels: Of each parameter.
        geometry: The numbers of each one's `Geometry`, one after another; None if they are whole tensors,
            whose elements are counted on from one to the next.
    """
    slots = []
    offset = block = 0
    for k, numel in enumerate(numels):
        row, stride, first = geometry[3 * k : 3 * k + 3] if geometry else (0, 0, offset)
        row = row or max(numel, 1)
        row_blocks = -(-row // BLOCK)
        blocks = numel // row * row_blocks
        slots.append(Slot(offset, numel, block, blocks, row, row_blocks, stride, first))
        offset += -(-numel // ALIGN) * ALIGN
        block += blocks
    return Layout(tuple(slots), offset, block)

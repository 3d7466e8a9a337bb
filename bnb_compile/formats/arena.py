"""How the states of many parameters share a few flat tensors, their arenas.

An arena holds the parameters one after another in the order of their list, each in its own row-major
(logical) order, whatever the parameter's strides are. A format says which arenas there are (`Part`): one may
have an entry for each element, another one for each block of elements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

BLOCK = 256  # elements: what a kernel works on at a time; no format has larger blocks
ALIGN = 16  # elements: a parameter's states begin where vector loads want them


class Part(NamedTuple):
    """One tensor of a format.

    Attributes:
        name: As it is called in the names of arenas.
        dtype: Of its entries.
        per: Elements that share an entry: less than ALIGN, or a divisor of BLOCK.
    """

    name: str
    dtype: torch.dtype
    per: int = 1


class Slot(NamedTuple):
    """A parameter's place in the arenas."""

    offset: int  # first element
    numel: int
    block: int  # first block
    blocks: int

    def span(self, per: int) -> slice:
        """The parameter's entries in an arena with an entry for each `per` elements."""
        if per < ALIGN:
            first = self.offset // per
            return slice(first, first - -self.numel // per)
        each = BLOCK // per
        return slice(self.block * each, (self.block + self.blocks) * each)


class Layout(NamedTuple):
    """The places of all parameters of a list."""

    slots: tuple[Slot, ...]
    elements: int
    blocks: int

    def length(self, per: int) -> int:
        """Length of a row of an arena with an entry for each `per` elements, so that every row is aligned."""
        entries = -(-self.elements // per) if per < ALIGN else self.blocks * (BLOCK // per)
        return -(-entries // ALIGN) * ALIGN


def layout(numels: Iterable[int]) -> Layout:
    """Places of parameters with these numbers of elements."""
    slots = []
    offset = block = 0
    for numel in numels:
        blocks = -(-numel // BLOCK)
        slots.append(Slot(offset, numel, block, blocks))
        offset += -(-numel // ALIGN) * ALIGN
        block += blocks
    return Layout(tuple(slots), offset, block)

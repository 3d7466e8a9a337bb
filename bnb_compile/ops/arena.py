"""How the states of many parameters share a few flat tensors, their arenas.

An arena holds the parameters one after another in the order of their list, each in its own row-major
(logical) order, whatever the parameter's strides are. An 8-bit state has two arenas: `codes`, uint8,
and `absmax`, float32, one scale for each block of 256 codes. A 32-bit state has one, float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

BLOCK = 256  # elements that share a scale
ALIGN = 16  # elements: a parameter's states begin where vector loads want them


class Slot(NamedTuple):
    """A parameter's place in the arenas."""

    offset: int  # first element
    numel: int
    block: int  # first scale
    blocks: int


class Layout(NamedTuple):
    """The places of all parameters of a list."""

    slots: tuple[Slot, ...]
    elements: int  # length of an arena with one entry for each element
    blocks: int  # length of an arena with one entry for each block


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

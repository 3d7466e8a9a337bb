"""How states are stored: one file for each format, and how parameters share arenas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..rules import State
from . import bfloat16, dynamic8, float32
from .arena import ALIGN as ALIGN
from .arena import BLOCK as BLOCK
from .arena import Geometry as Geometry
from .arena import Layout as Layout
from .arena import Part as Part
from .arena import Slot as Slot
from .arena import layout as layout
from .format import AbstractFormat as AbstractFormat
from .format import Stored as Stored

#: By name: how the states of a rule are stored in a format.
FORMATS: Mapping[str, Callable[[Sequence[State]], tuple[Stored, ...]]] = {
    "float32": float32.choose,
    "bfloat16": bfloat16.choose,
    "dynamic8": dynamic8.choose,
}


def bits_of(name: str) -> int:
    """Bits of an element of a state in a format, without what blocks share."""
    (stored,) = FORMATS[name]([State("any")])
    return stored.format.bits

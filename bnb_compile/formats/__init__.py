"""How states are stored: one file for each format, and how parameters share arenas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..rules import State
from . import bfloat16, dynamic8, float8, float32, ratios
from .arena import ALIGN as ALIGN
from .arena import BLOCK as BLOCK
from .arena import Geometry as Geometry
from .arena import Layout as Layout
from .arena import Part as Part
from .arena import Slot as Slot
from .arena import layout as layout
from .format import AbstractFormat as AbstractFormat
from .format import Fresh as Fresh
from .format import Stored as Stored
from .format import load_states as load_states
from .format import store_states as store_states


class Choice(NamedTuple):
    """What a user can choose by name for all states of a rule.

    Attributes:
        bits: Of an element of a state, on average over Adam's two, without what blocks share.
        choose: The format of each state of a rule; one whose root another is divided by comes before that.
    """

    bits: int
    choose: Callable[[Sequence[State]], tuple[Stored, ...]]


#: By name: how the states of a rule are stored.
FORMATS: Mapping[str, Choice] = {
    "float32": Choice(32, float32.choose),
    "bfloat16": Choice(16, bfloat16.choose),
    "dynamic8": Choice(8, dynamic8.choose),
    "dynamic8sr": Choice(8, dynamic8.choose_stochastic),
    "float8": Choice(8, float8.choose),
    "ratio8": Choice(8, ratios.choose8),
    "ratio4_8": Choice(6, ratios.choose4_8),
    "ratio4": Choice(4, ratios.choose4),
}


def stored_as(name: str, states: Sequence[State]) -> tuple[Stored, ...]:
    """How the states of a rule are stored in a format, but for those that demand another one."""
    own = {k: state.format for k, state in enumerate(states) if state.format is not None}
    for k, of_state in own.items():
        if of_state not in FORMATS:
            raise ValueError(f"state {states[k].name}: format={of_state!r}, must be one of {sorted(FORMATS)}")
    # A ratio needs what it is over in the format that goes with it.
    free = [
        state._replace(over=None, decays=None, impulse=None)
        if state.over in [states[k].name for k in own]
        else state
        for state in states
    ]
    chosen = FORMATS[name].choose(free)
    return tuple(
        FORMATS[own[one.state]].choose([free[one.state]._replace(over=None)])[0]._replace(state=one.state)
        if one.state in own
        else one
        for one in chosen
    )


#: All that an entry of a checkpoint can be in, see `find`.
_KNOWN: tuple[AbstractFormat, ...] = (
    float32.FLOAT32,
    bfloat16.BFLOAT16,
    float8.E4M3,
    float8.E5M2,
    dynamic8.SIGNED,
    ratios.LOG8,
    ratios.LOG4,
    ratios.RATIO8,
    ratios.RATIO4,
)
#: What keys of entries begin with, before a number; bitsandbytes' own, too.
STEMS = frozenset(["qmap", "max", "new_max", *(stem for known in _KNOWN for stem in known.keys.values())])


def find(saved: Mapping[str, Any], number: int) -> AbstractFormat | None:
    """The format of a state in an entry of ``optimizer.state``, or one that reads it.

    Args:
        saved: The entry.
        number: Of the state in the keys.
    """
    return next((known for known in _KNOWN if known.is_in(saved, number)), None)

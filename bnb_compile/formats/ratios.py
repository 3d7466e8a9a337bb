"""Formats of Adam's two moments together: "ratio8", "ratio4_8" and "ratio4".

A second moment has codes that are equal steps of its logarithm (logarithmic.py), a first moment is divided by
the root of that and has linear codes (ratio.py, linear.py). A state that is neither, because the rule does
not say of which squares it is the mean, keeps bitsandbytes' codes: Lion's and SGD's momentum, AdEMAMix's slow
moment, which forgets too slowly to be bounded.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..rules import State
from . import dynamic8
from .format import AbstractFormat, Stored
from .linear import Linear
from .logarithmic import Logarithmic

RATIO8, RATIO4 = Linear("ratio8", 8), Linear("ratio4", 4, block=128)
LOG8, LOG4 = Logarithmic("log8", 8, octaves=40), Logarithmic("log4", 4, octaves=24, block=128)
#: Of a maximum, which stochastic rounding would let grow.
LOG8_NEAREST = Logarithmic("log8", 8, octaves=40, random=False)
LOG4_NEAREST = Logarithmic("log4", 4, octaves=24, block=128, random=False)


def _choose(
    states: Sequence[State], mean: AbstractFormat, squares: AbstractFormat, maximum: AbstractFormat
) -> tuple[Stored, ...]:
    names = [state.name for state in states]
    of_squares = [Stored(maximum if s.maximum else squares, k) for k, s in enumerate(states) if s.nonnegative]
    means = [
        Stored(dynamic8.SIGNED, k) if s.over is None else Stored(mean, k, names.index(s.over))
        for k, s in enumerate(states)
        if not s.nonnegative
    ]
    return (*of_squares, *means)


def choose8(states: Sequence[State]) -> tuple[Stored, ...]:
    """8 bits for both moments."""
    return _choose(states, RATIO8, LOG8, LOG8_NEAREST)


def choose4_8(states: Sequence[State]) -> tuple[Stored, ...]:
    """4 bits for the first moment, 8 for the second."""
    return _choose(states, RATIO4, LOG8, LOG8_NEAREST)


def choose4(states: Sequence[State]) -> tuple[Stored, ...]:
    """4 bits for both moments."""
    return _choose(states, RATIO4, LOG4, LOG4_NEAREST)

"""States in bfloat16: two bytes an element, no scale.

Rounded to nearest, a state moves only if a step changes it by more than 2^-9 of itself, half of a unit in its
last place. A second moment with beta2 = 0.999 changes by a thousandth of ``grad ** 2 - exp_avg_sq``, so that
it follows gradients that grow threefold and hardly any that become smaller: prefer "dynamic8", or a smaller
beta2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rules import State
from .elements import Elements
from .format import Stored

BFLOAT16 = Elements("bfloat16", torch.bfloat16)


def choose(states: Sequence[State]) -> tuple[Stored, ...]:
    """The format of each state of a rule."""
    return tuple(Stored(BFLOAT16, k) for k in range(len(states)))

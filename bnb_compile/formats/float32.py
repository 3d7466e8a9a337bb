"""States as they are computed: float32, four bytes an element."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..rules import State
from .elements import Elements
from .format import Stored

FLOAT32 = Elements("float32", torch.float32)


def choose(states: Sequence[State]) -> tuple[Stored, ...]:
    """The format of each state of a rule."""
    return tuple(Stored(FLOAT32, k) for k in range(len(states)))

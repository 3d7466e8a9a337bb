"""What a state format is: how the float32 states of a parameter become the tensors that are kept.

A format is an object with one file of its own. The eager step, every load of a checkpoint and every
conversion use its `store`; the kernels have the same codec, printed or written for an instruction set, see
`lowering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .arena import BLOCK, Part


class AbstractFormat:
    """How one state, or a tuple of states that need one another, is stored.

    Attributes:
        name: Lower case; part of the names of operators and arenas. Formats of one name share their arenas.
        parts: The tensors that a parameter has in this format.
        states: Number of states in the tuple.
        keys: What the keys of `entries` begin with, before a number.
    """

    name: str
    parts: tuple[Part, ...]
    states: int = 1
    keys: tuple[str, ...] = ("state",)

    @property
    def bits(self) -> int:
        """Bits of an element of a state, without what blocks share."""
        of_elements = [part for part in self.parts if part.per == 1]
        return 8 * sum(part.dtype.itemsize for part in of_elements) // self.states

    def load(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The states of a parameter.

        Args:
            parts: Its entries of each part, by name, flat.

        Returns:
            list[Tensor]: ``(numel,)`` float32 for each state.
        """
        raise NotImplementedError

    def store(self, values: Sequence[Tensor], block: int = BLOCK) -> dict[str, Tensor]:
        """The reverse of `load`; the only encoder, apart from the kernels'.

        Args:
            values: ``(numel,)`` float32 for each state.
            block: Elements that share what blocks share; more than BLOCK only for a whole parameter.
        """
        raise NotImplementedError

    def entries(self, parts: Mapping[str, Tensor], number: int, shape: torch.Size) -> dict[str, Tensor]:
        """What ``optimizer.state`` shows of a parameter, under bitsandbytes' keys.

        Args:
            parts: Its entries of each part, flat.
            number: Of the (first) state, counted from 1.
            shape: Of the parameter.
        """
        raise NotImplementedError

    def parts_of(self, saved: Mapping[str, Any], number: int, numel: int) -> dict[str, Tensor] | None:
        """The reverse of `entries`: None if `saved` has another format.

        Raises:
            ValueError: If an entry is damaged.
        """
        raise NotImplementedError

    def decode_saved(self, saved: Mapping[str, Any], number: int, numel: int) -> list[Tensor] | None:
        """The states of an entry in this format or in a relative of it; None if it is in neither.

        Raises:
            ValueError: If an entry is damaged.
        """
        parts = self.parts_of(saved, number, numel)
        return None if parts is None else self.load(parts)


class Stored(NamedTuple):
    """Some states of a rule in one format."""

    format: AbstractFormat
    states: tuple[int, ...]  # which of the rule's


def check_dense(name: str, x: Any) -> Tensor:
    """An entry of a checkpoint, which must be an ordinary tensor with data.

    Raises:
        ValueError: If it is anything else.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {x!r}")
    if x.layout is not torch.strided or x.is_quantized or x.is_complex():
        raise ValueError(f"{name} is {x.dtype}, {x.layout}: must be an ordinary dense tensor of numbers")
    if x.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and has no values: load it with another map_location")
    return x


def check_finite(name: str, x: Tensor) -> Tensor:
    """Numbers of a checkpoint as float32.

    Raises:
        ValueError: If one is NaN, infinite, or too large for float32.
    """
    values = x.detach().float()
    # One pass: a sum of zeros, or NaN. What stands in for a tensor cannot be looked at.
    if not backends.replaces_tensors() and not bool((values * 0).sum() == 0):
        raise ValueError(f"{name} has values that are NaN, infinite or too large for float32")
    return values

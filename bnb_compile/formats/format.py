"""What a state format is: how the float32 states of a parameter become the tensors that are kept.

A format is an object with one file of its own. The eager step, every load of a checkpoint and every
conversion use its `store`; the kernels are printed from the same functions, see `lowering`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .arena import BLOCK, Part
from .table import AbstractTable


class AbstractFormat:
    """How one state, or a tuple of states that need one another, is stored.

    A format says what it computes in four functions of plain torch, elementwise and on float32: `decode`,
    `magnitudes`, `share` and `encode`. They are traced once (formats/trace.py) and printed in every language,
    and `load` and `store` run them. What they call numbers are entries as float32: what a code stands for, if
    the part has a table.

    Attributes:
        name: Lower case; part of the names of operators and arenas. Formats of one name share their arenas.
        parts: The tensors that a parameter has in this format; with an entry for each element, or for each
            block of BLOCK elements.
        tables: What the entries of a part stand for, by its name; those of other parts are the numbers.
        states: Number of states in the tuple.
        maxima: Number of results of `magnitudes`.
        keys: What the keys of `entries` begin with, before a number.
    """

    name: str
    parts: tuple[Part, ...]
    tables: Mapping[str, AbstractTable] = MappingProxyType({})
    states: int = 1
    maxima: int = 0
    keys: tuple[str, ...] = ("state",)

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[Tensor]:
        """The states of elements.

        Args:
            numbers: Of each part `of_elements`.
            shared: Of each part `of_blocks`, those of the element's block.
        """
        raise NotImplementedError

    def magnitudes(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        """What the largest of a block is found of: at least 0, and 0 where all states are 0."""
        return ()

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of each part `of_blocks`, a block's number.

        Args:
            maxima: The largest of each of the `magnitudes` in the block; or in the whole parameter, if a step
                is not block_wise.
        """
        return ()

    def encode(self, states: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[Tensor]:
        """The reverse of `decode`: numbers, which are then rounded to what the part can hold."""
        raise NotImplementedError

    @property
    def of_elements(self) -> tuple[Part, ...]:
        """The parts with an entry for each element."""
        return tuple(part for part in self.parts if part.per == 1)

    @property
    def of_blocks(self) -> tuple[Part, ...]:
        """The parts with an entry for each block."""
        return tuple(part for part in self.parts if part.per > 1)

    @property
    def bits(self) -> int:
        """Bits of an element of a state, without what blocks share."""
        return 8 * sum(part.dtype.itemsize for part in self.of_elements) // self.states

    def load(self, parts: Mapping[str, Tensor]) -> list[Tensor]:
        """The states of a parameter.

        Args:
            parts: Its entries of each part, by name, flat.

        Returns:
            list[Tensor]: ``(numel,)`` float32 for each state.
        """
        numbers = [self._numbers(part, parts[part.name]) for part in self.of_elements]
        (numel,) = numbers[0].shape
        return list(self.decode(numbers, [spread(parts[part.name], numel, BLOCK) for part in self.of_blocks]))

    def store(self, states: Sequence[Tensor], maxima: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """The reverse of `load`; the only encoder, apart from the kernels that are printed from it.

        Args:
            states: ``(numel,)`` float32 each.
            maxima: ``(1,)`` each, of a whole parameter, if all its blocks share what blocks share.
        """
        (numel,) = states[0].shape
        if maxima is None:
            maxima = [block_maxima(x, BLOCK) for x in self.magnitudes(states)]
        of_blocks = [x.expand(-(-numel // BLOCK)) for x in self.share(maxima)]
        numbers = self.encode(states, [spread(x, numel, BLOCK) for x in of_blocks])
        entries = [self._entries(part, x) for part, x in zip(self.of_elements, numbers)]
        names = (part.name for part in (*self.of_elements, *self.of_blocks))
        return dict(zip(names, (*entries, *of_blocks)))

    def _numbers(self, part: Part, entries: Tensor) -> Tensor:
        if part.name in self.tables:
            return self.tables[part.name].values(entries.device)[entries.int()]
        return entries.float()

    def _entries(self, part: Part, numbers: Tensor) -> Tensor:
        return self.tables[part.name].nearest(numbers) if part.name in self.tables else numbers.to(part.dtype)

    def entries(self, parts: Mapping[str, Tensor], number: int, shape: torch.Size) -> dict[str, Tensor]:
        """What ``optimizer.state`` shows of a parameter, under bitsandbytes' keys.

        Args:
            parts: Its entries of each part, flat.
            number: Of the (first) state, counted from 1.
            shape: Of the parameter.
        """
        raise NotImplementedError

    def parts_of(
        self, saved: Mapping[str, Any], number: int, numel: int, row: int = 0
    ) -> dict[str, Tensor] | None:
        """The reverse of `entries`: None if `saved` has another format.

        Args:
            saved: The entries.
            number: As of `entries`.
            numel: Of the parameter.
            row: Elements of a row, if blocks end where rows end.

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


def block_maxima(magnitudes: Tensor, block_size: int) -> Tensor:
    """The largest of each block of ``(numel,)`` magnitudes."""
    numel, count = magnitudes.numel(), -(-magnitudes.numel() // block_size)
    blocks = torch.nn.functional.pad(magnitudes, (0, count * block_size - numel))
    return blocks.view(count, block_size).amax(1)


def spread(of_blocks: Tensor, numel: int, block_size: int) -> Tensor:
    """What each element shares with its block."""
    if numel % block_size == 0:
        return of_blocks[:, None].expand(-1, block_size).reshape(-1)
    # (2 i + 1) // (2 b) is i // b. Inductor's C++ backend splits a loop over i at a division of i itself,
    # and then leaves out the last, partial block (CppScheduling.try_loop_split, torch 2.13).
    element = torch.arange(numel, device=of_blocks.device)
    return of_blocks[(2 * element + 1) // (2 * block_size)]


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

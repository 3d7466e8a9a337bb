"""What a state format is: how a float32 state of a parameter becomes the tensors that are kept.

A format is an object with one file of its own. The eager step, every load of a checkpoint and every
conversion use its `store`; the kernels are printed from the same functions, see `lowering`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..rules import NEAREST
from .arena import BLOCK, Part, layout
from .ratio import roots
from .table import AbstractTable


class AbstractFormat:
    """How a state is stored.

    A format says what it computes in four functions of plain torch, elementwise: `decode`, `magnitudes`,
    `share` and `encode`. They are traced once (formats/trace.py) and printed in every language, and `load`
    and `store` run them. What they call numbers are entries as float32 if a part has floating-point numbers,
    as int32 if it has integers, and what a code stands for if the part has a table.

    Attributes:
        name: Lower case; part of the names of operators and arenas. Formats of one name share their arenas.
        parts: The tensors that a parameter has in this format.
        tables: What the entries of a part stand for, by its name; those of other parts are the numbers.
        maxima: Number of results of `magnitudes`.
        keys: What the key of each part in `entries` begins with, before a number.
        random: Whether `encode` rounds stochastically.
        ratio: Whether what is stored is the state divided by the root of another, see formats/ratio.py.
    """

    name: str
    parts: tuple[Part, ...]
    tables: Mapping[str, AbstractTable] = MappingProxyType({})
    maxima: int = 0
    keys: Mapping[str, str]
    random: bool = False
    ratio: bool = False

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """The state of elements.

        Args:
            numbers: Of each part `of_elements`.
            shared: Of each part `of_blocks`, those of the element's block.
        """
        raise NotImplementedError

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        """What the largest of a block is found of: at least 0, and 0 where the state is 0."""
        return ()

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of each part `of_blocks`, a block's number.

        Args:
            maxima: The largest of each of the `magnitudes` in the block; or in the whole parameter, if a step
                is not block_wise.
        """
        return ()

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        """The reverse of `decode`: numbers, which are then rounded to what the part can hold.

        Args:
            state: The state.
            shared: As of `decode`.
            noise: Uniform in [1, 2), if the format is `random`; NEAREST rounds to nearest.
        """
        raise NotImplementedError

    @property
    def of_elements(self) -> tuple[Part, ...]:
        """The parts with something for each element."""
        return tuple(part for part in self.parts if part.of_elements)

    @property
    def of_blocks(self) -> tuple[Part, ...]:
        """The parts with an entry for each block."""
        return tuple(part for part in self.parts if not part.of_elements)

    @property
    def block(self) -> int:
        """Elements that share something; BLOCK if none do."""
        return min([BLOCK, *(part.per for part in self.of_blocks)])

    def load(self, parts: Mapping[str, Tensor], numel: int) -> Tensor:
        """The state of a parameter.

        Args:
            parts: Its entries of each part, by name, flat.
            numel: Its elements.

        Returns:
            Tensor: ``(numel,)`` float32.
        """
        numbers = [self._numbers(part, parts[part.name])[:numel] for part in self.of_elements]
        return self.decode(
            numbers, [spread(parts[x.name].float(), numel, self.block) for x in self.of_blocks]
        )

    def store(
        self, state: Tensor, maxima: Sequence[Tensor] | None = None, noise: Tensor | float = NEAREST
    ) -> dict[str, Tensor]:
        """The reverse of `load`; the only encoder, apart from the kernels that are printed from it.

        Args:
            state: ``(numel,)`` float32.
            maxima: ``(1,)`` each, of a whole parameter, if all its blocks share what blocks share.
            noise: ``(numel,)``, for a format that is `random`.
        """
        numel, each = state.numel(), BLOCK // self.block
        blocks = -(-numel // BLOCK) * each
        if maxima is None:
            maxima = [_padded(block_maxima(x, self.block), blocks) for x in self.magnitudes(state)]
        of_blocks = [x.expand(blocks).to(part.dtype) for part, x in zip(self.of_blocks, self.share(maxima))]
        numbers = self.encode(state, [spread(x.float(), numel, self.block) for x in of_blocks], noise)
        entries = [self._entries(part, x) for part, x in zip(self.of_elements, numbers)]
        names = (part.name for part in (*self.of_elements, *self.of_blocks))
        return dict(zip(names, (*entries, *of_blocks)))

    def _numbers(self, part: Part, entries: Tensor) -> Tensor:
        if part.packed:
            return part.unpacked(entries)
        if part.name in self.tables:
            return self.tables[part.name].values(entries.device)[entries.int()]
        return entries.float() if part.dtype.is_floating_point else entries.int()

    def _entries(self, part: Part, numbers: Tensor) -> Tensor:
        if part.packed:
            return part.pack(_padded(numbers, -(-numbers.numel() // BLOCK) * BLOCK))
        return self.tables[part.name].nearest(numbers) if part.name in self.tables else numbers.to(part.dtype)

    def entries(self, parts: Mapping[str, Tensor], number: int, shape: torch.Size) -> dict[str, Tensor]:
        """What ``optimizer.state`` shows of a parameter.

        Args:
            parts: Its entries of each part, flat.
            number: Of the (first) state, counted from 1.
            shape: Of the parameter.
        """
        return {
            f"{self.keys[part.name]}{number}": parts[part.name].view(shape)
            if part.per == 1
            else parts[part.name]
            for part in self.parts
        }

    def is_in(self, saved: Mapping[str, Any], number: int) -> bool:
        """Whether an entry has this format, or one that `decode_saved` reads."""
        found = [saved.get(f"{self.keys[part.name]}{number}") for part in self.parts]
        return all(isinstance(x, Tensor) and x.dtype == part.dtype for part, x in zip(self.parts, found))

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
        if not self.is_in(saved, number):
            return None
        parts, own_row = self._checked(saved, number, numel)
        return parts if same_blocks(own_row, row) else None

    def decode_saved(self, saved: Mapping[str, Any], number: int, numel: int) -> Tensor:
        """What is stored in an entry that has this format, see `is_in`.

        Raises:
            ValueError: If it is damaged.
        """
        parts, row = self._checked(saved, number, numel)
        if not row:
            return self.load(parts, numel)
        (slot,) = layout([numel], (row, 0, 0)).slots
        padded = {part.name: slot.padded_part(parts[part.name], part.per) for part in self.parts}
        return slot.unpadded(self.load(padded, slot.padded_numel))

    def _checked(self, saved: Mapping[str, Any], number: int, numel: int) -> tuple[dict[str, Tensor], int]:
        """The parts in an entry, flat, and the elements of a row at whose end a block ends, or 0."""
        parts, row = {}, 0
        for part in self.parts:
            name = f"{self.keys[part.name]}{number}"
            x = check_dense(name, saved[name])
            if part.per > 1:
                row = row_of_blocks(name, x, numel, part.per)
                if part.dtype.is_floating_point:
                    x = check_finite(name, x).to(part.dtype)
                    if not backends.replaces_tensors() and bool((x < 0).any()):
                        raise ValueError(f"{name} has negative numbers, the least is {x.min().item()}")
            elif x.numel() != numel:
                raise ValueError(f"{name} has shape {tuple(x.shape)}, must be of {numel} elements")
            elif part.dtype.is_floating_point:
                check_finite(name, x)
            parts[part.name] = x.reshape(-1)
        return parts, row


def same_blocks(row: int, other: int) -> bool:
    """Whether blocks that end with rows of so many elements are the same, as where rows are whole blocks."""
    return row == other or not (row % BLOCK or other % BLOCK)


def row_of_blocks(name: str, shared: Tensor, numel: int, per: int) -> int:
    """Elements of the rows that blocks end with, from what they share; 0 if the parameter is one row.

    Raises:
        ValueError: If it is not of so many elements.
    """
    each = BLOCK // per
    if not numel and not shared.numel():  # of a process without any rows
        return 0
    if shared.dim() == 2:
        rows, entries = shared.shape
        row = numel // max(rows, 1)
        if row * rows == numel and -(-row // BLOCK) * each == entries:
            return row if rows > 1 else 0
    elif shared.dim() == 1 and len(shared) == -(-numel // BLOCK) * each:
        return 0
    raise ValueError(
        f"{name} has shape {tuple(shared.shape)}, must have {each} for each of {-(-numel // BLOCK)} blocks "
        f"of {BLOCK}, or of the blocks of each row"
    )


def block_maxima(magnitudes: Tensor, block_size: int) -> Tensor:
    """The largest of each block of ``(numel,)`` magnitudes."""
    count = -(-magnitudes.numel() // block_size)
    return _padded(magnitudes, count * block_size).view(count, block_size).amax(1)


def _padded(x: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, count - x.numel()))


def spread(of_blocks: Tensor, numel: int, block_size: int) -> Tensor:
    """What each element shares with its block."""
    if numel % block_size == 0 and of_blocks.numel() * block_size == numel:
        return of_blocks[:, None].expand(-1, block_size).reshape(-1)
    # (2 i + 1) // (2 b) is i // b. Inductor's C++ backend splits a loop over i at a division of i itself,
    # and then leaves out the last, partial block (CppScheduling.try_loop_split, torch 2.13).
    element = torch.arange(numel, device=of_blocks.device)
    return of_blocks[(2 * element + 1) // (2 * block_size)]


class Stored(NamedTuple):
    """A state of a rule in a format.

    Attributes:
        format: The format.
        state: Which of the rule's.
        over: Which other state's root it is divided by, where the format stores a ratio. That one is stored
            before it.
    """

    format: AbstractFormat
    state: int
    over: int | None = None


def load_states(
    stored: Sequence[Stored], parts_of: Callable[[Stored], Mapping[str, Tensor]], numel: int
) -> dict[int, Tensor]:
    """All states of a parameter, ``(numel,)`` float32 each, from their parts."""
    states: dict[int, Tensor] = {}
    for one in stored:
        x = one.format.load(parts_of(one), numel)
        states[one.state] = x if one.over is None else x * roots(states[one.over])[0]
    return states


class Fresh(NamedTuple):
    """A state that has been stored.

    Attributes:
        parts: What is kept of it, by name.
        kept: What that stands for, ``(numel,)`` float32.
        lost: What is lost of what is stored, which of a ratio is in units of `root`.
        root: Of a ratio: what it is divided by.
    """

    parts: dict[str, Tensor]
    kept: Tensor
    lost: Tensor
    root: Tensor | None


def store_states(
    stored: Sequence[Stored],
    states: Sequence[Tensor],
    maxima: Sequence[Tensor] | None = None,
    noise: Tensor | float = NEAREST,
    given: Mapping[int, dict[str, Tensor]] = MappingProxyType({}),
) -> dict[int, Fresh]:
    """The reverse of `load_states`.

    Args:
        stored: All states.
        states: ``(numel,)`` float32 each, in the rule's order.
        maxima: As of `AbstractFormat.store`, those of all formats one after another, but for those of ratios.
        noise: Likewise.
        given: Parts of some states, which are kept as they are; of a ratio only if what it is over is given
            too.

    Returns:
        dict: For each of the rule's states, by its number.
    """
    fresh: dict[int, Fresh] = {}
    first = 0
    for one in stored:
        x, root, of_format = states[one.state], None, None
        if one.over is not None:
            root, per_root = roots(fresh[one.over].kept)
            x = x * per_root
        elif maxima is not None:
            of_format = maxima[first : first + one.format.maxima]
            first += one.format.maxima
        if one.state in given and (one.over is None or one.over in given):
            parts = given[one.state]
        else:
            parts = one.format.store(x, of_format, noise if one.format.random else NEAREST)
        kept = one.format.load(parts, x.numel())
        fresh[one.state] = Fresh(parts, kept if root is None else kept * root, x - kept, root)
    return fresh


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

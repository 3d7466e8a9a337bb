"""Which programs of a step kernel update which parameters: the tables that its launches read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...formats import Layout
from ..node import describe_strides
from .source import Variant


class Launch(NamedTuple):
    """One launch of a step kernel: what it is specialised for, and its tables as CPU tensors."""

    variant: Variant
    rows: Tensor  # (n, 8) int64
    owner: Tensor  # (programs,) int32
    strides: Tensor | None  # (n, 2, 2, dims) int64

    @property
    def programs(self) -> int:
        """How many are launched."""
        return len(self.owner)

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tables that the kernel takes, by name of the argument."""
        tables = {"rows": self.rows, "owner": self.owner, "strides": self.strides}
        return {name: table for name, table in tables.items() if table is not None}


def plan(
    places: Layout,
    sizes: Sequence[Sequence[int]],
    strides: Sequence[tuple[Sequence[int], Sequence[int]]],
    aligned: Sequence[bool],
    included: Sequence[bool],
    fast: bool,
    blocks: int,
) -> list[Launch]:
    """Launches for a bucket: one, or two if it has tensors whose accesses cannot all be vectors.

    Args:
        places: The parameters' places in the arenas.
        sizes: Shape of each parameter.
        strides: Strides of each parameter and of its gradient.
        aligned: Whether a parameter and its gradient begin at multiples of 16 bytes.
        included: Whether a parameter is updated at all.
        fast: Whether NVIDIA's approximate instructions are used.
        blocks: Blocks that a program takes.
    """
    described = [
        tuple(describe_strides(size, stride) for stride in pair) for size, pair in zip(sizes, strides)
    ]
    regular = [
        aligned[k] and slot.numel % 8 == slot.row % 8 == 0 and described[k] == (None, None)
        for k, slot in enumerate(places.slots)
    ]
    launches = []
    for vectors in (True, False):
        rows: list[tuple[int, ...]] = []
        owner: list[int] = []
        for k, slot in enumerate(places.slots):
            of_row = slot.row, slot.row_blocks, slot.stride, slot.first
            rows.append((slot.numel, slot.offset, slot.block, len(owner), *of_row))
            if included[k] and regular[k] == vectors:
                owner += [k] * -(-slot.blocks // blocks)
        if not owner:
            continue
        members = set(owner)
        dims = max((len(d or ()) for k in members for d in described[k]), default=0)
        variant = Variant(vectors, dims, any(places.slots[k].numel >= 2**31 for k in members), fast)
        table = None
        if dims:
            table = torch.tensor(
                [
                    [_padded(d or [(max(slot.numel, 1), 1)], dims) for d in pair]
                    for slot, pair in zip(places.slots, described)
                ],
                device="cpu",
            )
        launches.append(
            Launch(
                variant,
                torch.tensor(rows, dtype=torch.int64, device="cpu"),
                torch.tensor(owner, dtype=torch.int32, device="cpu"),
                table,
            )
        )
    return launches


def spans(launches: Sequence[Launch], count: int) -> Tensor:
    """Where each tensor's programs begin and end, counted through all launches: (count, 2) int64."""
    table = torch.zeros(count, 2, dtype=torch.int64, device="cpu")
    passed = 0
    for launch in launches:
        # The programs of a tensor, all of one launch, follow one another.
        members, sizes = launch.owner.unique_consecutive(return_counts=True)
        ends = passed + sizes.cumsum(0)
        table[members.long()] = torch.stack([ends - sizes, ends], 1)
        passed += launch.programs
    return table


def _padded(dims: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    filled = [(1, 0)] * (count - len(dims)) + list(dims)[-count:]
    return [[n for n, _ in filled], [s for _, s in filled]]

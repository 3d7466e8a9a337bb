"""The functions of formats and tables as graphs, which the lowerings print."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..rules.trace import trace
from .arena import BLOCK, Part
from .format import AbstractFormat, Stored
from .ratio import roots
from .table import AbstractTable


class TracedFormat(NamedTuple):
    """The functions of a format as graphs, each with its sequences of arguments one after another.

    Attributes:
        decode: ``(*numbers, *shared) -> (state,)``.
        magnitudes: ``(state) -> magnitudes``.
        share: ``(*maxima) -> shared``.
        encode: ``(state, *shared, noise) -> numbers``.
    """

    decode: torch.fx.Graph
    magnitudes: torch.fx.Graph
    share: torch.fx.Graph
    encode: torch.fx.Graph


def number_dtype(of: AbstractFormat, part: Part) -> torch.dtype:
    """Dtype of what a format calls numbers of a part."""
    whole = part.name not in of.tables and not part.dtype.is_floating_point
    return torch.int32 if whole else torch.float32


@functools.cache
def trace_format(of: AbstractFormat) -> TracedFormat:
    """Trace a format and check it.

    Raises:
        NotImplementedError: If it uses an operation that some language does not have, or parts that no kernel
            can have.
    """
    f32 = torch.float32
    numbers = [number_dtype(of, part) for part in of.of_elements]
    shared = [f32] * len(of.of_blocks)
    for part in of.of_blocks:
        if part.per != of.block or part.per < 32 or BLOCK % part.per:
            raise NotImplementedError(
                f"{of.name}: {part.name} is shared by {part.per} elements, must be by as many as its others, "
                f"a divisor of {BLOCK} of at least 32"
            )
        if not part.dtype.is_floating_point:
            raise NotImplementedError(f"{of.name}: {part.name} is {part.dtype}, must be floating-point")
    for part in of.of_elements:
        if part.packed and (part.name in of.tables or part.dtype not in (torch.int8, torch.uint8)):
            raise NotImplementedError(f"{of.name}: {part.name} is packed, must be of integers of 8 bits")
    count = len(numbers)
    return TracedFormat(
        trace(lambda *a: (of.decode(a[:count], a[count:]),), [*numbers, *shared]),
        trace(lambda x: of.magnitudes(x), [f32]),
        trace(lambda *a: of.share(a), [f32] * of.maxima),
        trace(lambda x, *a: of.encode(x, a[:-1], a[-1]), [f32, *shared, f32]),
    )


@functools.cache
def trace_roots() -> torch.fx.Graph:
    """``(over) -> (root, per_root)``."""
    return trace(roots, [torch.float32])


@functools.cache
def trace_code(table: AbstractTable) -> torch.fx.Graph:
    """``(number,) -> (code,)``, both float32."""
    return trace(lambda x: (table.code(x),), [torch.float32])


@functools.cache
def numbers_of(table: AbstractTable) -> tuple[float, ...]:
    """The number of each code; asked for first where no tensor is a stand-in, see `check`."""
    return tuple(table.values(torch.device("cpu")).tolist())


def zero_of(table: AbstractTable) -> int:
    """The code of 0."""
    return numbers_of(table).index(0.0)


def check(stored: tuple[Stored, ...]) -> None:
    """Trace all formats of a rule's states.

    Raises:
        NotImplementedError: See `trace_format`.
        ValueError: If a table has no 0, or the formats do not go together.
    """
    passed: dict[int, AbstractFormat] = {}
    for one in stored:
        of = one.format
        trace_format(of)
        for table in of.tables.values():
            trace_code(table)
            zero_of(table)
        if of.ratio != (one.over is not None):
            raise ValueError(f"{of.name}: a format of ratios, and no other, is over another state")
        if one.over is not None and one.over not in passed:
            raise ValueError(f"{of.name} is over state {one.over}, which must be stored before it")
        if one.over is not None and (passed[one.over].tables or passed[one.over].ratio):
            raise NotImplementedError(
                f"{of.name} is over {passed[one.over].name}, which has a table or is a ratio"
            )
        passed[one.state] = of

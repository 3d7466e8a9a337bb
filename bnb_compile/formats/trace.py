"""The functions of formats and tables as graphs, which the lowerings print."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..rules.trace import trace
from .arena import BLOCK
from .format import AbstractFormat
from .table import AbstractTable


class TracedFormat(NamedTuple):
    """The functions of a format as graphs of float32, each with its sequences of arguments one after another.

    Attributes:
        decode: ``(*numbers, *shared) -> states``.
        magnitudes: ``(*states) -> magnitudes``.
        share: ``(*maxima) -> shared``.
        encode: ``(*states, *shared) -> numbers``.
    """

    decode: torch.fx.Graph
    magnitudes: torch.fx.Graph
    share: torch.fx.Graph
    encode: torch.fx.Graph


@functools.cache
def trace_format(of: AbstractFormat) -> TracedFormat:
    """Trace a format and check it.

    Raises:
        NotImplementedError: If it uses an operation that some language does not have, or parts that no kernel
            can have.
    """
    numbers, shared, states = len(of.of_elements), len(of.of_blocks), of.states
    for part in of.parts:
        if part.per not in (1, BLOCK):
            raise NotImplementedError(f"{of.name}: {part.name} is shared by {part.per} elements, not {BLOCK}")
    return TracedFormat(
        trace(lambda *a: of.decode(a[:numbers], a[numbers:]), numbers + shared, torch.float32),
        trace(lambda *a: of.magnitudes(a), states, torch.float32),
        trace(lambda *a: of.share(a), of.maxima, torch.float32),
        trace(lambda *a: of.encode(a[:states], a[states:]), states + shared, torch.float32),
    )


@functools.cache
def trace_code(table: AbstractTable) -> torch.fx.Graph:
    """``(number,) -> (code,)``, both float32."""
    return trace(lambda x: (table.code(x),), 1, torch.float32)


@functools.cache
def numbers_of(table: AbstractTable) -> tuple[float, ...]:
    """The number of each code; asked for first where no tensor is a stand-in, see `check`."""
    return tuple(table.values(torch.device("cpu")).tolist())


def zero_of(table: AbstractTable) -> int:
    """The code of 0."""
    return numbers_of(table).index(0.0)


def check(of: AbstractFormat) -> None:
    """Trace all of a format.

    Raises:
        NotImplementedError: See `trace_format`.
        ValueError: If a table has no 0.
    """
    trace_format(of)
    for table in of.tables.values():
        trace_code(table)
        zero_of(table)

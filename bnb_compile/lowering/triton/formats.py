"""The formats in Triton: their functions, and the loads and stores of the arenas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...formats import Part, Stored
from ...formats.dynamic8 import DynamicTable
from ...formats.table import AbstractTable
from ...formats.trace import numbers_of, trace_code, trace_format, zero_of
from ...ops.operator import Modes, StepOp
from ..dialects import TRITON
from ..printer import write
from .text import LANGUAGE, function, tuple_of


class Row(NamedTuple):
    """A row of an arena, which is an argument of its own."""

    name: str
    arena: str
    number: int
    dtype: torch.dtype


def arena_rows(op: StepOp) -> list[Row]:
    """All rows of all arenas, in the order of the kernels' arguments."""
    return [
        Row(f"{arena.name}_{k}" if arena.rows > 1 else arena.name, arena.name, k, arena.part.dtype)
        for arena in op.arenas
        for k in range(arena.rows)
    ]


def tables(op: StepOp) -> dict[str, torch.Tensor]:
    """Constant tensors that the kernels read, by name of their argument."""
    return {table.name: torch.tensor(numbers_of(table), device="cpu") for table in _tables(op)}


def _tables(op: StepOp) -> list[AbstractTable]:
    return list(dict.fromkeys(table for stored in op.stored for table in stored.format.tables.values()))


def print_formats(op: StepOp, modes: Modes, fast: bool) -> str:
    """How the states are loaded, stored, and measured for a whole parameter."""
    unpack = [
        f"{name} = arenas[{k}]" for k, name in enumerate([*(r.name for r in arena_rows(op)), *tables(op)])
    ]
    at = ["offset", "i", "block", "b", "inside", "whole"]
    loads, stores, measures, texts = [], [], [], []
    maximum = 0
    for stored in op.stored:
        printed = _Printed(op, stored, fast)
        texts.append(printed.functions())
        loads += printed.loads()
        stores += printed.stores(maximum, modes.block_wise)
        measures += printed.measures(maximum)
        maximum += stored.format.maxima
    states = [state.name for state in op.rule.states]
    return "\n".join(
        [
            *(_print_code(table) for table in _tables(op)),
            *texts,
            function("load_states", ["arenas", *at], [*unpack, *loads, f"return {tuple_of(states)}"]),
            function("store_states", ["arenas", "fresh", *at, "of_parameter"], [*unpack, *stores, "return"]),
            function("store_maxima", ["row", "fresh"], [*measures, "return"]),
        ]
    )


class _Printed:
    """Some states of a rule in their format.

    Args:
        op: The step operator.
        stored: Them.
        fast: Whether NVIDIA's instructions are used.
    """

    def __init__(self, op: StepOp, stored: Stored, fast: bool) -> None:
        self.op, self.stored, self.format, self.fast = op, stored, stored.format, fast
        self.states = [op.rule.states[k].name for k in stored.states]
        self.name = "_".join(self.states)
        self.shared = [part.name for part in self.format.of_blocks]
        self.fresh = [f"fresh[{k}]" for k in stored.states]

    def functions(self) -> str:
        """`decode_exp_avg`, `encode_exp_avg` and so on."""
        traced, numbers = trace_format(self.format), [part.name for part in self.format.of_elements]
        found = [f"largest_{k}" for k in range(self.format.maxima)]
        texts = []
        for name, arguments, graph in (
            ("decode", [*numbers, *self.shared], traced.decode),
            ("magnitudes", self.states, traced.magnitudes),
            ("share", found, traced.share),
            ("encode", [*self.states, *self.shared], traced.encode),
        ):
            lines, results = write(graph, arguments, TRITON)
            flag = f"FAST: tl.constexpr = {self.fast}"
            texts.append(
                function(f"{name}_{self.name}", arguments, [flag, *lines, f"return {tuple_of(results)}"])
            )
        return "\n".join(texts)

    def loads(self) -> list[str]:
        """Statements that define the states."""
        numbers = [self._load(part) for part in self.format.of_elements]
        shared = [
            f"tl.load({self._row(part)} + block + b, whole, 0.0)[:, None]" for part in self.format.of_blocks
        ]
        return [f"{tuple_of(self.states)} = {self._call('decode', [*numbers, *shared])}"]

    def stores(self, first: int, block_wise: bool) -> list[str]:
        """Statements that encode the states ``fresh``.

        Args:
            first: Number of the first of the format's maxima.
            block_wise: Whether they are those of blocks.
        """
        lines = []
        if self.format.maxima:
            lines.append(f"magnitudes = {self._call('magnitudes', self.fresh)}")
        largest = []
        for k in range(self.format.maxima):
            of_parameter = "None" if block_wise else f"of_parameter + {first + k}"
            largest.append(f"block_maxima(magnitudes[{k}], {of_parameter}, b)")
        if self.shared:
            lines.append(f"shared = {self._call('share', largest)}")
            for k, part in enumerate(self.format.of_blocks):
                lines.append(f"tl.store({self._row(part)} + block + b, shared[{k}], whole)")
        shared = [f"shared[{k}][:, None]" for k in range(len(self.shared))]
        lines.append(f"numbers = {self._call('encode', [*self.fresh, *shared])}")
        for k, part in enumerate(self.format.of_elements):
            lines.append(f"tl.store({self._row(part)} + offset + i, {self._entry(part, k)}, inside)")
        return lines

    def measures(self, first: int) -> list[str]:
        """Statements that write the maxima of the elements of a program to ``row``."""
        if not self.format.maxima:
            return []
        stores = [f"tl.store(row + {first + k}, tl.max(magnitudes[{k}]))" for k in range(self.format.maxima)]
        return [f"magnitudes = {self._call('magnitudes', self.fresh)}", *stores]

    def _call(self, name: str, arguments: Sequence[str]) -> str:
        return f"{name}_{self.name}({', '.join(arguments)})"

    def _row(self, part: Part) -> str:
        """Name of the row of an arena that the states have."""
        arena, index = f"{self.format.name}_{part.name}", self.op.row(self.stored)
        return next(row.name for row in arena_rows(self.op) if (row.arena, row.number) == (arena, index))

    def _load(self, part: Part) -> str:
        if part.name not in self.format.tables:
            return f"tl.load({self._row(part)} + offset + i, inside, 0.0).to(tl.float32)"
        table = self.format.tables[part.name]
        return f"load_codes({self._row(part)} + offset, {table.name}, i, inside, {zero_of(table)})"

    def _entry(self, part: Part, number: int) -> str:
        if part.name not in self.format.tables:
            return f"numbers[{number}].to({LANGUAGE[part.dtype]})"
        table = self.format.tables[part.name]
        if self.fast and isinstance(table, DynamicTable):
            return f"encode_fast(numbers[{number}], {table.signed}).to(tl.uint8)"
        return f"code_{table.name}(numbers[{number}])[0].to(tl.int32).to(tl.uint8)"


@functools.cache
def _print_code(table: AbstractTable) -> str:
    lines, (code,) = write(trace_code(table), ["number"], TRITON)
    return function(f"code_{table.name}", ["number"], [*lines, f"return ({code},)"])

"""The formats in Triton: their functions, and the loads and stores of the arenas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...formats import BLOCK, Part, Stored
from ...formats.dynamic8 import DynamicTable
from ...formats.table import AbstractTable
from ...formats.trace import numbers_of, trace_code, trace_format, trace_roots, zero_of
from ...ops.operator import Modes, StepOp
from ...rules import NEAREST
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


def print_formats(op: StepOp, modes: Modes, fast: bool, compensated: Sequence[Stored] = ()) -> str:
    """How the states are loaded, stored, and measured for a whole parameter.

    Args:
        op: The step operator.
        modes: What it is compiled for.
        fast: Whether NVIDIA's instructions are used.
        compensated: The states of which `store_states` returns what is lost of each, and the root that it is
            over.
    """
    unpack = [
        f"{name} = arenas[{k}]" for k, name in enumerate([*(r.name for r in arena_rows(op)), *tables(op)])
    ]
    at = ["offset", "i", "block", "b", "inside", "whole"]
    loads, stores, measures, texts, lost = [], [], [], [], []
    maximum = 0
    for stored in op.stored:
        printed = _Printed(op, stored, fast)
        texts.append(printed.functions())
        loads += printed.loads()
        stores += printed.stores(maximum, modes.block_wise, stored in compensated)
        if stored in compensated:
            lost += [f"lost_{printed.state}", f"root_{printed.over}"]
        if stored.over is None:
            measures += printed.measures(maximum)
            maximum += stored.format.maxima
    states = [state.name for state in op.rule.states]
    noise = ["noise = noise_of(random)[0]"] if op.random else []
    return "\n".join(
        [
            *(_print_code(table) for table in _tables(op)),
            *([_print_roots(fast)] if op.has_ratios else []),
            *texts,
            function("load_states", ["arenas", *at], [*unpack, *loads, f"return {tuple_of(states)}"]),
            function(
                "store_states",
                ["arenas", "fresh", "random", *at, "of_parameter"],
                [*unpack, *noise, *stores, f"return {tuple_of(lost)}"],
            ),
            function("store_maxima", ["row", "fresh"], [*measures, "return"]),
        ]
    )


class _Printed:
    """A state of a rule in its format.

    Args:
        op: The step operator.
        stored: It.
        fast: Whether NVIDIA's instructions are used.
    """

    def __init__(self, op: StepOp, stored: Stored, fast: bool) -> None:
        self.op, self.stored, self.format, self.fast = op, stored, stored.format, fast
        names = [state.name for state in op.rule.states]
        self.state = names[stored.state]
        self.over = None if stored.over is None else names[stored.over]
        self.is_over = any(other.over == stored.state for other in op.stored)
        self.shared = [part.name for part in self.format.of_blocks]
        self.groups = BLOCK // self.format.block

    def functions(self) -> str:
        """`decode_exp_avg`, `encode_exp_avg` and so on."""
        traced, numbers = trace_format(self.format), [part.name for part in self.format.of_elements]
        found = [f"largest_{k}" for k in range(self.format.maxima)]
        texts = []
        for name, arguments, graph in (
            ("decode", [*numbers, *self.shared], traced.decode),
            ("magnitudes", ["state"], traced.magnitudes),
            ("share", found, traced.share),
            ("encode", ["state", *self.shared, "noise"], traced.encode),
        ):
            lines, results = write(graph, arguments, TRITON)
            flag = f"FAST: tl.constexpr = {self.fast}"
            texts.append(
                function(f"{name}_{self.state}", arguments, [flag, *lines, f"return {tuple_of(results)}"])
            )
        return "\n".join(texts)

    def loads(self) -> list[str]:
        """Statements that define the state."""
        numbers = [self._grouped(self._load(part)) for part in self.format.of_elements]
        shared = [
            self._spread(
                f"tl.load({self._row(part)} + {self._entries()}, {self._whole()}, 0.0).to(tl.float32)"
            )
            for part in self.format.of_blocks
        ]
        decoded = self._flat(f"{self._call('decode', [*numbers, *shared])}[0]")
        lines = [f"{self.state} = {decoded}"]
        if self.over is not None:
            lines = [f"{self.state} = {decoded} * root_{self.over}"]
        if self.is_over:
            lines.append(f"root_{self.state} = roots({self.state})[0]")
        return lines

    def stores(self, first: int, block_wise: bool, compensated: bool) -> list[str]:
        """Statements that encode the state in ``fresh``.

        Args:
            first: Number of the first of the format's maxima.
            block_wise: Whether they are those of blocks.
            compensated: Whether it is said what is lost.
        """
        state = f"fresh[{self.stored.state}]"
        lines = [f"x = {self._grouped(state if self.over is None else f'{state} * per_root_{self.over}')}"]
        if self.format.maxima:
            lines.append(f"magnitudes = {self._call('magnitudes', ['x'])}")
        largest = []
        for k in range(self.format.maxima):
            of_parameter = "None" if block_wise else f"of_parameter + {first + k}"
            largest.append(f"block_maxima(magnitudes[{k}], {of_parameter}, b)")
        shared = []
        if self.shared:
            lines.append(f"shared = {self._call('share', largest)}")
            for k, part in enumerate(self.format.of_blocks):
                lines.append(f"tl.store({self._row(part)} + {self._entries()}, shared[{k}], {self._whole()})")
            shared = [self._spread(f"shared[{k}]") for k in range(len(self.shared))]
        noise = self._grouped("noise") if self.format.random else str(NEAREST)
        lines.append(f"numbers = {self._call('encode', ['x', *shared, noise])}")
        for k, part in enumerate(self.format.of_elements):
            lines.append(self._store(part, k))
        if self.is_over or compensated:
            numbers = [
                f"numbers[{k}].to({LANGUAGE[part.dtype]}).to(tl.float32)"
                if part.dtype.is_floating_point
                else f"numbers[{k}]"
                for k, part in enumerate(self.format.of_elements)
            ]
            lines.append(f"kept = {self._call('decode', [*numbers, *shared])}[0]")
        if self.is_over:
            lines.append(f"root_{self.state}, per_root_{self.state} = roots({self._flat('kept')})")
        if compensated:
            lines.append(f"lost_{self.state} = {self._flat('x - kept')} * root_{self.over}")
        return lines

    def measures(self, first: int) -> list[str]:
        """Statements that write the maxima of the elements of a program to ``row``."""
        if not self.format.maxima:
            return []
        stores = [f"tl.store(row + {first + k}, tl.max(magnitudes[{k}]))" for k in range(self.format.maxima)]
        return [f"magnitudes = {self._call('magnitudes', [f'fresh[{self.stored.state}]'])}", *stores]

    def _call(self, name: str, arguments: Sequence[str]) -> str:
        return f"{name}_{self.state}({', '.join(arguments)})"

    def _grouped(self, x: str) -> str:
        """Elements with a dimension for what shares something in a block, if that is not the block."""
        return x if self.groups == 1 else f"grouped({x}, {self.groups})"

    def _flat(self, x: str) -> str:
        return x if self.groups == 1 else f"flat({x})"

    def _spread(self, shared: str) -> str:
        return f"{shared}[:, None]" if self.groups == 1 else f"{shared}[:, :, None]"

    def _entries(self) -> str:
        """Where entries of blocks are."""
        return "block + b" if self.groups == 1 else f"groups_of(block + b, {self.groups})"

    def _whole(self) -> str:
        return "whole" if self.groups == 1 else "whole[:, None]"

    def _row(self, part: Part) -> str:
        """Name of the row of an arena that the state has."""
        arena, index = f"{self.format.name}_{part.name}", self.op.row(self.stored)
        return next(row.name for row in arena_rows(self.op) if (row.arena, row.number) == (arena, index))

    def _load(self, part: Part) -> str:
        row = self._row(part)
        if part.packed:
            return f"load_nibbles({row}, block + b, whole, {part.dtype == torch.int8})"
        if part.name in self.format.tables:
            table = self.format.tables[part.name]
            return f"load_codes({row} + offset, {table.name}, i, inside, {zero_of(table)})"
        if part.dtype.is_floating_point:
            return f"tl.load({row} + offset + i, inside, 0.0).to(tl.float32)"
        return f"tl.load({row} + offset + i, inside, 0).to(tl.int32)"

    def _store(self, part: Part, k: int) -> str:
        number = self._flat(f"numbers[{k}]")
        if part.packed:
            return f"store_nibbles({number}, {self._row(part)}, block + b, whole)"
        if part.name not in self.format.tables:
            entry = f"{number}.to({LANGUAGE[part.dtype]})"
        else:
            table = self.format.tables[part.name]
            entry = f"code_{table.name}({number})[0].to(tl.int32).to(tl.uint8)"
            if self.fast and isinstance(table, DynamicTable):
                entry = f"encode_fast({number}, {table.signed}).to(tl.uint8)"
        return f"tl.store({self._row(part)} + offset + i, {entry}, inside)"


@functools.cache
def _print_roots(fast: bool) -> str:
    lines, results = write(trace_roots(), ["over"], TRITON)
    flag = f"FAST: tl.constexpr = {fast}"
    return function("roots", ["over"], [flag, *lines, f"return {tuple_of(results)}"])


@functools.cache
def _print_code(table: AbstractTable) -> str:
    lines, (code,) = write(trace_code(table), ["number"], TRITON)
    return function(f"code_{table.name}", ["number"], [*lines, f"return ({code},)"])

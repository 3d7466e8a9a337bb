"""The formats in C++: their functions as structs, and how they are given their arenas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ...formats import ALIGN, BLOCK, AbstractFormat, Part, Stored, codebook
from ...formats.dynamic8 import DynamicTable
from ...formats.table import AbstractTable
from ...formats.trace import number_dtype, numbers_of, trace_code, trace_format, zero_of
from ...ops.operator import StepOp
from ..dialects import C_FAST, C_VECTOR
from ..printer import write

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.uint8: "uint8_t",
    torch.int8: "int8_t",
    torch.float8_e4m3fn: "at::Float8_e4m3fn",
    torch.float8_e5m2: "at::Float8_e5m2",
    torch.int64: "int64_t",
    torch.bfloat16: "at::BFloat16",
    torch.float16: "at::Half",
}


def _functions(of: AbstractFormat) -> str:
    """The functions of a format as the struct that stored.h is written for."""
    traced, shares = trace_format(of), len(of.of_blocks)
    numbers = [f"std::get<{k}>(numbers)" for k in range(len(of.of_elements))]
    tuple_of = ", ".join("I" if number_dtype(of, p) == torch.int32 else "V" for p in of.of_elements)
    shared = [f"shared[{k}]" for k in range(shares)]
    lines = [
        f"  static constexpr int MAXIMA = {of.maxima}, SHARED = {shares}, GROUP = {of.block};",
        f"  static constexpr bool RANDOM = {str(of.random).lower()};",
    ]

    def function(
        declaration: str, graph: torch.fx.Graph, arguments: Sequence[str], results: Sequence[str]
    ) -> list[str]:
        statements, values = write(graph, arguments, C_FAST)
        statements += [f"{result} {value};" for result, value in zip(results, values, strict=True)]
        return [f"  static inline {declaration} {{", *(f"    {line}" for line in statements), "  }"]

    lines += function(
        f"V decode(const std::tuple<{tuple_of}>& numbers, const V* shared)",
        traced.decode,
        [*numbers, *shared],
        ["return"],
    )
    lines += function(
        "void magnitudes(const V& state, V* magnitudes)",
        traced.magnitudes,
        ["state"],
        [f"magnitudes[{k}] =" for k in range(of.maxima)],
    )
    lines += function(
        "void share(const V* maxima, V* shared)",
        traced.share,
        [f"maxima[{k}]" for k in range(of.maxima)],
        [f"{name} =" for name in shared],
    )
    lines += function(
        f"void encode(const V& state, const V* shared, const V& noise, std::tuple<{tuple_of}>& numbers)",
        traced.encode,
        ["state", *shared, "noise"],
        [f"{name} =" for name in numbers],
    )
    return "\n".join([f"struct {_name(of)} {{", *lines, "};"])


def _name(of: AbstractFormat) -> str:
    """Of the struct of a format: formats of one name may have other tables."""
    return "_".join([of.name, *(table.name for table in of.tables.values()), *["nearest"] * (not of.random)])


def _table(table: AbstractTable) -> str:
    """A table as the struct that stored.h is written for."""
    lines, (code,) = write(trace_code(table), ["x"], C_VECTOR)
    values: dict[str, Sequence[float]] = {"VALUES": numbers_of(table)}
    if isinstance(table, DynamicTable):
        values |= codebook.register_tables(table.signed)
    return "\n".join(
        [
            f"struct {table.name} {{",
            f"  static constexpr uint8_t ZERO = {zero_of(table)};",
            *(
                f"  static constexpr float {name}[] = {{{', '.join(f'{v!r}f' for v in numbers)}}};"
                for name, numbers in values.items()
            ),
            "  static inline V code(const V& x) {",
            *(f"    {line}" for line in lines),
            f"    return {code};",
            "  }",
            "};",
        ]
    )


def _entries(of: AbstractFormat, part: Part) -> str:
    """Type of how a part is written."""
    if part.name not in of.tables:
        if part.dtype.is_floating_point:
            return f"Numbers<{TYPES[part.dtype]}>"
        return f"Integers<{TYPES[part.dtype]}, {part.per}>"
    table = of.tables[part.name]
    if isinstance(table, DynamicTable):
        return f"MapCodes<{table.name}, {str(table.signed).lower()}>"
    return f"Codes<{table.name}>"


def storage(op: StepOp, compensated: Sequence[Stored]) -> str:
    """Statement that defines ``storage`` from the arenas, ``elements`` and ``blocks``.

    Args:
        op: The step operator.
        compensated: The states of which it must be known what is lost.
    """
    place = {stored.state: k for k, stored in enumerate(op.stored)}
    types, formats = [], []
    for stored in op.stored:

        def rows(parts: Sequence[Part], stored: Stored = stored) -> str:
            name, row = stored.format.name, op.row(stored)
            return ", ".join(f"{name}_{part.name} + {row} * {_length(part.per)}" for part in parts)

        of = stored.format
        flags = [any(other.over == stored.state for other in op.stored), stored in compensated]
        shared = f"std::tuple<{', '.join(f'{TYPES[part.dtype]}*' for part in of.of_blocks)}>"
        arguments = [
            _name(of),
            str(-1 if stored.over is None else place[stored.over]),
            *(str(flag).lower() for flag in flags),
            shared,
            *(_entries(of, part) for part in of.of_elements),
        ]
        types.append(f"Stored<{', '.join(arguments)}>")
        formats.append(f"{types[-1]}{{{{{rows(of.of_elements)}}}, {{{rows(of.of_blocks)}}}}}")
    all_types = ", ".join(types)
    return f"const Formats<{all_types}> storage{{std::tuple<{all_types}>({', '.join(formats)})}};"


def definitions(op: StepOp) -> list[str]:
    """What the formats of an operator need."""
    formats = list(dict.fromkeys(stored.format for stored in op.stored))
    tables = {table.name: table for of in formats for table in of.tables.values()}
    headers = ["stored.h"]
    if any(isinstance(table, DynamicTable) for table in tables.values()):
        headers.append("dynamic_map.h")
    return [*map(header, headers), *map(_table, tables.values()), *map(_functions, formats)]


def state_order(op: StepOp) -> list[int]:
    """Where each state of the rule is among those of all formats."""
    order = [stored.state for stored in op.stored]
    return [order.index(k) for k in range(len(order))]


@functools.cache
def header(name: str) -> str:
    """Text of a header beside this file."""
    return Path(__file__).with_name(name).read_text()


def _length(per: int) -> str:
    """Of a row, as Layout.length."""
    entries = "elements" if per == 1 else f"blocks * {BLOCK // per}"
    return f"(({entries} + {ALIGN - 1}) / {ALIGN} * {ALIGN})"

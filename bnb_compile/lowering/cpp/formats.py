"""The formats in C++: their functions as structs, and how they are given their arenas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from ...formats import ALIGN, BLOCK, AbstractFormat, Part, Stored, codebook
from ...formats.dynamic8 import DynamicTable
from ...formats.table import AbstractTable
from ...formats.trace import numbers_of, trace_code, trace_format, zero_of
from ...ops.operator import StepOp
from ..dialects import C_VECTOR
from ..printer import write

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.uint8: "uint8_t",
    torch.int64: "int64_t",
    torch.bfloat16: "at::BFloat16",
    torch.float16: "at::Half",
}


def _functions(of: AbstractFormat) -> str:
    """The functions of a format as the struct that stored.h is written for."""
    traced = trace_format(of)
    lines = [
        f"  static constexpr int STATES = {of.states}, MAXIMA = {of.maxima}, SHARED = {len(of.of_blocks)};"
    ]
    numbers = len(of.of_elements)
    for name, given, result in (
        ("decode", {"numbers": numbers, "shared": len(of.of_blocks)}, "states"),
        ("magnitudes", {"states": of.states}, "magnitudes"),
        ("share", {"maxima": of.maxima}, "shared"),
        ("encode", {"states": of.states, "shared": len(of.of_blocks)}, "numbers"),
    ):
        arguments = [f"{array}[{k}]" for array, count in given.items() for k in range(count)]
        statements, results = write(getattr(traced, name), arguments, C_VECTOR)
        statements += [f"{result}[{k}] = {value};" for k, value in enumerate(results)]
        declared = "".join(f"const V* {array}, " for array in given)
        lines += [
            f"  static inline void {name}({declared}V* {result}) {{",
            *(f"    {statement}" for statement in statements),
            "  }",
        ]
    return "\n".join([f"struct {_name(of)} {{", *lines, "};"])


def _name(of: AbstractFormat) -> str:
    """Of the struct of a format: formats of one name may have other tables."""
    return "_".join([of.name, *(table.name for table in of.tables.values())])


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
        return f"Numbers<{TYPES[part.dtype]}>"
    table = of.tables[part.name]
    if isinstance(table, DynamicTable):
        return f"MapCodes<{table.name}, {str(table.signed).lower()}>"
    return f"Codes<{table.name}>"


def _type(of: AbstractFormat) -> str:
    return f"Stored<{', '.join([_name(of), *(_entries(of, part) for part in of.of_elements)])}>"


def storage(op: StepOp) -> str:
    """Statement that defines ``storage`` from the arenas, ``elements`` and ``blocks``."""
    types = ", ".join(_type(stored.format) for stored in op.stored)
    formats = []
    for stored in op.stored:

        def rows(parts: Sequence[Part], stored: Stored = stored) -> str:
            name, row = stored.format.name, op.row(stored)
            return ", ".join(f"{name}_{part.name} + {row} * {_length(part.per)}" for part in parts)

        of = stored.format
        formats.append(f"{_type(of)}{{{{{rows(of.of_elements)}}}, {{{rows(of.of_blocks)}}}}}")
    return f"const Formats<{types}> storage{{std::tuple<{types}>({', '.join(formats)})}};"


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
    order = [k for stored in op.stored for k in stored.states]
    return [order.index(k) for k in range(len(order))]


@functools.cache
def header(name: str) -> str:
    """Text of a header beside this file."""
    return Path(__file__).with_name(name).read_text()


def _length(per: int) -> str:
    """Of a row, as Layout.length."""
    entries = f"(elements + {per - 1}) / {per}" if per < ALIGN else f"blocks * {BLOCK // per}"
    return f"(({entries} + {ALIGN - 1}) / {ALIGN} * {ALIGN})"

"""The formats in C++: which header has one, what is printed before it, and how it is given its arenas."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ...formats import ALIGN, BLOCK, AbstractFormat, codebook
from ...formats.dynamic8 import Dynamic8
from ...formats.elements import Elements
from ...ops.operator import StepOp
from ...rules.trace import trace
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


class Declared(NamedTuple):
    """A format as C++ knows it."""

    text: str  # definitions that it needs; the same text is needed once
    type: str


def declare(stored: AbstractFormat) -> Declared:
    """The struct of a format, see step.h.

    Raises:
        NotImplementedError: If there is none.
    """
    if isinstance(stored, Elements):
        return Declared(header("elements.h"), f"Elements<{TYPES[stored.dtype]}>")
    if isinstance(stored, Dynamic8):
        return Declared(_dynamic8(), f"Dynamic8<{str(stored.signed).lower()}>")
    raise NotImplementedError(f"the format {stored.name} has no C++")


def storage(op: StepOp) -> str:
    """Statement that defines ``storage`` from the arenas, ``elements`` and ``blocks``."""
    types = ", ".join(declare(stored.format).type for stored in op.stored)
    formats = []
    for stored in op.stored:
        row = op.row(stored)
        rows = [
            f"{stored.format.name}_{part.name} + {row} * {_length(part.per)}" for part in stored.format.parts
        ]
        formats.append(f"{declare(stored.format).type}{{{', '.join(rows)}}}")
    return f"const Formats<{types}> storage{{std::tuple<{types}>({', '.join(formats)})}};"


def definitions(op: StepOp) -> list[str]:
    """The texts that the formats of an operator need."""
    return list(dict.fromkeys(declare(stored.format).text for stored in op.stored))


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


@functools.cache
def _dynamic8() -> str:
    maps = ["template <bool SIGNED>", "struct Map;", _map(True), _map(False)]
    return "\n".join([*maps, header("dynamic8.h")])


def _table(name: str, values: Sequence[float]) -> str:
    return f"  static constexpr float {name}[] = {{{', '.join(f'{v!r}f' for v in values)}}};"


def _map(signed: bool) -> str:
    def portable(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (codebook.code(x, signed),)

    lines, (code,) = write(trace(portable, 1, torch.float32), ["x"], C_VECTOR)
    tables = {"VALUES": codebook.create_dynamic_map(signed).tolist(), **codebook.register_tables(signed)}
    return "\n".join(
        [
            "template <>",
            f"struct Map<{str(signed).lower()}> {{",
            *(_table(name, values) for name, values in tables.items()),
            "  static inline V code(const V& x) {",
            *(f"    {line}" for line in lines),
            f"    return {code};",
            "  }",
            "};",
        ]
    )

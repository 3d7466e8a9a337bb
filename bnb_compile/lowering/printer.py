"""Printing maths as source code: a traced graph in any dialect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..rules.trace import OPERATIONS, constant_of, is_constant
from .dialects import Dialect

aten = torch.ops.aten


def write(graph: torch.fx.Graph, arguments: Sequence[str], dialect: Dialect) -> tuple[list[str], list[str]]:
    """The graph as statements.

    Args:
        graph: From `trace`.
        arguments: Expression of each argument.
        dialect: The language.

    Returns:
        tuple[list[str], list[str]]: The statements, and the expression of each result.
    """
    expression: dict[torch.fx.Node, str] = {}
    names = iter(arguments)
    lines: list[str] = []
    fused = {node: one for node in graph.nodes if (one := _fuse(node, dialect)) is not None}
    inner = {one.inner for one in fused.values()}

    for node in graph.nodes:
        if node.op == "placeholder":
            expression[node] = next(names)
        elif node.op == "output":
            return lines, [expression[value] for value in node.args[0]]
        elif is_constant(node):
            expression[node] = dialect.of(_dtype(node)).constant(constant_of(node))
        elif node not in inner:
            own = dialect.of(_dtype(node))
            if node in fused:
                name, operands, _ = fused[node]
            else:
                name, operands = OPERATIONS[node.target], node.args
            if name in ("bits", "convert"):
                operands = operands[:1]  # without the dtype, which `own` is for
            texts = [expression[x] if isinstance(x, torch.fx.Node) else own.constant(x) for x in operands]
            expression[node] = f"t{len(lines)}"
            lines.append(own.declare.format(name=expression[node], value=own.operations[name].format(*texts)))
    raise AssertionError("a graph has an output")


def _dtype(node: torch.fx.Node) -> torch.dtype:
    """Of what a node computes with, which of a comparison is that of its operands."""
    dtype = node.meta["val"].dtype
    return _dtype(node.args[0]) if dtype == torch.bool else dtype  # type: ignore[arg-type]


class _Fused(NamedTuple):
    """Two operations that a language writes as one.

    Attributes:
        name: Of the one.
        operands: Its operands.
        inner: The first of the two, which nothing else needs.
    """

    name: str
    operands: Sequence[Any]
    inner: torch.fx.Node


def _fuse(node: torch.fx.Node, dialect: Dialect) -> _Fused | None:
    """What an operation is together with one of its operands."""
    if node.op != "call_function" or is_constant(node):
        return None
    operations = dialect.of(_dtype(node)).operations
    # a + b*c, b*c + a, a - b*c; of two products the first stays
    sums: dict[Any, tuple[int, ...]] = {aten.add.Tensor: (1, 0), aten.sub.Tensor: (1,)}
    for k in sums.get(node.target, ()) if "fma" in operations else ():
        product = _only_for(node, k, aten.mul.Tensor)
        if product is not None and node.args[0] is not node.args[1]:
            name = "fma" if node.target is aten.add.Tensor else "fnma"
            return _Fused(name, (*product.args, node.args[1 - k]), product)
    if node.target is aten.bitwise_and.Scalar and "logical_shift" in operations:
        shift = _only_for(node, 0, aten.bitwise_right_shift.Tensor_Scalar)
        if shift is not None and node.args[1] == 2 ** (32 - shift.args[1]) - 1:  # type: ignore[operator]
            return _Fused("logical_shift", shift.args, shift)
    if node.target is aten._to_copy.default and "convert_floor" in operations:
        floor = _only_for(node, 0, aten.floor.default)
        if floor is not None:
            return _Fused("convert_floor", floor.args, floor)
    return None


def _only_for(node: torch.fx.Node, k: int, target: Any) -> torch.fx.Node | None:
    """An operand of a node, if it is such an operation, and nothing else needs it."""
    operand = node.args[k]
    found = isinstance(operand, torch.fx.Node) and operand.target is target and len(operand.users) == 1
    return operand if found else None  # type: ignore[return-value]

"""Printing maths as source code: a traced graph in any dialect."""

from __future__ import annotations

from collections.abc import Sequence

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
    product = _products_to_fuse(graph) if "fma" in dialect.operations else {}

    for node in graph.nodes:
        if node.op == "placeholder":
            expression[node] = next(names)
        elif node.op == "output":
            return lines, [expression[value] for value in node.args[0]]
        elif is_constant(node):
            expression[node] = dialect.of(_dtype(node)).constant(constant_of(node))
        elif node not in product.values():
            name, operands = OPERATIONS[node.target], node.args
            if node in product:
                other = next(a for a in node.args if a is not product[node])
                name = "fma" if name == "add" else "fnma"
                operands = (*product[node].args, other)
            own = dialect.of(_dtype(node))
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


def _products_to_fuse(graph: torch.fx.Graph) -> dict[torch.fx.Node, torch.fx.Node]:
    """The product that each sum or difference can take in, where nothing else needs it."""
    fused: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        # a + b*c, b*c + a, a - b*c; of two products the first stays
        operands = {aten.add.Tensor: (1, 0), aten.sub.Tensor: (1,)}.get(node.target, ())
        for k in operands:
            value = node.args[k]
            if (
                isinstance(value, torch.fx.Node)
                and value.target is aten.mul.Tensor
                and len(value.users) == 1
                and node.meta["val"].dtype != torch.int32
                and node.args[0] is not node.args[1]
            ):
                fused[node] = value
                break
    return fused

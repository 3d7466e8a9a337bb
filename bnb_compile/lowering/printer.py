"""Printing a rule's maths as source code: trace the tensor function once, write it in any dialect."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from ..ops import codebook
from ..rules import Rule, round_bits, trust_ratio

aten = torch.ops.aten

#: The operations that a rule may use, by the name that a dialect gives them.
_OPERATIONS: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.reciprocal.default: "reciprocal",
    aten.sqrt.default: "sqrt",
    aten.floor.default: "floor",
    aten.sign.default: "sign",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.pow.Tensor_Tensor: "pow",
    aten.pow.Scalar: "pow",
    aten.pow.Tensor_Scalar: "pow",
    aten.minimum.default: "minimum",
    aten.maximum.default: "maximum",
    aten.where.self: "where",
    aten.gt.Tensor: "gt",
    aten.gt.Scalar: "gt",
    aten.ge.Tensor: "ge",
    aten.ge.Scalar: "ge",
    aten.lt.Tensor: "lt",
    aten.lt.Scalar: "lt",
    aten.le.Tensor: "le",
    aten.le.Scalar: "le",
    aten.eq.Tensor: "eq",
    aten.eq.Scalar: "eq",
    aten.bitwise_and.Scalar: "and",
    aten.bitwise_xor.Tensor: "xor",
    aten.bitwise_right_shift.Tensor_Scalar: "shift",
}


class Dialect(NamedTuple):
    """How a language writes arithmetic.

    Attributes:
        declare: Template of a statement, with fields ``name`` and ``value``.
        constant: Writes a number.
        operations: Template of each operation, with its operands as positional fields. `fma` (a*b + c)
            and `fnma` (c - a*b) are used where they are given.
    """

    declare: str
    constant: Callable[[float], str]
    operations: dict[str, str]


def _rsub(a: torch.Tensor, b: Any, alpha: float = 1) -> torch.Tensor:
    a = a if alpha == 1 else a * alpha
    return torch.sub(torch.full_like(a, b) if isinstance(b, (int, float)) else b, a)


_DECOMPOSITIONS = {aten.rsub.Scalar: _rsub, aten.rsub.Tensor: _rsub}


def trace(function: Callable[..., Sequence[torch.Tensor]], count: int, dtype: torch.dtype) -> torch.fx.Graph:
    """Graph of an elementwise function.

    Args:
        function: Takes `count` tensors and returns a sequence of tensors.
        count: Number of arguments.
        dtype: Of the arguments.

    Returns:
        torch.fx.Graph: One placeholder for each argument; the output is a tuple.
    """
    example = [torch.empty((), dtype=dtype) for _ in range(count)]
    module = make_fx(lambda *args: tuple(function(*args)), _DECOMPOSITIONS, tracing_mode="fake")(*example)
    module.graph.eliminate_dead_code()
    return module.graph


class TracedRule(NamedTuple):
    """The two functions of a rule as graphs.

    Attributes:
        scalars: ``(*hyper, step) -> scalars``, float64.
        update: ``(param, grad, *states, *scalars) -> (param, *states)``, float32.
        direction: ``(param, grad, *states, *scalars) -> (direction, *states)``, float32.
        scalar_names: Of the scalars.
    """

    scalars: torch.fx.Graph
    update: torch.fx.Graph
    direction: torch.fx.Graph
    scalar_names: tuple[str, ...]


@functools.cache
def trace_rule(rule: Rule) -> TracedRule:
    """Trace a rule."""
    hyper, states = len(rule.hyper._fields), len(rule.states)
    shared = rule.scalars(rule.hyper(*[torch.zeros(())] * hyper), torch.ones(()))

    def of_elements(function: Callable[..., Sequence[torch.Tensor]]) -> torch.fx.Graph:
        return trace(
            lambda *a: function(*a[: 2 + states], shared._make(a[2 + states :])),
            2 + states + len(shared),
            torch.float32,
        )

    return TracedRule(
        trace(lambda *a: rule.scalars(rule.hyper(*a[:-1]), a[-1]), hyper + 1, torch.float64),
        of_elements(rule.update),
        of_elements(rule.direction),
        shared._fields,
    )


@functools.cache
def trace_cell(signed: bool) -> torch.fx.Graph:
    """``(magnitude,) -> (cell,)`` of a state, float32; of the unsigned map the cell is the code."""

    def cell(a: torch.Tensor) -> tuple[torch.Tensor]:
        nearest = codebook.closed_form(a, signed)
        return (nearest if signed else codebook.never_zero(nearest, a),)

    return trace(cell, 1, torch.float32)


@functools.cache
def trace_trust_ratio() -> torch.fx.Graph:
    """``(max_unorm, param_norm, update_norm) -> (ratio,)``, float64."""
    return trace(lambda *a: (trust_ratio(*a),), 3, torch.float64)


@functools.cache
def trace_round_bits() -> torch.fx.Graph:
    """``(bits, index, step) -> (bits,)``, int32."""
    return trace(lambda *a: (round_bits(*a),), 3, torch.int32)


def write(graph: torch.fx.Graph, arguments: Sequence[str], dialect: Dialect) -> tuple[list[str], list[str]]:
    """The graph as statements.

    Args:
        graph: From `trace`.
        arguments: Expression of each argument.
        dialect: The language.

    Returns:
        tuple[list[str], list[str]]: The statements, and the expression of each result.

    Raises:
        NotImplementedError: If the graph has an operation that rules may not use.
    """
    expression: dict[torch.fx.Node, str] = {}
    names = iter(arguments)
    lines: list[str] = []
    product = _products_to_fuse(graph) if "fma" in dialect.operations else {}

    def text(value: Any) -> str:
        return expression[value] if isinstance(value, torch.fx.Node) else dialect.constant(value)

    for node in graph.nodes:
        if node.op == "placeholder":
            expression[node] = next(names)
        elif node.op == "output":
            return lines, [text(value) for value in node.args[0]]
        elif node.target is aten.ones_like.default:
            expression[node] = dialect.constant(1.0)
        elif node.target in (aten.full_like.default, aten.full.default, aten.scalar_tensor.default):
            fill = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
            expression[node] = dialect.constant(fill)
        elif node not in product.values():
            name, operands = _OPERATIONS.get(node.target), node.args
            if name is None or node.kwargs:
                raise NotImplementedError(
                    f"{node.format_node()}: a rule may use {sorted(set(_OPERATIONS.values()))}"
                )
            if node in product:
                other = next(a for a in node.args if a is not product[node])
                name = "fma" if name == "add" else "fnma"
                operands = (*product[node].args, other)
            value = dialect.operations[name].format(*map(text, operands))
            expression[node] = f"t{len(lines)}"
            lines.append(dialect.declare.format(name=expression[node], value=value))
    raise AssertionError("a graph has an output")


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
                and node.args[0] is not node.args[1]
            ):
                fused[node] = value
                break
    return fused


def _c_number(value: float, kind: str, suffix: str = "") -> str:
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}std::numeric_limits<{kind}>::infinity()"
    return f"{float(value)!r}{suffix}"


def _c_double(value: float) -> str:
    return _c_number(value, "double")


def _c_float(value: float) -> str:
    return f"V({_c_number(value, 'float', 'f')})"


_COMPARISONS = {
    op.__name__: f"({{}} {symbol} {{}})"
    for op, symbol in (
        (operator.gt, ">"),
        (operator.ge, ">="),
        (operator.lt, "<"),
        (operator.le, "<="),
        (operator.eq, "=="),
    )
}
_ARITHMETIC = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "reciprocal": "1.0 / {}",
}
_BITS = {"and": "{} & {}", "xor": "{} ^ {}", "shift": "({} >> {})"}

#: Double-precision scalars.
C_DOUBLE = Dialect(
    "const double {name} = {value};",
    _c_double,
    _ARITHMETIC
    | _COMPARISONS
    | {
        "neg": "-({})",
        "abs": "std::abs({})",
        "sqrt": "std::sqrt({})",
        "floor": "std::floor({})",
        "exp": "std::exp({})",
        "log": "std::log({})",
        "pow": "std::pow({}, {})",
        "minimum": "std::min({}, {})",
        "maximum": "std::max({}, {})",
        "where": "{} ? {} : {}",
    },
)

#: ``V``, a vector of floats of ATen's (ATen/cpu/vec).
C_VECTOR = Dialect(
    "const V {name} = {value};",
    _c_float,
    _ARITHMETIC
    | _COMPARISONS
    | {
        "fma": "at::vec::fmadd({}, {}, {})",
        "fnma": "at::vec::fnmadd({}, {}, {})",
        "neg": "({}).neg()",
        "abs": "({}).abs()",
        "reciprocal": "({}).reciprocal()",
        "sqrt": "({}).sqrt()",
        "floor": "({}).floor()",
        "sign": "V::blendv(V::blendv(V(0.f), V(1.f), {0} > V(0.f)), V(-1.f), {0} < V(0.f))",
        "exp": "({}).exp()",
        "log": "({}).log()",
        "pow": "({}).pow({})",
        "minimum": "at::vec::minimum({}, {})",
        "maximum": "at::vec::maximum({}, {})",
        "where": "V::blendv({2}, {1}, {0})",
    },
)

#: ``I``, a vector of int32.
C_INTEGERS = Dialect("const I {name} = {value};", lambda value: f"I({int(value)})", _ARITHMETIC | _BITS)

#: Triton's int32.
TRITON_INTEGERS = Dialect("{name} = {value}", lambda value: str(int(value)), _ARITHMETIC | _BITS)

#: Triton; the kernels define ``div``, ``sqrt`` and FAST.
TRITON = Dialect(
    "{name} = {value}",
    lambda value: "float('inf')" if value == math.inf else f"{float(value)!r}",
    _ARITHMETIC
    | _COMPARISONS
    | {
        "div": "div({}, {}, FAST)",
        "neg": "-({})",
        "abs": "tl.abs({})",
        "sqrt": "sqrt({}, FAST)",
        "floor": "tl.floor({})",
        "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        "exp": "tl.exp({})",
        "log": "tl.log({})",
        "minimum": "tl.minimum({}, {})",
        "maximum": "tl.maximum({}, {})",
        "where": "tl.where({}, {}, {})",
    },
)

#: Triton in float64, for a rule's scalars; the base of a power is not negative there.
TRITON_DOUBLE = TRITON._replace(
    operations=TRITON.operations
    | {"div": "{} / {}", "sqrt": "tl.sqrt({})", "pow": "tl.exp({1} * tl.log({0}))"}
)

"""A rule's functions as graphs, and which operations they may have.

A lowering prints these graphs (`lowering.printer`), so a rule may only use what every language has: see
`OPERATIONS`.
"""

from __future__ import annotations

import functools
import keyword
import math
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from .rounding import high_bits, noise_of, random_bits, round_bits
from .rule import Rule
from .trust import trust_ratio

aten = torch.ops.aten

#: What a rule may use, by the name that a dialect gives it. The last group is for the integers of `rounding`
#: and of formats.
OPERATIONS: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.sub.Tensor: "sub",
    aten.mul.Tensor: "mul",
    aten.div.Tensor: "div",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.reciprocal.default: "reciprocal",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
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
    aten.bitwise_or.Scalar: "or",
    aten.bitwise_xor.Tensor: "xor",
    aten.bitwise_right_shift.Tensor_Scalar: "shift",
    aten.view.dtype: "bits",  # between float32 and int32
    aten._to_copy.default: "convert",  # likewise; to int32 towards zero
}
OF_INTEGERS = {"and", "or", "xor", "shift", "bits", "convert"}
#: Made of the others before the graph is looked at.
_CONSTANTS = (
    aten.ones_like.default,
    aten.zeros_like.default,
    aten.full_like.default,
    aten.full.default,
    aten.scalar_tensor.default,
)
#: Keywords that an operation may be given; what they say is the dtype of the result.
_OWN_KEYWORDS: dict[Any, set[str]] = {aten._to_copy.default: {"dtype"}}
#: Names that printed functions have for themselves, beside t0, t1, ...
RESERVED = frozenset(
    "param grad state states s hyper step out FAST div sqrt tl triton V I std at auto bool break case char "
    "class const default delete do double else enum extern float for goto if inline int long namespace new "
    "operator private public register return short signed sizeof static struct switch template this typedef "
    "union unsigned using virtual void volatile while".split()
)

#: make_fx patches torch while it traces, so one thread traces at a time.
TRACING = threading.RLock()


def _rsub(a: torch.Tensor, b: Any, alpha: float = 1) -> torch.Tensor:
    a = a if alpha == 1 else a * alpha
    return torch.sub(torch.full_like(a, b) if isinstance(b, (int, float)) else b, a)


def _clamp(x: torch.Tensor, least: Any = None, most: Any = None) -> torch.Tensor:
    for bound, limit in ((least, torch.maximum), (most, torch.minimum)):
        if bound is not None:
            if isinstance(bound, torch.SymFloat):
                raise TypeError("clamp: both limits must be numbers, or both tensors")
            x = limit(x, torch.full_like(x, bound) if isinstance(bound, (int, float)) else bound)
    return x


def _pow(x: torch.Tensor, exponent: float) -> Any:
    whole = int(exponent) if abs(exponent) <= 16 and exponent == int(exponent) else None
    if whole is None:
        return {0.5: torch.sqrt, -0.5: torch.rsqrt}.get(exponent, lambda x: NotImplemented)(x)
    if whole < 0:
        return _pow(x, -whole).reciprocal()
    product = torch.ones_like(x)
    for bit in f"{whole:b}":
        product = product * product * x if bit == "1" else product * product
    return product


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.rsub.Scalar: _rsub,
    aten.rsub.Tensor: _rsub,
    aten.pow.Tensor_Scalar: _pow,
    aten.square.default: lambda x: x * x,
    aten.lerp.Scalar: lambda a, b, weight: a + weight * (b - a),
    aten.lerp.Tensor: lambda a, b, weight: a + weight * (b - a),
    aten.clamp.default: _clamp,
    aten.clamp.Tensor: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: lambda x, most: _clamp(x, None, most),
}


def trace(
    function: Callable[..., Sequence[torch.Tensor]],
    dtypes: Sequence[torch.dtype],
    origin: Callable[..., Any] | None = None,
    results: Sequence[str] | None = None,
) -> torch.fx.Graph:
    """Graph of an elementwise function.

    Args:
        function: Takes tensors and returns a sequence of tensors.
        dtypes: Of the arguments.
        origin: Whose lines errors name: the function that somebody wrote.
        results: What it must return, by name.

    Returns:
        torch.fx.Graph: One placeholder for each argument; the output is a tuple. Every operation is one of
        `OPERATIONS`, or makes a constant.

    Raises:
        NotImplementedError: If the function uses something else.
        ValueError: If it cannot be traced, uses a tensor that it is not given, or returns something else.
    """
    origin = origin or function

    def flat(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        returned = function(*args)
        found = (returned,) if isinstance(returned, torch.Tensor) else tuple(returned)
        wrong = [x for x in found if not isinstance(x, torch.Tensor) or x.dim()]
        if wrong or (results is not None and len(found) != len(results)):
            wanted = (
                "only tensors of the shape of its arguments" if wrong else f"({', '.join(results or ())})"
            )
            got = repr(wrong[0]) if wrong else f"{len(found)} results"
            raise ValueError(f"{_begin_of(origin)}: {_name_of(origin)} must return {wanted}, got {got}")
        return found

    with TRACING:
        example = [torch.empty((), dtype=dtype) for dtype in dtypes]
        try:
            module = make_fx(flat, _DECOMPOSITIONS, tracing_mode="fake")(*example)
        except Exception as error:
            line = _line_of(error, origin)
            if line is None and isinstance(error, TypeError) and "argument" in str(error):
                line = _begin_of(origin)  # it was not begun
            if line is None or isinstance(error, NotImplementedError):
                raise
            raise ValueError(f"{line}: {_name_of(origin)} {_mistake(error)}") from error
    for node in module.graph.nodes:
        if node.target is aten.detach.default:  # of a view as bits
            node.replace_all_uses_with(node.args[0])
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            raise ValueError(f"{_begin_of(origin)}: {_name_of(origin)} {_OUTSIDE}")
        if node.op != "call_function" or is_constant(node):
            continue
        known = node.target in OPERATIONS and node.kwargs.keys() <= _OWN_KEYWORDS.get(node.target, set())
        # Between the two that kernels compute with, and no others.
        casts = OPERATIONS.get(node.target) in ("bits", "convert")
        # A comparison is a mask, not a number: it only chooses.
        masks = [x for x in node.all_input_nodes if x.meta["val"].dtype == torch.bool]
        known = known and (not masks or node.target is aten.where.self)
        if not known or (casts and not {*dtypes, node.meta["val"].dtype} <= {torch.float32, torch.int32}):
            allowed = sorted({*OPERATIONS.values()} - OF_INTEGERS)
            line = _line_of_operation(function, dtypes, node.target, origin)
            text = f"{node.format_node()}: a rule may use {', '.join(allowed)}"
            raise NotImplementedError(f"{line}: {text}" if line else text)
    return module.graph


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", "a function")


def _begin_of(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else _name_of(function)


def _line_of(error: BaseException, origin: Callable[..., Any]) -> str | None:
    """Where in the file of a function an error was raised, the innermost line."""
    code = getattr(origin, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f"{f.filename}:{f.lineno}" for f in frames if code and f.filename == code.co_filename]
    return lines[-1] if lines else None


_OUTSIDE = (
    "uses a tensor from outside, of which there is none when its kernel runs: make it a number, a "
    "hyperparameter or a scalar"
)


def _mistake(error: BaseException) -> str:
    """What is wrong with a function that cannot be traced."""
    if "allow_non_fake_inputs" in str(error):
        return _OUTSIDE
    if "data-dependent" in str(error).lower() or type(error).__name__ == "DataDependentOutputException":
        return "branches on a tensor, which has no value before its kernel runs: branch with torch.where"
    return f"cannot be traced: {error}"


class _Stop(TorchDispatchMode):
    """Raises where an operation is called."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.target:
            raise RuntimeError(f"{func} is here")
        return func(*args, **(kwargs or {}))


def _line_of_operation(
    function: Callable[..., Any], dtypes: Sequence[torch.dtype], target: Any, origin: Callable[..., Any]
) -> str | None:
    try:
        with _Stop(target):
            function(*[torch.ones((), dtype=dtype) for dtype in dtypes])
    except RuntimeError as error:
        return _line_of(error, origin)
    return None


def is_constant(node: torch.fx.Node) -> bool:
    """Whether a node makes a tensor of one number."""
    return node.target in _CONSTANTS


def constant_of(node: torch.fx.Node) -> float:
    """The number of which a node makes a tensor."""
    if node.target is aten.ones_like.default:
        return 1.0
    if node.target is aten.zeros_like.default:
        return 0.0
    return node.args[0 if node.target is aten.scalar_tensor.default else 1]  # type: ignore[return-value]


class TracedRule(NamedTuple):
    """The two functions of a rule as graphs.

    Attributes:
        scalars: ``(*hyper, step) -> scalars``, float64.
        update: ``(param, grad, *states, *scalars) -> (param, *states)``, float32.
        direction: ``(param, grad, *states, *scalars) -> (direction, *states)``, float32.
        measure: ``(param, grad, *states, *scalars) -> numbers``, float32, of which means are taken; without
            the measured ones among the scalars.
        impulses: ``(lost, root, *scalars) -> (direction,)``, float32, for each state that has one.
        scalar_names: Of the scalars, and then of the measured ones.
    """

    scalars: torch.fx.Graph
    update: torch.fx.Graph
    direction: torch.fx.Graph
    measure: torch.fx.Graph
    impulses: dict[int, torch.fx.Graph]
    scalar_names: tuple[str, ...]


@functools.cache
def trace_rule(rule: Rule) -> TracedRule:
    """Trace a rule and check it.

    Raises:
        NotImplementedError: If it uses an operation that some language does not have.
        ValueError: If a name cannot be used, or a scalar that every rule needs is missing.
    """
    hyper, states = len(rule.hyper._fields), len(rule.states)
    if not _is_name(rule.name):
        raise ValueError(f"rule {rule.name!r}: must be a name of letters, digits and underscores")
    with TRACING:
        alone = _shared_of(rule)
        shared = rule.with_measured(alone, [torch.ones(())] * len(rule.measured))
    of_states = [state.name for state in rule.states]
    for name in (*rule.hyper._fields, *shared._fields, *of_states):
        if name in RESERVED or re.fullmatch(r"t\d+", name) or not _is_name(name):
            raise ValueError(f"rule {rule.name}: {name!r} cannot be a name, use another one")
    for state in rule.states:
        if (state.over is None) != (state.decays is None) or (state.impulse and state.over is None):
            raise ValueError(f"rule {rule.name}: {state.name} must have both over and decays, or neither")
        begin = state.initial
        if begin != "param" and not (isinstance(begin, (int, float)) and math.isfinite(begin)):
            raise ValueError(
                f"rule {rule.name}: {state.name} has initial={begin!r}, must be a finite number or 'param'"
            )
        below = begin == "param" or float(begin) < 0
        if (state.nonnegative and below) or (state.over is not None and begin != 0):
            raise ValueError(
                f"rule {rule.name}: {state.name} has initial={begin!r}, must be at least 0 if nonnegative, "
                "and 0 if it is over another state"
            )
        if state.over is not None and state.over not in of_states:
            raise ValueError(f"rule {rule.name}: {state.name} is over {state.over!r}, which is no state")
    twice = {name for name in of_states if [*of_states, *shared._fields].count(name) > 1}
    if twice:
        raise ValueError(f"rule {rule.name}: {sorted(twice)} are names of two states, or of a scalar too")

    def of_elements(function: Callable[..., Sequence[torch.Tensor]]) -> torch.fx.Graph:
        return trace(
            lambda *a: function(*a[: 2 + states], shared._make(a[2 + states :])),
            [torch.float32] * (2 + states + len(shared)),
            rule.own_function,
            ["param" if rule.has_update else "direction", *of_states],
        )

    own = of_elements(rule.own_function)  # first, so that errors are of what somebody wrote
    return TracedRule(
        trace(
            lambda *a: rule.shared(rule.hyper(*a[:-1]), a[-1]), [torch.float64] * (hyper + 1), rule.scalars
        ),
        own if rule.has_update else of_elements(rule.update),
        of_elements(rule.direction) if rule.has_update else own,
        trace(
            lambda *a: [mean(*a[: 2 + states], alone._make(a[2 + states :])) for _, mean in rule.means],
            [torch.float32] * (2 + states + len(alone)),
            rule.means[0][1] if rule.means else None,
        ),
        {
            k: trace(
                lambda lost, root, *a, impulse=state.impulse: (impulse(lost, root, shared._make(a)),),
                [torch.float32] * (2 + len(shared)),
            )
            for k, state in enumerate(rule.states)
            if state.impulse is not None
        },
        shared._fields,
    )


def _shared_of(rule: Rule) -> Any:
    """The scalars of some hyperparameters."""
    try:
        return rule.shared(rule.hyper(*[torch.zeros(())] * len(rule.hyper._fields)), torch.ones(()))
    except Exception as error:
        line = _line_of(error, rule.scalars)
        if line is None or isinstance(error, NotImplementedError):
            raise
        raise ValueError(f"{line}: scalars of rule {rule.name}: {error}") from error


def _is_name(text: str) -> bool:
    return text.isidentifier() and text.isascii() and not keyword.iskeyword(text)


@functools.cache
def trace_trust_ratio() -> torch.fx.Graph:
    """``(max_unorm, param_norm, update_norm) -> (ratio,)``, float64."""
    return trace(lambda *a: (trust_ratio(*a),), [torch.float64] * 3)


@functools.cache
def trace_round_bits() -> torch.fx.Graph:
    """``(bits, random) -> (bits,)``, int32."""
    return trace(lambda *a: (round_bits(*a),), [torch.int32] * 2)


@functools.cache
def trace_random_bits() -> torch.fx.Graph:
    """``(index, step) -> (random,)``, int32."""
    return trace(lambda *a: (random_bits(*a),), [torch.int32] * 2)


@functools.cache
def trace_high_bits() -> torch.fx.Graph:
    """As `trace_random_bits`."""
    return trace(lambda *a: (high_bits(*a),), [torch.int32] * 2)


@functools.cache
def trace_noise() -> torch.fx.Graph:
    """``(random,) -> (noise,)``, from int32 to float32."""
    return trace(lambda *a: (noise_of(*a),), [torch.int32])

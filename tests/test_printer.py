"""Tracing a function and writing it in a dialect: here in Python, so that what was written can be run."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnb_compile import rules
from bnb_compile.formats import codebook
from bnb_compile.lowering import dialects
from bnb_compile.lowering.dialects import Dialect
from bnb_compile.lowering.printer import write
from bnb_compile.rules.trace import OF_INTEGERS, OPERATIONS, trace

pytestmark = pytest.mark.quick

_PLAIN = {
    "add": "({} + {})",
    "sub": "({} - {})",
    "mul": "({} * {})",
    "div": "divide({}, {})",
    "neg": "(-{})",
    "abs": "abs({})",
    "sqrt": "math.sqrt({})",
    "reciprocal": "(1 / {})",
    "floor": "math.floor({})",
    "sign": "math.copysign({0} != 0, {0})",
    "exp": "math.exp({})",
    "log": "math.log({})",
    "pow": "({} ** {})",
    "minimum": "min({}, {})",
    "maximum": "max({}, {})",
    "where": "({1} if {0} else {2})",
    **{c: f"operator.{c}({{}}, {{}})" for c in ("gt", "ge", "lt", "le", "eq")},
}
_FUSING = _PLAIN | {"fma": "fma({}, {}, {})", "fnma": "fnma({}, {}, {})"}


#: Hyperparameters; AdEMAMix has schedules, and Nesterov's form and LAMB's flags are on.
VALUES = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "beta3": 0.9999,
    "alpha": 0.97,
    "momentum": 0.9,
    "dampening": 0.2,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "lr_decay": 1e-3,
    "t_alpha": 5.0,
    "t_beta3": 100.0,
    "nesterov": 1.0,
    "bias_correction": 1.0,
    "adam_w_mode": 1.0,
}


def python(operations: dict[str, str]) -> Dialect:
    return Dialect("{name} = {value}", lambda value: f"float('{float(value)}')", operations)


def run_printed(function: Callable, *values: float, fused: bool = False) -> tuple[list[float], list[str]]:
    """The results of the printed function, and its statements."""
    graph = trace(function, [torch.float64] * len(values))
    names = [f"x{k}" for k in range(len(values))]
    lines, results = write(graph, names, python(_FUSING if fused else _PLAIN))
    scope = dict(
        zip(names, values),
        math=math,
        operator=operator,
        divide=lambda a, b: a / b if b else a * math.inf,  # as floats do
        fma=lambda a, b, c: a * b + c,
        fnma=lambda a, b, c: c - a * b,
    )
    exec("\n".join(lines), scope)
    return [float(eval(result, scope)) for result in results], lines


def run_itself(function: Callable, *values: float) -> list[float]:
    return [float(x) for x in function(*(torch.tensor(v, dtype=torch.float64) for v in values))]


ARITHMETIC = {
    "sum of products": lambda a, b, c: (a * b + c, c + a * b),
    "difference": lambda a, b, c: (c - a * b, a * b - c),
    "two products": lambda a, b, c: (a * b + b * c, a * b - b * c),
    "shared product": lambda a, b, c: (a * b + c, a * b),
    "square twice": lambda a, b, c: (lambda s: (s + s, s - s))(a * a),
    "product with itself": lambda a, b, c: (a * a + a * a, a * a - b),
    "sum of a sum": lambda a, b, c: ((a * b + c) * c + a,),
    "constants": lambda a, b, c: (1 - a, a - 1, a / 2, 3 * a + 1, 1 - 2 * a),
    "a power": lambda a, b, c: (a**b, a**2, 2.0**c, -a, a.abs(), a.sqrt(), a.exp(), a.log()),
    "comparisons": lambda a, b, c: (torch.where(a > b, a, c), torch.where(a <= 1.5, 1.0, c), (a - b).sign()),
    "bounds": lambda a, b, c: (torch.minimum(a, b), torch.maximum(a, c), (a * 2.5).floor()),
    "an argument": lambda a, b, c: (c, a),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ARITHMETIC)
def test_printed_text_computes_what_the_function_does(name: str, fused: bool) -> None:
    function = ARITHMETIC[name]
    for values in ((1.25, 2.5, 0.75), (3.0, 0.5, 7.0)):
        printed, _ = run_printed(function, *values, fused=fused)
        assert printed == pytest.approx(run_itself(function, *values), rel=1e-15)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda a, b, c: (a * b + c,), ["t0 = fma(x0, x1, x2)"]),
        (lambda a, b, c: (c + a * b,), ["t0 = fma(x0, x1, x2)"]),
        (lambda a, b, c: (c - a * b,), ["t0 = fnma(x0, x1, x2)"]),
        (lambda a, b, c: (a * b - c,), ["t0 = (x0 * x1)", "t1 = (t0 - x2)"]),
        (lambda a, b, c: (a * b + b * c,), ["t0 = (x0 * x1)", "t1 = fma(x1, x2, t0)"]),
    ],
)
def test_a_product_is_fused_into_the_sum_that_uses_it(function: Callable, expected: list[str]) -> None:
    assert run_printed(function, 1.0, 2.0, 3.0, fused=True)[1] == expected


def test_a_product_that_is_needed_twice_is_not_computed_twice() -> None:
    _, lines = run_printed(lambda a, b: (lambda s: (s + b, s - b))(a * a), 3.0, 4.0, fused=True)
    assert sum("x0 * x0" in line or "fma(x0, x0" in line for line in lines) == 1


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_printed_closed_form(signed: bool, scale: float) -> None:
    def function(a: Tensor) -> tuple[Tensor]:
        return (codebook.closed_form(a, signed),)

    assert run_printed(function, scale, fused=True)[0] == run_itself(function, scale)


@pytest.mark.parametrize("step", [1.0, 7.0])
@pytest.mark.parametrize("rule", rules.ALL, ids=[rule.name for rule in rules.ALL])
def test_printed_rules(rule: rules.Rule, step: float) -> None:
    def scalars(*a: Tensor) -> tuple:
        return tuple(rule.scalars(rule.hyper(*a[:-1]), a[-1]))

    hyper = [VALUES[name] for name in rule.hyper._fields]
    shared = run_itself(scalars, *hyper, step)
    assert run_printed(scalars, *hyper, step)[0] == pytest.approx(shared, rel=1e-15)

    count = 2 + len(rule.states)
    kind = type(rule.scalars(rule.hyper(*map(torch.tensor, hyper)), torch.tensor(step)))
    values = [0.7, -0.3, 0.2, 0.04, 0.05, -0.06][:count]
    for of_elements in (rule.update, rule.direction):

        def function(*a: Tensor, of_elements: Callable = of_elements) -> tuple:
            return of_elements(*a[:count], kind(*a[count:]))

        expected = run_itself(function, *values, *shared)
        assert run_printed(function, *values, *shared, fused=True)[0] == pytest.approx(expected, rel=1e-14)
        assert len(expected) == 1 + len(rule.states)


@pytest.mark.parametrize("max_unorm", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("param_norm", [0.0, 1.5])
@pytest.mark.parametrize("update_norm", [0.0, 0.5, 700.0])
def test_printed_trust_ratio(max_unorm: float, param_norm: float, update_norm: float) -> None:
    limit = max_unorm * param_norm
    expected = limit / update_norm if 0 < limit < update_norm else 1.0

    def function(*a: Tensor) -> tuple[Tensor]:
        return (rules.trust_ratio(*a),)

    values = max_unorm, param_norm, update_norm
    assert run_itself(function, *values) == [expected]
    assert run_printed(function, *values)[0] == [expected]


@pytest.mark.parametrize(
    "function, name",
    [
        (lambda a: (a.sin(),), "aten.sin"),
        (lambda a: (a + torch.erf(a),), "aten.erf"),
        (lambda a: (a.cumsum(0),), "aten.cumsum"),
        (lambda a: (torch.rand_like(a),), "aten.rand"),
    ],
)
def test_an_unknown_operation_is_named(function: Callable, name: str) -> None:
    with pytest.raises(NotImplementedError, match=name) as caught:
        run_printed(function, 0.5)
    assert " sqrt, " in str(caught.value)  # and what is known is listed


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: (a.add(b, alpha=2),),
        lambda a, b: (a.sub(b, alpha=3),),
        lambda a, b: (torch.rsub(a, b, alpha=2),),
        lambda a, b: (torch.div(a, b, rounding_mode="floor"),),
    ],
    ids=["add", "sub", "rsub", "div"],
)
def test_an_option_of_an_operation_is_computed_or_refused(function: Callable) -> None:
    try:
        printed, _ = run_printed(function, 7.0, 2.0)
    except (NotImplementedError, AssertionError):
        return
    assert printed == run_itself(function, 7.0, 2.0)


@pytest.mark.parametrize("name", ["C_DOUBLE", "C_VECTOR", "TRITON", "TRITON_DOUBLE"])
def test_every_language_writes_every_operation_that_a_rule_may_use(name: str) -> None:
    dialect = getattr(dialects, name)
    assert not {*OPERATIONS.values()} - OF_INTEGERS - dialect.operations.keys()

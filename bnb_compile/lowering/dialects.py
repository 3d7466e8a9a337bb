"""How each language writes the operations of `rules.trace`."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import NamedTuple

import torch


class Dialect(NamedTuple):
    """How a language writes arithmetic.

    Attributes:
        declare: Template of a statement, with fields ``name`` and ``value``.
        constant: Writes a number.
        operations: Template of each operation, with its operands as positional fields. `fma` (a*b + c)
            and `fnma` (c - a*b) are used where they are given, as are
            `logical_shift` and `convert_floor`.
        integers: How it writes that of int32 between the numbers; None if it has none.
    """

    declare: str
    constant: Callable[[float], str]
    operations: dict[str, str]
    integers: Dialect | None = None

    def of(self, dtype: torch.dtype) -> Dialect:
        """The dialect of what has a dtype."""
        return self.integers if dtype == torch.int32 and self.integers is not None else self


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
_BITS = {"and": "{} & {}", "or": "{} | {}", "xor": "{} ^ {}", "shift": "({} >> {})"}
#: Of C++'s vectors: cpp/vectors has masks that are registers of their own where a processor has such.
_MASKS = {
    **{f"{name}": f"{name}({{}}, {{}})" for name in ("gt", "ge", "lt", "le", "eq")},
    "where": "where({}, {}, {})",
}

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
        "rsqrt": "1.0 / std::sqrt({})",
        "sign": "({0} > 0) - ({0} < 0)",
        "floor": "std::floor({})",
        "exp": "std::exp({})",
        "log": "std::log({})",
        "pow": "std::pow({}, {})",
        "minimum": "std::min({}, {})",
        "maximum": "std::max({}, {})",
        "where": "{} ? {} : {}",
    },
)

#: ``I``, a vector of int32.
C_INTEGERS = Dialect(
    "const auto {name} = {value};",
    lambda value: f"I({int(value)})",
    _ARITHMETIC
    | _MASKS
    | _BITS
    | {
        "logical_shift": "logical_shift({}, {})",
        "minimum": "at::vec::minimum({}, {})",
        "maximum": "at::vec::maximum({}, {})",
        "bits": "as_integers({})",
        "convert_floor": "floor_to_integers({})",
        "convert": "to_integers({})",
    },
)

#: Triton's int32.
TRITON_INTEGERS = Dialect(
    "{name} = {value}",
    lambda value: str(int(value)),
    _ARITHMETIC
    | _COMPARISONS
    | _BITS
    | {
        "minimum": "tl.minimum({}, {})",
        "maximum": "tl.maximum({}, {})",
        "where": "tl.where({}, {}, {})",
        "bits": "{}.to(tl.int32, bitcast=True)",
        "convert": "{}.to(tl.int32)",
    },
)

#: ``V``, a vector of floats of ATen's (ATen/cpu/vec); cpp/vectors has what that lacks.
C_VECTOR = Dialect(
    "const auto {name} = {value};",
    _c_float,
    _ARITHMETIC
    | _MASKS
    | {
        "fma": "at::vec::fmadd({}, {}, {})",
        "fnma": "at::vec::fnmadd({}, {}, {})",
        "neg": "({}).neg()",
        "abs": "({}).abs()",
        "reciprocal": "({}).reciprocal()",
        "sqrt": "({}).sqrt()",
        "rsqrt": "({}).sqrt().reciprocal()",
        "floor": "({}).floor()",
        "sign": "where(gt({0}, V(0.f)), V(1.f), where(lt({0}, V(0.f)), V(-1.f), V(0.f)))",
        "exp": "({}).exp()",
        "log": "({}).log()",
        "pow": "({}).pow({})",
        "minimum": "at::vec::minimum({}, {})",
        "maximum": "at::vec::maximum({}, {})",
        "bits": "as_numbers({})",
        "convert": "to_numbers({})",
    },
    C_INTEGERS,
)

#: As that, of states that are rounded to few bits afterwards: right to 2^-22, and of finite numbers.
C_FAST = C_VECTOR._replace(
    operations=C_VECTOR.operations
    | {
        "div": "{} * reciprocal({})",
        "reciprocal": "reciprocal({})",
        "rsqrt": "rsqrt({})",
        "minimum": "at::vec::clamp_max({}, {})",
        "maximum": "at::vec::clamp_min({}, {})",
    }
)

#: Triton; the kernels define ``div``, ``reciprocal``, ``sqrt``, ``rsqrt`` and FAST.
TRITON = Dialect(
    "{name} = {value}",
    lambda value: "float('inf')" if value == math.inf else f"{float(value)!r}",
    _ARITHMETIC
    | _COMPARISONS
    | {
        "div": "div({}, {}, FAST)",
        "reciprocal": "reciprocal({}, FAST)",
        "neg": "-({})",
        "abs": "tl.abs({})",
        "sqrt": "sqrt({}, FAST)",
        "rsqrt": "rsqrt({}, FAST)",
        "floor": "tl.floor({})",
        "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, 0.0))",
        "exp": "tl.exp({})",
        "log": "tl.log({})",
        "pow": "tl.where({1} == 0, 1.0, tl.exp({1} * tl.log({0})))",
        "minimum": "tl.minimum({}, {})",
        "maximum": "tl.maximum({}, {})",
        "where": "tl.where({}, {}, {})",
        "bits": "{}.to(tl.float32, bitcast=True)",
        "convert": "{}.to(tl.float32)",
    },
    TRITON_INTEGERS,
)

#: Triton in float64, for a rule's scalars.
TRITON_DOUBLE = TRITON._replace(
    operations=TRITON.operations
    | {"div": "{} / {}", "reciprocal": "1.0 / {}", "sqrt": "tl.sqrt({})", "rsqrt": "1.0 / tl.sqrt({})"}
)

"""The step as C++: the printed rule between the hand-written texts codebook.h and step.h."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from ...ops import codebook
from ...ops.step import GRAD_LIMIT, Modes, StepOp
from ...rules import Rule
from ..printer import (
    C_DOUBLE,
    C_INTEGERS,
    C_VECTOR,
    trace_cell,
    trace_round_bits,
    trace_rule,
    trace_trust_ratio,
    write,
)

TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.uint8: "uint8_t",
    torch.bfloat16: "at::BFloat16",
    torch.float16: "at::Half",
}


def _text(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _table(name: str, values: Sequence[float]) -> str:
    return f"  static constexpr float {name}[] = {{{', '.join(f'{v!r}f' for v in values)}}};"


def _register_tables(signed: bool) -> dict[str, list[float]]:
    """`codebook.SEGMENTS` indexed by exponent bits, for the AVX-512 form in codebook.h."""
    zero, *decades, one = segments = codebook.SEGMENTS[signed]
    slope, start = [0.0] * 16, [0.0] * 16
    for decade in decades:
        # cell = floor(a * slope + start), so the middle of a cell is at (cell + 1/2 - start) / slope,
        # here with t = 2*cell + 1; the unsigned form uses t = 2*(code + 1) + 1.
        ahead = 0 if signed else 1
        binade = int(math.log2(decade.last + ahead))  # of the cells; t is in the next one
        slope[binade] = 0.5 / decade.slope
        start[binade] = -(decade.start + ahead) / decade.slope
    start[one.last.bit_length() - 1 if signed else 8] = 1.0

    above, per_unit, first = [], [], []
    for index in range(32):  # the low 5 bits of the exponents of 2**-31 ... 2**0
        low = 2.0 ** (index - 31)
        segment = [s for s in segments if s.above < low][-1]
        within = [s.above for s in segments if low <= s.above < 2 * low]
        assert len(within) <= 1
        above.append(within[0] if within else torch.finfo(torch.float32).max)
        per_unit.append(segment.slope)
        # Cell 0 where the end is 9/4 of this less 1/2; see codebook.h.
        first.append(0.25 if segment is zero else segment.start)
    return dict(SLOPE=slope, START=start, ABOVE=above, PER_UNIT=per_unit, FIRST=first)


def _map(signed: bool) -> str:
    lines, (cell,) = write(trace_cell(signed), ["a"], C_VECTOR)
    tables = {"VALUES": codebook.create_dynamic_map(signed).tolist(), **_register_tables(signed)}
    return "\n".join(
        [
            "template <>",
            f"struct Map<{str(signed).lower()}> {{",
            *(_table(name, values) for name, values in tables.items()),
            "  static inline V cell(const V& a) {",
            *(f"    {line}" for line in lines),
            f"    return {cell};",
            "  }",
            "};",
        ]
    )


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def print_rule(rule: Rule) -> str:
    """The rule as the struct that step.h is written for."""
    hyper, states = rule.hyper._fields, len(rule.states)
    traced = trace_rule(rule)
    names = traced.scalar_names
    scalar_lines, scalars = write(traced.scalars, [*hyper, "step"], C_DOUBLE)
    arguments = ["param", "grad", *(f"state[{k}]" for k in range(states))]
    arguments += [f"s[{k}]" for k in range(len(names))]

    def function(graph: torch.fx.Graph, result: str) -> list[str]:
        lines, (value, *fresh) = write(graph, arguments, C_VECTOR)
        kept = [f"state[{k}] = {state};" for k, state in enumerate(fresh)]
        return _indented([*lines, f"{result} = {value};", *kept])

    signed = [str(state.signed).lower() for state in rule.states] or ["false"]
    return "\n".join(
        [
            "struct Rule {",
            f"  static constexpr int STATES = {states}, HYPER = {len(hyper)}, SCALARS = {len(names)};",
            f"  static constexpr int STEP_SIZE = {names.index('step_size')}, UNIT = {names.index('unit')};",
            f"  static constexpr bool SIGNED[] = {{{', '.join(signed)}}};",
            "  static inline void scalars(const double* hyper, double step, float* out) {",
            *_indented([f"const double {name} = hyper[{k}];" for k, name in enumerate(hyper)]),
            *_indented(scalar_lines),
            *_indented([f"out[{k}] = (float)({value});" for k, value in enumerate(scalars)]),
            "  }",
            "  static inline void update(V& param, const V& grad, V* state, const V* s) {",
            *function(traced.update, "param"),
            "  }",
            "  static inline V direction(const V& param, const V& grad, V* state, const V* s) {",
            *function(traced.direction, "const V direction"),
            "    return direction;",
            "  }",
            "};",
        ]
    )


def _print_modes(modes: Modes) -> str:
    lines, (ratio,) = write(trace_trust_ratio(), ["max_unorm", "param_norm", "update_norm"], C_DOUBLE)
    rounding, (rounded,) = write(trace_round_bits(), ["bits", "index", "step"], C_INTEGERS)
    flags = {**modes._asdict(), "two_phases": modes.two_phases}
    return "\n".join(
        [
            f"constexpr float GRAD_LIMIT = {GRAD_LIMIT!r}f;",
            *(f"constexpr bool {name.upper()} = {str(on).lower()};" for name, on in flags.items()),
            "inline double trust_ratio(double max_unorm, double param_norm, double update_norm) {",
            *_indented([*lines, f"return {ratio};"]),
            "}",
            "inline I round_bits(const I& bits, const I& index, const I& step) {",
            *_indented([*rounding, f"return {rounded};"]),
            "}",
        ]
    )


@functools.cache
def _body(op: StepOp, modes: Modes) -> str:
    maps = ["template <bool SIGNED>", "struct Map;", _map(True), _map(False)]
    return "\n".join(
        [
            _text("tensors.h"),
            *maps,
            _text("codebook.h"),
            print_rule(op.rule),
            _print_modes(modes),
            _text("step.h"),
        ]
    )


def state_arguments(op: StepOp, modes: Modes) -> dict[str, str]:
    """Names and C++ types of the arguments after the parameters: arenas, step, hyper, what modes bring."""
    return {
        **{name: f"{TYPES[dtype]}*" for name, dtype in op.arenas},
        "step": "float*",
        "hyper": "const double*",
        **({"grad_scale": "const float*"} if modes.scaled else {}),
        **({"max_unorm": "const float*"} if modes.trust else {}),
    }


def flat_strides(dims: Sequence[tuple[int, int]]) -> list[int]:
    """Sizes and strides as step.h reads them: their number, the sizes, the strides."""
    return [len(dims), *(n for n, _ in dims), *(s for _, s in dims)]


def kernel(
    op: StepOp,
    modes: Modes,
    name: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    arguments: str,
    rows: str,
) -> str:
    """Source of a kernel.

    Args:
        op: What it computes.
        modes: What it is compiled for.
        name: Of the function, and of the namespace of everything else.
        param_dtype: Dtype of the parameters.
        grad_dtype: Dtype of the gradients.
        arguments: C++ parameters before the arenas.
        rows: Statements that leave ``const Parameter* rows`` and ``int64_t count``.
    """
    arenas = [name for name, _ in op.arenas]
    declarations = [f"{type_} {argument}" for argument, type_ in state_arguments(op, modes).items()]
    scale, limit = "grad_scale" if modes.scaled else "nullptr", "max_unorm" if modes.trust else "nullptr"
    if op.bits == 8:
        storage = f"Blockwise arena{{{{{', '.join(arenas[::2])}}}, {{{', '.join(arenas[1::2])}}}}};"
    else:
        storage = f"Full arena{{{{{', '.join(arenas)}}}}};"
    return _function(
        name,
        _body(op, modes),
        f"{arguments}, {', '.join(declarations)}",
        f"""{rows}
  {storage}
  update_bucket<{TYPES[param_dtype]}, {TYPES[grad_dtype]}>(
      rows, count, arena, step, hyper, {scale}, {limit});""",
    )


def norms_kernel(name: str, dtype: torch.dtype, arguments: str, rows: str) -> str:
    """Source of the kernel of tensor_norms.

    Args:
        name: As of `kernel`.
        dtype: Dtype of the tensors.
        arguments: C++ parameters before the last, ``float* out``.
        rows: Statements that leave ``const Operand* rows`` and ``int64_t count``.
    """
    body = _text("tensors.h") + _text("norms.h")
    return _function(
        name, body, f"{arguments}, float* out", f"{rows}\n  norms<{TYPES[dtype]}>(rows, count, out);"
    )


def _function(name: str, parts: str, arguments: str, body: str) -> str:
    # The prefix brings ATen's vectors only where there are vector instructions.
    return f"""#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <tuple>
#include <utility>
#include <vector>
namespace {name}_parts {{
{parts}
}}
extern "C" void {name}({arguments}) {{
  using namespace {name}_parts;
  {body}
}}
"""

"""The step as C++: the printed rule and formats between the hand-written headers."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch

from ...formats import BLOCK, Slot
from ...formats.trace import trace_roots
from ...ops.operator import Modes, Options, StepOp, kernel_arguments
from ...ops.step import GRAD_LIMIT
from ...rules import NEAREST
from ...rules.trace import (
    trace_high_bits,
    trace_noise,
    trace_random_bits,
    trace_round_bits,
    trace_rule,
    trace_trust_ratio,
)
from .._inductor import pick_vec_isa
from ..dialects import C_DOUBLE, C_FAST, C_VECTOR
from ..printer import write
from . import formats, vectors
from .formats import TYPES, header


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def print_rule(op: StepOp) -> str:
    """The rule as the struct that step.h is written for."""
    rule, order = op.rule, formats.state_order(op)
    hyper, states = rule.hyper._fields, [state.name for state in rule.states]
    traced = trace_rule(rule)
    names = traced.scalar_names
    scalar_lines, scalars = write(traced.scalars, [*hyper, "step"], C_DOUBLE)

    # What is kept in full precision is computed in it.
    dialect = C_VECTOR

    def function(graph: torch.fx.Graph, result: str) -> list[str]:
        named = [f"const V {state} = state[{k}];" for state, k in zip(states, order)]
        named += [f"const V {name} = s[{k}];" for k, name in enumerate(names)]
        lines, (value, *fresh) = write(graph, ["param", "grad", *states, *names], dialect)
        kept = [f"state[{k}] = {state};" for k, state in zip(order, fresh)]
        return _indented([*named, *lines, f"{result} = {value};", *kept])

    measured = []
    if rule.means:
        alone = names[: len(names) - len(rule.measured)]
        measured += [f"const V {state} = state[{k}];" for state, k in zip(states, order)]
        measured += [f"const V {name} = s[{k}];" for k, name in enumerate(alone)]
        statements, numbers = write(traced.measure, ["param", "grad", *states, *alone], dialect)
        measured += [*statements, *(f"numbers[{k}] = {number};" for k, number in enumerate(numbers))]

    return "\n".join(
        [
            "struct Rule {",
            f"  static constexpr int STATES = {len(states)}, HYPER = {len(hyper)}, SCALARS = {len(names)};",
            f"  static constexpr int MEANS = {len(rule.means)};",
            f"  static constexpr int FIRST_MEASURED = {len(names) - len(rule.measured)};",
            f"  static constexpr int STEP_SIZE = {names.index('step_size')}, UNIT = {names.index('unit')};",
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
            "  static inline void measure(",
            "      const V& param, const V& grad, const V* state, const V* s, V* numbers) {",
            *_indented(measured),
            "  }",
            *_print_impulse(op, names),
            "};",
        ]
    )


def _print_impulse(op: StepOp, scalars: Sequence[str]) -> list[str]:
    """`impulse` for each format of a ratio that has one; the others are not asked for it."""
    lines = []
    for k, stored in enumerate(op.stored):
        graph = trace_rule(op.rule).impulses.get(stored.state)
        if stored.over is not None and graph is not None:
            named = [f"const V {name} = s[{j}];" for j, name in enumerate(scalars)]
            statements, (value,) = write(graph, ["lost", "root", *scalars], C_FAST)
            lines += [f"if constexpr (FORMAT == {k}) {{"]
            lines += _indented([*named, *statements, f"return {value};"])
            lines += ["}"]
    return [
        "  template <int FORMAT>",
        "  static inline V impulse(const V& lost, const V& root, const V* s) {",
        *_indented([*lines, "return V(0.f);"]),
        "  }",
    ]


def _print_modes(modes: Modes) -> str:
    lines, (ratio,) = write(trace_trust_ratio(), ["max_unorm", "param_norm", "update_norm"], C_DOUBLE)
    flags = {**modes._asdict(), "needs_totals": modes.needs_totals}
    return "\n".join(
        [
            f"constexpr float GRAD_LIMIT = {GRAD_LIMIT!r}f, NEAREST = {NEAREST!r}f;",
            *(f"constexpr bool {name.upper()} = {str(on).lower()};" for name, on in flags.items()),
            "inline double trust_ratio(double max_unorm, double param_norm, double update_norm) {",
            *_indented([*lines, f"return {ratio};"]),
            "}",
            *_print_inline("I", "random_bits", "I", ["index", "step"], trace_random_bits()),
            *_print_inline("I", "high_bits", "I", ["index", "step"], trace_high_bits()),
            *_print_inline("I", "round_bits", "I", ["bits", "random"], trace_round_bits()),
            *_print_inline("V", "noise_of", "I", ["random"], trace_noise()),
        ]
    )


def _print_inline(
    result: str, name: str, type_: str, arguments: Sequence[str], graph: torch.fx.Graph
) -> list[str]:
    """A function of vectors."""
    lines, (value,) = write(graph, arguments, C_FAST)
    declared = ", ".join(f"const {type_}& {argument}" for argument in arguments)
    return [f"inline {result} {name}({declared}) {{", *_indented([*lines, f"return {value};"]), "}"]


def _print_roots() -> list[str]:
    """What is over a state needs of it, as a struct."""
    lines, (root, per_root) = write(trace_roots(), ["over"], C_FAST)
    return [
        "struct Roots {",
        "  V root, per_root;",
        "  explicit inline Roots(const V& over) {",
        *_indented([*lines, f"root = {root}, per_root = {per_root};"]),
        "  }",
        "};",
    ]


@functools.cache
def _body(op: StepOp, modes: Modes) -> str:
    return "\n".join(
        [
            _tensors(),
            _print_modes(modes),
            *_print_roots(),
            *formats.definitions(op),
            print_rule(op),
            header("step.h"),
        ]
    )


def _tensors() -> str:
    return f"constexpr int BLOCK = {BLOCK};\n{vectors.text()}\n{header('tensors.h')}"


def state_arguments(op: StepOp, modes: Modes, measure: bool = False) -> dict[str, str]:
    """Names and C++ types of the arguments after the parameters; see `kernel`."""
    written = {arena.name for arena in op.arenas} | {"step", *Options.written()}
    arguments = {
        name: f"{'' if name in written else 'const '}{TYPES[dtype]}*"
        for name, dtype in kernel_arguments(op, modes).items()
    }
    if measure:
        for name in ("max_unorm", "unorm", "totals"):
            arguments.pop(name, None)
        arguments["found"] = "double*"
    return arguments


def flat_strides(dims: Sequence[tuple[int, int]]) -> list[int]:
    """Sizes and strides as tensors.h reads them: their number, the sizes, the strides."""
    return [len(dims), *(n for n, _ in dims), *(s for _, s in dims)]


def of_row(slot: Slot) -> tuple[int, int, int, int]:
    """The last fields of a `struct Parameter`."""
    return slot.row, slot.row_blocks, slot.stride, slot.first


WITHOUT_VECTORS = (
    "steps on this CPU are some 20 times slower than elsewhere: Inductor finds no instruction set such as "
    "AVX2, AVX-512 or NEON (see torch.backends.cpu.get_cpu_capability())"
)


@functools.cache
def _warn_without_vectors() -> None:
    if not pick_vec_isa():
        warnings.warn(WITHOUT_VECTORS, stacklevel=2)


def kernel(
    op: StepOp,
    modes: Modes,
    name: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    arguments: str,
    rows: str,
    measure: bool = False,
) -> str:
    """Source of a kernel.

    Args:
        op: What it computes.
        modes: What it is compiled for.
        name: Of the function, and of the namespace of everything else.
        param_dtype: Dtype of the parameters.
        grad_dtype: Dtype of the gradients.
        arguments: C++ parameters before those of `state_arguments`.
        rows: Statements that leave ``const Parameter* rows``, ``int64_t count``, and the number of
            ``elements`` and ``blocks`` of the arenas, unless these are arguments.
        measure: Whether it is the kernel of the measure operator, which writes ``found``.
    """
    _warn_without_vectors()
    given = state_arguments(op, modes, measure)
    declarations = [f"{type_} {argument}" for argument, type_ in given.items()]
    options = ", ".join(name if name in given else "nullptr" for name in Options.dtypes())
    dtypes = f"{TYPES[param_dtype]}, {TYPES[grad_dtype]}"
    call = f"update_bucket<{dtypes}>(\n      rows, count, storage, step, hyper, {options});"
    if measure:
        scale = "grad_scale" if "grad_scale" in given else "nullptr"
        call = f"""const auto whole = measure_bucket<{dtypes}>(rows, count, storage, step, hyper, {scale});
  for (int64_t k = 0; k < count; k++) whole[k].write(found + k * whole[k].COLUMNS);"""
    return _function(
        name,
        _body(op, modes),
        ", ".join(filter(None, [arguments, *declarations])),
        f"""{rows}
  {formats.storage(op, op.compensated(modes, param_dtype))}
  {call}""",
    )


def norms_kernel(name: str, dtype: torch.dtype, arguments: str, rows: str) -> str:
    """Source of the kernel of tensor_norms.

    Args:
        name: As of `kernel`.
        dtype: Dtype of the tensors.
        arguments: C++ parameters before the last, ``float* out``.
        rows: Statements that leave ``const Operand* rows`` and ``int64_t count``.
    """
    return _function(
        name,
        _tensors() + header("norms.h"),
        f"{arguments}, float* out",
        f"{rows}\n  norms<{TYPES[dtype]}>(rows, count, out);",
    )


def _function(name: str, parts: str, arguments: str, body: str) -> str:
    # The prefix brings ATen's vectors only where there are vector instructions.
    return f"""#include <torch/csrc/inductor/cpp_prefix.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <cstring>
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

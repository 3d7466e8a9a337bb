"""The step as Triton: what a rule and its formats bring, printed around the programs of kernels.py.

An eager step and a graph run the same kernels: a small one that advances `step` and computes the rule's
scalars for each parameter in float64 (and, in a graph, writes the addresses of parameters and gradients into
a table), and one that updates everything. Where a parameter's update depends on all of its elements, by a
trust ratio or something that a format shares in a whole parameter, two more come between: one that computes
the update and keeps only what there is to know of it, and one that adds up what its programs found. No source
depends on the number of parameters, but for the arguments of those that write addresses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...formats import BLOCK, Stored
from ...ops.operator import Modes, StepOp, kernel_arguments
from ...rules.trace import trace_noise, trace_random_bits, trace_round_bits, trace_rule, trace_trust_ratio
from ..dialects import TRITON, TRITON_DOUBLE
from ..printer import write
from .formats import arena_rows, print_formats, tables
from .text import LANGUAGE, call, function, tuple_of

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}

TILE = 8  # most blocks of 256 elements for a program of 4 warps: 16 elements for a thread
WARPS = 4
#: Whether a * b + c is rounded once, of which Triton 3.10 will decide otherwise than those before.
FUSED = True
#: How an eager launch compiles a kernel; Inductor's wrapper has the same.
COMPILE = {"num_warps": WARPS, "enable_fp_fusion": FUSED}
MOST_ADDRESSES = 1500  # arguments of one kernel; CUDA allows 32 KB of them
PREPARE = 128  # parameters for a program of the first kernel
SUM_BLOCKS = 32  # of 256 elements, for a program of the first stage of tensor_norms
NUMBERS = 256  # arguments of numbers_kernel
NO_NUMBER = 2**62  # in the place of 0, which would be passed as 32 bits and so need another kernel

IMPORTS = """\
import triton
import triton.language as tl
from bnb_compile.lowering.triton.device import div, reciprocal, rsqrt, sqrt
from bnb_compile.lowering.triton.dynamic_map import encode_fast
from bnb_compile.lowering.triton.kernels import (
    block_maxima, finish_program, flat, grouped, groups_of, load_codes, load_nibbles, measure_program,
    norms_program, prepare_program, store_nibbles, sums_program, total_program, update_program,
)
"""


def has_fast_instructions(device: torch.device) -> bool:
    """Whether a device runs NVIDIA's PTX."""
    return device.type == "cuda" and torch.version.hip is None


class Variant(NamedTuple):
    """What a step kernel is specialised for.

    Attributes:
        aligned: Whether all tensors are contiguous, begin at multiples of 16 bytes and have multiples of 8
            elements, so that every access is a vector.
        dims: Dimensions of the strides table; 0 if all tensors are contiguous.
        long: Whether a parameter has 2**31 elements or more, so that places need 64 bits.
        fast: Whether NVIDIA's approximate instructions are used.
    """

    aligned: bool
    dims: int
    long: bool
    fast: bool

    @property
    def constants(self) -> dict[str, object]:
        """The arguments of a program that say it."""
        index = "tl.int64" if self.long else "tl.int32"
        return {"ALIGNED": self.aligned, "DIMS": self.dims, "INDEX": index}


# What a rule brings.


def print_rule(op: StepOp, fast: bool) -> str:
    """The rule's update and its direction; what is not called costs nothing."""
    traced = trace_rule(op.rule)
    states, names = [state.name for state in op.rule.states], traced.scalar_names
    unpack = [f"{name} = states[{k}]" for k, name in enumerate(states)]
    unpack += [f"{name} = s[{k}]" for k, name in enumerate(names)]
    flag = f"FAST: tl.constexpr = {fast}"

    def printed(name: str, arguments: list[str], graph: torch.fx.Graph, before: Sequence[str] = ()) -> str:
        lines, (result, *fresh) = write(graph, ["param", "grad", *states, *names], TRITON)
        body = [flag, *unpack, *before, *lines, f"return {result}, {tuple_of(fresh)}"]
        return function(name, arguments, body)

    alone = names[: len(names) - len(op.rule.measured)]
    statements, numbers = write(traced.measure, ["param", "grad", *states, *alone], TRITON)
    measured = [flag, *unpack, *statements]
    measured += [
        f"tl.store(row + {k}, tl.sum(tl.where(used, {number}, 0.0)))" for k, number in enumerate(numbers)
    ]
    measured.append("return")
    trust = ["if ratio is not None:", "    step_size = step_size * ratio"]
    return "\n".join(
        [
            printed("update", ["param", "grad", "states", "s", "ratio"], traced.update, trust),
            printed("direction", ["param", "grad", "states", "s"], traced.direction),
            function(
                "load_scalars",
                ["scalars", "k", "measured"],
                [f"row = scalars + k * {len(alone)}"]
                + [f"{name} = tl.load(row + {j})" for j, name in enumerate(alone)]
                + [
                    line
                    for j, name in enumerate(names[len(alone) :])
                    for line in (
                        f"{name} = 0.0",
                        "if measured is not None:",
                        f"    {name} = tl.load(measured + {1 + op.maxima + j})",
                    )
                ]
                + [f"return {tuple_of(names)}"],
            ),
            function("numbers_of", ["row", "param", "grad", "states", "s", "used"], measured)
            if op.rule.means
            else "",
            function(
                "keep",
                ["used", "fresh", "old"],
                [f"return {tuple_of(f'tl.where(used, fresh[{k}], old[{k}])' for k in range(len(states)))}"],
            ),
        ]
    )


@functools.cache
def _print_random() -> str:
    """Random bits, and what is made of them."""
    texts = []
    for name, arguments, graph in (
        ("random_bits", ["index", "step"], trace_random_bits()),
        ("round_bits", ["bits", "random"], trace_round_bits()),
        ("noise_of", ["random"], trace_noise()),
    ):
        lines, (result,) = write(graph, arguments, TRITON)
        texts.append(function(name, arguments, [*lines, f"return ({result},)"]))
    return "\n".join(texts)


def _print_compensate(op: StepOp, compensated: Sequence[Stored], fast: bool) -> str:
    """``(param, lost, s) -> param``, with what is lost of each such state and the root that it is over."""
    names = trace_rule(op.rule).scalar_names
    lines = [f"FAST: tl.constexpr = {fast}", *(f"{name} = s[{k}]" for k, name in enumerate(names))]
    for k, stored in enumerate(compensated):
        graph = trace_rule(op.rule).impulses[stored.state]
        statements, (value,) = write(graph, [f"lost[{2 * k}]", f"lost[{2 * k + 1}]", *names], TRITON)
        lines += [*statements, f"param = param - step_size * {value}"]
    return function("compensate", ["param", "lost", "s"], [*lines, "return param"])


# Entries: what is launched.


def blocks_of(op: StepOp) -> int:
    """Blocks that a program takes: half as many where states in full precision fill the registers."""
    widest = max((part.dtype.itemsize for s in op.stored for part in s.format.of_elements), default=1)
    return TILE // 2 if widest == 4 else TILE


def scalars_of(op: StepOp) -> int:
    """Columns of `scalars`: those that are known beforehand."""
    return len(trace_rule(op.rule).scalar_names) - len(op.rule.measured)


def measured_columns(op: StepOp) -> int:
    """Columns of `measured`: the trust ratio, what must be known of the states, and the rule's."""
    return 1 + op.maxima + len(op.rule.measured)


def step_arguments(op: StepOp, modes: Modes, variant: Variant, measure: bool = False) -> list[str]:
    """Names of the arguments of `step_kernel`, or of `measure_kernel`, all pointers."""
    arguments = ["addresses", "rows", "owner"]
    arguments += ["strides"] if variant.dims else []
    arguments += [row.name for row in arena_rows(op)]
    arguments += tables(op)
    arguments += ["scalars"]
    arguments += ["grad_scale"] if modes.grad_scale else []
    arguments += ["step"] if (modes.stochastic_round or op.random) and not measure else []
    if measure:
        arguments.append("found")
    elif modes.needs_totals:
        arguments.append("measured")
    return arguments


def _step_entry(
    op: StepOp,
    modes: Modes,
    name: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    variant: Variant,
    measure: bool,
    **own: object,
) -> str:
    """A kernel that calls `update_program` or `measure_program`."""
    arguments = step_arguments(op, modes, variant, measure)
    fast = variant.fast and op.shared_in_blocks  # what is kept in full precision is computed in it
    compensated = () if measure else op.compensated(modes, param_dtype)

    def given(argument: str) -> str:
        return argument if argument in arguments else "None"

    calls = call(
        "measure_program" if measure else "update_program",
        k="k",
        grad_address="grad_address",
        addresses="addresses",
        rows="rows",
        strides=given("strides"),
        arenas=tuple_of([*(row.name for row in arena_rows(op)), *tables(op)]),
        scalars="scalars",
        scale="scale",
        PARAM=LANGUAGE[param_dtype],
        GRAD=LANGUAGE[grad_dtype],
        TILE=blocks_of(op),
        **variant.constants,
        SKIP_ZEROS=modes.skip_zeros,
        ROWS=modes.rows,
        MAXIMA=op.maxima,
        MEANS=len(op.rule.means),
        load_scalars="load_scalars",
        load_states="load_states",
        keep="keep",
        **own,
    )
    scale = ["scale = None"]
    if modes.grad_scale:
        scale = ["scale = tl.load(grad_scale + k)", "if (scale - scale) != 0:  # not finite", "    return"]
    body = [
        "k = tl.load(owner + tl.program_id(0)).to(tl.int64)",
        "grad_address = tl.load(addresses + 2 * k + 1)",
        "if grad_address == 0:",
        "    return",
        *scale,
        calls,
    ]
    return "\n".join(
        [
            print_rule(op, fast),
            _print_random() if op.random or modes.stochastic_round else "",
            print_formats(op, modes, fast, compensated),
            _print_compensate(op, compensated, fast) if compensated else "",
            function(name, arguments, body),
        ]
    )


def step_kernel(
    op: StepOp, modes: Modes, name: str, param_dtype: torch.dtype, grad_dtype: torch.dtype, variant: Variant
) -> str:
    """Source of the kernel that updates a bucket."""
    own = dict(
        step="step" if modes.stochastic_round or op.random else None,
        measured="measured" if modes.needs_totals else None,
        MAX_UNORM=modes.max_unorm,
        BLOCK_WISE=modes.block_wise,
        update="update",
        store_states="store_states",
        random_bits="random_bits" if modes.stochastic_round or op.random else None,
        round_bits="round_bits" if modes.stochastic_round else None,
        compensate="compensate" if op.compensated(modes, param_dtype) else None,
    )
    return _step_entry(op, modes, name, param_dtype, grad_dtype, variant, measure=False, **own)


def measure_kernel(
    op: StepOp,
    modes: Modes,
    name: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    variant: Variant,
    base: int,
) -> str:
    """Source of the kernel that finds out what a step must know of whole parameters.

    `found` has a row for each program, this launch's from row `base` on.
    """
    own = dict(
        found="found",
        FIRST=base,
        numbers_of="numbers_of" if op.rule.means else None,
        direction="direction",
        store_maxima="store_maxima",
    )
    return _step_entry(op, modes, name, param_dtype, grad_dtype, variant, measure=True, **own)


def finish_arguments(modes: Modes) -> list[str]:
    """Names of the arguments of `finish_kernel`, all pointers."""
    options = [name for name in ("grad_scale", "max_unorm") if getattr(modes, name)]
    options += ["unorm"] if modes.max_unorm else []
    found = ["totals"] if modes.totals else ["found", "spans"]
    return ["addresses", *found, "scalars", *options, "measured"]


def finish_kernel(op: StepOp, modes: Modes, name: str) -> str:
    """Source of the kernel that adds up what was found of one parameter, in a program of its own."""
    names = trace_rule(op.rule).scalar_names
    arguments = ["limit", "param_norm", "update_norm"]
    lines, (ratio,) = write(trace_trust_ratio(), arguments, TRITON_DOUBLE)
    calls = call(
        "finish_program",
        addresses="addresses",
        grad_scale="grad_scale" if modes.grad_scale else None,
        found="totals" if modes.totals else "found",
        spans=None if modes.totals else "spans",
        scalars="scalars",
        max_unorm="max_unorm" if modes.max_unorm else None,
        unorm="unorm" if modes.max_unorm else None,
        measured="measured",
        MAXIMA=op.maxima,
        MEANS=len(op.rule.means),
        SCALARS=len(names) - len(op.rule.measured),
        UNIT=names.index("unit"),
        trust_ratio="trust_ratio",
    )
    return "\n".join(
        [
            function("trust_ratio", arguments, [*lines, f"return ({ratio},)"]),
            function(name, finish_arguments(modes), [calls]),
        ]
    )


def total_arguments(modes: Modes) -> list[str]:
    """Names of the arguments of `total_kernel`, all pointers."""
    return ["addresses", *(["grad_scale"] if modes.grad_scale else []), "found", "spans", "totals"]


def total_kernel(op: StepOp, modes: Modes, name: str) -> str:
    """Source of the kernel that ends the measure operator, with a program for each parameter."""
    grad_scale = "grad_scale" if modes.grad_scale else None
    body = f"total_program(addresses, {grad_scale}, found, spans, totals, {op.sums}, {op.maxima})"
    return function(name, total_arguments(modes), [body])


def prepare_arguments(modes: Modes) -> list[str]:
    """Names of the last arguments of the prepare kernel, all pointers."""
    return ["present", "step", "hyper", "scalars", *(["grad_scale"] if modes.grad_scale else [])]


def prepare_kernel(
    op: StepOp,
    modes: Modes,
    name: str,
    tensors: Sequence[tuple[str, int]] = (),
    present_stride: int = 1,
    advance: bool = True,
) -> str:
    """Source of the kernel that computes the scalars of each parameter.

    Args:
        op: The step operator.
        modes: What it is compiled for.
        name: Of the kernel.
        tensors: See `addresses_kernel`; those arguments come before the others.
        present_stride: Distance of the parameters' entries in `present`, which is not 0 where a parameter
            has a gradient.
        advance: Whether `step` advances; otherwise the scalars are of the step that comes.
    """
    hyper = op.rule.hyper._fields
    lines, results = write(trace_rule(op.rule).scalars, [*hyper, "t"], TRITON_DOUBLE)
    loads = [
        f"{field} = tl.load(hyper + k * {len(hyper)} + {j}, there, 0.0)" for j, field in enumerate(hyper)
    ]
    stores = [
        # A scalar that depends on nothing, such as SGD's `keep`, is printed as a number.
        f"tl.store(scalars + k * {len(results)} + {j}, (tl.zeros_like(t) + {value}).to(tl.float32), there)"
        for j, value in enumerate(results)
    ]
    calls = call(
        "prepare_program",
        present="present",
        step="step",
        hyper="hyper",
        scalars="scalars",
        grad_scale="grad_scale" if modes.grad_scale else None,
        count="count",
        PREPARE=PREPARE,
        STRIDE=present_stride,
        ADVANCE=advance,
        write_scalars="write_scalars",
    )
    arguments = [*(a for a, _ in tensors), *(["addresses"] if tensors else []), *prepare_arguments(modes)]
    return "\n".join(
        [
            function(
                "write_scalars", ["hyper", "scalars", "k", "t", "there"], [*loads, *lines, *stores, "return"]
            ),
            function(name, [*arguments, "count"], [*_write_addresses(tensors), calls]),
        ]
    )


def addresses_kernel(name: str, tensors: Sequence[tuple[str, int]]) -> str:
    """Source of a kernel that writes the addresses of its arguments into a table.

    So a graph needs no copy from the host: the addresses are arguments, which it keeps.

    Args:
        name: Of the kernel.
        tensors: Each argument, and the entry of `addresses`, the last argument, that it is written to.
    """
    return function(name, [*(a for a, _ in tensors), "addresses"], _write_addresses(tensors))


def _write_addresses(tensors: Sequence[tuple[str, int]]) -> list[str]:
    stores = [f"    tl.store(addresses + {place}, {a}.to(tl.int64))" for a, place in tensors]
    return ["if tl.program_id(0) == 0:", *stores] if tensors else []


def numbers_kernel(name: str) -> str:
    """Source of a kernel that writes `count` of its NUMBERS first arguments to `addresses`, from `first` on.

    They are numbers, and nothing is compiled for their values, so that one kernel serves any tensors.
    """
    numbers = [f"n{k}" for k in range(NUMBERS)]
    stores = []
    for k, n in enumerate(numbers):
        stores += [
            f"if {k} < count:",
            f"    tl.store(addresses + first + {k}, tl.where({n} == {NO_NUMBER}, 0, {n}))",
        ]
    kernel = function(name, [*numbers, "addresses", "first", "count"], stores)
    plain = f"@triton.jit(do_not_specialize={[*numbers, 'first', 'count']!r})"
    return kernel.replace("@triton.jit", plain)


def sums_arguments(variant: Variant) -> list[str]:
    """Names of the arguments of `sums_kernel`, all pointers."""
    return ["addresses", "rows", "owner", *(["strides"] if variant.dims else []), "sums"]


def sums_kernel(name: str, dtype: torch.dtype, variant: Variant, base: int) -> str:
    """Source of the first stage of tensor_norms: sums of parts of tensors, from entry `base` of `sums` on."""
    calls = call(
        "sums_program",
        addresses="addresses",
        rows="rows",
        owner="owner",
        strides="strides" if variant.dims else None,
        sums="sums",
        FIRST=base,
        DTYPE=LANGUAGE[dtype],
        ELEMENTS=SUM_BLOCKS * BLOCK,
        **variant.constants,
    )
    return function(name, sums_arguments(variant), [calls])


def norms_kernel(name: str) -> str:
    """Source of the second stage of tensor_norms."""
    return function(name, ["sums", "spans", "out"], ["norms_program(sums, spans, out)"])


def argument_dtypes(op: StepOp, modes: Modes) -> dict[str, torch.dtype]:
    """Dtypes of all arguments that the step's kernels can have."""
    tensors = kernel_arguments(op, modes)
    return {
        **tensors,
        **{row.name: row.dtype for row in arena_rows(op)},
        **dict.fromkeys(tables(op), torch.float32),
        **dict.fromkeys(("addresses", "rows", "strides", "spans", "present"), torch.int64),
        "owner": torch.int32,
        **dict.fromkeys(("scalars", "found", "measured"), torch.float32),
        "totals": torch.float64,
    }

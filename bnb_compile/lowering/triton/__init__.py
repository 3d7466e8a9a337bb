"""The step as Triton: two kernels for a bucket of any number of parameters.

The first, small, advances `step`, computes the rule's scalars for each parameter in float64, and, in a graph,
writes the addresses of parameters and gradients into a table. The second does the work: a program finds its
parameter in the table. Its source and its compile time do not depend on the number of parameters, and an
eager step and a graph run the same one.

Where a parameter's update depends on all of its elements, by a trust ratio or a scale for the whole
parameter, two more come between: one that computes the update and keeps only what there is to know of it, and
one that adds up what its programs found.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...ops.arena import BLOCK
from ...ops.step import GRAD_LIMIT, Modes, StepOp
from ..printer import (
    TRITON,
    TRITON_DOUBLE,
    TRITON_INTEGERS,
    trace_cell,
    trace_round_bits,
    trace_rule,
    trace_trust_ratio,
    write,
)

TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
_LANGUAGE = {torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16"}

TILE = 8  # blocks of 256 elements for a program of 4 warps: 16 elements for a thread
WARPS = 4
MOST_ADDRESSES = 1500  # arguments of one kernel; CUDA allows 32 KB of them
PREPARE = 128  # parameters for a program of the first kernel

IMPORTS = """\
import triton
import triton.language as tl
from bnb_compile.lowering.triton.device import div, encode_fast, sqrt
"""


def has_fast_instructions(device: torch.device) -> bool:
    """Whether a device runs NVIDIA's PTX."""
    return device.type == "cuda" and torch.version.hip is None


def _function(name: str, arguments: Sequence[str], lines: Sequence[str], results: Sequence[str]) -> str:
    # A tuple whatever the number of results.
    body = "\n".join(f"    {line}" for line in (*lines, f"return ({', '.join(results)},)"))
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{body}\n"


@functools.cache
def print_rule(op: StepOp) -> str:
    """The rule's update and its direction as Triton functions; what is not called costs nothing."""
    traced = trace_rule(op.rule)
    arguments = ["param", "grad", *(s.name for s in op.rule.states)]
    arguments += [f"s{k}" for k in range(len(traced.scalar_names))]
    return "\n".join(
        _function(name, [*arguments, "FAST: tl.constexpr"], *write(graph, arguments, TRITON))
        for name, graph in (("update", traced.update), ("direction", traced.direction))
    )


@functools.cache
def _print_encode() -> str:
    """The portable encoder: the cells of both maps, and the code as int32."""
    text = []
    for signed in (True, False):
        text.append(_function(f"cell_{signed}", ["a"], *write(trace_cell(signed), ["a"], TRITON)))
    text.append(
        """\
@triton.jit
def encode(x, SIGNED: tl.constexpr, FAST: tl.constexpr):
    if FAST:
        return encode_fast(x, SIGNED)
    if SIGNED:
        cell = cell_True(tl.abs(x))[0].to(tl.int32)
        # The map has 1.0 but no -1.0: cell 128 of a negative value is code 0.
        return tl.where(x < 0, tl.maximum(127 - cell, 0), 127 + cell)
    return cell_False(x)[0].to(tl.int32)
"""
    )
    return "\n".join(text)


def _load_state(op: StepOp, k: int) -> str:
    name = op.rule.states[k].name
    if op.bits == 32:
        return f"old_{name} = tl.load({name} + offset + i, inside, 0.0)\n"
    return f"""\
code = tl.load({name}_codes + offset + i, inside, {127 if op.rule.states[k].signed else 0}).to(tl.int32)
value = tl.gather(tl.load({name}_values + tl.arange(0, 256)), tl.reshape(code, [TILE * {BLOCK}]), 0)
old_{name} = tl.reshape(value, [TILE, {BLOCK}]) * tl.load({name}_absmax + block + b, whole, 0.0)[:, None]
"""


def _magnitude(op: StepOp, k: int) -> str:
    state = op.rule.states[k]
    return f"tl.abs(new_{state.name})" if state.signed else f"new_{state.name}"


def _store_state(op: StepOp, modes: Modes, k: int) -> str:
    state = op.rule.states[k]
    name = state.name
    if op.bits == 32:
        return f"tl.store({name} + offset + i, new_{name}, inside)\n"
    blocks, elements = "whole", "inside"
    if modes.skip_zeros and modes.block_wise:
        blocks, elements = "whole & touched", "inside & touched[:, None]"
    absmax = f"tl.max({_magnitude(op, k)}, 1)"
    if not modes.block_wise:
        absmax = f"tl.load(measured + k * {measured_columns(op)} + {1 + k}) + tl.zeros([TILE], tl.float32)"
    return f"""\
absmax = {absmax}
absmax = tl.where(absmax < {torch.finfo(torch.float32).tiny!r}, 0.0, absmax)
tl.store({name}_absmax + block + b, absmax, {blocks})
code = encode(new_{name} * tl.where(absmax > 0, 1.0 / absmax, 0.0)[:, None], {state.signed}, FAST)
tl.store({name}_codes + offset + i, code.to(tl.uint8), {elements})
"""


@functools.cache
def _print_round_bits() -> str:
    arguments = ["bits", "index", "step"]
    return _function("round_bits", arguments, *write(trace_round_bits(), arguments, TRITON_INTEGERS))


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


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


def _place(tensor: int, dims: int) -> str:
    """Statements for the places of a program's elements; tensor 0 is the parameter, 1 its gradient."""
    if dims == 0:
        return "place = i"
    lines = [
        f"strides_row = strides + (k * 2 + {tensor}) * {2 * dims}",
        "left = i",
        "place = tl.zeros_like(i)",
    ]
    for d in reversed(range(dims)):
        lines += [
            f"size = tl.load(strides_row + {d}).to(i.dtype)",
            f"place += left % size * tl.load(strides_row + {dims + d}).to(i.dtype)",
            "left = left // size",
        ]
    return "\n".join(lines)


def measured_columns(op: StepOp) -> int:
    """Columns of `measured`: the trust ratio, and the largest magnitude of each state."""
    return 1 + len(op.rule.states)


def step_arguments(
    op: StepOp, modes: Modes, variant: Variant, measure: bool = False
) -> dict[str, torch.dtype]:
    """Names and dtypes of the arguments of `step_kernel`, or of `measure_kernel`, all pointers."""
    arguments = {"addresses": torch.int64, "rows": torch.int64, "owner": torch.int32}
    if variant.dims:
        arguments["strides"] = torch.int64
    arguments.update(op.arenas)
    if op.bits == 8:
        arguments.update({f"{state.name}_values": torch.float32 for state in op.rule.states})
    arguments["shared"] = torch.float32
    if modes.scaled:
        arguments["grad_scale"] = torch.float32
    if modes.stochastic:
        arguments["step"] = torch.float32
    if measure:
        arguments["found"] = torch.float32
    elif modes.two_phases:
        arguments["measured"] = torch.float32
    return arguments


def _load_all(
    op: StepOp, modes: Modes, param_dtype: torch.dtype, grad_dtype: torch.dtype, variant: Variant
) -> str:
    """Statements that a step and its measuring begin with: everything of a program's elements."""
    names = trace_rule(op.rule).scalar_names
    shared = "".join(f"s{k} = tl.load(shared + k * {len(names)} + {k})\n" for k in range(len(names)))
    index = "tl.int64" if variant.long else "tl.int32"
    if variant.aligned:
        inside = "i // 8 < numel // 8"
        pointers = ("param_pointer", "grad_pointer")
        hint = "\n".join(f"{pointer} = tl.multiple_of({pointer}, 16)" for pointer in pointers)
    else:
        inside, hint = "i < numel", ""
    scale = scaled = ""
    if modes.scaled:
        scale = "scale = tl.load(grad_scale + k)\nif (scale - scale) != 0:  # not finite\n    return\n"
        scaled = "grad = grad * scale"
    used = f"usable = {'(grad != 0) & ' if modes.skip_zeros else ''}(tl.abs(grad) < {GRAD_LIMIT!r})"
    return f"""\
pid = tl.program_id(0)
k = tl.load(owner + pid).to(tl.int64)
grad_address = tl.load(addresses + 2 * k + 1)
if grad_address == 0:
    return
{scale}
param_pointer = tl.load(addresses + 2 * k).to(tl.pointer_type({_LANGUAGE[param_dtype]}))
grad_pointer = grad_address.to(tl.pointer_type({_LANGUAGE[grad_dtype]}))
{hint}
numel = tl.load(rows + 4 * k).to({index})
offset = tl.multiple_of(tl.load(rows + 4 * k + 1), 16)
block = tl.load(rows + 4 * k + 2)
b = (pid - tl.load(rows + 4 * k + 3)).to({index}) * TILE + tl.arange(0, TILE)
i = b[:, None] * {BLOCK} + tl.max_contiguous(tl.arange(0, {BLOCK}), 8)[None, :]
whole = b * {BLOCK} < numel
inside = {inside}
{shared}
{_place(1, variant.dims)}
grad = tl.load(grad_pointer + place, inside, float("nan")).to(tl.float32)  # not usable past the end
{scaled}
{used}
{_place(0, variant.dims)}
old_param = tl.load(param_pointer + place, inside, 0.0).to(tl.float32)
{"".join(_load_state(op, k) for k in range(len(op.rule.states)))}
"""


def _call_rule(op: StepOp, function: str, result: str) -> str:
    """Statement that computes `result` and the new states."""
    states = [state.name for state in op.rule.states]
    scalars = [f"s{k}" for k in range(len(trace_rule(op.rule).scalar_names))]
    arguments = ["old_param", "grad", *(f"old_{s}" for s in states), *scalars, "FAST"]
    return f"{result}, {''.join(f'new_{s}, ' for s in states)}= {function}({', '.join(arguments)})"


def _keep_unusable(op: StepOp) -> str:
    names = [state.name for state in op.rule.states]
    return "".join(f"new_{s} = tl.where(usable, new_{s}, old_{s})\n" for s in names)


def _whole_kernel(
    op: StepOp, name: str, variant: Variant, arguments: dict[str, torch.dtype], body: str
) -> str:
    return "\n".join(
        [
            f"TILE = tl.constexpr({TILE})\nFAST = tl.constexpr({variant.fast and op.bits == 8})\n",
            print_rule(op),
            _print_encode() if op.bits == 8 else "",
            _print_round_bits() if "step" in arguments else "",
            f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{_indented(body)}",
        ]
    )


def step_kernel(
    op: StepOp, modes: Modes, name: str, param_dtype: torch.dtype, grad_dtype: torch.dtype, variant: Variant
) -> str:
    """Source of the kernel that updates a bucket.

    How it is parallelised: a program takes TILE blocks of 256 elements of one parameter, a warp one or more
    whole blocks, so that a block's maximum is a reduction inside a warp.

    Its arguments, with n parameters in the bucket:

        addresses   (n, 2) int64, of the parameter and its gradient, which is 0 where there is none
        rows        (n, 4) int64: elements, first element and first block in the arenas, first program
        owner       (programs,) int32, the parameter of each program
        strides     (n, 2, 2, dims) int64: sizes and strides of the parameter and of its gradient
        arenas, values of the maps, and shared, (n, scalars) float32
        grad_scale  (n,) float32
        step        (n,) float32
        measured    (n, measured_columns(op)) float32, from `finish_kernel`
    """
    step_size = trace_rule(op.rule).scalar_names.index("step_size")
    trust = f"s{step_size} *= tl.load(measured + k * {measured_columns(op)})" if modes.trust else ""
    rounding = """\
bits = param.to(tl.int32, bitcast=True)
(bits,) = round_bits(bits, (offset + i).to(tl.int32), tl.load(step + k).to(tl.int32))
param = bits.to(tl.float32, bitcast=True)
"""
    # Encoding a block anew may change it, so one without any gradient is left alone.
    touched = "touched = tl.max(usable.to(tl.int32), 1) > 0" if modes.skip_zeros else ""
    body = f"""\
{_load_all(op, modes, param_dtype, grad_dtype, variant)}
{touched}
{trust}
{_call_rule(op, "update", "param")}
{rounding if modes.stochastic else ""}
param = tl.where(usable, param, old_param)
{_keep_unusable(op)}
tl.store(param_pointer + place, param.to({_LANGUAGE[param_dtype]}), inside)
{"".join(_store_state(op, modes, k) for k in range(len(op.rule.states)))}
"""
    return _whole_kernel(op, name, variant, step_arguments(op, modes, variant), body)


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

    Its arguments are those of `step_kernel`, but for the last: `found` is float32 with a row for each
    program, this launch's from row `base` on: sums of the squares of the direction and of the parameter, and
    the largest magnitude of each state.
    """
    row = f"found + ({base} + pid) * {1 + measured_columns(op)}"
    maxima = "".join(
        f"tl.store({row} + {2 + k}, tl.max({_magnitude(op, k)}))\n" for k in range(len(op.rule.states))
    )
    body = f"""\
{_load_all(op, modes, param_dtype, grad_dtype, variant)}
{_call_rule(op, "direction", "moved")}
moved = tl.where(usable, moved, 0.0)
{_keep_unusable(op)}
tl.store({row}, tl.sum(moved * moved))
tl.store({row} + 1, tl.sum(old_param * old_param))
{maxima}
"""
    return _whole_kernel(op, name, variant, step_arguments(op, modes, variant, measure=True), body)


def finish_arguments(modes: Modes) -> dict[str, torch.dtype]:
    """Names and dtypes of the arguments of `finish_kernel`, all pointers."""
    arguments = {"found": torch.float32, "spans": torch.int64, "shared": torch.float32}
    return {**arguments, **({"max_unorm": torch.float32} if modes.trust else {}), "measured": torch.float32}


def finish_kernel(op: StepOp, modes: Modes, name: str) -> str:
    """Source of the kernel that adds up what was found of one parameter, in a program of its own.

    `spans` is (n, 2) int64: the rows of `found` that are a parameter's.
    """
    states, columns = range(len(op.rule.states)), 1 + measured_columns(op)
    names = trace_rule(op.rule).scalar_names
    lines, (ratio,) = write(trace_trust_ratio(), ["limit", "param_norm", "update_norm"], TRITON_DOUBLE)
    trust = f"""\
limit = tl.load(max_unorm + k).to(tl.float64)
param_norm = tl.sqrt(tl.sum(param))
update_norm = tl.sqrt(tl.sum(update)) * tl.load(shared + k * {len(names)} + {names.index("unit")})
{chr(10).join(lines)}
tl.store(measured + k * {measured_columns(op)}, ({ratio}).to(tl.float32))
"""
    starts = "".join(f"absmax_{j} = tl.zeros([1024], tl.float32)\n" for j in states)
    gathers = "".join(
        f"    absmax_{j} = tl.maximum(absmax_{j}, tl.load(row + {2 + j}, there, 0.0))\n" for j in states
    )
    stores = "".join(
        f"tl.store(measured + k * {measured_columns(op)} + {1 + j}, tl.max(absmax_{j}))\n" for j in states
    )
    body = f"""\
k = tl.program_id(0).to(tl.int64)
first = tl.load(spans + 2 * k)
last = tl.load(spans + 2 * k + 1)
lane = tl.arange(0, 1024)
update = tl.zeros([1024], tl.float64)
param = tl.zeros([1024], tl.float64)
{starts}
while first < last:
    row = found + (first + lane) * {columns}
    there = first + lane < last
    update += tl.load(row, there, 0.0)
    param += tl.load(row + 1, there, 0.0)
{gathers}
    first += 1024
{trust if modes.trust else ""}
{stores}
"""
    return f"@triton.jit\ndef {name}({', '.join(finish_arguments(modes))}):\n{_indented(body)}"


def prepare_arguments(modes: Modes) -> dict[str, torch.dtype]:
    """Names and dtypes of the last arguments of the prepare kernel, all pointers."""
    return {
        "present": torch.int64,
        "step": torch.float32,
        "hyper": torch.float64,
        "shared": torch.float32,
        **({"grad_scale": torch.float32} if modes.scaled else {}),
    }


def prepare_kernel(
    op: StepOp,
    modes: Modes,
    name: str,
    tensors: Sequence[tuple[str, int]] = (),
    present_stride: int = 1,
) -> str:
    """Source of the kernel that advances `step` and computes the scalars of each parameter.

    A program takes PREPARE of the `count` parameters.

    Args:
        op: The step operator.
        modes: What it is compiled for.
        name: Of the kernel.
        tensors: See `addresses_kernel`; those arguments come before the others.
        present_stride: Distance of the parameters' entries in `present`, which is not 0 where a parameter
            has a gradient.
    """
    hyper = op.rule.hyper._fields
    traced = trace_rule(op.rule)
    lines, results = write(traced.scalars, [*hyper, "t"], TRITON_DOUBLE)
    loads = "".join(
        f"{field} = tl.load(hyper + k * {len(hyper)} + {j}, there, 0.0)\n" for j, field in enumerate(hyper)
    )
    stores = "".join(
        f"tl.store(shared + k * {len(results)} + {j}, {_as_float(value)}, there)\n"
        for j, value in enumerate(results)
    )
    body = f"""\
pid = tl.program_id(0)
{_write_addresses(tensors)}
k = pid * {PREPARE} + tl.arange(0, {PREPARE})
there = k < count
advance = tl.load(present + k * {present_stride}, there, 0) != 0
{"scale = tl.load(grad_scale + k, there, 0.0)" if modes.scaled else ""}
{"advance = advance & (scale - scale == 0)" if modes.scaled else ""}
steps = tl.load(step + k, there, 0.0) + advance.to(tl.float32)
tl.store(step + k, steps, there)
t = tl.maximum(steps, 1.0).to(tl.float64)
{loads}
{chr(10).join(lines)}
{stores}
"""
    arguments = [a for a, _ in tensors] + ["addresses"] * bool(tensors) + [*prepare_arguments(modes), "count"]
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{_indented(body)}"


def _as_float(value: str) -> str:
    # A scalar that depends on nothing, such as SGD's `keep`, is printed as a number.
    return value if value.replace(".", "").isdigit() else f"({value}).to(tl.float32)"


def addresses_kernel(name: str, tensors: Sequence[tuple[str, int]]) -> str:
    """Source of a kernel that writes the addresses of its arguments into a table.

    So a graph needs no copy from the host: the addresses are arguments, which it keeps.

    Args:
        name: Of the kernel.
        tensors: Each argument, and the entry of `addresses`, the last argument, that it is written to.
    """
    arguments = [*(a for a, _ in tensors), "addresses"]
    body = f"pid = tl.program_id(0)\n{_write_addresses(tensors)}"
    return f"@triton.jit\ndef {name}({', '.join(arguments)}):\n{_indented(body)}"


NUMBERS = 256  # arguments of number_kernel
NO_NUMBER = 2**62  # in the place of 0, which would be passed as 32 bits and so need another kernel


def numbers_kernel(name: str) -> str:
    """Source of a kernel that writes `count` of its NUMBERS first arguments to `addresses`, from `first` on.

    They are numbers, and nothing is compiled for their values, so that one kernel serves any tensors.
    """
    numbers = [f"n{k}" for k in range(NUMBERS)]
    stores = "\n".join(
        f"if {k} < count:\n    tl.store(addresses + first + {k}, tl.where({n} == {NO_NUMBER}, 0, {n}))"
        for k, n in enumerate(numbers)
    )
    arguments = [*numbers, "addresses", "first", "count"]
    return (
        f"@triton.jit(do_not_specialize={[*numbers, 'first', 'count']!r})\n"
        f"def {name}({', '.join(arguments)}):\n{_indented(stores)}"
    )


def _write_addresses(tensors: Sequence[tuple[str, int]]) -> str:
    stores = "".join(f"    tl.store(addresses + {place}, {a}.to(tl.int64))\n" for a, place in tensors)
    return f"if pid == 0:\n{stores}" if tensors else ""


SUM_BLOCKS = 32  # of 256 elements, for a program of the first stage of tensor_norms


def sums_kernel(name: str, dtype: torch.dtype, variant: Variant, base: int) -> str:
    """Source of the first stage of tensor_norms: a program sums the squares of SUM_BLOCKS blocks.

    `addresses`, `rows`, `owner` and `strides` are as for a step, a tensor in the place of a parameter; `sums`
    is float32, and the sum of this launch's first program goes to its entry `base`.
    """
    index = "tl.int64" if variant.long else "tl.int32"
    body = f"""\
pid = tl.program_id(0)
k = tl.load(owner + pid).to(tl.int64)
pointer = tl.load(addresses + 2 * k).to(tl.pointer_type({_LANGUAGE[dtype]}))
{"pointer = tl.multiple_of(pointer, 16)" if variant.aligned else ""}
numel = tl.load(rows + 4 * k).to({index})
first = (pid - tl.load(rows + 4 * k + 3)).to({index}) * {SUM_BLOCKS * BLOCK}
i = first + tl.max_contiguous(tl.arange(0, {SUM_BLOCKS * BLOCK}), 8)
inside = {"i // 8 < numel // 8" if variant.aligned else "i < numel"}
{_place(0, variant.dims)}
x = tl.load(pointer + place, inside, 0.0).to(tl.float32)
tl.store(sums + {base} + pid, tl.sum(x * x))
"""
    return f"@triton.jit\ndef {name}({', '.join(sums_arguments(variant))}):\n{_indented(body)}"


def sums_arguments(variant: Variant) -> dict[str, torch.dtype]:
    """Names and dtypes of the arguments of `sums_kernel`, all pointers."""
    arguments = {"addresses": torch.int64, "rows": torch.int64, "owner": torch.int32}
    if variant.dims:
        arguments["strides"] = torch.int64
    return {**arguments, "sums": torch.float32}


def norms_kernel(name: str) -> str:
    """Source of the second stage of tensor_norms: a program adds the sums of one tensor, in their order.

    `spans` is (n, 2) int64: where a tensor's sums begin and end.
    """
    body = """\
k = tl.program_id(0)
first = tl.load(spans + 2 * k)
last = tl.load(spans + 2 * k + 1)
total = tl.zeros([1024], tl.float32)
lane = tl.arange(0, 1024)
while first < last:
    total += tl.load(sums + first + lane, first + lane < last, 0.0)
    first += 1024
tl.store(out + k, tl.sqrt_rn(tl.sum(total)))
"""
    return f"@triton.jit\ndef {name}(sums, spans, out):\n{_indented(body)}"

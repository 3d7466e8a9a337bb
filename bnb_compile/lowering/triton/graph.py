"""The step on a GPU in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...ops.arena import layout
from ...ops.blockwise import dynamic_map
from ...ops.step import Arguments, StepOp
from .. import _inductor, triton
from .._inductor import DeviceProperties, V
from ..node import AbstractKernelNode, AbstractStepNode, empty, static_numel
from ..printer import trace_rule
from .plan import Launch, plan, spans


def lower_triton_step(op: StepOp, a: Arguments) -> None:
    """Lower a step operator: a few launches whatever the number of parameters."""
    device, n = a.params[0].get_device(), len(a.params)
    launches = _plan(a.params, a.grads, device)
    written = [
        empty([n, 2], torch.int64, device),
        empty([n, len(trace_rule(op.rule).scalar_names)], torch.float32, device),
    ]
    constants = [torch.tensor([int(grad is not None) for grad in a.grads])]
    if a.modes(op).two_phases:
        programs, columns = sum(len(launch.owner) for launch in launches), triton.measured_columns(op)
        written += [empty([max(programs, 1), 1 + columns], torch.float32, device)]
        written += [empty([n, columns], torch.float32, device)]
        constants.append(spans(launches, n))
    for launch in launches:
        constants += launch.tables
    maps = []
    if op.bits == 8:
        maps = [dynamic_map(kind.signed, torch.device("cpu")).values for kind in op.rule.states]
    read = [_inductor.constant(x, device) for x in (*constants, *maps)]
    TritonStepNode(op, a, written, read, launches)


def lower_triton_norms(xs: Sequence[Any], out: Any) -> None:
    """Lower tensor_norms: the addresses, sums of squares of parts of all tensors, and their norms."""
    device = xs[0].get_device()
    launches = _plan(xs, xs, device, triton.SUM_BLOCKS)
    programs = sum(len(launch.owner) for launch in launches)
    written = [
        empty([len(xs), 2], torch.int64, device),
        empty([max(programs, 1)], torch.float32, device),
        out,
    ]
    tables = [spans(launches, len(xs)), *(t for launch in launches for t in launch.tables)]
    read = [_inductor.constant(t, device) for t in tables]
    TritonNormsNode(xs, written, read, launches)


def _plan(
    params: Sequence[Any], grads: Sequence[Any], device: torch.device, blocks: int = triton.TILE
) -> list[Launch]:
    sizes = [p.get_size() for p in params]
    strides = [(p.get_stride(), (p if g is None else g).get_stride()) for p, g in zip(params, grads)]
    return plan(
        layout(static_numel(size) for size in sizes),
        sizes,
        strides,
        [_is_aligned(p) and (g is None or _is_aligned(g)) for p, g in zip(params, grads)],
        [g is not None for g in grads],
        triton.has_fast_instructions(device),
        blocks,
    )


def _is_aligned(x: Any) -> bool:
    offset = x.get_layout().offset * x.get_dtype().itemsize
    return V.graph.sizevars.statically_known_multiple_of(offset, 16) and (
        x.get_name() not in V.graph.unaligned_buffers
    )


class TritonStepNode(AbstractStepNode):
    """The launches of a bucket."""

    def __init__(self, *args: Any) -> None:
        *rest, self.launches = args
        super().__init__(*rest)

    def codegen(self, wrapper: Any) -> None:
        """Print the kernels and their calls."""
        op, modes, n = self.op, self.modes, len(self.params)
        *arenas, step = self.state
        addresses, shared, *phases = self.written
        hyper, *others = self.read
        scale = [others.pop(0)] if modes.scaled else []
        limit = [others.pop(0)] if modes.trust else []
        counted = [step] if modes.stochastic else []
        present, *others = others
        bounds = [others.pop(0)] if modes.two_phases else []
        maps = [others.pop() for _ in op.rule.states][::-1] if op.bits == 8 else []
        tables = [[others.pop(0) for _ in launch.tables] for launch in self.launches]

        places = [(f"p{k}", 2 * k) for k in range(n)]
        places += [(f"g{k}", 2 * k + 1) for k, grad in enumerate(self.grads) if grad is not None]
        operands = list(zip(places, [*self.params, *self.present]))
        own, later = operands[: triton.MOST_ADDRESSES], operands[triton.MOST_ADDRESSES :]
        _write_addresses(wrapper, later, addresses)

        def name(part: str) -> str:
            return f"triton_{op.name}{part}_{wrapper.next_kernel_suffix()}"

        prepare = name("_prepare")
        _call(
            wrapper,
            prepare,
            triton.prepare_kernel(op, modes, prepare, [place for place, _ in own]),
            {a: x.get_dtype() for (a, _), x in own},
            {"addresses": torch.int64, **triton.prepare_arguments(modes)},
            [*(x for _, x in own), addresses, present, step, hyper, shared, *scale],
            programs=-(-n // triton.PREPARE),
            count=n,
        )
        dtypes = self.param_dtype, self.grad_dtype
        if modes.two_phases:
            found, measured = phases
            base = 0
            for launch, own_tables in zip(self.launches, tables):
                measure = name("_measure")
                _call(
                    wrapper,
                    measure,
                    triton.measure_kernel(op, modes, measure, *dtypes, launch.variant, base),
                    {},
                    triton.step_arguments(op, modes, launch.variant, measure=True),
                    [addresses, *own_tables, *arenas, *maps, shared, *scale, *counted, found],
                    programs=len(launch.owner),
                )
                base += len(launch.owner)
            finish = name("_finish")
            _call(
                wrapper,
                finish,
                triton.finish_kernel(op, modes, finish),
                {},
                triton.finish_arguments(modes),
                [found, *bounds, shared, *limit, measured],
                programs=n,
            )
        for launch, own_tables in zip(self.launches, tables):
            update = name("")
            _call(
                wrapper,
                update,
                triton.step_kernel(op, modes, update, *dtypes, launch.variant),
                {},
                triton.step_arguments(op, modes, launch.variant),
                [addresses, *own_tables, *arenas, *maps, shared, *scale, *counted, *phases[1:]],
                programs=len(launch.owner),
            )


class TritonNormsNode(AbstractKernelNode):
    """The launches of tensor_norms."""

    def __init__(
        self, xs: Sequence[Any], written: Sequence[Any], read: Sequence[Any], launches: list[Launch]
    ) -> None:
        self.xs, self.written, self.read = self.real(xs), self.real(written), self.real(read)
        self.launches = launches
        super().__init__([*self.xs, *self.written, *self.read], written)

    def codegen(self, wrapper: Any) -> None:
        """Print the kernels and their calls."""
        addresses, sums, out = self.written
        spans, *tables = self.read
        _write_addresses(wrapper, [((f"x{k}", 2 * k), x) for k, x in enumerate(self.xs)], addresses)
        rest, base = iter(tables), 0
        for launch in self.launches:
            name = f"triton_tensor_sums_{wrapper.next_kernel_suffix()}"
            _call(
                wrapper,
                name,
                triton.sums_kernel(name, self.xs[0].get_dtype(), launch.variant, base),
                {},
                triton.sums_arguments(launch.variant),
                [addresses, *(next(rest) for _ in launch.tables), sums],
                programs=len(launch.owner),
            )
            base += len(launch.owner)
        name = f"triton_tensor_norms_{wrapper.next_kernel_suffix()}"
        own = {"sums": torch.float32, "spans": torch.int64, "out": torch.float32}
        _call(wrapper, name, triton.norms_kernel(name), {}, own, [sums, spans, out], programs=len(self.xs))


def _write_addresses(wrapper: Any, operands: Sequence[tuple[tuple[str, int], Any]], addresses: Any) -> None:
    """Call kernels that write the addresses of tensors, given with their argument's name and their entry."""
    for first in range(0, len(operands), triton.MOST_ADDRESSES):
        chunk = operands[first : first + triton.MOST_ADDRESSES]
        name = f"triton_addresses_{wrapper.next_kernel_suffix()}"
        _call(
            wrapper,
            name,
            triton.addresses_kernel(name, [place for place, _ in chunk]),
            {a: x.get_dtype() for (a, _), x in chunk},
            {"addresses": torch.int64},
            [*(x for _, x in chunk), addresses],
        )


def _call(
    wrapper: Any,
    name: str,
    kernel: str,
    tensors: dict[str, torch.dtype],
    own: dict[str, torch.dtype],
    inputs: Sequence[Any],
    programs: int = 1,
    count: int | None = None,
) -> None:
    """Define a kernel and call it, as Inductor does for a user's own Triton kernel.

    Args:
        wrapper: Inductor's.
        name: Of the kernel.
        kernel: Its source.
        tensors: Arguments of which only the address is taken.
        own: The other arguments, which are allocations and so begin at multiples of 16 bytes.
        inputs: What is passed for all of them.
        programs: How many are launched.
        count: Passed as the last argument, where the kernel has it.
    """
    device = inputs[0].get_device()
    arguments = tensors | own
    signature = {a: f"*{triton.TYPES[dtype]}" for a, dtype in arguments.items()}
    numbers = [] if count is None else [count]
    if numbers:
        signature["count"] = "i32"
    triton_meta = dict(
        signature=signature,
        device=DeviceProperties.create(device),
        constants={},
        configs=[{(k,): [["tt.divisibility", 16]] for k in range(len(tensors), len(arguments))}],
    )
    grid = ["_grid_0", "_grid_1", "_grid_2"]
    inductor_meta = dict(grid_type="FixedGrid", fixed_grid=grid, extra_launcher_args=grid, kernel_name=name)
    head = f"@triton.jit\ndef {name}("
    before, _, after = kernel.partition(head)
    source = f"""
{triton.IMPORTS}
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties

{before}{_decorator(triton_meta, inductor_meta)}{head}{after}
"""
    wrapper.define_kernel(
        name,
        f"async_compile.triton({name!r}, '''{source}''', device_str={device.type!r})",
        None,
        gpu=True,
    )
    launch = [*numbers, programs, 1, 1]
    wrapper.generate_kernel_call(
        name,
        [*(x.codegen_reference() for x in inputs), *launch],
        arg_types=[*(x.get_dtype() for x in inputs), *[int] * len(launch)],
        raw_args=[*inputs, *launch],
        raw_keys=[*signature, "", "", ""],
        triton_meta=triton_meta,
        inductor_meta=inductor_meta,
        triton=True,
        device=device,
    )


def _decorator(triton_meta: dict[str, Any], inductor_meta: dict[str, Any]) -> str:
    config = {"num_warps": triton.WARPS, "num_stages": 1}
    return (
        f"@triton_heuristics.user_autotune(configs=[{config!r}], inductor_meta={inductor_meta!r}, "
        f"triton_meta={triton_meta!r}, filename=__file__, custom_kernel=True)\n"
    )

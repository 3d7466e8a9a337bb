"""The step and the norms on a GPU in a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ...formats import layout
from ...ops.operator import Arguments, StepOp
from .. import _inductor, wrapper
from .._inductor import V, lowerings
from ..node import AbstractKernelNode, AbstractStepNode, empty, static
from . import formats, source
from .plan import Launch, plan, spans


def lower_step(op: StepOp, a: Arguments) -> None:
    """Lower a step operator: a few launches whatever the number of parameters."""
    modes, written = op.modes(a.options), {}
    if modes.needs_totals:
        size = [len(a.params), source.measured_columns(op)]
        written["measured"] = empty(size, torch.float32, a.step.get_device())
    _lower(TritonStepNode, op, a, written, modes.two_phases)


def lower_measure(op: StepOp, a: Arguments, totals: Any) -> None:
    """Lower a measure operator, which writes `totals`."""
    _lower(TritonMeasureNode, op, a, {"totals": totals}, measures=True)


def _lower(
    node: type[TritonStepNode], op: StepOp, a: Arguments, written: dict[str, Any], measures: bool
) -> None:
    """Make a node, with the tables of its launches.

    Args:
        node: Its class.
        op: The step operator.
        a: The arguments.
        written: What its kernels write besides the arguments.
        measures: Whether they find out something of whole parameters.
    """
    device, n = a.params[0].get_device(), len(a.params)
    launches = _plan(a.params, a.grads, device, source.blocks_of(op), a.options.geometry)
    scalars = source.scalars_of(op)
    scratch = {
        "addresses": empty([n, 2], torch.int64, device),
        "scalars": empty([n, scalars], torch.float32, device),
        **written,
    }
    constants = {"present": torch.tensor([int(grad is not None) for grad in a.grads])}
    if measures:
        programs = sum(launch.programs for launch in launches)
        scratch["found"] = empty([max(programs, 1), op.columns], torch.float32, device)
        constants["spans"] = spans(launches, n)
    constants |= formats.tables(op)
    constants |= {
        _of_launch(k, name): x for k, launch in enumerate(launches) for name, x in launch.tables.items()
    }
    arenas = {arena.name: x for arena, x in zip(op.arenas, a.arenas)}
    select = lowerings[torch.ops.aten.select.int]
    rows = {row.name: select(arenas[row.arena], 0, row.number) for row in formats.arena_rows(op)}
    constant = {name: _inductor.constant(x, device) for name, x in constants.items()}
    node(op, a, scratch, constant | rows, launches)


def _of_launch(k: int, table: str) -> str:
    return f"{table} of launch {k}"


def _plan(
    params: Sequence[Any],
    grads: Sequence[Any],
    device: torch.device,
    blocks: int,
    geometry: Sequence[int] | None = None,
) -> list[Launch]:
    sizes = [static(p.get_size()) for p in params]
    strides = [
        (static(p.get_stride()), static((p if g is None else g).get_stride())) for p, g in zip(params, grads)
    ]
    return plan(
        layout(map(math.prod, sizes), geometry),
        sizes,
        strides,
        [_is_aligned(p) and (g is None or _is_aligned(g)) for p, g in zip(params, grads)],
        [g is not None for g in grads],
        source.has_fast_instructions(device),
        blocks,
    )


def _is_aligned(x: Any) -> bool:
    offset = x.get_layout().offset * x.get_dtype().itemsize
    return V.graph.sizevars.statically_known_multiple_of(offset, 16) and (
        x.get_name() not in V.graph.unaligned_buffers
    )


class TritonStepNode(AbstractStepNode):
    """The launches of a bucket."""

    measure = False

    def __init__(
        self,
        op: StepOp,
        a: Arguments,
        scratch: dict[str, Any],
        constants: dict[str, Any],
        launches: list[Launch],
    ) -> None:
        self.launches = launches
        super().__init__(op, a, scratch, constants)

    def codegen(self, code: Any) -> None:
        """See `AbstractKernelNode`."""
        op, modes, n = self.op, self.modes, len(self.params)
        operands = {(f"p{k}", 2 * k): x for k, x in enumerate(self.params)}
        operands |= {(f"g{k}", 2 * k + 1): x for k, x in enumerate(self.grads) if x is not None}
        first = dict(list(operands.items())[: source.MOST_ADDRESSES])
        later = {place: x for place, x in operands.items() if place not in first}
        _write_addresses(code, later, self.tensors["addresses"])

        def call(part: str, text: Any, arguments: Sequence[str], launch: int = -1, **options: Any) -> None:
            name = f"triton_{op.name}{part}_{code.next_kernel_suffix()}"
            own = (
                {a: self.tensors[_of_launch(launch, a)] for a in self.launches[launch].tables}
                if launch >= 0
                else {}
            )
            pointers = {argument: (self.tensors | own)[argument] for argument in arguments}
            _call(code, name, text(name), options.pop("before", {}) | pointers, **options)

        tensors = {argument: x for (argument, _), x in first.items()}
        call(
            "_prepare",
            lambda name: source.prepare_kernel(op, modes, name, list(first), advance=not self.measure),
            ["addresses", *source.prepare_arguments(modes)],
            before=tensors,
            unaligned=list(tensors),
            programs=-(-n // source.PREPARE),
            count=n,
        )
        dtypes = self.param_dtype, self.grad_dtype
        if self.measure or modes.two_phases:
            base = 0
            for k, launch in enumerate(self.launches):

                def measure(name: str, variant: Any = launch.variant, base: int = base) -> str:
                    return source.measure_kernel(op, modes, name, *dtypes, variant, base)

                arguments = source.step_arguments(op, modes, launch.variant, measure=True)
                call("_measure", measure, arguments, k, programs=launch.programs)
                base += launch.programs
        if self.measure:
            arguments = source.total_arguments(modes)
            call("_total", lambda name: source.total_kernel(op, modes, name), arguments, programs=n)
            return
        if modes.needs_totals:
            arguments = source.finish_arguments(modes)
            call("_finish", lambda name: source.finish_kernel(op, modes, name), arguments, programs=n)
        for k, launch in enumerate(self.launches):

            def update(name: str, variant: Any = launch.variant) -> str:
                return source.step_kernel(op, modes, name, *dtypes, variant)

            call("", update, source.step_arguments(op, modes, launch.variant), k, programs=launch.programs)


class TritonMeasureNode(TritonStepNode):
    """The launches that find out what a step must know of whole parameters, written to ``totals``."""

    measure = True

    def written(self, a: Arguments, scratch: dict[str, Any]) -> list[Any]:
        """See `AbstractStepNode`."""
        return list(scratch.values())


def lower_norms(xs: Sequence[Any], out: Any) -> None:
    """Lower tensor_norms: the addresses, sums of squares of parts of all tensors, and their norms."""
    device = xs[0].get_device()
    launches = _plan(xs, xs, device, source.SUM_BLOCKS)
    programs = sum(launch.programs for launch in launches)
    written = {
        "addresses": empty([len(xs), 2], torch.int64, device),
        "sums": empty([max(programs, 1)], torch.float32, device),
        "out": out,
    }
    tables = {"spans": spans(launches, len(xs))}
    tables |= {
        _of_launch(k, name): x for k, launch in enumerate(launches) for name, x in launch.tables.items()
    }
    TritonNormsNode(
        xs, written, {name: _inductor.constant(x, device) for name, x in tables.items()}, launches
    )


class TritonNormsNode(AbstractKernelNode):
    """The launches of tensor_norms."""

    def __init__(
        self, xs: Sequence[Any], written: dict[str, Any], tables: dict[str, Any], launches: list[Launch]
    ) -> None:
        others = {**written, **tables}
        self.xs, self.tensors = self.real(xs), dict(zip(others, self.real(list(others.values()))))
        self.launches = launches
        super().__init__([*self.xs, *self.tensors.values()], list(written.values()))

    def codegen(self, code: Any) -> None:
        """See `AbstractKernelNode`."""
        operands = {(f"x{k}", 2 * k): x for k, x in enumerate(self.xs)}
        _write_addresses(code, operands, self.tensors["addresses"])
        base = 0
        for k, launch in enumerate(self.launches):
            name = f"triton_tensor_sums_{code.next_kernel_suffix()}"
            text = source.sums_kernel(name, self.xs[0].get_dtype(), launch.variant, base)
            own = {table: self.tensors[_of_launch(k, table)] for table in launch.tables}
            pointers = {a: (self.tensors | own)[a] for a in source.sums_arguments(launch.variant)}
            _call(code, name, text, pointers, programs=launch.programs)
            base += launch.programs
        name = f"triton_tensor_norms_{code.next_kernel_suffix()}"
        pointers = {argument: self.tensors[argument] for argument in ("sums", "spans", "out")}
        _call(code, name, source.norms_kernel(name), pointers, programs=len(self.xs))


def _write_addresses(code: Any, operands: dict[tuple[str, int], Any], addresses: Any) -> None:
    """Call kernels that write the addresses of tensors, given with their argument's name and their entry."""
    places = list(operands)
    for first in range(0, len(places), source.MOST_ADDRESSES):
        chunk = places[first : first + source.MOST_ADDRESSES]
        name = f"triton_addresses_{code.next_kernel_suffix()}"
        tensors = {argument: operands[argument, entry] for argument, entry in chunk}
        pointers = {**tensors, "addresses": addresses}
        _call(code, name, source.addresses_kernel(name, chunk), pointers, unaligned=list(tensors))


def _call(code: Any, name: str, text: str, pointers: dict[str, Any], **options: Any) -> None:
    text = source.IMPORTS + text
    wrapper.call_triton(code, name, text, pointers, source.TYPES, source.WARPS, source.FUSED, **options)

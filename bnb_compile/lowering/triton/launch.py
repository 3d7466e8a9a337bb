"""The step on a GPU outside a graph: the kernels of graph.py with the addresses in a table on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.arena import layout
from ...ops.blockwise import dynamic_map
from ...ops.step import Arguments, Modes, StepOp
from .. import triton
from .._inductor import PyCodeCache
from ..printer import trace_rule
from .plan import Launch, plan, spans


def _load(source: str, name: str) -> Any:
    return getattr(PyCodeCache.load(triton.IMPORTS + source), name)


@functools.cache
def _kernel(print_kernel: Callable[..., str], *args: Any) -> Any:
    """A step or measure kernel."""
    op, modes, *rest = args
    return _load(print_kernel(op, modes, "kernel", *rest), "kernel")


@functools.cache
def _prepare_kernel(op: StepOp, modes: Modes) -> Any:
    return _load(triton.prepare_kernel(op, modes, "prepare_kernel", present_stride=2), "prepare_kernel")


@functools.cache
def _numbers_kernel() -> Any:
    return _load(triton.numbers_kernel("numbers_kernel"), "numbers_kernel")


class TritonStep:
    """The compiled step of one bucket on a GPU.

    Two launches, or three if the bucket has tensors whose accesses cannot all be vectors; where a step must
    first know whole parameters, two or three more. Nothing synchronises; while the tensors stay where they
    are, nothing is copied to the device either.

    Args:
        op: The step operator that it replaces.
        params: The bucket's parameters.
        arenas: Their states.
        step: ``(n,)`` float32.
        hyper: ``(n, h)`` float64.
        options: The operator's keyword arguments.
    """

    def __init__(
        self,
        op: StepOp,
        params: list[Tensor],
        arenas: list[Tensor],
        step: Tensor,
        hyper: Tensor,
        **options: Any,
    ) -> None:
        self.op, self.params, self.arenas = op, params, arenas
        self.step, self.hyper = step, hyper
        arguments = Arguments(params, [], arenas, step, hyper, **options)
        self.modes = arguments.modes(op)
        self.scale = [arguments.grad_scale] if self.modes.scaled else []
        self.limit = [arguments.max_unorm] if self.modes.trust else []
        self.device = step.device
        self.places = layout(param.numel() for param in params)
        self.addresses = torch.zeros(len(params), 2, dtype=torch.int64, device=self.device)
        self.shared = torch.empty(
            len(params), len(trace_rule(op.rule).scalar_names), dtype=torch.float32, device=self.device
        )
        self.maps = []
        if op.bits == 8:
            self.maps = [dynamic_map(kind.signed, self.device).values for kind in op.rule.states]
        self._uploaded: list[int] = []
        self._captured: list[Any] = []  # tables of launches that a CUDA graph has captured
        self._planned: Any = None  # what the launches depend on
        self._launches: list[tuple[Launch, list[Tensor]]] = []
        self._phases: tuple[Tensor, ...] = ()  # spans, and what the measuring kernels find

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        """Update the parameters that have a gradient; all gradients have one dtype."""
        dtypes = {grad.dtype for grad in grads if grad is not None}
        if not dtypes:
            return
        (grad_dtype,) = dtypes
        self._plan(grads)
        self._upload(grads)
        n, op, modes = len(self.params), self.op, self.modes
        _prepare_kernel(op, modes)[(-(-n // triton.PREPARE),)](
            self.addresses[:, 1], self.step, self.hyper, self.shared, *self.scale, n
        )
        common = [*self.arenas, *self.maps, self.shared, *self.scale]
        common += [self.step] if modes.stochastic else []
        kind = self.params[0].dtype, grad_dtype
        measured = []
        if modes.two_phases:
            spans, found, of_param = self._phases
            measured, base = [of_param], 0
            for launch, tables in self._launches:
                kernel = _kernel(triton.measure_kernel, op, modes, *kind, launch.variant, base)
                kernel[(len(launch.owner),)](self.addresses, *tables, *common, found, num_warps=triton.WARPS)
                base += len(launch.owner)
            _kernel(triton.finish_kernel, op, modes)[(n,)](found, spans, self.shared, *self.limit, *measured)
        for launch, tables in self._launches:
            kernel = _kernel(triton.step_kernel, op, modes, *kind, launch.variant)
            kernel[(len(launch.owner),)](self.addresses, *tables, *common, *measured, num_warps=triton.WARPS)
        torch.autograd.graph.increment_version(self.params)

    def _upload(self, grads: Sequence[Tensor | None]) -> None:
        """Bring the addresses to the device, where they have changed."""
        addresses = []
        for param, grad in zip(self.params, grads):
            # An empty tensor has no address, but it has a gradient.
            addresses += [param.data_ptr(), 0 if grad is None else grad.data_ptr() or 1]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The graph writes them itself, at every replay: a copy would be from host memory that has changed
            # by then. What it reads must outlive it, and what it leaves is not known here.
            self._write(addresses)
            self._captured += [self._launches, self._phases]
            return
        if addresses == self._uploaded and not self._captured:
            return
        if not self._uploaded:
            self._write(addresses[: triton.NUMBERS])  # loads the kernel, which a capture could not do
        pinned = self.device.type == "cuda"
        host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=pinned).view(-1, 2)
        self.addresses.copy_(host, non_blocking=True)
        self._uploaded = addresses

    def _write(self, addresses: list[int]) -> None:
        """Write addresses by a kernel whose arguments they are."""
        for first in range(0, len(addresses), triton.NUMBERS):
            numbers = [address or triton.NO_NUMBER for address in addresses[first : first + triton.NUMBERS]]
            # The address 1 stands for that of an empty tensor and is never followed.
            numbers = [triton.NO_NUMBER - 1 if n == 1 else n for n in numbers]
            padding = [triton.NO_NUMBER] * (triton.NUMBERS - len(numbers))
            _numbers_kernel()[(1,)](*numbers, *padding, self.addresses, first, len(numbers))

    def _plan(self, grads: Sequence[Tensor | None]) -> None:
        pairs = [(p, p if g is None else g) for p, g in zip(self.params, grads)]
        aligned = [(p.data_ptr() | g.data_ptr()) % 16 == 0 for p, g in pairs]
        strides = [
            None if p.is_contiguous() and g.is_contiguous() else (p.stride(), g.stride()) for p, g in pairs
        ]
        if (aligned, strides) == self._planned:
            return
        self._planned = aligned, strides
        launches = plan(
            self.places,
            [p.shape for p in self.params],
            [(p.stride(), g.stride()) for p, g in pairs],
            aligned,
            [True] * len(pairs),
            triton.has_fast_instructions(self.device),
        )
        self._launches = [(launch, [table.to(self.device) for table in launch.tables]) for launch in launches]
        if self.modes.two_phases:
            programs, columns = (
                sum(len(launch.owner) for launch in launches),
                triton.measured_columns(self.op),
            )
            self._phases = (
                spans(launches, len(pairs)).to(self.device),
                self.shared.new_empty(programs, 1 + columns),
                self.shared.new_empty(len(pairs), columns),
            )

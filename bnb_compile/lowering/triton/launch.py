"""The step on a GPU outside a graph: the kernels of graph.py with the addresses in a table on the device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.operator import Arguments, Modes, StepOp
from .._inductor import PyCodeCache
from ..launcher import AbstractLauncher, addresses
from . import formats, source
from .plan import Launch, plan, spans


def _load(text: str, name: str) -> Any:
    return getattr(PyCodeCache.load(source.IMPORTS + text), name)


@functools.cache
def _kernel(print_kernel: Callable[..., str], op: StepOp, modes: Modes, *args: Any, **options: Any) -> Any:
    return _load(print_kernel(op, modes, "kernel", *args, **options), "kernel")


@functools.cache
def _numbers_kernel() -> Any:
    return _load(source.numbers_kernel("numbers_kernel"), "numbers_kernel")


class Launcher(AbstractLauncher):
    """The compiled step of one bucket on a GPU.

    Two launches, or three if the bucket has tensors whose accesses cannot all be vectors; where a step must
    first know whole parameters, two or three more. Nothing synchronises; while the tensors stay where they
    are, nothing is copied to the device either.
    """

    def __init__(self, op: StepOp, a: Arguments) -> None:
        super().__init__(op, a)
        n, self.device = len(a.params), a.step.device
        self.places = a.places()
        self.addresses = torch.zeros(n, 2, dtype=torch.int64, device=self.device)
        scalars = source.scalars_of(op)
        self.tensors |= {
            "addresses": self.addresses,
            "present": self.addresses[:, 1],
            "scalars": torch.empty(n, scalars, dtype=torch.float32, device=self.device),
            **{row.name: self.tensors[row.arena][row.number] for row in formats.arena_rows(op)},
            **{name: table.to(self.device) for name, table in formats.tables(op).items()},
        }
        self._uploaded: list[int] = []
        self._captured: list[Any] = []  # tables of launches that a CUDA graph has captured
        self._planned: Any = None  # what the launches depend on
        self._launches: list[tuple[Launch, dict[str, Tensor]]] = []

    def load(self, dtype: torch.dtype) -> None:
        """See `AbstractLauncher`; what a launch needs depends on the gradients, and is compiled by it."""
        self._prepare_kernel(advance=True)
        if self.modes.totals:
            self._prepare_kernel(advance=False)

    def launch(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """See `AbstractLauncher`."""
        op, modes = self.op, self.modes
        self._begin(grads, advance=True)
        if modes.two_phases:
            self._measure(dtype)
        if modes.needs_totals:
            finish = _kernel(source.finish_kernel, op, modes)
            self._run(finish, len(self.params), source.finish_arguments(modes))
        for launch, tables in self._launches:
            update = _kernel(source.step_kernel, op, modes, self.params[0].dtype, dtype, launch.variant)
            self._run(update, launch.programs, source.step_arguments(op, modes, launch.variant), **tables)

    def measure(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """See `AbstractLauncher`."""
        op, modes, n = self.op, self.modes, len(self.params)
        self._begin(grads, advance=False)
        self._measure(dtype)
        totals = torch.empty(n, op.columns, dtype=torch.float64, device=self.device)
        self._run(_kernel(source.total_kernel, op, modes), n, source.total_arguments(modes), totals=totals)
        return totals

    def _prepare_kernel(self, advance: bool) -> Any:
        return _kernel(source.prepare_kernel, self.op, self.modes, present_stride=2, advance=advance)

    def _begin(self, grads: Sequence[Tensor | None], advance: bool) -> None:
        """Bring what has changed to the device, and compute the scalars there."""
        self._plan(grads)
        self._upload(grads)
        n, arguments = len(self.params), source.prepare_arguments(self.modes)
        self._run(self._prepare_kernel(advance), -(-n // source.PREPARE), arguments, n)

    def _measure(self, dtype: torch.dtype) -> None:
        base, op, modes = 0, self.op, self.modes
        for launch, tables in self._launches:
            dtypes = self.params[0].dtype, dtype
            measure = _kernel(source.measure_kernel, op, modes, *dtypes, launch.variant, base)
            arguments = source.step_arguments(op, modes, launch.variant, measure=True)
            self._run(measure, launch.programs, arguments, **tables)
            base += launch.programs

    def _run(
        self, kernel: Any, programs: int, arguments: Sequence[str], *numbers: int, **own: Tensor
    ) -> None:
        tensors = self.tensors | own
        kernel[(programs,)](*(tensors[name] for name in arguments), *numbers, **source.COMPILE)

    def _upload(self, grads: Sequence[Tensor | None]) -> None:
        """Bring the addresses to the device, where they have changed."""
        pairs = zip(addresses(self.params), addresses(grads))
        found = [address for pair in pairs for address in pair]
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # The graph writes the addresses itself, at every replay: a copy would read host memory that has
            # changed by then. The tables that the graph reads are kept for it.
            self._write(found)
            self._captured += [self._launches, dict(self.tensors)]
            return
        # After a replay, the addresses on the device may be those of the graph.
        if found == self._uploaded and not self._captured:
            return
        if not self._uploaded:
            self._write(found[: source.NUMBERS])  # loads the kernel, which a capture could not do
        pinned = self.device.type == "cuda"
        host = torch.tensor(found, dtype=torch.int64, device="cpu", pin_memory=pinned).view(-1, 2)
        self.addresses.copy_(host, non_blocking=True)
        self._uploaded = found

    def _write(self, found: list[int]) -> None:
        """Write addresses by a kernel whose arguments they are."""
        for first in range(0, len(found), source.NUMBERS):
            numbers = [address or source.NO_NUMBER for address in found[first : first + source.NUMBERS]]
            # The address 1 stands for that of an empty tensor and is never followed.
            numbers = [source.NO_NUMBER - 1 if n == 1 else n for n in numbers]
            padding = [source.NO_NUMBER] * (source.NUMBERS - len(numbers))
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
            source.has_fast_instructions(self.device),
            source.blocks_of(self.op),
        )
        self._launches = [
            (launch, {name: table.to(self.device) for name, table in launch.tables.items()})
            for launch in launches
        ]
        empty = functools.partial(torch.empty, dtype=torch.float32, device=self.device)
        if self.modes.needs_totals:
            self.tensors["measured"] = empty(len(pairs), source.measured_columns(self.op))
            programs = sum(launch.programs for launch in launches)
            self.tensors["spans"] = spans(launches, len(pairs)).to(self.device)
            self.tensors["found"] = empty(programs, self.op.columns)

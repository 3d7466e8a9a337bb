"""The step kernel outside a graph: compiled once for a pair of dtypes, whatever the parameters are.

An eager ``optimizer.step()`` does not go through Dynamo and AOTAutograd, which spend time on each tensor
argument, at compile time and in the guards of every step. The kernel takes a table with a row for each
parameter instead, so parameters, shapes and missing gradients are data and nothing ever recompiles.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...ops.operator import Arguments, Modes, StepOp
from .._inductor import CppPythonBindingsCodeCache
from ..launcher import AbstractLauncher, addresses
from ..node import describe_strides
from . import source

_COMPILING = threading.RLock()  # tracing patches torch, and one compilation is enough for all threads


def compile_kernel(
    op: StepOp, modes: Modes, param_dtype: torch.dtype, grad_dtype: torch.dtype, measure: bool = False
) -> Any:
    """The kernel ``(table, count, elements, blocks, *tensors)`` for these dtypes on the CPU."""
    with _COMPILING:
        return _compile_kernel(op, modes, param_dtype, grad_dtype, measure)


@functools.cache
def _compile_kernel(
    op: StepOp, modes: Modes, param_dtype: torch.dtype, grad_dtype: torch.dtype, measure: bool
) -> Any:
    text = source.kernel(
        op,
        modes,
        "kernel",
        param_dtype,
        grad_dtype,
        "const int64_t* table, int64_t count, int64_t elements, int64_t blocks",
        "const Parameter* rows = (const Parameter*)table;",
        measure,
    )
    backends.counts["compiled"] += 1
    types = ["const int64_t*", *["int64_t"] * 3, *source.state_arguments(op, modes, measure).values()]
    return CppPythonBindingsCodeCache.load_pybinding(types, text)


class Launcher(AbstractLauncher):
    """The compiled step of one bucket on a CPU."""

    def __init__(self, op: StepOp, a: Arguments) -> None:
        super().__init__(op, a)
        self.places = a.places()
        # A row is `struct Parameter` of step.h.
        rows = [[0, 0, s.numel, s.offset, s.block, 0, 0, *source.of_row(s)] for s in self.places.slots]
        self.table = _integers(rows)
        self.pointers, self.stride_pointers = self.table[:, :2], self.table[:, 5:7]
        self.strides: list[Tensor] = []  # keeps alive what those columns point to

    def load(self, dtype: torch.dtype) -> None:
        """See `AbstractLauncher`."""
        compile_kernel(self.op, self.modes, self.params[0].dtype, dtype)
        if self.modes.totals:
            compile_kernel(self.op, self.modes, self.params[0].dtype, dtype, measure=True)

    def launch(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """See `AbstractLauncher`."""
        self._run(grads, dtype, list(self.tensors.values()))

    def measure(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """See `AbstractLauncher`."""
        found = torch.empty(len(self.params), self.op.columns, dtype=torch.float64, device="cpu")
        tensors = self.tensors | {"found": found}
        arguments = source.state_arguments(self.op, self.modes, measure=True)
        self._run(grads, dtype, [tensors[name] for name in arguments], measure=True)
        return found

    def _run(
        self, grads: Sequence[Tensor | None], dtype: torch.dtype, tensors: list[Tensor], measure: bool = False
    ) -> None:
        pointers = _integers([addresses(self.params), addresses(grads)])
        self.pointers.copy_(pointers.t())
        present = [grad for grad in grads if grad is not None]
        contiguous = all(map(Tensor.is_contiguous, self.params)) and all(map(Tensor.is_contiguous, present))
        if not contiguous or self.strides:
            self._describe_strides(grads)
        kernel = compile_kernel(self.op, self.modes, self.params[0].dtype, dtype, measure)
        kernel(self.table, len(self.params), self.places.elements, self.places.blocks, *tensors)

    def _describe_strides(self, grads: Sequence[Tensor | None]) -> None:
        self.strides = []
        found = []
        for tensor in (x for pair in zip(self.params, grads) for x in pair):
            described = None if tensor is None else describe_strides(tensor.shape, tensor.stride())
            if described is not None:
                self.strides.append(_integers(source.flat_strides(described)))
            found.append(0 if described is None else self.strides[-1].data_ptr())
        self.stride_pointers.copy_(_integers(found).view(-1, 2))


def _integers(values: list) -> Tensor:
    """An int64 tensor whose address C++ is given: on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")

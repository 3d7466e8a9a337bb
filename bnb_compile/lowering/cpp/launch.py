"""The step kernel outside a graph: compiled once for a pair of dtypes, whatever the parameters are.

An eager ``optimizer.step()`` does not go through Dynamo and AOTAutograd, which spend time on each tensor
argument, at compile time and in the guards of every step. The kernel takes a table with a row for each
parameter instead, so parameters, shapes and missing gradients are data and nothing ever recompiles.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.arena import layout
from ...ops.step import Arguments, Modes, StepOp
from .. import cpp
from .._inductor import CppPythonBindingsCodeCache
from ..node import describe_strides


@functools.cache
def compile_kernel(op: StepOp, modes: Modes, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> Any:
    """The kernel ``(table, count, *arenas, step, hyper, ...)`` for these dtypes on the CPU."""
    source = cpp.kernel(
        op,
        modes,
        "kernel",
        param_dtype,
        grad_dtype,
        "const int64_t* table, int64_t count",
        "const Parameter* rows = (const Parameter*)table;",
    )
    types = ["const int64_t*", "int64_t", *cpp.state_arguments(op, modes).values()]
    return CppPythonBindingsCodeCache.load_pybinding(types, source)


class CompiledStep:
    """The compiled step of one bucket.

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
        self.op, self.params = op, params
        arguments = Arguments(params, [], arenas, step, hyper, **options)
        self.modes = arguments.modes(op)
        self.state = arguments.tensors
        slots = layout(param.numel() for param in params).slots
        # A row is `struct Parameter` of step.h.
        self.table = _integers([[0, 0, s.numel, s.offset, s.block, 0, 0] for s in slots])
        self.pointers = self.table[:, :2]
        self.strides: list[Tensor] = []  # keeps alive what the last two columns point to

    def __call__(self, grads: Sequence[Tensor | None]) -> None:
        """Update the parameters that have a gradient; all gradients have one dtype."""
        pointers: list[int] = []
        contiguous = True
        dtype = None
        for param, grad in zip(self.params, grads):
            pointers.append(param.data_ptr())
            if grad is None:
                pointers.append(0)
            else:
                dtype = grad.dtype
                # An empty tensor has no address, but it has a gradient.
                pointers.append(grad.data_ptr() or 1)
                contiguous = contiguous and param.is_contiguous() and grad.is_contiguous()
        if dtype is None:
            return
        self.pointers.copy_(_integers(pointers).view(-1, 2))
        if not contiguous or self.strides:
            self._describe_strides(grads)
        kernel = compile_kernel(self.op, self.modes, self.params[0].dtype, dtype)
        kernel(self.table, len(self.params), *self.state)
        # As after any write in place, so that autograd notices if it still needs the old values.
        torch.autograd.graph.increment_version(self.params)

    def _describe_strides(self, grads: Sequence[Tensor | None]) -> None:
        self.strides = []
        addresses = []
        for tensor in (x for pair in zip(self.params, grads) for x in pair):
            described = None if tensor is None else describe_strides(tensor.shape, tensor.stride())
            if described is not None:
                self.strides.append(_integers(cpp.flat_strides(described)))
            addresses.append(0 if described is None else self.strides[-1].data_ptr())
        self.table[:, 5:] = _integers(addresses).view(-1, 2)


def _integers(values: list) -> Tensor:
    """An int64 tensor whose address C++ is given: on the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=torch.int64, device="cpu")

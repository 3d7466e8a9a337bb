"""Calls of our kernels as nodes of Inductor's graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ops.step import Arguments, StepOp
from ._inductor import ExternKernel, MutationOutput, NoneLayout, V, lowerings


class AbstractKernelNode(ExternKernel):
    """One call that reads and writes many tensors.

    Args:
        inputs: All that it reads or writes, realised.
        written: What it writes, lowered.
    """

    def __init__(self, inputs: Sequence[Any], written: Sequence[Any]) -> None:
        self.device = inputs[0].get_device()
        super().__init__(None, NoneLayout(device=self.device), inputs)
        self.mutation_outputs = [MutationOutput(NoneLayout(device=self.device), x, self) for x in written]
        V.graph.register_operation(self)

    @classmethod
    def real(cls, xs: Sequence[Any]) -> list[Any]:
        """Lowered tensors as buffers; None stays None."""
        return [None if x is None else cls.unwrap_storage_for_input(cls.realize_input(x)) for x in xs]

    def get_outputs(self) -> list[Any]:
        """What the node writes."""
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device:
        """Where the kernel runs."""
        return self.device

    def codegen(self, wrapper: Any) -> None:
        """Print the kernel and its call."""
        raise NotImplementedError


class AbstractStepNode(AbstractKernelNode):
    """The step for all parameters of a bucket.

    Args:
        op: The step operator.
        a: Its arguments, lowered.
        written: What the kernel writes besides the parameters and their states.
        read: What it reads besides `hyper` and its like.
    """

    def __init__(
        self, op: StepOp, a: Arguments, written: Sequence[Any] = (), read: Sequence[Any] = ()
    ) -> None:
        self.op, self.modes = op, a.modes(op)
        self.params, self.grads = self.real(a.params), self.real(a.grads)
        self.present = [x for x in self.grads if x is not None]
        state = [*a.arenas, a.step]
        self.state, self.written = self.real(state), self.real(written)
        self.read = self.real([*a.tensors[len(state) :], *read])
        self.param_dtype = self.params[0].get_dtype()
        self.grad_dtype = self.present[0].get_dtype() if self.present else self.param_dtype
        inputs = [*self.params, *self.present, *self.state, *self.written, *self.read]
        super().__init__(inputs, [*a.params, *state, *written])


def describe_strides(size: Sequence[Any], stride: Sequence[Any]) -> list[tuple[int, int]] | None:
    """A tensor's dimensions as pairs of size and stride, merged where they can be.

    Returns:
        list[tuple[int, int]] | None: None for a contiguous tensor.
    """
    dims: list[tuple[int, int]] = []
    for n, s in zip(map(int, size), map(int, stride)):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * s:
            dims[-1] = (dims[-1][0] * n, s)
        else:
            dims.append((n, s))
    if not dims or (len(dims) == 1 and dims[0][1] == 1) or 0 in map(int, size):
        return None
    return dims


def static_numel(size: Sequence[Any]) -> int:
    """Number of elements of a lowered parameter, whose shape is never dynamic."""
    return math.prod(int(n) for n in size)


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A new tensor, lowered, for a node to write."""
    return lowerings[torch.ops.aten.empty.memory_format](list(size), dtype=dtype, device=device)

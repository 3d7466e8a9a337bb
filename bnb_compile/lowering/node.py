"""Calls of our kernels as nodes of Inductor's graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ops.operator import Arguments, Options, StepOp
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

    def codegen(self, code: Any) -> None:
        """Print the kernels and their calls.

        Args:
            code: Inductor's wrapper, the code around the kernels.
        """
        raise NotImplementedError


class AbstractStepNode(AbstractKernelNode):
    """The step for all parameters of a bucket.

    Args:
        op: The step operator.
        a: Its arguments, lowered.
        scratch: Further tensors that its kernels write and then read, by name, lowered.
        constants: Further tensors that its kernels read, by name, lowered.

    Attributes:
        params: n buffers.
        grads: n buffers or None.
        present: The gradients that there are.
        geometry: See `Options`.
        tensors: All other buffers by the names of kernel arguments: `Arguments.tensors`, scratch, constants.
    """

    def __init__(
        self,
        op: StepOp,
        a: Arguments,
        scratch: dict[str, Any] | None = None,
        constants: dict[str, Any] | None = None,
    ) -> None:
        self.op, self.modes, self.geometry = op, op.modes(a.options), a.options.geometry
        self.params, self.grads = self.real(a.params), self.real(a.grads)
        for x in [*self.params, *filter(None, self.grads)]:  # guards are made while lowering
            static([*x.get_size(), *x.get_stride()])
        self.present = [x for x in self.grads if x is not None]
        others = {**a.tensors(op), **(scratch or {}), **(constants or {})}
        self.tensors = dict(zip(others, self.real(list(others.values()))))
        self.param_dtype = self.params[0].get_dtype()
        self.grad_dtype = self.present[0].get_dtype() if self.present else self.param_dtype
        inputs = [*self.params, *self.present, *self.tensors.values()]
        super().__init__(inputs, self.written(a, scratch or {}))

    def written(self, a: Arguments, scratch: dict[str, Any]) -> list[Any]:
        """What the kernels write."""
        options = [x for name, x in a.options.tensors.items() if name in Options.written()]
        return [*a.params, *a.arenas, a.step, *scratch.values(), *options]


def describe_strides(size: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int]] | None:
    """A tensor's dimensions as pairs of size and stride, merged where they can be.

    Returns:
        list[tuple[int, int]] | None: None for a contiguous tensor.
    """
    dims: list[tuple[int, int]] = []
    for n, s in zip(size, stride):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * s:
            dims[-1] = (dims[-1][0] * n, s)
        else:
            dims.append((n, s))
    if not dims or (len(dims) == 1 and dims[0][1] == 1) or 0 in size:
        return None
    return dims


def static(numbers: Sequence[Any]) -> list[int]:
    """Sizes or strides of a lowered tensor; one that is symbolic becomes what it is now, guarded."""
    return [V.graph.sizevars.guard_int(n) for n in numbers]


def static_numel(size: Sequence[Any]) -> int:
    """Number of elements of a lowered tensor."""
    return math.prod(static(size))


def empty(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """A new tensor, lowered, for a node to write."""
    return lowerings[torch.ops.aten.empty.memory_format](list(size), dtype=dtype, device=device)

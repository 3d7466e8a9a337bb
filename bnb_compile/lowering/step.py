"""The step operators in Inductor: one node, one kernel for all parameters of a bucket.

Plain Inductor IR is right for what should fuse with its surroundings (blockwise.py), not for this: with
many parameters the scheduler cuts the reduction off the update, which doubles the traffic, and compile
time grows with the number of parameters. So the step is a node of its own that prints its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..ops.arena import layout
from ..ops.step import STEP_OPS, StepOp
from . import cpp
from ._inductor import ExternKernel, MutationOutput, NoneLayout, V, lowerings, register_lowering


class StepKernel(ExternKernel):
    """The call of a step kernel."""

    def __init__(
        self,
        op: StepOp,
        params: Sequence[Any],
        grads: Sequence[Any],
        arenas: Sequence[Any],
        step: Any,
        hyper: Any,
    ) -> None:
        def real(x: Any) -> Any:
            return self.unwrap_storage_for_input(self.realize_input(x))

        self.op = op
        self.params = [real(p) for p in params]
        self.grads = [None if g is None else real(g) for g in grads]
        rest = [real(x) for x in (*arenas, step, hyper)]
        self.device = self.params[0].get_device()
        present = [g for g in self.grads if g is not None]
        super().__init__(None, NoneLayout(device=self.device), [*self.params, *present, *rest])
        self.mutation_outputs = [
            MutationOutput(NoneLayout(device=self.device), x, self) for x in (*params, *arenas, step)
        ]
        V.graph.register_operation(self)

    def get_outputs(self) -> list[Any]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device:
        return self.device

    def codegen(self, wrapper: Any) -> None:
        if self.device.type != "cpu":
            raise NotImplementedError(f"{self.op.name} has no kernel for {self.device}, only for cpu")
        present = [g for g in self.grads if g is not None]
        param_dtype = self.params[0].get_dtype()
        grad_dtype = present[0].get_dtype() if present else param_dtype
        types = [
            *[f"{cpp.TYPES[param_dtype]}*"] * len(self.params),
            *[f"const {cpp.TYPES[grad_dtype]}*"] * len(present),
            *cpp.arena_types(self.op),
        ]
        name = f"cpp_{self.op.name}_{wrapper.next_kernel_suffix()}"
        function = name if V.graph.cpp_wrapper else "kernel"
        source = cpp.kernel(self.op, function, param_dtype, grad_dtype, *self._rows(types))
        if V.graph.cpp_wrapper:
            for dtype in {x.get_dtype() for x in self.inputs}:
                wrapper.codegen_dtype(dtype)  # the C++ wrapper declares only dtypes announced to it
        else:
            source = f"async_compile.cpp_pybinding({types!r}, r'''{source}''')"
        wrapper.define_kernel(name, source, None, gpu=False)
        wrapper.generate_kernel_call(
            name,
            [x.codegen_reference() for x in self.inputs],
            arg_types=types,
            triton=False,
            device=self.device,
        )

    def _rows(self, types: Sequence[str]) -> tuple[str, str]:
        """C++ parameters for the tensors, and the statement that makes rows of them."""
        slots = layout(_static(p.get_size()) for p in self.params).slots
        strides: list[str] = []
        rows: list[str] = []
        names = [f"p{k}" for k in range(len(self.params))]
        names += [f"g{k}" for k, g in enumerate(self.grads) if g is not None]
        for k, (param, grad, slot) in enumerate(zip(self.params, self.grads, slots)):
            places = []
            for x in (param, grad):
                described = None if x is None else describe_strides(x.get_size(), x.get_stride())
                places.append("nullptr" if described is None else f"strides_{len(strides)}")
                if described is not None:
                    numbers = ", ".join(map(str, described))
                    strides.append(f"static const int64_t {places[-1]}[] = {{{numbers}}};")
            gradient = "nullptr" if grad is None else f"g{k}" if slot.numel else "rows"
            rows.append(
                f"{{p{k}, {gradient}, {slot.numel}, {slot.offset}, {slot.block}, {', '.join(places)}}}"
            )
        statements = [
            *strides,
            f"const Parameter rows[{len(rows)}] = {{{', '.join(rows)}}};",
            f"const int64_t count = {len(rows)};",
        ]
        arguments = ", ".join(f"{t} {n}" for t, n in zip(types, names))
        return arguments, "\n  ".join(statements)


def describe_strides(size: Sequence[Any], stride: Sequence[Any]) -> list[int] | None:
    """A tensor's place in memory for step.h.

    Returns:
        list[int] | None: ``[dims, *sizes, *strides]``, with dimensions merged where they can be; None
        for a contiguous tensor.
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
    return [len(dims), *(n for n, _ in dims), *(s for _, s in dims)]


def _static(size: Sequence[Any]) -> int:
    return math.prod(int(n) for n in size)


def _lower(op: StepOp) -> None:
    count = len(op.arenas)

    def in_place(params: Sequence[Any], grads: Sequence[Any], *rest: Any) -> None:
        StepKernel(op, params, grads, rest[:count], *rest[count:])

    def functional(params: Sequence[Any], grads: Sequence[Any], *rest: Any) -> tuple[Any, ...]:
        clone = lowerings[torch.ops.aten.clone.default]
        *state, hyper = rest
        params, state = [clone(p) for p in params], [clone(x) for x in state]
        for x in (*params, *state):
            x.realize()
        in_place(params, grads, *state, hyper)
        return params, *state

    register_lowering(op.in_place, type_promotion_kind=None)(in_place)
    register_lowering(op.functional, type_promotion_kind=None)(functional)


for _op in STEP_OPS.values():
    _lower(_op)

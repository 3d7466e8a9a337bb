"""The step on a CPU in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ops.arena import layout
from .. import cpp
from .._inductor import V
from ..node import AbstractStepNode, describe_strides, static_numel


class CppStepNode(AbstractStepNode):
    """One C++ kernel; the parameters are its arguments, their shapes constants in its text."""

    def codegen(self, wrapper: Any) -> None:
        """Print the kernel and its call."""
        types = [
            *[f"{cpp.TYPES[self.param_dtype]}*"] * len(self.params),
            *[f"const {cpp.TYPES[self.grad_dtype]}*"] * len(self.present),
            *cpp.arena_types(self.op),
        ]
        name = f"cpp_{self.op.name}_{wrapper.next_kernel_suffix()}"
        function = name if V.graph.cpp_wrapper else "kernel"
        source = cpp.kernel(self.op, function, self.param_dtype, self.grad_dtype, *self._rows(types))
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
        slots = layout(static_numel(p.get_size()) for p in self.params).slots
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
                    numbers = ", ".join(map(str, cpp.flat_strides(described)))
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

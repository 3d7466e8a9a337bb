"""The step on a CPU in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...ops.arena import layout
from .. import cpp
from .._inductor import V
from ..node import AbstractKernelNode, AbstractStepNode, describe_strides, static_numel


class CppStepNode(AbstractStepNode):
    """One C++ kernel; the parameters are its arguments, their shapes constants in its text."""

    def codegen(self, wrapper: Any) -> None:
        """Print the kernel and its call."""
        types = [
            *[f"{cpp.TYPES[self.param_dtype]}*"] * len(self.params),
            *[f"const {cpp.TYPES[self.grad_dtype]}*"] * len(self.present),
            *cpp.state_arguments(self.op, self.modes).values(),
        ]
        name = f"cpp_{self.op.name}_{wrapper.next_kernel_suffix()}"
        function = function_name(name)
        dtypes = self.param_dtype, self.grad_dtype
        source = cpp.kernel(self.op, self.modes, function, *dtypes, *self._rows(types))
        call_kernel(wrapper, name, source, types, self)

    def _rows(self, types: Sequence[str]) -> tuple[str, str]:
        """C++ parameters for the tensors, and the statement that makes rows of them."""
        slots = layout(static_numel(p.get_size()) for p in self.params).slots
        strides: list[str] = []
        rows: list[str] = []
        names = [f"p{k}" for k in range(len(self.params))]
        names += [f"g{k}" for k, g in enumerate(self.grads) if g is not None]
        for k, (param, grad, slot) in enumerate(zip(self.params, self.grads, slots)):
            places = ", ".join("nullptr" if x is None else print_strides(x, strides) for x in (param, grad))
            gradient = "nullptr" if grad is None else f"g{k}" if slot.numel else "rows"
            rows.append(f"{{p{k}, {gradient}, {slot.numel}, {slot.offset}, {slot.block}, {places}}}")
        arguments = ", ".join(f"{t} {n}" for t, n in zip(types, names))
        return arguments, print_rows("Parameter", rows, strides)


class CppNormsNode(AbstractKernelNode):
    """The norms of many tensors."""

    def __init__(self, xs: Sequence[Any], out: Any) -> None:
        self.xs = self.real(xs)
        super().__init__([*self.xs, *self.real([out])], [out])

    def codegen(self, wrapper: Any) -> None:
        """Print the kernel and its call."""
        dtype = self.xs[0].get_dtype()
        arguments = [f"x{k}" for k in range(len(self.xs))]
        types = [f"const {cpp.TYPES[dtype]}*"] * len(self.xs)
        strides: list[str] = []
        rows = [
            f"{{{a}, {static_numel(x.get_size())}, {print_strides(x, strides)}}}"
            for a, x in zip(arguments, self.xs)
        ]
        name = f"cpp_tensor_norms_{wrapper.next_kernel_suffix()}"
        source = cpp.norms_kernel(
            function_name(name),
            dtype,
            ", ".join(f"{t} {a}" for t, a in zip(types, arguments)),
            print_rows("Operand", rows, strides),
        )
        call_kernel(wrapper, name, source, [*types, "float*"], self)


def print_strides(x: Any, strides: list[str]) -> str:
    """Expression of a tensor's strides for step.h; appends their definition to `strides`."""
    described = describe_strides(x.get_size(), x.get_stride())
    if described is None:
        return "nullptr"
    numbers = ", ".join(map(str, cpp.flat_strides(described)))
    strides.append(f"static const int64_t strides_{len(strides)}[] = {{{numbers}}};")
    return f"strides_{len(strides) - 1}"


def print_rows(struct: str, rows: Sequence[str], strides: Sequence[str]) -> str:
    """Statements that define ``rows`` and ``count``."""
    return "\n  ".join(
        [
            *strides,
            f"const {struct} rows[{len(rows)}] = {{{', '.join(rows)}}};",
            f"const int64_t count = {len(rows)};",
        ]
    )


def function_name(name: str) -> str:
    """Name of the function of a kernel: Inductor's Python bindings expect their own."""
    return name if V.graph.cpp_wrapper else "kernel"


def call_kernel(wrapper: Any, name: str, source: str, types: Sequence[str], node: AbstractKernelNode) -> None:
    """Define a kernel and call it with a node's inputs."""
    declaration = None
    if V.graph.cpp_wrapper:
        for dtype in {x.get_dtype() for x in node.inputs}:
            wrapper.codegen_dtype(dtype)  # the C++ wrapper declares only dtypes announced to it
        # With it the kernel is in a file of its own; the wrapper's is compiled with -O1.
        declaration = f'extern "C" void {name}({", ".join(types)});\n'
    else:
        source = f"async_compile.cpp_pybinding({list(types)!r}, r'''{source}''')"
    wrapper.define_kernel(name, source, None, gpu=False, cpp_definition=declaration)
    wrapper.generate_kernel_call(
        name,
        [x.codegen_reference() for x in node.inputs],
        arg_types=list(types),
        triton=False,
        device=node.device,
    )

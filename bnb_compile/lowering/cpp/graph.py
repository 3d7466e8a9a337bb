"""The step and the norms on a CPU in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...formats import layout
from ...ops.operator import Arguments, StepOp
from .. import wrapper
from ..node import AbstractKernelNode, AbstractStepNode, describe_strides, static, static_numel
from . import source
from .formats import TYPES


class CppStepNode(AbstractStepNode):
    """One C++ kernel; the parameters are its arguments, their shapes constants in its text."""

    measure = False

    def codegen(self, code: Any) -> None:
        """See `AbstractKernelNode`."""
        param, grad = TYPES[self.param_dtype], TYPES[self.grad_dtype]
        tensors = {f"p{k}": f"{param}*" for k in range(len(self.params))}
        tensors |= {f"g{k}": f"const {grad}*" for k, x in enumerate(self.grads) if x is not None}
        state = source.state_arguments(self.op, self.modes, self.measure)
        name = wrapper.cpp_name(code, f"cpp_{self.op.name}{'_measure' if self.measure else ''}")
        text = source.kernel(
            self.op,
            self.modes,
            wrapper.cpp_function(name),
            self.param_dtype,
            self.grad_dtype,
            ", ".join(f"{type_} {argument}" for argument, type_ in tensors.items()),
            self._rows(),
            self.measure,
        )
        inputs = [*self.params, *self.present, *(self.tensors[argument] for argument in state)]
        wrapper.call_cpp(code, name, text, [*tensors.values(), *state.values()], inputs)

    def _rows(self) -> str:
        """Statements that make rows of the tensors, and say how long the arenas are."""
        places = layout((static_numel(p.get_size()) for p in self.params), self.geometry)
        strides: list[str] = []
        rows: list[str] = []
        for k, (param, grad, slot) in enumerate(zip(self.params, self.grads, places.slots)):
            described = ", ".join(
                "nullptr" if x is None else print_strides(x, strides) for x in (param, grad)
            )
            # An empty tensor may have no address, but it has a gradient.
            gradient = "nullptr" if grad is None else f"g{k}" if slot.numel else "(const void*)1"
            numbers = ", ".join(map(str, source.of_row(slot)))
            rows.append(
                f"{{p{k}, {gradient}, {slot.numel}, {slot.offset}, {slot.block}, {described}, {numbers}}}"
            )
        return (
            print_rows("Parameter", rows, strides)
            + f"\n  const int64_t elements = {places.elements}, blocks = {places.blocks};"
        )


class CppMeasureNode(CppStepNode):
    """What a step must know of whole parameters, written to ``found``."""

    measure = True

    def written(self, a: Arguments, scratch: dict[str, Any]) -> list[Any]:
        """See `AbstractStepNode`."""
        return list(scratch.values())


class CppNormsNode(AbstractKernelNode):
    """The norms of many tensors."""

    def __init__(self, xs: Sequence[Any], out: Any) -> None:
        self.xs, (self.out,) = self.real(xs), self.real([out])
        super().__init__([*self.xs, self.out], [out])

    def codegen(self, code: Any) -> None:
        """See `AbstractKernelNode`."""
        dtype = self.xs[0].get_dtype()
        arguments = {f"x{k}": f"const {TYPES[dtype]}*" for k in range(len(self.xs))}
        strides: list[str] = []
        rows = [
            f"{{{argument}, {static_numel(x.get_size())}, {print_strides(x, strides)}}}"
            for argument, x in zip(arguments, self.xs)
        ]
        name = wrapper.cpp_name(code, "cpp_tensor_norms")
        text = source.norms_kernel(
            wrapper.cpp_function(name),
            dtype,
            ", ".join(f"{type_} {argument}" for argument, type_ in arguments.items()),
            print_rows("Operand", rows, strides),
        )
        wrapper.call_cpp(code, name, text, [*arguments.values(), "float*"], [*self.xs, self.out])


def lower_step(op: StepOp, a: Arguments) -> None:
    """Lower a step operator."""
    CppStepNode(op, a)


def lower_measure(op: StepOp, a: Arguments, found: Any) -> None:
    """Lower a measure operator."""
    CppMeasureNode(op, a, {"found": found})


def lower_norms(xs: Sequence[Any], out: Any) -> None:
    """Lower tensor_norms."""
    CppNormsNode(xs, out)


def print_strides(x: Any, strides: list[str]) -> str:
    """Expression of a tensor's strides for tensors.h; appends their definition to `strides`."""
    described = describe_strides(static(x.get_size()), static(x.get_stride()))
    if described is None:
        return "nullptr"
    numbers = ", ".join(map(str, source.flat_strides(described)))
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

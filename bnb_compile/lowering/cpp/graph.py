"""The step and the norms on a CPU in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...formats import Layout, layout
from ...ops.operator import Arguments, StepOp
from .. import _inductor, wrapper
from .._inductor import V
from ..node import AbstractKernelNode, AbstractStepNode, describe_strides, static, static_numel
from . import source
from .formats import TYPES

#: Name of an argument: numbers of a `struct Parameter` that are not addresses, and how many there are.
PLACES, COLUMNS = "places", 7


class CppStepNode(AbstractStepNode):
    """One C++ kernel; the parameters are its arguments.

    What is not the same of all buckets is data, the argument `PLACES`, so that those with equally many
    parameters have one text, which is compiled once. In the C++ wrapper, of exported programs, it is in the
    text: there a tensor of a graph is a weight, which whoever loads it may have to bring.
    """

    measure = False

    def codegen(self, code: Any) -> None:
        """See `AbstractKernelNode`."""
        param, grad = TYPES[self.param_dtype], TYPES[self.grad_dtype]
        tensors = {f"p{k}": f"{param}*" for k in range(len(self.params))}
        tensors |= {f"g{k}": f"const {grad}*" for k, x in enumerate(self.grads) if x is not None}
        if PLACES in self.tensors:
            tensors[PLACES] = "const int64_t*"
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
        inputs = [*self.params, *self.present]
        inputs += [self.tensors[argument] for argument in (PLACES, *state) if argument in self.tensors]
        wrapper.call_cpp(code, name, text, [*tensors.values(), *state.values()], inputs)

    def _rows(self) -> str:
        """Statements that make rows of the tensors, and say how long the arenas are."""
        strides: list[str] = []
        rows: list[str] = []
        for k, (param, grad) in enumerate(zip(self.params, self.grads)):
            described = ", ".join(
                "nullptr" if x is None else print_strides(x, strides) for x in (param, grad)
            )
            # An empty tensor may have no address, but it has a gradient.
            numel = static_numel(param.get_size())
            gradient = "nullptr" if grad is None else f"g{k}" if numel else "(const void*)1"
            first, *others = (f"{PLACES}[{k * COLUMNS + column}]" for column in range(COLUMNS))
            numbers = [*others[:2], described, *others[2:]]
            rows.append(f"{{p{k}, {gradient}, {first}, {', '.join(numbers)}}}")
        end = len(rows) * COLUMNS
        lengths = f"const int64_t elements = {PLACES}[{end}], blocks = {PLACES}[{end + 1}];"
        constant = ""
        if PLACES not in self.tensors:
            places = layout((static_numel(p.get_size()) for p in self.params), self.geometry)
            values = ", ".join(map(str, _numbers(places)))
            constant = f"static const int64_t {PLACES}[] = {{{values}}};\n  "
        return f"{constant}{print_rows('Parameter', rows, strides)}\n  {lengths}"


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
    CppStepNode(op, a, constants=_places(a))


def lower_measure(op: StepOp, a: Arguments, found: Any) -> None:
    """Lower a measure operator."""
    CppMeasureNode(op, a, {"found": found}, _places(a))


def _places(a: Arguments) -> dict[str, Any]:
    """Where the parameters are in the arenas: the columns of all rows, and the arenas' lengths."""
    if V.graph.cpp_wrapper:
        return {}
    places = a.places(static_numel(param.get_size()) for param in a.params)
    table = torch.tensor(_numbers(places), dtype=torch.int64, device="cpu")
    return {PLACES: _inductor.constant(table, table.device)}


def _numbers(places: Layout) -> list[int]:
    rows = [(slot.numel, slot.offset, slot.block, *source.of_row(slot)) for slot in places.slots]
    return [*(number for row in rows for number in row), places.elements, places.blocks]


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

"""What a step operator is: a rule and how its states are stored, and the one table of its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..formats import Layout, Stored, layout
from ..formats.arena import Part
from ..rules import Rule


def _of_params(dtype: torch.dtype, needs: str | None = None) -> Any:
    """An option that is None, or a tensor with a number for each parameter.

    Args:
        dtype: Of the numbers.
        needs: For what the step writes: the option with which it is given, and without which it is not.
    """
    return dataclasses.field(default=None, metadata={"dtype": dtype, "needs": needs})


class Modes(NamedTuple):
    """For each of the `Options`, whether a kernel is compiled for it; and whether the rule takes means."""

    grad_scale: bool = False
    max_unorm: bool = False
    skip_zeros: bool = False
    block_wise: bool = True
    stochastic_round: bool = False
    rows: bool = False
    totals: bool = False
    means: bool = False

    @property
    def needs_totals(self) -> bool:
        """Whether something must be known of all elements of a parameter before one is updated."""
        return self.max_unorm or not self.block_wise or self.means

    @property
    def two_phases(self) -> bool:
        """Whether the step must find that out itself."""
        return self.needs_totals and not self.totals


@dataclass(frozen=True)
class Options:
    """What a step can be asked for: the keyword arguments of its operator.

    The schema, the checks, the arguments of the C++ and Triton kernels and what they are compiled for all
    come from these fields.

    Attributes:
        grad_scale: Gradients are multiplied by it. A parameter whose scale is infinite or NaN is treated as
            one without a gradient.
        max_unorm: Limit of the trust ratio, see rules/trust.py; 0 is none.
        unorm: Written: the squared norm of each parameter's update before the learning rate and the trust
            ratio.
        skip_zeros: Whether an element whose gradient is zero keeps its parameter and its states.
        block_wise: Whether each block of a state has what its format shares in blocks for itself; otherwise
            all blocks of a parameter have the same.
        stochastic_round: Whether bfloat16 parameters are rounded up or down stochastically, see
            rules/rounding.py.
        totals: (n, columns) float64, for parameters that are parts of tensors: what the measure operator
            returned, added up over the parts. None to measure the parameters.
        geometry: Three ints for each parameter, its `formats.Geometry`; None if they are whole tensors.
    """

    grad_scale: Any = _of_params(torch.float32)
    max_unorm: Any = _of_params(torch.float32)
    unorm: Any = _of_params(torch.float32, needs="max_unorm")
    skip_zeros: bool = False
    block_wise: bool = True
    stochastic_round: bool = False
    totals: Any = _of_params(torch.float64)
    geometry: Sequence[int] | None = None

    @staticmethod
    def dtypes() -> dict[str, torch.dtype]:
        """The options that are tensors, with an entry or a row for each parameter."""
        fields = dataclasses.fields(Options)
        return {field.name: field.metadata["dtype"] for field in fields if field.metadata}

    @staticmethod
    def written() -> list[str]:
        """The options that the step writes."""
        return [field.name for field in dataclasses.fields(Options) if field.metadata.get("needs")]

    @staticmethod
    def schema(mutable: bool) -> str:
        """The options in torch's schema language.

        Args:
            mutable: Whether those that are written are marked so; otherwise they are left out.
        """
        texts = []
        for k, field in enumerate(dataclasses.fields(Options)):
            if field.name == "geometry":
                texts.append("int[]? geometry=None")
            elif not field.metadata:
                texts.append(f"bool {field.name}={field.default}")
            elif not field.metadata["needs"]:
                texts.append(f"Tensor? {field.name}=None")
            elif mutable:
                texts.append(f"Tensor(o{k}!)? {field.name}=None")
        return ", ".join(texts)

    def mistakes(self) -> Iterator[str]:
        """What is wrong with which options are given."""
        for field in dataclasses.fields(Options):
            needs = field.metadata.get("needs") if field.metadata else None
            if needs and (getattr(self, field.name) is None) != (getattr(self, needs) is None):
                yield f"{field.name} must be given with {needs}, and only with it"

    def arguments(self) -> dict[str, Any]:
        """Them by name, as the operators take them."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def tensors(self) -> dict[str, Any]:
        """Those tensors that are given."""
        given = {name: getattr(self, name) for name in self.dtypes()}
        return {name: x for name, x in given.items() if x is not None}

    @property
    def rows(self) -> bool:
        """Whether blocks end at the ends of rows."""
        return any((self.geometry or ())[::3])

    @property
    def modes(self) -> Modes:
        """What a kernel for these options is compiled for."""
        given = {name: name in self.tensors for name in self.dtypes()}
        return Modes(**{name: given.get(name, getattr(self, name, False)) for name in Modes._fields})


#: Names of the options, and of those that are only read; Dynamo cannot ask an instance for them.
OPTIONS = tuple(field.name for field in dataclasses.fields(Options))
READ_OPTIONS = tuple(name for name in OPTIONS if name not in Options.written())


class Arena(NamedTuple):
    """One tensor of a bucket: a part of a format, with a row for each state (or tuple of states) in it."""

    name: str
    part: Part
    rows: int


@dataclass(frozen=True)
class StepOp:
    """The step of one rule with its states in given formats, and its two operators.

    Make one with `step_op`, which registers the operators.
    """

    rule: Rule
    stored: tuple[Stored, ...]
    revision: int = 0  # of a rule that has been defined several times

    @property
    def name(self) -> str:
        """Name of the functional operator; the one in place has a trailing underscore."""
        names = dict.fromkeys(stored.format.name for stored in self.stored)
        again = [f"again{self.revision}"] if self.revision else []
        return "_".join([self.rule.name, *again, "step", *names])

    @property
    def arenas(self) -> tuple[Arena, ...]:
        """The operator's arguments that hold the states."""
        by_name = {}
        for stored in self.stored:
            rows = sum(other.format.name == stored.format.name for other in self.stored)
            for part in stored.format.parts:
                name = f"{stored.format.name}_{part.name}"
                by_name[name] = Arena(name, part, rows)
        return tuple(by_name.values())

    def row(self, stored: Stored) -> int:
        """The row of the arenas of its format that some states have."""
        same = [other for other in self.stored if other.format.name == stored.format.name]
        return same.index(stored)

    @property
    def maxima(self) -> int:
        """Number of maxima that the formats can be given of a whole parameter; of ratios there are none."""
        return sum(stored.format.maxima for stored in self.stored if stored.over is None)

    @property
    def sums(self) -> int:
        """Number of sums over a whole parameter: of squares, and for means of elements and of numbers."""
        return 2 + (1 + len(self.rule.means) if self.rule.means else 0)

    @property
    def columns(self) -> int:
        """Number of what the measure operator finds of a parameter: sums, then maxima."""
        return self.sums + self.maxima

    @property
    def random(self) -> bool:
        """Whether some format rounds stochastically."""
        return any(stored.format.random for stored in self.stored)

    @property
    def has_ratios(self) -> bool:
        """Whether a state is stored as its ratio to the root of another."""
        return any(stored.over is not None for stored in self.stored)

    def compensated(self, modes: Modes, param_dtype: torch.dtype) -> tuple[Stored, ...]:
        """The states of which the parameter is given at once what rounding takes away of them.

        It would have come in the steps that follow, see `State.impulse`. Not where a trust ratio changes the
        size of steps, nor where the parameter would be rounded to nearest, which loses what is given; and not
        of codes of a table.
        """
        if modes.max_unorm or not (param_dtype == torch.float32 or modes.stochastic_round):
            return ()
        return tuple(
            s
            for s in self.stored
            if s.over is not None and not s.format.tables and self.rule.states[s.state].impulse
        )

    @property
    def shared_in_blocks(self) -> bool:
        """Whether some format shares something in blocks, so that `block_wise` means anything."""
        return any(arena.part.per > 1 for arena in self.arenas)

    def modes(self, options: Options) -> Modes:
        """What is needed of a kernel."""
        modes = options.modes._replace(means=bool(self.rule.means))
        return modes if self.shared_in_blocks else modes._replace(block_wise=True)

    def shapes(self, places: Layout) -> list[tuple[int, int]]:
        """Shape of every arena."""
        return [(arena.rows, places.length(arena.part.per)) for arena in self.arenas]

    def bytes_per_param(self, numel: int, geometry: Sequence[int] | None = None) -> float:
        """Memory of the states of a parameter, for each of its elements."""
        (slot,) = layout([numel], geometry).slots
        of_row = [(slot.span(arena.part.per), arena) for arena in self.arenas]
        total = sum(
            (span.stop - span.start) * arena.rows * arena.part.dtype.itemsize for span, arena in of_row
        )
        return total / max(numel, 1)

    @property
    def measure(self) -> torch._ops.OpOverload:
        """The operator that finds out what a step must know of whole parameters."""
        return getattr(torch.ops.bnb_compile, f"{self.name}_measure").default

    @property
    def in_place(self) -> torch._ops.OpOverload:
        """The operator that updates its arguments."""
        return getattr(torch.ops.bnb_compile, f"{self.name}_").default

    @property
    def functional(self) -> torch._ops.OpOverload:
        """The operator that returns the updated tensors, for export."""
        return getattr(torch.ops.bnb_compile, self.name).default


class Arguments(NamedTuple):
    """A call's arguments, with the arenas gathered: tensors, or what a compiler has in their place."""

    params: Sequence[Any]
    grads: Sequence[Any]
    arenas: Sequence[Any]
    step: Any
    hyper: Any
    options: Options

    @staticmethod
    def of(args: Sequence[Any], options: dict[str, Any]) -> Arguments:
        """From the arguments of an operator."""
        params, grads, *arenas, step, hyper = args
        return Arguments(params, grads, arenas, step, hyper, Options(**options))

    def places(self, numels: Iterable[int] | None = None) -> Layout:
        """The parameters' places in the arenas; `numels` where they are not tensors."""
        if numels is None:
            numels = (param.numel() for param in self.params)
        return layout(numels, self.options.geometry)

    def tensors(self, op: StepOp) -> dict[str, Any]:
        """What a kernel takes after parameters and gradients, by name."""
        arenas = {arena.name: x for arena, x in zip(op.arenas, self.arenas)}
        return {**arenas, "step": self.step, "hyper": self.hyper, **self.options.tensors}


def kernel_arguments(op: StepOp, modes: Modes) -> dict[str, torch.dtype]:
    """Names and dtypes of `Arguments.tensors`."""
    options = {}
    for field in dataclasses.fields(Options):
        if field.metadata and getattr(modes, field.metadata["needs"] or field.name):
            options[field.name] = field.metadata["dtype"]
    return {
        **{arena.name: arena.part.dtype for arena in op.arenas},
        "step": torch.int64,
        "hyper": torch.float64,
        **options,
    }

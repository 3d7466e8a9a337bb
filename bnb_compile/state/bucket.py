"""The parameters that one call of a step operator updates, and the tensors of their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..formats import BLOCK, Geometry, Part, Slot, Stored, layout, store_states
from ..ops.operator import READ_OPTIONS, Arguments, Modes, Options, StepOp
from ..ops.step import parts_of
from . import paging
from .checkpoint import RING, Numbers, SavedState, encode
from .gradients import Gradients
from .hyper import HyperTable
from .sharding import Sharding, locals_of
from .watched import Entry, Listener


class Kind(NamedTuple):
    """What the parameters of a bucket have in common.

    Attributes:
        device: Theirs.
        dtype: Theirs.
        op: The step operator: rule and formats.
        modes: What its kernel is compiled for.
        clipped: Whether their gradients are clipped to a percentile of earlier norms.
        paged: Whether their states are in managed memory.
        sharding: How several processes hold them together; None for ordinary tensors.
        wave: Parameters that overlap in memory are in different waves, which are updated one after another.
        portion: Where gradients are released, which part of the parameters; see portions.py.
    """

    device: torch.device
    dtype: torch.dtype
    op: StepOp
    modes: Modes
    clipped: bool
    paged: bool
    sharding: Sharding | None = None
    wave: int = 0
    portion: int = 0


class Bucket:
    """Parameters of one kind, with the arenas that hold their states.

    The tensors are allocated once and only ever written in place: compiled code and CUDA graphs keep
    their addresses.

    Args:
        kind: Their kind.
        params: n parameters, at least one.
        numbers: How the rule's states are numbered in the keys of ``optimizer.state``.
        listener: Hears of writes to the entries.
        names: What some keys are called instead.
        geometry: Of each parameter; None if they are whole tensors.

    Attributes:
        local: What this process holds of the parameters: of ordinary tensors they themselves.
        arenas: See `StepOp.arenas`.
        step: (n,) int64, steps taken.
        hyper: The hyperparameters.
        max_unorm: (n,) float32, limits of trust ratios; None without them.
        percentile: (n,) int64, of the ring; None without percentile clipping.
        gnorm: (n, 100) float32, ring of squared gradient norms; likewise.
        unorm: (n,) float32, squared norm of each last update, as bitsandbytes keeps; None without trust
            ratios.
        grad_scale: (n,) float32, what gradients are multiplied by; None until something asks for it.
        entries: What ``optimizer.state`` has of each parameter.
        idle: Parameters that are in no group now: they keep their states and are not updated.
    """

    def __init__(
        self,
        kind: Kind,
        params: list[Tensor],
        numbers: Numbers,
        listener: Listener,
        names: Mapping[str, str] | None = None,
        geometry: Sequence[Geometry] | None = None,
    ) -> None:
        self.kind, self.op, self.params = kind, kind.op, params
        self.local = params if kind.sharding is None else locals_of(params)
        #: What the parameters are like, and what of their gradients this process must have.
        self.shapes = [param.shape for param in params]
        self.specs = [(param.shape, kind.device, torch.strided) for param in self.local]
        self.geometry = None if geometry is None else [x for of_param in geometry for x in of_param]
        self.device, self.overload = kind.device, kind.op.in_place
        self.numbers, self._names = numbers, names or {}
        places = layout((param.numel() for param in self.local), self.geometry)
        self.slots = places.slots
        n = len(params)

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=self.device)

        self.arenas = [
            paging.managed_zeros(rows * length, arena.part.dtype, self.device).view(rows, length)
            if kind.paged
            else zeros(rows, length, dtype=arena.part.dtype)
            for arena, (rows, length) in zip(self.op.arenas, self.op.shapes(places))
        ]
        self.step = zeros(n, dtype=torch.int64)
        self.hyper = HyperTable(n, len(self.op.rule.hyper._fields), self.device)
        self.max_unorm = zeros(n) if kind.modes.max_unorm else None
        self.unorm = zeros(n) if kind.modes.max_unorm else None
        self.percentile = zeros(n, dtype=torch.int64) if kind.clipped else None
        self.gnorm = zeros(n, RING) if kind.clipped else None
        self.grad_scale = torch.ones(n, device=self.device) if kind.modes.grad_scale else None
        #: See `Options`: what a step must know of the parts that other processes hold.
        self.totals = zeros(n, self.op.columns, dtype=torch.float64) if kind.modes.totals else None
        self.idle: frozenset[int] = frozenset()
        self._launcher: Any = None
        self.entries = [Entry(listener) for _ in params]

    @property
    def options(self) -> Options:
        """What the step is asked for."""
        return Options(
            grad_scale=self.grad_scale,
            max_unorm=self.max_unorm,
            unorm=self.unorm,
            skip_zeros=self.kind.modes.skip_zeros,
            block_wise=self.kind.modes.block_wise,
            stochastic_round=self.kind.modes.stochastic_round,
            totals=self.totals,
            geometry=self.geometry,
        )

    def views(self, k: int) -> dict[str, Tensor]:
        """State of a parameter under bitsandbytes' names, as views of the arenas."""
        slot, shape = self.slots[k], self.local[k].shape
        view: dict[str, Tensor] = {"step": self.step[k]}
        if self.gnorm is not None:
            view["gnorm_vec"] = self.gnorm[k]
        if self.unorm is not None:
            view["unorm_vec"] = self.unorm[k : k + 1]
        arenas = {arena.name: x for arena, x in zip(self.op.arenas, self.arenas)}
        for number, members in enumerate(self.numbers, 1):
            stored = next(stored for stored in self.op.stored if stored.state == members[0])
            rows = [self.op.row(s) for m in members for s in self.op.stored if s.state == m]
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            parts: dict[str, Tensor] = {}
            size = torch.Size([len(rows), *shape]) if len(rows) > 1 else shape
            for part in stored.format.parts:
                arena = arenas[f"{stored.format.name}_{part.name}"]
                view_of = arena[rows[0] : rows[-1] + 1 : step, slot.span(part.per)]
                view_of = _in_rows(view_of, part, slot)
                parts[part.name] = view_of if len(rows) > 1 else view_of[0]
            view.update(stored.format.entries(parts, number, size))
        return {self._names.get(key, key): x for key, x in view.items()}

    def begin(self, k: int, values: Sequence[float | str] = ()) -> None:
        """Give a parameter the states of one that has taken no step: these, see `State.initial`, or zeros."""
        for entry in (self.step, self.gnorm, self.unorm):
            if entry is not None:
                entry[k].zero_()
        slot, stored = self.slots[k], self.op.stored
        if any(values):
            param = self.local[k].detach().reshape(-1).float()
            full = [param if x == "param" else torch.full_like(param, float(x)) for x in values]
            fresh = encode(stored, full, slot)
        else:
            # All elements and blocks get what one has; as few numbers are made as possible.
            zero = store_states(stored, [torch.zeros(1, device=self.device)] * len(stored))
            fresh = {state: {name: x[:1] for name, x in f.parts.items()} for state, f in zero.items()}
        self._fill(slot, fresh)

    def _fill(self, slot: Slot, fresh: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Write the parts of a parameter's states into the arenas."""
        for stored in self.op.stored:
            for name, view in parts_of(self.op, self.arenas, stored, slot).items():
                view.copy_(fresh[stored.state][name])

    def write(self, k: int, saved: SavedState) -> None:
        """Replace the state of a parameter by a saved one, of any format and block size."""
        self.step[k].copy_(torch.as_tensor(saved.step, device=self.device))
        for own, given in ((self.gnorm, saved.gnorm), (self.unorm, saved.unorm)):
            if own is not None:
                own[k].zero_() if given is None else own[k].copy_(given.reshape(own[k].shape))
        slot, stored = self.slots[k], self.op.stored
        parts = saved.parts(stored, slot)
        if not self.kind.modes.block_wise and not all(self._is_uniform(parts[s.state], s) for s in stored):
            values = [x.to(self.device) for x in saved.values(slot.numel)]
            magnitudes = [x for s in stored for x in s.format.magnitudes(values[s.state])]
            whole = [torch.cat([x, x.new_zeros(1)]).amax(0, keepdim=True) for x in magnitudes]
            parts = encode(stored, values, slot, list(map(self._most, whole)))
        self._fill(slot, parts)

    def saved(self, k: int) -> SavedState:
        """A copy of the state of a parameter, which another bucket can be given."""
        entry: dict[str, Tensor] = {}
        for stored in self.op.stored:
            parts = parts_of(self.op, self.arenas, stored, self.slots[k])
            per = {part.name: part for part in stored.format.parts}
            copies = {
                name: _in_rows(x.clone()[None], per[name], self.slots[k])[0] for name, x in parts.items()
            }
            entry.update(stored.format.entries(copies, stored.state + 1, self.local[k].shape))
        norms = [None if x is None else x[k].clone() for x in (self.gnorm, self.unorm)]
        return SavedState(self.step[k].clone(), entry, self.op.rule.states, *norms)

    def compile(self, grads: Gradients, scaled: bool) -> None:
        """Compile what a step with such gradients runs, before anything is changed.

        Args:
            grads: The gradients.
            scaled: Whether they will be multiplied by something.

        Raises:
            CompileError: If this machine cannot compile it.
        """
        if scaled:
            self._scale()
        if self._launcher is None:
            arguments = Arguments(self.local, [], self.arenas, self.step, self.hyper.table, self.options)
            self._launcher = backends.launcher(self.device.type)(self.op, arguments)
        for dtype in grads.dtypes:
            self._launcher.compile(dtype)

    def _scale(self) -> Tensor:
        if self.grad_scale is None:
            self.grad_scale = torch.ones(len(self.params), device=self.device)
            self._launcher = None  # was compiled without
        return self.grad_scale

    def update(self, grads: Gradients, factor: Tensor | None, compiled: bool) -> None:
        """Step the parameters that have a gradient.

        Args:
            grads: Theirs.
            factor: (n,) float32, what to multiply gradients by; not finite, to leave a parameter as it is.
            compiled: Whether to run the kernel, after `compile`; otherwise the operator, which is what a
                graph captures, and eagerly the reference.
        """
        if self.hyper.live:
            self.hyper.refresh()
        if factor is not None:
            self._scale().copy_(factor)
        elif self.grad_scale is not None:
            self.grad_scale.fill_(1.0)
        if self.kind.paged and not torch.compiler.is_compiling():
            paging.prefetch(self.arenas, self.device)
        for dtype in grads.dtypes:
            tensors = self.local, grads.of(dtype), *self.arenas, self.step, self.hyper.table
            options = self.options.arguments()
            if self.totals is not None:
                if compiled:
                    measured = self._launcher.measure(grads.of(dtype), dtype)
                else:
                    measured = self.op.measure(*tensors, **{name: options[name] for name in READ_OPTIONS})
                self.totals.copy_(self._total(measured))
            if compiled:
                self._launcher(grads.of(dtype), dtype)
            else:
                self.overload(*tensors, **options)

    def _total(self, found: Tensor) -> Tensor:
        """What all processes together have found."""
        sharding = self.kind.sharding
        if sharding is None:
            return found
        sums, maxima = found[:, : self.op.sums], found[:, self.op.sums :]
        return torch.cat([sharding.total(sums), sharding.total(maxima, "max")], 1)

    def _most(self, maximum: Tensor) -> Tensor:
        return maximum if self.kind.sharding is None else self.kind.sharding.total(maximum, "max")

    def _is_uniform(self, parts: dict[str, Tensor], stored: Stored) -> bool:
        """Whether all blocks of a parameter share the same already."""
        if self.kind.sharding is not None:
            return False
        shared = (parts[part.name] for part in stored.format.parts if part.per > 1)
        return all(bool((x == x[:1]).all()) for x in shared)

    def whole(self, squares: Tensor) -> Tensor:
        """Squared norms of whole tensors, (n,), from those of what this process holds."""
        return squares if self.kind.sharding is None else self.kind.sharding.total(squares)

    def refresh(self) -> None:
        """Notice tensors that have been put in the place of those that this process held."""
        if self.kind.sharding is not None:
            self.local[:] = locals_of(self.params)


def _in_rows(x: Tensor, part: Part, slot: Slot) -> Tensor:
    """(r, entries) of a part: what blocks share with a dimension for the rows, if blocks end with rows."""
    if part.per == 1 or slot.row >= slot.numel:
        return x
    return x.view(len(x), -1, slot.row_blocks * (BLOCK // part.per))

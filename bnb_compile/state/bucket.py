"""The parameters that one call of a step operator updates, and the tensors of their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..formats import BLOCK, Stored, layout
from ..ops.operator import Arguments, Modes, Options, StepOp
from ..ops.step import parts_of
from . import paging
from .checkpoint import RING, Numbers, SavedState
from .gradients import Gradients
from .hyper import HyperTable
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
        wave: Parameters that overlap in memory are in different waves, which are updated one after another.
    """

    device: torch.device
    dtype: torch.dtype
    op: StepOp
    modes: Modes
    clipped: bool
    paged: bool
    wave: int = 0


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

    Attributes:
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
    ) -> None:
        self.kind, self.op, self.params = kind, kind.op, params
        #: What the gradients must be like.
        self.specs = [(param.shape, kind.device, torch.strided) for param in params]
        self.device, self.overload = kind.device, kind.op.in_place
        self.numbers, self._names = numbers, names or {}
        places = layout(param.numel() for param in params)
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
        )

    def views(self, k: int) -> dict[str, Tensor]:
        """State of a parameter under bitsandbytes' names, as views of the arenas."""
        slot, shape = self.slots[k], self.params[k].shape
        view: dict[str, Tensor] = {"step": self.step[k]}
        if self.gnorm is not None:
            view["gnorm_vec"] = self.gnorm[k]
        if self.unorm is not None:
            view["unorm_vec"] = self.unorm[k : k + 1]
        arenas = {arena.name: x for arena, x in zip(self.op.arenas, self.arenas)}
        for number, members in enumerate(self.numbers, 1):
            stored = next(stored for stored in self.op.stored if members[0] in stored.states)
            rows = [self.op.row(s) for m in members for s in self.op.stored if m in s.states]
            step = rows[1] - rows[0] if len(rows) > 1 else 1
            parts: dict[str, Tensor] = {}
            size = torch.Size([len(rows), *shape]) if len(rows) > 1 else shape
            for part in stored.format.parts:
                arena = arenas[f"{stored.format.name}_{part.name}"]
                view_of = arena[rows[0] : rows[-1] + 1 : step, slot.span(part.per)]
                parts[part.name] = view_of if len(rows) > 1 else view_of[0]
            view.update(stored.format.entries(parts, number, size))
        return {self._names.get(key, key): x for key, x in view.items()}

    def begin(self, k: int, values: Sequence[float] = ()) -> None:
        """Give a parameter the states of one that has taken no step: these values, or zeros."""
        for entry in (self.step, self.gnorm, self.unorm):
            if entry is not None:
                entry[k].zero_()
        slot = self.slots[k]
        for stored in self.op.stored:
            parts = parts_of(self.op, self.arenas, stored, slot)
            initial = [values[state] if values else 0.0 for state in stored.states]
            if any(initial):
                full = [torch.full((slot.numel,), x, device=self.device) for x in initial]
                parts = {name: parts[name].copy_(x) for name, x in stored.format.store(full).items()}
            else:
                self._clear(stored, parts, slot.numel)

    def _clear(self, stored: Stored, parts: dict[str, Tensor], numel: int) -> None:
        zero = [torch.zeros(1, device=self.device) for _ in stored.states]
        for name, x in stored.format.store(zero).items():
            parts[name].fill_(x[0])

    def write(self, k: int, saved: SavedState) -> None:
        """Replace the state of a parameter by a saved one, of any format and block size."""
        self.step[k].copy_(torch.as_tensor(saved.step, device=self.device))
        for own, given in ((self.gnorm, saved.gnorm), (self.unorm, saved.unorm)):
            if own is not None:
                own[k].zero_() if given is None else own[k].copy_(given.reshape(own[k].shape))
        slot = self.slots[k]
        for stored in self.op.stored:
            parts = saved.parts(stored, slot.numel)
            if not self.kind.modes.block_wise and not _same_in_all_blocks(parts, stored):
                values = [x.to(self.device) for x in saved.values(stored, slot.numel)]
                parts = stored.format.store(values, max(slot.blocks, 1) * BLOCK)
            for name, view in parts_of(self.op, self.arenas, stored, slot).items():
                view.copy_(parts[name])

    def saved(self, k: int) -> SavedState:
        """A copy of the state of a parameter, which another bucket can be given."""
        entry: dict[str, Tensor] = {}
        for stored in self.op.stored:
            parts = parts_of(self.op, self.arenas, stored, self.slots[k])
            copies = {name: part.clone() for name, part in parts.items()}
            for state in stored.states:
                entry.update(stored.format.entries(copies, state + 1, self.params[k].shape))
        norms = [None if x is None else x[k].clone() for x in (self.gnorm, self.unorm)]
        return SavedState(self.step[k].clone(), entry, *norms)

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
            arguments = Arguments(self.params, [], self.arenas, self.step, self.hyper.table, self.options)
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
            if compiled:
                self._launcher(grads.of(dtype), dtype)
            else:
                self.overload(
                    self.params,
                    grads.of(dtype),
                    *self.arenas,
                    self.step,
                    self.hyper.table,
                    **self.options.arguments(),
                )


def _same_in_all_blocks(parts: dict[str, Tensor], stored: Stored) -> bool:
    shared = (parts[part.name] for part in stored.format.parts if part.per > 1)
    return all(bool((x == x[:1]).all()) for x in shared)

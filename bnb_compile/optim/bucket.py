"""The parameters that one call of a step operator updates, and their states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.arena import BLOCK, layout
from ..ops.blockwise import dynamic_map, quantize
from ..ops.step import StepOp
from . import paging
from .checkpoint import SavedMoment, SavedState
from .clipping import NORMS
from .group import StateEntry


class Kind(NamedTuple):
    """What the parameters of a bucket have in common.

    Attributes:
        device: Theirs.
        dtype: Theirs.
        op: The step operator: rule and bits.
        trust: Whether a trust ratio limits updates.
        skip_zeros: Whether elements with a zero gradient stay as they are.
        block_wise: Whether each block of 8-bit states has its own scale.
        percentile: Of earlier gradient norms, that a gradient is clipped to; 100 is off.
        scaled: Whether gradients are multiplied by something.
        stochastic: Whether parameters are rounded stochastically.
        paged: Whether states are in managed memory.
    """

    device: torch.device
    dtype: torch.dtype
    op: StepOp
    trust: bool
    skip_zeros: bool
    block_wise: bool
    percentile: int
    scaled: bool
    stochastic: bool
    paged: bool


class Bucket:
    """Parameters of one kind, with the arenas that hold their states.

    The tensors are allocated once and only ever written in place: compiled code and CUDA graphs keep
    their addresses.

    Args:
        kind: Their kind.
        params: The parameters, at least one.
        max_unorm: Limit of each one's trust ratio.
    """

    def __init__(self, kind: Kind, params: list[Tensor], max_unorm: Sequence[float]) -> None:
        self.kind, self.op, self.params = kind, kind.op, params
        self.device = kind.device
        places = layout(param.numel() for param in params)
        self.slots = places.slots
        self.shapes = [param.shape for param in params]
        n = len(params)

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=self.device)

        self.arenas = [
            paging.managed_zeros(size, dtype, self.device) if kind.paged else zeros(size, dtype=dtype)
            for (_, dtype), size in zip(self.op.arenas, self.op.arena_sizes(places))
        ]
        self.step = zeros(n)
        self.hyper = zeros(n, len(self.op.rule.hyper._fields), dtype=torch.float64)
        #: Hyperparameters given as tensors: parameters, their rows and a column of `hyper`, the tensor.
        self.live: list[tuple[list[int], Any, int, Tensor]] = []
        self.max_unorm = (
            torch.tensor(max_unorm, dtype=torch.float32, device=self.device) if kind.trust else None
        )
        #: Squared norms of each parameter's last gradients.
        self.gnorm = zeros(n, NORMS) if kind.percentile < 100 else None
        #: What gradients are multiplied by; without `kind.scaled` from when something first asks for it.
        self.grad_scale = torch.ones_like(self.step) if kind.scaled else None
        self._compiled: Any = None
        #: What ``optimizer.state`` has of each parameter.
        self.entries = [StateEntry(self.views(k)) for k in range(n)]

    @property
    def percentile(self) -> int:
        """Of earlier norms, for clipping."""
        return self.kind.percentile

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the step operator."""
        return dict(
            grad_scale=self.grad_scale,
            max_unorm=self.max_unorm,
            skip_zeros=self.kind.skip_zeros,
            block_wise=self.kind.block_wise,
            stochastic_round=self.kind.stochastic,
        )

    def views(self, k: int) -> dict[str, Tensor]:
        """State of a parameter under bitsandbytes' names, as views of the arenas."""
        slot, shape = self.slots[k], self.params[k].shape
        inside = slice(slot.offset, slot.offset + slot.numel)
        view: dict[str, Tensor] = {"step": self.step[k]}
        if self.gnorm is not None:
            view["gnorm_vec"] = self.gnorm[k]
        if self.op.bits == 32:
            for i, arena in enumerate(self.arenas, 1):
                view[f"state{i}"] = arena[inside].view(shape)
            return view
        scales = slice(slot.block, slot.block + slot.blocks)
        for i, kind in enumerate(self.op.rule.states, 1):
            view[f"state{i}"] = self.arenas[2 * i - 2][inside].view(shape)
            view[f"qmap{i}"] = dynamic_map(kind.signed, self.device).values
        for i in range(1, len(self.op.rule.states) + 1):
            view[f"absmax{i}"] = self.arenas[2 * i - 1][scales]
        return view

    def set_hyper(self, ks: list[int], values: Sequence[Any]) -> None:
        """Set hyperparameters of the parameters `ks`; those that are tensors will be read at each step."""
        together = ks[-1] - ks[0] == len(ks) - 1
        rows = slice(ks[0], ks[-1] + 1) if together else torch.tensor(ks, device=self.device)
        numbers = [0.0 if isinstance(v, Tensor) else float(v) for v in values]
        row = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        self.hyper[rows] = row.to(self.device, non_blocking=True)
        self.live = [entry for entry in self.live if entry[0] != ks] + [
            (ks, rows, column, v) for column, v in enumerate(values) if isinstance(v, Tensor)
        ]

    def begin(self, k: int, values: Sequence[float] = ()) -> None:
        """Give a parameter the states of one that has taken no step: these values, or zeros."""
        values = values or [0.0] * len(self.op.rule.states)
        self.write(k, SavedState(0, [SavedMoment.full(self.params[k], v) for v in values]))

    def write(self, k: int, saved: SavedState) -> None:
        """Replace the state of a parameter by a saved one, of either format and any block size."""
        view = self.views(k)
        view["step"].fill_(saved.step)
        if "gnorm_vec" in view:
            view["gnorm_vec"].copy_(saved.gnorm) if saved.gnorm is not None else view["gnorm_vec"].zero_()
        for i, (kind, moment) in enumerate(zip(self.op.rule.states, saved.moments), 1):
            if self.op.bits == 32:
                view[f"state{i}"].copy_(moment.decode())
                continue
            table = dynamic_map(kind.signed, self.device)
            one_scale = self.kind.block_wise or moment.one_scale
            if moment.has_format(BLOCK, table.values) and one_scale:
                values, absmax = moment.values, moment.absmax
            else:
                block_size = BLOCK if self.kind.block_wise else max(moment.values.numel(), 1)
                values, absmax = quantize(moment.decode().to(self.device), table, block_size)
            view[f"state{i}"].copy_(values)
            view[f"absmax{i}"].copy_(absmax)

    def update(self, grads: Sequence[Tensor | None], factor: Tensor | None, compiled: bool) -> None:
        """Step the parameters that have a gradient.

        Args:
            grads: A gradient or None for each parameter.
            factor: (n,) float32, what to multiply gradients by; not finite, to leave a parameter as it is.
            compiled: Whether to run the compiled kernel; otherwise the operator, which is what a graph
                captures, and eagerly the reference.
        """
        for _, rows, column, value in self.live:
            self.hyper[rows, column] = value.to(self.hyper.dtype)
        if factor is not None and self.grad_scale is None:
            self.grad_scale = torch.ones_like(self.step)
            self._compiled = None  # was compiled without
        if self.grad_scale is not None:
            self.grad_scale.copy_(torch.ones_like(self.step) if factor is None else factor)
        if self.kind.paged and not torch.compiler.is_compiling():
            paging.prefetch(self.arenas, self.device)
        for same_dtype in _by_dtype(grads):
            if compiled:
                if self._compiled is None:
                    self._compiled = _compiled_step(self)
                self._compiled(same_dtype)
            else:
                self.op.in_place(self.params, same_dtype, *self.arenas, self.step, self.hyper, **self.options)


def _compiled_step(bucket: Bucket) -> Any:
    """The bucket's kernel; importing it imports Inductor."""
    arguments = (bucket.op, bucket.params, bucket.arenas, bucket.step, bucket.hyper)
    if bucket.device.type == "cpu":
        from ..lowering.cpp.launch import CompiledStep

        return CompiledStep(*arguments, **bucket.options)
    from ..lowering.triton.launch import TritonStep

    return TritonStep(*arguments, **bucket.options)


def _by_dtype(grads: Sequence[Tensor | None]) -> Iterator[Sequence[Tensor | None]]:
    """The gradients of each dtype, with None in place of the others."""
    dtypes = {grad.dtype for grad in grads if grad is not None}
    if len(dtypes) == 1:
        yield grads
    else:
        for dtype in sorted(dtypes, key=str):
            yield [grad if grad is not None and grad.dtype == dtype else None for grad in grads]

"""The parameters that one call of a step operator updates, and their states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.arena import BLOCK, layout
from ..ops.blockwise import dynamic_map, quantize
from ..ops.step import StepOp
from .checkpoint import SavedState


class Bucket:
    """Parameters of one device, dtype and state format, with the arenas that hold their states.

    The tensors are allocated once and only ever written in place: compiled code and CUDA graphs keep
    their addresses.

    Args:
        op: The step operator.
        params: The parameters, at least one.
    """

    def __init__(self, op: StepOp, params: list[Tensor]) -> None:
        self.op = op
        self.params = params
        self.device, self.dtype = params[0].device, params[0].dtype
        places = layout(param.numel() for param in params)
        self.slots = places.slots

        def zeros(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=self.device)

        self.arenas = [
            zeros(size, dtype=dtype) for (_, dtype), size in zip(op.arenas, op.arena_sizes(places))
        ]
        self.step = zeros(len(params), dtype=torch.float32)
        self.hyper = zeros(len(params), len(op.rule.hyper._fields), dtype=torch.float64)
        #: Hyperparameters given as tensors: rows and column of `hyper`, and the tensor to read.
        self.live: list[tuple[slice, int, Tensor]] = []
        self._operator = op.in_place
        self._compiled: Any = None

    def views(self, k: int) -> dict[str, Tensor]:
        """State of a parameter under bitsandbytes' names, as views of the arenas."""
        slot, shape = self.slots[k], self.params[k].shape
        inside = slice(slot.offset, slot.offset + slot.numel)
        view: dict[str, Tensor] = {"step": self.step[k]}
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

    def write(self, k: int, saved: SavedState) -> None:
        """Replace the state of a parameter by a saved one, of either format and any block size."""
        view = self.views(k)
        view["step"].fill_(saved.step)
        for i, (kind, moment) in enumerate(zip(self.op.rule.states, saved.moments), 1):
            if self.op.bits == 32:
                view[f"state{i}"].copy_(moment.decode())
                continue
            table = dynamic_map(kind.signed, self.device)
            if moment.has_format(BLOCK, table.values):
                values, absmax = moment.values, moment.absmax
            else:
                values, absmax = quantize(moment.decode().to(self.device), table, BLOCK)
            view[f"state{i}"].copy_(values)
            view[f"absmax{i}"].copy_(absmax)

    def reset(self) -> None:
        """Forget the states of all parameters."""
        for tensor in (*self.arenas, self.step):
            tensor.zero_()

    def update(self, grads: Sequence[Tensor | None], compiled: bool) -> None:
        """Step the parameters that have a gradient.

        Args:
            grads: A gradient or None for each parameter.
            compiled: Whether to run the compiled kernel; otherwise the operator, which is what a graph
                captures, and eagerly the reference.
        """
        for rows, column, value in self.live:
            self.hyper[rows, column] = value.to(self.hyper.dtype)
        for same_dtype in _by_dtype(grads):
            if compiled:
                if self._compiled is None:
                    self._compiled = _compiled_step(self)
                self._compiled(same_dtype)
            else:
                self._operator(self.params, same_dtype, *self.arenas, self.step, self.hyper)


def _compiled_step(bucket: Bucket) -> Any:
    """The bucket's kernel; importing it imports Inductor."""
    arguments = (bucket.op, bucket.params, bucket.arenas, bucket.step, bucket.hyper)
    if bucket.device.type == "cpu":
        from ..lowering.cpp.launch import CompiledStep

        return CompiledStep(*arguments)
    from ..lowering.triton.launch import TritonStep

    return TritonStep(*arguments)


def _by_dtype(grads: Sequence[Tensor | None]) -> Iterator[Sequence[Tensor | None]]:
    """The gradients of each dtype, with None in place of the others."""
    dtypes = {grad.dtype for grad in grads if grad is not None}
    if len(dtypes) == 1:
        yield grads
    else:
        for dtype in sorted(dtypes, key=str):
            yield [grad if grad is not None and grad.dtype == dtype else None for grad in grads]

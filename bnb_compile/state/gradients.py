"""The gradients of a bucket's parameters, looked at once before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.step import PARAM_DTYPES
from .sharding import Sharding

_ALLOWED, _NONE = frozenset(PARAM_DTYPES), id(None)
_DTYPE, _SPEC = attrgetter("dtype"), attrgetter("shape", "device", "layout")


Spec = tuple[torch.Size, torch.device, torch.layout]  # of a gradient


class Gradients(NamedTuple):
    """A gradient or None for each parameter, and their dtypes."""

    tensors: Sequence[Tensor | None]
    dtypes: tuple[torch.dtype, ...]

    def of(self, dtype: torch.dtype) -> Sequence[Tensor | None]:
        """Those of one dtype, with None in place of the others."""
        if len(self.dtypes) == 1:
            return self.tensors
        return [grad if grad is not None and grad.dtype == dtype else None for grad in self.tensors]


def collect(
    params: Sequence[Tensor],
    specs: Sequence[Spec],
    idle: frozenset[int] = frozenset(),
    sharding: Sharding | None = None,
) -> Gradients:
    """The gradients that a step takes.

    Args:
        params: The parameters, on one device.
        specs: What their gradients must be like.
        idle: Which of them are in no group now.
        sharding: How several processes hold the parameters together.

    Raises:
        TypeError: If a gradient is sparse, or not of a dtype that a step can take.
        ValueError: If it has not its parameter's shape and device.
    """
    grads = [param.grad for param in params]
    if idle:
        grads = [None if k in idle else grad for k, grad in enumerate(grads)]
    if sharding is not None:
        grads = sharding.locals(grads)
    if torch.compiler.is_compiling():
        dtypes = {_checked(spec, grad) for spec, grad in zip(specs, grads) if grad is not None}
        return Gradients(grads, tuple(sorted(dtypes, key=str)))
    # The same, with loops in C.
    present: list = grads
    if _NONE in map(id, grads):
        specs = [spec for spec, grad in zip(specs, grads) if grad is not None]
        present = [grad for grad in grads if grad is not None]
    dtypes = set(map(_DTYPE, present))
    if not dtypes <= _ALLOWED or list(map(_SPEC, present)) != specs:
        for spec, grad in zip(specs, present):
            _checked(spec, grad)
    if any(map(Tensor.is_neg, present)):  # a lazy negation, which is not in a tensor's memory
        grads = [None if grad is None else grad.resolve_neg() for grad in grads]
    return Gradients(grads, tuple(sorted(dtypes, key=str)))


def _checked(spec: Spec, grad: Tensor) -> torch.dtype:
    """The dtype of a gradient that a step can take."""
    if grad.layout is not torch.strided or grad.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"a gradient of {grad.dtype}, {grad.layout}: must be strided (dense) and one of {PARAM_DTYPES}"
        )
    shape, device, _ = spec
    if grad.shape != shape or grad.device != device:
        raise ValueError(
            f"a gradient of shape {tuple(grad.shape)} on {grad.device}, of a parameter of shape "
            f"{tuple(shape)} on {device}: set it to None when the parameter changes"
        )
    return grad.dtype

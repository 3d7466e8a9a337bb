"""The gradients of a bucket's parameters, looked at once before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.step import PARAM_DTYPES


class Gradients(NamedTuple):
    """A gradient or None for each parameter, and their dtypes."""

    tensors: Sequence[Tensor | None]
    dtypes: tuple[torch.dtype, ...]

    def of(self, dtype: torch.dtype) -> Sequence[Tensor | None]:
        """Those of one dtype, with None in place of the others."""
        if len(self.dtypes) == 1:
            return self.tensors
        return [grad if grad is not None and grad.dtype == dtype else None for grad in self.tensors]


def collect(params: Sequence[Tensor], idle: frozenset[int] = frozenset()) -> Gradients:
    """The gradients that a step takes.

    Args:
        params: The parameters, on one device.
        idle: Which of them are in no group now.

    Raises:
        TypeError: If a gradient is sparse, or not of a dtype that a step can take.
        ValueError: If it has not its parameter's shape and device.
    """
    grads = [param.grad for param in params]
    if idle:
        grads = [None if k in idle else grad for k, grad in enumerate(grads)]
    dtypes = set()
    captured = torch.compiler.is_compiling()
    for k, (param, grad) in enumerate(zip(params, grads)):
        if grad is None:
            continue
        dtype = grad.dtype
        if grad.layout is not torch.strided or dtype not in PARAM_DTYPES:
            raise TypeError(
                f"a gradient of {dtype}, {grad.layout}: must be strided (dense) and one of {PARAM_DTYPES}"
            )
        if grad.shape != param.shape or grad.device != param.device:
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} on {grad.device}, of a parameter of shape "
                f"{tuple(param.shape)} on {param.device}: set it to None when the parameter changes"
            )
        dtypes.add(dtype)
        # A lazy negation is not in a tensor's memory; a graph takes care of it itself.
        if not captured and grad.is_neg():
            grads[k] = grad.resolve_neg()
    return Gradients(grads, tuple(sorted(dtypes, key=str)))

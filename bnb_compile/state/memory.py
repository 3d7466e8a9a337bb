"""Where tensors lie in memory: which overlap themselves or one another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops.step import PARAM_DTYPES
from .sharding import check_placements, is_sharded, local


def check_parameter(param: object) -> None:
    """Raise if no step can take a parameter.

    Raises:
        TypeError: If it is no ordinary dense tensor of a dtype that a step takes.
        ValueError: If its elements share memory, or are negated lazily.
    """
    if not isinstance(param, Tensor):
        raise TypeError(f"a parameter is a {type(param).__name__}, must be a tensor")
    if is_sharded(param):
        check_placements(param)
        param = local(param)
    if is_traceable_wrapper_subclass(param):
        raise TypeError(
            f"a parameter is a {type(param).__name__}, which has no memory of its own: only ordinary tensors "
            "can be updated; pass the tensors inside it"
        )
    if param.dtype not in PARAM_DTYPES:
        raise TypeError(f"a parameter of {param.dtype}: must be one of {PARAM_DTYPES}")
    if param.layout is not torch.strided:
        raise TypeError(f"a parameter of layout {param.layout}: must be strided (dense)")
    if isinstance(param, UninitializedTensorMixin):
        return  # has no shape yet
    if param.is_neg():
        raise ValueError("a parameter is negated lazily: use param.resolve_neg()")
    if not param.is_contiguous() and overlaps_itself(param.shape, param.stride()):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has elements that share "
            "memory, so that it cannot be updated: clone() it"
        )


def overlaps_itself(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether two elements of a tensor may be in one place; exact but for strides that interleave."""
    reach = 0
    for s, n in sorted((s, n) for n, s in zip(shape, stride) if n > 1):
        if s <= reach:
            return True
        reach += s * (n - 1)
    return False


def span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor, and the one after its last; both 0 if it is empty or has no memory."""
    if tensor.device.type == "meta" or not tensor.numel():
        return 0, 0
    last = sum(s * (n - 1) for n, s in zip(tensor.shape, tensor.stride()))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.itemsize


def waves(params: Sequence[Tensor]) -> list[int]:
    """A number for each parameter, so that those with the same number do not overlap.

    Parameters whose spans of addresses overlap are taken to overlap, as columns of one matrix do; being
    updated one after another is right for them too. Almost always all are 0.
    """
    found = [0] * len(params)
    spans = sorted((*span(param), k) for k, param in enumerate(params))
    open_until: list[int] = []  # for each wave, the end of its last parameter
    for start, end, k in spans:
        if start == end:
            continue
        wave = next((w for w, until in enumerate(open_until) if until <= start), len(open_until))
        found[k] = wave
        open_until[wave : wave + 1] = [end]
    return found

"""Norms of many tensors at once, for clipping and for rules that scale an update by them.

    tensor_norms(Tensor[] xs) -> Tensor

gives the Euclidean norm of each of n tensors of one dtype (float32, bfloat16 or float16), of any shapes and
strides: ``(n,)`` float32, on their device. Sums are formed in a fixed order, so a result does not depend on
the number of threads, nor on anything that ran before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import define

NORM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(xs: Sequence[Tensor]) -> None:
    dtypes = {x.dtype for x in xs}
    if len(dtypes) != 1 or not dtypes <= set(NORM_DTYPES):
        raise ValueError(f"tensor_norms: xs are of {dtypes or 'no dtype'}, must be of one of {NORM_DTYPES}")


def _eager(xs: Sequence[Tensor]) -> Tensor:
    _check(xs)
    return torch.stack(torch._foreach_norm(list(xs), 2, torch.float64)).float()


def _fake(xs: Sequence[Tensor]) -> Tensor:
    _check(xs)
    return xs[0].new_empty(len(xs), dtype=torch.float32)


norms_op = define("tensor_norms(Tensor[] xs) -> Tensor", _eager, _fake)

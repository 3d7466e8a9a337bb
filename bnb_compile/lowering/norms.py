"""tensor_norms in Inductor: a node of its own, whatever the number of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import backends
from ..ops.norms import norms_op
from ._inductor import register_lowering
from .node import empty


@register_lowering(norms_op, type_promotion_kind=None)
def _(xs: Sequence[Any]) -> Any:
    device = xs[0].get_device()
    out = empty([len(xs)], torch.float32, device)
    backends.lowering(device.type).lower_norms(xs, out)
    return out

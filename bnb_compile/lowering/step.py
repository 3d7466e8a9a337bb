"""The step operators in Inductor: one node, one kernel for all parameters of a bucket.

Plain Inductor IR is right for what should fuse with its surroundings (blockwise.py), not for this: with
many parameters the scheduler cuts the reduction off the update, which doubles the traffic, and compile
time grows with the number of parameters. So the step is a node of its own that prints its kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import backends
from ..ops.operator import Arguments, StepOp
from ..ops.step import with_scratch
from ._inductor import lowerings, register_lowering
from .node import empty


@functools.cache
def lower(op: StepOp) -> None:
    """Tell Inductor how to lower the two operators of a step."""

    def in_place(*args: Any, **options: Any) -> None:
        a = Arguments.of(args, options)
        backends.lowering(a.params[0].get_device().type).lower_step(op, a)
        backends.counts["captured"] += 1

    def functional(*args: Any, **options: Any) -> tuple[Any, ...]:
        clone = lowerings[torch.ops.aten.clone.default]
        params, grads, *state, hyper = args
        params, state = [clone(p) for p in params], [clone(x) for x in state]
        for x in (*params, *state):
            x.realize()

        def scratch(x: Any) -> Any:
            return empty(x.get_size(), x.get_dtype(), x.get_device())

        in_place(params, grads, *state, hyper, **with_scratch(options, scratch))
        return params, *state

    def measure(*args: Any, **options: Any) -> Any:
        a = Arguments.of(args, {**options, "unorm": None})
        device = a.params[0].get_device()
        found = empty([len(a.params), op.columns], torch.float64, device)
        backends.lowering(device.type).lower_measure(op, a, found)
        return found

    register_lowering(op.measure, type_promotion_kind=None)(measure)
    register_lowering(op.in_place, type_promotion_kind=None)(in_place)
    register_lowering(op.functional, type_promotion_kind=None)(functional)

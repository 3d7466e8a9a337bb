"""The step operators in Inductor: one node, one kernel for all parameters of a bucket.

Plain Inductor IR is right for what should fuse with its surroundings (blockwise.py), not for this: with
many parameters the scheduler cuts the reduction off the update, which doubles the traffic, and compile
time grows with the number of parameters. So the step is a node of its own that prints its kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from ..ops.step import STEP_OPS, Arguments, StepOp
from ._inductor import lowerings, register_lowering
from .cpp.graph import CppStepNode
from .triton.graph import lower_triton_step


def _lower(op: StepOp) -> None:
    def in_place(*args: Any, **options: Any) -> None:
        a = Arguments.of(args, options)
        if a.params[0].get_device().type == "cpu":
            CppStepNode(op, a)
        else:
            lower_triton_step(op, a)

    def functional(*args: Any, **options: Any) -> tuple[Any, ...]:
        clone = lowerings[torch.ops.aten.clone.default]
        params, grads, *state, hyper = args
        params, state = [clone(p) for p in params], [clone(x) for x in state]
        for x in (*params, *state):
            x.realize()
        in_place(params, grads, *state, hyper, **options)
        return params, *state

    register_lowering(op.in_place, type_promotion_kind=None)(in_place)
    register_lowering(op.functional, type_promotion_kind=None)(functional)


for _op in STEP_OPS.values():
    _lower(_op)

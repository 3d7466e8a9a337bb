"""The optimizer step as an operator: one call takes all parameters of a bucket.

For each rule there are four operators, 8-bit and 32-bit states, in place and functional:

    adam_step_8bit_(params!, grads, exp_avg_codes!, exp_avg_absmax!, ..., step!, hyper) -> ()
    adam_step_8bit(params, grads, exp_avg_codes, exp_avg_absmax, ..., step, hyper)
        -> (params, exp_avg_codes, exp_avg_absmax, ..., step)
    adam_step_32bit_(params!, grads, exp_avg!, exp_avg_sq!, step!, hyper) -> ()
    adam_step_32bit(...)

with n parameters, and

    params   n tensors of one dtype (float32, bfloat16 or float16), any shapes and strides
    grads    n tensors or None, of one dtype; a parameter with None, and all it owns, stays as it is
    states   arenas, see ops/arena.py
    step     (n,) float32, steps taken so far; incremented first
    hyper    (n, h) float64, a row of the rule's hyperparameters for each parameter

`hyper` and `step` are tensors so that neither a schedule nor the count ever recompiles or synchronises;
`hyper` is float64 so that ``1 - beta2`` and the bias corrections have the accuracy that Python numbers
give them. An element whose gradient is NaN, infinite or not below 2**60, where squares come near the end
of float32, keeps its parameter and its states, on every path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rules
from ..rules import Rule
from .arena import BLOCK, Layout, Slot, layout
from .blockwise import dequantize, dynamic_map, quantize
from .library import define

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Elements with a gradient that is not below this magnitude are left alone.
GRAD_LIMIT = 2.0**60


@dataclass(frozen=True)
class StepOp:
    """The step of one rule with one storage format, and its two operators."""

    rule: Rule
    bits: int  # 8 or 32

    @property
    def name(self) -> str:
        """Name of the functional operator; the one in place has a trailing underscore."""
        return f"{self.rule.name}_step_{self.bits}bit"

    @property
    def arenas(self) -> tuple[tuple[str, torch.dtype], ...]:
        """Name and dtype of every arena, in the order of the operator's arguments."""
        if self.bits == 32:
            return tuple((state.name, torch.float32) for state in self.rule.states)
        return tuple(
            (f"{state.name}_{part}", dtype)
            for state in self.rule.states
            for part, dtype in (("codes", torch.uint8), ("absmax", torch.float32))
        )

    def arena_sizes(self, places: Layout) -> Iterator[int]:
        """Length of every arena."""
        for name, _ in self.arenas:
            yield places.blocks if name.endswith("_absmax") else places.elements

    @property
    def in_place(self) -> torch._ops.OpOverload:
        """The operator that updates its arguments."""
        return getattr(torch.ops.bnb_compile, f"{self.name}_").default

    @property
    def functional(self) -> torch._ops.OpOverload:
        """The operator that returns the updated tensors, for export."""
        return getattr(torch.ops.bnb_compile, self.name).default


STEP_OPS = {(rule.name, bits): StepOp(rule, bits) for rule in rules.ALL for bits in (8, 32)}


class Arguments(NamedTuple):
    """A call's arguments, with the arenas gathered."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor | None]
    arenas: Sequence[Tensor]
    step: Tensor
    hyper: Tensor

    @staticmethod
    def of(args: Sequence[Any]) -> Arguments:
        """From the positional arguments of an operator."""
        params, grads, *arenas, step, hyper = args
        return Arguments(params, grads, arenas, step, hyper)


def _mistakes(op: StepOp, a: Arguments) -> Iterator[str]:
    if not a.params or len(a.grads) != len(a.params):
        yield f"{len(a.params)} params and {len(a.grads)} grads; must be equally many, at least one"
        return
    for what, tensors in (("params", a.params), ("grads", a.grads)):
        dtypes = {x.dtype for x in tensors if x is not None}
        if len(dtypes) > 1 or not dtypes <= set(PARAM_DTYPES):
            yield f"{what} are of {dtypes}, must be of one dtype of {PARAM_DTYPES}"
    for k, (param, grad) in enumerate(zip(a.params, a.grads)):
        if grad is not None and grad.shape != param.shape:
            yield f"params[{k}] has shape {tuple(param.shape)}, its grad {tuple(grad.shape)}"
    n, places = len(a.params), layout(param.numel() for param in a.params)
    expected = [
        *((*arena, (size,)) for arena, size in zip(op.arenas, op.arena_sizes(places))),
        ("step", torch.float32, (n,)),
        ("hyper", torch.float64, (n, len(op.rule.hyper._fields))),
    ]
    for (name, dtype, shape), x in zip(expected, (*a.arenas, a.step, a.hyper)):
        if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
            yield (
                f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()}, must be {dtype} {shape}, "
                "contiguous"
            )


def _check(op: StepOp, a: Arguments) -> None:
    for mistake in _mistakes(op, a):
        raise ValueError(f"{op.name}: {mistake}")


def _load(op: StepOp, arenas: Sequence[Tensor], slot: Slot) -> list[Tensor]:
    """A parameter's states, (numel,) float32 each."""
    inside = slice(slot.offset, slot.offset + slot.numel)
    if op.bits == 32:
        return [arena[inside] for arena in arenas]
    scales = slice(slot.block, slot.block + slot.blocks)
    return [
        dequantize(codes[inside], absmax[scales], dynamic_map(state.signed, codes.device).values, BLOCK)
        for state, codes, absmax in zip(op.rule.states, arenas[::2], arenas[1::2])
    ]


def _store(op: StepOp, arenas: Sequence[Tensor], slot: Slot, states: Sequence[Tensor]) -> None:
    inside = slice(slot.offset, slot.offset + slot.numel)
    if op.bits == 32:
        for arena, values in zip(arenas, states):
            arena[inside] = values
        return
    scales = slice(slot.block, slot.block + slot.blocks)
    for state, codes, absmax, values in zip(op.rule.states, arenas[::2], arenas[1::2], states):
        codes[inside], absmax[scales] = quantize(values, dynamic_map(state.signed, codes.device), BLOCK)


def _update(op: StepOp, a: Arguments) -> None:
    """The reference: one parameter after another, in plain torch."""
    for k, slot in enumerate(layout(param.numel() for param in a.params).slots):
        param, grad = a.params[k], a.grads[k]
        if grad is None:
            continue
        a.step[k] += 1
        scalars = op.rule.scalars(op.rule.hyper(*a.hyper[k]), a.step[k].double())
        scalars_f32 = scalars._make(x.float() for x in scalars)
        old = [param.reshape(-1).float(), *_load(op, a.arenas, slot)]
        grad_f32 = grad.reshape(-1).float()
        new = op.rule.update(old[0], grad_f32, *old[1:], scalars_f32)
        usable = grad_f32.abs() < GRAD_LIMIT
        param_f32, *states = (torch.where(usable, n, o) for n, o in zip(new, old))
        param.copy_(param_f32.view(param.shape))
        _store(op, a.arenas, slot, states)


def _register(op: StepOp) -> None:
    def in_place(*args: Any) -> None:
        a = Arguments.of(args)
        _check(op, a)
        _update(op, a)

    def in_place_fake(*args: Any) -> None:
        _check(op, Arguments.of(args))

    def functional(*args: Any) -> tuple[Any, ...]:
        a = Arguments.of(args)
        params, arenas = [x.clone() for x in a.params], [x.clone() for x in a.arenas]
        step = a.step.clone()
        in_place(params, a.grads, *arenas, step, a.hyper)
        return params, *arenas, step

    def functional_fake(*args: Any) -> tuple[Any, ...]:
        a = Arguments.of(args)
        _check(op, a)
        return [torch.empty_like(x) for x in a.params], *map(torch.empty_like, (*a.arenas, a.step))

    written = [*(name for name, _ in op.arenas), "step"]
    mutated = ", ".join(f"Tensor({chr(ord('b') + k)}!) {name}" for k, name in enumerate(written))
    define(
        f"{op.name}_(Tensor(a!)[] params, Tensor?[] grads, {mutated}, Tensor hyper) -> ()",
        in_place,
        in_place_fake,
    )
    tensors = ", ".join(f"Tensor {name}" for name in written)
    results = ", ".join(["Tensor[]", *["Tensor"] * len(written)])
    define(
        f"{op.name}(Tensor[] params, Tensor?[] grads, {tensors}, Tensor hyper) -> ({results})",
        functional,
        functional_fake,
    )


for _op in STEP_OPS.values():
    _register(_op)

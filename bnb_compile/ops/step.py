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
give them. An element whose new states would not be finite (its gradient is NaN or infinite, or its
square overflows) keeps its parameter and its states, on every path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import rules
from ..rules import Rule
from .arena import BLOCK, Layout, Slot, layout
from .blockwise import dequantize, dynamic_map, quantize
from .library import define

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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

    @cached_property
    def in_place(self) -> torch._ops.OpOverload:
        """The operator that updates its arguments."""
        return getattr(torch.ops.bnb_compile, f"{self.name}_").default

    @cached_property
    def functional(self) -> torch._ops.OpOverload:
        """The operator that returns the updated tensors, for export."""
        return getattr(torch.ops.bnb_compile, self.name).default


STEP_OPS = {(rule.name, bits): StepOp(rule, bits) for rule in rules.ALL for bits in (8, 32)}


def _check(
    op: StepOp,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    arenas: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
) -> None:
    def require(condition: bool, message: Callable[[], str]) -> None:
        torch._check_value(condition, lambda: f"{op.name}: {message()}")

    require(len(params) > 0, lambda: "params is empty")
    require(len(grads) == len(params), lambda: f"{len(params)} params, {len(grads)} grads")
    require(
        params[0].dtype in PARAM_DTYPES,
        lambda: f"params must be one of {PARAM_DTYPES}, got {params[0].dtype}",
    )
    present = [grad for grad in grads if grad is not None]
    for what, tensors, allowed in (("params", params, PARAM_DTYPES), ("grads", present, PARAM_DTYPES)):
        found = {t.dtype for t in tensors}
        require(
            len(found) < 2 and found <= set(allowed),
            lambda what=what, found=found: f"{what} must have one dtype of {PARAM_DTYPES}, got {found}",
        )
    for param, grad in zip(params, grads):
        if grad is not None:
            require(
                grad.shape == param.shape,
                lambda p=param, g=grad: f"shapes {tuple(p.shape)} of a param and {tuple(g.shape)} of its grad",
            )
    places = layout(param.numel() for param in params)
    for (name, dtype), size, arena in zip(op.arenas, op.arena_sizes(places), arenas, strict=True):
        require(
            arena.dtype == dtype and arena.shape == (size,),
            lambda n=name, d=dtype, s=size, a=arena: f"{n} must be ({s},) {d}, got {tuple(a.shape)} {a.dtype}",
        )
    n, h = len(params), len(op.rule.hyper._fields)
    require(
        step.shape == (n,) and step.dtype == torch.float32,
        lambda: f"step must be ({n},) float32, got {tuple(step.shape)} {step.dtype}",
    )
    require(
        hyper.shape == (n, h) and hyper.dtype == torch.float64,
        lambda: f"hyper must be ({n}, {h}) float64, got {tuple(hyper.shape)} {hyper.dtype}",
    )


def _load(op: StepOp, arenas: Sequence[Tensor], slot: Slot) -> list[Tensor]:
    """A parameter's states, (numel,) float32 each."""
    inside = slice(slot.offset, slot.offset + slot.numel)
    if op.bits == 32:
        return [arena[inside] for arena in arenas]
    scales = slice(slot.block, slot.block + slot.blocks)
    return [
        dequantize(codes[inside], absmax[scales], _values(state.signed, codes), BLOCK)
        for state, codes, absmax in zip(op.rule.states, arenas[::2], arenas[1::2])
    ]


def _values(signed: bool, like: Tensor) -> Tensor:
    return dynamic_map(signed, like.device).values


def _store(
    op: StepOp, arenas: Sequence[Tensor], slot: Slot, states: Sequence[Tensor]
) -> None:
    inside = slice(slot.offset, slot.offset + slot.numel)
    if op.bits == 32:
        for arena, state in zip(arenas, states):
            arena[inside] = state
        return
    scales = slice(slot.block, slot.block + slot.blocks)
    for kind, codes, absmax, state in zip(op.rule.states, arenas[::2], arenas[1::2], states):
        codes[inside], absmax[scales] = quantize(state, dynamic_map(kind.signed, codes.device), BLOCK)


def _eager(
    op: StepOp,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    arenas: Sequence[Tensor],
    step: Tensor,
    hyper: Tensor,
) -> None:
    rule = op.rule
    for k, slot in enumerate(layout(param.numel() for param in params).slots):
        param, grad = params[k], grads[k]
        if grad is None:
            continue
        step[k] += 1
        scalars = rule.scalars(rule.hyper(*hyper[k]), step[k].double())
        scalars_f32 = type(scalars)(*(s.float() for s in scalars))
        old = [param.reshape(-1).float(), *_load(op, arenas, slot)]
        new = rule.update(old[0], grad.reshape(-1).float(), *old[1:], scalars_f32)
        finite = sum(new[1:]).isfinite()
        param_f32, *states = (torch.where(finite, n, o) for n, o in zip(new, old))
        param.copy_(param_f32.view(param.shape))
        _store(op, arenas, slot, states)


def _register(op: StepOp) -> None:
    count = len(op.arenas)

    def split(args: Sequence) -> tuple:
        params, grads, *arenas = args[: 2 + count]
        return params, grads, arenas, *args[2 + count :]

    def in_place(*args) -> None:
        arguments = split(args)
        _check(op, *arguments)
        _eager(op, *arguments)

    def in_place_fake(*args) -> None:
        _check(op, *split(args))

    def functional(*args) -> tuple:
        params, grads, arenas, step, hyper = split(args)
        copies = [p.clone() for p in params], [a.clone() for a in arenas], step.clone()
        in_place(copies[0], grads, *copies[1], copies[2], hyper)
        return copies[0], *copies[1], copies[2]

    def functional_fake(*args) -> tuple:
        params, grads, arenas, step, hyper = split(args)
        _check(op, *split(args))
        return [torch.empty_like(p) for p in params], *map(torch.empty_like, arenas), torch.empty_like(step)

    names = [name for name, _ in op.arenas]
    marks = iter("abcdefghijklmnop")
    mutated = ", ".join(f"Tensor({next(marks)}!) {name}" for name in (*names, "step"))
    define(
        f"{op.name}_(Tensor({next(marks)}!)[] params, Tensor?[] grads, {mutated}, Tensor hyper) -> ()",
        in_place,
        in_place_fake,
    )
    arguments = ", ".join(f"Tensor {name}" for name in (*names, "step"))
    results = ", ".join(["Tensor[]", *["Tensor"] * (count + 1)])
    define(
        f"{op.name}(Tensor[] params, Tensor?[] grads, {arguments}, Tensor hyper) -> ({results})",
        functional,
        functional_fake,
    )


for _op in STEP_OPS.values():
    _register(_op)

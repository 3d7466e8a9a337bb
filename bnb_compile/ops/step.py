"""The optimizer step as an operator: one call takes all parameters of a bucket.

For each rule there are four operators, 8-bit and 32-bit states, in place and functional:

    adam_step_8bit_(params!, grads, exp_avg_codes!, exp_avg_absmax!, ..., step!, hyper, *, ...) -> ()
    adam_step_8bit(params, grads, exp_avg_codes, exp_avg_absmax, ..., step, hyper, *, ...)
        -> (params, exp_avg_codes, exp_avg_absmax, ..., step)
    adam_step_32bit_(params!, grads, exp_avg!, exp_avg_sq!, step!, hyper, *, ...) -> ()
    adam_step_32bit(...)

with n parameters, and

    params      n tensors of one dtype (float32, bfloat16 or float16), any shapes and strides
    grads       n tensors or None, of one dtype; a parameter with None, and all it owns, stays as it is
    states      arenas, see ops/arena.py
    step        (n,) float32, steps taken so far; incremented first
    hyper       (n, h) float64, a row of the rule's hyperparameters for each parameter

and by keyword

    grad_scale        None or (n,) float32: gradients are multiplied by it. A parameter whose scale is
                      infinite or NaN is treated as one without a gradient
    max_unorm         None or (n,) float32: the trust ratio's limit, see rules/trust.py; 0 is none
    skip_zeros        whether an element whose gradient is zero keeps its parameter and its states
    block_wise        whether each block of 256 elements of an 8-bit state has its own scale; otherwise all
                      blocks of a parameter have the same one
    stochastic_round  whether bfloat16 parameters are rounded up or down by chance, see rules/rounding.py

`hyper` and `step` are tensors so that neither a schedule nor the count ever recompiles or synchronises;
`hyper` is float64 so that ``1 - beta2`` and the bias corrections have the accuracy that Python numbers
give them. An element whose gradient is NaN, infinite or not below 2**60, where squares come near the end
of float32, keeps its parameter and its states, on every path; an 8-bit state may move within its cell, as its
block is encoded anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import rules
from ..rules import Rule, round_bits, trust_ratio
from . import codebook
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

    def bytes_per_param(self, numel: int) -> float:
        """Memory of the states of a parameter, for each of its elements."""
        places = layout([numel])
        sizes = zip(self.arenas, self.arena_sizes(places))
        return sum(size * dtype.itemsize for (_, dtype), size in sizes) / max(numel, 1)

    @property
    def in_place(self) -> torch._ops.OpOverload:
        """The operator that updates its arguments."""
        return getattr(torch.ops.bnb_compile, f"{self.name}_").default

    @property
    def functional(self) -> torch._ops.OpOverload:
        """The operator that returns the updated tensors, for export."""
        return getattr(torch.ops.bnb_compile, self.name).default


STEP_OPS = {
    (rule.name, bits): StepOp(rule, bits)
    for rule in rules.ALL
    for bits in (8, 32)
    if rule.states or bits == 32
}


class Modes(NamedTuple):
    """What a kernel is compiled for, of the arguments that most steps do without."""

    scaled: bool = False  # has grad_scale
    trust: bool = False  # has max_unorm
    skip_zeros: bool = False
    block_wise: bool = True
    stochastic: bool = False  # stochastic_round

    @property
    def two_phases(self) -> bool:
        """Whether something must be known of all elements of a parameter before one is updated."""
        return self.trust or not self.block_wise


class Arguments(NamedTuple):
    """A call's arguments, with the arenas gathered."""

    params: Sequence[Any]
    grads: Sequence[Any]
    arenas: Sequence[Any]
    step: Any
    hyper: Any
    grad_scale: Any = None
    max_unorm: Any = None
    skip_zeros: bool = False
    block_wise: bool = True
    stochastic_round: bool = False

    @staticmethod
    def of(args: Sequence[Any], options: dict[str, Any]) -> Arguments:
        """From the arguments of an operator: tensors, or what a compiler has in their place."""
        params, grads, *arenas, step, hyper = args
        return Arguments(params, grads, arenas, step, hyper, **options)

    @property
    def tensors(self) -> list[Any]:
        """What a kernel takes after parameters and gradients."""
        given = [x for x in (self.grad_scale, self.max_unorm) if x is not None]
        return [*self.arenas, self.step, self.hyper, *given]

    def modes(self, op: StepOp) -> Modes:
        """What is needed of a kernel for `op`."""
        return Modes(
            self.grad_scale is not None,
            self.max_unorm is not None,
            self.skip_zeros,
            self.block_wise or op.bits == 32,
            self.stochastic_round,
        )


def _mistakes(op: StepOp, a: Arguments) -> Iterator[str]:
    if not a.params or len(a.grads) != len(a.params):
        yield f"{len(a.params)} params and {len(a.grads)} grads; must be equally many, at least one"
        return
    for what, tensors in (("params", a.params), ("grads", a.grads)):
        dtypes = {x.dtype for x in tensors if x is not None}
        if len(dtypes) > 1 or not dtypes <= set(PARAM_DTYPES):
            yield f"{what} are of {dtypes}, must be of one dtype of {PARAM_DTYPES}"
    if a.stochastic_round and a.params[0].dtype != torch.bfloat16:
        yield f"stochastic_round of params of {a.params[0].dtype}, must be torch.bfloat16"
    for k, (param, grad) in enumerate(zip(a.params, a.grads)):
        if grad is not None and grad.shape != param.shape:
            yield f"params[{k}] has shape {tuple(param.shape)}, its grad {tuple(grad.shape)}"
    n, places = len(a.params), layout(param.numel() for param in a.params)
    expected = [
        *((*arena, (size,)) for arena, size in zip(op.arenas, op.arena_sizes(places))),
        ("step", torch.float32, (n,)),
        ("hyper", torch.float64, (n, len(op.rule.hyper._fields))),
    ]
    given = [*a.arenas, a.step, a.hyper]
    for name, x in (("grad_scale", a.grad_scale), ("max_unorm", a.max_unorm)):
        if x is not None:
            expected.append((name, torch.float32, (n,)))
            given.append(x)
    for (name, dtype, shape), x in zip(expected, given):
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


def quantize_state(values: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a state.

    They are the nearest ones, but a number above 0 of an unsigned state is not rounded to 0, see
    `codebook.never_zero`.
    """
    codes, absmax = quantize(values, dynamic_map(signed, values.device), block_size)
    if not signed:
        scales = absmax.repeat_interleave(block_size)[: values.numel()]
        codes = codebook.never_zero(codes, torch.where(scales > 0, values, 0.0))
    return codes, absmax


def _store(
    op: StepOp, a: Arguments, slot: Slot, states: Sequence[Tensor], active: Tensor, usable: Tensor
) -> None:
    """Replace a parameter's states, if it is active."""

    def write(place: Tensor, values: Tensor, where: Tensor = active) -> None:
        place.copy_(torch.where(where, values, place))

    inside = slice(slot.offset, slot.offset + slot.numel)
    if op.bits == 32:
        for arena, values in zip(a.arenas, states):
            write(arena[inside], values)
        return
    scales = slice(slot.block, slot.block + slot.blocks)
    block_size = BLOCK if a.block_wise else max(slot.numel, 1)
    touched, of_element = active, active
    if a.skip_zeros and a.block_wise:
        # Encoding a block anew may change it, so one without any gradient is left alone.
        padded = torch.nn.functional.pad(usable, (0, slot.blocks * BLOCK - slot.numel))
        touched = touched & padded.view(-1, BLOCK).any(1)
        of_element = touched.repeat_interleave(BLOCK)[: slot.numel]
    for state, codes, absmax, values in zip(op.rule.states, a.arenas[::2], a.arenas[1::2], states):
        new_codes, new_absmax = quantize_state(values, state.signed, block_size)
        write(codes[inside], new_codes, of_element)
        write(absmax[scales], new_absmax, touched)


def _update(op: StepOp, a: Arguments) -> None:
    """The reference: one parameter after another, in plain torch."""
    for k, slot in enumerate(layout(param.numel() for param in a.params).slots):
        param, grad = a.params[k], a.grads[k]
        if grad is None:
            continue
        scale = a.step.new_ones(()) if a.grad_scale is None else a.grad_scale[k]
        active = scale.isfinite()
        a.step[k] += active
        scalars = op.rule.scalars(op.rule.hyper(*a.hyper[k]), a.step[k].double())
        s = scalars._make(x.float() for x in scalars)
        old = [param.reshape(-1).float(), *_load(op, a.arenas, slot)]
        grad_f32 = grad.reshape(-1).float() * scale
        usable = grad_f32.abs() < GRAD_LIMIT
        if a.skip_zeros:
            usable &= grad_f32 != 0
        if a.max_unorm is not None:
            direction, *_ = op.rule.direction(old[0], grad_f32, *old[1:], s)
            update_norm = scalars.unit * _norm(torch.where(usable, direction, 0.0))
            ratio = trust_ratio(a.max_unorm[k].double(), _norm(old[0]), update_norm)
            s = s._replace(step_size=(scalars.step_size * ratio).float())
        new = list(op.rule.update(old[0], grad_f32, *old[1:], s))
        if a.stochastic_round:
            index = torch.arange(slot.offset, slot.offset + slot.numel, device=param.device).int()
            new[0] = round_bits(new[0].view(torch.int32), index, a.step[k].int()).view(torch.float32)
        param_f32, *states = (torch.where(usable, n, o) for n, o in zip(new, old))
        param.copy_(param_f32.view(param.shape))
        _store(op, a, slot, states, active, usable)


def _norm(x: Tensor) -> Tensor:
    return x.double().square().sum().sqrt()


def _register(op: StepOp) -> None:
    def in_place(*args: Any, **options: Any) -> None:
        a = Arguments.of(args, options)
        _check(op, a)
        _update(op, a)

    def in_place_fake(*args: Any, **options: Any) -> None:
        _check(op, Arguments.of(args, options))

    def functional(*args: Any, **options: Any) -> tuple[Any, ...]:
        a = Arguments.of(args, options)
        params, arenas = [x.clone() for x in a.params], [x.clone() for x in a.arenas]
        step = a.step.clone()
        in_place(params, a.grads, *arenas, step, a.hyper, **options)
        return params, *arenas, step

    def functional_fake(*args: Any, **options: Any) -> tuple[Any, ...]:
        a = Arguments.of(args, options)
        _check(op, a)
        return [torch.empty_like(x) for x in a.params], *map(torch.empty_like, (*a.arenas, a.step))

    options = (
        "*, Tensor? grad_scale=None, Tensor? max_unorm=None, bool skip_zeros=False, bool block_wise=True, "
        "bool stochastic_round=False"
    )
    written = [*(name for name, _ in op.arenas), "step"]
    mutated = ", ".join(f"Tensor({chr(ord('b') + k)}!) {name}" for k, name in enumerate(written))
    define(
        f"{op.name}_(Tensor(a!)[] params, Tensor?[] grads, {mutated}, Tensor hyper, {options}) -> ()",
        in_place,
        in_place_fake,
    )
    tensors = ", ".join(f"Tensor {name}" for name in written)
    results = ", ".join(["Tensor[]", *["Tensor"] * len(written)])
    define(
        f"{op.name}(Tensor[] params, Tensor?[] grads, {tensors}, Tensor hyper, {options}) -> ({results})",
        functional,
        functional_fake,
    )


for _op in STEP_OPS.values():
    _register(_op)

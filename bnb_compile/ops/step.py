"""The optimizer step as an operator: one call takes all parameters of a bucket.

For a rule and a format there are two operators, in place and functional, such as

    adam_step_dynamic8_(params!, grads, dynamic8_codes!, dynamic8_absmax!, step!, hyper, *, ...) -> ()
    adam_step_dynamic8(params, grads, dynamic8_codes, dynamic8_absmax, step, hyper, *, ...)
        -> (params, dynamic8_codes, dynamic8_absmax, step)

with n parameters, and

    params      n tensors of one dtype (float32, bfloat16 or float16), any shapes and strides
    grads       n tensors or None, of one dtype; a parameter with None, and all it owns, stays as it is
    arenas      the states: a row of each for each state of the rule, see formats/arena.py
    step        (n,) int64, steps taken so far; incremented first
    hyper       (n, h) float64, a row of the rule's hyperparameters for each parameter

A third operator, such as adam_step_dynamic8_measure, takes the arguments of the functional one and returns
what a step must know of whole parameters: (n, columns) float64, see `measure`.

and by keyword the `Options` of operator.py. `step_op` makes them when they are first asked for.

`hyper` and `step` are tensors so that neither a schedule nor the count ever recompiles or synchronises;
`hyper` is float64 so that ``1 - beta2`` and the bias corrections have the accuracy that Python numbers
give them. An element whose gradient is NaN, infinite or not below 2**60, where squares come near the end
of float32, keeps its parameter and its states, on every path; an 8-bit state may move within its cell, as its
block is encoded anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..formats import BLOCK, FORMATS, Fresh, Slot, Stored, load_states, store_states, stored_as
from ..formats.trace import check
from ..rules import NEAREST, Rule, noise_of, random_bits, round_bits, trust_ratio
from ..rules.trace import trace_rule
from .library import define
from .operator import Arguments, Options, StepOp, kernel_arguments

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Elements with a gradient that is not below this magnitude are left alone.
GRAD_LIMIT = 2.0**60


def _mistakes(op: StepOp, a: Arguments) -> Iterator[str]:
    if not a.params or len(a.grads) != len(a.params):
        yield f"{len(a.params)} params and {len(a.grads)} grads; must be equally many, at least one"
        return
    for what, tensors in (("params", a.params), ("grads", a.grads)):
        found = {x.dtype for x in tensors if x is not None}
        if len(found) > 1 or not found <= set(PARAM_DTYPES):
            yield f"{what} are of {found}, must be of one dtype of {PARAM_DTYPES}"
    if op.rule.rounds_to not in (None, a.params[0].dtype):
        yield f"params are of {a.params[0].dtype}, must be of {op.rule.rounds_to}, to which the rule rounds"
    yield from a.options.mistakes()
    if op.rule.means and (a.options.max_unorm is not None or not a.options.block_wise):
        yield (
            f"rule {op.rule.name} takes means over a parameter, so that max_unorm must be None and "
            "block_wise True: what those need is known only when the means are"
        )
    if op.has_ratios and not a.options.block_wise:
        yield "block_wise=False with states that are stored as ratios: each of their blocks has its own scale"
    if a.options.stochastic_round and a.params[0].dtype != torch.bfloat16:
        yield f"stochastic_round of params of {a.params[0].dtype}, must be torch.bfloat16"
    device = a.step.device
    for k, (param, grad) in enumerate(zip(a.params, a.grads)):
        if grad is not None and grad.shape != param.shape:
            yield f"params[{k}] has shape {tuple(param.shape)}, its grad {tuple(grad.shape)}"
        if param.device != device or (grad is not None and grad.device != device):
            yield f"params[{k}] or its grad is not on {device}, where step is"
    n, geometry = len(a.params), a.options.geometry
    if geometry is not None:
        if len(geometry) != 3 * n:
            yield f"geometry has {len(geometry)} numbers, must have three for each of {n} params"
            return
        for k, (param, row) in enumerate(zip(a.params, geometry[::3])):
            if row < 0 or (row and param.numel() % row):
                yield f"params[{k}] has {param.numel()} elements, which are no rows of {row}"
                return
    places = a.places()
    shapes = {arena.name: shape for arena, shape in zip(op.arenas, op.shapes(places))}
    shapes["hyper"] = (n, len(op.rule.hyper._fields))
    shapes["totals"] = (n, op.columns)
    dtypes = kernel_arguments(op, a.options.modes)
    for name, x in a.tensors(op).items():
        dtype, shape = dtypes[name], shapes.get(name, (n,))
        if x.dtype != dtype or x.shape != shape or x.device != device or not x.is_contiguous():
            yield (
                f"{name} is {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}, must be "
                f"{dtype} {shape}, contiguous, on {device}"
            )


def _check(op: StepOp, a: Arguments) -> None:
    for mistake in _mistakes(op, a):
        raise ValueError(f"{op.name}: {mistake}")


def parts_of(op: StepOp, arenas: Sequence[Tensor], stored: Stored, slot: Slot) -> dict[str, Tensor]:
    """Views of a parameter's entries of each part in which some of its states are stored."""
    row = op.row(stored)
    of_format = {arena.name: x for arena, x in zip(op.arenas, arenas)}
    return {
        part.name: of_format[f"{stored.format.name}_{part.name}"][row, slot.span(part.per)]
        for part in stored.format.parts
    }


def _load(op: StepOp, arenas: Sequence[Tensor], slot: Slot) -> list[Tensor]:
    """A parameter's states, (numel,) float32 each."""

    def padded(stored: Stored) -> dict[str, Tensor]:
        parts = parts_of(op, arenas, stored, slot)
        return {part.name: slot.padded_part(parts[part.name], part.per) for part in stored.format.parts}

    states = load_states(op.stored, padded, slot.padded_numel)
    return [slot.unpadded(states[k]) for k in range(len(op.rule.states))]


def _store(
    op: StepOp,
    a: Arguments,
    slot: Slot,
    states: Sequence[Tensor],
    active: Tensor,
    usable: Tensor,
    maxima: Tensor | None,
    noise: Tensor | None,
) -> dict[int, Fresh]:
    """Replace a parameter's states, if it is active; returns what has been made of them, padded."""
    touched = active.expand(slot.blocks)
    if a.options.skip_zeros and a.options.block_wise:
        # Encoding a block anew may change it, so one without any gradient is left alone.
        in_rows = slot.padded(usable)
        padded = torch.nn.functional.pad(in_rows, (0, slot.blocks * BLOCK - in_rows.numel()))
        touched = touched & padded.view(-1, BLOCK).any(1)
    of_parameter = None if maxima is None or a.options.block_wise else list(maxima[:, None])
    fresh = store_states(
        op.stored,
        [slot.padded(x) for x in states],
        of_parameter,
        NEAREST if noise is None else slot.padded(noise),
    )
    for stored in op.stored:
        views = parts_of(op, a.arenas, stored, slot)
        for part in stored.format.parts:
            where = touched.repeat_interleave(BLOCK // part.per)
            if part.per == 1:
                where = where[: slot.padded_numel]
            where, entries = (
                slot.unpadded_part(x, part.per) for x in (where, fresh[stored.state].parts[part.name])
            )
            views[part.name].copy_(torch.where(where, entries, views[part.name]))
    return fresh


class _Element(NamedTuple):
    """What the update of a parameter's elements is computed from."""

    param: Tensor  # (numel,) float32, as the others
    grad: Tensor
    states: list[Tensor]
    usable: Tensor
    active: Tensor  # (): whether the parameter is updated at all
    scalars: Any  # float64


def _elements(op: StepOp, a: Arguments, k: int, slot: Slot, steps: Tensor) -> _Element:
    grad_scale = a.options.grad_scale
    scale = a.hyper.new_ones((), dtype=torch.float32) if grad_scale is None else grad_scale[k]
    grad = a.grads[k].reshape(-1).float() * scale
    usable = grad.abs() < GRAD_LIMIT
    if a.options.skip_zeros:
        usable &= grad != 0
    scalars = op.rule.shared(op.rule.hyper(*a.hyper[k]), steps.double())
    param = a.params[k].reshape(-1).float()
    return _Element(param, grad, _load(op, a.arenas, slot), usable, scale.isfinite(), scalars)


def _as_float32(scalars: Any) -> Any:
    return scalars._make(x.float() for x in scalars)


def measure(op: StepOp, a: Arguments) -> Tensor:
    """What a step must know of whole parameters before it updates one.

    Returns:
        Tensor: ``(n, op.columns)`` float64: sums of the squares of the direction and of the parameter; if the
        rule takes means, the number of elements whose gradient is used, and the sums over them; and the
        largest of the formats' magnitudes. Zeros for a parameter without a gradient, and beside means.
    """
    rows = []
    for k, slot in enumerate(a.places().slots):
        row = a.hyper.new_zeros(op.columns)
        if a.grads[k] is not None:
            scale = None if a.options.grad_scale is None else a.options.grad_scale[k].isfinite()
            e = _elements(op, a, k, slot, a.step[k] + (1 if scale is None else scale))
            s = _as_float32(e.scalars)
            if op.rule.means:
                row[2] = e.usable.double().sum()
                for m, (_, number) in enumerate(op.rule.means):
                    numbers = number(e.param, e.grad, *e.states, s)
                    row[3 + m] = torch.where(e.usable, numbers, 0.0).double().sum()
            else:
                moved, *fresh = op.rule.direction(e.param, e.grad, *e.states, s)
                kept = [torch.where(e.usable, new, old) for new, old in zip(fresh, e.states)]
                found = [_squares(torch.where(e.usable, moved, 0.0)), _squares(e.param)]
                for stored in op.stored:
                    magnitudes = (
                        () if stored.over is not None else stored.format.magnitudes(kept[stored.state])
                    )
                    found += [torch.cat([x, x.new_zeros(1)]).amax().double() for x in magnitudes]
                row = torch.stack(found)
        rows.append(row)
    return torch.stack(rows)


def update(op: StepOp, a: Arguments) -> None:
    """The reference: one parameter after another, in plain torch."""
    options = a.options
    totals = measure(op, a) if op.modes(options).two_phases else options.totals
    for k, slot in enumerate(a.places().slots):
        if a.grads[k] is None:
            continue
        active = torch.ones((), dtype=torch.bool, device=a.step.device)
        if options.grad_scale is not None:
            active = options.grad_scale[k].isfinite()
        a.step[k] += active
        e = _elements(op, a, k, slot, a.step[k])
        scalars, s = e.scalars, _as_float32(e.scalars)
        if options.max_unorm is not None:
            update_norm = scalars.unit * totals[k, 0].sqrt()
            options.unorm[k] = torch.where(active, update_norm.square().float(), options.unorm[k])
            ratio = trust_ratio(options.max_unorm[k].double(), totals[k, 1].sqrt(), update_norm)
            s = s._replace(step_size=(scalars.step_size * ratio).float())
        if op.rule.means:
            count = totals[k, 2].clamp(min=1)
            means = [x / count for x in totals[k, 3 : op.sums]]
            s = op.rule.with_measured(s, [x.float() for x in (*means, count)])
        param, *new = op.rule.update(e.param, e.grad, *e.states, s)
        states = [torch.where(e.usable, n, o) for n, o in zip(new, e.states)]
        random = noise = None
        if options.stochastic_round or op.random:
            random = random_bits(slot.indices(e.param.device).int(), a.step[k].int())
            noise = noise_of(random)
        maxima = None if totals is None else totals[k, op.sums :].float()
        fresh = _store(op, a, slot, states, active, e.usable, maxima, noise)
        for stored in op.compensated(op.modes(options), a.params[k].dtype):
            impulse, of_state = op.rule.states[stored.state].impulse, fresh[stored.state]
            assert impulse is not None and of_state.root is not None
            lost, root = slot.unpadded(of_state.lost), slot.unpadded(of_state.root)
            param = param - s.step_size * impulse(lost * root, root, s)
        if options.stochastic_round:
            assert random is not None
            param = round_bits(param.view(torch.int32), random).view(torch.float32)
        param = torch.where(e.usable, param, e.param)
        a.params[k].copy_(param.view(a.params[k].shape))


def _squares(x: Tensor) -> Tensor:
    return x.double().square().sum()


#: By name, in the order in which they were defined: torch does not forget an operator.
_RULES: dict[str, list[Rule]] = {}


@functools.cache
def step_op(rule: Rule, format: str | tuple[Stored, ...]) -> StepOp:
    """The step operator of a rule, registered with torch when it is first asked for.

    Args:
        rule: The algorithm.
        format: Of all its states, one of `formats.FORMATS`; or which states are stored how.

    Raises:
        ValueError: If there is no such format, or a name in the rule cannot be used.
        NotImplementedError: If the rule or a format uses an operation that it may not use.
    """
    if isinstance(format, str):
        if format not in FORMATS:
            raise ValueError(f"Invalid format: {format!r}, must be one of {sorted(FORMATS)}")
        return step_op(rule, stored_as(format, rule.states))
    trace_rule(rule)  # checks it
    check(format)
    of_name = _RULES.setdefault(rule.name, [])
    if rule not in of_name:
        of_name.append(rule)
    op = StepOp(rule, format, of_name.index(rule))
    _register(op)
    return op


def with_scratch(
    options: dict[str, Any], empty_like: Callable[[Any], Any] = torch.empty_like
) -> dict[str, Any]:
    """Options of a functional operator with tensors for what it computes and does not return."""
    max_unorm = options.get("max_unorm")
    return {**options, "unorm": None if max_unorm is None else empty_like(max_unorm)}


def _register(op: StepOp) -> None:
    def in_place(*args: Any, **options: Any) -> None:
        a = Arguments.of(args, options)
        _check(op, a)
        backends.counts["operator"] += 1
        update(op, a)

    def in_place_fake(*args: Any, **options: Any) -> None:
        _check(op, Arguments.of(args, options))

    def functional(*args: Any, **options: Any) -> tuple[Any, ...]:
        a = Arguments.of(args, with_scratch(options))
        params, arenas = [x.clone() for x in a.params], [x.clone() for x in a.arenas]
        step = a.step.clone()
        in_place(params, a.grads, *arenas, step, a.hyper, **a.options.arguments())
        return params, *arenas, step

    def functional_fake(*args: Any, **options: Any) -> tuple[Any, ...]:
        a = Arguments.of(args, with_scratch(options))
        _check(op, a)
        return [torch.empty_like(x) for x in a.params], *map(torch.empty_like, (*a.arenas, a.step))

    def measured(*args: Any, **options: Any) -> Tensor:
        a = Arguments.of(args, with_scratch(options))
        _check(op, a)
        return measure(op, a)

    def measured_fake(*args: Any, **options: Any) -> Tensor:
        a = Arguments.of(args, with_scratch(options))
        _check(op, a)
        return a.hyper.new_empty(len(a.params), op.columns)

    written = [*(arena.name for arena in op.arenas), "step"]
    mutated = ", ".join(f"Tensor({chr(ord('b') + k)}!) {name}" for k, name in enumerate(written))
    define(
        f"{op.name}_(Tensor(a!)[] params, Tensor?[] grads, {mutated}, Tensor hyper, *, "
        f"{Options.schema(mutable=True)}) -> ()",
        in_place,
        in_place_fake,
        op,
    )
    tensors = ", ".join(f"Tensor {name}" for name in written)
    results = ", ".join(["Tensor[]", *["Tensor"] * len(written)])
    define(
        f"{op.name}(Tensor[] params, Tensor?[] grads, {tensors}, Tensor hyper, *, "
        f"{Options.schema(mutable=False)}) -> ({results})",
        functional,
        functional_fake,
        op,
    )
    define(
        f"{op.name}_measure(Tensor[] params, Tensor?[] grads, {tensors}, Tensor hyper, *, "
        f"{Options.schema(mutable=False)}) -> Tensor",
        measured,
        measured_fake,
        op,
    )

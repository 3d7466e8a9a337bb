"""The step operators in eager mode, against every rule written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.buckets import EVERYTHING, EXPANDED, STEP_OPS, STRIDED, Bucket, make
from helpers.formulas import arguments_of, of_rule
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bnb_compile.formats import BLOCK, Slot, layout
from bnb_compile.formats.codebook import create_dynamic_map
from bnb_compile.ops.operator import Modes, StepOp
from bnb_compile.ops.step import GRAD_LIMIT, parts_of, step_op
from bnb_compile.rules import LION

pytestmark = [pytest.mark.usefixtures("nan_filled_empty"), pytest.mark.quick]

BITS = pytest.mark.parametrize("bits", [8, 32])
OPS = pytest.mark.parametrize("op", STEP_OPS.values(), ids=[op.name for op in STEP_OPS.values()])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (255,), (16, 16), (257,), (), (0,), (3, 0), (4097,), (33, 40)]


def adam(bits: int) -> StepOp:
    return STEP_OPS["adam", bits]


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = create_dynamic_map(signed).double()[codes.int()]
    return values * absmax.double().repeat_interleave(BLOCK)[: codes.numel()]


def encode(x: Tensor, signed: bool, block_wise: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest codes, but above 0 never that of 0 if there is no sign; and a scale for each block."""
    code = create_dynamic_map(signed).double()
    blocks = x.split(BLOCK) if x.numel() else []
    absmax = [(block if block_wise else x).abs().max() for block in blocks]
    codes = [
        torch.bucketize(block / scale.clamp(min=1e-30), (code[1:] + code[:-1]) / 2)
        for block, scale in zip(blocks, absmax)
    ]
    if not signed:
        codes = [c.clamp(min=1) * (block > 0) for c, block in zip(codes, blocks)]
    return torch.cat([*codes, x[:0].long()]), torch.stack(absmax) if absmax else x


KNOWN = pytest.mark.parametrize("op", STEP_OPS.values(), ids=[op.name for op in STEP_OPS.values()])


def has_codes(op: StepOp) -> bool:
    return any(part.name == "codes" for stored in op.stored for part in stored.format.parts)


def states_of(op: StepOp, arenas: list[Tensor], slot: Slot) -> list[Tensor]:
    states = []
    for state, stored in zip(op.rule.states, op.stored):
        parts = parts_of(op, arenas, stored, slot)
        if "codes" in parts:
            states.append(decode(parts["codes"], parts["absmax"], not state.nonnegative))
        else:
            states.append(parts["values"].double())
    return states


def reference(op: StepOp, old: Bucket, k: int, slot: Slot) -> tuple[Tensor, list[Tensor]] | None:
    """Parameter k and its states after a step, in float64, as the operator's documentation says."""
    scale = old.options["grad_scale"][k] if "grad_scale" in old.options else torch.ones(())
    if old.grads[k] is None or not scale.isfinite():
        return None
    hyper = dict(zip(op.rule.hyper._fields, old.hyper[k].tolist()))
    limit = old.options["max_unorm"][k].item() if "max_unorm" in old.options else 0.0
    formula = of_rule(op.rule.name)(
        [old.params[k].double().reshape(-1)],
        skip_zeros=old.options["skip_zeros"],
        max_unorm=limit,
        **arguments_of(op.rule.name, hyper),
    )
    formula.steps, formula.states = [old.step[k].item()], [states_of(op, old.arenas, slot)]
    formula.step([old.grads[k].double().reshape(-1) * scale.double()])
    return formula.params[0], formula.states[0]


def assert_is_reference(op: StepOp, old: Bucket, new: Bucket) -> None:
    differ = total = 0
    for k, slot in enumerate(layout(p.numel() for p in old.params).slots):
        expected = reference(op, old, k, slot)
        assert new.step[k] == old.step[k] + (expected is not None)
        if expected is None:
            assert torch.equal(new.params[k], old.params[k])
            continue
        p, states = expected
        # One rounding to the parameter's dtype, which float32 arithmetic can tip; an update may cancel.
        moved = (p - old.params[k].double().reshape(-1)).abs()
        allowed = max(1e-6, torch.finfo(p_dtype := old.params[k].dtype).eps) * (p.abs() + moved) + 1e-7
        error = (new.params[k].reshape(-1).double() - p).abs()
        # Where the gradient and weight decay cancel, rounding is magnified.
        assert (error > allowed).sum() <= 2e-3 * len(p), f"{op.name}, parameter {k} of {p_dtype}"
        assert (error <= 30 * allowed).all(), f"{op.name}, parameter {k} of {p_dtype}"
        for state, stored, x in zip(op.rule.states, op.stored, states):
            parts = parts_of(op, new.arenas, stored, slot)
            if "values" in parts:  # sums may cancel
                largest = x.abs().max().item() if x.numel() else 0.0
                rtol = max(1e-6, torch.finfo(parts["values"].dtype).eps)
                torch.testing.assert_close(parts["values"].double(), x, rtol=rtol, atol=1e-6 * largest)
                continue
            codes, absmax = encode(x, not state.nonnegative, old.options["block_wise"])
            torch.testing.assert_close(parts["absmax"].double(), absmax, rtol=1e-5, atol=1e-9)
            apart = (parts["codes"].int() - codes.int()).abs()
            assert (apart <= 1).all()
            differ += int(apart.sum())
            total += apart.numel()
    assert differ <= max(1, 1e-4 * total)


def stepped(op: StepOp, *args, **kwargs) -> tuple[Bucket, Bucket]:
    """A bucket before and after a step."""
    old, new = make(op, *args, **kwargs), make(op, *args, **kwargs)
    new.call(op.in_place)
    return old, new


@pytest.mark.parametrize(
    "modes", [Modes(), EVERYTHING, Modes(max_unorm=True)], ids=["", "all modes", "trust"]
)
@KNOWN
def test_one_step_is_the_rule_in_float64(op: StepOp, modes: Modes) -> None:
    old, new = stepped(op, [*SHAPES, (300, 20), (500,), (600,), (700,)], modes=modes, without_grad=[3])
    assert_is_reference(op, old, new)


@KNOWN
def test_the_first_step_is_the_rule_in_float64(op: StepOp) -> None:
    assert_is_reference(op, *stepped(op, SHAPES, first=True))


@pytest.mark.parametrize("param_dtype, grad_dtype", [*itertools.product(DTYPES, DTYPES)])
@BITS
def test_one_step_in_every_dtype(bits: int, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    assert_is_reference(adam(bits), *stepped(adam(bits), SHAPES, param_dtype, grad_dtype))


@OPS
def test_nothing_comes_of_zeros(op: StepOp) -> None:
    """Kernels pad the last block of a parameter with them."""
    bucket = make(op, [(1,)])
    shared = op.rule.scalars(op.rule.hyper(*bucket.hyper[0]), torch.tensor(7.0).double())
    zeros = torch.zeros(2 + len(op.rule.states))
    assert not any(op.rule.direction(*zeros, shared))
    assert not any(op.rule.update(*zeros, shared))


# -- the modes -----------------------------------------------------------------------------------------------


def plain_sgd(modes: Modes, count: int = 1) -> Bucket:
    """Its update is the gradient: lr is 1, and there is no weight decay."""
    bucket = make(STEP_OPS["sgd_plain", 32], [(500,)] * count, modes=modes)
    bucket.hyper.copy_(torch.tensor([1.0, 0, 0, 0, 0]))
    return bucket


@pytest.mark.parametrize("max_unorm", [0.0, 1e-3, 0.05, 10.0])
def test_the_trust_ratio_limits_the_norm_of_the_update(max_unorm: float) -> None:
    old, new = plain_sgd(Modes(max_unorm=True)), plain_sgd(Modes(max_unorm=True))
    new.options["max_unorm"].fill_(max_unorm)
    new.call(STEP_OPS["sgd_plain", 32].in_place)
    (before,), (after,), (grad,) = old.params, new.params, old.grads
    if max_unorm in (1e-3, 0.05):
        assert (after - before).norm().item() == pytest.approx(max_unorm * before.norm().item(), rel=1e-4)
        assert torch.cosine_similarity(before - after, grad, 0).item() == pytest.approx(1)
    else:
        assert torch.equal(after, before - grad)


def test_a_zero_parameter_has_no_trust_ratio() -> None:
    bucket = plain_sgd(Modes(max_unorm=True))
    bucket.params[0].zero_()
    bucket.call(STEP_OPS["sgd_plain", 32].in_place)
    assert torch.equal(bucket.params[0], -bucket.grads[0])


def test_only_usable_elements_count_for_the_trust_ratio() -> None:
    old, new = plain_sgd(Modes(max_unorm=True)), plain_sgd(Modes(max_unorm=True))
    new.grads[0][:5] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -GRAD_LIMIT])
    new.call(STEP_OPS["sgd_plain", 32].in_place)
    (before,), (after,) = old.params, new.params
    assert torch.equal(after[:5], before[:5])
    limit = new.options["max_unorm"][0] * before.norm()
    assert limit < old.grads[0][5:].norm()
    assert (after - before)[5:].norm().item() == pytest.approx(limit.item(), rel=1e-4)


def test_decoupled_weight_decay_is_no_part_of_the_trust_ratio() -> None:
    op = STEP_OPS["lion", 32]
    old, new = (make(op, [(500,)], modes=Modes(max_unorm=True)) for _ in range(2))
    for bucket in (old, new):
        bucket.hyper[0] = torch.tensor([0.5, 0.9, 0.99, 0.5])
        bucket.options["max_unorm"].fill_(0.01)
    new.call(op.in_place)
    without_decay = new.params[0] - (1 - 0.5 * 0.5) * old.params[0]
    limit = 0.01 * old.params[0].norm().item()
    assert without_decay.norm().item() == pytest.approx(0.5 * limit, rel=1e-4)


@OPS
def test_skipped_zeros_keep_parameter_and_states(op: StepOp) -> None:
    old, new = stepped(op, [(1000,)], modes=Modes(skip_zeros=True))
    zero = old.grads[0] == 0
    assert 100 < zero.sum() < 300
    assert torch.equal(new.params[0] != old.params[0], ~zero)
    slot = layout([1000]).slots[0]
    for state, before, after in zip(
        op.rule.states, states_of(op, old.arenas, slot), states_of(op, new.arenas, slot)
    ):
        if not has_codes(op):
            assert torch.equal(before[zero], after[zero])
        else:  # within half a cell of the block's new scale
            scale = encode(after, not state.nonnegative)[1].repeat_interleave(BLOCK)[:1000] / 0.99
            assert ((after - before).abs() <= 0.9 / 128 * 1.001 * scale)[zero].all()
        assert (before != after)[~zero].float().mean() > 0.1


@OPS
def test_zeros_are_not_skipped_unless_asked(op: StepOp) -> None:
    bucket = make(op, [(1000,)], modes=Modes(skip_zeros=True))
    old, new = (b._replace(options={}) for b in (bucket, make(op, [(1000,)], modes=Modes(skip_zeros=True))))
    new.call(op.in_place)
    assert (new.params[0] != old.params[0]).float().mean() > 0.9


EIGHT_BIT = [op for op in STEP_OPS.values() if has_codes(op)]


@pytest.mark.parametrize("op", EIGHT_BIT, ids=[op.name for op in EIGHT_BIT])
def test_without_blocks_a_parameter_has_one_scale(op: StepOp) -> None:
    shapes = [(1000,), (40, 30), (0,), (), (256,)]
    _, blocks = stepped(op, shapes)
    _, whole = stepped(op, shapes, modes=Modes(block_wise=False))
    for a, b in zip(whole.params, blocks.params):
        assert torch.equal(a, b)  # computed from the old states
    for slot in layout(math.prod(s) for s in shapes).slots:
        for stored in op.stored:
            absmax, of_blocks = (parts_of(op, b.arenas, stored, slot)["absmax"] for b in (whole, blocks))
            if slot.blocks:
                assert (absmax == of_blocks.max()).all()
                assert slot.blocks == 1 or of_blocks.unique().numel() > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@OPS
def test_a_parameter_whose_scale_is_not_finite_is_left_alone(op: StepOp, bad: float) -> None:
    modes = (
        Modes(grad_scale=True, block_wise=False) if has_codes(op) else Modes(grad_scale=True, max_unorm=True)
    )
    old, new = (make(op, [(300,), (500,), (20,)], modes=modes) for _ in range(2))
    for bucket in (old, new):
        bucket.options["grad_scale"][1] = bad
        bucket.grads[1][::3] = 0
    new.call(op.in_place)
    assert torch.equal(new.step, old.step + torch.tensor([1, 0, 1]))
    assert [torch.equal(a, b) for a, b in zip(new.params, old.params)] == [False, True, False]
    slot = layout([300, 500, 20]).slots[1]
    for arena, a, b in zip(op.arenas, new.arenas, old.arenas):
        span = slot.span(arena.part.per)
        assert torch.equal(a[:, span], b[:, span])
        assert not torch.equal(a[:, : span.start], b[:, : span.start])


@OPS
def test_a_scale_multiplies_the_gradients(op: StepOp) -> None:
    scaled = make(op, [(300,), (40, 9)], modes=Modes(grad_scale=True))
    scaled.options["grad_scale"].copy_(torch.tensor([0.25, 2.0]))
    given = make(op, [(300,), (40, 9)])
    given.grads[:] = [given.grads[0] * 0.25, given.grads[1] * 2]
    scaled.call(op.in_place)
    given.call(op.in_place)
    for a, b in zip([*scaled.params, *scaled.state], [*given.params, *given.state], strict=True):
        assert torch.equal(a, b)


def test_schemas() -> None:
    flags = "bool skip_zeros=False, bool block_wise=True, bool stochastic_round=False, Tensor? totals=None, "
    flags += "int[]? geometry=None"
    limits = "*, Tensor? grad_scale=None, Tensor? max_unorm=None"
    assert str(STEP_OPS["lion", 8].in_place._schema) == (
        "bnb_compile::lion_step_dynamic8_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) dynamic8_codes, "
        f"Tensor(c!) dynamic8_absmax, Tensor(d!) step, Tensor hyper, {limits}, Tensor(o2!)? unorm=None, "
        f"{flags}) -> ()"
    )
    assert str(STEP_OPS["adam_amsgrad", 32].functional._schema) == (
        "bnb_compile::adam_amsgrad_step_float32(Tensor[] params, Tensor?[] grads, Tensor float32_values, "
        f"Tensor step, Tensor hyper, {limits}, {flags}) -> (Tensor[], Tensor, Tensor)"
    )
    assert str(STEP_OPS["sgd_plain", 32].functional._schema) == (
        "bnb_compile::sgd_plain_step(Tensor[] params, Tensor?[] grads, Tensor step, Tensor hyper, "
        f"{limits}, {flags}) -> (Tensor[], Tensor)"
    )


def test_an_operator_is_made_once_and_only_for_formats_that_exist() -> None:
    assert step_op(LION, "dynamic8") is STEP_OPS["lion", 8]
    with pytest.raises(ValueError, match="Invalid format: 'int3', must be one of .*dynamic8"):
        step_op(LION, "int3")


# -- what all rules share ------------------------------------------------------------------------------------


@BITS
def test_what_has_no_gradient_and_what_lies_between_is_not_touched(bits: int) -> None:
    op = adam(bits)
    shapes = [(300,), (5,), (1000,), ()]
    old, new = (make(op, shapes, without_grad=[1, 2]) for _ in range(2))
    new.call(op.in_place)
    slots = layout(math.prod(s) for s in shapes).slots
    assert torch.equal(new.step, old.step + torch.tensor([1, 0, 0, 1]))
    for k in range(4):
        assert torch.equal(new.params[k], old.params[k]) == (k in (1, 2))
    for arena, a, b in zip(op.arenas, new.arenas, old.arenas):
        mine = torch.zeros(a.shape[1], dtype=torch.bool)
        for slot in (slots[0], slots[3]):
            mine[slot.span(arena.part.per)] = True
        assert torch.equal(a[:, ~mine], b[:, ~mine])
        assert (a[:, mine] != b[:, mine]).float().mean() > 0.1


@BITS
def test_only_what_is_declared_mutated_changes(bits: int) -> None:
    op = adam(bits)
    old, new = make(op, SHAPES), make(op, SHAPES)
    new.call(op.in_place)
    torch.testing.assert_close(new.grads, old.grads, rtol=0, atol=0)
    assert torch.equal(new.hyper, old.hyper)


@pytest.mark.parametrize("kind", STRIDED)
@BITS
def test_strides_do_not_matter(bits: int, kind: str) -> None:
    op = adam(bits)
    torch.manual_seed(0)
    params, grads = zip(*[(STRIDED[kind](), STRIDED[kind]())] * 2)
    contiguous = make(op, [p.contiguous() for p in params], grads=[g.contiguous() for g in grads])
    strided = make(op, list(params[:1]) + [params[1].clone()], grads=list(grads))
    addresses = [p.data_ptr() for p in strided.params]
    contiguous.call(op.in_place)
    strided.call(op.in_place)
    assert addresses == [p.data_ptr() for p in strided.params]
    for a, b in zip([*strided.params, *strided.state], [*contiguous.params, *contiguous.state]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", EXPANDED)
def test_expanded_gradients(kind: str) -> None:
    op = adam(8)
    grad = EXPANDED[kind]()
    a, b = (make(op, [grad.shape], grads=[g]) for g in (grad, grad.contiguous()))
    a.call(op.in_place)
    b.call(op.in_place)
    assert torch.equal(a.params[0], b.params[0])


@pytest.mark.parametrize("param_dtype", DTYPES)
@BITS
def test_functional_form_equals_the_one_in_place_and_leaves_its_arguments(
    bits: int, param_dtype: torch.dtype
) -> None:
    op = adam(bits)
    torch.manual_seed(1)
    shapes = [*SHAPES, STRIDED["transposed"]().to(param_dtype)]
    new, same, old = (make(op, [s if isinstance(s, tuple) else s.clone() for s in shapes], param_dtype,
                           without_grad=[3]) for _ in range(3))  # fmt: skip
    new.call(op.in_place)
    params, *state = same.call(op.functional)
    assert len(state) == len(new.state)
    for result, expected in zip([*params, *state], [*new.params, *new.state], strict=True):
        assert result.dtype == expected.dtype and torch.equal(result, expected)
    for result, untouched in zip([*same.params, *same.state], [*old.params, *old.state], strict=True):
        assert torch.equal(result, untouched)
    assert {t.data_ptr() for t in params if t.numel()}.isdisjoint(t.data_ptr() for t in same.params)


#: Rules and modes for torch.library.opcheck, which is slow.
CHECKED = {
    "adam 8": ("adam", 8, Modes()),
    "adam 32": ("adam", 32, Modes()),
    "lamb_amsgrad 8, all modes": ("lamb_amsgrad", 8, EVERYTHING),
    "ademamix 32, trust": ("ademamix", 32, Modes(max_unorm=True)),
    "sgd_plain 32, scaled": ("sgd_plain", 32, Modes(grad_scale=True)),
}


def options_for(bucket: Bucket, form: str) -> dict:
    """The functional form does not return `unorm`, and so takes none."""
    return {k: x for k, x in bucket.options.items() if form == "in_place" or k != "unorm"}


@pytest.mark.long
@pytest.mark.parametrize("form", ["in_place", "functional"])
@pytest.mark.parametrize("case", CHECKED)
def test_opcheck(case: str, form: str) -> None:
    rule, bits, modes = CHECKED[case]
    op = STEP_OPS[rule, bits]
    shapes = [(257,), (), (0,), STRIDED["transposed"](), (3, 5)]
    bucket = make(op, shapes, without_grad=[4], modes=modes)
    torch.library.opcheck(getattr(op, form), bucket.arguments, options_for(bucket, form))
    bucket = make(op, [(300,), (7, 40)], torch.bfloat16, torch.float32, modes=modes)
    torch.library.opcheck(getattr(op, form), bucket.arguments, options_for(bucket, form))


BAD = [math.nan, math.inf, -math.inf, 1e30, -3e38, GRAD_LIMIT]


@pytest.mark.parametrize("bad", BAD)
@OPS
def test_an_element_with_an_unusable_gradient_stays_as_it_is(op: StepOp, bad: float) -> None:
    old, new, clean = (make(op, [(1000,)]) for _ in range(3))
    hit = torch.tensor([0, 300, 301, 999])
    new.grads[0][hit] = bad
    new.call(op.in_place)
    assert torch.equal(new.params[0][hit], old.params[0][hit])
    clean.call(op.in_place)
    others = torch.ones(1000, dtype=torch.bool)
    others[hit] = False
    assert torch.equal(new.params[0][others], clean.params[0][others])
    slot = layout([1000]).slots[0]
    assert all(arena.dtype == torch.uint8 or arena.isfinite().all() for arena in new.arenas)
    for stored, before, after in zip(
        op.stored, states_of(op, old.arenas, slot), states_of(op, new.arenas, slot)
    ):
        if not has_codes(op):
            assert torch.equal(after[hit], before[hit])
        else:  # within half a cell, where another element sets the block's scale
            scale = parts_of(op, new.arenas, stored, slot)["absmax"].repeat_interleave(BLOCK)[hit]
            assert ((after - before).abs()[hit] <= 0.9 / 128 * 1.001 * scale).all()


@OPS
def test_the_largest_usable_gradient_is_used(op: StepOp) -> None:
    old, new = make(op, [(700,)]), make(op, [(700,)])
    new.grads[0].fill_(-GRAD_LIMIT * (1 - 2**-24))
    new.call(op.in_place)
    assert (new.params[0] != old.params[0]).all()
    assert all(x.isfinite().all() for x in (*new.arenas, *new.params))


@OPS
def test_gradients_that_are_all_bad_change_nothing(op: StepOp) -> None:
    for bad in BAD:
        old, new = make(op, [(700,)]), make(op, [(700,)])
        new.grads[0].fill_(bad)
        new.call(op.in_place)
        assert torch.equal(new.params[0], old.params[0])
        slot = layout([700]).slots[0]
        for arena, a, b in zip(op.arenas, new.arenas, old.arenas):
            span = slot.span(arena.part.per)
            a, b = a[:, span], b[:, span]
            if not has_codes(op):
                assert torch.equal(a, b)
            elif arena.part.per > 1:  # the largest code of a random block need not be 255
                assert (a <= b).all()
            assert a.isfinite().all()


def changed(bucket: Bucket, **change) -> tuple[tuple, dict]:
    names = ("params", "grads", "codes", "absmax", "step", "hyper")
    positional = tuple(change.pop(name, value) for name, value in zip(names, bucket.arguments, strict=True))
    return positional, change


WRONG = {
    "no params": (dict(params=[], grads=[]), "0 params"),
    "one grad too few": (dict(grads=[torch.zeros(300)]), "2 params.* 1 grads"),
    "double params": (dict(params=[torch.zeros(300).double(), torch.zeros(7).double()]), "params.*float64"),
    "mixed params": (dict(params=[torch.zeros(300), torch.zeros(7).half()]), "params.*one dtype"),
    "integer grads": (dict(grads=[torch.zeros(300).int(), None]), "grads.*int32"),
    "mixed grads": (dict(grads=[torch.zeros(300), torch.zeros(7).half()]), "grads.*one dtype"),
    "another shape": (dict(grads=[torch.zeros(300), torch.zeros(1)]), r"\(7,\).*\(1,\)"),
    "broadcastable": (dict(grads=[torch.zeros(300), torch.zeros(7, 1)]), r"\(7, 1\)"),
    "short codes": (dict(codes=torch.zeros(2, 300, dtype=torch.uint8)), r"dynamic8_codes .*\(2, 300\)"),
    "one row of codes": (dict(codes=torch.zeros(320, dtype=torch.uint8)), r"dynamic8_codes .*\(320,\)"),
    "long absmax": (dict(absmax=torch.zeros(2, 99)), r"dynamic8_absmax .*\(2, 99\).*\(2, 16\)"),
    "codes of the wrong dtype": (dict(codes=torch.zeros(2, 320)), "dynamic8_codes .*float32.*uint8"),
    "absmax of the wrong dtype": (dict(absmax=torch.zeros(2, 16).half()), "dynamic8_absmax .*float16"),
    "absmax elsewhere": (dict(absmax=torch.zeros(2, 16, device="meta")), "dynamic8_absmax .*meta"),
    "one step": (dict(step=torch.zeros((), dtype=torch.int64)), r"step .*\(2,\)"),
    "float step": (dict(step=torch.zeros(2)), "step .*float32.*int64"),
    "one row of hyper": (dict(hyper=torch.zeros(5, dtype=torch.float64)), r"hyper .*\(5,\).*\(2, 5\)"),
    "float hyper": (dict(hyper=torch.zeros(2, 5)), "hyper .*float32.*float64"),
    "one grad_scale": (dict(grad_scale=torch.ones(())), r"grad_scale .*\(2,\)"),
    "double grad_scale": (dict(grad_scale=torch.ones(2).double()), "grad_scale .*float64.*float32"),
    "a column of max_unorm": (
        dict(max_unorm=torch.ones(2, 1), unorm=torch.ones(2)),
        r"max_unorm .*\(2, 1\).*",
    ),
    "every other max_unorm": (
        dict(max_unorm=torch.ones(4)[::2], unorm=torch.ones(2)),
        r"max_unorm .*contiguous",
    ),
    "max_unorm alone": (dict(max_unorm=torch.ones(2)), "unorm must be given with max_unorm"),
    "unorm alone": (dict(unorm=torch.ones(2)), "unorm must be given with max_unorm"),
}


@pytest.mark.parametrize("form", ["in_place", "functional"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named_and_change_nothing(what: str, form: str) -> None:
    op = adam(8)
    change, message = WRONG[what]
    bucket, old = make(op, [(300,), (7,)]), make(op, [(300,), (7,)])
    arguments, options = changed(bucket, **change)
    if form == "functional":
        if "unorm" in what or "max_unorm alone" == what:
            pytest.skip("the functional form makes it itself")
        options.pop("unorm", None)
    with pytest.raises(ValueError, match=message):
        getattr(op, form)(*arguments, **options)
    torch.testing.assert_close(bucket.arguments, old.arguments, rtol=0, atol=0)
    with pytest.raises(ValueError, match=message):
        with FakeTensorMode(allow_non_fake_inputs=True):
            getattr(op, form)(*arguments, **options)


def test_default_dtype_and_device_do_not_matter() -> None:
    for bits in (8, 32):
        op = adam(bits)
        expected, actual = make(op, SHAPES), make(op, SHAPES)
        expected.call(op.in_place)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                actual.call(op.in_place)
        finally:
            torch.set_default_dtype(dtype)
        torch.testing.assert_close(actual.arguments, expected.arguments, rtol=0, atol=0)

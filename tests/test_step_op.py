"""The step operators in eager mode, against every rule written out in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from buckets import EVERYTHING, EXPANDED, STRIDED, Bucket, make
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bnb_compile.ops.arena import BLOCK, Slot, layout
from bnb_compile.ops.codebook import create_dynamic_map
from bnb_compile.ops.step import GRAD_LIMIT, STEP_OPS, Modes, StepOp

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

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


# -- the rules, as papers and torch.optim write them ---------------------------------------------------------
#
# Each takes a parameter, its gradient, the number of the step, the hyperparameters and the states, and
# returns the update before the learning rate and the new states.


def _moments(g: Tensor, m: Tensor, v: Tensor, h: SimpleNamespace) -> tuple[Tensor, Tensor]:
    return h.beta1 * m + (1 - h.beta1) * g, h.beta2 * v + (1 - h.beta2) * g**2


def _adam(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, *states: Tensor, correct: bool = True) -> tuple:
    m, v = _moments(g, *states[:2], h)
    fresh = (m, v) if len(states) == 2 else (m, v, torch.maximum(states[2], v))
    c1, c2 = (1 - h.beta1**t, 1 - h.beta2**t) if correct else (1, 1)
    return (m / c1) / ((fresh[-1] / c2).sqrt() + h.eps), *fresh


def _lamb(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, *states: Tensor) -> tuple:
    g = g if h.adam_w_mode else g + h.weight_decay * p
    return _adam(p, g, t, h, *states, correct=bool(h.bias_correction))


def _ademamix(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, *states: Tensor) -> tuple:
    m, v = _moments(g, *states[:2], h)
    alpha, beta3 = h.alpha, h.beta3
    if h.t_alpha:
        alpha = min(t * alpha / h.t_alpha, alpha)
    if h.t_beta3:
        a, b, s = math.log(h.beta1), math.log(h.beta3), t / h.t_beta3
        beta3 = min(math.exp(a * b / ((1 - s) * b + s * a)), beta3)
    slow = beta3 * states[2] + (1 - beta3) * g
    root = (v / (1 - h.beta2**t)).sqrt() + h.eps
    return (m / (1 - h.beta1**t) + alpha * slow) / root, m, v, slow


def _lion(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, m: Tensor) -> tuple:
    return torch.sign(h.beta1 * m + (1 - h.beta1) * g), h.beta2 * m + (1 - h.beta2) * g


def _sgd(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, *states: Tensor) -> tuple:
    g = g + h.weight_decay * p
    if not states:
        return (g,)
    m = g if t == 1 else h.momentum * states[0] + (1 - h.dampening) * g
    return g + h.momentum * m if h.nesterov else m, m


def _rmsprop(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, v: Tensor, *momentum: Tensor) -> tuple:
    g = g + h.weight_decay * p
    v = h.alpha * v + (1 - h.alpha) * g**2
    u = g / (v.sqrt() + h.eps)
    if momentum:
        u = h.momentum * momentum[0] + u
    return (u, v, u) if momentum else (u, v)


def _rmsprop_centered(
    p: Tensor, g: Tensor, t: float, h: SimpleNamespace, variance: Tensor, mean: Tensor, *momentum: Tensor
) -> tuple:
    g = g + h.weight_decay * p
    squares = h.alpha * (variance + mean**2) + (1 - h.alpha) * g**2
    mean = h.alpha * mean + (1 - h.alpha) * g
    variance = squares - mean**2
    u = g / (variance.sqrt() + h.eps)
    if momentum:
        u = h.momentum * momentum[0] + u
    return (u, variance, mean, u) if momentum else (u, variance, mean)


def _adagrad(p: Tensor, g: Tensor, t: float, h: SimpleNamespace, total: Tensor) -> tuple:
    g = g + h.weight_decay * p
    total = total + g**2
    return g / (total.sqrt() + h.eps), total


#: Update, and whether weight decay is decoupled (LAMB: where it has adam_w_mode). An algorithm that is not
#: here is compared with the formula in its opt_*.py, by test_optimizers.py.
RULES: dict[str, tuple[Callable[..., tuple], bool]] = {
    "adam": (_adam, True),
    "adam_amsgrad": (_adam, True),
    "lamb": (_lamb, True),
    "lamb_amsgrad": (_lamb, True),
    "ademamix": (_ademamix, True),
    "lion": (_lion, True),
    "sgd": (_sgd, False),
    "sgd_plain": (_sgd, False),
    "rmsprop": (_rmsprop, False),
    "rmsprop_momentum": (_rmsprop, False),
    "rmsprop_centered": (_rmsprop_centered, False),
    "rmsprop_centered_momentum": (_rmsprop_centered, False),
    "adagrad": (_adagrad, False),
}


KNOWN = pytest.mark.parametrize(
    "op", [op for op in STEP_OPS.values() if op.rule.name in RULES], ids=lambda op: op.name
)


def states_of(op: StepOp, arenas: list[Tensor], slot: Slot) -> list[Tensor]:
    inside = slice(slot.offset, slot.offset + slot.numel)
    scales = slice(slot.block, slot.block + slot.blocks)
    if op.bits == 32:
        return [arena[inside].double() for arena in arenas]
    pairs = zip(op.rule.states, arenas[::2], arenas[1::2])
    return [decode(codes[inside], absmax[scales], state.signed) for state, codes, absmax in pairs]


def reference(op: StepOp, old: Bucket, k: int, slot: Slot) -> tuple[Tensor, list[Tensor]] | None:
    """Parameter k and its states after a step, in float64, as the operator's documentation says."""
    update, decoupled = RULES[op.rule.name]
    h = SimpleNamespace(**dict(zip(op.rule.hyper._fields, old.hyper[k].tolist())))
    t = old.step[k].item() + 1
    p, states = old.params[k].double().reshape(-1), states_of(op, old.arenas, slot)
    scale = old.options["grad_scale"][k] if "grad_scale" in old.options else torch.ones(())
    if old.grads[k] is None or not scale.isfinite():
        return None
    g = old.grads[k].double().reshape(-1) * scale.double()
    used = g.abs() < GRAD_LIMIT
    if old.options["skip_zeros"]:
        used &= g != 0
    u, *fresh = update(p, g, t, h, *states)
    ratio = 1.0
    if "max_unorm" in old.options:
        limit, norm = old.options["max_unorm"][k].double() * p.norm(), u[used].norm()
        ratio = limit / norm if 0 < limit < norm else 1.0
    lr = h.lr / (1 + (t - 1) * getattr(h, "lr_decay", 0))
    decoupled = decoupled and getattr(h, "adam_w_mode", True)
    decayed = p - h.lr * h.weight_decay * p if decoupled else p
    kept = zip([decayed - lr * ratio * u, *fresh], [p, *states])
    p, *fresh = (torch.where(used, new, before) for new, before in kept)
    return p, fresh


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
        wrong = (new.params[k].reshape(-1).double() - p).abs() > allowed
        assert not wrong.any(), f"{op.name}, parameter {k} of {p_dtype}: {int(wrong.sum())} elements"
        inside = slice(slot.offset, slot.offset + slot.numel)
        scales = slice(slot.block, slot.block + slot.blocks)
        for i, (state, x) in enumerate(zip(op.rule.states, states)):
            if op.bits == 32:  # sums may cancel
                largest = x.abs().max().item() if x.numel() else 0.0
                torch.testing.assert_close(new.arenas[i][inside].double(), x, rtol=1e-6, atol=1e-6 * largest)
                continue
            codes, absmax = encode(x, state.signed, old.options["block_wise"])
            torch.testing.assert_close(new.arenas[2 * i + 1][scales].double(), absmax, rtol=1e-5, atol=1e-9)
            apart = (new.arenas[2 * i][inside].int() - codes.int()).abs()
            assert (apart <= 1).all()
            differ += int(apart.sum())
            total += apart.numel()
    assert differ <= max(1, 1e-4 * total)


def stepped(op: StepOp, *args, **kwargs) -> tuple[Bucket, Bucket]:
    """A bucket before and after a step."""
    old, new = make(op, *args, **kwargs), make(op, *args, **kwargs)
    new.call(op.in_place)
    return old, new


@pytest.mark.parametrize("modes", [Modes(), EVERYTHING, Modes(trust=True)], ids=["", "all modes", "trust"])
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
    old, new = plain_sgd(Modes(trust=True)), plain_sgd(Modes(trust=True))
    new.options["max_unorm"].fill_(max_unorm)
    new.call(STEP_OPS["sgd_plain", 32].in_place)
    (before,), (after,), (grad,) = old.params, new.params, old.grads
    if max_unorm in (1e-3, 0.05):
        assert (after - before).norm().item() == pytest.approx(max_unorm * before.norm().item(), rel=1e-4)
        assert torch.cosine_similarity(before - after, grad, 0).item() == pytest.approx(1)
    else:
        assert torch.equal(after, before - grad)


def test_a_zero_parameter_has_no_trust_ratio() -> None:
    bucket = plain_sgd(Modes(trust=True))
    bucket.params[0].zero_()
    bucket.call(STEP_OPS["sgd_plain", 32].in_place)
    assert torch.equal(bucket.params[0], -bucket.grads[0])


def test_only_usable_elements_count_for_the_trust_ratio() -> None:
    old, new = plain_sgd(Modes(trust=True)), plain_sgd(Modes(trust=True))
    new.grads[0][:5] = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -GRAD_LIMIT])
    new.call(STEP_OPS["sgd_plain", 32].in_place)
    (before,), (after,) = old.params, new.params
    assert torch.equal(after[:5], before[:5])
    limit = new.options["max_unorm"][0] * before.norm()
    assert limit < old.grads[0][5:].norm()
    assert (after - before)[5:].norm().item() == pytest.approx(limit.item(), rel=1e-4)


def test_decoupled_weight_decay_is_no_part_of_the_trust_ratio() -> None:
    op = STEP_OPS["lion", 32]
    old, new = (make(op, [(500,)], modes=Modes(trust=True)) for _ in range(2))
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
        if op.bits == 32:
            assert torch.equal(before[zero], after[zero])
        else:  # within half a cell of the block's new scale
            scale = encode(after, state.signed)[1].repeat_interleave(BLOCK)[:1000] / 0.99
            assert ((after - before).abs() <= 0.9 / 128 * 1.001 * scale)[zero].all()
        assert (before != after)[~zero].float().mean() > 0.1


@OPS
def test_zeros_are_not_skipped_unless_asked(op: StepOp) -> None:
    bucket = make(op, [(1000,)], modes=Modes(skip_zeros=True))
    old, new = (b._replace(options={}) for b in (bucket, make(op, [(1000,)], modes=Modes(skip_zeros=True))))
    new.call(op.in_place)
    assert (new.params[0] != old.params[0]).float().mean() > 0.9


EIGHT_BIT = [op for op in STEP_OPS.values() if op.bits == 8]


@pytest.mark.parametrize("op", EIGHT_BIT, ids=[op.name for op in EIGHT_BIT])
def test_without_blocks_a_parameter_has_one_scale(op: StepOp) -> None:
    shapes = [(1000,), (40, 30), (0,), (), (256,)]
    _, blocks = stepped(op, shapes)
    _, whole = stepped(op, shapes, modes=Modes(block_wise=False))
    for a, b in zip(whole.params, blocks.params):
        assert torch.equal(a, b)  # computed from the old states
    for slot in layout(math.prod(s) for s in shapes).slots:
        scales = slice(slot.block, slot.block + slot.blocks)
        for absmax, of_blocks in zip(whole.arenas[1::2], blocks.arenas[1::2]):
            if slot.blocks:
                assert (absmax[scales] == of_blocks[scales].max()).all()
                assert slot.blocks == 1 or of_blocks[scales].unique().numel() > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@OPS
def test_a_parameter_whose_scale_is_not_finite_is_left_alone(op: StepOp, bad: float) -> None:
    modes = Modes(scaled=True, block_wise=False) if op.bits == 8 else Modes(scaled=True, trust=True)
    old, new = (make(op, [(300,), (500,), (20,)], modes=modes) for _ in range(2))
    for bucket in (old, new):
        bucket.options["grad_scale"][1] = bad
        bucket.grads[1][::3] = 0
    new.call(op.in_place)
    assert torch.equal(new.step, old.step + torch.tensor([1.0, 0, 1]))
    assert [torch.equal(a, b) for a, b in zip(new.params, old.params)] == [False, True, False]
    slot = layout([300, 500, 20]).slots[1]
    for (name, _), a, b in zip(op.arenas, new.arenas, old.arenas):
        first, count = (slot.block, slot.blocks) if name.endswith("absmax") else (slot.offset, slot.numel)
        assert torch.equal(a[first : first + count], b[first : first + count])
        assert not torch.equal(a[:first], b[:first])


@OPS
def test_a_scale_multiplies_the_gradients(op: StepOp) -> None:
    scaled = make(op, [(300,), (40, 9)], modes=Modes(scaled=True))
    scaled.options["grad_scale"].copy_(torch.tensor([0.25, 2.0]))
    given = make(op, [(300,), (40, 9)])
    given.grads[:] = [given.grads[0] * 0.25, given.grads[1] * 2]
    scaled.call(op.in_place)
    given.call(op.in_place)
    for a, b in zip([*scaled.params, *scaled.state], [*given.params, *given.state], strict=True):
        assert torch.equal(a, b)


def test_schemas() -> None:
    options = (
        "*, Tensor? grad_scale=None, Tensor? max_unorm=None, bool skip_zeros=False, bool block_wise=True, "
        "bool stochastic_round=False"
    )
    assert str(STEP_OPS["lion", 8].in_place._schema) == (
        "bnb_compile::lion_step_8bit_(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) exp_avg_codes, "
        f"Tensor(c!) exp_avg_absmax, Tensor(d!) step, Tensor hyper, {options}) -> ()"
    )
    assert str(STEP_OPS["adam_amsgrad", 32].functional._schema) == (
        "bnb_compile::adam_amsgrad_step_32bit(Tensor[] params, Tensor?[] grads, Tensor exp_avg, "
        f"Tensor exp_avg_sq, Tensor max_exp_avg_sq, Tensor step, Tensor hyper, {options}) "
        "-> (Tensor[], Tensor, Tensor, Tensor, Tensor)"
    )
    assert str(STEP_OPS["sgd_plain", 32].functional._schema) == (
        "bnb_compile::sgd_plain_step_32bit(Tensor[] params, Tensor?[] grads, Tensor step, Tensor hyper, "
        f"{options}) -> (Tensor[], Tensor)"
    )
    assert ("sgd_plain", 8) not in STEP_OPS
    assert {rule for rule, _ in STEP_OPS} >= RULES.keys()


# -- what all rules share ------------------------------------------------------------------------------------


@BITS
def test_what_has_no_gradient_and_what_lies_between_is_not_touched(bits: int) -> None:
    op = adam(bits)
    shapes = [(300,), (5,), (1000,), ()]
    old, new = (make(op, shapes, without_grad=[1, 2]) for _ in range(2))
    new.call(op.in_place)
    slots = layout(math.prod(s) for s in shapes).slots
    assert torch.equal(new.step, old.step + torch.tensor([1.0, 0, 0, 1]))
    for k in range(4):
        assert torch.equal(new.params[k], old.params[k]) == (k in (1, 2))
    for (name, _), a, b in zip(op.arenas, new.arenas, old.arenas):
        mine = torch.zeros(len(a), dtype=torch.bool)
        for slot in (slots[0], slots[3]):
            if name.endswith("absmax"):
                mine[slot.block : slot.block + slot.blocks] = True
            else:
                mine[slot.offset : slot.offset + slot.numel] = True
        assert torch.equal(a[~mine], b[~mine])
        assert (a[mine] != b[mine]).float().mean() > 0.1


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
    "ademamix 32, trust": ("ademamix", 32, Modes(trust=True)),
    "sgd_plain 32, scaled": ("sgd_plain", 32, Modes(scaled=True)),
}


@pytest.mark.parametrize("form", ["in_place", "functional"])
@pytest.mark.parametrize("case", CHECKED)
def test_opcheck(case: str, form: str) -> None:
    rule, bits, modes = CHECKED[case]
    op = STEP_OPS[rule, bits]
    shapes = [(257,), (), (0,), STRIDED["transposed"](), (3, 5)]
    bucket = make(op, shapes, without_grad=[4], modes=modes)
    torch.library.opcheck(getattr(op, form), bucket.arguments, bucket.options)
    bucket = make(op, [(300,), (7, 40)], torch.bfloat16, torch.float32, modes=modes)
    torch.library.opcheck(getattr(op, form), bucket.arguments, bucket.options)


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
    for arena, before in zip(new.arenas, old.arenas):
        assert arena.dtype == torch.uint8 or arena.isfinite().all()
        if op.bits == 32:
            assert torch.equal(arena[hit], before[hit])
    if op.bits == 8:  # within half a cell, where another element sets the block's scale
        for i, state in enumerate(op.rule.states):
            after, before = (
                decode(b.arenas[2 * i][:1000], b.arenas[2 * i + 1], state.signed)[hit] for b in (new, old)
            )
            scale = new.arenas[2 * i + 1].repeat_interleave(BLOCK)[hit]
            assert ((after - before).abs() <= 0.9 / 128 * 1.001 * scale).all()


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
        for (name, _), a, b in zip(op.arenas, new.arenas, old.arenas):
            if op.bits == 32:
                assert torch.equal(a, b)
            elif name.endswith("absmax"):  # the largest code of a random block need not be 255
                assert (a <= b).all() and a.isfinite().all()
            assert a[: slot.numel].isfinite().all()


def changed(bucket: Bucket, **change) -> tuple[tuple, dict]:
    names = ("params", "grads", "m_codes", "m_absmax", "v_codes", "v_absmax", "step", "hyper")
    positional = tuple(change.pop(name, value) for name, value in zip(names, bucket.arguments, strict=True))
    assert set(change) <= {"grad_scale", "max_unorm"}
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
    "short codes": (dict(m_codes=torch.zeros(300, dtype=torch.uint8)), r"exp_avg_codes .*\(300,\)"),
    "long absmax": (dict(m_absmax=torch.zeros(9)), r"exp_avg_absmax .*\(9,\).*\(3,\)"),
    "codes of the wrong dtype": (dict(v_codes=torch.zeros(320)), "exp_avg_sq_codes .*float32.*uint8"),
    "absmax of the wrong dtype": (dict(v_absmax=torch.zeros(3).half()), "exp_avg_sq_absmax .*float16"),
    "one step": (dict(step=torch.zeros(())), r"step .*\(2,\)"),
    "integer step": (dict(step=torch.zeros(2, dtype=torch.int64)), "step .*int64.*float32"),
    "one row of hyper": (dict(hyper=torch.zeros(5, dtype=torch.float64)), r"hyper .*\(5,\).*\(2, 5\)"),
    "float hyper": (dict(hyper=torch.zeros(2, 5)), "hyper .*float32.*float64"),
    "one grad_scale": (dict(grad_scale=torch.ones(())), r"grad_scale .*\(2,\)"),
    "double grad_scale": (dict(grad_scale=torch.ones(2).double()), "grad_scale .*float64.*float32"),
    "a column of max_unorm": (dict(max_unorm=torch.ones(2, 1)), r"max_unorm .*\(2, 1\).*\(2,\)"),
    "every other max_unorm": (dict(max_unorm=torch.ones(4)[::2]), r"max_unorm .*\(2,\).*contiguous"),
}


@pytest.mark.parametrize("form", ["in_place", "functional"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named_and_change_nothing(what: str, form: str) -> None:
    op = adam(8)
    change, message = WRONG[what]
    bucket, old = make(op, [(300,), (7,)]), make(op, [(300,), (7,)])
    arguments, options = changed(bucket, **change)
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

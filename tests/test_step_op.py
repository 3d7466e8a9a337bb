"""The step operators in eager mode, against Adam written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from buckets import EXPANDED, STRIDED, Bucket, make
from torch import Tensor
from torch._subclasses import FakeTensorMode

from bnb_compile.ops.arena import BLOCK, layout
from bnb_compile.ops.codebook import create_dynamic_map
from bnb_compile.ops.step import GRAD_LIMIT, STEP_OPS, StepOp

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

BITS = pytest.mark.parametrize("bits", [8, 32])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = [(1,), (255,), (16, 16), (257,), (), (0,), (3, 0), (4097,), (33, 40)]


def adam(bits: int) -> StepOp:
    return STEP_OPS["adam", bits]


def decode(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    values = create_dynamic_map(signed).double()[codes.int()]
    return values * absmax.double().repeat_interleave(BLOCK)[: codes.numel()]


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    code = create_dynamic_map(signed).double()
    codes, scales = [], []
    for block in x.split(BLOCK) if x.numel() else []:
        scales.append(block.abs().max())
        codes.append(((block / scales[-1])[:, None] - code).abs().argmin(1).to(torch.uint8))
    return (torch.cat(codes), torch.stack(scales)) if codes else (x.to(torch.uint8), x)


def adam_float64(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: float, hyper: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """AdamW as torch documents it: decay first, `eps` added to the corrected root."""
    lr, beta1, beta2, eps, weight_decay = hyper.tolist()
    p = p - lr * weight_decay * p
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    return p - lr * m_hat / (v_hat.sqrt() + eps), m, v


@pytest.mark.parametrize("param_dtype, grad_dtype", [*itertools.product(DTYPES, DTYPES)])
@BITS
def test_one_step_is_adam_in_float64(bits: int, param_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    op = adam(bits)
    shapes = [*SHAPES, (300, 200)] if param_dtype == grad_dtype == torch.float32 else SHAPES
    old = make(op, shapes, param_dtype, grad_dtype)
    new = make(op, shapes, param_dtype, grad_dtype)
    op.in_place(*new.arguments)
    assert torch.equal(new.step, old.step + 1)
    differ = total = 0
    for k, slot in enumerate(layout(p.numel() for p in old.params).slots):
        inside = slice(slot.offset, slot.offset + slot.numel)
        scales = slice(slot.block, slot.block + slot.blocks)
        p, g = (t.double().reshape(-1) for t in (old.params[k], old.grads[k]))
        if bits == 8:
            m, v = (decode(old.arenas[2 * i][inside], old.arenas[2 * i + 1][scales], i == 0) for i in (0, 1))
        else:
            m, v = (arena[inside].double() for arena in old.arenas)
        p, *moments = adam_float64(p, g, m, v, old.step[k].item() + 1, old.hyper[k])
        # One rounding to the parameter's dtype, which float32 arithmetic can tip.
        tolerance = max(1e-6, torch.finfo(param_dtype).eps)
        torch.testing.assert_close(
            new.params[k].reshape(-1).double(), p, rtol=tolerance, atol=1e-7, msg=lambda m, k=k: f"{k}: {m}"
        )
        for i, x in enumerate(moments):
            if bits == 32:
                torch.testing.assert_close(
                    new.arenas[i][inside].double(), x, rtol=1e-6, atol=2e-8
                )  # moments may cancel
                continue
            codes, absmax = encode(x, signed=i == 0)
            torch.testing.assert_close(new.arenas[2 * i + 1][scales].double(), absmax, rtol=1e-5, atol=1e-9)
            apart = (new.arenas[2 * i][inside].int() - codes.int()).abs()
            assert (apart <= 1).all()
            differ += int(apart.sum())
            total += apart.numel()
    assert differ <= max(1, 1e-4 * total)


@BITS
def test_what_has_no_gradient_and_what_lies_between_is_not_touched(bits: int) -> None:
    op = adam(bits)
    shapes = [(300,), (5,), (1000,), ()]
    old, new = (make(op, shapes, without_grad=[1, 2]) for _ in range(2))
    op.in_place(*new.arguments)
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
    op.in_place(*new.arguments)
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
    op.in_place(*contiguous.arguments)
    op.in_place(*strided.arguments)
    assert addresses == [p.data_ptr() for p in strided.params]
    for a, b in zip([*strided.params, *strided.state], [*contiguous.params, *contiguous.state]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", EXPANDED)
def test_expanded_gradients(kind: str) -> None:
    op = adam(8)
    grad = EXPANDED[kind]()
    a, b = (make(op, [grad.shape], grads=[g]) for g in (grad, grad.contiguous()))
    op.in_place(*a.arguments)
    op.in_place(*b.arguments)
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
    op.in_place(*new.arguments)
    params, *state = op.functional(*same.arguments)
    assert len(state) == len(new.state)
    for result, expected in zip([*params, *state], [*new.params, *new.state], strict=True):
        assert result.dtype == expected.dtype and torch.equal(result, expected)
    for result, untouched in zip([*same.params, *same.state], [*old.params, *old.state], strict=True):
        assert torch.equal(result, untouched)
    assert {t.data_ptr() for t in params if t.numel()}.isdisjoint(t.data_ptr() for t in same.params)


@pytest.mark.parametrize("form", ["in_place", "functional"])
@BITS
def test_opcheck(bits: int, form: str) -> None:
    op = adam(bits)
    shapes = [(257,), (), (0,), STRIDED["transposed"](), (3, 5)]
    bucket = make(op, shapes, without_grad=[4])
    torch.library.opcheck(getattr(op, form), bucket.arguments)
    bucket = make(op, [(300,), (7, 40)], torch.bfloat16, torch.float32)
    torch.library.opcheck(getattr(op, form), bucket.arguments)


BAD = [math.nan, math.inf, -math.inf, 1e30, -3e38, GRAD_LIMIT]


@pytest.mark.parametrize("bad", BAD)
@BITS
def test_an_element_with_an_unusable_gradient_stays_as_it_is(bits: int, bad: float) -> None:
    op = adam(bits)
    old, new, clean = (make(op, [(1000,)]) for _ in range(3))
    hit = torch.tensor([0, 300, 301, 999])
    new.grads[0][hit] = bad
    op.in_place(*new.arguments)
    assert torch.equal(new.params[0][hit], old.params[0][hit])
    op.in_place(*clean.arguments)
    others = torch.ones(1000, dtype=torch.bool)
    others[hit] = False
    assert torch.equal(new.params[0][others], clean.params[0][others])
    for arena, before in zip(new.arenas, old.arenas):
        assert arena.dtype == torch.uint8 or arena.isfinite().all()
        if bits == 32:
            assert torch.equal(arena[hit], before[hit])
    if bits == 8:  # within half a cell, where another element sets the block's scale
        for i, signed in enumerate((True, False)):
            after, before = (
                decode(b.arenas[2 * i][:1000], b.arenas[2 * i + 1], signed)[hit] for b in (new, old)
            )
            scale = new.arenas[2 * i + 1].repeat_interleave(BLOCK)[hit]
            assert ((after - before).abs() <= 0.9 / 128 * 1.001 * scale).all()


@BITS
def test_the_largest_usable_gradient_is_used(bits: int) -> None:
    op = adam(bits)
    old, new = make(op, [(700,)]), make(op, [(700,)])
    new.grads[0].fill_(-GRAD_LIMIT * (1 - 2**-24))
    op.in_place(*new.arguments)
    assert (new.params[0] != old.params[0]).all()
    assert all(arena.isfinite().all() for arena in new.arenas)


@BITS
def test_gradients_that_are_all_bad_change_nothing(bits: int) -> None:
    op = adam(bits)
    for bad in BAD:
        old, new = make(op, [(700,)]), make(op, [(700,)])
        new.grads[0].fill_(bad)
        op.in_place(*new.arguments)
        assert torch.equal(new.params[0], old.params[0])
        slot = layout([700]).slots[0]
        for (name, _), a, b in zip(op.arenas, new.arenas, old.arenas):
            if bits == 32:
                assert torch.equal(a, b)
            elif name.endswith("absmax"):  # the largest code of a random block need not be 255
                assert (a <= b).all() and a.isfinite().all()
            assert a[: slot.numel].isfinite().all()


def changed(bucket: Bucket, **change) -> tuple:
    names = ("params", "grads", "m_codes", "m_absmax", "v_codes", "v_absmax", "step", "hyper")
    assert set(change) <= set(names)
    return tuple(change.get(name, value) for name, value in zip(names, bucket.arguments, strict=True))


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
}


@pytest.mark.parametrize("form", ["in_place", "functional"])
@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments_are_named_and_change_nothing(what: str, form: str) -> None:
    op = adam(8)
    change, message = WRONG[what]
    bucket, old = make(op, [(300,), (7,)]), make(op, [(300,), (7,)])
    arguments = changed(bucket, **change)
    with pytest.raises(ValueError, match=message):
        getattr(op, form)(*arguments)
    torch.testing.assert_close(bucket.arguments, old.arguments, rtol=0, atol=0)
    with pytest.raises(ValueError, match=message):
        with FakeTensorMode(allow_non_fake_inputs=True):
            getattr(op, form)(*arguments)


def test_default_dtype_and_device_do_not_matter() -> None:
    for bits in (8, 32):
        op = adam(bits)
        expected, actual = make(op, SHAPES), make(op, SHAPES)
        op.in_place(*expected.arguments)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                op.in_place(*actual.arguments)
        finally:
            torch.set_default_dtype(dtype)
        torch.testing.assert_close(actual.arguments, expected.arguments, rtol=0, atol=0)

"""Stochastic rounding to bfloat16: right on average, the same at every run, and random where it must be."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import fake_gpu
from helpers.buckets import STEP_OPS, Bucket, copy, make
from torch import nn

from bnb_compile.ops.step import PARAM_DTYPES
from bnb_compile.optim import SGD, AdamW, AdEMAMix, Lion
from bnb_compile.rules import noise_of, random_bits, round_bits, rounding

SPACING = 2.0**-7  # of bfloat16 numbers from 1 to 2


pytestmark = pytest.mark.usefixtures("one_thread")  # for small tensors more threads cost more than they do


both_paths = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])


def rounded(x, step=1, first=0):
    """`x` in bfloat16, as elements `first` and on of an arena."""
    index = torch.arange(first, first + x.numel(), dtype=torch.int32)
    step = torch.tensor(step, dtype=torch.int32)
    result = round_bits(x.view(torch.int32), random_bits(index, step)).view(torch.float32)
    assert torch.equal(result.bfloat16().float(), result) or result.isnan().any()
    return result


# -- the rounding alone ----------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [1e-4, 0.01, 0.25, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("low", [1.0, 1.5, -1.0, 2.0**-100])
def test_the_mean_of_4096_roundings_is_the_number(fraction, low):
    """Within three standard deviations, of the elements of one step and of the steps of one element."""
    spacing = SPACING * abs(low) if low != 1.5 else SPACING
    x = low + math.copysign(fraction * spacing, low)
    share = (torch.tensor(x).double() - low).item() / math.copysign(spacing, low)  # in float32
    bound = 3 * math.sqrt(share * (1 - share) / 4096)
    of_a_step = rounded(torch.full((4096,), x), step=7)
    of_an_element = torch.cat([rounded(torch.tensor([x]), step=t, first=33) for t in range(1, 4097)])
    for found in (of_a_step, of_an_element):
        up = (found.double() - low) / math.copysign(spacing, low)
        assert set(up.tolist()) <= {0.0, 1.0}  # a neighbour
        assert abs(up.mean().item() - share) <= bound


def test_numbers_of_bfloat16_stay_as_they_are():
    """All of them: zeros, subnormals, infinities and NaN too."""
    bits = torch.arange(2**16, dtype=torch.int32) << 16
    for step in (1, 2, 1000):
        index = torch.randint(0, 2**31 - 1, bits.shape, dtype=torch.int32)
        random = random_bits(index, torch.tensor(step, dtype=torch.int32))
        assert torch.equal(round_bits(bits, random), bits)


def test_a_number_beyond_the_largest_may_become_infinite_but_no_other():
    x = torch.tensor([0x7F7F0000, 0x7F7F8000], dtype=torch.int32).view(torch.float32)
    found = torch.stack([rounded(x, step=t) for t in range(1, 200)])
    assert (found[:, 0] == x[0]).all()
    assert set(found[:, 1].tolist()) == {x[0].item(), math.inf}


def low_bits(count, step):
    """The 16 bits that decide about parameters."""
    return random_bits(*numbered(count, step)) & 0xFFFF


def high_bits(count, step):
    """The 16 bits that decide about states."""
    return ((noise_of(random_bits(*numbered(count, step))) - 1) * 65536).int()


def numbered(count, step):
    return torch.arange(count, dtype=torch.int32), torch.tensor(step, dtype=torch.int32)


def test_a_number_is_rounded_up_where_the_random_number_and_its_rest_carry():
    index, step = numbered(2**16, 7)
    rest = torch.randint(0, 2**16, (2**16,), dtype=torch.int32)
    up = round_bits((1 << 23) + rest, random_bits(index, step)) > 1 << 23
    assert torch.equal(up, low_bits(2**16, 7) + rest >= 2**16)


def test_noise_is_at_least_1_and_below_2():
    noise = noise_of(torch.tensor([0, -1, 0x7FFFFFFF, -(2**31), 0xFFFF], dtype=torch.int32))
    assert torch.equal(noise - 1, torch.tensor([0.0, 65535 / 65536, 32767 / 65536, 0.5, 0.0]))


def test_noise_needs_no_more_than_the_high_bits():
    numbers = numbered(2**16, 7)
    assert torch.equal(noise_of(rounding.high_bits(*numbers)), noise_of(random_bits(*numbers)))


def chi_square(counts):
    """Standard deviations between what is counted and equally many of each; 0 is expected, 1 common."""
    expected = counts.sum() / counts.numel()
    free = counts.numel() - 1
    return ((((counts - expected) ** 2 / expected).sum() - free) / math.sqrt(2 * free)).item()


def correlation(a, b):
    """Of two series, in standard deviations."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return abs((a * b).mean() / (a.std() * b.std()) * math.sqrt(a.numel())).item()


@pytest.mark.parametrize("of", [low_bits, high_bits], ids=["low", "high"])
def test_the_random_bits_look_independent(of):
    """Each value, each bit, neighbours, elements far apart, and steps; all at fixed places."""
    steps = [1, 2, 3, 1000, 100_000]
    bits = {t: of(2**16, t) for t in steps}
    for x in bits.values():
        assert 0 <= x.min() and x.max() < 2**16
        assert abs(chi_square(torch.bincount(x >> 8, minlength=256).double())) < 4
        assert abs(chi_square(torch.bincount(x & 255, minlength=256).double())) < 4
        for k in range(16):
            assert abs(((x >> k) & 1).double().mean().item() - 0.5) * 2 * 2**8 < 4
        for lag in (1, 2, 16, 256, 4096):
            assert correlation(x[lag:], x[:-lag]) < 4
        pairs = (x[1:] >> 12) * 16 + (x[:-1] >> 12)
        assert abs(chi_square(torch.bincount(pairs, minlength=256).double())) < 4
    for k, one in enumerate(steps):
        for other in steps[:k]:
            assert correlation(bits[one], bits[other]) < 4
            assert (bits[one] == bits[other]).double().mean() < 1e-3


# -- in an optimizer -------------------------------------------------------------------------------


def bfloat16(*size, scale=1.0):
    return nn.Parameter((torch.randn(size) * scale).bfloat16())


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def train(optimizer, params, steps=3, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * scale).to(param.dtype)
        optimizer.step()


def tensors_of(optimizer):
    """Parameters and states, to be compared bitwise."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [x.clone() for p in params for x in (p.detach(), *optimizer.state[p].values())]


def equal(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def sgd(params, lr, compiled, **options):
    return SGD(params, lr=lr, momentum=0.0, bf16_stochastic_round=True, compile=compiled, **options)


@both_paths
@pytest.mark.parametrize("bits", [8, 32])
def test_a_learning_rate_of_0_changes_no_bit(compiled, bits):
    params = [bfloat16(5000), bfloat16(7, 9)]
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(
        params, lr=0.0, weight_decay=0.1, optim_bits=bits, bf16_stochastic_round=True, compile=compiled
    )
    train(optimizer, params, 3)
    assert equal(before, [p.detach() for p in params])


@both_paths
def test_an_update_of_1e_4_moves_weights_on_average_and_is_lost_without_it(compiled):
    """Where half of the spacing is 3.9e-3."""
    moved = {}
    for stochastic in (True, False):
        param = nn.Parameter(torch.ones(20_000, dtype=torch.bfloat16))
        optimizer = SGD([param], lr=1e-4, momentum=0.0, bf16_stochastic_round=stochastic, compile=compiled)
        for _ in range(50):
            param.grad = torch.full_like(param, -1.0)
            optimizer.step()
        moved[stochastic] = (param.detach().double() - 1).mean().item()
    deviation = math.sqrt(50 * 1e-4 * SPACING / 20_000)
    assert moved[False] == 0
    # The gradient is exact, 1e-4 is of float32, and the spacing is the same all the way.
    assert abs(moved[True] - 50 * 1e-4) < 4 * deviation


@both_paths
@pytest.mark.parametrize("family", ["AdamW", "Lion"])
def test_weight_decay_alone_is_seen_after_1000_steps(compiled, family):
    """1e-5 a step; without chance, nothing is seen of it."""
    cls = {"AdamW": AdamW, "Lion": Lion}[family]
    for stochastic in (True, False):
        param = nn.Parameter(torch.full((3000,), 1.5, dtype=torch.bfloat16))
        optimizer = cls(
            [param], lr=1e-4, weight_decay=0.1, bf16_stochastic_round=stochastic, compile=compiled
        )
        param.grad = torch.zeros_like(param)
        for _ in range(1000):
            optimizer.step()
        mean = param.detach().double().mean().item()
        if stochastic:
            exact = 1.5 * (1 - 1e-5) ** 1000
            deviation = math.sqrt(1000 * 1.5e-5 * SPACING / 3000)
            assert abs(mean - exact) < 4 * deviation and 1.5 - mean > 10 * deviation
        else:
            assert mean == 1.5


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("cls", [AdamW, AdEMAMix], ids=lambda cls: cls.__name__)
def test_two_runs_are_equal_and_a_kernel_is_the_eager_step_bitwise(cls, bits):
    """For 8-bit states all but rounding of a code is equal; here the two agree on parameters in one step."""
    params = [bfloat16(5000), bfloat16(7, 9), bfloat16(3)]
    runs = []
    for compiled in (True, True, False):
        mine = copies(params)
        optimizer = cls(mine, lr=1e-3, optim_bits=bits, bf16_stochastic_round=True, compile=compiled)
        train(optimizer, mine, 20 if bits == 32 else 1)
        runs.append(tensors_of(optimizer))
    assert equal(runs[0], runs[1])
    for one, other in zip(runs[0], runs[2]):
        if one.dtype == torch.bfloat16:
            assert torch.equal(one, other)


def test_a_captured_step_rounds_as_the_eager_one():
    torch._dynamo.reset()
    params = [bfloat16(5000), bfloat16(7, 9)]
    others = copies(params)
    optimizer = AdamW(params, lr=1e-3, bf16_stochastic_round=True)
    eager = AdamW(others, lr=1e-3, bf16_stochastic_round=True, compile=False)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True)
    for _ in range(5):
        for param, other in zip(params, others):
            param.grad = torch.randn(param.shape).bfloat16()
            other.grad = param.grad.clone()
        step()
        eager.step()
    assert all(map(torch.equal, params, others))


@both_paths
def test_no_generator_is_asked_and_none_is_changed(compiled):
    params = [bfloat16(5000)]
    results = []
    for seed in (1, 2):
        mine = copies(params)
        optimizer = AdamW(mine, bf16_stochastic_round=True, compile=compiled)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        train(optimizer, mine)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(tensors_of(optimizer))
    assert equal(*results)


@both_paths
def test_chance_differs_between_elements_parameters_and_steps(compiled):
    params = [nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
    optimizer = sgd(params, lr=SPACING / 2, compiled=compiled)
    found = []
    for _ in range(3):
        for param in params:
            with torch.no_grad():
                param.fill_(1.0)
            param.grad = torch.full_like(param, -1.0)
        optimizer.step()
        found += [p.detach() > 1 for p in params]
    for k, one in enumerate(found):
        assert 0.45 < one.double().mean() < 0.55
        for other in found[:k]:
            assert 0.45 < (one == other).double().mean() < 0.55


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted():
    params = [bfloat16(5000), bfloat16(7, 9)]
    whole, resumed = copies(params), copies(params)
    options = dict(lr=1e-3, optim_bits=8, bf16_stochastic_round=True, compile=False)
    optimizer = AdamW(whole, **options)
    train(optimizer, whole, 3)
    saved = optimizer.state_dict()
    with torch.no_grad():
        for param, other in zip(resumed, whole):
            param.copy_(other)
    fresh, cold = AdamW(resumed, **options), copies(resumed)
    fresh.load_state_dict(saved)
    new = AdamW(cold, **options)
    for o, mine in ((optimizer, whole), (fresh, resumed), (new, cold)):
        train(o, mine, 3, seed=1)
    assert equal(tensors_of(optimizer), tensors_of(fresh))
    assert not torch.equal(whole[0], cold[0])


@both_paths
def test_parameters_of_other_dtypes_in_the_group_are_rounded_as_without(compiled):
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float32]
    params = [nn.Parameter(torch.randn(300).to(dtype)) for dtype in dtypes]
    others = copies(params)
    options = dict(lr=1e-3, compile=compiled)
    train(AdamW(params, bf16_stochastic_round=True, **options), params, 5)
    train(AdamW(others, **options), others, 5)
    assert [torch.equal(p, q) for p, q in zip(params, others)] == [True, False, True, True]
    # By no more than a unit for each step.
    assert ((params[1] - others[1]).abs() <= 5 * 2**-7 * others[1].abs() + 1e-3).all()


@both_paths
@pytest.mark.parametrize("layout", ["transposed", "every other"])
def test_layout_changes_nothing(compiled, layout):
    """The place in the arena decides, not that in memory."""
    base = torch.randn(40, 60).bfloat16()
    strided = base.t() if layout == "transposed" else base[:, ::2]
    params = [nn.Parameter(strided), nn.Parameter(strided.clone(memory_format=torch.contiguous_format))]
    for param in params:
        train(AdamW([param], bf16_stochastic_round=True, compile=compiled), [param])
    assert torch.equal(*params) and not params[0].is_contiguous()


@both_paths
def test_elements_with_no_usable_gradient_are_not_rounded(compiled):
    param = bfloat16(600)
    before = param.detach().clone()
    optimizer = AdamW([param], lr=0.1, bf16_stochastic_round=True, compile=compiled)
    param.grad = torch.ones_like(param)
    param.grad[100:200] = math.nan
    optimizer.step()
    assert torch.equal(param[100:200], before[100:200]) and (param[200:] != before[200:]).all()


@pytest.mark.parametrize("value", ["perhaps", 2, None])
def test_another_value_than_true_and_false_raises(value):
    with pytest.raises(ValueError, match="bf16_stochastic_round"):
        AdamW([bfloat16(5)], bf16_stochastic_round=value)


# -- the operator ------------------------------------------------------------------------------------


def with_chance(bucket: Bucket) -> Bucket:
    bucket.options["stochastic_round"] = True
    return bucket


@pytest.mark.parametrize("dtype", [d for d in PARAM_DTYPES if d != torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 32])
def test_the_operator_refuses_other_dtypes_and_changes_nothing(dtype, bits):
    op = STEP_OPS["adam", bits]
    bucket = with_chance(make(op, [(300,)], dtype))
    before = copy(bucket)
    for function in (op.in_place, op.functional):
        with pytest.raises(ValueError, match=f"{op.name}: stochastic_round .*{dtype}.*bfloat16"):
            bucket.call(function)
    assert equal(bucket.params + bucket.state, before.params + before.state)


#: Rules whose scalars the interpreter computes as the eager operator does, to the last bit.
EMITTED = [("sgd_plain", 32), ("sgd", 32), ("lion", 8), ("adam", 32), ("adam", 8)]


def test_emitted_kernels_round_as_the_eager_operator():
    """Bitwise, under Triton's interpreter: aligned, irregular, strided and without a gradient."""
    buckets = []
    for name, bits in EMITTED:
        op = STEP_OPS[name, bits]
        shapes = [(512,), (300,), (7, 11), (40,), torch.randn(16, 24).bfloat16().t()]
        buckets.append((op, with_chance(make(op, shapes, torch.bfloat16, without_grad=[3]))))

    def on_gpu(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")

    def step(*all_arguments):
        for (op, _), (arguments, options) in zip(buckets, all_arguments):
            op.in_place(*arguments, **options)

    stepped = [copy(bucket) for _, bucket in buckets]
    arguments = tuple((bucket.arguments, bucket.options) for bucket in stepped)
    source = fake_gpu.emit(step, lambda: torch.utils._pytree.tree_map(on_gpu, arguments), fast=False)
    fake_gpu.interpret(source, arguments)
    for (op, bucket), found in zip(buckets, stepped):
        expected, nearest = copy(bucket), copy(bucket)
        expected.call(op.in_place)
        nearest.options["stochastic_round"] = False
        nearest.call(op.in_place)
        assert torch.equal(found.step, expected.step)
        for k, (mine, theirs, old) in enumerate(zip(found.params, expected.params, bucket.params)):
            assert torch.equal(mine, theirs), (op.name, k, (mine != theirs).sum())
            assert torch.equal(mine, old) == (k == 3)
        assert not equal(expected.params, nearest.params)

"""Every optimizer of tests/opt_*.py against plain ones: what a step computes, and what it leaves alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.formulas import all_families
from torch import nn

from bnb_compile.state.checkpoint import unpack

FAMILIES = all_families()
CLASSES = [(family, cls) for family in FAMILIES for cls in family.classes]
VARIANTS = [(family, k) for family in FAMILIES for k in range(len(family.variants))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def short(value):
    return str(value).removeprefix("torch.")


families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
#: What the base class does is the same for all: two will do, one with two states and one with one.
TWO = [family for family in FAMILIES if family.name in ("adam", "lion")]
two_families = pytest.mark.parametrize("family", TWO, ids=lambda family: family.name)
classes = pytest.mark.parametrize("family,cls", CLASSES, ids=[cls.__name__ for _, cls in CLASSES])
variants = pytest.mark.parametrize("family,k", VARIANTS, ids=[f"{family.name}{k}" for family, k in VARIANTS])
each_bits = pytest.mark.parametrize("bits", [8, 32])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=short)
both_paths = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])


def parameter(*size, dtype=torch.float32, scale=0.1):
    return nn.Parameter((torch.randn(size) * scale).to(dtype))


def copies(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def noise(params, scale=0.01):
    return [(torch.randn(p.shape) * scale).to(p.dtype) for p in params]


def step(optimizer, params, grads):
    for param, grad in zip(params, grads):
        param.grad = grad
    optimizer.step()


def snapshot(optimizer):
    """Everything a step may change, copied."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (p.detach().clone(), {k: v.clone() for k, v in optimizer.state.get(p, {}).items()}) for p in params
    ]


def same(one, other):
    return all(
        torch.equal(p, q) and s.keys() == t.keys() and all(torch.equal(s[k], t[k]) for k in s)
        for (p, s), (q, t) in zip(one, other)
    )


def relative_error(value, expected):
    value, expected = value.detach().double(), expected.detach().double()
    return ((value - expected).norm() / expected.norm()).item()


def states(optimizer, param):
    """A parameter's states as they are stored."""
    state = entry(optimizer, param)
    return [state[f"state{k}"] for k in range(1, 5) if f"state{k}" in state]


def entry(optimizer, param):
    """What there is of a parameter, with a number for each state."""
    numbers = optimizer.family.numbers or ((0,),)
    return unpack(optimizer.state[param], numbers, "")


def decoded(optimizer, param):
    """A parameter's 8-bit states and their scales, both with an entry for each element."""
    state = entry(optimizer, param)
    for k, codes in enumerate(states(optimizer, param), 1):
        scales = state[f"absmax{k}"].repeat_interleave(256)[: param.numel()].view(param.shape)
        yield state[f"qmap{k}"][codes.long()] * scales, scales


# -- what is computed ---------------------------------------------------------------------------


@variants
def test_the_reference_is_the_torch_optimizer(family, k):
    if family.torch_class is None:
        pytest.skip("torch does not have it")
    param = nn.Parameter(torch.randn(100, dtype=torch.float64))
    reference = family.reference([param], **family.variants[k])
    torchs = family.torch_class([param], **{**family.variants[0], **family.variants[k]})
    for _ in range(20):
        grads = noise([param])
        step(torchs, [param], grads)
        reference.step(grads)
    torch.testing.assert_close(reference.params[0], param.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "family,k,dtype",
    [
        (family, k, dtype)
        for family, k in VARIANTS
        for dtype in DTYPES[: 1 if k else 3 if family in TWO else 2]
    ],
    ids=lambda value: getattr(value, "name", short(value)),
)
@each_bits
@both_paths
def test_100_steps_follow_the_reference(family, k, dtype, bits, compiled):
    """Bounds: 100 roundings of float32; a tie that a 16-bit parameter rounds otherwise; the 8-bit format."""
    hyper = family.variants[k]
    params = [nn.Parameter(torch.zeros(1300, dtype=dtype)), parameter(13, 101, dtype=dtype)]
    optimizer = family.general(params, optim_bits=bits, min_8bit_size=0, compile=compiled, **hyper)
    reference = family.reference(params, **hyper)
    for _ in range(100):
        grads = noise(params)
        step(optimizer, params, grads)
        reference.step(grads)
    # The first was zero: it is its displacement.
    errors = [relative_error(param, exact) for param, exact in zip(params, reference.params)]
    found = [states(optimizer, param) for param in params]
    assert [len(s) for s in found] == [len(s) for s in reference.states]
    assert all(optimizer.state[param]["step"] == 100 for param in params)
    if bits == 8 and found[0]:
        rounding = {torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
        assert max(errors) <= family.relative_error_8bit + rounding
        assert all(state.dtype == torch.uint8 for s in found for state in s)
    else:
        rounding = {torch.float32: 0, torch.float16: 1e-4, torch.bfloat16: 1e-3}[dtype]
        assert max(errors) <= max(family.relative_error_32bit, rounding)
        for state, exact in zip(sum(found, []), sum(reference.states, [])):
            assert state.dtype == torch.float32
            assert relative_error(state, exact) <= {torch.float32: 2e-6}.get(dtype, 1e-3)


@variants
@both_paths
def test_32_bit_states_are_within_1e_6_of_the_torch_optimizer(family, k, compiled):
    if family.torch_class is None:
        pytest.skip("torch does not have it")
    params = [parameter(1300)]
    others = copies(params)
    optimizer = family.general(params, optim_bits=32, compile=compiled, **family.variants[k])
    torchs = family.torch_class(others, **{**family.variants[0], **family.variants[k]})
    for _ in range(100):
        grads = noise(params)
        step(optimizer, params, grads)
        step(torchs, others, grads)
    assert relative_error(params[0], others[0]) <= 1e-6


@pytest.mark.parametrize(
    "family,k,dtype",
    [(family, k, dtype) for family, k in VARIANTS for dtype in DTYPES[: None if k == 0 else 1]],
    ids=lambda value: getattr(value, "name", short(value)),
)
@both_paths
def test_each_8_bit_step_is_within_bitsandbytes_published_error(family, k, dtype, compiled):
    """Its tests/test_optim.py, test_optimizer8bit: parameters and states are made equal after each step."""
    absolute, relative = {torch.bfloat16: (1.7e-4, 1.6e-3)}.get(dtype, (6e-5, 6e-4))
    hyper = {**family.variants[k], "weight_decay": 0.0}
    param = parameter(17, 257, dtype=dtype)
    optimizer = family.general([param], optim_bits=8, compile=compiled, **hyper)
    reference = family.reference([nn.Parameter(param.detach().float())], **hyper)
    exact = reference.params[0]
    for _ in range(20):
        grads = noise([param])
        step(optimizer, [param], grads)
        reference.step(grads)
        error = (param.detach().float() - exact).abs()
        assert error.mean() <= absolute
        assert (error / (exact.abs() + 1e-9)).mean() <= relative
        exact.copy_(exact.to(dtype))
        param.data.copy_(exact)
        for k, (values, scales) in enumerate(decoded(optimizer, param)):
            assert ((values - reference.states[0][k]).abs() <= 0.0075 * scales).all()  # half the widest gap
            reference.states[0][k].copy_(values)


@classes
def test_a_class_is_the_general_one_with_the_bits_of_its_name(family, cls):
    bits = next((b for b in (8, 32) if cls.__name__.endswith(f"{b}bit")), None)
    params = [parameter(5000), parameter(100)]
    others = copies(params)
    one = cls(params, **family.variants[0])
    other = family.general(others, optim_bits=bits or 32)
    for _ in range(3):
        grads = noise(params)
        step(one, params, grads)
        step(other, others, [grad.clone() for grad in grads])
    assert issubclass(cls, torch.optim.Optimizer)
    assert one.args.optim_bits == (bits or 32)
    assert same(snapshot(one), snapshot(other))
    expected = [torch.uint8 if bits == 8 else torch.float32, torch.float32]
    assert [states(one, param)[0].dtype for param in params] == expected


@families
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=short)
def test_the_relative_error_does_not_depend_on_the_gradient_scale(family, grad_dtype):
    """With eps far below the gradients, as otherwise it takes over and the second moment does not count."""
    errors = []
    for scale in [1e-3, 1e-7, 1e-12]:
        torch.manual_seed(0)
        param = nn.Parameter(torch.zeros(4096))
        param.grad_dtype = grad_dtype
        hyper = {"eps": scale * 1e-8} if "eps" in family.variants[0] else {}
        optimizer = family.general([param], optim_bits=8, **hyper)
        reference = family.reference([param], **hyper)
        for _ in range(100):
            grads = [(torch.randn(4096) * scale).to(grad_dtype)]
            step(optimizer, [param], grads)
            reference.step(grads)
        errors.append(relative_error(param, reference.params[0]))
    assert max(errors) <= family.relative_error_8bit
    assert max(errors) - min(errors) <= 0.05 * max(errors)


@families
@pytest.mark.parametrize("scale", [1e-3, 1e-7, 1e-12])
def test_the_default_eps_is_applied_at_every_gradient_scale(family, scale):
    param = nn.Parameter(torch.zeros(4096))
    optimizer, reference = family.general([param], optim_bits=8), family.reference([param])
    for _ in range(100):
        grads = noise([param], scale)
        step(optimizer, [param], grads)
        reference.step(grads)
    assert relative_error(param, reference.params[0]) <= family.relative_error_8bit


# -- options ------------------------------------------------------------------------------------


def follow(family, bits, options, steps, gradients, clip=lambda k, grad: grad):
    """Step compiled, eager and plainly; all must agree. Returns the compiled optimizer and the reference."""
    params = [parameter(1300), parameter(5, 101)]
    others = copies(params)
    starts = [param.detach().clone() for param in params]
    optimizer, eager = (
        family.general(p, optim_bits=bits, min_8bit_size=0, compile=compiled, **options)
        for p, compiled in ((params, True), (others, False))
    )
    plain = {name: options[name] for name in options if name not in ("percentile_clipping", "block_wise")}
    reference = family.reference(params, **plain)
    for _ in range(steps):
        grads = gradients(params)
        step(optimizer, params, grads)
        step(eager, others, [None if grad is None else grad.clone() for grad in grads])
        reference.step([None if grad is None else clip(k, grad) for k, grad in enumerate(grads)])
    for param, other, exact, start in zip(params, others, reference.params, starts):
        # Of a displacement that is small beside its parameter, float32 loses digits.
        lost = 1e-6 * exact.norm() / (exact - start).norm()
        assert relative_error(param - start, other - start) <= (
            family.compiled_error_8bit if bits == 8 else lost
        )
        bound = 1.5 * family.relative_error_8bit if bits == 8 else lost
        assert relative_error(param - start, exact - start) <= bound
    return optimizer, reference


@families
@each_bits
def test_max_unorm_limits_the_update_of_every_family(family, bits):
    finals = []
    for max_unorm in (0.004, 0.0):
        torch.manual_seed(0)
        _, reference = follow(family, bits, dict(max_unorm=max_unorm), 20, noise)
        finals.append(reference.params)
    for limited, free in zip(*finals):
        assert not torch.allclose(limited, free, rtol=1e-4)


@families
@each_bits
def test_skip_zeros_keeps_elements_and_their_states_where_the_gradient_is_zero(family, bits):
    def gradients(params):
        return [grad.where(torch.rand(grad.shape) < 0.6, 0.0) for grad in noise(params)]

    optimizer, reference = follow(family, bits, dict(skip_zeros=True, weight_decay=0.1), 20, gradients)
    if bits == 32:
        for param, expected in zip(optimizer.param_groups[0]["params"], reference.states):
            for state, exact in zip(states(optimizer, param), expected, strict=True):
                assert relative_error(state, exact) <= 2e-6


@two_families
@each_bits
@both_paths
def test_skip_zeros_with_only_zeros_changes_no_parameter_and_no_state(family, bits, compiled):
    """But for the 8-bit format: the signed map has no -1, so what it stores again may be rounded again."""
    params = [parameter(5000), parameter(100)]
    options = dict(optim_bits=bits, min_8bit_size=0, skip_zeros=True, weight_decay=0.1)
    optimizer = family.general(params, compile=compiled, **options)
    step(optimizer, params, noise(params))
    before = copies(params)
    kept = [
        [*decoded(optimizer, p)] if bits == 8 else [(s.clone(), 0) for s in states(optimizer, p)]
        for p in params
    ]
    step(optimizer, params, [torch.zeros_like(param) for param in params])
    for param, start, old in zip(params, before, kept):
        assert torch.equal(param, start) and optimizer.state[param]["step"] == 2
        new = [values for values, _ in decoded(optimizer, param)] if bits == 8 else states(optimizer, param)
        for value, (expected, scales) in zip(new, old, strict=True):
            assert ((value - expected).abs() <= 0.0075 * scales).all()


class PercentileClipping:
    """What bitsandbytes 0.49 does to the gradients of a parameter, in the order in which it does it."""

    def __init__(self, percentile):
        self.percentile, self.t, self.squares, self.clipped = percentile, 0, torch.zeros(100).double(), 0

    def __call__(self, grad):
        self.t += 1
        self.squares[self.t % 100] = square = grad.double().square().sum()
        if self.t == 1:
            self.squares[:] = square
        norm, limit = square.sqrt(), self.squares.sort().values[self.percentile].sqrt()
        self.clipped += norm > limit
        return grad.double() * limit / norm if norm > limit else grad


@two_families
@each_bits
def test_percentile_clipping_scales_gradients_as_bitsandbytes_0_49(family, bits):
    """Over the end of its 100 norms. The norms vary, and a gradient is missing now and then."""
    clipping = [PercentileClipping(30), PercentileClipping(30)]

    def gradients(params):
        grads = [grad * torch.randn(()).exp() for grad in noise(params)]
        return grads if torch.rand(()) < 0.9 else [grads[0], None]

    optimizer, _ = follow(
        family, bits, dict(percentile_clipping=30), 150, gradients, lambda k, grad: clipping[k](grad)
    )
    for param, expected in zip(optimizer.param_groups[0]["params"], clipping):
        assert 50 < expected.clipped < 130 and expected.t > 120
        assert relative_error(optimizer.state[param]["gnorm_vec"], expected.squares) <= 1e-6


@families
@both_paths
def test_without_block_wise_a_parameter_has_one_scale(family, compiled):
    params = [parameter(1300), parameter(5, 101), parameter(256)]
    others = copies(params)
    options = dict(min_8bit_size=0, compile=compiled)
    one = family.general(params, optim_bits=8, block_wise=False, **options)
    blockwise = family.general(others, optim_bits=8, **options)
    for k in range(3):
        grads = noise(params)
        if k == 0:
            grads[0] *= torch.linspace(0.01, 1, 1300)
        step(one, params, grads)
        step(blockwise, others, [grad.clone() for grad in grads])
        for param, other in zip(params, others):
            for (_, scales), (_, expected) in zip(
                decoded(one, param), decoded(blockwise, other), strict=True
            ):
                assert (scales == scales.flatten()[0]).all()
                if k == 0:  # the largest of the blocks' scales, and in the first parameter they differ
                    assert scales.max() == expected.max()
                    unequal = expected.min() < 0.5 * expected.max()
                    assert param is not params[0] or unequal or not expected.any()
    assert same(snapshot(one)[2:], snapshot(blockwise)[2:])  # it has only one block


@families
@each_bits
def test_without_block_wise_steps_follow_the_reference(family, bits):
    follow(family, bits, dict(block_wise=False), 20, noise)


@families
@each_bits
@both_paths
@pytest.mark.parametrize("max_unorm", [0.0, 0.02, 1.0])
def test_a_parameter_that_is_zero_gets_no_nan_and_no_limit(family, bits, compiled, max_unorm):
    params = [parameter(5000, scale=0.0)]
    optimizer = family.general(params, optim_bits=bits, max_unorm=max_unorm, compile=compiled)
    free = copies(params)
    step(optimizer, params, [torch.zeros(5000)])
    assert not params[0].any() and all(state.isfinite().all() for state in snapshot(optimizer)[0][1].values())
    unlimited = family.general(free, optim_bits=bits, max_unorm=0.0, compile=compiled)
    step(unlimited, free, [torch.zeros(5000)])
    (grad,) = noise(params)
    step(optimizer, params, [grad])
    step(unlimited, free, [grad.clone()])
    assert params[0].any() and torch.equal(params[0], free[0])


# -- sizes, dtypes and places in memory ---------------------------------------------------------


@two_families
@each_bits
@both_paths
def test_every_size_in_one_optimizer_steps_as_alone(family, bits, compiled):
    shapes = [(n,) for n in (0, 1, 255, 256, 257, 4095, 4096, 4097)] + [(), (3, 0, 2), (1, 1, 1), (17, 31)]
    params = [parameter(*shape) for shape in shapes]
    alone = copies(params)
    options = dict(optim_bits=bits, min_8bit_size=0, compile=compiled)
    together = family.general(params, **options)
    apart = [family.general([p], **options) for p in alone]
    reference = family.reference(params)
    paths = [0.0 for _ in params]
    for _ in range(3):
        grads = noise(params)
        before = [exact.clone() for exact in reference.params]
        step(together, params, grads)
        reference.step(grads)
        paths = [path + (p - q).norm() for path, p, q in zip(paths, reference.params, before)]
        for optimizer, param, grad in zip(apart, alone, grads):
            step(optimizer, [param], [grad.clone()])
    for param, one, exact, path in zip(params, alone, reference.params, paths):
        assert torch.equal(param, one)
        error = 1e-5 if bits == 32 else 2 * family.relative_error_8bit
        assert (param - exact).norm() <= error * path + 1e-6 * exact.norm()
        assert all(state.shape == param.shape for state in states(together, param))
        assert together.state[param]["step"] == 3


@variants
@each_bits
def test_compiled_and_eager_steps_agree_on_every_code_but_for_rounding(family, k, bits):
    """One code in ten thousand may differ, by one; and one number in a thousand, where a gradient and what
    weight decay adds to it cancel."""
    finals = []
    for compiled in (True, False):
        torch.manual_seed(0)
        param = parameter(50_000)
        optimizer = family.general([param], optim_bits=bits, compile=compiled, **family.variants[k])
        step(optimizer, [param], noise([param]))
        finals.append((param.detach(), states(optimizer, param)))
    (param, ours), (other, others) = finals
    torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-6)
    for state, expected in zip(ours, others, strict=True):
        if state.dtype == torch.uint8:
            apart = (state.int() - expected.int()).abs()
            assert apart.max() <= 1 and apart.count_nonzero() <= apart.numel() / 10_000
        else:
            small = 1e-6 * expected.abs().max().item()
            torch.testing.assert_close(state, expected, rtol=1e-3, atol=small)
            apart = (state - expected).abs() > 1e-5 * expected.abs() + small
            assert apart.count_nonzero() <= apart.numel() / 1000


@two_families
@pytest.mark.parametrize("bits,compiled", [(8, True), (8, False), (32, False)])
def test_dtypes_and_gradient_dtypes_may_be_mixed_in_a_group(family, bits, compiled):
    pairs = [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)]
    pairs += [(torch.bfloat16, torch.float32), (torch.float32,) * 2]
    params = [parameter(5000, dtype=dtype, scale=0.0) for dtype, _ in pairs]
    for param, (_, grad_dtype) in zip(params, pairs):
        param.grad_dtype = grad_dtype
    optimizer = family.general(params, optim_bits=bits, compile=compiled)
    reference = family.reference(params)
    for _ in range(10):
        grads = [torch.randn(5000).to(grad_dtype) for _, grad_dtype in pairs]
        step(optimizer, params, grads)
        reference.step(grads)
    for param, exact in zip(params, reference.params):
        rounding = 1e-2 if param.dtype == torch.bfloat16 else 0
        bound = 1e-3 if bits == 32 else family.relative_error_8bit + rounding
        assert relative_error(param, exact) <= bound


def transposed(layout):
    return layout.t()


def channels_last(layout):
    return layout.view(10, 6, 5, 17).contiguous(memory_format=torch.channels_last)


def strided(layout):
    return layout[:, ::2]


LAYOUTS = [transposed, channels_last, strided]


@two_families
@each_bits
@both_paths
@pytest.mark.parametrize("grad_layout", ["like the parameter", "contiguous"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_a_parameter_keeps_its_memory_format_and_address(family, bits, compiled, layout, grad_layout):
    param = nn.Parameter(layout(torch.randn(60, 85)))
    plain = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    assert not param.is_contiguous() and plain.is_contiguous()
    before = param.stride(), param.data_ptr()
    options = dict(optim_bits=bits, min_8bit_size=0, compile=compiled)
    optimizer, other = family.general([param], **options), family.general([plain], **options)
    for _ in range(3):
        grad = torch.randn(param.shape)
        step(other, [plain], [grad])
        if grad_layout == "like the parameter":
            grad = torch.empty_strided(param.shape, param.stride()).copy_(grad)
        step(optimizer, [param], [grad])
    assert (param.stride(), param.data_ptr()) == before
    assert torch.equal(param, plain)
    assert all(map(torch.equal, states(optimizer, param), states(other, plain)))


@two_families
@each_bits
@both_paths
def test_views_of_a_flat_buffer_update_the_buffer(family, bits, compiled):
    buffer = torch.randn(3 * 5000)
    start = buffer.clone()
    pieces = [
        buffer[:5000],
        buffer[5001:10_000],
        buffer[10_000:].view(50, 100).t(),
    ]  # one element is nobody's
    params = [nn.Parameter(piece) for piece in pieces]
    optimizer = family.general(params, optim_bits=bits, compile=compiled)
    step(optimizer, params, [torch.ones_like(p) for p in params])
    moved = buffer != start
    assert not moved[5000] and moved.count_nonzero() == 3 * 5000 - 1
    assert all(param.data_ptr() == piece.data_ptr() for param, piece in zip(params, pieces))


@two_families
@each_bits
@both_paths
def test_an_expanded_gradient_is_read_right_and_not_written(family, bits, compiled):
    param = parameter(70, 70)
    plain = nn.Parameter(param.detach().clone())
    row = torch.randn(70)
    before = row.clone()
    options = dict(optim_bits=bits, compile=compiled)
    step(family.general([param], **options), [param], [row.expand(70, 70)])
    step(family.general([plain], **options), [plain], [row.repeat(70, 1)])
    assert torch.equal(param, plain)
    assert torch.equal(row, before)


@two_families
@pytest.mark.parametrize(
    ("limit", "quantised"), [(4096, [False, True]), (100, [True, True]), (9999, [False] * 2)]
)
def test_only_parameters_of_min_8bit_size_and_more_have_8_bit_states(family, limit, quantised):
    params = [parameter(4095), parameter(4096)]
    optimizer = family.general(params, optim_bits=8, min_8bit_size=limit)
    step(optimizer, params, noise(params))
    assert [optimizer.state[p]["state1"].dtype == torch.uint8 for p in params] == quantised
    assert all(("absmax1" in optimizer.state[p]) == is_8bit for p, is_8bit in zip(params, quantised))


@two_families
@pytest.mark.parametrize("numel", [4097, 33 * 4097])
def test_an_8_bit_state_takes_1_02_bytes_for_each_element_at_odd_sizes(family, numel):
    param = parameter(numel)
    optimizer = family.general([param], optim_bits=8)
    step(optimizer, [param], noise([param]))
    state = [v for name, v in optimizer.state[param].items() if name.startswith(("state", "absmax"))]
    bound = 1.02 * len(states(optimizer, param))
    assert 0 < sum(t.nbytes for t in state) / numel <= bound
    if numel > 100_000:  # so much that nothing else but the states may be behind the views
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state}
        assert sum(storages.values()) / numel <= bound


# -- what a step leaves alone -------------------------------------------------------------------


@two_families
@each_bits
@both_paths
def test_a_parameter_without_gradient_is_left_alone_with_its_state_and_step(family, bits, compiled):
    params = [parameter(5000) for _ in range(4)]
    optimizer = family.general(params, optim_bits=bits, compile=compiled)
    reference = family.reference(params)
    starts = [param.detach().clone() for param in params]
    counts = [0] * 4
    for mask in ([1, 1, 1, 0], [0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]):
        grads = [grad if present else None for grad, present in zip(noise(params), mask)]
        before = snapshot(optimizer)
        step(optimizer, params, grads)
        reference.step(grads)
        after = snapshot(optimizer)
        for k, present in enumerate(mask):
            assert present or not before[k][1] or same(before[k : k + 1], after[k : k + 1])
            counts[k] += present
            assert optimizer.state[params[k]].get("step", 0) == counts[k]
    for param, exact, start in zip(params, reference.params, starts):
        error = 1e-5 if bits == 32 else family.relative_error_8bit
        assert (param - exact).norm() <= error * (exact - start).norm() + 1e-6 * exact.norm()


@two_families
@each_bits
@both_paths
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_gradient_element_leaves_only_itself_unchanged(family, bits, compiled, bad):
    param = parameter(5000)
    clean = nn.Parameter(param.detach().clone())
    options = dict(optim_bits=bits, compile=compiled)
    optimizer, other = family.general([param], **options), family.general([clean], **options)
    hit = torch.zeros(5000, dtype=torch.bool)
    hit[[0, 300, 301, 4999]] = True
    start = param.detach().clone()
    for _ in range(3):
        (grad,) = noise([param])
        grad[hit] = bad
        step(optimizer, [param], [grad])
        step(other, [clean], [grad.where(~hit, 0.0)])
    assert torch.equal(param[hit], start[hit])
    assert torch.equal(param[~hit], clean[~hit])
    for state, expected in zip(states(optimizer, param), states(other, clean), strict=True):
        assert torch.equal(state[~hit], expected[~hit])
    assert all(state.isfinite().all() for state in optimizer.state[param].values())


@families
@each_bits
@both_paths
def test_coordinates_without_gradient_stay_put_for_200_steps(family, bits, compiled):
    param = parameter(1000)
    start = param.detach().clone()
    optimizer = family.general([param], optim_bits=bits, min_8bit_size=0, compile=compiled)
    zero = torch.arange(1000) % 3 == 0
    for _ in range(200):
        step(optimizer, [param], [torch.randn(1000).where(~zero, 0.0)])
    assert torch.equal(param[zero], start[zero])
    assert (param[~zero] != start[~zero]).float().mean() > 0.9  # a few have come back


@two_families
@each_bits
@each_dtype
@both_paths
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_lr_0_with_zero_gradients_materialises_states_and_changes_nothing(family, bits, dtype, compiled, lr):
    """What torch.distributed.checkpoint does to an optimizer before it loads."""
    param = parameter(5000, dtype=dtype)
    start = param.detach().clone()
    optimizer = family.general([param], optim_bits=bits, compile=compiled)
    optimizer.param_groups[0]["lr"] = lr
    step(optimizer, [param], [torch.zeros_like(param)])
    assert torch.equal(param, start) and states(optimizer, param)[0].shape == param.shape
    assert optimizer.param_groups[0]["lr"] is lr
    step(optimizer, [param], noise([param]))  # also when there is something to apply
    assert torch.equal(param, start)
    optimizer.param_groups[0]["lr"] = 1e-2
    step(optimizer, [param], noise([param]))
    assert (param != start).any() and param.isfinite().all()


@two_families
@both_paths
@pytest.mark.parametrize("kind", ["sparse", "float64", "complex"])
def test_a_gradient_that_no_step_can_take_raises_before_anything_changes(family, compiled, kind):
    params = [parameter(5000), parameter(50, 100)]
    optimizer = family.general(params, optim_bits=8, compile=compiled)
    step(optimizer, params, noise(params))
    before = snapshot(optimizer)
    grads = noise(params)
    params[1].grad_dtype = None
    if kind == "sparse":
        grads[1] = grads[1].to_sparse()
    else:
        grads[1] = grads[1].to(torch.float64 if kind == "float64" else torch.complex64)
    with pytest.raises(TypeError, match="sparse" if kind == "sparse" else kind):
        step(optimizer, params, grads)
    assert same(before, snapshot(optimizer))


@two_families
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32], ids=short)
def test_a_parameter_of_a_dtype_that_no_step_can_take_raises(family, dtype):
    bad = nn.Parameter(torch.zeros(5, dtype=dtype), requires_grad=dtype != torch.int32)
    with pytest.raises(TypeError, match=short(dtype)):
        family.general([parameter(5), bad])
    optimizer = family.general([parameter(5)])
    with pytest.raises(TypeError, match=short(dtype)):
        optimizer.add_param_group({"params": [bad]})
    assert len(optimizer.param_groups) == 1
    step(optimizer, optimizer.param_groups[0]["params"], [torch.ones(5)])


# -- groups and hyperparameters -----------------------------------------------------------------


@two_families
@each_bits
@both_paths
def test_each_group_has_its_own_hyperparameters_and_may_be_added_later(family, bits, compiled):
    """Of every variant whose hyperparameters are per group, also where they change what is remembered."""
    options = dict(optim_bits=bits, compile=compiled)
    alone, apart, groups = [], [], []
    for hyper in (family.variants[0], *family.variants):
        param = parameter(5000)
        one = family.general([param], **options, **hyper)
        if vars(one.args) != vars(family.general([param], optim_bits=bits).args):
            continue
        values = {name: value for name, value in one.param_groups[0].items() if name != "params"}
        alone.append(param)
        apart.append(one)
        groups.append(dict(values, params=copies([param])))
    params = [group["params"][0] for group in groups]
    assert len(params) >= 3
    optimizer = family.general([*groups[:-1], dict(params=[])], **options)
    for k in range(6):
        if k == 3:
            optimizer.add_param_group(groups[-1])
            optimizer.add_param_group(dict(params=[]))
        live = len(params) - (k < 3)
        grads = noise(params)[:live]
        step(optimizer, params[:live], grads)
        for one, param, grad in zip(apart, alone, grads):
            step(one, [param], [grad.clone()])
    assert all(torch.equal(param, one) for param, one in zip(params, alone))


@two_families
def test_parameters_may_be_named(family):
    model = nn.Linear(4, 3)
    optimizer = family.general(model.named_parameters(), optim_bits=8)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    step(optimizer, list(model.parameters()), noise(model.parameters()))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(optimizer.state_dict())


@variants
def test_numbers_may_be_tensors_or_strings(family, k):
    hyper = {**family.variants[0], **family.variants[k]}
    as_strings = {name: str(value) for name, value in hyper.items()}
    as_tensor = {**hyper, "lr": torch.tensor(hyper["lr"], dtype=torch.float64)}
    finals = []
    for given in (hyper, as_strings, as_tensor):
        torch.manual_seed(0)
        param = parameter(5000)
        optimizer = family.general([param], **given)
        for k in range(4):
            if k == 2 and given is as_tensor:
                assert optimizer.param_groups[0]["lr"] is given["lr"]
                given["lr"].fill_(2 * hyper["lr"])
            elif k == 2:
                optimizer.param_groups[0]["lr"] = 2 * hyper["lr"]
            step(optimizer, [param], noise([param]))
        finals.append(param)
    assert torch.equal(finals[0], finals[1]) and torch.equal(finals[0], finals[2])


INVALID = (
    (dict(lr=-0.5), "Invalid learning rate: -0.5"),
    (dict(lr=float("nan")), "Invalid learning rate: nan"),
    (dict(lr="fast"), "Invalid learning rate: .*fast"),
    (dict(weight_decay=-0.1), "Invalid weight_decay value: -0.1"),
    (dict(optim_bits=5), "Invalid optim_bits: 5"),
    (dict(min_8bit_size=0.5), "Invalid min_8bit_size: 0.5"),
    (dict(max_unorm=-1.0), "Invalid max_unorm: -1.0"),
    (dict(skip_zeros=2), "Invalid skip_zeros: 2"),
    (dict(percentile_clipping=0), "Invalid percentile_clipping: 0"),
    (dict(percentile_clipping=101), "Invalid percentile_clipping: 101"),
    (dict(block_wise="no"), "Invalid block_wise: 'no'"),
    (dict(is_paged=None), "Invalid is_paged: None"),
    (dict(learning_rate=1.0), "learning_rate"),
)


@pytest.mark.parametrize(
    "family,arguments,message",
    [(family, *invalid) for family in FAMILIES for invalid in INVALID + family.invalid],
    ids=lambda value: str(value) if isinstance(value, dict) else getattr(value, "name", ""),
)
def test_an_invalid_value_raises_in_the_constructor_and_is_shown(family, arguments, message):
    """And what there is not is refused, as everything that would be ignored."""
    with pytest.raises((ValueError, TypeError), match=message):
        family.general([parameter(5)], **arguments)
    good = family.general([parameter(5)])
    if arguments.keys() <= good.defaults.keys():
        with pytest.raises(ValueError, match=message):
            family.general([dict(params=[parameter(5)], **arguments)])
    if arguments.keys() <= vars(good.args).keys():
        with pytest.raises(ValueError, match=message):
            family.general([parameter(5)], args=SimpleNamespace(**{**vars(good.args), **arguments}))


@two_families
def test_args_replaces_the_arguments_of_its_name(family):
    args = SimpleNamespace(optim_bits=8, min_8bit_size=10, max_unorm=0.0, skip_zeros=False)
    params = [parameter(9), parameter(10)]
    optimizer = family.general(params, args=args)
    step(optimizer, params, noise(params))
    assert [optimizer.state[p]["state1"].dtype for p in params] == [torch.float32, torch.uint8]


# -- schedules ----------------------------------------------------------------------------------


def lambda_lr(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))


def one_cycle_lr(optimizer):
    """Moves the first of `betas` too, whatever it is; here only where it has that name."""
    cycle = hasattr(optimizer.reference, "betas")
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=12, cycle_momentum=cycle)


def reduce_lr_on_plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)


@two_families
@both_paths
@pytest.mark.parametrize(
    "schedule", [lambda_lr, one_cycle_lr, reduce_lr_on_plateau], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("created", ["before the first step", "after the first step"])
def test_schedules_take_effect_and_lr_stays_a_float(family, compiled, schedule, created):
    param = parameter(5000)
    optimizer = family.general([param], weight_decay=0.1, compile=compiled)
    optimizer.reference = family.reference([param], weight_decay=0.1)
    (group,) = optimizer.param_groups
    schedules, rates = [], set()
    for k in range(10):
        if k == (created == "after the first step"):
            schedules = [schedule(optimizer)]
        assert type(group["lr"]) is float
        rates.add(group["lr"])
        optimizer.reference.lr = group["lr"]
        if hasattr(optimizer.reference, "betas"):
            optimizer.reference.betas = group["betas"]
        grads = noise([param])
        step(optimizer, [param], grads)
        optimizer.reference.step(grads)
        for scheduler in schedules:
            scheduler.step(*[1.0] * (schedule is reduce_lr_on_plateau))
    assert len(rates) >= 8
    assert relative_error(param, optimizer.reference.params[0]) <= 1e-6


@two_families
@both_paths
def test_a_scheduler_that_steps_before_the_optimizer_is_warned_about(family, compiled):
    optimizer = family.general([parameter(5)], compile=compiled)
    scheduler = lambda_lr(optimizer)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


# -- the contract of torch.optim.Optimizer ------------------------------------------------------


@two_families
@both_paths
def test_step_evaluates_a_closure_with_gradients_and_returns_its_value(family, compiled):
    param = parameter(5)
    optimizer = family.general([param], compile=compiled)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    before = (param**2).sum().item()
    assert optimizer.step(closure).item() == pytest.approx(before)
    assert optimizer.step(closure=closure).item() < before
    assert optimizer.step(None) is None
    assert optimizer.state[param]["step"] == 3


@two_families
def test_hooks_fire_around_step(family):
    param, seen = parameter(5), []
    optimizer = family.general([param])
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(("before", param.detach().clone())))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(("after", param.detach().clone())))
    step(optimizer, [param], noise([param]))
    assert [name for name, _ in seen] == ["before", "after"]
    assert (seen[0][1] != seen[1][1]).any() and torch.equal(seen[1][1], param)


@two_families
def test_zero_grad_forgets_or_zeroes(family):
    params = [parameter(5000), parameter(5), parameter(5)]
    optimizer = family.general(params, optim_bits=8)
    for param, grad in zip(params[:2], noise(params)):
        param.grad = grad
    addresses = [p.grad.data_ptr() for p in params[:2]]
    optimizer.zero_grad(set_to_none=False)
    assert [p.grad.data_ptr() for p in params[:2]] == addresses
    assert not any(p.grad.any() for p in params[:2]) and params[2].grad is None
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@two_families
@each_bits
@both_paths
def test_the_default_dtype_changes_no_state(family, bits, compiled):
    finals = []
    for default in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        param = parameter(5000)
        grads = [noise([param]) for _ in range(3)]
        torch.set_default_dtype(default)
        try:
            optimizer = family.general([param], optim_bits=bits, compile=compiled)
            for grad in grads:
                step(optimizer, [param], grad)
        finally:
            torch.set_default_dtype(torch.float32)
        finals.append((param, optimizer.state[param]))
    (param, state), (other, other_state) = finals
    assert torch.equal(param, other)
    assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in other_state.items()}


# -- changing structure -------------------------------------------------------------------------


@two_families
def test_100_optimizers_of_one_parameter_step_as_one_of_100(family):
    shapes = [(5000,), (64, 64), (7,)] * 33 + [(1,)]
    params = [parameter(*shape) for shape in shapes]
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    together = family.general(params, optim_bits=8)
    apart = [family.general([p], optim_bits=8) for p in alone]
    for _ in range(2):
        grads = noise(params)
        step(together, params, grads)
        for optimizer, param, grad in zip(apart, alone, grads):
            step(optimizer, [param], [grad.clone()])
    assert all(torch.equal(p, q) for p, q in zip(params, alone))


@two_families
@each_bits
@both_paths
def test_a_replaced_parameter_starts_anew_and_the_others_go_on(family, bits, compiled):
    params = [parameter(5000) for _ in range(3)]
    optimizer = family.general(params, optim_bits=bits, compile=compiled)
    untouched = nn.Parameter(params[0].detach().clone())
    other = family.general([untouched], optim_bits=bits, compile=compiled)
    fresh = parameter(6000)
    copy = nn.Parameter(fresh.detach().clone())
    fresh_only = family.general([copy], optim_bits=bits, compile=compiled)
    for k in range(4):
        if k == 2:
            params[1] = optimizer.param_groups[0]["params"][1] = fresh
        grads = noise(params)
        step(optimizer, params, grads)
        step(other, [untouched], grads[:1])
        if k >= 2:
            step(fresh_only, [copy], [grads[1]])
    assert torch.equal(params[0], untouched) and torch.equal(fresh, copy)
    assert [optimizer.state[p]["step"].item() for p in params] == [4, 2, 4]


@two_families
@each_bits
@both_paths
def test_new_parameter_data_and_gradients_are_followed(family, bits, compiled):
    param = parameter(50, 100)
    other = nn.Parameter(param.detach().clone())
    options = dict(optim_bits=bits, compile=compiled)
    optimizer, plain = family.general([param], **options), family.general([other], **options)
    keep = []
    for k in range(4):
        grads = noise([param])
        step(plain, [other], grads)
        keep.append(param.data)  # so that the old address is not used again
        param.data = param.data.clone() if k != 2 else param.data.t().contiguous().t()
        step(optimizer, [param], [grads[0].clone()])
    assert torch.equal(param, other)


@two_families
@each_bits
@both_paths
def test_frozen_then_unfrozen_parameters_go_on_where_they_were(family, bits, compiled):
    layers = [nn.Linear(70, 70, bias=False) for _ in range(2)]
    params = [layer.weight for layer in layers]
    params[1].requires_grad_(False)
    optimizer = family.general(params, optim_bits=bits, compile=compiled)
    for k in range(9):
        params[0].requires_grad_(not 3 <= k < 6)
        params[1].requires_grad_(k >= 3)
        before = [p.detach().clone() for p in params]
        layers[1](layers[0](torch.randn(4, 70))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(p, q) for p, q in zip(params, before)]
        assert moved == [not 3 <= k < 6, k >= 3]
    assert [optimizer.state[p]["step"].item() for p in params] == [6, 6]

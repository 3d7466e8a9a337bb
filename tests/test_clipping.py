"""Percentile clipping against plain Python: one parameter, one step, a list of 100 squared norms."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from bnb_compile import optim
from bnb_compile.optim.clipping import gradient_norms, percentile_factor, present_mask
from bnb_compile.optim.percentile import PercentileClipper
from bnb_compile.state.checkpoint import RING as NORMS

pytestmark = pytest.mark.usefixtures("one_thread")  # for small tensors more threads cost more than they do


def clipping_scale(ring, grads, step, percentile):
    """What a step multiplies the gradients by."""
    squares = gradient_norms(grads, step.device).square()
    present = present_mask(grads, step.device)
    return percentile_factor(
        ring, squares, present, step, torch.full_like(step, percentile, dtype=torch.int64)
    )


class Ring:
    """What bitsandbytes 0.49 does for a parameter, in Python's numbers.

    Step t, counted from 1, puts the squared norm of its gradient into entry t modulo 100; the first puts it
    into all. The gradient is scaled so that its norm is not above the one at the percentile of the sorted
    100. What bitsandbytes does not define: a norm that is not finite is not put anywhere, and the first that
    is finite and not zero counts as the first.
    """

    def __init__(self, percentile):
        self.percentile, self.squares, self.step = percentile, [0.0] * 100, 0

    def scale(self, grad):
        if grad is None:
            return 1.0
        self.step += 1
        square = sum(x * x for x in grad.double().flatten().tolist())
        if not square < 3.4e38:  # NaN, or infinite in float32
            return 1.0
        if not any(self.squares):
            self.squares = [square] * 100
        self.squares[self.step % 100] = square
        limit = sorted(self.squares)[self.percentile]
        return math.sqrt(limit / square) if square > limit else 1.0


def gradients(steps, shapes, dtype=torch.float32, seed=0):
    """Of changing norms; sometimes there is none, sometimes it is not finite, zero, or huge."""
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        grads = []
        for k, shape in enumerate(shapes):
            size = 0.1 * math.exp(torch.randn((), generator=generator).item())
            grad = (torch.randn(shape, generator=generator) * size).to(dtype)
            chance = torch.rand((), generator=generator)
            if k == 1 and chance < 0.2:
                grad = None
            elif k == 2 and chance < 0.2 and grad.numel():
                grad.view(-1)[-1] = [math.nan, math.inf, -math.inf][t % 3]
            elif k == 3 and (t < 3 or chance < 0.1):
                grad = torch.zeros_like(grad)
            grads.append(grad)
        yield grads


SHAPES = [(3, 5), (17,), (40,), (6,), ()]


def step_of(rings):
    return torch.tensor([float(ring.step) for ring in rings])


@pytest.mark.parametrize("percentile", [1, 5, 50, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scales_and_rings_are_those_of_the_plain_ones(percentile, dtype):
    rings = [Ring(percentile) for _ in SHAPES]
    recorded, step = torch.zeros(len(SHAPES), NORMS), torch.zeros(len(SHAPES), dtype=torch.int64)
    clipped = 0
    for grads in gradients(250, SHAPES, dtype):
        scale = clipping_scale(recorded, grads, step, percentile)
        expected = [ring.scale(grad) for ring, grad in zip(rings, grads)]
        torch.testing.assert_close(scale, torch.tensor(expected), rtol=1e-5, atol=0)
        step = step_of(rings)
        clipped += sum(s < 1 for s in expected)
        torch.testing.assert_close(
            recorded, torch.tensor([ring.squares for ring in rings]), rtol=1e-5, atol=0
        )
    assert clipped == 0 if percentile == 99 else clipped > 300  # 99 is the largest, maybe the newest
    assert scale.dtype == recorded.dtype == torch.float32


def test_the_first_norm_fills_the_ring_and_entry_t_modulo_100_is_overwritten():
    ring, step = torch.zeros(1, NORMS), torch.zeros(1, dtype=torch.int64)
    assert clipping_scale(ring, [torch.full((4,), 3.0)], step, 50).tolist() == [1.0]
    assert ring.tolist() == [[36.0] * NORMS]
    for t in range(2, 203):
        before = ring.clone()
        clipping_scale(ring, [torch.full((4,), t / 2)], torch.tensor([t - 1.0]), 50)
        (changed,) = (ring != before).nonzero()[:, 1:].unique().tolist() or [t % NORMS]
        assert changed == t % NORMS and ring[0, t % NORMS] == t * t


def test_a_gradient_is_scaled_to_the_norm_at_the_percentile():
    squares = torch.arange(1.0, 101).square()
    ring = squares[torch.randperm(NORMS)][None]
    at = 31  # the entry of step 131, which is replaced
    grad = torch.zeros(3, 3)
    grad[1, 1] = -1000.0
    rest = sorted([*ring[0, :at].tolist(), *ring[0, at + 1 :].tolist(), 1e6])
    scale = clipping_scale(ring, [grad], torch.tensor([130.0]), 10)
    assert scale.item() == pytest.approx(math.sqrt(rest[10]) / 1000)
    assert ring[0, at] == 1e6


def test_parameters_are_independent():
    grads = [torch.randn(5) * 10**k for k in range(4)]
    together, step = torch.rand(4, NORMS), torch.tensor([0, 7, 99, 100])
    apart = together.clone()
    scale = clipping_scale(together, grads, step, 5)
    for k in range(4):
        alone = apart[k : k + 1]
        assert clipping_scale(alone, [grads[k]], step[k : k + 1], 5) == scale[k]
        assert torch.equal(alone[0], together[k])


# -- in an optimizer -----------------------------------------------------------------------------

SIZES = [(70, 65), (17,), (40,), (6,), ()]


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter((torch.randn(size, generator=generator) * 0.1).to(dtype)) for size in SIZES]


def train(optimizer, params, steps):
    for grads in steps:
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else grad.clone()
        optimizer.step()


@pytest.mark.parametrize("name", ["Adam8bit", "SGD32bit", "Lion8bit", "LAMB"])
def test_an_optimizer_clips_as_if_its_gradients_had_been_scaled(name):
    """Gradients as small as a parameter are enough, and finite: scaling happens in float32."""
    arguments = dict(lr=1e-2, compile=False, **(dict(momentum=0.9) if "SGD" in name else {}))
    params, others = parameters(), parameters()
    clipped = getattr(optim, name)(params, percentile_clipping=20, **arguments)
    plain = getattr(optim, name)(others, **arguments)
    rings = [Ring(20) for _ in SIZES]
    for grads in gradients(40, SIZES):
        train(clipped, params, [grads])
        scaled = [None if g is None else g * ring.scale(g) for g, ring in zip(grads, rings)]
        train(plain, others, [scaled])
    for param, other, ring in zip(params, others, rings):
        if param.numel() < 4096 and name != "Lion8bit":  # no codes and signs, which rounding may flip
            torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
        else:
            assert (param - other).abs().mean() < 1e-4
        recorded = clipped.state[param]["gnorm_vec"]
        torch.testing.assert_close(recorded, torch.tensor(ring.squares), rtol=1e-5, atol=0)
        assert recorded.shape == (100,) and recorded.dtype == torch.float32
        assert clipped.state[param]["step"] == ring.step
    assert "gnorm_vec" not in plain.state[others[0]]


def test_a_percentile_of_100_is_off_and_5_is_not():
    def trained(**options):
        params = parameters()
        optimizer = optim.SGD(params, lr=0.1, momentum=0.9, compile=False, **options)
        train(optimizer, params, gradients(10, SIZES))
        return [p.tolist() for p in params]

    assert str(trained()) == str(trained(percentile_clipping=100)) != str(trained(percentile_clipping=5))


def test_gradients_of_several_dtypes_are_clipped_together_with_their_parameter():
    """A bucket with gradients of two dtypes is stepped once for each."""
    params = [nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = optim.SGD(params, lr=1.0, percentile_clipping=5, compile=False)
    for t, size in enumerate([1.0, 4.0], 1):
        for param, dtype in zip(params, (torch.float32, torch.bfloat16)):
            param.grad = None
            param.grad_dtype = None  # any
            param.grad = torch.full((8,), size, dtype=dtype)
        optimizer.step()
        for param in params:
            torch.testing.assert_close(param.detach(), torch.full((8,), 1.0 - t), rtol=0, atol=1e-6)
            assert optimizer.state[param]["step"] == t


@pytest.mark.parametrize("bits", [8, 32])
def test_the_ring_is_resumed_bitwise(bits):
    """By steps that pass its end."""
    params = parameters()
    steps = list(gradients(130, SIZES))
    arguments = dict(lr=1e-2, optim_bits=bits, percentile_clipping=10, compile=False)
    optimizer = optim.AdamW(params, **arguments)
    train(optimizer, params, steps[:95])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = [nn.Parameter(p.detach().clone()) for p in params]
    forgetful = [nn.Parameter(p.detach().clone()) for p in params]
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    train(optimizer, params, steps[95:])

    fresh = optim.AdamW(resumed, **arguments)
    fresh.load_state_dict(saved)
    train(fresh, resumed, steps[95:])
    assert all(torch.equal(p, q) for p, q in zip(params, resumed))
    for p, q in zip(params, resumed):
        assert torch.equal(optimizer.state[p]["gnorm_vec"], fresh.state[q]["gnorm_vec"])

    for entry in saved["state"].values():
        del entry["gnorm_vec"]
    without = optim.AdamW(forgetful, **arguments)
    without.load_state_dict(saved)
    train(without, forgetful, steps[95:])
    assert not torch.equal(params[0], forgetful[0])


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD32bit"])
def test_one_norm_of_all_gradients_is_clipped_as_torch_does(name):
    arguments = dict(lr=1e-2, compile=False, **(dict(momentum=0.9) if "SGD" in name else {}))
    params, others = parameters(), parameters()
    clipped = getattr(optim, name)(params, max_grad_norm=2.0, **arguments)
    plain = getattr(optim, name)(others, **arguments)
    norms = []
    for grads in gradients(15, SIZES):
        grads = [None if g is None else g.nan_to_num(0.0, 0.0, 0.0) for g in grads]
        train(clipped, params, [grads])
        for param, grad in zip(others, grads):
            param.grad = None if grad is None else grad.clone()
        norms.append(torch.nn.utils.clip_grad_norm_(others, 2.0).item())
        plain.step()
    assert min(norms) < 2 * 2.0 and max(norms) > 2.0
    for param, other in zip(params, others):
        if param.numel() < 4096:
            torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-6)
        else:
            assert (param - other).abs().mean() < 1e-4


def test_nothing_moves_if_the_norm_of_all_gradients_is_not_finite():
    params = parameters()
    optimizer = optim.AdamW8bit(params, max_grad_norm=1.0, percentile_clipping=5, compile=False)
    steps = [[torch.randn(size) for size in SIZES] for _ in range(2)]
    train(optimizer, params, steps)
    before = copy.deepcopy(([p.detach() for p in params], optimizer.state_dict()["state"]))
    steps[0][1][3] = math.inf
    train(optimizer, params, steps[:1])
    for k, param in enumerate(params):
        assert torch.equal(param, before[0][k])
        after, entry = optimizer.state_dict()["state"][k], before[1][k]
        assert after["step"] == entry["step"] == 2
        assert all(torch.equal(v, after[key]) for key, v in entry.items() if key != "step")


@pytest.mark.parametrize("per_parameter", [True, False])
def test_a_clipper_for_any_optimizer(per_parameter):
    params = parameters()
    clipper = PercentileClipper(params, percentile=20, per_parameter=per_parameter)
    rings = [Ring(20) for _ in (SIZES if per_parameter else [0])]
    for t, grads in enumerate(gradients(120, SIZES)):
        if not per_parameter:
            grads = [None if g is None else g.nan_to_num(0.0, 0.0, 0.0) for g in grads]
        for param, grad in zip(params, grads):
            param.grad = None if grad is None else grad.clone()
        if t == 60:  # resumed
            saved = copy.deepcopy(clipper.state_dict())
            clipper = PercentileClipper(params, percentile=20, per_parameter=per_parameter)
            clipper.load_state_dict(saved)
        norms = clipper.clip_()
        present = [g for g in grads if g is not None]
        if per_parameter:
            scales = [ring.scale(g) for ring, g in zip(rings, grads)]
            expected = torch.tensor([0.0 if g is None else g.norm().item() for g in grads])
        else:
            scales = [rings[0].scale(torch.cat([g.flatten() for g in present]))] * len(SIZES)
            expected = torch.stack([g.norm() for g in present]).norm()[None]
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0, equal_nan=True)
        for param, grad, scale in zip(params, grads, scales):
            if grad is None:
                assert param.grad is None
            else:
                torch.testing.assert_close(param.grad, grad * scale, rtol=1e-5, atol=0, equal_nan=True)


def test_a_clipper_says_what_it_does_not_take():
    params = parameters()
    with pytest.raises(ValueError, match="empty"):
        PercentileClipper([])
    for percentile in (0, 100, -1):
        with pytest.raises(ValueError, match=rf"percentile: {percentile}.*\[1, 99\]"):
            PercentileClipper(params, percentile)
    clipper = PercentileClipper(params)
    before = copy.deepcopy(clipper.state_dict())
    with pytest.raises(ValueError, match="shape"):
        clipper.load_state_dict(PercentileClipper(params[:2]).state_dict())
    assert all(torch.equal(v, before[key]) for key, v in clipper.state_dict().items())


def test_a_ring_is_read_by_an_optimizer_that_does_not_clip_and_forgotten():
    params = parameters()
    optimizer = optim.AdamW(params, percentile_clipping=10, compile=False)
    train(optimizer, params, gradients(3, SIZES))
    plain = optim.AdamW(parameters(), compile=False)
    plain.load_state_dict(optimizer.state_dict())
    assert all("gnorm_vec" not in state for state in plain.state.values())


def test_a_ring_survives_a_conversion_of_the_parameters():
    params = parameters()
    optimizer = optim.AdamW8bit(params, percentile_clipping=10, compile=False)
    train(optimizer, params, gradients(3, SIZES))
    before = copy.deepcopy([optimizer.state[p]["gnorm_vec"] for p in params])
    for param in params:
        param.grad = None
        param.data = param.data.to(torch.bfloat16)
    optimizer.init_state()
    assert all(torch.equal(optimizer.state[p]["gnorm_vec"], ring) for p, ring in zip(params, before))


@pytest.mark.parametrize("clipping", [dict(percentile_clipping=20), dict(max_grad_norm=1.0)], ids=str)
def test_a_captured_step_that_clips_is_captured_once(clipping):
    params = parameters()
    optimizer = optim.AdamW8bit(params, **clipping)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        for param in params:
            param.grad = torch.ones_like(param)
        step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_clipping_in_a_captured_step_is_the_eager_one():
    sizes = SIZES[:3]
    params, others = parameters()[:3], parameters()[:3]
    arguments = dict(lr=1e-2, percentile_clipping=20)
    captured, eager = (
        optim.AdamW8bit(params, **arguments),
        optim.AdamW8bit(others, **arguments, compile=False),
    )
    steps = [grads for grads in gradients(60, sizes) if all(g is not None for g in grads)]
    step = torch.compile(captured.step, fullgraph=True)
    for grads in steps:
        for mine, optimizer_step in ((params, step), (others, eager.step)):
            for param, grad in zip(mine, grads):
                param.grad = grad.clone()
            optimizer_step()
    assert len(steps) > 40
    for param, other in zip(params, others):
        torch.testing.assert_close(
            captured.state[param]["gnorm_vec"], eager.state[other]["gnorm_vec"], rtol=1e-5, atol=0
        )
        if param.numel() < 4096:
            torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
        else:
            assert (param - other).abs().mean() < 1e-4
        assert captured.state[param]["step"] == len(steps)

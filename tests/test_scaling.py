"""What multiplies gradients inside the step: a global norm, a GradScaler, a percentile; and what stops it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from bnb_compile import PercentileClipper
from bnb_compile.optim import SGD, AdamW

pytestmark = pytest.mark.usefixtures("one_thread")  # for small tensors more threads cost more than they do


@pytest.fixture(autouse=True, scope="module")
def forget_graphs():
    yield
    torch._dynamo.reset()


#: How a step is run. "captured" is the user's own graph; its backend runs the eager operators.
PATHS = ["eager", "compiled", "captured"]
each_path = pytest.mark.parametrize("path", PATHS)
both_eager = pytest.mark.parametrize("path", PATHS[:2])

#: Shape, dtype: a bucket with 8-bit states and two with 32-bit ones.
KINDS = [((20, 30), torch.float32), ((300,), torch.float32), ((7,), torch.float32), ((5, 3), torch.bfloat16)]
OPTIONS = dict(optim_bits=8, min_8bit_size=256)


def parameters(kinds=KINDS):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in kinds]


def gradients(params, size=1.0):
    return [(torch.randn(p.shape) * size).to(p.dtype) for p in params]


def sgd(params, path="eager", **options):
    return SGD(params, lr=0.05, momentum=0.9, compile=path != "eager", **OPTIONS, **options)


def stepper(optimizer, path):
    if path != "captured":
        return optimizer.step
    torch._dynamo.reset()
    return torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")


def give(params, grads):
    for param, grad in zip(params, grads):
        param.grad = None if grad is None else grad.clone()


def snapshot(optimizer):
    """Everything that a step may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [[p.detach().clone(), *(v.clone() for v in optimizer.state[p].values())] for p in params]


def same(one, other):
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other)
    )


def assert_same_way(params, others, starts):
    """Displacements agree but for rounding: a unit of bfloat16 now and then, a code in 8-bit states."""
    for param, other, start in zip(params, others, starts):
        mine, expected = (p.detach().float() - start.float() for p in (param, other))
        bound = 1e-2 if param.dtype == torch.bfloat16 else 1e-3 if param.numel() >= 256 else 1e-5
        assert (mine - expected).norm() <= bound * expected.norm()


def starts_of(params):
    return [param.detach().clone() for param in params]


# -- the global norm -----------------------------------------------------------------------------


@each_path
def test_max_grad_norm_is_clip_grad_norm_before_the_step(path):
    """Over three buckets. Norms are above and below the limit; a gradient is missing sometimes, or always."""
    params, others = parameters(), parameters()
    starts = starts_of(params)
    optimizer, plain = sgd(params, path, max_grad_norm=3.0), sgd(others)
    others[3].grad_dtype = None  # as torch would round a norm to bfloat16
    step, clipped = stepper(optimizer, path), 0
    for k in range(12):
        grads = gradients(params, 0.02 if k % 3 == 0 else 0.5)
        grads[1] = None if path == "captured" or k in (2, 5, 6) else grads[1]
        give(params, grads)
        give(others, [None if g is None else g.float() for g in grads])
        clipped += nn.utils.clip_grad_norm_(others, 3.0) > 3.0
        step()
        plain.step()
    assert clipped == 8
    moving = [k for k in range(4) if k != 1 or path != "captured"]
    assert_same_way(*([tensors[k] for k in moving] for tensors in (params, others, starts)))
    assert [optimizer.state[p].get("step") for p in params] == [plain.state[p].get("step") for p in others]
    given = [p.grad for p in params if p.grad is not None]
    assert all(torch.equal(g, h) for g, h in zip(given, (g for g in grads if g is not None)))  # only read


@each_path
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_skips_the_step(path, bad):
    params = parameters()
    optimizer = sgd(params, path, max_grad_norm=1.0)
    step = stepper(optimizer, path)
    give(params, gradients(params))
    step()
    for k in (0, 3):  # whichever bucket it is in
        before = snapshot(optimizer)
        grads = gradients(params)
        grads[k].view(-1)[2] = bad
        give(params, grads)
        step()
        assert same(before, snapshot(optimizer))
    give(params, gradients(params))
    step()
    assert not any(torch.equal(p, old[0]) for p, old in zip(params, before))
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_max_grad_norm_may_be_changed_and_no_gradients_are_no_step():
    param = nn.Parameter(torch.zeros(4))
    optimizer = SGD([param], lr=1.0, momentum=0.0, compile=False, max_grad_norm="2.0")
    optimizer.step()
    for limit, moved in ((2.0, 1.0), (1.0, 0.5), (None, 3.0)):
        optimizer.max_grad_norm = limit
        param.grad, before = torch.full((4,), 3.0), param.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - param.detach(), torch.full((4,), moved))
    with pytest.raises(ValueError, match="max_grad_norm: -1"):
        SGD([param], lr=1.0, max_grad_norm=-1)


@pytest.mark.parametrize("options", [dict(max_grad_norm=1.0), dict(percentile_clipping=5)], ids=str)
def test_clipping_in_a_graph_is_compiled_once(options):
    params, counter = parameters(), CompileCounter()
    optimizer = sgd(params, **options)
    torch._dynamo.reset()
    step = torch.compile(lambda: optimizer.step(), fullgraph=True, backend=counter)
    for k in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 / (k + 1)
        give(params, gradients(params))
        step()
    assert counter.frame_count == 1


def test_a_whole_step_with_max_grad_norm_is_one_graph_of_inductor():
    """Forward, backward, clipping and update, beside the same with torch's clipping outside of a graph."""
    torch._dynamo.reset()
    models = [nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    starts = starts_of(models[0].parameters())
    optimizer = sgd(models[0].parameters(), max_grad_norm=0.05)
    plain = sgd(models[1].parameters())

    def train(model, x):
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        return loss.detach()

    def train_step(x):
        loss = train(models[0], x)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(train_step, fullgraph=True)
        for _ in range(5):
            x = torch.randn(16, 20)
            loss, expected = compiled(x), train(models[1], x)
            assert nn.utils.clip_grad_norm_(models[1].parameters(), 0.05) > 0.05
            plain.step()
            plain.zero_grad()
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    for param, other, start in zip(*(m.parameters() for m in models), starts):
        assert (param - other).norm() <= 1e-3 * (other - start).norm()


# -- a GradScaler --------------------------------------------------------------------------------


class Training:
    """A model and its optimizer, with a scaler or without one."""

    def __init__(self, path, scaled=True, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
        self.optimizer = sgd(self.model.parameters(), path, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)

    def step(self, seed, factor=1.0, prepare=lambda training: None):
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed))
        self.scaler.scale((self.model(x) - x.flip(1)).square().mean() * factor).backward()
        prepare(self)
        result = self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return result

    def snapshot(self):
        return snapshot(self.optimizer)


fused_or_not = pytest.mark.parametrize("fused", [False, True], ids=["normal", "fused"])


@both_eager
@fused_or_not
def test_steps_with_a_scaler_are_steps_without_bitwise(path, fused):
    """The scale is a power of two, so it rounds nothing."""
    scaled, plain = Training(path, amp_fused=fused), Training(path, scaled=False)
    for seed in range(5):
        scaled.step(seed)
        plain.step(seed)
    assert same(scaled.snapshot(), plain.snapshot())
    assert not hasattr(scaled.optimizer, "grad_scale") and not hasattr(scaled.optimizer, "found_inf")


def unscale(training):
    training.scaler.unscale_(training.optimizer)


def unscale_and_clip(training):
    unscale(training)
    nn.utils.clip_grad_norm_(training.model.parameters(), 1e-3)


@pytest.mark.parametrize("prepare", [unscale, unscale_and_clip], ids=lambda f: f.__name__)
@fused_or_not
def test_gradients_may_be_unscaled_first(fused, prepare):
    scaled, plain = Training("eager", amp_fused=fused), Training("eager", scaled=False)
    for seed in range(5):
        scaled.step(seed, prepare=prepare)
        plain.step(seed, prepare=prepare if prepare is unscale_and_clip else lambda training: None)
    assert same(scaled.snapshot(), plain.snapshot())


ALL_OF_IT = dict(percentile_clipping=50, max_grad_norm=0.5)


@both_eager
@fused_or_not
@pytest.mark.parametrize("options", [{}, ALL_OF_IT], ids=["", "clipping"])
@pytest.mark.parametrize("when", ["before the first step", "later"])
def test_an_overflow_leaves_everything_as_it_is_and_lowers_the_scale(path, fused, options, when):
    """Parameters, codes, scales, the ring of percentile clipping, and the step counts."""
    training = Training(path, amp_fused=fused, **options)
    if when == "later":
        training.step(0)
    else:
        training.optimizer.init_state()
    before = training.snapshot()
    assert len(before[0]) == 1 + 4 + bool(options)
    for seed in (1, 2):
        assert training.step(seed, factor=math.inf) is None
        assert same(before, training.snapshot())
    assert training.scaler.get_scale() == 2.0**8
    training.step(3)
    after = training.snapshot()
    assert not any(torch.equal(new[0], old[0]) for new, old in zip(after, before))
    assert all(state["step"] == 1 + (when == "later") for state in training.optimizer.state.values())


def test_unscaled_gradients_that_overflowed_skip_the_fused_step_too():
    training = Training("eager", amp_fused=True)
    training.step(0)
    before = training.snapshot()
    training.step(1, factor=math.inf, prepare=unscale)
    assert same(before, training.snapshot())


def test_a_scale_set_by_the_user_is_multiplied_with_the_scalers():
    """As in torch's fused optimizers: gradients of a loss that is four times as large, divided by four."""
    scaled, plain = Training("eager", amp_fused=True), Training("eager", scaled=False)

    def quarter(training):
        training.optimizer.grad_scale = torch.tensor(4.0)

    for seed in range(3):
        scaled.step(seed, factor=4.0, prepare=quarter)
        plain.step(seed)
    assert same(scaled.snapshot(), plain.snapshot())
    assert not hasattr(scaled.optimizer, "grad_scale")


def test_the_scaler_unscales_by_default():
    """Lightning refuses to clip where the optimizer would do it."""
    params = parameters()
    assert not AdamW(params)._step_supports_amp_scaling
    assert AdamW(params, amp_fused=True)._step_supports_amp_scaling
    with pytest.raises(ValueError, match="amp_fused: 'maybe'"):
        AdamW(params, amp_fused="maybe")


# -- the attributes by hand ----------------------------------------------------------------------


@each_path
@pytest.mark.parametrize(
    "scale", [8.0, torch.tensor(8.0), torch.tensor([8.0])], ids=["number", "tensor", "one element"]
)
def test_gradients_are_divided_by_grad_scale(path, scale):
    params, others = parameters(), parameters()
    optimizer, plain = sgd(params, path), sgd(others, path)
    optimizer.grad_scale = scale
    step = stepper(optimizer, path)
    for _ in range(3):
        grads = gradients(params)
        give(params, [grad * 8 for grad in grads])
        give(others, grads)
        step()
        plain.step()
    if path == "captured":  # `plain` has run the kernel
        assert_same_way(params, others, parameters())
    else:
        assert same(snapshot(optimizer), snapshot(plain))


@each_path
def test_found_inf_skips_a_step_and_may_change_in_a_graph(path):
    """Also with finite gradients: who sets it knows why."""
    params, others = parameters(), parameters()
    starts = starts_of(params)
    optimizer, plain = sgd(params, path, **ALL_OF_IT), sgd(others, **ALL_OF_IT)
    optimizer.found_inf = torch.tensor(0.0)
    step = stepper(optimizer, path)
    for found in (0.0, 1.0, 0.0, 0.0, 2.0, 0.0):
        optimizer.found_inf.fill_(found)
        grads = gradients(params)
        give(params, grads)
        before = snapshot(optimizer)
        step()
        if found:
            assert same(before, snapshot(optimizer))
        else:
            give(others, grads)
            plain.step()
    assert_same_way(params, others, starts)
    assert all(optimizer.state[p]["step"] == 4 for p in params)


@pytest.mark.parametrize("found", [1, 1.0, True, torch.tensor([1.0])], ids=str)
def test_found_inf_may_be_a_number_and_is_obeyed_until_it_is_removed(found):
    params = parameters()
    optimizer = sgd(params)
    optimizer.init_state()
    optimizer.found_inf = found
    before = snapshot(optimizer)
    for _ in range(2):
        give(params, gradients(params))
        optimizer.step()
    assert same(before, snapshot(optimizer))
    del optimizer.found_inf
    optimizer.step()
    assert not any(torch.equal(p, old[0]) for p, old in zip(params, before))


# -- all of it together --------------------------------------------------------------------------


class PlainRing:
    """bitsandbytes 0.49's clipping of one gradient: to an entry of the sorted last 100 norms."""

    def __init__(self, percentile):
        self.percentile, self.norms = percentile, []

    def factor(self, norm):
        self.norms = [*self.norms, norm] if self.norms else [norm] * 100
        self.norms = self.norms[-100:]
        return min(1.0, sorted(self.norms)[self.percentile] / norm)


@each_path
def test_unscaling_the_global_norm_and_the_percentile_come_in_this_order(path):
    kinds = KINDS[1:3] if path == "captured" else KINDS[:3]
    params, others = parameters(kinds), parameters(kinds)
    starts = starts_of(params)
    optimizer, plain = sgd(params, path, max_grad_norm=20.0, percentile_clipping=30), sgd(others)
    optimizer.grad_scale = torch.tensor(4.0)
    step, rings, cut = stepper(optimizer, path), [PlainRing(30) for _ in kinds], [0, 0]
    for _ in range(30):
        grads = [g * torch.randn(()).exp() for g in gradients(params)]
        give(params, [4 * g for g in grads])
        step()
        give(others, grads)
        cut[0] += nn.utils.clip_grad_norm_(others, 20.0).item() > 20.0
        for other, ring in zip(others, rings):
            factor = ring.factor(other.grad.double().norm().item())
            other.grad *= factor
            cut[1] += factor < 1
        plain.step()
    assert min(cut) > 5
    assert_same_way(params, others, starts)


# -- gradients that are not finite -----------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf, 2.0**60, -3e38]


@each_path
@pytest.mark.parametrize("scale", [None, 4.0], ids=["plain", "scaled"])
def test_elements_without_a_usable_gradient_are_skipped_and_poison_nothing(path, scale):
    """In 8-bit blocks and 32-bit states; the others move as beside a gradient of zero."""
    kinds = [((600,), torch.float32), ((40,), torch.float32)]
    params, others = parameters(kinds), parameters(kinds)
    options = dict(lr=0.05, weight_decay=0.1, compile=path != "eager", **OPTIONS)
    optimizer, clean = AdamW(params, **options), AdamW(others, **options)
    if scale is not None:
        optimizer.grad_scale = clean.grad_scale = torch.tensor(scale)
    steps = [stepper(o, path) for o in (optimizer, clean)]
    if path == "captured":
        steps[1] = torch.compile(lambda: clean.step(), fullgraph=True, backend="aot_eager")
    places = [[0, 255, 256, 300, 599], [0, 1, 5, 38, 39]]
    start = starts_of(params)
    for _ in range(3):
        grads = gradients(params)
        zeroed = [grad.clone() for grad in grads]
        for grad, zero, where in zip(grads, zeroed, places):
            grad[where] = torch.tensor(BAD) * (scale or 1.0)
            zero[where] = 0.0
        for mine, values, step in ((params, grads, steps[0]), (others, zeroed, steps[1])):
            give(mine, values)
            step()
    for param, other, old, where in zip(params, others, start, places):
        rest = torch.ones_like(param, dtype=torch.bool)
        rest[where] = False
        assert torch.equal(param[~rest], old[~rest]) and torch.equal(param[rest], other[rest])
        state, expected = optimizer.state[param], clean.state[other]
        for name in ("state1", "state2"):
            assert torch.equal(state[name][rest], expected[name][rest])
            if state[name].dtype == torch.float32:
                assert not state[name][~rest].any()
        assert all(value.isfinite().all() for value in state.values())
        assert state["step"] == 3


# -- PercentileClipper ----------------------------------------------------------------------------


def plain_clip(rings, grads, per_parameter):
    """Clipped copies of the gradients, and the norms that were recorded."""
    norms = [0.0 if g is None else g.double().norm().item() for g in grads]
    if not per_parameter:
        norms = [math.sqrt(sum(n * n for n in norms))]
        factors = [rings[0].factor(norms[0])] * len(grads)
    else:
        factors = [1.0 if g is None else ring.factor(n) for ring, g, n in zip(rings, grads, norms)]
    return [None if g is None else g.float() * f for g, f in zip(grads, factors)], norms


@pytest.mark.parametrize("per_parameter", [True, False], ids=["per parameter", "global"])
@pytest.mark.parametrize("interrupted", [False, True], ids=["", "saved and loaded"])
def test_a_clipper_before_sgd_is_the_plain_one(per_parameter, interrupted):
    """250 steps: over the end of the 100 norms, also for a gradient that is missing now and then."""
    kinds = [((6, 5), torch.float32), ((40,), torch.float32), ((30,), torch.bfloat16)]
    params, others = parameters(kinds), parameters(kinds)
    others[2].grad_dtype = None
    optimizers = [torch.optim.SGD(ps[:2], lr=1e-3, momentum=0.9) for ps in (params, others)]
    clipper = PercentileClipper(params, percentile=40, per_parameter=per_parameter)
    rings = [PlainRing(40) for _ in range(3 if per_parameter else 1)]
    clipped = 0
    for k in range(250):
        if interrupted and k in (90, 130):
            saved = {name: value.clone() for name, value in clipper.state_dict().items()}
            clipper = PercentileClipper(params, percentile=40, per_parameter=per_parameter)
            clipper.load_state_dict(saved)
        grads = [g * torch.randn(()).exp().to(g.dtype) for g in gradients(params)]
        if k and torch.rand(()) < 0.2:
            grads[1] = None
        give(params, grads)
        expected, norms = plain_clip(rings, grads, per_parameter)
        addresses = [p.grad.data_ptr() for p in params if p.grad is not None]
        found = clipper.clip_()
        torch.testing.assert_close(found, torch.tensor(norms), rtol=1e-6, atol=0)
        assert addresses == [p.grad.data_ptr() for p in params if p.grad is not None]
        for param, other, grad in zip(params, others, expected):
            other.grad = grad
            if grad is not None:
                ulp = 2**-7 if param.dtype == torch.bfloat16 else 2e-6
                torch.testing.assert_close(param.grad.float(), grad, rtol=ulp, atol=0)
        clipped += (params[0].grad.norm() < 0.999 * grads[0].norm()).item()
        for optimizer in optimizers:
            optimizer.step()
    assert 100 < clipped < 200
    for param, other in zip(params[:2], others[:2]):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("per_parameter", [True, False], ids=["per parameter", "global"])
def test_a_clipper_in_a_graph_is_the_one_outside(per_parameter):
    """In one graph with the gradients' use (torch's SGD breaks a graph); compiled once for 120 steps."""
    torch._dynamo.reset()
    kinds = [((6, 5), torch.float32), ((30,), torch.bfloat16), ((4,), torch.float32)]
    params, others = parameters(kinds), parameters(kinds)
    clippers = [PercentileClipper(ps, 30, per_parameter) for ps in (params, others)]

    @torch.no_grad()
    def descend(params):
        for param in params:
            if param.grad is not None:
                param.sub_(param.grad, alpha=0.01)

    @torch.compile(fullgraph=True)
    def captured():
        norms = clippers[0].clip_()
        descend(params)
        return norms

    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(120):
            grads = [g * torch.randn(()).exp().to(g.dtype) for g in gradients(params)]
            grads[2] = None
            for ps in (params, others):
                give(ps, grads)
            norms, expected = captured(), clippers[1].clip_()
            descend(others)
            torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(clippers[0].state_dict(), clippers[1].state_dict(), rtol=1e-5, atol=0)
    for param, other in zip(params, others):
        tolerance = 2**-6 if param.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(param, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("per_parameter", [True, False], ids=["per parameter", "global"])
def test_a_clipper_neither_records_nor_scales_what_is_not_finite(per_parameter, bad):
    params = parameters(KINDS[1:3])
    clipper = PercentileClipper(params, 50, per_parameter)
    give(params, gradients(params))
    clipper.clip_()
    before = clipper.ring.clone()
    grads = gradients(params)
    grads[0][3] = bad
    give(params, grads)
    clipper.clip_()
    recorded = clipper.ring != before
    assert not recorded[0].any() and recorded.any() == per_parameter
    assert torch.equal(params[0].grad.nan_to_num(), grads[0].nan_to_num())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(parameters=[]), "parameters is empty"),
        (dict(percentile=0), "percentile: 0"),
        (dict(percentile=100), "percentile: 100"),
    ],
    ids=str,
)
def test_a_clipper_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PercentileClipper(**{"parameters": parameters(), **arguments})


def test_a_clippers_state_of_other_parameters_is_refused_and_changes_nothing():
    clipper, other = PercentileClipper(parameters()), PercentileClipper(parameters()[:2])
    give(clipper.parameters, gradients(clipper.parameters))
    clipper.clip_()
    before = clipper.ring.clone()
    with pytest.raises(ValueError, match=r"\(2, 100\).*\(4, 100\)"):
        clipper.load_state_dict(other.state_dict())
    assert torch.equal(clipper.ring, before)

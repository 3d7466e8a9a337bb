"""Gradients that are used and freed while the backward pass runs: the result is the same to the bit."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers import processes
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.profiler import ProfilerActivity, profile

import bnb_compile as bnb
import bnb_compile.export
from bnb_compile.optim.release import Released
from bnb_compile.state.portions import portions

WIDTH, LAYERS = 128, 8
AdamW8bit = bnb.optim.AdamW8bit


pytestmark = pytest.mark.core


def make_model(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(LAYERS)]).to(dtype)


def batch(t: int, dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(t)
    return torch.randn(4, WIDTH).to(dtype)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        loss_of(model, batch(t, next(model.parameters()).dtype)).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# -- outside of a graph --------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "percentile_clipping": {"percentile_clipping": 50},
    "max_unorm": {"max_unorm": 0.01},
    "one scale": {"block_wise": False},
    "the reference": {"compile": False},
    "bytes": {"release_gradients": 100_000},
}


@pytest.mark.quick
@pytest.mark.parametrize("name", OPTIONS)
def test_hooks_step_as_the_step_does(name: str) -> None:
    results = []
    for released in (False, True):
        model = make_model()
        options = {"release_gradients": True, **OPTIONS[name]} if released else dict(OPTIONS[name])
        if not released:
            options.pop("release_gradients", None)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=0, **options)
        train(model, optimizer, range(4))
        results.append(values(model))
        assert (len(optimizer.structure.buckets) > 1) is released
    assert equal(*results)


@pytest.mark.quick
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", ["SGD", "Lion", "Adagrad", "RMSprop", "AdEMAMix", "Adan", "LAMB", "LARS"])
def test_hooks_step_every_family(family: str, bits: int) -> None:
    results = []
    for released in (False, True):
        model = make_model()
        given = {"momentum": 0.9} if family in ("SGD", "LARS") else {}
        cls = getattr(bnb.optim, f"{family}{bits}bit")
        optimizer = cls(model.parameters(), lr=1e-3, release_gradients=released, **given)
        train(model, optimizer, range(3))
        results.append(values(model))
    assert equal(*results)


@pytest.mark.quick
def test_gradients_are_freed_before_the_step() -> None:
    model = make_model(bias=False)
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=True)
    alive: list[int] = []
    storages: list[Any] = []

    def look(param: Tensor) -> None:
        assert param.grad is not None
        if not isinstance(param.grad, Released):
            storages.append(torch.multiprocessing.reductions.StorageWeakRef(param.grad.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in storages))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)  # after the optimizer's
    train(model, optimizer, range(1))
    assert len(alive) == LAYERS and max(alive) <= 1
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.quick
def test_a_state_dict_goes_on_with_and_without_release() -> None:
    for before, after in ((True, False), (False, True)):
        model = make_model()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=before)
        train(model, optimizer, range(2))
        saved, weights = copy.deepcopy(optimizer.state_dict()), values(model)
        train(model, optimizer, range(2, 4))
        other = make_model()
        with torch.no_grad():
            for p, w in zip(other.parameters(), weights):
                p.copy_(w)
        fresh = AdamW8bit(other.parameters(), lr=1e-2, release_gradients=after)
        fresh.load_state_dict(saved)
        train(other, fresh, range(2, 4))
        assert equal(values(model), values(other))


@pytest.mark.quick
def test_portions_do_not_wait_for_frozen_parameters() -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=True)
    train(model, optimizer, range(1))
    model[3].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    loss_of(model, batch(1)).backward()
    used = [isinstance(p.grad, Released) for p in model.parameters() if p.requires_grad]
    assert all(used)
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())


class Awkward(nn.Module):
    """A tied weight, an unused parameter, and a layer that is computed again in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.tied(x))
        x = torch.utils.checkpoint.checkpoint(self.again, x, use_reentrant=self.reentrant)
        return self.tied(self.frozen(x))


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True])
def test_tied_unused_frozen_and_recomputed_parameters(reentrant: bool) -> None:
    results = []
    for released in (False, True):
        model = Awkward(reentrant)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=0, release_gradients=released)
        train(model, optimizer, range(2))
        model.frozen.requires_grad_(True)
        train(model, optimizer, range(2, 4))
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        train(model, optimizer, range(4, 5))
        results.append(values(model))
    assert equal(*results)


@pytest.mark.quick
def test_losses_of_different_parameters_may_have_a_backward_pass_each() -> None:
    results = []
    for released in (False, True):
        a, b = make_model(), make_model()
        optimizer = AdamW8bit([*a.parameters(), *b.parameters()], lr=1e-2, release_gradients=released)
        for t in range(3):
            loss_of(a, batch(t)).backward()
            loss_of(b, batch(t + 9)).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(values(a) + values(b))
    assert equal(*results)


@pytest.mark.quick
def test_hooks_schedulers_and_closures_see_one_step() -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=True)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        loss = loss_of(model, batch(len(calls)))
        loss.backward()
        return loss

    for _ in range(2):
        assert optimizer.step(closure).item() > 0
        scheduler.step()
    assert calls == ["before", "after"] * 2
    assert {int(entry["step"]) for entry in optimizer.state.values()} == {2}


@pytest.mark.quick
def test_copies_have_hooks_of_their_own_and_nothing_is_kept_alive() -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=True)
    train(model, optimizer, range(1))
    both = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(1, 3))
    train(*both, range(1, 3))
    assert equal(values(model), values(both[0]))
    seen = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert seen() is None
    loss_of(model, batch(9)).backward()  # the hooks that are left do nothing
    assert not isinstance(model[0].weight.grad, Released)


# -- what cannot be ------------------------------------------------------------------------------------------


def used() -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=True)
    loss_of(model, batch(0)).backward()
    return model, optimizer


def unscale(model: nn.Module, optimizer: Any) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)


MISUSES: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "another backward pass": (lambda m, o: loss_of(m, batch(1)).backward(), "used and freed"),
    "clip_grad_norm_": (lambda m, o: nn.utils.clip_grad_norm_(m.parameters(), 1.0), "used and freed"),
    "clip_grad_value_": (lambda m, o: nn.utils.clip_grad_value_(m.parameters(), 1.0), "used and freed"),
    "GradScaler": (unscale, "used and freed"),
    "zero_grad": (lambda m, o: o.zero_grad(), "call step"),
    "a compiled step": (lambda m, o: torch.compile(o.step)(), "outside"),
    "another learning rate": (lambda m, o: (o.param_groups[0].update(lr=1.0), o.step()), "have changed"),
    "another option": (lambda m, o: (vars(o.args).update(max_unorm=0.1), o.step()), "have changed"),
    "a gradient taken away": (lambda m, o: (setattr(m[1].weight, "grad", None), o.step()), "removed"),
    "all gradients taken away": (lambda m, o: (m.zero_grad(), o.step()), "removed"),
    "a gradient put in": (
        lambda m, o: (setattr(m[1].weight, "grad", torch.ones(WIDTH, WIDTH)), o.step()),
        "removed",
    ),
    "state_dict": (lambda m, o: o.state_dict(), "call step"),
    "load_state_dict": (lambda m, o: o.load_state_dict({}), "call step"),
    "a verdict": (lambda m, o: (setattr(o, "found_inf", torch.ones(())), o.step()), "GradScaler"),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", MISUSES)
def test_what_comes_too_late_raises(name: str) -> None:
    misuse, message = MISUSES[name]
    with pytest.raises(Exception, match=message):
        misuse(*used())


@pytest.mark.quick
def test_a_gradient_that_was_forgotten_elsewhere_raises_when_it_comes_again() -> None:
    model, _ = used()
    model.zero_grad()  # knows nothing of the optimizer
    with pytest.raises(RuntimeError, match="second gradient"):
        loss_of(model, batch(1)).backward()


@pytest.mark.quick
def test_parameters_that_share_memory_raise() -> None:
    model = make_model(bias=False)
    model[2].weight = nn.Parameter(model[0].weight.data)
    optimizer = AdamW8bit(model.parameters(), release_gradients=True)
    with pytest.raises(ValueError, match="share memory"):
        loss_of(model, batch(0)).backward()
    assert optimizer.release_gradients


@pytest.mark.quick
def test_a_dropped_backward_pass_is_forgotten() -> None:
    """Also what has changed since; and a pass that an exception has ended before anything was used."""
    results = []
    for released in (False, 10**9):
        model = make_model()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=released)
        train(model, optimizer, range(1))
        model[5](batch(1)).square().mean().backward()
        if released:
            model.zero_grad()
        optimizer.zero_grad()
        optimizer.args.max_unorm = 0.01
        train(model, optimizer, range(2, 4))
        results.append(values(model))
    assert equal(*results)


@pytest.mark.quick
def test_a_refused_step_can_be_taken_back() -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), release_gradients=True, max_grad_norm=1.0)
    before = values(model)
    with pytest.raises(RuntimeError, match="previous_norm"):
        loss_of(model, batch(0)).backward()
    optimizer.zero_grad()
    assert equal(values(model), before)


@pytest.mark.quick
def test_what_is_in_no_group_any_more_keeps_its_gradients() -> None:
    model = make_model(bias=False)
    optimizer = AdamW8bit(model.parameters(), release_gradients=True)
    train(model, optimizer, range(1))
    weight = model[0].weight
    optimizer.param_groups[0]["params"] = list(model.parameters())[1:]
    loss_of(model, batch(1)).backward()
    optimizer.step()
    assert weight.grad is not None and not isinstance(weight.grad, Released)


@pytest.mark.quick
def test_options_that_need_all_gradients_raise() -> None:
    with pytest.raises(ValueError, match="must be a number of bytes"):
        AdamW8bit(make_model().parameters(), release_gradients=-1)
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), release_gradients=True, amp_fused=True)
    with pytest.raises(ValueError, match="amp_fused"):
        loss_of(model, batch(0)).backward()
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), release_gradients=True, max_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="previous_norm"):
        loss_of(model, batch(0)).backward()
    with pytest.raises(ValueError, match="without max_grad_norm"):
        AdamW8bit(make_model().parameters()).measuring_norm()
    assert optimizer.max_grad_norm == 1.0  # whoever has no optimizer any more has no hooks


# -- norms of all gradients ----------------------------------------------------------------------------------


def clipped(released: bool, measures: bool, graph: bool = False, **options: Any) -> list[Tensor]:
    model = make_model()
    optimizer = AdamW8bit(
        model.parameters(), lr=1e-3, max_grad_norm=0.01, release_gradients=released, **options
    )

    def step(x: Tensor) -> None:
        if measures:
            with optimizer.measuring_norm():
                loss_of(model, x).backward()
        loss_of(model, x).backward()
        optimizer.step()

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        run = torch.compile(step, fullgraph=True) if graph else step
        for t in range(4):
            run(batch(t))
            optimizer.zero_grad()
    return values(model)


@pytest.mark.quick
def test_a_norm_that_was_measured_clips_as_that_of_the_step() -> None:
    expected = clipped(released=False, measures=False)
    assert equal(clipped(released=False, measures=True), expected)
    for a, e in zip(clipped(released=True, measures=True), expected):  # sums in another order
        torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-6)


@pytest.mark.quick
@pytest.mark.parametrize("released", [False, True])
def test_a_measured_norm_is_of_what_came(released: bool) -> None:
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), max_grad_norm=0.01, release_gradients=released)
    with pytest.raises(RuntimeError, match="no gradient"), optimizer.measuring_norm():
        pass
    with pytest.raises(RuntimeError, match="inside of another"), optimizer.measuring_norm():
        with optimizer.measuring_norm():
            pass
    with pytest.raises(ZeroDivisionError), optimizer.measuring_norm():
        (1000 * loss_of(model, batch(0))).backward()
        raise ZeroDivisionError
    optimizer.zero_grad()
    with optimizer.measuring_norm():
        loss_of(model, batch(0)).backward()
    loss = loss_of(model, batch(0))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(
        optimizer.norms.known.norm, nn.utils.get_total_norm(grads), rtol=1e-5, atol=0.0
    )


@pytest.mark.quick
@pytest.mark.parametrize("released", [False, True])
def test_the_norm_before_is_saved(released: bool) -> None:
    def make() -> tuple[nn.Module, Any]:
        model = make_model()
        options = {"max_grad_norm": 1e-3, "previous_norm": True, "release_gradients": released}
        return model, AdamW8bit(model.parameters(), lr=1e-2, eps=1e-3, **options)

    model, optimizer = make()
    train(model, optimizer, range(3))
    copied = copy.deepcopy((model, optimizer))
    loaded = make()
    loaded[0].load_state_dict(copy.deepcopy(model.state_dict()))
    loaded[1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in (copied, loaded, (model, optimizer)):
        train(*pair, range(3, 5))
        assert "norm_before" not in pair[1].param_groups[0]
    assert equal(values(copied[0]), values(model)) and equal(values(loaded[0]), values(model))
    norm = optimizer.norms.norm
    optimizer.step()  # without a gradient
    assert optimizer.norms.norm == norm > 0


@pytest.mark.quick
def test_the_norm_of_the_step_before_clips_with_and_without_release() -> None:
    expected = clipped(released=False, measures=False, previous_norm=True)
    for a, e in zip(clipped(released=True, measures=False, previous_norm=True), expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=2e-6)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    norm = 0.0
    for t in range(4):  # the same with torch
        optimizer.zero_grad()
        loss_of(model, batch(t)).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        factor = min(1.0, 0.01 / (norm + 1e-6))
        norm = nn.utils.get_total_norm(grads).item()
        for grad in grads:
            grad.mul_(factor)
        optimizer.step()
    for a, e in zip(
        clipped(False, False, previous_norm=True, optim_bits=32, min_8bit_size=10**9), values(model)
    ):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ways", [{"measures": True}, {"measures": False, "previous_norm": True}], ids=str)
def test_norms_in_a_graph(ways: dict[str, Any]) -> None:
    for a, e in zip(clipped(released=True, graph=True, **ways), clipped(released=False, **ways)):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


# -- in a graph ----------------------------------------------------------------------------------------------


def compiled(model: nn.Module, optimizer: Any, before: Callable[[], Any] = lambda: None) -> Callable:
    """A train step in one graph."""

    def step(x: Tensor) -> Tensor:
        loss = loss_of(model, x)
        loss.backward()
        before()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return torch.compile(step, fullgraph=True)


def planned_peak(source: str) -> int:
    """Most bytes of buffers that the code of a graph holds at once, from its allocations and deletions."""
    sizes: dict[str, int] = {}
    peak = 0
    item = {"float32": 4, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
    for line in source[source.index("def call(") :].splitlines():
        if found := re.match(r"\s+(buf\d+) = empty_strided_\w+\(\((.*?)\), .*torch\.(\w+)\)", line):
            numbers = [int(n) for n in re.findall(r"\d+", found[2])]
            sizes[found[1]] = torch.Size(numbers).numel() * item[found[3]]
        elif found := re.match(r"\s+(buf\d+) = .*\b(buf\d+)\b.*; del \2", line):
            sizes[found[1]] = sizes.pop(found[2], 0)
        peak = max(peak, sum(sizes.values()))
        if found := re.match(r"\s+del (buf\d+)", line):
            sizes.pop(found[1], None)
    return peak


def calls(source: str) -> list[str]:
    """In their order: "step" for each step, "product" for each product of matrices."""
    found = re.findall(r"^\s+(cpp_adam_step\w*|extern_kernels\.\w*mm)\(", source, re.M)
    return ["step" if name.startswith("cpp") else "product" for name in found]


@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 50}, {"max_unorm": 0.01}], ids=str)
def test_a_graph_steps_each_portion_behind_its_gradients(options: dict[str, Any]) -> None:
    """And parameters are the same to the bit after 50 steps."""
    ends, peaks = [], []
    for released in (False, True):
        torch._dynamo.reset()
        model = make_model(bias=False, dtype=torch.bfloat16)
        optimizer = AdamW8bit(
            model.parameters(), bf16_stochastic_round=True, release_gradients=released, **options
        )
        step = compiled(model, optimizer)
        _, (source,) = run_and_get_code(step, batch(0, torch.bfloat16))
        for t in range(1, 50):
            step(batch(t, torch.bfloat16))
        ends.append(values(model))
        peaks.append(planned_peak(source))
        order = calls(source)
        assert order.count("step") == (LAYERS if released else 1)
        if released:
            first = order.index("step")
            assert "product" in order[first:], "all gradients are computed before the first step"
            assert all(
                a != "product" or b != "product" or k < first
                for k, (a, b) in enumerate(zip(order, order[1:]))
            )
    assert equal(*ends)
    weight = WIDTH * WIDTH * 2
    assert peaks[0] >= LAYERS * weight
    assert peaks[1] <= 2 * weight + 30_000  # of a gradient, and activations


@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_many_portions_are_one_kernel_text() -> None:
    model = make_model(bias=False, dtype=torch.bfloat16)
    optimizer = AdamW8bit(model.parameters(), bf16_stochastic_round=True, release_gradients=True)
    _, (source,) = run_and_get_code(compiled(model, optimizer), batch(0, torch.bfloat16))
    texts = re.findall(r"cpp_adam_step\w+ = async_compile.cpp_pybinding\((.*?)\n'''\)", source, re.S)
    assert len(texts) == LAYERS and len(set(texts)) == 1


@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_clipping_in_the_graph_is_right_and_keeps_all_gradients() -> None:
    results = []
    for released in (False, True):
        torch._dynamo.reset()
        model = make_model()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=released)
        step = compiled(model, optimizer, partial(nn.utils.clip_grad_norm_, list(model.parameters()), 0.01))
        for t in range(3):
            step(batch(t))
        results.append(values(model))
    assert equal(*results)


@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize("released", [False, True])
def test_a_graph_is_not_misled_by_that_of_another_model(released: bool) -> None:
    for bias in (True, False):  # Dynamo has read a bias's gradient that was None
        model = make_model(bias)
        optimizer = AdamW8bit(model.parameters(), release_gradients=released)
        compiled(model, optimizer)(batch(0))
        assert all(param.grad is None for param in model.parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_an_exported_train_step_is_the_same() -> None:
    results = []
    for released in (False, True):
        model = make_model()
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, release_gradients=released)
        step = bnb.export.TrainStep(model, loss_of, optimizer)
        run = step.export(batch(0)).module()
        for t in range(3):
            run(step.hyper(), batch(t))
        results.append(values(model))
    assert equal(*results)


def peak_of(step: Callable[[], Any]) -> int:
    """Most bytes that a call allocates beyond what there was."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize("graph", [False, True])
def test_the_measured_peak_is_a_portion(graph: bool) -> None:
    peaks = []
    for released in (False, True):
        torch._dynamo.reset()
        model = make_model(bias=False, dtype=torch.bfloat16)
        optimizer = AdamW8bit(model.parameters(), release_gradients=released)
        step = compiled(model, optimizer) if graph else lambda x, *of: train(*of, range(1))
        step = partial(step, batch(0, torch.bfloat16), *(() if graph else (model, optimizer)))
        step()
        peaks.append(peak_of(step))
    weight = WIDTH * WIDTH * 2
    assert peaks[0] >= LAYERS * weight
    assert peaks[1] <= 4 * weight  # of a gradient, and activations


# -- portions ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("most", [0, 1000, 5000, 40_000, True])
def test_portions_hold_no_more_than_is_allowed(most: int | bool) -> None:
    torch.manual_seed(0)
    sizes = torch.randint(1, 300, (200,)).tolist()
    params = [torch.empty(n, dtype=torch.bfloat16) for n in sizes]
    kinds = ["large" if n > 30 else "small" for n in sizes]
    found = portions(params, kinds, most)
    allowed = sum(sizes) * 2 / 20 if most is True else most
    waiting: dict[tuple[str, int], int] = {}
    for n, kind, number in zip(sizes, kinds, found):
        waiting[kind, number] = waiting.get((kind, number), 0) + 2 * n
    largest = [max(size for (k, _), size in waiting.items() if k == kind) for kind in ("large", "small")]
    of_one = [2 * max(n for n, k in zip(sizes, kinds) if k == kind) for kind in ("large", "small")]
    assert sum(largest) <= max(allowed, 0) + sum(of_one)
    for kind in ("large", "small"):
        numbers = [number for k, number in zip(kinds, found) if k == kind]
        assert numbers == sorted(numbers) and set(numbers) == set(range(numbers[-1] + 1))


# -- many processes ------------------------------------------------------------------------------------------


def sharded() -> bool:
    from torch.distributed.fsdp import fully_shard

    results = []
    for released in (False, True):
        model = make_model()
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=0, release_gradients=released)
        for t in range(3):
            loss_of(model, batch(t)).backward()
            assert isinstance(model[0].weight.grad, Released) is released
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.full_tensor().detach() for p in model.parameters()])
    return equal(*results)


def replicated() -> str:
    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer = AdamW8bit(model.parameters(), release_gradients=True)
    try:
        loss_of(model, batch(0)).backward()
    except RuntimeError as error:
        return str(error)
    return f"{optimizer} has stepped"


@pytest.mark.long
def test_fsdp2_frees_what_it_has_reduced() -> None:
    assert processes.run(2, sharded) == [True, True]


@pytest.mark.long
def test_ddp_raises() -> None:
    assert all("fully_shard" in text for text in processes.run(2, replicated))

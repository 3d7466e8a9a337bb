"""`opt.step()` inside the user's own torch.compile: one graph, no break, no recompile, and the same numbers.

The region is compiled once for each kind of optimizer state and the tests below share it; they are about
what may happen between its calls.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from bnb_compile.optim import AdamW

pytestmark = pytest.mark.core

STEPS = 20
SIZES = (20, 210, 20)  # weights of 4,200 elements: 8-bit; biases: 32-bit


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS + 1)


def decay(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 0.8**k)


def batches(count=STEPS, seed=0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(16, SIZES[0], generator=generator) for _ in range(count))


class Training:
    """A model, its optimizer and the whole step of their training, plain or compiled."""

    def __init__(self, **options) -> None:
        torch.manual_seed(0)
        inner = SIZES[1]
        self.model = nn.Sequential(nn.Linear(SIZES[0], inner), nn.Tanh(), nn.Linear(inner, SIZES[2]))
        self.optimizer = AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1, **options)
        self.step: Callable[[Tensor], Tensor] = self.plain_step

    def plain_step(self, x: Tensor) -> Tensor:
        loss = (self.model(x) - x.flip(1)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, steps=STEPS, schedule=None, seed=0) -> list[float]:
        scheduler = schedule and schedule(self.optimizer)
        losses = []
        for x in batches(steps, seed):
            losses.append(self.step(x).item())
            if scheduler:
                scheduler.step()
        return losses

    def snapshot(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def restore(self, snapshot) -> None:
        model, optimizer = copy.deepcopy(snapshot)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)


@pytest.fixture(scope="module", autouse=True)
def backward_in_a_graph() -> Iterator[None]:
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=[8, 32])
def compiled(request) -> Training:
    """A training whose step is one region, compiled by the optimizer's very first step."""
    torch._dynamo.reset()
    counters.clear()
    training = Training(optim_bits=request.param)
    training.start = training.snapshot()
    training.step = torch.compile(training.plain_step, fullgraph=True)
    training.first_losses = training.run()
    training.graphs = dict(counters["stats"])
    training.breaks = dict(counters["graph_break"])
    return training


@pytest.fixture
def warm(compiled) -> Iterator[Training]:
    """It again, as before its first step; whatever recompiles now is an error."""
    compiled.restore(compiled.start)
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield compiled


@pytest.fixture
def plain(compiled) -> Training:
    return Training(optim_bits=compiled.optimizer.args.optim_bits, compile=False)


def close(losses, expected):
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-6)


def test_one_graph_without_breaks_runs_all_steps_and_trains_as_the_plain_loop(compiled, plain):
    assert compiled.graphs["unique_graphs"] == 1
    assert compiled.breaks == {}
    expected = plain.run()
    close(compiled.first_losses, expected)
    assert expected[-1] < 0.9 * expected[0]


def test_the_captured_step_is_the_one_outside_a_graph(warm):
    losses = warm.run()
    outside = Training(optim_bits=warm.optimizer.args.optim_bits)
    close(losses, outside.run())
    for param, other in zip(warm.model.parameters(), outside.model.parameters()):
        state, expected = warm.optimizer.state[param], outside.optimizer.state[other]
        assert state["step"] == expected["step"] == STEPS
        assert state["state1"].dtype == expected["state1"].dtype


@pytest.mark.parametrize("schedule", [decay, one_cycle], ids=lambda schedule: schedule.__name__)
def test_a_schedule_takes_effect_without_recompiling(warm, plain, schedule):
    unscheduled = warm.run()
    warm.restore(warm.start)
    losses = warm.run(schedule=schedule)
    close(losses, plain.run(schedule=schedule))
    assert abs(losses[-1] - unscheduled[-1]) > 0.02 * unscheduled[-1]
    for name in ("lr", "betas"):
        mine, theirs = warm.optimizer.param_groups[0][name], plain.optimizer.param_groups[0][name]
        assert mine == theirs and type(mine) is type(theirs)


def set_item(group):
    group["lr"] = 0.0
    group["weight_decay"] = 0.0


def update(group):
    group.update(lr=0.0, weight_decay=0.0)


def update_from_dict(group):
    group.update({"lr": 0.0, "weight_decay": 0.0})


def merge(group):
    group |= {"lr": 0.0}


EDITS = [set_item, update, update_from_dict, merge]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_of_a_group_takes_effect_without_recompiling(warm, edit):
    warm.run(2)
    before = copy.deepcopy(warm.model.state_dict())
    edit(warm.optimizer.param_groups[0])
    warm.run(2)
    assert all(torch.equal(v, before[k]) for k, v in warm.model.state_dict().items())
    warm.optimizer.param_groups[0]["lr"] = 1e-2
    warm.run(1)
    assert not any(torch.equal(v, before[k]) for k, v in warm.model.state_dict().items())


def test_loading_a_state_between_steps_takes_effect_without_recompiling(warm):
    warm.run(5)
    saved = warm.snapshot()
    expected = warm.run(5, seed=1)
    warm.run(3, seed=2)
    for _ in range(2):
        warm.restore(saved)
        assert warm.run(5, seed=1) == expected
    model, optimizer = copy.deepcopy(saved)
    optimizer["param_groups"][0]["lr"] = 0.0
    warm.restore((model, optimizer))
    warm.run(2)
    assert all(torch.equal(v, model[k]) for k, v in warm.model.state_dict().items())


def test_steps_outside_and_inside_the_region_alternate(warm):
    expected = warm.run(6)
    warm.restore(warm.start)
    losses = []
    for k, x in enumerate(batches(6)):
        losses.append((warm.plain_step if k % 2 else warm.step)(x).item())
    close(losses, expected)
    assert all(warm.optimizer.state[p]["step"] == 6 for p in warm.model.parameters())


# -- the step alone -----------------------------------------------------------------------------

WAYS = {
    "torch.compile(opt.step)": lambda o: torch.compile(o.step),
    "a lambda, fullgraph": lambda o: torch.compile(lambda: o.step(), fullgraph=True),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("first", ["inside", "outside"])
@pytest.mark.parametrize("created", ["before", "after"])
def test_a_compiled_step_follows_a_scheduler_made_before_or_after_the_first_step(way, first, created):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(5000)), nn.Parameter(torch.randn(10))]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    compiled = AdamW(params, lr=0.01, optim_bits=8)
    eager = AdamW(others, lr=0.01, optim_bits=8, compile=False)
    schedulers = [decay(o) for o in (compiled, eager)] if created == "before" else []
    step = way(compiled)
    for k in range(STEPS):
        if k == 1 and created == "after":
            schedulers = [decay(o) for o in (compiled, eager)]
        for param, other in zip(params, others):
            param.grad = torch.randn(param.shape)
            other.grad = param.grad.clone()
        compiled.step() if k == 0 and first == "outside" else step()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
    for param, other in zip(params, others):
        torch.testing.assert_close(param, other, rtol=1e-3, atol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
    assert (
        compiled.param_groups[0]["lr"]
        == eager.param_groups[0]["lr"]
        == pytest.approx(0.01 * 0.8 ** (STEPS - (created == "after")))
    )


def test_step_stays_a_method_that_schedulers_and_loggers_can_wrap():
    optimizer = AdamW([nn.Parameter(torch.zeros(5))])
    assert optimizer.step.__func__ and optimizer.step.__self__ is optimizer
    scheduler = decay(optimizer)
    optimizer.step()
    scheduler.step()
    assert optimizer.step.__func__ and optimizer.param_groups[0]["lr"] == pytest.approx(8e-4)


def test_a_tensor_lr_that_is_filled_is_followed():
    torch._dynamo.reset()
    lr = torch.tensor(0.01)
    param = nn.Parameter(torch.randn(5000))
    optimizer = AdamW([param], lr=lr, optim_bits=8, weight_decay=0.0)
    step = torch.compile(lambda: optimizer.step(), fullgraph=True)
    moved = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for value in (0.01, 0.0, 0.02):
            lr.fill_(value)
            param.grad = torch.ones(5000)
            before = param.detach().clone()
            step()
            moved.append((before - param.detach()).abs().mean().item())
    assert moved == pytest.approx([0.01, 0.0, 0.02], rel=0.05)
    assert optimizer.param_groups[0]["lr"] is lr

"""What a training loop may do with an optimizer between steps, and what must come out of it.

tests/test_optimizers.py says what a step computes; here the ways to the step are compared with each other.
"""

from __future__ import annotations

import copy
import io
import os
import random
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from bnb_compile import backends, optim
from bnb_compile.optim import SGD, AdamW, AdEMAMix, GlobalOptimManager, Lion, Optimizer8bit, RMSprop
from bnb_compile.state.checkpoint import flatten

pytestmark = pytest.mark.usefixtures("one_thread")  # for small tensors more threads cost more than they do


@pytest.fixture(autouse=True, scope="module")
def forget_graphs():
    yield
    torch._dynamo.reset()


OPTIONS = dict(optim_bits=8, min_8bit_size=256)
SHAPES = [(20, 30), (40,)]  # an 8-bit and a 32-bit state

FAMILIES = {
    "AdamW": (AdamW, dict(lr=0.01, weight_decay=0.1)),
    "SGD": (SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.1)),
    "RMSprop": (RMSprop, dict(lr=0.01, alpha=0.95, weight_decay=0.1)),
    "AdEMAMix": (AdEMAMix, dict(lr=0.01, t_alpha=10, t_beta3=10)),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_compile = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])


def parameters(shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def make(family, params, **options):
    cls, hyper = FAMILIES[family]
    return cls(params, **{**OPTIONS, **hyper, **options})


def give(params, seed):
    """New gradients, at new addresses."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def members(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def snapshot(optimizer):
    """Everything that a step may change."""
    return [
        [p.detach().clone(), *(v.clone() for v in optimizer.state.get(p, {}).values())]
        for p in members(optimizer)
    ]


def same(one, other):
    return len(one) == len(other) and all(
        len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other)
    )


class Captured:
    """An optimizer in the user's own graph, and the same outside of one, with the same numbers bit by bit.

    The graph runs the eager operators, so that capturing is all that differs, and nothing is compiled twice.
    """

    def __init__(self, family, shapes=SHAPES, **options):
        torch._dynamo.reset()
        self.optimizers = [make(family, parameters(shapes), compile=False, **options) for _ in range(2)]
        self.counter = CompileCounter()
        self.captured = torch.compile(lambda: self.optimizers[0].step(), fullgraph=True, backend=self.counter)

    def step(self, seed, present=None):
        for optimizer in self.optimizers:
            params = members(optimizer)
            give(params, seed)
            for k, param in enumerate(params):
                param.grad = param.grad if present is None or present[k] else None
        self.captured()
        self.optimizers[1].step()

    def check(self):
        assert same(*map(snapshot, self.optimizers))


# -- schedules in a graph ---------------------------------------------------------------------------


def lambda_lr(optimizer):
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1))
    return lambda k: scheduler.step()


def one_cycle(optimizer):
    """Its first beta moves too; SGD's is the momentum."""
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=50)
    return lambda k: scheduler.step()


def plateau(optimizer):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, factor=0.5)
    return lambda k: scheduler.step(1.0)


def edit_everything(optimizer):
    """Each hyperparameter of the group in turn, in each way of writing to a dict."""
    (group,) = optimizer.param_groups
    names = [name for name in group if name not in ("params", "amsgrad", "nesterov", "centered", "lr_decay")]

    def advance(k):
        name = names[k % len(names)]
        old = group[name]
        if name == "betas":
            new = tuple(0.5 + beta / 2 if beta else 0.0 for beta in old)  # no momentum stays none
        else:
            new = old * 1.5 + 1e-3
        if k % 3 == 0:
            group[name] = new
        elif k % 3 == 1:
            group.update({name: new})
        else:
            optimizer.param_groups[0] |= {name: new}

    return advance


def fill_tensor(optimizer):
    (group,) = optimizer.param_groups
    lr = group["lr"] = torch.tensor(group["lr"])

    def advance(k):
        lr.fill_(0.01 / (k + 2))
        assert group["lr"] is lr

    return advance


def load_another(optimizer):
    """As accelerate does: groups and the tensor are replaced, by new objects with other values."""
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01)

    def advance(k):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0]["lr"] = torch.tensor(0.01 / (k + 2))
        optimizer.load_state_dict(state_dict=saved)

    return advance


SCHEDULES = [lambda_lr, one_cycle, plateau, edit_everything, fill_tensor, load_another]


@each_family
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda f: f.__name__)
def test_a_schedule_takes_effect_in_a_graph_and_is_not_compiled_again(family, schedule):
    """Made before the first step; 24 steps."""
    training = Captured(family)
    advances = [schedule(optimizer) for optimizer in training.optimizers]
    before = copy.deepcopy(training.optimizers[0].param_groups[0])
    for k in range(24):
        training.step(k)
        for advance in advances:
            advance(k)
    training.check()
    assert training.counter.frame_count == 1
    one, other = (optimizer.param_groups[0] for optimizer in training.optimizers)
    assert one.keys() == other.keys() and str(one["lr"]) == str(other["lr"]) != str(before["lr"])
    assert type(one["lr"]) is type(before["lr"])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda f: f.__name__)
def test_a_schedule_that_begins_after_the_first_step_is_compiled_at_most_once_more(schedule):
    """A tensor in place of a number is another kind of input."""
    training = Captured("AdamW")
    training.step(100)
    advances = [schedule(optimizer) for optimizer in training.optimizers]
    for k in range(8):
        training.step(k)
        for advance in advances:
            advance(k)
    training.check()
    assert training.counter.frame_count <= 2


def test_two_optimizers_that_load_the_same_state_do_not_share_a_tensor_as_learning_rate():
    optimizers = [AdamW(parameters(), lr=torch.tensor(0.01), compile=False) for _ in range(3)]
    for optimizer in optimizers[1:]:
        optimizer.load_state_dict(optimizers[0].state_dict())
    optimizers[1].param_groups[0]["lr"].fill_(0.5)
    assert [float(o.param_groups[0]["lr"]) for o in optimizers] == pytest.approx([0.01, 0.5, 0.01])


@each_family
def test_loads_schedules_and_skipped_steps_at_random_are_compiled_once_more(family):
    """All that may happen without a change of structure; the first step makes room for the scale."""
    training, chance = Captured(family), random.Random(0)
    for optimizer in training.optimizers:
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(0.0), torch.tensor(1.0)
        optimizer.init_state()
    saved = [copy.deepcopy(optimizer.state_dict()) for optimizer in training.optimizers]
    for k in range(100):
        event, value = chance.randrange(8), chance.random()
        for i, optimizer in enumerate(training.optimizers):
            (group,) = optimizer.param_groups
            optimizer.found_inf.fill_(event == 0)
            if event == 1:
                group["lr"] = 0.02 * value
            elif event == 2:
                group.update(betas=(0.5 + 0.4 * value, *group["betas"][1:]), weight_decay=0.1 * value)
            elif event == 3:
                optimizer.load_state_dict(saved[i])
            elif event == 4:
                saved[i] = copy.deepcopy(optimizer.state_dict())
            elif event == 5:
                optimizer.grad_scale.fill_(1 + value)
            optimizer.zero_grad(set_to_none=event % 2 == 0)
        training.step(k)
        if event == 6:
            training.check()
    training.check()
    assert training.counter.frame_count <= 2


# -- structure in a graph ---------------------------------------------------------------------------


def test_missing_gradients_in_a_graph_are_compiled_once_for_each_pattern():
    """Dynamo looks whether there is a gradient; 12 patterns, each three times."""
    shapes = [*SHAPES, (300,), (5,)]
    chance = random.Random(0)
    masks = [tuple(chance.random() < 0.6 for _ in shapes) for _ in range(12)]
    training = Captured("AdamW", shapes)
    with torch._dynamo.config.patch(recompile_limit=16):
        for k in range(36):
            before = snapshot(training.optimizers[0])
            mask = masks[k % 12]
            training.step(k, mask)
            for old, new, present in zip(before, snapshot(training.optimizers[0]), mask):
                assert present or len(old) == 1 or same([old], [new])  # 1: has no state yet
    training.check()
    assert training.counter.frame_count <= len(set(masks))


def test_gradients_may_move_or_stay_and_data_may_be_replaced_in_a_graph():
    training = Captured("AdamW")
    training.step(0)
    for k in range(1, 13):
        for optimizer in training.optimizers:
            optimizer.zero_grad(set_to_none=k % 2 == 0)
            if k % 3 == 0:
                for param in members(optimizer):
                    param.data = param.data.clone()
        training.step(k)
    training.check()
    assert training.counter.frame_count == 1


def test_freezing_in_a_graph_is_compiled_at_most_once_for_each_pattern():
    training = Captured("AdamW")
    for k in range(9):
        for optimizer in training.optimizers:
            optimizer.param_groups[0]["params"][1].requires_grad_(not 3 <= k < 6)
        training.step(k, [True, not 3 <= k < 6])
    training.check()
    assert training.counter.frame_count <= 3
    assert [training.optimizers[0].state[p]["step"] for p in members(training.optimizers[0])] == [9, 6]


def add_group(optimizer):
    optimizer.add_param_group(dict(params=parameters([(300,)]), lr=0.5))


def append(optimizer):
    optimizer.param_groups[0]["params"] += parameters([(300,)])


def replace(optimizer):
    (optimizer.param_groups[0]["params"][1],) = parameters([(300,)])


def remove(optimizer):
    del optimizer.param_groups[0]["params"][1]


def override(optimizer):
    GlobalOptimManager.get_instance().override_config(members(optimizer)[0], "lr", 0.5)


def reassign_entries(optimizer):
    """A state that was moved away and back, and another one: all states of the first step are forgotten."""
    for param in members(optimizer):
        for name, value in optimizer.state[param].items():
            optimizer.state[param][name] = value.clone() if name.startswith("qmap") else 0 * value


def reassign_states(optimizer):
    for param in members(optimizer):
        optimizer.state[param] = {
            name: value.clone() if name.startswith("qmap") else 0 * value
            for name, value in optimizer.state[param].items()
        }


def forget(optimizer):
    optimizer.state.clear()


def switch_momentum_on(optimizer):
    """From a rule with one state to one with two."""
    optimizer.param_groups[0]["betas"] = (0.95, 0.5)


CHANGES = [add_group, append, replace, remove, override, reassign_entries, reassign_states, forget]
CHANGES = [("AdamW", change) for change in CHANGES] + [("RMSprop", switch_momentum_on)]


@pytest.fixture
def manager():
    GlobalOptimManager.get_instance().initialize()
    yield GlobalOptimManager.get_instance()
    GlobalOptimManager.get_instance().initialize()


@pytest.mark.parametrize("family, change", CHANGES, ids=[change.__name__ for _, change in CHANGES])
def test_a_change_of_structure_is_noticed_by_a_graph(family, change, manager):
    training = Captured(family)
    first = [members(optimizer) for optimizer in training.optimizers]
    for k in range(6):
        if k == 3:
            for optimizer in training.optimizers:
                change(optimizer)
        training.step(k)
    training.check()
    assert all(map(torch.equal, *first))  # one that was removed stays as it was
    assert training.counter.frame_count <= 2


# -- structure outside of a graph: no kernel is compiled again ----------------------------------------


@pytest.fixture
def no_new_kernels():
    """After the kernels of AdamW for float32 there is nothing to compile."""
    params = parameters()
    optimizer = make("AdamW", params, compile=True)
    give(params, 0)
    optimizer.step()
    before = backends.counts["compiled"]
    yield
    assert backends.counts["compiled"] == before


def move_entries(optimizer):
    """Off the device and back, as reinforcement learning does."""
    for param in members(optimizer):
        for name, value in optimizer.state[param].items():
            optimizer.state[param][name] = value.clone()


def move_states(optimizer):
    for param in members(optimizer):
        optimizer.state[param] = {name: v.clone() for name, v in optimizer.state[param].items()}


def move_all(optimizer):
    state = {p: {name: v.clone() for name, v in s.items()} for p, s in optimizer.state.items()}
    optimizer.state.clear()
    optimizer.state.update(state)


@pytest.mark.parametrize("move", [move_entries, move_states, move_all], ids=lambda f: f.__name__)
def test_states_may_move_away_and_back_between_steps(move, no_new_kernels):
    params, others = parameters(), parameters()
    optimizer, plain = (make("AdamW", ps, compile=True) for ps in (params, others))
    addresses = None
    for k in range(12):
        for ps, o in ((params, optimizer), (others, plain)):
            give(ps, k)
            o.step()
        arenas = [arena.data_ptr() for bucket in optimizer.structure.buckets for arena in bucket.arenas]
        assert addresses in (None, arenas)
        addresses = arenas
        move(optimizer)
        saved, expected = optimizer.state_dict(), plain.state_dict()
        assert saved["state"][0]["step"] == expected["state"][0]["step"] == k + 1
    assert same(snapshot(optimizer), snapshot(plain))


def on_the_parameter(optimizer, state):
    optimizer.state[members(optimizer)[0]] = state


def on_a_new_parameter(optimizer, state):
    """As Gaussian splatting does it."""
    (group,), (new,) = optimizer.param_groups, parameters([(40,)])
    optimizer.state.pop(group["params"][0], None)
    group["params"][0] = new
    optimizer.state[new] = state


ASSIGNMENTS = [
    pytest.param(on_the_parameter, True, "step"),
    pytest.param(on_the_parameter, True, "save"),
    pytest.param(on_a_new_parameter, True, "step"),
    pytest.param(on_a_new_parameter, True, "save"),
    pytest.param(on_the_parameter, False, "step"),
    pytest.param(on_the_parameter, False, "save"),
]


@pytest.mark.parametrize("assign, stepped, then", ASSIGNMENTS)
def test_an_assigned_state_is_the_state(assign, stepped, then):
    """Before the first step and later; seen by the next step, and by a state dict before it."""
    shape = [(40,)]
    donor = make("AdamW", parameters(shape), compile=False)
    optimizer = make("AdamW", parameters(shape), compile=False)
    for k in range(5):
        for o in (donor, *[optimizer] * (stepped and k < 2)):
            give(members(o), k)
            o.step()
    assign(optimizer, {name: v.clone() for name, v in donor.state[members(donor)[0]].items()})
    if then == "step":
        for o in (donor, optimizer):
            give(members(o), 9)
            o.step()
    saved, expected = (o.state_dict()["state"][0] for o in (optimizer, donor))
    assert saved["step"] == expected["step"]
    states = [flatten(entry) for entry in (saved, expected)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in ("state1", "state2"))


def test_100_optimizers_of_one_parameter_share_their_kernels(no_new_kernels):
    shapes = [(20, 30), (300,), (7,)] * 33 + [(7,)]
    optimizers = [make("AdamW", [param], compile=True) for param in parameters(shapes)]
    for k in range(2):
        for optimizer in optimizers:
            give(members(optimizer), k)
            optimizer.step()
    assert all(optimizer.state[p]["step"] == 2 for optimizer in optimizers for p in members(optimizer))


def test_a_named_group_may_be_added(no_new_kernels):
    names = ["weight", "bias", "late"]
    params, others = ([*parameters(), *parameters([(300,)])] for _ in range(2))
    grown = make("AdamW", list(zip(names, params))[:2], compile=True)
    apart = [make("AdamW", others[:2], compile=True), make("AdamW", others[2:], compile=True, lr=0.5)]
    for k in range(6):
        if k == 3:
            grown.add_param_group(dict(params=[(names[2], params[2])], lr=0.5))
        for ps in (params, others):
            give(ps, k)
        grown.step()
        for optimizer in apart[: 1 + (k >= 3)]:
            optimizer.step()
    groups = grown.state_dict()["param_groups"]
    assert [group["param_names"] for group in groups] == [names[:2], names[2:]]
    assert same(snapshot(grown), snapshot(apart[0]) + snapshot(apart[1]))


def test_a_step_in_the_backward_pass_is_a_normal_one(no_new_kernels):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 20))
    fused = copy.deepcopy(model)
    whole = make("AdamW", model.parameters(), compile=True)
    single = {param: make("AdamW", [param], compile=True) for param in fused.parameters()}

    def step(param):
        single[param].step()
        single[param].zero_grad()

    for param in fused.parameters():
        param.register_post_accumulate_grad_hook(step)
    for _ in range(4):
        x = torch.randn(8, 20)
        for network in (model, fused):
            (network(x) - x.flip(1)).square().mean().backward()
        whole.step()
        whole.zero_grad()
        assert all(param.grad is None for param in fused.parameters())
    assert same(snapshot(whole), [part for o in single.values() for part in snapshot(o)])


@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(True),
        False,
    ],
)
def test_data_of_another_size_is_refused_or_begins_anew(compiled):
    """And nothing beyond its end is written. The end is inside of `memory`, for the sake of the test."""
    (param,) = parameters([(600,)])
    optimizer = make("AdamW", [param], compile=compiled)
    give([param], 0)
    optimizer.step()
    memory = torch.zeros(1000)
    param.grad = None
    param.data = memory[:10]
    param.grad = torch.ones(1000)[:10]
    try:
        optimizer.step()
    except ValueError:
        assert not memory.any()
    else:
        assert optimizer.state[param]["state1"].shape == (10,)
        assert memory[:10].all() and not memory[10:].any()


# -- the contract of torch.optim.Optimizer -----------------------------------------------------------

CLASSES = sorted(
    name
    for name, cls in vars(optim).items()
    if isinstance(cls, type)
    and issubclass(cls, Optimizer8bit)
    and not name.startswith("Optimizer")
    and not name.startswith("Paged")
)


def construct(name, params, **options):
    if name != "PytorchLARS":  # which has no options
        options.update(min_8bit_size=256, compile=False)
    if "LARS" in name or "SGD" in name:
        options["momentum"] = 0.9
    return getattr(optim, name)(params, **options)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("lr", ["float", "tensor"])
def test_checkpointing_materialises_states_and_moves_nothing(name, lr):
    """torch's own function: a step with gradients of zero and lr 0; also of a parameter that is zero."""
    states = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    dtypes = [torch.float32, torch.bfloat16]
    params = [p for dtype in dtypes for p in parameters([(20, 30), (40,)], dtype)]
    params += [nn.Parameter(torch.zeros(9)), nn.Parameter(torch.ones(3), requires_grad=False)]
    before = [p.detach().clone() for p in params]
    lr = 0.01 if lr == "float" else torch.tensor(0.01)
    optimizer = construct(name, params, lr=lr, weight_decay=0.1)
    states._init_optim_state(optimizer)
    assert all(map(torch.equal, params, before))
    assert optimizer.param_groups[0]["lr"] is lr
    assert all(p.grad is None for p in params)
    assert set(map(id, optimizer.state)) == set(map(id, params[:-1]))
    give(params[:-1], 0)
    optimizer.step()
    for param, old in zip(params[:-1], before):
        trust = "LAMB" in name or "LARS" in name
        assert param.isfinite().all() and (trust or not torch.equal(param, old))


def test_states_of_a_model_are_collected_and_set_by_name():
    """By torch.distributed.checkpoint, without a process group: into an optimizer that never stepped."""
    states = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 3)) for _ in range(2)]
    optimizers = [make("AdamW", model.parameters(), compile=False) for model in models]
    for k in range(3):
        give(members(optimizers[0]), k)
        optimizers[0].step()
    models[1].load_state_dict(models[0].state_dict())
    saved = copy.deepcopy(states.get_optimizer_state_dict(models[0], optimizers[0]))
    assert set(saved["state"]) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    states.set_optimizer_state_dict(models[1], optimizers[1], saved)
    for optimizer in optimizers:
        give(members(optimizer), 9)
        optimizer.step()
    assert same(*map(snapshot, optimizers))


@each_compile
def test_a_closure_and_hooks_are_called_in_torchs_order(compiled):
    """And a hook may replace the arguments of a step."""
    params, calls = parameters(), []
    optimizer = make("AdamW", params, compile=compiled)

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        optimizer.zero_grad(set_to_none=len(calls) % 2 == 0)
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    def before(o, args, kwargs):
        assert o is optimizer
        calls.append("before")
        return args, {**kwargs, "closure": closure}

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after")),
    ]
    values = [optimizer.step().item() for _ in range(3)]
    assert values == sorted(values, reverse=True) and calls == ["before", "closure", "after"] * 3
    for handle in handles:
        handle.remove()
    assert optimizer.step() is None and optimizer.step(None) is None
    assert optimizer.step(closure) > optimizer.step(closure=closure)


def test_zero_grad_keeps_or_forgets_and_detaches():
    params = parameters()
    optimizer = make("AdamW", params)
    grads = torch.autograd.grad(sum(p.pow(3).sum() for p in params), params, create_graph=True)
    for param, grad in zip(params, grads):
        param.grad = grad
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.requires_grad and not g.any() for p, g in zip(params, grads))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_zero_grad_zeroes_gradients_that_are_views():
    """Of a bucket, as of DistributedDataParallel with gradient_as_bucket_view."""
    (param,) = parameters([(40,)])
    bucket = torch.ones(100)
    param.grad = bucket[30:70]
    make("AdamW", [param]).zero_grad(set_to_none=False)
    assert bucket.sum() == 60 and not param.grad.any()


# -- layouts and dtypes in one graph -------------------------------------------------------------------


def awkward_layouts():
    """Parameters, and functions that make a gradient in the layout that autograd would give it."""
    torch.manual_seed(0)
    buffer = torch.randn(2000)
    pieces = [
        (torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), lambda g: g),
        (buffer[:600].view(20, 30).t(), lambda g: g.contiguous()),
        (buffer[600:900], lambda g: g[:1].expand(300)),
        (buffer[901:941], lambda g: g),
        (torch.randn(40).bfloat16(), lambda g: g),
        (torch.randn(6, 7).half()[:, ::2], lambda g: g),
    ]
    return buffer, [nn.Parameter(x) for x, _ in pieces], [f for _, f in pieces]


@pytest.mark.parametrize("compiled", ["inductor", "launched"])
def test_every_layout_and_dtype_in_one_optimizer(compiled):
    torch._dynamo.reset()
    buffer, params, layouts = awkward_layouts()
    other_buffer, others, _ = awkward_layouts()
    optimizer = make("AdamW", params, compile=True)
    plain = make("AdamW", others, compile=False)
    strides = [(p.stride(), p.data_ptr()) for p in params]
    step = optimizer.step
    if compiled == "inductor":
        step = torch.compile(lambda: optimizer.step(), fullgraph=True)
    for _ in range(3):
        for param, other, layout in zip(params, others, layouts):
            param.grad = layout(torch.randn_like(param))
            other.grad = param.grad.clone()
        if compiled == "inductor" and torch.__version__ < "2.13":
            with pytest.raises(Exception, match="a part of a tensor of which another parameter is a part"):
                step()
            return
        step()
        plain.step()
    assert [(p.stride(), p.data_ptr()) for p in params] == strides
    for param, other in zip(params, others):
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}[param.dtype]
        torch.testing.assert_close(param, other, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(buffer, other_buffer, rtol=1e-4, atol=1e-4)
    assert torch.equal(buffer[941:], other_buffer[941:]) and buffer[900] == other_buffer[900]


# -- compile=... --------------------------------------------------------------------------------------

RUN = """
    import json, os, shutil, sys, warnings
    which = shutil.which
    if "no compiler" in sys.argv:
        shutil.which = lambda name, *a, **k: None if "++" in name else which(name, *a, **k)
    import torch
    from torch import nn
    from bnb_compile.optim import AdamW

    torch.manual_seed(0)
    found = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for compiled in (False, "auto", "default"):
            params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (300, 40)]
            options = {} if compiled == "default" else {"compile": compiled}
            optimizer = AdamW(params, lr=0.01, optim_bits=8, min_8bit_size=256, **options)
            count = len(caught)
            for k in range(3):
                for p in params:
                    p.grad = p.detach() * (k + 1)
                optimizer.step()
            found[str(compiled)] = [p.tolist() for p in params]
            found[str(compiled)] += [v.tolist() for p in params for v in optimizer.state[p].values()]
    assert found["False"] == found["auto"] == found["default"]
    assert not any(name.startswith("torch._inductor.codecache") for name in sys.modules)
    print(json.dumps([str(w.message) for w in caught if "uncompiled" in str(w.message)]))
"""


@pytest.mark.parametrize(
    "arguments, environment, reason",
    [
        ([], {"TORCH_COMPILE_DISABLE": "1"}, "TORCH_COMPILE_DISABLE=1"),
        (["no compiler"], {}, "there is no C++ compiler"),
        (
            [],
            {"CXX": "no-such-compiler", "PATH": ""},
            "there is no C++ compiler",
        ),
    ],
    ids=["switched off", "none found", "none in the path"],
)
def test_without_a_compiler_steps_are_eager_with_one_warning(arguments, environment, reason):
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RUN), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (warned,) = eval(result.stdout.splitlines()[-1])
    assert warned.startswith(f"optimizer steps on cpu run uncompiled: {reason} (python -m bnb_compile.doctor")


@pytest.mark.parametrize(
    "compiled, runs_kernel", [(True, True), ("auto", True), (False, False), ("false", False)]
)
def test_compile_says_what_a_step_runs(compiled, runs_kernel, no_new_kernels):
    params = parameters()
    ran = backends.counts["kernel"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = make("AdamW", params, compile=compiled)
    give(params, 0)
    optimizer.step()
    assert (backends.counts["kernel"] > ran) == runs_kernel


@pytest.mark.parametrize("value", ["sometimes", None, 2])
def test_another_value_of_compile_raises(value):
    with pytest.raises(ValueError, match="Invalid compile: "):
        make("AdamW", parameters(), compile=value)


# -- everything at random -------------------------------------------------------------------------------


class Fuzz:
    """A loop in which anything may happen between two steps, with a count of the steps of every parameter.

    What happens depends on the seed alone, not on how steps are run.
    """

    START = [((20, 15), torch.float32), ((30,), torch.float32), ((17,), torch.float32)]

    def __init__(self, family, seed, compiled, **options):
        self.chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.options = {**options, "compile": compiled}
        self.family = family
        start = [*self.START, *[((11,), torch.bfloat16)] * (family == "AdamW")]
        params = [self.new(shape, dtype) for shape, dtype in start]
        self.optimizer = self.construct([{"params": params[:2]}, {"params": params[2:], "lr": 0.003}])
        self.counts = dict.fromkeys(params, 0)
        self.factor = 1.0
        self.happened: set[str] = set()
        self.events = [
            self.set_lr,
            self.set_betas,
            self.set_weight_decay,
            self.tensor_lr,
            self.save_and_load,
            self.save_and_load_elsewhere,
            self.assign_states,
            self.assign_entries,
            self.remove_state,
            self.scale,
            self.replace_data,
            self.replace_parameter,
            self.add_group,
            self.override,
            self.freeze,
            self.copy,
        ]

    def new(self, shape, dtype=torch.float32):
        return nn.Parameter(torch.randn(shape, generator=self.generator).to(dtype))

    def construct(self, groups):
        hyper = {**FUZZED[self.family][1], **self.options}
        return FUZZED[self.family][0](groups, **hyper)

    @property
    def params(self):
        return members(self.optimizer)

    def any_param(self):
        return self.chance.choice(self.params)

    def any_group(self):
        return self.chance.choice([g for g in self.optimizer.param_groups if g["params"]])

    # what may happen

    def set_lr(self):
        self.any_group()["lr"] = self.chance.uniform(1e-4, 1e-2)

    def set_betas(self):
        group = self.any_group()
        group.update(betas=(self.chance.uniform(0.5, 0.95), *group["betas"][1:]))

    def set_weight_decay(self):
        self.any_group()["weight_decay"] = self.chance.uniform(0.0, 0.1)

    def tensor_lr(self):
        group, value = self.any_group(), self.chance.uniform(1e-4, 1e-2)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = torch.tensor(value)

    def saved(self):
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def save_and_load(self):
        saved = self.saved()
        if self.chance.random() < 0.5:  # something in between
            self.step(bare=True)
            for param, state in zip(self.params, range(len(self.params))):
                self.counts[param] = saved["state"].get(state, {"step": 0})["step"]
        self.optimizer.load_state_dict(saved)

    def save_and_load_elsewhere(self):
        saved = self.saved()
        groups = [{"params": list(group["params"])} for group in self.optimizer.param_groups]
        self.optimizer = self.construct(groups)
        self.optimizer.load_state_dict(saved)

    def assign_states(self):
        for param, state in list(self.optimizer.state.items()):
            self.optimizer.state[param] = {name: value.clone() for name, value in state.items()}

    def assign_entries(self):
        param = self.any_param()
        for name, value in list(self.optimizer.state.get(param, {}).items()):
            self.optimizer.state[param][name] = value.clone()

    def remove_state(self):
        param = self.any_param()
        if self.optimizer.state.pop(param, None):
            self.counts[param] = 0

    def scale(self):
        self.factor = 2.0 ** self.chance.randrange(-3, 4)
        self.optimizer.grad_scale = torch.tensor(self.factor)

    def replace_data(self):
        param = self.any_param()
        param.data = param.data.clone()

    def replace_parameter(self):
        """With the state of the old one, as Gaussian splatting does it, or without."""
        group = self.any_group()
        k = self.chance.randrange(len(group["params"]))
        old = group["params"][k]
        group["params"][k] = new = self.new(old.shape, old.dtype)
        state, count = self.optimizer.state.pop(old, None), self.counts.pop(old)
        keep = state and self.chance.random() < 0.5
        self.counts[new] = count if keep else 0
        if keep:
            self.optimizer.state[new] = state
            self.optimizer.init_state()  # otherwise a state dict has nothing of it before the next step

    def add_group(self):
        if len(self.optimizer.param_groups) < 6:
            params = [self.new(shape) for shape, _ in self.START[: self.chance.randrange(3)]]
            self.optimizer.add_param_group({"params": params, "lr": 0.005})
            self.counts.update((p, 0) for p in params)

    def override(self):
        key, value = self.chance.choice([("lr", 0.002), ("optim_bits", 32), ("optim_bits", 8)])
        GlobalOptimManager.get_instance().override_config(self.any_param(), key, value)

    def freeze(self):
        param = self.any_param()
        param.requires_grad_(not param.requires_grad)

    def copy(self):
        """Of a copy everything is its own: it may step without a trace."""
        other = copy.deepcopy(self.optimizer)
        for param in members(other):
            param.grad = torch.ones_like(param)
        other.step()

    # the loop

    def give_gradients(self):
        rate = self.chance.choice([0.0, 0.0, 0.3, 1.0])
        for param in self.params:
            grad = torch.randn(param.shape, generator=self.generator).to(param.dtype) * self.factor
            if self.chance.random() < 0.1:
                for _ in range(3):
                    bad = self.chance.choice([float("inf"), float("nan"), -float("inf"), 1e30])
                    grad.view(-1)[self.chance.randrange(grad.numel())] = bad
            if self.chance.random() < 0.2 and grad.dim() == 2:
                grad = torch.empty_strided(grad.shape, (1, grad.shape[0])).copy_(grad)
            if self.chance.random() < rate or not param.requires_grad:
                param.grad = None
            elif param.grad is not None and self.chance.random() < 0.5:
                param.grad.copy_(grad)
            else:
                param.grad = grad

    def step(self, bare=False):
        self.give_gradients()
        skipped = self.chance.random() < 0.05
        if skipped:
            self.optimizer.found_inf = torch.ones(())
            self.optimizer.init_state()  # new overrides convert states even so
            before = snapshot(self.optimizer)
        self.optimizer.step()
        if skipped:
            assert same(before, snapshot(self.optimizer))
            del self.optimizer.found_inf
        for param in self.params:
            self.counts[param] += param.grad is not None and not skipped
        if not bare:
            self.optimizer.zero_grad(set_to_none=self.chance.random() < 0.5)

    def check(self):
        for param in self.params:
            state = self.optimizer.state.get(param)
            assert param.isfinite().all()
            assert state or not self.counts[param]
            if state:
                assert state["step"] == self.counts[param]
                assert all(v.isfinite().all() for v in state.values())

    def run(self, steps):
        GlobalOptimManager.get_instance().initialize()
        for k in range(steps):
            for _ in range(self.chance.choice([0, 0, 1, 2])):
                event = self.chance.choice(self.events)
                self.happened.add(event.__name__)
                event()
            self.step()
            if k % 10 == 0:
                self.check()
        self.check()
        assert len(self.happened) == len(self.events)
        assert max(self.counts.values()) > 10
        return snapshot(self.optimizer)


FUZZED = {
    "AdamW": (AdamW, dict(lr=0.01, weight_decay=0.1)),
    "Lion": (Lion, dict(lr=0.001, weight_decay=0.1)),
    "SGD": (SGD, dict(lr=0.01, momentum=0.9)),
}


def fuzz(family, steps, seed, bits, manager):
    options = dict(optim_bits=bits, min_8bit_size=256)
    one, again, eager = (
        Fuzz(family, seed, compiled, **options).run(steps) for compiled in (True, True, False)
    )
    assert same(one, again)
    assert len(one) == len(eager)
    for mine, expected in zip(one, eager):
        assert len(mine) == len(expected)
        for k, (x, y) in enumerate(zip(mine, expected)):
            assert x.dtype == y.dtype and x.shape == y.shape
            if x.dtype == torch.uint8:
                assert (x.int() - y.int()).abs().double().mean() < 1
            elif bits == 32 and x.dtype == torch.float32:
                off = ~torch.isclose(x, y, rtol=1e-5, atol=1e-5)
                # Rounding may decide on a sign, which is all that there is of Lion's update.
                assert off.double().mean() <= (0.01 if family == "Lion" and k == 0 else 0)
            elif k == 0:
                assert (x.float() - y.float()).norm() <= 0.01 * y.float().norm()


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FUZZED)
def test_anything_between_steps_ends_the_same_at_every_run_and_on_every_path(family, bits, manager):
    fuzz(family, 200, 0, bits, manager)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("family", FUZZED)
def test_anything_between_many_steps_ends_the_same(family, bits, seed, manager):
    fuzz(family, 1000, seed, bits, manager)

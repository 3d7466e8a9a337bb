"""Random loops: whatever a program does to an optimizer between two steps, the step takes the path of torch.

Each loop draws events from those that the table in optim/changes.py lists, applies each to our optimizer and
to a reference, and compares after each step. With 32-bit states the reference is torch's own optimizer; with
8 bits it is the same optimizer outside of a graph.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import random

import pytest
import torch
from torch import nn

from bnb_compile import optim
from bnb_compile.optim import GlobalOptimManager

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.core, pytest.mark.quick]

SHAPES = [(20, 30), (20, 30), (40,), (7, 3), (), (300,), (20, 30)]
#: Our classes, those of torch, their options, and what the first state is called in both.
FAMILIES = {
    "AdamW": (
        optim.AdamW32bit,
        optim.AdamW8bit,
        torch.optim.AdamW,
        dict(lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6),
        ("state1", "exp_avg"),
    ),
    "SGD": (
        optim.SGD32bit,
        optim.SGD8bit,
        torch.optim.SGD,
        dict(lr=0.01, weight_decay=0.1, momentum=0.9),
        ("state1", "momentum_buffer"),
    ),
    "RMSprop": (
        optim.RMSprop32bit,
        optim.RMSprop8bit,
        torch.optim.RMSprop,
        dict(lr=0.01, weight_decay=0.1, alpha=0.95, eps=1e-3),
        ("state1", "square_avg"),
    ),
}


class World:
    """Parameters and their optimizer, to which events happen."""

    def __init__(self, cls, first, hyper, captured=False, **options):
        generator = torch.Generator().manual_seed(1)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
        self.make = lambda groups: cls(groups, **hyper, **options)
        self.optimizer = self.make([{"params": self.params[:2]}, {"params": self.params[2:]}])
        self.first, self.hyper = first, hyper
        self.away = []  # groups that were taken out
        self.loose = []  # parameters that were taken out
        self.captured = captured
        self._step = torch.compile(self.optimizer.step, fullgraph=True, backend="eager") if captured else None

    @property
    def groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def replace_optimizer(self, optimizer):
        self.optimizer = optimizer
        if self.captured:
            self._step = torch.compile(optimizer.step, fullgraph=True, backend="eager")

    def step(self):
        (self._step or self.optimizer.step)()


# -- events ----------------------------------------------------------------------------------------
# Each takes what is random, and the reference to look at; it returns what happens to a world, or None
# if it cannot happen now.


def number(rng, w):
    """A hyperparameter is another number, written in one of the ways in which a dict can be written."""
    if not w.groups:
        return None
    g = rng.randrange(len(w.groups))
    key = rng.choice([key for key in w.hyper if key != "eps"])
    value = {
        "lr": rng.uniform(1e-3, 2e-2),
        "weight_decay": rng.choice([0.0, 0.05, 0.2]),
        "betas": (rng.uniform(0.5, 0.95), 0.98),
        "momentum": rng.uniform(0.3, 0.95),
        "alpha": rng.uniform(0.8, 0.98),
    }[key]
    way = rng.choice(
        [
            lambda group: group.__setitem__(key, value),
            lambda group: group.update({key: value}),
            lambda group: group.__ior__({key: value}),
            lambda group: dict.__setitem__(group, key, value),
        ]
    )
    return lambda w: way(w.groups[g])


def learning_rate_tensor(rng, w):
    """A learning rate becomes a tensor, or the tensor is filled."""
    if not w.groups:
        return None
    g, value, fill = rng.randrange(len(w.groups)), rng.uniform(1e-3, 2e-2), rng.random() < 0.7

    def happen(w):
        if fill and isinstance(w.groups[g]["lr"], torch.Tensor):
            w.groups[g]["lr"].fill_(value)
        else:
            w.groups[g]["lr"] = torch.tensor(value)

    return happen


def shared_learning_rate(rng, w):
    """All groups have one tensor."""
    value = rng.uniform(1e-3, 2e-2)

    def happen(w):
        shared = torch.tensor(value)
        for group in w.groups:
            group["lr"] = shared

    return happen


def take_group_out(rng, w):
    if len(w.groups) < 2:
        return None
    g = rng.randrange(len(w.groups))
    return lambda w: w.away.append(w.groups.pop(g))


def put_group_back(rng, w):
    """At any place, as it was or as a plain dict."""
    if not w.away:
        return None
    k, g, plain = rng.randrange(len(w.away)), rng.randrange(len(w.groups) + 1), rng.random() < 0.5

    def happen(w):
        group = w.away.pop(k)
        w.groups.insert(g, dict(group) if plain else group)

    return happen


def new_order(rng, w):
    order = rng.sample(range(len(w.groups)), len(w.groups))
    assign = rng.random() < 0.5

    def happen(w):
        groups = [w.groups[g] for g in order]
        if assign:
            w.optimizer.param_groups = groups
        else:
            w.groups[:] = groups

    return happen


def plain_groups(rng, w):
    return lambda w: setattr(w.optimizer, "param_groups", [dict(group) for group in w.groups])


def move_parameter(rng, w):
    """From one group into another, at any place."""
    full = [g for g, group in enumerate(w.groups) if group["params"]]
    if not full:
        return None
    source, target = rng.choice(full), rng.randrange(len(w.groups))
    k = rng.randrange(len(w.groups[source]["params"]))
    last = rng.random() < 0.5

    def happen(w):
        param = w.groups[source]["params"].pop(k)
        params = w.groups[target]["params"]
        if last:
            params.append(param)
        else:
            w.groups[target]["params"] = [param, *params]

    return happen


def take_parameter_out(rng, w):
    full = [g for g, group in enumerate(w.groups) if len(group["params"]) > 1]
    if not full:
        return None
    g = rng.choice(full)
    k = rng.randrange(len(w.groups[g]["params"]))
    return lambda w: w.loose.append(w.groups[g]["params"].pop(k))


def put_parameter_back(rng, w):
    if not w.loose or not w.groups:
        return None
    k, g = rng.randrange(len(w.loose)), rng.randrange(len(w.groups))
    return lambda w: w.groups[g]["params"].append(w.loose.pop(k))


def new_group(rng, w):
    if len(w.params) > 12:
        return None
    shape, lr, seed = rng.choice(SHAPES), rng.uniform(1e-3, 2e-2), rng.randrange(1000)

    def happen(w):
        param = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        w.params.append(param)
        w.optimizer.add_param_group({"params": [param], "lr": lr})

    return happen


def freeze(rng, w):
    k = rng.randrange(len(w.params))
    return lambda w: w.params[k].requires_grad_(not w.params[k].requires_grad)


def new_memory(rng, w):
    k = rng.randrange(len(w.params))
    return lambda w: setattr(w.params[k], "data", w.params[k].data.clone())


def other_values(rng, w):
    k = rng.randrange(len(w.params))

    def happen(w):
        with torch.no_grad():
            w.params[k].mul_(0.5)

    return happen


def with_state(w):
    states = [w.state[param] if param in w.state else {} for param in w.params]
    return [k for k, state in enumerate(states) if state.get(w.first) is not None]


def reset_state(rng, w):
    """In one of the ways in which a program takes a state away."""
    if not with_state(w):
        return None
    k = rng.choice(with_state(w))
    return rng.choice(
        [
            lambda w: w.state.pop(w.params[k]),
            lambda w: w.state.__delitem__(w.params[k]),
            lambda w: w.state.__setitem__(w.params[k], {}),
            lambda w: w.state[w.params[k]].clear(),
        ]
    )


def reset_all(rng, w):
    return rng.choice(
        [
            lambda w: w.state.clear(),
            lambda w: setattr(w.optimizer, "state", collections.defaultdict(dict)),
        ]
    )


def exchange_states(rng, w):
    same = [k for k in with_state(w) if w.params[k].shape == SHAPES[0]]
    if len(same) < 2:
        return None
    k, j = rng.sample(same, 2)

    def happen(w):
        p, q = w.params[k], w.params[j]
        w.state[p], w.state[q] = w.state[q], w.state[p]

    return happen


def give_state(rng, w):
    """A parameter takes another one's state over, which begins anew."""
    same = [k for k in with_state(w) if w.params[k].shape == SHAPES[0]]
    if len(same) < 2:
        return None
    k, j = rng.sample(same, 2)
    return lambda w: w.state.__setitem__(w.params[k], w.state.pop(w.params[j]))


def write_state(rng, w):
    """In place, or another tensor."""
    if not with_state(w):
        return None
    k, assign = rng.choice(with_state(w)), rng.random() < 0.5

    def happen(w):
        entry = w.state[w.params[k]]
        if assign and entry[w.first].dtype == torch.float32:
            entry[w.first] = entry[w.first] * 0.5
        elif entry[w.first].dtype == torch.float32:
            entry[w.first].mul_(0.5)

    return happen


def all_in_groups(w):
    members = {id(param) for group in w.groups for param in group["params"]}
    return all(id(param) in members for param in w.state)


def save_and_load(rng, w):
    """Into the same optimizer, or a new one; through a file, or not."""
    if not all_in_groups(w):
        return None
    new, file = rng.random() < 0.5, rng.random() < 0.5

    def happen(w):
        saved = w.optimizer.state_dict()
        if file:
            stream = io.BytesIO()
            torch.save(saved, stream)
            stream.seek(0)
            saved = torch.load(stream, weights_only=True)
        else:
            saved = copy.deepcopy(saved)
        if new:
            w.replace_optimizer(w.make([{"params": list(group["params"])} for group in w.groups]))
        w.optimizer.load_state_dict(saved)

    return happen


def copy_all(rng, w):
    def happen(w):
        w.params, optimizer, w.away, w.loose = copy.deepcopy((w.params, w.optimizer, w.away, w.loose))
        w.replace_optimizer(optimizer)

    return happen


def report(rng, w):
    """What changes nothing."""

    def happen(w):
        if all_in_groups(w):
            w.optimizer.state_dict()
        if isinstance(w.optimizer, optim.Optimizer8bit):
            w.optimizer.precision_report()
            repr(w.optimizer)

    return happen


def clear_gradients(rng, w):
    none = rng.random() < 0.5
    return lambda w: w.optimizer.zero_grad(set_to_none=none)


def step_of_others(rng, w):
    """A step of parameters and states that are swapped in for a while."""
    if not all_in_groups(w) or w.away or w.loose or not w.groups or len(with_state(w)) < len(w.params):
        return None

    def happen(w):
        if not isinstance(w.optimizer, optim.Optimizer8bit):
            return
        names = {f"p{k}": param for k, param in enumerate(w.params)}
        saved = copy.deepcopy(w.optimizer.state_dict())
        for entry in saved["state"].values():
            entry["step"] = torch.tensor(entry["step"])
        others = {name: param.detach().clone().requires_grad_() for name, param in names.items()}
        order = [next(n for n, p in names.items() if p is q) for group in w.groups for q in group["params"]]
        others = {name: others[name] for name in order}
        for param in others.values():
            param.grad = torch.ones_like(param)
        with torch.optim.swap_in_optimizer_params_and_state(w.optimizer, others, saved):
            w.optimizer.step()

    return happen


EVENTS = [step_of_others] if hasattr(torch.optim, "swap_in_optimizer_params_and_state") else []
EVENTS += [
    number,
    learning_rate_tensor,
    shared_learning_rate,
    take_group_out,
    put_group_back,
    new_order,
    plain_groups,
    move_parameter,
    take_parameter_out,
    put_parameter_back,
    new_group,
    freeze,
    new_memory,
    other_values,
    reset_state,
    reset_all,
    exchange_states,
    give_state,
    write_state,
    save_and_load,
    copy_all,
    report,
    clear_gradients,
]


# -- what only our optimizers have -----------------------------------------------------------------


def precision(rng, w):
    """An override for one parameter."""
    k, bits = rng.randrange(len(w.params)), rng.choice([8, 32])
    return lambda w: GlobalOptimManager.get_instance().override_config(w.params[k], "optim_bits", bits)


def override_lr(rng, w):
    k, lr = rng.randrange(len(w.params)), rng.uniform(1e-3, 2e-2)
    return lambda w: GlobalOptimManager.get_instance().override_config(w.params[k], "lr", lr)


def options_of_group(rng, w):
    if not w.groups:
        return None
    g = rng.randrange(len(w.groups))
    key, value = rng.choice(
        [
            ("block_wise", True),
            ("block_wise", False),
            ("skip_zeros", True),
            ("skip_zeros", False),
            ("max_unorm", 0.01),
            ("max_unorm", 0.0),
            ("percentile_clipping", 50),
            ("percentile_clipping", 100),
            ("min_8bit_size", 256),
            ("min_8bit_size", 100_000),
        ]
    )
    return lambda w: w.groups[g].__setitem__(key, value)


def scale(rng, w):
    value = rng.choice([0.5, 1.0, 2.0])
    return lambda w: setattr(w.optimizer, "grad_scale", torch.tensor(value))


def overflow(rng, w):
    value = rng.choice([0.0, 1.0])
    return lambda w: setattr(w.optimizer, "found_inf", torch.tensor(value))


def other_dtype(rng, w):
    k, dtype = rng.randrange(len(w.params)), rng.choice([torch.float32, torch.bfloat16])

    def happen(w):
        w.params[k].grad = None
        w.params[k].data = w.params[k].data.to(dtype)

    return happen


OWN_EVENTS = [*EVENTS, precision, override_lr, options_of_group, scale, overflow, other_dtype]


# -- loops -----------------------------------------------------------------------------------------


def gradients(rng, w, seed):
    """What gradients appear: none, new ones of any strides, ones that stay, zeros, negated lazily."""
    kinds = [rng.choice(["new", "new", "new", "none", "stay", "zero", "strided", "neg"]) for _ in w.params]

    def happen(w):
        generator = torch.Generator().manual_seed(seed)
        for param, kind in zip(w.params, kinds):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if kind == "none":
                param.grad = None
            elif kind == "zero":
                param.grad = torch.zeros_like(param)
            elif kind == "strided" and param.dim() == 2:
                param.grad = torch.empty_strided(grad.shape, (1, grad.shape[0]), dtype=grad.dtype).copy_(grad)
            elif kind == "neg":
                param.grad = torch._neg_view(grad)
            elif kind != "stay":
                param.grad = grad

    return happen


def loop(worlds, events, seed, compare, steps=8):
    """Let the same happen to both worlds, of which the first is the reference."""
    GlobalOptimManager.get_instance().initialize()
    rng = random.Random(seed)
    story = []
    for k in range(steps):
        drawn = [rng.choice(events) for _ in range(rng.choice([0, 1, 1, 2, 3]))] if k else []
        for event in drawn:
            happen = event(rng, worlds[0])
            if happen is not None:
                story.append(event.__name__)
                for world in worlds:
                    happen(world)
        happen = gradients(rng, worlds[0], rng.randrange(1 << 30))
        for world in worlds:
            happen(world)
            world.step()
        story.append("step")
        try:
            compare(*worlds)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: after {' '.join(story)}: {error}") from None
    GlobalOptimManager.get_instance().initialize()
    return story


def as_torch(reference, ours):
    for k, (expected, param) in enumerate(zip(reference.params, ours.params, strict=True)):
        close(param, expected, f"parameter {k}")
        state = reference.state.get(expected) or {}
        if reference.first in state:
            close(ours.state[param][ours.first], state[reference.first], f"state of parameter {k}")


def close(actual, expected, what):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-6, msg=lambda text: f"{what}: {text}")


def the_same(reference, ours):
    for k, (expected, param) in enumerate(zip(reference.params, ours.params, strict=True)):
        assert torch.equal(param, expected), f"parameter {k}"
        there, here = reference.state.get(expected) or {}, ours.state.get(param) or {}
        assert there.keys() == here.keys(), f"parameter {k} has {list(here)}, must have {list(there)}"
        for name in there:
            assert torch.equal(there[name], here[name]), f"{name} of parameter {k}"


@contextlib.contextmanager
def many_graphs():
    """A loop compiles its step again after most events."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
        yield
    torch._dynamo.reset()


def against_torch(family, seed, path):
    ours, _, theirs, hyper, (name, torch_name) = FAMILIES[family]
    worlds = [
        World(theirs, torch_name, hyper, foreach=False),
        World(ours, name, hyper, path == "captured", compile=path == "kernel"),
    ]
    with many_graphs() if path == "captured" else contextlib.nullcontext():
        return loop(worlds, EVENTS, seed, as_torch)


def captured_against_eager(family, seed):
    _, cls, _, hyper, (name, _) = FAMILIES[family]
    options = dict(min_8bit_size=256, compile=False)
    worlds = [World(cls, name, hyper, captured, **options) for captured in (False, True)]
    with many_graphs():
        return loop(worlds, OWN_EVENTS, seed, the_same)


#: Kernels of whole tensors cost nothing but their run, graphs a trace for most events.
FEW = {"eager": range(20), "kernel": range(20), "captured": range(2)}
MANY = {"eager": range(20, 120), "kernel": range(20, 120), "captured": range(2, 42)}
CASES = [(family, path) for family in FAMILIES for path in FEW]


@pytest.mark.parametrize("family, path", CASES)
def test_a_loop_ends_where_torchs_does(family, path):
    for seed in FEW[path]:
        against_torch(family, seed, path)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_captured_loop_with_8_bit_states_ends_where_it_does_outside_of_a_graph(family):
    for seed in range(2):
        captured_against_eager(family, seed)


@pytest.mark.slow
@pytest.mark.parametrize("family, path", CASES)
def test_many_loops_end_where_torchs_do(family, path):
    happened = set()
    for seed in MANY[path]:
        happened.update(against_torch(family, seed, path))
    assert happened >= {event.__name__ for event in EVENTS}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_many_captured_loops_with_8_bit_states_end_where_they_do_outside_of_a_graph(family):
    happened = set()
    for seed in range(2, 42):
        happened.update(captured_against_eager(family, seed))
    assert happened >= {event.__name__ for event in OWN_EVENTS}

"""Saving and loading: exact continuation in place, bitsandbytes' formats, and nothing half loaded."""

import copy
import io
import math
import pickle
import random
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from bnb_compile import optim
from bnb_compile.formats.dynamic8 import dynamic_map
from bnb_compile.state.checkpoint import unpack

SHAPES = [(70, 65), (5000,), (100,), (), (0,)]  # 8 bits, of an odd size too; small; 0-dim; empty
NESTED = "__bnb_optimizer_quant_state__"


class Case(NamedTuple):
    """A class, its arguments, and how many states an element has."""

    cls: type
    arguments: dict[str, Any]
    states: int

    def make(self, params, **arguments):
        return self.cls(params, **{"lr": 1e-2, "compile": False, **self.arguments, **arguments})


CASES = {
    "adam": Case(optim.AdamW, dict(betas=(0.9, 0.95), weight_decay=0.1), 2),
    "adam amsgrad": Case(optim.Adam, dict(amsgrad=True), 3),
    "ademamix": Case(optim.AdEMAMix, {}, 3),
    "ademamix scheduled": Case(optim.AdEMAMix, dict(t_alpha=10, t_beta3=20), 3),
    "lamb": Case(optim.LAMB, dict(max_unorm=0.5, weight_decay=0.1), 2),
    "lamb amsgrad": Case(optim.LAMB, dict(amsgrad=True, bias_correction=False), 3),
    "lion": Case(optim.Lion, dict(weight_decay=0.1), 1),
    "sgd": Case(optim.SGD, dict(momentum=0.9, dampening=0.1, weight_decay=0.1), 1),
    "sgd plain": Case(optim.SGD, {}, 0),
    "lars": Case(optim.LARS, dict(momentum=0.9, nesterov=True), 1),
    "rmsprop": Case(optim.RMSprop, dict(weight_decay=0.1), 1),
    "rmsprop momentum": Case(optim.RMSprop, dict(momentum=0.9), 2),
    "rmsprop centered": Case(optim.RMSprop, dict(centered=True), 2),
    "rmsprop both": Case(optim.RMSprop, dict(centered=True, momentum=0.9), 3),
    "adagrad": Case(optim.Adagrad, dict(lr_decay=0.1, initial_accumulator_value=1e-4), 1),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_with_states = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.states], ids=[n for n, c in CASES.items() if c.states]
)
each_bits = pytest.mark.parametrize("bits", [8, 32])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
ADAM = CASES["adam"]


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.quick,
]  # for small tensors more threads cost more than they do


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def gradients(params, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        [(torch.randn(p.shape, generator=generator) * 0.01).to(p.dtype) for p in params] for _ in range(steps)
    ]


def train(optimizer, params, steps):
    for grads in steps:
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True, map_location="cpu")


def equal(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others))


def equal_states(one, params, other, others):
    return all(
        one.state[p].keys() == other.state[q].keys()
        and all(v.dtype == other.state[q][k].dtype for k, v in one.state[p].items())
        and all(torch.equal(v, other.state[q][k]) for k, v in one.state[p].items())
        for p, q in zip(params, others)
    )


def addresses(optimizer, params):
    return [[v.data_ptr() for v in optimizer.state[p].values()] for p in params]


def everything(optimizer):
    """Groups, parameters, states and the addresses of the states, as plain values."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    states = [
        {k: (v.data_ptr(), v.dtype, v.tolist()) for k, v in optimizer.state.get(p, {}).items()}
        for p in params
    ]
    return copy.deepcopy(groups), [p.tolist() for p in params], states


# -- our own ------------------------------------------------------------------------------------


def check_resume(case, dtype, **arguments):
    params = parameters(dtype)
    steps = gradients(params, 8)
    optimizer = case.make(params, **arguments)
    train(optimizer, params, steps[:4])
    saved = through_a_file(optimizer.state_dict())
    resumed, cold = copies(params), copies(params)
    train(optimizer, params, steps[4:])

    # Hyperparameters come with the groups, options do not.
    options = {
        k: v for k, v in case.arguments.items() if k in ("max_unorm", "amsgrad", "centered", "momentum")
    }
    fresh = case.cls(resumed, **{"lr": 0.5, "compile": False, **options, **arguments})
    fresh.load_state_dict(state_dict=saved)
    train(fresh, resumed, steps[4:])
    assert equal(params, resumed)
    assert equal_states(optimizer, params, fresh, resumed)

    train(case.make(cold, **arguments), cold, steps[4:])
    if case.states:  # without any, there is nothing to resume
        assert not torch.equal(params[0], cold[0]) and not torch.equal(params[2], cold[2])


@pytest.mark.core
@each_case
@each_bits
@each_dtype
def test_steps_save_load_steps_are_steps_bitwise(case, bits, dtype):
    check_resume(case, dtype, optim_bits=bits)


@pytest.mark.long
@each_bits
def test_a_compiled_optimizer_resumes_bitwise(bits):
    """One class stands for all: what is saved does not depend on what runs the step."""
    check_resume(ADAM, torch.float32, optim_bits=bits, compile=True)


@pytest.mark.parametrize(
    "options", [dict(max_unorm=0.1), dict(skip_zeros=True), dict(percentile_clipping=5)], ids=str
)
@each_bits
def test_options_resume_bitwise(bits, options):
    check_resume(ADAM, torch.float32, optim_bits=bits, **options)


def test_states_with_one_scale_resume_bitwise():
    check_resume(ADAM, torch.float32, optim_bits=8, block_wise=False)


@each_case
@each_bits
def test_loading_again_or_after_steps_starts_from_what_was_saved_and_moves_no_state(case, bits):
    params = parameters()
    steps = gradients(params, 5)
    optimizer = case.make(params, optim_bits=bits)
    train(optimizer, params, steps[:2])
    saved = copy.deepcopy(optimizer.state_dict())
    start = copies(params)
    train(optimizer, params, steps[2:])

    other = copies(params)
    stepped = case.make(other, optim_bits=bits)
    train(stepped, other, gradients(other, 3, seed=1))
    before = addresses(stepped, other)
    for _ in range(2):
        stepped.load_state_dict(saved)
        for param, at_save in zip(other, start):
            param.data.copy_(at_save.data)
        train(stepped, other, steps[2:])
        assert equal(params, other)
    assert addresses(stepped, other) == before


@each_case
def test_loading_changes_neither_what_is_loaded_nor_shares_it(case):
    params = parameters()
    optimizer = case.make(params, optim_bits=8)
    train(optimizer, params, gradients(params, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    train(optimizer, params, gradients(params, 2))
    optimizer.param_groups[0]["lr"] = 7.0
    assert str(saved) == str(kept)
    for entry, other in zip(saved["state"].values(), kept["state"].values()):
        assert all(torch.equal(v, other[k]) for k, v in entry.items() if isinstance(v, torch.Tensor))


@each_case
def test_an_optimizer_that_never_stepped_saves_no_state_and_loads_it(case):
    params = parameters()
    optimizer = case.make(params, optim_bits=8, lr=0.25)
    saved = optimizer.state_dict()
    assert saved["state"] == {} and saved["param_groups"][0]["lr"] == 0.25
    optimizer.load_state_dict(saved)  # as accelerate's prepare does
    assert optimizer.state_dict()["state"] == {}
    start = copies(params)
    steps = gradients(params, 2)
    train(optimizer, params, steps)
    optimizer.load_state_dict(saved)  # and an optimizer that has stepped starts anew
    assert all(optimizer.state[p]["step"] == 0 for p in params)
    after = copies(params)
    for param, at_start in zip(params, start):
        param.data.copy_(at_start.data)
    train(optimizer, params, steps)
    assert equal(params, after)


def test_looking_at_a_state_that_is_not_there_yet_does_no_harm():
    """As of every torch optimizer, `state` is a defaultdict."""
    params = parameters()
    optimizer = ADAM.make(params)
    assert optimizer.state[params[0]] == {}
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, gradients(params, 1))
    assert optimizer.state[params[0]]["step"] == 1


@each_case
@each_bits
def test_what_is_saved_is_plain_tensors_and_numbers(case, bits):
    params = parameters()
    optimizer = case.make(params, optim_bits=bits)
    train(optimizer, params, gradients(params, 2))
    saved = through_a_file(optimizer.state_dict())
    assert list(saved["state"]) == list(range(len(params)))
    assert all(type(group) is dict for group in saved["param_groups"])
    assert all(
        type(v) in (int, float, torch.Tensor) for entry in saved["state"].values() for v in entry.values()
    )
    assert all(entry["step"] == 2 and type(entry["step"]) is int for entry in saved["state"].values())


@each_with_states
def test_states_are_converted_between_8_and_32_bits(case):
    params = parameters()
    steps = gradients(params, 16)
    for bits in (8, 32):
        trained = copies(params)
        optimizer = case.make(trained, optim_bits=bits)
        train(optimizer, trained, steps[:10])
        resumed = copies(trained)
        other = case.make(resumed, optim_bits=40 - bits)
        other.load_state_dict(optimizer.state_dict())
        assert other.state[resumed[0]]["state1"].dtype == (torch.float32 if bits == 8 else torch.uint8)
        before = [p.detach().clone() for p in trained]
        train(optimizer, trained, steps[10:])
        train(other, resumed, steps[10:])
        for param, exact, start in zip(trained[:3], resumed, before):
            # The sign that Lion takes flips where a momentum is near 0.
            assert (param - exact).norm() <= (0.2 if case.cls is optim.Lion else 0.05) * (
                exact - start
            ).norm()


def test_groups_are_loaded_and_what_was_not_saved_is_kept():
    params = parameters()
    groups = [dict(params=params[:2], lr=0.5), dict(params=params[2:], custom="kept")]
    optimizer = optim.AdamW(groups, compile=False)
    saved = optimizer.state_dict()
    assert saved["param_groups"][1]["custom"] == "kept"
    saved = copy.deepcopy(saved)
    saved["param_groups"][0]["lr"] = 0.125
    saved["param_groups"][0]["new"] = [1, 2]
    del saved["param_groups"][1]["custom"], saved["param_groups"][1]["eps"]
    optimizer.load_state_dict(saved)
    first, second = optimizer.param_groups
    assert first["lr"] == 0.125 and first["new"] == [1, 2]
    assert second["custom"] == "kept" and second["eps"] == 1e-8
    start = params[1].detach().clone()
    train(optimizer, params, gradients(params, 1))
    assert (params[1] - start).abs().max() > 0.1  # the step has lr 0.125


def test_a_scheduler_goes_on_after_loading():
    params = parameters()
    optimizer = ADAM.make(params, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, gradients(params, 1))
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.structure.buckets[0].hyper.table[0, 0] == 0.5


@pytest.mark.parametrize("step", [3.0, torch.tensor(3), torch.tensor([3.0])], ids=str)
def test_a_step_may_be_a_number_or_a_tensor(step):
    params = parameters()
    optimizer = ADAM.make(params)
    train(optimizer, params, gradients(params, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = step
    other = ADAM.make(copies(params))
    other.load_state_dict(saved)
    assert all(s["step"].shape == () and s["step"] == 3 for s in other.state.values())


def test_a_parameter_without_a_saved_state_starts_anew_and_a_frozen_one_has_none():
    params = parameters()
    params[2].requires_grad_(False)
    optimizer = ADAM.make(params, optim_bits=8)
    steps = gradients(params, 3)
    train(optimizer, [params[0], params[1], params[3], params[4]], [[s[0], s[1], s[3], s[4]] for s in steps])
    saved = copy.deepcopy(optimizer.state_dict())
    assert 2 not in saved["state"]
    del saved["state"][0]  # bitsandbytes has none of a parameter that never had a gradient
    others = copies(params)
    others[2].requires_grad_(False)
    for stepped in (False, True):
        other = ADAM.make(others, optim_bits=8)
        if stepped:
            train(other, others[:2], steps)
        other.load_state_dict(saved)
        anew = other.state[others[0]]
        assert anew["step"] == 0 and not anew["absmax1"].any() and not anew["absmax2"].any()
        assert other.state[others[1]]["step"] == 3
        assert others[2] not in other.state


@each_case
@each_bits
def test_deepcopy_and_pickle_continue_identically_and_apart(case, bits):
    model = nn.ParameterList(parameters())
    optimizer = case.make(model, optim_bits=bits)
    steps = gradients(model, 4)
    train(optimizer, model, steps[:2])
    file = io.BytesIO()
    pickle.dump((model, optimizer), file)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(file.getvalue())]
    train(optimizer, model, steps[2:])
    for other_model, other in pairs:
        assert type(other) is case.cls and vars(other.args) == vars(optimizer.args)
        assert not equal(model, other_model)
        other.param_groups[0]["lr"] *= 1  # its groups are its own
        train(other, other_model, steps[2:])
        assert equal(model, other_model) and equal_states(optimizer, model, other, other_model)
        assert other.state[other_model[0]]["step"] == 4
        other.param_groups[0]["lr"] = 0.0
        before = copies(other_model)
        train(other, other_model, steps[:1])
        assert equal(before, other_model)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_state_dict_hooks_fire():
    params, seen = parameters(), []
    optimizer = optim.AdamW(params, compile=False)
    train(optimizer, params, gradients(params, 1))
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": 1})
    saved = optimizer.state_dict()
    assert saved["note"] == 1

    def halve(o, loaded):
        seen.append("loading")
        groups = [{**group, "lr": group["lr"] / 2} for group in loaded["param_groups"]]
        return {**loaded, "param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    optimizer.load_state_dict(saved)
    assert seen == ["saving", "loading", "loaded"]
    assert optimizer.param_groups[0]["lr"] == 5e-4 and saved["param_groups"][0]["lr"] == 1e-3


@pytest.mark.parametrize("stepped", [False, True], ids=["new", "stepped"])
@each_bits
def test_loading_switches_rmsprops_momentum_on_and_off(bits, stepped):
    """Hyperparameters decide which states there are, and they come with the checkpoint."""
    for before, after in ((0.0, 0.9), (0.9, 0.0)):
        params = parameters()
        steps = gradients(params, 6)
        optimizer = optim.RMSprop(params, momentum=after, optim_bits=bits, compile=False)
        train(optimizer, params, steps[:3])
        others = copies(params)
        other = optim.RMSprop(others, momentum=before, optim_bits=bits, compile=False)
        if stepped:
            train(other, others, steps[:2])
            for param, at_save in zip(others, params):
                param.data.copy_(at_save.data)
        other.load_state_dict(optimizer.state_dict())
        train(optimizer, params, steps[3:])
        train(other, others, steps[3:])
        assert equal(params, others) and equal_states(optimizer, params, other, others)


# -- what does not fit ---------------------------------------------------------------------------


def drop(*path):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return damage


def put(value, *path):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value(saved[path[-1]]) if callable(value) else value

    return damage


DAMAGES = {
    "no groups": drop("param_groups"),
    "no states": drop("state"),
    "one group more": lambda saved: saved["param_groups"].append(dict(saved["param_groups"][0], params=[])),
    "one group less": lambda saved: saved["param_groups"].pop(),
    "one parameter less": put(lambda params: params[:-1], "param_groups", 0, "params"),
    "one parameter more": put(lambda params: [*params, 99], "param_groups", 0, "params"),
    "state of an unknown parameter": lambda saved: saved["state"].update({99: saved["state"][0]}),
    "no step": drop("state", 1, "step"),
    "no state1": drop("state", 1, "state1"),
    "no absmax1": drop("state", 1, "absmax1"),
    "no qmap1": drop("state", 1, "qmap1"),
    "other shape": put(lambda t: t[..., :-1], "state", 1, "state1"),
    "flattened": put(lambda t: t.flatten(), "state", 0, "state1"),
    "other number of blocks": put(lambda t: t[..., :-1], "state", 1, "absmax1"),
    "a short map": put(lambda t: t[:16], "state", 1, "qmap1"),
    "codes of int32": put(lambda t: t.int(), "state", 1, "state1"),
    "no tensor": put("text", "state", 1, "state1"),
    "a step that is no number": put("many", "state", 1, "step"),
    "a step of many numbers": put(torch.ones(2), "state", 1, "step"),
    "NaN lr": put(math.nan, "param_groups", 0, "lr"),
    "negative lr": put(-1.0, "param_groups", 0, "lr"),
    "three betas or two": put(lambda betas: (*betas, 0.5), "param_groups", 0, "betas"),
    "negative weight decay": put(-0.1, "param_groups", 0, "weight_decay"),
    "another optimizer's": lambda saved: saved["state"].update(
        {k: {"step": 1, "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)} for k in saved["state"]}
    ),
    "only the last is damaged": put(lambda t: torch.zeros(3), "state", 2, "state1"),
    "no parameters in a group": drop("param_groups", 0, "params"),
    "a state that is None": put(None, "state", 1),
    "NaN step": put(math.nan, "state", 1, "step"),
    "negative step": put(-3, "state", 1, "step"),
    "a ring that is no tensor": put([0.0] * 100, "state", 1, "gnorm_vec"),
    "a table of scales": put(lambda t: t.unsqueeze(-1), "state", 1, "absmax1"),
    "a table as a map": put(lambda t: t.view(16, 16), "state", 1, "qmap1"),
    "no lr": put(None, "param_groups", 0, "lr"),
    "no number of betas": put(0.9, "param_groups", 0, "betas"),
}
DAMAGED = ["adam", "ademamix", "lion", "rmsprop both"]


def check_damage(case, damage, stepped):
    params = parameters()
    optimizer = case.make([dict(params=params[:3]), dict(params=params[3:])], optim_bits=8)
    train(optimizer, params, gradients(params, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    if stepped:
        train(optimizer, params, gradients(params, 2, seed=1))
    else:
        optimizer = case.make([dict(params=params[:3]), dict(params=params[3:])], optim_bits=8)
    optimizer.param_groups[0]["lr"] = 0.125
    before = everything(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    expected = copies(params)
    other = case.make([dict(params=expected[:3], lr=0.125), dict(params=expected[3:])], optim_bits=8)
    if stepped:
        other.load_state_dict(optimizer.state_dict())
    train(optimizer, params, gradients(params, 1, seed=2))
    train(other, expected, gradients(params, 1, seed=2))
    assert equal(params, expected)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "new"])
def test_a_damaged_checkpoint_raises_and_changes_nothing(name, damage, stepped):
    check_damage(CASES[name], damage, stepped)


def flipped(chance, t):
    """One element becomes something bad."""
    bad = chance.choice([math.nan, math.inf, -math.inf, -1.0, -1e-30, 1e30, 3e38])
    t = t.clone()
    if t.numel() and t.is_floating_point():
        t.view(-1)[chance.randrange(t.numel())] = bad
    elif t.numel():
        t.view(-1)[chance.randrange(t.numel())] = chance.randrange(256)
    return t


#: What may become of a value of a saved state: a function of it and of what is random.
DECAY = [
    flipped,
    flipped,
    flipped,
    lambda chance, x: x * chance.choice([0, -1, 1e-40, 1e20, 1e38, math.nan, math.inf]),
    lambda chance, x: x.to(chance.choice([torch.float64, torch.float16, torch.bfloat16, torch.int64])),
    lambda chance, x: x.to(chance.choice([torch.bool, torch.complex64, torch.uint8, torch.int8])),
    lambda chance, x: x.to("meta"),
    lambda chance, x: x.to_sparse(),
    lambda chance, x: x[..., :-1],
    lambda chance, x: x.unsqueeze(chance.choice([0, -1])),
    lambda chance, x: x.flatten(),
    lambda chance, x: x.flatten()[: chance.randrange(3)],
    lambda chance, x: torch.cat([x.flatten(), x.flatten()]),
    lambda chance, x: x.flip(0),
    lambda chance, x: x.flatten()[torch.randperm(x.numel())].view(x.shape),
    lambda chance, x: x.numpy(),
    lambda chance, x: x.tolist(),
    lambda chance, x: x[..., ::2].repeat_interleave(2, -1)[..., : x.shape[-1]],
    lambda chance, x: torch.empty_like(x).random_(),
    lambda chance, x: torch.zeros_like(x),
    lambda chance, x: nn.Parameter(x),
    lambda chance, x: torch._neg_view(-x),
    lambda chance, x: chance.choice([None, "text", {}, [], (), object(), True, b"", 1, -1, 0.5, math.nan]),
    lambda chance, x: chance.choice([2**31, 2**63, 1e300, -(2**31), torch.tensor(2.0**40), torch.ones(2)]),
]


def damaged_randomly(chance, saved):
    """Let one to three things happen to a state dict; returns it, and what has happened."""
    saved, story = copy.deepcopy(saved), []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        where = chance.choice(["state", "state", "state", "entry", "group", "top"])
        k = chance.choice(list(saved["state"])) if saved.get("state") else None
        entry = saved["state"][k] if k is not None else None
        if where == "state" and isinstance(entry, dict) and entry:
            table, key = entry, chance.choice(list(entry))
        elif where == "entry" and entry is not None:
            table, key = saved["state"], k
        elif where == "group" and saved.get("param_groups") and isinstance(saved["param_groups"][0], dict):
            table = chance.choice(saved["param_groups"])
            key = chance.choice(sorted(table)) if isinstance(table, dict) and table else None
        else:
            table, key = saved, chance.choice(["state", "param_groups"])
        if key is None or not isinstance(table, dict) or key not in table:
            continue
        decay = chance.randrange(len(DECAY))
        story.append(f"{where} {k} {key} {decay}")
        if chance.random() < 0.1:
            del table[key]
        elif chance.random() < 0.1 and isinstance(table[key], torch.Tensor):  # another key's value
            table[key] = table[chance.choice(list(table))]
        else:
            try:
                table[key] = DECAY[decay](chance, table[key])
            except (TypeError, AttributeError, RuntimeError, IndexError, ValueError, NotImplementedError):
                continue  # that cannot happen to this value
            rate = table[key]
            if where == "group" and isinstance(rate, (int, float, torch.Tensor)):
                one = not isinstance(rate, torch.Tensor) or rate.numel() == 1
                if one and 1e6 < abs(rate) < math.inf:
                    table[key] = -1.0  # a program may ask for any rate, however absurd
        if table is saved:
            break
    return saved, story


def fuzz_damage(name, bits, seeds):
    """Loading either raises ValueError and changes nothing, or succeeds and training goes on."""
    case, raised = CASES[name], 0
    shapes = [(16, 40), (300,), (7,), ()]
    options = dict(optim_bits=bits, min_8bit_size=256)
    params = parameters(shapes=shapes)
    optimizer = case.make([dict(params=params[:2]), dict(params=params[2:])], **options)
    train(optimizer, params, gradients(params, 2))
    saved = optimizer.state_dict()
    steps = gradients(params, 5, seed=3)
    for seed in seeds:
        chance = random.Random(seed)
        torch.manual_seed(seed)
        damaged, story = damaged_randomly(chance, saved)
        others = copies(params)
        other = case.make([dict(params=others[:2]), dict(params=others[2:])], **options)
        if chance.random() < 0.5:
            train(other, others, steps[:1])
        before = everything(other)
        try:
            other.load_state_dict(damaged)
        except ValueError:
            raised += 1
            assert everything(other) == before, f"seed {seed} has changed something"
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}, {story}: {repr(error)[:200]}") from None
        train(other, others, steps)
        assert all(param.isfinite().all() for param in others), f"seed {seed}, {story} is loaded"
    return raised


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
@each_bits
def test_any_damage_raises_and_changes_nothing_or_does_no_harm(name, bits):
    assert fuzz_damage(name, bits, range(40)) > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@each_bits
def test_much_damage_raises_and_changes_nothing_or_does_no_harm(name, bits):
    assert fuzz_damage(name, bits, range(40, 1000)) > 100


def check_mismatch(saved_of, loaded_by, bits):
    params = parameters()
    optimizer = CASES[saved_of].make(params, optim_bits=bits)
    train(optimizer, params, gradients(params, 2))
    for stepped in (False, True):
        others = copies(params)
        other = CASES[loaded_by].make(others, optim_bits=bits)
        if stepped:
            train(other, others, gradients(params, 1))
        before = everything(other)
        with pytest.raises(ValueError):
            other.load_state_dict(optimizer.state_dict())
        assert everything(other) == before


@pytest.mark.parametrize(
    "saved_of, loaded_by",
    [
        ("lion", "adam"),
        ("sgd", "lamb"),
        ("rmsprop", "adam"),
        ("adagrad", "adam amsgrad"),
        ("adam", "ademamix"),
        ("ademamix", "adam"),
        ("ademamix", "lion"),
        ("sgd", "ademamix"),
        ("lion", "rmsprop"),
    ],
)
@each_bits
def test_a_checkpoint_of_another_algorithm_raises_and_changes_nothing(saved_of, loaded_by, bits):
    check_mismatch(saved_of, loaded_by, bits)


@pytest.mark.parametrize("saved_of", ["adam", "lamb"])
@pytest.mark.parametrize("loaded_by", ["lion", "sgd", "adagrad"])
def test_a_checkpoint_with_more_states_raises(saved_of, loaded_by):
    check_mismatch(saved_of, loaded_by, 32)


# -- bitsandbytes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


#: Arguments of both. Its trust ratio is another one on a CPU, so here it limits nothing.
THEIRS = {
    "Adam": dict(weight_decay=0.1),
    "AdamW": {},
    "AdEMAMix": dict(t_alpha=20, t_beta3=20),
    "LAMB": dict(max_unorm=1e6),
    "Lion": dict(weight_decay=0.1),
    "SGD": dict(momentum=0.9),
    "LARS": dict(momentum=0.9, max_unorm=1e6),
    "RMSprop": dict(weight_decay=0.1),
    "Adagrad": {},
}
each_of_theirs = pytest.mark.parametrize("name", THEIRS)


def flat(saved):
    states = {
        k: {**{n: v for n, v in s.items() if n != NESTED}, **s[NESTED]} for k, s in saved["state"].items()
    }
    return {**saved, "state": states}


def as_before_0_44(saved):
    groups = [
        {k: v for k, v in g.items() if k not in ("alpha", "t_alpha", "t_beta3")}
        for g in saved["param_groups"]
    ]
    return {**flat(saved), "param_groups": groups}


def with_tensor_steps(saved):
    states = {k: {**s, "step": torch.tensor(float(s["step"]))} for k, s in saved["state"].items()}
    return {**saved, "state": states}


FORMS = {
    "nested": lambda saved: saved,
    "flat": flat,
    "before 0.44": as_before_0_44,
    "tensor steps": with_tensor_steps,
}


def check_values(name, mine, theirs):
    """What was loaded is what was saved, in bitsandbytes' layout."""
    assert mine["step"] == theirs["step"]
    for i in (1, 2):
        if f"state{i}" not in theirs:
            assert f"state{i}" not in mine
            continue
        assert mine[f"state{i}"].dtype == theirs[f"state{i}"].dtype
        if name in ("RMSprop", "Adagrad") and theirs["state1"].dtype == torch.uint8:
            # Its second moments have the signed map, ours the one for what is never negative.
            assert torch.equal(mine["qmap1"], dynamic_map(False, torch.device("cpu")).values)
            scales = theirs["absmax1"].repeat_interleave(256)[: theirs["state1"].numel()]
            exact = theirs["qmap1"][theirs["state1"].flatten().long()] * scales
            scales = mine["absmax1"].repeat_interleave(256)[: theirs["state1"].numel()]
            values = mine["qmap1"][mine["state1"].flatten().long()] * scales
            assert ((values - exact).abs() <= 0.5 * 0.9 / 128 * scales * 1.001).all()
            continue
        for key in (f"state{i}", f"absmax{i}", f"qmap{i}"):
            assert key not in theirs or torch.equal(mine[key], theirs[key]), key


def check_next_step(params, loaded, before, name, bits, rtol=1e-5):
    for param, other, start in zip(params, loaded, before):
        assert not torch.equal(other, start)
        if name in ("RMSprop", "Adagrad") and bits == 8 and param.numel() >= 4096:
            # The second moment was encoded once more.
            assert (other - param).norm() <= 0.02 * (param - start).norm()
        else:
            torch.testing.assert_close(other, param, rtol=rtol, atol=1e-7)


@each_of_theirs
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@each_bits
def test_a_bitsandbytes_checkpoint_loads_and_the_next_step_is_its(bnb, name, form, bits):
    """The step itself does not depend on how its CPU backend quantises afterwards, so it is close."""
    params = parameters(shapes=SHAPES[:3])
    arguments = THEIRS[name]
    theirs = getattr(bnb.optim, name)(params, lr=1e-2, optim_bits=bits, **arguments)
    steps = gradients(params, 6)
    train(theirs, params, steps[:5])
    saved = through_a_file(form(theirs.state_dict()))
    assert saved["state"][0]["step"] == 5
    loaded = copies(params)
    ours = getattr(optim, name)(loaded, lr=0.5, optim_bits=bits, compile=False, **arguments)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 1e-2
    for entry, param in zip(ours.state_dict()["state"].values(), params):
        check_values(name, entry, theirs.state[param])
    before = [p.detach().clone() for p in params]
    train(theirs, params, steps[5:])
    train(ours, loaded, steps[5:])
    check_next_step(params, loaded, before, name, bits)


@each_dtype
def test_a_bitsandbytes_checkpoint_of_other_parameters_is_not_cast(bnb, dtype):
    params = parameters(dtype, SHAPES[:3])
    theirs = bnb.optim.AdamW(params, lr=1e-2, optim_bits=8)
    steps = gradients(params, 6)
    train(theirs, params, steps[:5])
    loaded = copies(params)
    ours = optim.AdamW(loaded, optim_bits=8, compile=False)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for entry, param in zip(ours.state_dict()["state"].values(), params):
        check_values("AdamW", entry, theirs.state[param])
    train(theirs, params, steps[5:])
    train(ours, loaded, steps[5:])
    ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for param, other in zip(params, loaded):
        torch.testing.assert_close(other, param, rtol=ulp, atol=1e-7)
        assert (other != param).float().mean() <= (1 if dtype == torch.float32 else 0.01)


@each_of_theirs
@each_bits
def test_our_checkpoint_loads_into_bitsandbytes_and_steps(bnb, name, bits):
    params = parameters(shapes=SHAPES[:3])
    steps = gradients(params, 7)
    arguments = THEIRS[name]
    ours = getattr(optim, name)(params, lr=1e-2, optim_bits=bits, compile=False, **arguments)
    train(ours, params, steps[:5])
    loaded = copies(params)
    theirs = getattr(bnb.optim, name)(loaded, lr=0.5, optim_bits=bits, **arguments)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    before = [p.detach().clone() for p in params]
    train(ours, params, steps[5:6])
    train(theirs, loaded, steps[5:6])
    check_next_step(params, loaded, before, "", bits)
    train(theirs, loaded, steps[6:])  # with what it has encoded itself
    assert all(theirs.state[param]["step"] == 7 and param.isfinite().all() for param in loaded)


@each_of_theirs
def test_a_checkpoint_goes_there_and_back(bnb, name):
    params = parameters(shapes=SHAPES[:3])
    arguments = dict(lr=1e-2, optim_bits=8, **THEIRS[name])
    ours = getattr(optim, name)(params, compile=False, **arguments)
    train(ours, params, gradients(params, 3))
    theirs = getattr(bnb.optim, name)(copies(params), **arguments)
    theirs.load_state_dict(ours.state_dict())
    back = getattr(optim, name)(copies(params), compile=False, **arguments)
    back.load_state_dict(theirs.state_dict())
    assert equal_states(ours, params, back, back.param_groups[0]["params"])


# By hand: what earlier versions wrote.


def map_of(kind):
    return dynamic_map(kind == "signed", torch.device("cpu")).values.clone()


def by_hand(moments, block_size, rows=0):
    """A flat entry of 9,999 elements, random codes with scales, and the values they stand for.

    Args:
        moments: Maps that state1 and state2 have.
        block_size: Elements with one scale; 0 for all.
        rows: Of state1, for AdEMAMix.
    """
    entry, values = {"step": 3}, []
    for k, kind in enumerate(moments, 1):
        shape = (rows, 9999) if rows and k == 1 else (9999,)
        qmap = map_of(kind)
        # Positive, so that a second moment with a signed map can have them too.
        codes = torch.randint(128, 256, shape, dtype=torch.uint8)
        if block_size:
            scales = torch.rand(*shape[:-1], -(-9999 // block_size)) + 0.5
            spread = scales.repeat_interleave(block_size, -1)[..., :9999]
            entry |= {f"absmax{k}": scales}
        else:
            scales = torch.rand(1) + 0.5
            spread = scales
            entry |= {f"max{k}": scales, f"new_max{k}": torch.zeros(1)}
        entry |= {f"state{k}": codes, f"qmap{k}": qmap}
        values += (qmap[codes.long()] * spread).view(-1, 9999).unbind()
    return entry, values


#: Class, arguments, the maps of its moments, rows, and which of our states each value is.
LAYOUTS = {
    "adam": ("AdamW8bit", {}, ["signed", "unsigned"], 0, [1, 2]),
    "ademamix": ("AdEMAMix8bit", {}, ["signed", "unsigned"], 2, [1, 3, 2]),
    "lamb": ("LAMB8bit", {}, ["signed", "unsigned"], 0, [1, 2]),
    "lion": ("Lion8bit", {}, ["signed"], 0, [1]),
    "sgd": ("SGD8bit", dict(momentum=0.9), ["signed"], 0, [1]),
    "lars": ("LARS8bit", dict(momentum=0.9), ["signed"], 0, [1]),
    "rmsprop": ("RMSprop8bit", {}, ["signed"], 0, [1]),
    "adagrad": ("Adagrad8bit", {}, ["signed"], 0, [1]),
}


OLD = {name: layout for name, layout in LAYOUTS.items() if name != "ademamix"}  # which is younger
BLOCK_SIZES = [
    *[pytest.param(layout, 256, id=f"{name} 256") for name, layout in LAYOUTS.items()],
    *[pytest.param(layout, 2048, id=f"{name} 2048") for name, layout in OLD.items()],
    *[pytest.param(layout, 0, id=f"{name} one scale") for name, layout in OLD.items()],
]


@pytest.mark.parametrize("layout, block_size", BLOCK_SIZES)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_other_blocks_and_maps_are_read(layout, block_size, nested):
    """2048 before 0.44; one scale with block_wise=False until 0.49, which LAMB and LARS had."""
    name, arguments, moments, rows, states = layout
    entry, values = by_hand(moments, block_size, rows)
    param = nn.Parameter(torch.randn(9999))
    optimizer = getattr(optim, name)([param], lr=1e-2, compile=False, **arguments)
    saved = copy.deepcopy(optimizer.state_dict())
    step = entry.pop("step")
    saved["state"] = {0: {"step": step, **({NESTED: entry} if nested else entry)}}
    optimizer.load_state_dict(saved)
    state = unpack(optimizer.state[param], optimizer.family.numbers, "")
    assert state["step"] == 3
    for i, exact in zip(states, values):
        assert state[f"absmax{i}"].shape == (40,)
        scales = state[f"absmax{i}"].repeat_interleave(256)[:9999]
        decoded = state[f"qmap{i}"][state[f"state{i}"].long()] * scales
        # Half of the widest gap, 0.9/64 of the scale; codes that need no new block or map are kept.
        kept = block_size == 256 and name not in ("RMSprop8bit", "Adagrad8bit")
        assert ((decoded - exact).abs() <= (0 if kept else 0.5 * 0.9 / 64 * scales * 1.001)).all()
    train(optimizer, [param], gradients([param], 1))
    assert param.isfinite().all()


@pytest.mark.parametrize("bits", [8, 32])
def test_one_scale_is_read_by_an_optimizer_with_one_scale_and_by_32_bits(bits):
    entry, values = by_hand(["signed", "unsigned"], 0)
    param = nn.Parameter(torch.randn(9999))
    optimizer = optim.Adam([param], optim_bits=bits, block_wise=False, compile=False)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: entry}})
    state = optimizer.state[param]
    for i, exact in zip((1, 2), values):
        if bits == 32:
            torch.testing.assert_close(state[f"state{i}"], exact, rtol=0, atol=0)
        else:
            assert state[f"absmax{i}"].unique().numel() == 1
            decoded = state[f"qmap{i}"][state[f"state{i}"].long()] * state[f"absmax{i}"][0]
            assert ((decoded - exact).abs() <= 0.5 * 0.9 / 64 * 1.5).all()


@pytest.mark.parametrize(
    "wrong",
    [
        torch.ones(2),
        torch.ones(0),
        1.0,
    ],
    ids=["two", "none", "number"],
)
def test_one_scale_that_is_not_one_raises_and_changes_nothing(wrong):
    entry, _ = by_hand(["signed", "unsigned"], 0)
    optimizer = optim.Adam8bit([nn.Parameter(torch.randn(9999))], compile=False)
    before = everything(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {**entry, "max1": wrong}}})
    assert everything(optimizer) == before


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_the_ring_of_gradient_norms_is_read(nested):
    """Of bitsandbytes until 0.49, with percentile_clipping."""
    entry, _ = by_hand(["signed", "unsigned"], 256)
    entry["gnorm_vec"] = torch.rand(100)
    step = entry.pop("step")
    param = nn.Parameter(torch.randn(9999))
    optimizer = optim.Adam8bit([param], percentile_clipping=5, compile=False)
    saved = {0: {"step": step, **({NESTED: entry} if nested else entry)}}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved})
    assert torch.equal(optimizer.state[param]["gnorm_vec"], entry["gnorm_vec"])
    assert torch.equal(optimizer.state_dict()["state"][0]["gnorm_vec"], entry["gnorm_vec"])


def test_ademamix_states_of_two_rows_are_not_mistaken():
    """A parameter of two rows has a first moment whose length is two in either layout."""
    for shape in ((2, 3000), (2, 2, 1500), (2,), (2, 2)):
        params = parameters(shapes=[shape])
        steps = gradients(params, 6)
        optimizer = CASES["ademamix"].make(params, optim_bits=8)
        train(optimizer, params, steps[:3])
        others = copies(params)
        other = CASES["ademamix"].make(others, optim_bits=8)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        train(optimizer, params, steps[3:])
        train(other, others, steps[3:])
        assert equal(params, others) and equal_states(optimizer, params, other, others)


def test_an_optimizer_without_groups_to_match_raises():
    optimizer = ADAM.make(parameters())
    for wrong in ({}, {"state": {}}, {"param_groups": []}, {"state": {}, "param_groups": []}):
        with pytest.raises(ValueError):
            optimizer.load_state_dict(wrong)

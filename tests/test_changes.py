"""Nothing that a step depends on changes without effect: each line of the table in optim/changes.py.

Numbers are 1.0 and the like, and plain SGD has no state, so that what a step does can be read off a
parameter.
"""

from __future__ import annotations

import collections
import copy
import gc
import os
import subprocess
import sys
import textwrap
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

from bnb_compile import backends, convert
from bnb_compile.optim import (
    Adagrad,
    AdamW,
    AdamW8bit,
    AdamW32bit,
    AdEMAMix8bit,
    GlobalOptimManager,
    LAMB8bit,
    LARS32bit,
    Lion8bit,
    PytorchLARS,
    RMSprop,
    SGD8bit,
    SGD32bit,
)

pytestmark = pytest.mark.core

N = 5000


def parameter(value=0.0, numel=N):
    return nn.Parameter(torch.full((numel,), value))


def give(params, value=1.0):
    for param in params:
        param.grad = torch.full_like(param, value)


def moved(step, *params):
    """How far a step takes the first element of each parameter."""
    before = [param[0].item() for param in params]
    step()
    return [round(b - param[0].item(), 4) for b, param in zip(before, params)]


@pytest.fixture(autouse=True)
def nothing_compiled_is_left():
    torch._dynamo.reset()
    GlobalOptimManager.get_instance().initialize()
    yield
    GlobalOptimManager.get_instance().initialize()


@pytest.fixture(params=["eager", "kernel", "captured"])
def path(request):
    """How a step runs: returns an optimizer's options, and what steps it."""
    captured = request.param == "captured"

    def stepper(optimizer):
        step = optimizer.step
        return torch.compile(lambda: step(), fullgraph=True, backend="eager") if captured else step

    return SimpleNamespace(
        name=request.param, options=dict(compile=request.param == "kernel"), stepper=stepper
    )


def two_groups(path, **options):
    p, q = parameter(), parameter()
    optimizer = SGD32bit([{"params": [p]}, {"params": [q]}], lr=1.0, **path.options, **options)
    give([p, q])
    step = path.stepper(optimizer)
    step()
    return p, q, optimizer, step


# -- groups --------------------------------------------------------------------------------------


def replace(optimizer):
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.25}


def assign(optimizer):
    optimizer.param_groups = [{**group, "lr": 0.25} for group in optimizer.param_groups]


def swap(optimizer):
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups.reverse()


@pytest.mark.parametrize(
    "edit, expected",
    [
        (lambda o: o.param_groups.pop(), [1, 0]),
        (lambda o: o.param_groups.__delitem__(0), [0, 1]),
        (lambda o: o.param_groups.clear(), [0, 0]),
        (replace, [1, 0.25]),
        (assign, [0.25, 0.25]),
        (swap, [0.5, 1]),
        (lambda o: o.param_groups[0].update(lr=0.5), [0.5, 1]),
        (lambda o: o.param_groups[0].__ior__({"lr": 0.5}), [0.5, 1]),
        (lambda o: dict.update(o.param_groups[0], lr=0.5), [0.5, 1]),  # which no container could notice
        (lambda o: o.param_groups[0]["params"].pop(), [0, 1]),
        (lambda o: list.clear(o.param_groups[1]["params"]), [1, 0]),
    ],
)
def test_the_list_of_groups_may_be_edited(path, edit, expected):
    p, q, optimizer, step = two_groups(path)
    edit(optimizer)
    assert moved(step, p, q) == expected


def test_a_group_appended_as_a_plain_dict_is_updated(path):
    p, q, optimizer, step = two_groups(path)
    group = optimizer.param_groups.pop()
    assert moved(step, p, q) == [1, 0]
    optimizer.param_groups.append({**group, "lr": 0.5})
    assert moved(step, p, q) == [1, 0.5]
    optimizer.param_groups[1]["lr"] = 0.125
    assert moved(step, p, q) == [1, 0.125]


def test_a_parameter_moved_between_groups_has_the_learning_rate_of_its_new_group(path):
    p, q, optimizer, step = two_groups(path)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    assert moved(step, p, q) == [0, 0]


def test_a_group_in_any_order_sets_its_own_rows(path):
    ps = [parameter() for _ in range(6)]
    optimizer = SGD32bit(ps, lr=1.0, **path.options)
    give(ps)
    step = path.stepper(optimizer)
    step()
    optimizer.param_groups[0]["params"] = [ps[0], ps[5], ps[2], ps[3]]
    optimizer.add_param_group({"params": [ps[1], ps[4]], "lr": 0.5})
    optimizer.param_groups[0]["lr"] = 0.0
    assert moved(step, *ps) == [0, 0.5, 0, 0, 0.5, 0]


def test_a_parameter_that_leaves_a_group_leaves_its_learning_rate_tensor(path):
    p, q = parameter(), parameter()
    optimizer = SGD32bit([p, q], lr=torch.tensor(1.0), **path.options)
    give([p, q])
    step = path.stepper(optimizer)
    step()
    optimizer.param_groups[0]["params"] = [p]
    optimizer.add_param_group({"params": [q], "lr": 0.0})
    assert moved(step, p, q) == [1, 0]


def test_a_learning_rate_may_become_a_tensor_another_tensor_and_a_number_again(path):
    p, q, optimizer, step = two_groups(path)
    for lr, expected in (
        (torch.tensor(0.5), 0.5),
        (torch.tensor(0.25, dtype=torch.float64), 0.25),
        (torch.tensor([0.125]), 0.125),
        (2.0, 2.0),
    ):
        optimizer.param_groups[0]["lr"] = lr
        assert moved(step, p, q) == [expected, 1]
        if isinstance(lr, torch.Tensor):
            lr.fill_(0.0625)
            assert moved(step, p, q) == [0.0625, 1]


def test_a_group_that_was_away_comes_back_with_its_state(path):
    p, q = parameter(), parameter()
    optimizer = AdamW8bit([{"params": [p]}, {"params": [q]}], lr=0.1, **path.options)
    step = path.stepper(optimizer)

    def go():
        give([p, q])
        step()

    go()
    go()
    group = optimizer.param_groups.pop()
    assert q in optimizer.state
    before = q.detach().clone()
    go()
    assert torch.equal(q, before)
    assert list(optimizer.state_dict()["state"]) == [0]
    optimizer.param_groups.append(group)
    go()
    assert [int(optimizer.state[x]["step"]) for x in (p, q)] == [4, 3]


def test_wrong_hyperparameters_raise_and_leave_the_group_as_it_was():
    p = parameter()
    optimizer = AdamW8bit([p], lr=0.1, compile=False)
    give([p])
    optimizer.step()
    with pytest.raises(ValueError, match=r"Invalid betas: \(0.9,\), must be 2 numbers"):
        optimizer.param_groups[0].update(betas=(0.9,))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    dict.__setitem__(optimizer.param_groups[0], "betas", (0.9,))  # past the group
    with pytest.raises(ValueError, match=r"Invalid betas: \(0.9,\)"):
        optimizer.step()


@pytest.mark.parametrize(
    "option, value", [("max_unorm", 1e-6), ("skip_zeros", True), ("percentile_clipping", 5)]
)
def test_options_of_a_group_and_of_args_count_after_the_first_step_too(path, option, value):
    def run(write):
        p = parameter(1.0)
        optimizer = SGD32bit([p], lr=1.0, momentum=0.5, **path.options)
        step = path.stepper(optimizer)
        for k in range(6):
            if k == 3:
                write(optimizer)
            p.grad = torch.full((N,), float(k + 1))
            if k > 2:
                p.grad[::2] = 0
            step()
        return p.detach()

    plain = run(lambda o: None)
    for write in (
        lambda o: o.param_groups[0].update({option: value}),
        lambda o: setattr(o.args, option, value),
        lambda o: GlobalOptimManager.get_instance().override_config(
            o.param_groups[0]["params"], option, value
        ),
    ):
        assert not torch.equal(run(write), plain)
        GlobalOptimManager.get_instance().initialize()


def test_args_may_be_a_dict_and_nothing_else_is_ignored():
    p = parameter(1.0)
    optimizer = SGD32bit([p], lr=1.0, args={"max_unorm": 1e-6}, compile=False)
    give([p])
    assert 0 < moved(optimizer.step, p)[0] < 1e-3 or optimizer.args.max_unorm == 1e-6
    for wrong in ("x", {"optim_bit": 8}, 5):
        with pytest.raises(TypeError, match="Invalid args"):
            SGD32bit([p], lr=1.0, args=wrong)


def test_attributes_that_are_options_count_after_the_first_step_too(path):
    p = nn.Parameter(torch.zeros(N, dtype=torch.bfloat16))
    optimizer = SGD32bit([p], lr=1.0, **path.options)
    step = path.stepper(optimizer)
    give([p])
    step()
    optimizer.max_grad_norm = 1.0
    assert 0 < moved(step, p)[0] < 0.1
    optimizer.max_grad_norm = 2.0 * N**0.5
    assert moved(step, p) == [1]
    optimizer.max_grad_norm = None
    assert moved(step, p) == [1]
    optimizer.bf16_stochastic_round = True
    give([p], 1e-3)
    before = p.detach().clone()
    step()
    assert len((before - p).unique()) == 2  # some were rounded up, some down


# -- parameters ----------------------------------------------------------------------------------


def test_an_unfrozen_parameter_is_trained(path):
    model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
    model[0].requires_grad_(False)
    optimizer = AdamW8bit(model.parameters(), lr=0.1, **path.options)
    step = path.stepper(optimizer)

    def train():
        model(torch.randn(4, 80)).square().mean().backward()
        step()
        optimizer.zero_grad()

    train()
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    train()
    assert not torch.equal(model[0].weight, before)


def test_a_parameter_that_requires_no_gradient_but_has_one_is_updated(path):
    p, q = parameter(), parameter().requires_grad_(False)
    optimizer = SGD32bit([p, q], lr=1.0, **path.options)
    step = path.stepper(optimizer)
    give([p])
    assert moved(step, p, q) == [1, 0]
    give([q])
    assert moved(step, p, q) == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_of_another_dtype_keeps_its_state(path, dtype):
    p = parameter()
    optimizer = AdamW8bit([p], lr=0.125, weight_decay=0.0, **path.options)
    step = path.stepper(optimizer)
    give([p])
    step()
    p.grad = None
    p.data = p.data.to(dtype)
    give([p])
    step()
    assert optimizer.state[p]["step"] == 2 and p[0].item() == pytest.approx(-0.25, rel=1e-2)


def test_a_gradient_of_another_shape_raises_before_anything_is_read(path):
    p, q = parameter(), parameter()
    optimizer = SGD32bit([p, q], lr=1.0, **path.options)
    step = path.stepper(optimizer)
    give([p, q])
    step()
    q.data = torch.zeros(200_000)
    by_torch = r"a gradient of size '\[5000\]' to a tensor of size '\[200000\]'"  # as Dynamo says it
    with pytest.raises(Exception, match=rf"a gradient of shape \(5000,\).*of shape \(200000,\)|{by_torch}"):
        step()
    assert (p == -1).all() and (q == 0).all()


def test_a_lazily_negated_gradient_is_taken_as_it_is(path):
    p = parameter()
    optimizer = SGD32bit([p], lr=1.0, **path.options)
    z = torch.complex(torch.randn(N), torch.randn(N))
    p.grad = z.conj().imag
    assert p.grad.is_neg()
    path.stepper(optimizer)()
    assert torch.equal(p, -p.grad.resolve_neg())


def test_parameters_that_overlap_themselves_or_are_no_plain_tensors_raise():
    with pytest.raises(ValueError, match=r"strides \(0,\) has elements that share memory"):
        SGD32bit([nn.Parameter(torch.zeros(1).expand(N))], lr=0.1)
    with pytest.raises(ValueError, match="share memory"):
        SGD32bit([nn.Parameter(torch.zeros(99).as_strided((50, 50), (1, 1)))], lr=0.1)
    with pytest.raises(TypeError, match="a TwoTensor, which has no memory of its own"):
        SGD32bit([nn.Parameter(TwoTensor(torch.zeros(N), torch.zeros(N)))], lr=0.1)
    z = torch.complex(torch.randn(N), torch.randn(N))
    with pytest.raises(ValueError, match="negated lazily"):
        SGD32bit([nn.Parameter(z.conj().imag)], lr=0.1)
    optimizer = SGD32bit([parameter()], lr=0.1)
    with pytest.raises(TypeError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3).double())]})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_that_begins_to_overlap_itself_raises(path):
    p = nn.Parameter(torch.zeros(50, 50))
    optimizer = SGD32bit([p], lr=1.0, **path.options)
    step = path.stepper(optimizer)
    give([p])
    step()
    p.data = torch.zeros(50).expand(50, 50)
    for _ in range(2):
        with pytest.raises(Exception, match="share memory"):
            step()


@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_that_share_memory_are_updated_one_after_another(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = torch.zeros(100_000)
        p, q = nn.Parameter(whole[:70_000]), nn.Parameter(whole[30_000:])
        optimizer = SGD32bit([p, q], lr=1.0)
        for _ in range(3):
            give([p, q])
            optimizer.step()
        assert (
            (whole[:30_000] == -3).all()
            and (whole[30_000:70_000] == -6).all()
            and (whole[70_000:] == -3).all()
        )
        q.data = torch.zeros(70_000)
        optimizer.step()
        assert (whole[:70_000].unique() == torch.tensor([-7.0, -4.0])).all()
    finally:
        torch.set_num_threads(before)


def test_memory_that_was_freed_is_never_followed():
    p = parameter()
    optimizer = SGD32bit([p], lr=1.0)
    give([p])
    optimizer.step()
    p.grad.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory: its storage was freed"):
        optimizer.step()
    give([p])
    p.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="has no memory"):
        optimizer.step()


# -- states --------------------------------------------------------------------------------------


def momenta(path):
    p, q = parameter(), parameter()
    optimizer = SGD32bit([p, q], lr=0.1, momentum=0.9, **path.options)
    p.grad, q.grad = torch.full((N,), 1.0), torch.full((N,), 2.0)
    step = path.stepper(optimizer)
    step()
    return p, q, optimizer, step


def momentum(optimizer, param):
    return optimizer.state[param]["state1"][0].item()


def test_states_may_be_exchanged(path):
    p, q, optimizer, step = momenta(path)
    optimizer.state[p], optimizer.state[q] = optimizer.state[q], optimizer.state[p]
    assert [momentum(optimizer, x) for x in (p, q)] == [2, 1]
    step()
    assert [round(momentum(optimizer, x), 4) for x in (p, q)] == [2.8, 2.9]


def test_a_state_dict_may_be_loaded_in_another_order(path):
    p, q, optimizer, step = momenta(path)
    saved = optimizer.state_dict()
    saved["state"] = {0: saved["state"][1], 1: saved["state"][0]}
    optimizer.load_state_dict(saved)
    assert [momentum(optimizer, x) for x in (p, q)] == [2, 1]
    step()
    assert [round(momentum(optimizer, x), 4) for x in (p, q)] == [2.8, 2.9]


def test_a_state_that_is_taken_away_keeps_its_values_and_may_be_given_to_another_parameter(path):
    p, q, optimizer, step = momenta(path)
    held = optimizer.state[p]
    state = optimizer.state.pop(p)
    assert state is held and state["state1"][0] == 1
    new = parameter()
    optimizer.param_groups[0]["params"][0] = new
    optimizer.state[new] = state
    give([new, q], 0.0)
    step()
    assert momentum(optimizer, new) == pytest.approx(0.9) and new[0].item() == pytest.approx(-0.09)
    gone = weakref.ref(p)
    del p
    gc.collect()
    assert gone() is None


RESETS = [
    lambda p, o: setattr(o, "state", collections.defaultdict(dict)),
    lambda p, o: o.state.__setitem__(p, {}),
    lambda p, o: o.state[p].clear(),
    lambda p, o: o.state.__delitem__(p),
    lambda p, o: o.state.clear(),
    lambda p, o: o.state.pop(p),
    lambda p, o: o.state.popitem(),
    lambda p, o: o.load_state_dict({**o.state_dict(), "state": {}}),
]


@pytest.mark.parametrize("k", range(len(RESETS)))
def test_a_state_may_be_reset(path, k):
    p = parameter()
    optimizer = AdamW8bit([p], lr=0.1, weight_decay=0.0, **path.options)
    give([p])
    step = path.stepper(optimizer)
    step()
    step()
    RESETS[k](p, optimizer)
    assert "state1" not in optimizer.state.get(p, {}) or optimizer.state[p]["step"] == 0
    start = p[0].item()
    step()
    optimizer.init_state()  # a captured step shows the state when something asks
    assert optimizer.state[p]["step"] == 1 and start - p[0].item() == pytest.approx(0.1, rel=1e-4)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert {"step", "state1", "absmax1", "state2"} <= saved["state"][0].keys()


def test_what_is_written_to_a_state_is_the_state(path):
    p = parameter()
    optimizer = AdamW32bit([p], lr=0.1, **path.options)
    give([p])
    step = path.stepper(optimizer)
    for _ in range(3):
        step()
    optimizer.state[p]["step"] = 0
    step()
    assert optimizer.state[p]["step"] == 1
    for value in (7, 7.0, torch.tensor(7), torch.tensor([7.0])):
        optimizer.state[p]["step"] = value
        step()
        assert optimizer.state[p]["step"] == 8
    for wrong in (-1, 2**40, float("nan"), "x"):
        with pytest.raises(ValueError, match="step"):
            optimizer.state[p]["step"] = wrong
    assert optimizer.state[p]["step"] == 8


def test_a_state_of_another_format_is_converted(path):
    q = parameter()
    optimizer = Lion8bit([q], lr=0.1, weight_decay=0.0, **path.options)
    give([q])
    step = path.stepper(optimizer)
    step()
    optimizer.state[q]["state1"] = torch.full((N,), -100.0)
    assert moved(step, q) == [-0.1]
    assert optimizer.state[q]["state1"].dtype == torch.uint8
    optimizer.state[q] = {"step": 5, "state1": torch.full((N,), 100.0)}
    assert moved(step, q) == [0.1] and optimizer.state[q]["step"] == 6
    with pytest.raises(ValueError, match="NaN"):
        optimizer.state[q]["state1"] = torch.full((N,), float("nan"))
    with pytest.raises(ValueError, match=r"state1 \(exp_avg\) has shape \(3,\)"):
        optimizer.state[q] = {"step": 5, "state1": torch.zeros(3)}
    assert moved(step, q) == [0.1]


def test_what_a_user_puts_beside_a_state_stays_there():
    p = parameter()
    optimizer = AdamW8bit([p], lr=0.1, compile=False)
    give([p])
    optimizer.step()
    optimizer.state[p]["note"] = "mine"
    optimizer.step()
    GlobalOptimManager.get_instance().override_config(p, "optim_bits", 32)
    optimizer.step()
    assert optimizer.state[p]["note"] == "mine" and "absmax1" not in optimizer.state[p]
    assert optimizer.state_dict()["state"][0]["note"] == "mine"


def test_reports_and_state_dicts_change_nothing():
    p = parameter()
    optimizer = AdamW8bit([p], lr=0.1, compile=False)
    give([p])
    optimizer.step()
    buckets = list(optimizer.structure.buckets)
    GlobalOptimManager.get_instance().override_config(p, "optim_bits", 32)
    assert optimizer.precision_report()[0]["bits"] == 32
    assert optimizer.state_dict()["state"][0]["state1"].dtype == torch.uint8
    assert optimizer.structure.buckets == buckets
    optimizer.step()
    assert optimizer.structure.buckets != buckets and optimizer.state[p]["state1"].dtype == torch.float32


def test_a_state_that_replaces_all_states_stays_the_state(path):
    """As ``torch.optim.swap_in_optimizer_params_and_state`` needs; and the old one comes back untouched."""
    p = parameter()
    optimizer = AdamW8bit([p], lr=0.1, weight_decay=0.0, **path.options)
    give([p])
    step = path.stepper(optimizer)
    step()
    own = optimizer.state
    before = copy.deepcopy(dict(own[p]))
    other = {key: value.clone() for key, value in own[p].items()}
    other["step"] = torch.tensor(100.0)
    optimizer.state = collections.defaultdict(dict, {p: other})
    step()
    assert other["step"] == 101 and not torch.equal(other["absmax1"], before["absmax1"])
    other["step"].fill_(200.0)
    step()
    assert other["step"] == 201
    optimizer.state = own
    assert all(torch.equal(own[p][key], value) for key, value in before.items())
    step()
    assert optimizer.state[p]["step"] == 2


# -- torch.optim.swap_in_optimizer_params_and_state ------------------------------------------------

swapping = pytest.mark.skipif(
    not hasattr(torch.optim, "swap_in_optimizer_params_and_state"), reason="new in torch 2.13"
)


def swappable(cls=AdamW8bit, **options):
    torch.manual_seed(0)
    model = nn.Linear(80, 80)
    optimizer = cls(model.parameters(), lr=0.1, min_8bit_size=256, **options)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(entry["step"])
    params = {name: param.detach().clone().requires_grad_() for name, param in model.named_parameters()}
    for param in params.values():
        param.grad = torch.randn_like(param)
    return model, optimizer, params, saved


def everything(model, optimizer):
    found = [*model.parameters(), *(x for entry in optimizer.state.values() for x in entry.values())]
    return [x.detach().clone() for x in found], copy.deepcopy(optimizer.state_dict()["param_groups"])


@swapping
@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit, AdEMAMix8bit, LAMB8bit])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_swapped_in_is_what_the_step_reads_and_writes(cls, compiled):
    model, optimizer, params, saved = swappable(cls, compile=compiled)
    live = everything(model, optimizer)
    expected_model, expected = swappable(cls, compile=compiled)[:2]
    for param, given in zip(expected_model.parameters(), params.values()):
        param.grad = given.grad.clone()
    for group in expected.param_groups:
        group["lr"] = 0.05
    expected.step()
    expected.step()
    saved["param_groups"][0]["lr"] = 0.05
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, saved):
        optimizer.step()
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
    torch.testing.assert_close(everything(model, optimizer), live, rtol=0, atol=0)
    for param, given in zip(expected_model.parameters(), params.values()):
        assert torch.equal(param, given)
    for theirs, entry in zip(expected.state_dict()["state"].values(), saved["state"].values()):
        assert theirs.pop("step") == entry.pop("step")
        assert all(torch.equal(theirs[key], entry[key]) for key in theirs)
    optimizer.step()


@swapping
@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit])
def test_a_swapped_step_can_be_traced(cls):
    model, optimizer, params, saved = swappable(cls)
    live = everything(model, optimizer)
    grads = {name: param.grad for name, param in params.items()}

    def step(params, grads, saved):
        params = {name: param.detach() for name, param in params.items()}
        for name, param in params.items():
            param.grad = grads[name]
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, saved):
            optimizer.step()
        return params, saved

    expected = copy.deepcopy((params, grads, saved))
    step(*expected)
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    with fake_mode:
        fake = torch.utils._pytree.tree_map_only(
            torch.Tensor, fake_mode.from_tensor, ({n: p.detach() for n, p in params.items()}, grads, saved)
        )
        graph = make_fx(step)(*fake)
    torch.testing.assert_close(everything(model, optimizer), live, rtol=0, atol=0)
    actual = copy.deepcopy((params, grads, saved))
    for _ in range(2):
        graph(*[{n: p.detach() for n, p in actual[0].items()}, *actual[1:]])
    step(*expected)
    for a, e in zip(torch.utils._pytree.tree_leaves(actual), torch.utils._pytree.tree_leaves(expected)):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)
    tables = [bucket.hyper.table.data_ptr() for bucket in optimizer.structure.buckets]
    assert not {x.data_ptr() for x in graph.buffers()} & set(tables)  # the live ones


@swapping
def test_a_number_of_steps_is_not_traced():
    model, optimizer, params, saved = swappable()
    for entry in saved["state"].values():
        entry["step"] = int(entry["step"])

    def step(params, saved):
        with torch.optim.swap_in_optimizer_params_and_state(optimizer, params, saved):
            optimizer.step()
        return params

    with pytest.raises(ValueError, match="a number as its step, which a traced graph would repeat"):
        make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(params, saved)


# -- tensors without values ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW8bit, AdamW32bit, LAMB8bit, SGD8bit, AdEMAMix8bit])
def test_steps_of_fake_and_meta_tensors_compute_shapes(cls):
    before = backends.counts["kernel"]
    with FakeTensorMode():
        model = nn.Linear(80, 80)
        optimizer = cls(model.parameters(), lr=0.01)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer.step()
        assert optimizer.state[model.weight]["step"].shape == ()
    model = nn.Linear(80, 80, device="meta")
    optimizer = cls(model.parameters(), lr=0.01)
    for _ in range(2):
        model(torch.ones(1, 80, device="meta")).sum().backward()
        optimizer.step()
    assert backends.counts["kernel"] == before


# -- overrides -------------------------------------------------------------------------------------


def test_overrides_made_in_bitsandbytes_are_noticed(path):
    bnb = pytest.importorskip("bitsandbytes")
    p = parameter()
    optimizer = SGD32bit([p], lr=1.0, **path.options)
    give([p])
    step = path.stepper(optimizer)
    step()
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    try:
        manager.override_config(p, "lr", 0.25)
        assert moved(step, p) == [0.25]
    finally:
        manager.initialize()


# -- captured steps --------------------------------------------------------------------------------


def test_one_compiled_helper_serves_optimizers_of_any_precision():
    @torch.compile(fullgraph=True, backend="eager")
    def step(optimizer):
        optimizer.step()
        optimizer.zero_grad()

    for cls in (AdamW8bit, AdamW32bit, AdamW8bit):
        model = nn.Linear(80, 80)
        model(torch.ones(4, 80)).sum().backward()
        before = model.weight.detach().clone()
        step(cls([model.weight], lr=0.01))
        assert not torch.equal(model.weight, before) and model.weight.grad is None


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_whole_train_step_of_local_objects_is_one_graph(dynamic):
    def make(model, optimizer):
        @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
        def train(x):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return train

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        model = nn.Sequential(nn.Linear(80, 80), nn.Linear(80, 80))
        optimizer = AdamW8bit(model.parameters(), lr=0.001)
        train = make(model, optimizer)
        x = torch.ones(4, 80)
        losses = [train(x).item() for _ in range(3)]
        GlobalOptimManager.get_instance().override_config(model[0].weight, "optim_bits", 32)
        losses += [train(x).item() for _ in range(3)]
        assert optimizer.state[model[0].weight]["state1"].dtype == torch.float32
        assert sorted(losses, reverse=True) == losses


def test_parameters_of_other_sizes_are_compiled_anew():
    @torch.compile(fullgraph=True)
    def step(optimizer):
        optimizer.step()

    for n in (80, 90, 100, 90):
        w = torch.randn(80, n, requires_grad=True)
        expected = w.detach().clone().requires_grad_()
        w.grad = torch.randn(80, n)
        expected.grad = w.grad.clone()
        step(AdamW32bit([w], lr=0.01))
        torch.optim.AdamW([expected], lr=0.01).step()
        torch.testing.assert_close(w, expected, rtol=1e-6, atol=1e-7)


# -- layouts of bitsandbytes -------------------------------------------------------------------------


def test_live_states_have_the_layout_of_bitsandbytes():
    p = nn.Parameter(torch.randn(70, 65))

    def state_of(cls, **options):
        optimizer = cls([p], lr=0.01, **options)
        p.grad = torch.randn_like(p)
        optimizer.step()
        return optimizer.state[p]

    state = state_of(AdEMAMix8bit)
    assert state["state1"].shape == (2, 70, 65) and state["absmax1"].shape == (2, 18)
    assert {key for key in state if key.startswith("qmap")} == {"qmap1", "qmap2"}
    for state in (state_of(LAMB8bit), state_of(LARS32bit, momentum=0.9)):
        assert state["unorm_vec"].shape == (1,) and state["unorm_vec"] > 0
    state = state_of(PytorchLARS, momentum=0.9)
    assert torch.equal(state["momentum_buffer"], p.grad) and "state1" not in state


def test_the_norm_of_an_update_is_that_of_the_update():
    p = nn.Parameter(torch.randn(70, 65))
    for compiled in (False, True):
        optimizer = SGD32bit([p], lr=0.5, max_unorm=1e6, compile=compiled)
        p.grad = torch.randn_like(p)
        optimizer.step()
        assert optimizer.state[p]["unorm_vec"].item() == pytest.approx(p.grad.square().sum().item(), rel=1e-5)


def test_plain_lars_goes_on_from_a_checkpoint_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes")
    p = nn.Parameter(torch.randn(70, 65))
    theirs = bnb.optim.PytorchLARS([p], lr=0.01, momentum=0.9)
    for _ in range(2):
        p.grad = torch.randn_like(p)
        theirs.step()
    q = nn.Parameter(p.detach().clone())
    ours = PytorchLARS([q], lr=0.01, momentum=0.9)
    ours.load_state_dict(theirs.state_dict())
    q.grad = p.grad.clone()
    theirs.step()
    ours.step()
    torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


# -- checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [AdamW8bit, AdEMAMix8bit, LAMB8bit])
@pytest.mark.parametrize("way", ["load", "assign", "from_torch"])
def test_small_second_moments_survive_a_conversion_to_8_bits(cls, way):
    """Else a step of ``exp_avg / eps`` follows where a gradient is zero, as in rows of an embedding."""
    p = nn.Parameter(torch.zeros(512))
    optimizer = cls([p], lr=1e-3, min_8bit_size=0, weight_decay=0.0, max_unorm=0.0, compile=False)
    v = torch.full((512,), 1e-9)
    v[::256] = 1.0
    m = v.sqrt()
    state = {"step": 100, "state1": torch.stack([m, m]) if cls is AdEMAMix8bit else m, "state2": v}
    if way == "load":
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: state}})
    elif way == "assign":
        optimizer.state[p] = state
    elif cls is not AdamW8bit:
        pytest.skip("torch has no such optimizer")
    else:
        theirs = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.0)
        entry = {"step": torch.tensor(100.0), "exp_avg": m, "exp_avg_sq": v}
        convert.from_torch(optimizer, {**theirs.state_dict(), "state": {0: entry}})
    p.grad = torch.zeros(512)
    optimizer.step()
    assert (optimizer.state[p]["state2"] > 0).all()
    assert p.abs().max() < 10 * 1e-3


# -- the rest ----------------------------------------------------------------------------------------


def test_hooks_of_state_dicts_see_what_is_returned():
    model = nn.Linear(80, 80)
    optimizer = AdEMAMix8bit(model.named_parameters(), lr=0.01)
    model(torch.ones(1, 80)).sum().backward()
    optimizer.step()
    plain = optimizer.state_dict()

    def rename(optimizer, saved):
        names = saved["param_groups"][0]["param_names"]
        return {**saved, "state": {names[k]: entry for k, entry in saved["state"].items()}}

    hook = optimizer.register_state_dict_post_hook(rename)
    renamed = optimizer.state_dict()["state"]["weight"]
    assert isinstance(renamed["step"], int) and renamed.keys() == plain["state"][0].keys()
    hook.remove()
    optimizer.register_state_dict_post_hook(lambda optimizer, saved: {"optimizer": saved})
    assert list(optimizer.state_dict()) == ["optimizer"]


def test_schedules_go_on_after_a_conversion():
    schedulers = torch.optim.lr_scheduler

    def fit(model, optimizer):
        model(torch.ones(2, 80)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = nn.Linear(80, 80)
    ours = AdamW8bit(model.parameters(), lr=0.01)
    schedule = schedulers.OneCycleLR(ours, 0.1, total_steps=20)
    fit(model, ours)
    schedule.step()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    theirs.load_state_dict(convert.to_torch(ours))
    goes_on = schedulers.OneCycleLR(theirs, 0.1, total_steps=20)
    goes_on.load_state_dict(schedule.state_dict())
    theirs.load_state_dict(convert.to_torch(ours))
    fit(model, theirs)
    goes_on.step()
    theirs = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = schedulers.CosineAnnealingLR(theirs, 10)
    fit(model, theirs)
    schedule.step()
    ours = AdamW8bit(model.parameters(), lr=0.01)
    convert.from_torch(ours, theirs.state_dict())
    assert ours.param_groups[0]["initial_lr"] == 0.01
    schedulers.CosineAnnealingLR(ours, 10, last_epoch=schedule.last_epoch)


def test_momentum_is_what_a_cyclic_schedule_changes():
    cyclic = torch.optim.lr_scheduler.CyclicLR
    arguments = dict(base_lr=0.01, max_lr=0.1, base_momentum=0.5, max_momentum=0.8)
    optimizer = RMSprop([parameter()], lr=0.1, alpha=0.9, momentum=0.7)
    cyclic(optimizer, **arguments)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.8)
    with pytest.raises(ValueError, match="momentum"):
        cyclic(Adagrad([parameter()], lr=0.1), **arguments)


def test_parameters_are_freed_with_model_and_optimizer():
    def fit(model, optimizer):
        model(torch.ones(1, 80)).sum().backward()
        optimizer.step()

    model = nn.Linear(80, 80)
    fit(model, AdamW8bit(model.parameters(), lr=0.1))  # imports, compiles
    del model
    gc.collect()
    gc.disable()
    try:
        model = nn.Linear(80, 80)
        optimizer = AdamW8bit(model.parameters(), lr=0.1)
        fit(model, optimizer)
        weight, state = weakref.ref(model.weight), weakref.ref(optimizer.state[model.weight])
        del model, optimizer
        assert weight() is None and state() is None
    finally:
        gc.enable()


def test_first_steps_may_run_in_threads():
    script = """
    import threading, torch
    from torch import nn
    from bnb_compile.optim import AdamW8bit, Lion8bit, RMSprop8bit, SGD32bit
    failed = []
    def work(cls):
        try:
            p = nn.Parameter(torch.ones(5000)); opt = cls([p], lr=.1); p.grad = torch.ones(5000); opt.step()
        except BaseException as error:
            failed.append(error)
    classes = (AdamW8bit, Lion8bit, RMSprop8bit, SGD32bit)
    threads = [threading.Thread(target=work, args=(cls,)) for cls in classes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


@pytest.mark.parametrize("compiled", ["auto", True])
def test_a_compiler_that_fails_is_said_once_and_the_reference_runs(tmp_path, compiled):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    script = f"""
    import torch, warnings
    from torch import nn
    from bnb_compile import backends
    from bnb_compile.optim import AdamW8bit
    p = nn.Parameter(torch.ones(5000)); o = AdamW8bit([p], lr=.1, compile={compiled!r}, weight_decay=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            p.grad = torch.ones(5000); o.step()
    assert abs(p[0].item() - 0.7) < 1e-3 and o.state[p]["step"] == 3
    assert [str(w.message) for w in caught if "run uncompiled" in str(w.message)].__len__() == 1, caught
    assert backends.counts["fallback"] == 1 and not backends.counts["kernel"]
    """
    folders = f"{tmp_path}:/usr/bin:/bin"
    environment = {**os.environ, "PATH": folders, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("CXX", None)
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if compiled == "auto":
        assert done.returncode == 0, done.stderr
    else:
        assert "CompileError" in done.stderr


def test_an_optimizer_takes_a_part_of_its_state_as_those_of_torch():
    p = parameter()
    optimizer = AdamW([p], lr=0.1, compile=False)
    give([p])
    optimizer.step()
    optimizer.__setstate__(
        {"state": optimizer.state, "param_groups": [{**optimizer.param_groups[0], "lr": 0.5}]}
    )
    optimizer.step()
    assert optimizer.state[p]["step"] == 2 and optimizer.param_groups[0]["lr"] == 0.5

"""Overrides of single parameters: which are found, when they count, and what each changes."""

import copy
import gc
import sys
import types
import warnings

import pytest
import torch
from torch import nn

from bnb_compile import optim
from bnb_compile.formats.dynamic8 import dequantize
from bnb_compile.optim import GlobalOptimManager


@pytest.fixture(autouse=True)
def manager():
    """The process's manager, empty before and after."""
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.quick,
]  # for small tensors more threads cost more than they do


def parameters(n=2, numel=5000):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(numel, generator=generator) * 0.1) for _ in range(n)]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def train(optimizer, params, steps=2, seed=1):
    """Gradients of uneven sizes, zero in places, so that clipping and skip_zeros have an effect."""
    generator = torch.Generator().manual_seed(seed)
    for scale in torch.tensor([0.01, 0.05, 0.02, 0.1, 0.03])[:steps]:
        for param in params:
            grad = torch.randn(param.shape, generator=generator) * scale
            zero = torch.rand(param.shape, generator=generator) < 0.3
            param.grad = torch.where(zero, 0.0, grad).to(param.dtype)
        optimizer.step()


def bits(optimizer, param):
    return {torch.uint8: 8, torch.float32: 32}[optimizer.state[param]["state1"].dtype]


def moment(optimizer, param, i):
    state = optimizer.state[param]
    if state[f"state{i}"].is_floating_point():
        return state[f"state{i}"].clone()
    return dequantize(state[f"state{i}"], state[f"absmax{i}"], state[f"qmap{i}"], 256)


def adam(params, cls=optim.Adam8bit, **options):
    return cls(params, **{"lr": 1e-2, "compile": False, **options})


# -- the manager itself --------------------------------------------------------------------------


def test_there_is_one_in_a_process(manager):
    assert GlobalOptimManager.get_instance() is manager is GlobalOptimManager.get_instance()
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOptimManager()


@pytest.mark.parametrize("many", [lambda ps: ps[0], lambda ps: ps[:1], lambda ps: iter(ps[:1])])
@pytest.mark.parametrize(
    "given",
    [
        dict(key="optim_bits", value=32),
        dict(key_value_dict={"optim_bits": 32}),
        dict(key="optim_bits", value=32, key_value_dict={"eps": 1e-3}),
    ],
    ids=str,
)
def test_parameters_and_keys_are_given_one_or_many(manager, many, given):
    params = parameters()
    manager.override_config(many(params), **given)
    optimizer = adam(params)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [32, 8]


def test_parameters_do_not_share_a_dict(manager):
    params, given = parameters(3), {"optim_bits": 32}
    manager.override_config(params[:2], key_value_dict=given)
    manager.override_config(params[0], "optim_bits", 8)
    given["optim_bits"] = 8  # the caller's still
    optimizer = adam(params)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [8, 32, 8]


def test_a_later_override_adds_to_an_earlier_one(manager):
    params = parameters()
    manager.override_config(params[0], "optim_bits", 32)
    manager.override_config(params[0], "lr", 0.0)
    start = params[0].detach().clone()
    optimizer = adam(params)
    train(optimizer, params)
    assert bits(optimizer, params[0]) == 32 and torch.equal(params[0], start)


@pytest.mark.parametrize(
    "given", [dict(key="optim_bit", value=32), dict(key_value_dict={"amsgrad": True}), {}]
)
def test_what_cannot_be_overridden_raises_and_changes_nothing(manager, given):
    params = parameters()
    with pytest.raises(ValueError, match="cannot override.*optim_bits"):
        manager.override_config(params[0], **given)
    with pytest.raises(ValueError, match="cannot override.*optim_bits"):
        manager.register_module_override(
            nn.Linear(2, 2), "weight", given.get("key_value_dict") or {"nothing": 1}
        )
    assert manager.overrides([dict(params=params)]) == {}


@pytest.mark.parametrize("key, value", [("optim_bits", 5), ("lr", -1.0), ("betas", (0.9,)), ("eps", "x")])
def test_an_invalid_value_raises_at_the_next_step_and_changes_no_parameter(manager, key, value):
    params = parameters()
    manager.override_config(params[0], key, value)
    optimizer, before = adam(params), copies(params)
    with pytest.raises(ValueError, match="Invalid"):
        train(optimizer, params)
    assert all(torch.equal(p, q) for p, q in zip(params, before))


def test_a_parameter_that_is_gone_leaves_its_override_to_nobody(manager):
    """Unlike ids, which are given again."""
    for _ in range(3):
        params = parameters(20)
        optimizer = adam(params)
        assert manager.overrides(optimizer.param_groups) == {}
        manager.override_config(params, "optim_bits", 32)
        del params, optimizer
        gc.collect()


# -- what each changes ---------------------------------------------------------------------------

#: A class and its arguments, what is overridden, and the same as an argument of the class.
EFFECTS = [
    ("Adam", dict(optim_bits=8), dict(lr=0.1), {}),
    ("Adam", dict(optim_bits=8), dict(lr="0.1"), {}),
    ("Adam", dict(optim_bits=8), dict(betas=(0.5, 0.75)), {}),
    ("Adam", dict(optim_bits=8), dict(betas="(0.5, 0.75)"), {}),
    ("Adam", dict(optim_bits=8), dict(eps=0.1), {}),
    ("Adam", dict(optim_bits=8), dict(weight_decay=0.3), {}),
    ("Adam", dict(optim_bits=8), dict(optim_bits=32), {}),
    ("Adam", dict(optim_bits=32), dict(optim_bits=8), {}),
    ("Adam", dict(optim_bits=8), dict(min_8bit_size=10_000), {}),
    ("Adam", dict(optim_bits=8, min_8bit_size=10_000), dict(min_8bit_size=100), {}),
    ("Adam", dict(optim_bits=8), dict(max_unorm=1e-3), {}),
    ("LAMB", dict(optim_bits=32), dict(max_unorm=1e-3), {}),
    ("LAMB", dict(optim_bits=32, max_unorm=1e-3), dict(max_unorm=0), {}),
    ("Adam", dict(optim_bits=8), dict(skip_zeros=True), {}),
    ("Adam", dict(optim_bits=8), dict(percentile_clipping=5), {}),
    ("Adam", dict(optim_bits=8, percentile_clipping=5), dict(percentile_clipping=100), {}),
    ("Adam", dict(optim_bits=8), dict(block_wise=False), {}),
    ("Adam", {}, dict(lr=0.1, eps=0.1, optim_bits=8, skip_zeros=True), {}),
    ("AdEMAMix", {}, dict(alpha=1.0), {}),
    ("AdEMAMix", dict(optim_bits=8), dict(t_alpha=10), {}),
    ("AdEMAMix", dict(t_beta3=10), dict(t_beta3=3), {}),
    ("Adagrad", dict(optim_bits=8), dict(lr_decay=0.5), {}),
    ("Lion", dict(optim_bits=8), dict(betas=(0.5, 0.5)), {}),
    ("SGD", dict(optim_bits=8, momentum=0.9), dict(betas=(0.5, 0.25)), dict(momentum=0.5, dampening=0.25)),
    ("LARS", dict(optim_bits=8, momentum=0.9), dict(max_unorm=1e-3), {}),
    ("RMSprop", dict(optim_bits=8), dict(betas=(0.5, 0.0)), dict(alpha=0.5)),
]
#: The parameter's algorithm has other states than its group's.
OTHER_STATES = [
    ("SGD", {}, dict(betas=(0.9, 0.0)), dict(momentum=0.9)),
    ("SGD", dict(momentum=0.9), dict(betas=(0.0, 0.0)), dict(momentum=0.0)),
    ("RMSprop", {}, dict(betas=(0.99, 0.9)), dict(momentum=0.9)),
    ("RMSprop", dict(momentum=0.9), dict(betas=(0.99, 0.0)), dict(momentum=0.0)),
]


def effects(cases):
    ids = [f"{name} {given} {override}" for name, given, override, _ in cases]
    return pytest.mark.parametrize("name, given, override, as_arguments", cases, ids=ids)


def equal_state(one, p, other, q):
    mine, theirs = one.state[p], other.state[q]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())


def check_override(manager, name, given, override, as_arguments, when, steps=4):
    """A step of one overridden parameter of three is that of an optimizer with the value as an argument."""
    cls = getattr(optim, name)
    given = dict(lr=1e-2, weight_decay=0.05, compile=False, **given)
    expected = {**given, **(as_arguments or override)}
    params = parameters(3)
    plain, special = copies(params), copies(params)
    of_plain, of_special = cls(plain, **given), cls(special, **expected)
    train(of_plain, plain, steps=steps)
    train(of_special, special, steps=steps)
    assert not torch.equal(plain[1], special[1])

    if when == "before":
        manager.override_config(params[1], key_value_dict=override)
    optimizer = cls(params, **given)
    if when == "after":
        manager.override_config(params[1], key_value_dict=override)
    train(optimizer, params, steps=steps)
    for param, other, of_other in zip(
        params, (plain[0], special[1], plain[2]), (of_plain, of_special, of_plain)
    ):
        assert torch.equal(param, other)
        equal_state(optimizer, param, of_other, other)
    return optimizer


@effects(EFFECTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_override_is_an_argument_for_one_parameter(manager, name, given, override, as_arguments, when):
    """Made before or after the optimizer."""
    optimizer = check_override(manager, name, given, override, as_arguments, when)
    places = [optimizer.structure.buckets[:]]
    train(optimizer, optimizer.param_groups[0]["params"], steps=1)
    assert places == [optimizer.structure.buckets]  # and nothing is formed anew at each step


@effects(OTHER_STATES)
def test_an_override_may_ask_for_other_states(manager, name, given, override, as_arguments):
    optimizer = check_override(manager, name, given, override, as_arguments, "before")
    places = [optimizer.structure.buckets[:]]
    train(optimizer, optimizer.param_groups[0]["params"], steps=1)
    assert places == [optimizer.structure.buckets]


@effects(EFFECTS)
def test_an_override_after_the_first_step_converts_the_state(manager, name, given, override, as_arguments):
    """As loading the state so far into an optimizer with the value as an argument does."""
    cls = getattr(optim, name)
    given = dict(lr=1e-2, weight_decay=0.05, compile=False, **given)
    params = parameters(3)
    optimizer = cls(params, **given)
    train(optimizer, params, steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = []
    for arguments in (given, {**given, **(as_arguments or override)}):
        other = copies(params)
        continued = cls(other, **arguments)
        groups = continued.state_dict()["param_groups"]
        continued.load_state_dict({**saved, "param_groups": groups})
        train(continued, other, steps=4, seed=2)
        expected.append((continued, other))
    manager.override_config(params[1], key_value_dict=override)
    train(optimizer, params, steps=4, seed=2)
    for k, (continued, other) in enumerate([expected[0], expected[1], expected[0]]):
        assert torch.equal(params[k], other[k])
        equal_state(optimizer, params[k], continued, other[k])
        assert optimizer.state[params[k]]["step"] == 6


def test_states_keep_their_values_when_their_precision_changes(manager):
    params = parameters()
    optimizer = adam(params)
    train(optimizer, params, steps=3)
    coarse = [moment(optimizer, params[0], i) for i in (1, 2)]
    untouched = {k: v.clone() for k, v in optimizer.state[params[1]].items()}
    manager.override_config(params[0], "optim_bits", 32)
    optimizer.init_state()
    assert bits(optimizer, params[0]) == 32 and optimizer.state[params[0]]["step"] == 3
    assert all(torch.equal(moment(optimizer, params[0], i), coarse[i - 1]) for i in (1, 2))
    assert all(torch.equal(v, untouched[k]) for k, v in optimizer.state[params[1]].items())

    train(optimizer, params, steps=1)
    fine = [moment(optimizer, params[0], i) for i in (1, 2)]
    manager.override_config(params[0], "optim_bits", 8)
    optimizer.init_state()
    assert bits(optimizer, params[0]) == 8 and optimizer.state[params[0]]["step"] == 4
    for i, exact in zip((1, 2), fine):
        scales = optimizer.state[params[0]][f"absmax{i}"].repeat_interleave(256)[: exact.numel()]
        # Half of the widest gap of a map of 64 or 128 codes in its last decade.
        assert ((moment(optimizer, params[0], i) - exact).abs() <= 0.0071 * scales).all()


def test_an_override_of_something_else_leaves_states_where_they_are(manager):
    params, others = parameters(), parameters()
    manager.override_config(params[0], "optim_bits", 32)
    optimizer = adam(params)
    train(optimizer, params)
    places = [v.data_ptr() for p in params for v in optimizer.state[p].values()]
    manager.override_config(others, "optim_bits", 32)
    train(optimizer, params)
    assert [v.data_ptr() for p in params for v in optimizer.state[p].values()] == places


def test_all_optimizers_of_a_parameter_have_its_override(manager):
    params = parameters()
    manager.override_config(params[1], "optim_bits", 32)
    for cls in (optim.Adam8bit, optim.Lion8bit, optim.Adam8bit):
        groups = [dict(params=params[1:]), dict(params=params[:1])]
        optimizer = adam(groups, cls)
        train(optimizer, params)
        assert [bits(optimizer, p) for p in params] == [8, 32]


def test_a_group_added_later_has_its_overrides(manager):
    params = parameters(3)
    manager.override_config(params[2], "optim_bits", 32)
    optimizer = adam(params[:1])
    train(optimizer, params[:1])
    optimizer.add_param_group(dict(params=params[1:]))
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [8, 8, 32]


def test_a_parameter_put_into_a_group_later_has_its_override(manager):
    params = parameters()
    manager.override_config(params, "optim_bits", 32)
    optimizer = adam(params[:1])
    train(optimizer, params[:1])
    optimizer.param_groups[0]["params"].append(params[1])
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [32, 32]


def test_a_report_knows_of_overrides(manager):
    params = parameters(3)
    manager.override_config(params[0], "optim_bits", 32)
    manager.override_config(params[1], "min_8bit_size", 10_000)
    optimizer = adam(params)
    train(optimizer, params)
    report = optimizer.precision_report()
    assert [entry["bits"] for entry in report] == [32, 32, 8]
    assert "override" in report[0]["reason"] and "min_8bit_size=10000" in report[1]["reason"]


def test_a_report_knows_of_overrides_before_the_first_step(manager):
    params = parameters()
    manager.override_config(params[0], "optim_bits", 32)
    assert [entry["bits"] for entry in adam(params).precision_report()] == [32, 8]


# -- learning rates ------------------------------------------------------------------------------


def test_an_overridden_learning_rate_does_not_follow_a_schedule_and_the_others_do(manager):
    params = parameters(3)
    manager.override_config(params[1], "lr", 1e-3)
    optimizer = adam(params, optim.Adam32bit)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch == 0))
    train(optimizer, params)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0
    before = copies(params)
    train(optimizer, params)
    moved = [not torch.equal(p, q) for p, q in zip(params, before)]
    assert moved == [False, True, False]
    assert (params[1] - before[1]).abs().max() < 5e-3


@pytest.mark.parametrize("first", [0, 1])
def test_a_learning_rate_tensor_beside_an_override(manager, first):
    params = parameters(3)
    manager.override_config(params[first], "lr", 0.0)
    lr = torch.tensor(1e-2)
    optimizer = adam(params, lr=lr)
    others = copies(params)
    reference = adam(others)
    for value in (1e-2, 0.5, 1e-4):
        lr.fill_(value)
        reference.param_groups[0]["lr"] = lr.item()
        train(optimizer, params, 1)
        train(reference, others, 1)
    start = parameters(3)
    for k, param in enumerate(params):
        assert torch.equal(param, start[k] if k == first else others[k])


def test_a_tensor_overrides_a_learning_rate_and_is_read_at_each_step(manager):
    params, lr = parameters(), torch.tensor(0.0)
    manager.override_config(params[0], "lr", lr)
    optimizer = adam(params)
    start = copies(params)
    train(optimizer, params, 1)
    assert torch.equal(params[0], start[0]) and not torch.equal(params[1], start[1])
    lr.fill_(0.25)
    train(optimizer, params, 1)
    assert (params[0] - start[0]).abs().max() > 0.1


def test_a_group_that_is_written_to_keeps_what_is_overridden(manager):
    params = parameters()
    manager.override_config(params[0], "lr", 0.0)
    optimizer = adam(params)
    start = copies(params)
    for lr in (0.1, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        train(optimizer, params, 1)
    assert torch.equal(params[0], start[0]) and not torch.equal(params[1], start[1])


# -- parameters that are replaced ----------------------------------------------------------------


@pytest.fixture
def conversions_make_new_parameters():
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


@pytest.mark.parametrize("groups", [False, True], ids=["parameters", "groups"])
def test_registered_parameters_keep_their_override_when_they_are_replaced(
    manager, conversions_make_new_parameters, groups
):
    model = nn.Sequential(nn.Linear(70, 70, bias=False), nn.Linear(70, 70, bias=False))
    ids = [id(p) for p in model.parameters()]

    def given():
        return [dict(params=[layer.weight]) for layer in model] if groups else model.parameters()

    manager.override_config(model[1].weight, "optim_bits", 32)
    manager.register_parameters(given())
    model.to(torch.bfloat16)
    gc.collect()
    assert all(id(p) not in ids or p.dtype == torch.bfloat16 for p in model.parameters())
    optimizer = adam(given())
    params = list(model.parameters())
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [8, 32]


def test_parameters_that_stay_alive_do_not_give_their_override_to_their_place(manager):
    """A second model's parameters come to the same places."""
    params, others = parameters(), parameters()
    manager.override_config(params[0], "optim_bits", 32)
    manager.register_parameters(params)
    optimizer = adam(others)
    train(optimizer, others)
    assert [bits(optimizer, p) for p in others] == [8, 8]
    assert params[0] is not None


def test_a_conversion_that_keeps_the_objects_keeps_the_overrides(manager):
    model = nn.Linear(70, 70, bias=False)
    manager.register_parameters(model.parameters())
    model.to(torch.bfloat16)
    manager.override_config(model.weight, "optim_bits", 32)
    model.to(torch.float16)
    optimizer = adam(model.parameters())
    train(optimizer, [model.weight])
    assert bits(optimizer, model.weight) == 32


@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_a_module_overrides_its_parameter(manager, when):
    embedding, linear = nn.Embedding(100, 64), nn.Linear(64, 100, bias=False)
    params = [embedding.weight, linear.weight]
    config = {"optim_bits": 32}
    if when == "before":
        manager.register_module_override(embedding, "weight", config)
        config["optim_bits"] = 8  # the caller's
        embedding.weight = params[0] = nn.Parameter(torch.randn(120, 64))  # a larger vocabulary
    optimizer = adam(params)
    if when == "later":
        train(optimizer, params)
        assert bits(optimizer, params[0]) == 8
    if when != "before":
        manager.register_module_override(embedding, "weight", config)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [32, 8]


def test_a_module_without_the_parameter_overrides_nothing(manager):
    linear = nn.Linear(64, 100, bias=False)
    manager.register_module_override(linear, "bias", {"optim_bits": 32})
    manager.register_module_override(linear, "no_such", {"optim_bits": 32})
    optimizer = adam(linear.parameters())
    train(optimizer, [linear.weight])
    assert bits(optimizer, linear.weight) == 8


def test_a_modules_parameter_that_is_replaced_after_a_step_is_overridden(manager):
    embedding = nn.Embedding(100, 64)
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    optimizer = adam(embedding.parameters())
    train(optimizer, [embedding.weight])
    embedding.weight = nn.Parameter(torch.randn(120, 64))
    optimizer.param_groups[0]["params"][0] = embedding.weight
    train(optimizer, [embedding.weight])
    assert bits(optimizer, embedding.weight) == 32


def test_an_override_of_the_parameter_goes_before_that_of_its_module(manager):
    embedding = nn.Embedding(100, 64)
    manager.override_config(embedding.weight, "optim_bits", 8)
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    optimizer = adam(embedding.parameters())
    train(optimizer, [embedding.weight])
    assert bits(optimizer, embedding.weight) == 8


# -- bitsandbytes' manager -----------------------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """What of bitsandbytes' manager is looked at, without bitsandbytes."""
    instance = types.SimpleNamespace(pid2config={}, index2config={}, module_weight_config_triple=[])
    module = types.ModuleType("bitsandbytes.optim.optimizer")
    module.GlobalOptimManager = types.SimpleNamespace(_instance=instance)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.optimizer", module)
    return instance


@pytest.mark.parametrize("by", ["pid2config", "index2config", "module_weight_config_triple"])
@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_overrides_of_bitsandbytes_count(stub, by, when):
    model = nn.Sequential(nn.Linear(70, 70, bias=False), nn.Linear(70, 70, bias=False))
    params, config = list(model.parameters()), {"optim_bits": 32}

    def override():
        if by == "pid2config":
            stub.pid2config[id(params[1])] = config
        elif by == "index2config":
            stub.index2config[0, 1] = config
        else:
            stub.module_weight_config_triple.append((model[1], "weight", config))

    if when == "before":
        override()
    optimizer = adam(params)
    if when == "later":
        train(optimizer, params)
        assert [bits(optimizer, p) for p in params] == [8, 8]
    if when != "before":
        override()
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [8, 32]


def test_overrides_made_here_go_before_those_of_bitsandbytes(stub, manager):
    params = parameters()
    for param in params:
        stub.pid2config[id(param)] = {"optim_bits": 32, "lr": 0.0}
    manager.override_config(params[0], "optim_bits", 8)
    start = copies(params)
    optimizer = adam(params)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [8, 32]
    assert all(torch.equal(p, q) for p, q in zip(params, start))


def test_a_later_override_in_the_same_place_of_bitsandbytes_counts(stub):
    params = parameters()
    stub.pid2config[id(params[0])] = {"lr": 0.0}
    optimizer = adam(params)
    train(optimizer, params)
    stub.pid2config[id(params[0])].update(optim_bits=32)  # what its override_config does
    train(optimizer, params)
    assert bits(optimizer, params[0]) == 32


def test_a_bitsandbytes_that_is_only_being_imported_is_no_trouble(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "bitsandbytes.optim.optimizer", types.ModuleType("bitsandbytes.optim.optimizer")
    )
    params = parameters()
    optimizer = adam(params)
    train(optimizer, params)
    assert bits(optimizer, params[0]) == 8


@pytest.fixture
def bnb():
    """The real one, with an empty manager before and after."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bnb = pytest.importorskip("bitsandbytes")
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    yield bnb
    bnb.optim.GlobalOptimManager.get_instance().initialize()


def test_the_installed_bitsandbytes_manager_counts(bnb):
    theirs = bnb.optim.GlobalOptimManager.get_instance()
    params = parameters(3)
    theirs.register_parameters(params)
    theirs.override_config(params[0], "optim_bits", 32)
    optimizer = adam(params)
    start = copies(params)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [32, 8, 8]
    theirs.override_config(params[2], key_value_dict={"lr": 0.0, "optim_bits": 32})
    after = copies(params)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [32, 8, 32]
    assert torch.equal(params[2], after[2]) and not torch.equal(params[0], start[0])


@pytest.mark.parametrize("layer", ["StableEmbedding", "Embedding"])
def test_embeddings_of_the_installed_bitsandbytes_have_32_bit_states(bnb, layer):
    """They register themselves when they are made."""
    embedding = getattr(bnb.nn, layer)(100, 64)
    linear = nn.Linear(64, 100, bias=False)
    params = [embedding.weight, linear.weight]
    optimizer = adam(params, optim.AdamW8bit)
    train(optimizer, params)
    assert [bits(optimizer, p) for p in params] == [32, 8]


# -- compiled ------------------------------------------------------------------------------------


def test_overrides_in_a_compiled_step(manager):
    params = parameters()
    others = copies(params)
    manager.override_config([params[0], others[0]], key_value_dict={"lr": 0.1, "betas": (0.5, 0.9)})
    compiled, eager = adam(params, compile=True), adam(others)
    for optimizer, mine in ((compiled, params), (eager, others)):
        train(optimizer, mine, steps=3)
        manager.override_config(mine[1], "lr", 0.5)
        train(optimizer, mine, steps=2)
    for param, other in zip(params, others):
        torch.testing.assert_close(param, other, rtol=1e-3, atol=1e-4)

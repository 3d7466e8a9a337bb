"""Saving and loading: exact continuation in place, bitsandbytes' formats, and nothing half loaded."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from reference import all_families
from torch import nn

FAMILIES = all_families()
families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
each_bits = pytest.mark.parametrize("bits", [8, 32])
both_paths = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
SHAPES = [(70, 65), (5000,), (100,), (), (0,)]  # 8 bits, of an odd size too; small; 0-dim; empty
NESTED = "__bnb_optimizer_quant_state__"


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


def everything(optimizer):
    """Groups, parameters, states and the addresses of the states, as plain values."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    states = [{k: (v.data_ptr(), v.dtype, v.tolist()) for k, v in optimizer.state[p].items()} for p in params]
    return copy.deepcopy(groups), [p.tolist() for p in params], states


# -- our own ------------------------------------------------------------------------------------


@families
@each_bits
@each_dtype
@both_paths
def test_10_steps_save_load_10_steps_are_20_steps_bitwise(family, bits, dtype, compiled):
    params = parameters(dtype)
    steps = gradients(params, 20)
    options = dict(optim_bits=bits, compile=compiled, **family.variants[1])
    optimizer = family.general(params, **options)
    train(optimizer, params, steps[:10])
    saved = through_a_file(optimizer.state_dict())
    resumed, cold = copies(params), copies(params)
    train(optimizer, params, steps[10:])

    fresh = family.general(resumed, optim_bits=bits, compile=compiled)
    fresh.load_state_dict(state_dict=saved)
    dtypes = [{k: v.dtype for k, v in fresh.state[p].items()} for p in resumed]
    assert dtypes == [{k: v.dtype for k, v in optimizer.state[p].items()} for p in params]
    train(fresh, resumed, steps[10:])
    assert equal(params, resumed)
    assert all(
        torch.equal(v, fresh.state[q][k])
        for p, q in zip(params, resumed)
        for k, v in optimizer.state[p].items()
    )

    train(family.general(cold, **options), cold, steps[10:])
    assert not torch.equal(params[0], cold[0]) and not torch.equal(params[2], cold[2])


@families
@each_bits
@both_paths
def test_loading_again_or_after_steps_starts_from_what_was_saved_and_moves_no_state(family, bits, compiled):
    params = parameters()
    steps = gradients(params, 8)
    optimizer = family.general(params, optim_bits=bits, compile=compiled)
    train(optimizer, params, steps[:4])
    saved = copy.deepcopy(optimizer.state_dict())
    start = copies(params)
    train(optimizer, params, steps[4:])

    other = copies(params)
    stepped = family.general(other, optim_bits=bits, compile=compiled)
    train(stepped, other, gradients(other, 3, seed=1))
    addresses = [[v.data_ptr() for v in stepped.state[p].values()] for p in other]
    for _ in range(2):
        stepped.load_state_dict(saved)
        for param, at_save in zip(other, start):
            param.data.copy_(at_save.data)
        train(stepped, other, steps[4:])
        assert equal(params, other)
    assert [[v.data_ptr() for v in stepped.state[p].values()] for p in other] == addresses


@families
@each_bits
def test_an_optimizer_that_never_stepped_saves_no_state_and_loads_it(family, bits):
    params = parameters()
    optimizer = family.general(params, optim_bits=bits, lr=0.25)
    saved = optimizer.state_dict()
    assert saved["state"] == {} and saved["param_groups"][0]["lr"] == 0.25
    optimizer.load_state_dict(saved)  # as accelerate's prepare does
    assert optimizer.state_dict()["state"] == {}
    train(optimizer, params, gradients(params, 1))
    optimizer.load_state_dict(saved)  # and an optimizer that has stepped starts anew
    assert all(optimizer.state[p].get("step", 0) == 0 for p in params)


@families
@each_bits
def test_what_is_saved_is_plain_tensors_and_numbers_that_are_no_longer_changed_after_a_copy(family, bits):
    params = parameters()
    optimizer = family.general(params, optim_bits=bits)
    train(optimizer, params, gradients(params, 2))
    saved = through_a_file(optimizer.state_dict())
    assert list(saved["state"]) == list(range(len(params)))
    assert all(type(group) is dict for group in saved["param_groups"])
    assert all(
        type(v) in (int, float, torch.Tensor) for entry in saved["state"].values() for v in entry.values()
    )
    assert all(entry["step"] == 2 for entry in saved["state"].values())


@families
def test_states_are_converted_between_8_and_32_bits(family):
    params = parameters()
    steps = gradients(params, 20)
    for bits in (8, 32):
        trained = copies(params)
        optimizer = family.general(trained, optim_bits=bits)
        train(optimizer, trained, steps[:10])
        resumed = copies(trained)
        other = family.general(resumed, optim_bits=40 - bits)
        other.load_state_dict(optimizer.state_dict())
        assert other.state[resumed[0]]["state1"].dtype == (torch.float32 if bits == 8 else torch.uint8)
        before = [p.detach().clone() for p in trained]
        train(optimizer, trained, steps[10:])
        train(other, resumed, steps[10:])
        for param, exact, start in zip(trained[:3], resumed, before):
            assert (param - exact).norm() <= 0.05 * (exact - start).norm()


@families
@each_bits
def test_groups_are_loaded_and_what_was_not_saved_is_kept(family, bits):
    params = parameters()
    groups = [dict(params=params[:2], lr=0.5), dict(params=params[2:], custom="kept")]
    optimizer = family.general(groups, optim_bits=bits)
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


@families
@each_bits
@both_paths
def test_deepcopy_and_pickle_continue_identically_and_apart(family, bits, compiled):
    model = nn.ParameterList(parameters())
    optimizer = family.general(model, optim_bits=bits, compile=compiled, **family.variants[1])
    steps = gradients(model, 6)
    train(optimizer, model, steps[:3])
    file = io.BytesIO()
    pickle.dump((model, optimizer), file)
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(file.getvalue())]
    train(optimizer, model, steps[3:])
    for other_model, other in pairs:
        assert not equal(model, other_model)
        other.param_groups[0]["lr"] *= 1  # its groups are its own
        train(other, other_model, steps[3:])
        assert equal(model, other_model)
        assert other.state[other_model[0]]["step"] == 6
        other.param_groups[0]["lr"] = 0.0
        before = copies(other_model)
        train(other, other_model, steps[:1])
        assert equal(before, other_model)
    assert optimizer.param_groups[0]["lr"] == family.variants[1]["lr"]


@families
def test_state_dict_hooks_fire(family):
    params, seen = parameters(), []
    optimizer = family.general(params)
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
    "one parameter less": put(lambda params: params[:-1], "param_groups", 0, "params"),
    "state of an unknown parameter": lambda saved: saved["state"].update({99: saved["state"][0]}),
    "no step": drop("state", 1, "step"),
    "no state2": drop("state", 1, "state2"),
    "no absmax1": drop("state", 1, "absmax1"),
    "no qmap1": drop("state", 1, "qmap1"),
    "other shape": put(lambda t: t[:-1], "state", 1, "state1"),
    "flattened": put(lambda t: t.flatten(), "state", 0, "state1"),
    "other number of blocks": put(lambda t: t[:-1], "state", 1, "absmax2"),
    "a short map": put(lambda t: t[:16], "state", 1, "qmap1"),
    "codes of int32": put(lambda t: t.int(), "state", 1, "state1"),
    "no tensor": put("text", "state", 1, "state1"),
    "a step that is no number": put("many", "state", 1, "step"),
    "invalid lr": put(-1.0, "param_groups", 0, "lr"),
    "another optimizer's": lambda saved: saved["state"].update(
        {k: {"step": 1, "exp_avg": torch.zeros(5), "exp_avg_sq": torch.zeros(5)} for k in saved["state"]}
    ),
}


@families
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("stepped", [True, False], ids=["stepped", "new"])
def test_a_damaged_checkpoint_raises_and_changes_nothing(family, damage, stepped):
    params = parameters()
    optimizer = family.general(params, optim_bits=8)
    train(optimizer, params, gradients(params, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    damage(saved)
    if not stepped:
        optimizer = family.general(params, optim_bits=8)
    else:
        train(optimizer, params, gradients(params, 2, seed=1))
    optimizer.param_groups[0]["lr"] = 0.125
    before = everything(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    expected = copies(params)
    other = family.general(expected, optim_bits=8, lr=0.125)
    if stepped:
        other.load_state_dict(optimizer.state_dict())
    train(optimizer, params, gradients(params, 1, seed=2))
    train(other, expected, gradients(params, 1, seed=2))
    assert equal(params, expected)


# -- bitsandbytes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


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


@families
@pytest.mark.parametrize(
    "form", [lambda saved: saved, flat, as_before_0_44], ids=["nested", "flat", "before 0.44"]
)
@each_bits
@each_dtype
def test_a_bitsandbytes_checkpoint_loads_and_the_next_step_is_its(bnb, family, bits, form, dtype):
    """The step itself does not depend on how its CPU backend quantises afterwards, so it is close."""
    params = parameters(dtype, SHAPES[:3])
    theirs = bnb.optim.AdamW(params, optim_bits=bits, lr=1e-2)
    steps = gradients(params, 11)
    train(theirs, params, steps[:10])
    saved = through_a_file(form(theirs.state_dict()))
    assert saved["state"][0]["step"] == 10 and type(saved["state"][0]["step"]) is int
    loaded = copies(params)
    ours = family.general(loaded, optim_bits=bits)
    ours.load_state_dict(saved)
    assert ours.param_groups[0]["lr"] == 1e-2
    for param, other in zip(params, loaded):
        mine, their = ours.state[other], theirs.state[param]
        for name in (
            "state1",
            "state2",
            *(["absmax1", "absmax2"] if param.numel() >= 4096 and bits == 8 else []),
        ):
            assert mine[name].dtype == their[name].dtype and torch.equal(mine[name], their[name])
    before = [p.detach().clone() for p in params]
    train(theirs, params, steps[10:])
    train(ours, loaded, steps[10:])
    for param, other, start in zip(params, loaded, before):
        assert not torch.equal(other, start)
        ulp = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        torch.testing.assert_close(other, param, rtol=ulp, atol=1e-7)
        assert (other != param).float().mean() <= (1 if dtype == torch.float32 else 0.01)


@families
def test_block_size_2048_is_read(family):
    """As bitsandbytes before 0.44 wrote it, made here by hand."""
    param = parameters(shapes=[(9999,)])[0]
    optimizer = family.general([param], optim_bits=8)
    train(optimizer, [param], gradients([param], 3))
    saved = copy.deepcopy(optimizer.state_dict())
    entry, values = saved["state"][0], []
    for k in (1, 2):
        scales = torch.rand(5) + 0.5  # ceil(9999 / 2048)
        codes = torch.randint(128, 256, (9999,), dtype=torch.uint8)
        entry[f"state{k}"], entry[f"absmax{k}"] = codes, scales
        values.append(entry[f"qmap{k}"][codes.long()] * scales.repeat_interleave(2048)[:9999])
    loaded = family.general([param], optim_bits=8)
    loaded.load_state_dict(saved)
    state = loaded.state[param]
    for k, exact in zip((1, 2), values):
        assert state[f"absmax{k}"].shape == (40,)
        scales = state[f"absmax{k}"].repeat_interleave(256)[:9999]
        decoded = state[f"qmap{k}"][state[f"state{k}"].long()] * scales
        assert ((decoded - exact).abs() <= 0.5 * 0.9 / 64 * scales * 1.001).all()  # half the widest gap


@families
@each_bits
def test_our_checkpoint_loads_into_bitsandbytes_and_steps(bnb, family, bits):
    params = parameters(shapes=SHAPES[:3])
    steps = gradients(params, 11)
    ours = family.general(params, optim_bits=bits, lr=1e-2)
    train(ours, params, steps[:10])
    loaded = copies(params)
    theirs = bnb.optim.AdamW(loaded, optim_bits=bits)
    theirs.load_state_dict(through_a_file(ours.state_dict()))
    train(ours, params, steps[10:])
    train(theirs, loaded, steps[10:])
    for param, other in zip(params, loaded):
        torch.testing.assert_close(other, param, rtol=1e-6, atol=1e-7)
        assert theirs.state[other]["step"] == 11

"""The formats of states that a user chooses by name: what they promise, and that everything takes them."""

from __future__ import annotations

import copy
import io
import itertools
import math
from typing import Any

import pytest
import torch
from helpers.buckets import OTHER_OPS, assert_close, awkward, make
from helpers.buckets import copy as copied
from torch import Tensor, nn

from bnb_compile import convert, export, optim
from bnb_compile.formats import BLOCK, FORMATS, codebook, load_states, ratio, store_states
from bnb_compile.formats.dynamic8 import STOCHASTIC
from bnb_compile.formats.ratios import LOG4, LOG8, RATIO4, RATIO8
from bnb_compile.lowering.cpp.launch import Launcher
from bnb_compile.ops.operator import Modes
from bnb_compile.optim import Adam4bit, AdamW, AdamW4bit
from bnb_compile.rules import ADAM, NEAREST

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def no_recompile_limits_across_tests() -> None:
    torch._dynamo.reset()


LOW = ("dynamic8", "float8", "dynamic8sr", "ratio8", "ratio4_8", "ratio4")
RATIOS = LOW[3:]
each_low = pytest.mark.parametrize("states", LOW)
each_ratio = pytest.mark.parametrize("states", RATIOS)
each_log = pytest.mark.parametrize("of", [LOG8, LOG4], ids=["log8", "log4"])
each_linear = pytest.mark.parametrize("of", [RATIO8, RATIO4], ids=["ratio8", "ratio4"])


def run(
    opt: torch.optim.Optimizer, params: list[nn.Parameter], steps: int, seed: int = 0, scale: float = 1.0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            param.grad = (scale * grad).to(param.dtype)
        opt.step()


def started(states: str, steps: int = 3, **options: Any) -> tuple[AdamW, nn.Parameter]:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(37, 129))
    opt = AdamW([param], states=states, min_8bit_size=1, **options)
    run(opt, [param], steps)
    return opt, param


def moments(opt: AdamW) -> list[Tensor]:
    state = convert.to_torch(opt)["state"][0]
    return [state["exp_avg"], state["exp_avg_sq"]]


def squares(count: int) -> Tensor:
    """Second moments over many decades, some of them 0."""
    torch.manual_seed(0)
    x = 10 ** (-8 * torch.rand(count)) * torch.randn(count).square()
    return torch.where(torch.rand(count) < 0.1, 0.0, x)


# -- what a format promises --------------------------------------------------------------------------------


@each_log
def test_code_0_is_0_and_nothing_else(of: Any) -> None:
    x = squares(5000)
    x[7] = torch.finfo(torch.float32).tiny  # far below all others of its block
    for noise in (1.0, 1.5, 1.9999):
        parts = of.store(x, noise=torch.full_like(x, noise))
        loaded = of.load(parts, len(x))
        assert torch.equal(loaded == 0, x == 0) and (loaded >= 0).all()


@each_log
def test_positive_stays_positive_over_many_steps(of: Any) -> None:
    """It decays by itself until it is raised by the cap of octaves, at the latest."""
    x = squares(2048)
    positive = x > 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        x = of.load(of.store(x * 0.99, noise=1 + torch.rand(len(x), generator=generator)), len(x))
    assert torch.equal(x > 0, positive)


@each_log
def test_every_code_is_encoded_as_itself(of: Any) -> None:
    low, high = (torch.tensor(x).bfloat16().float() for x in (3e-9, 7.0))
    codes = torch.arange(of.last + 1, dtype=torch.int32)
    shared = [low.expand(len(codes)), high.expand(len(codes))]
    values = of.decode([codes], shared)
    assert (values.diff() > 0).all() and values[0] == 0 and values[1] == low
    assert abs(values[-1] / high - 1) < 1e-4
    for noise in (1.01, 1.5, 1.99):
        assert torch.equal(of.encode(values, shared, noise)[0], codes)


@each_linear
def test_every_code_of_a_ratio_is_encoded_as_itself(of: Any) -> None:
    codes = torch.arange(-of.most, of.most + 1, dtype=torch.int32)
    shared = [torch.tensor(0.0371).expand(len(codes))]
    assert torch.equal(of.encode(of.decode([codes], shared), shared, NEAREST)[0], codes)


@pytest.mark.parametrize("of, bound", [(LOG8, 0.01), (LOG4, 0.35)], ids=["log8", "log4"])
def test_stochastic_rounding_keeps_the_mean(of: Any, bound: float) -> None:
    """Within a binade exactly; across one it errs upwards, so that steps are smaller, not larger."""
    x = 10 ** (-3 * torch.rand(256))
    noise = 1 + (torch.arange(1000) + 0.5) / 1000
    mean = torch.stack([of.load(of.store(x, noise=n.expand(256)), 256).double() for n in noise]).mean(0)
    assert ((mean / x - 1) < bound).all() and ((mean / x - 1) > -2e-3).all()
    assert abs(mean.sum() / x.double().sum() - 1) < bound


def test_the_dynamic_map_rounded_stochastically_keeps_the_mean() -> None:
    """Between any two codes, at the ends of decades too, but below the first code above 0."""
    values = codebook.create_dynamic_map(signed=False).double()
    gaps = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    x = (values[1:-1, None] + gaps * values.diff()[1:, None]).flatten()
    x[-1] = 1.0  # the largest, which has a code
    x = torch.cat([x, torch.ones(BLOCK)])  # in blocks of which 1 is the largest
    blocks = torch.nn.functional.pad(x[:-BLOCK], (0, -(len(x) - BLOCK) % 255)).view(-1, 255)
    x = torch.nn.functional.pad(blocks, (0, 1), value=1.0).flatten().float()
    noise = 1 + (torch.arange(500) + 0.5) / 500
    found = torch.stack([STOCHASTIC.load(STOCHASTIC.store(x, noise=n.expand(len(x))), len(x)) for n in noise])
    used = (x > values[1]) & (x < 1)
    upper = torch.bucketize(x[used].double(), values)
    gap = (values[upper] - values[upper - 1]).float()
    apart = ((found[:, used].double().mean(0) - x[used].double()).abs() / gap).max()
    assert apart < 4e-3, apart
    assert torch.equal(found[0] == 0, x == 0)
    neighbours = torch.stack([values[upper - 1], values[upper]]).float()
    is_one = torch.isclose(found[:, None, used], neighbours, rtol=1e-5, atol=0).any(1)
    assert is_one.all()


@each_low
@pytest.mark.parametrize("exponent", [-30, 20])
def test_the_scale_of_the_gradients_changes_no_code(states: str, exponent: int) -> None:
    found = []
    for scale in (1.0, 2.0**exponent):
        param = nn.Parameter(torch.zeros(3000))
        opt = AdamW([param], states=states, eps=1e-8 * scale, weight_decay=0.0, min_8bit_size=1)
        run(opt, [param], 5, scale=scale)
        entry = opt.state[param]
        found.append(({k: x for k, x in entry.items() if x.dtype.itemsize == 1}, param))
    (one, first), (other, second) = found
    assert one.keys() == other.keys() and one
    for key in one:
        assert torch.equal(one[key].view(torch.uint8), other[key].view(torch.uint8)), key
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_a_ratio_is_at_most_what_is_said() -> None:
    """Worst gradients for it: each proportional to what it counts in the mean, over what in the squares."""
    for decay, decay_over in ((0.9, 0.999), (0.9, 0.95), (0.8, 0.65)):
        most, m, v = ratio.most(decay, decay_over), 0.0, 0.0
        for age in reversed(range(400)):
            grad = (decay / decay_over) ** age
            m, v = decay * m + (1 - decay) * grad, decay_over * v + (1 - decay_over) * grad**2
        assert 0.99 * most <= m / math.sqrt(v) <= 1.0001 * most
    assert ratio.most(0.9, 0.999) == pytest.approx(7.27, abs=0.01)
    assert ratio.most(0.9, 0.81) == ratio.most(0.95, 0.9) == ratio.most(0.9, 1.0) == math.inf


@each_ratio
def test_a_first_moment_without_a_second_one_is_no_ratio(states: str) -> None:
    """As bitsandbytes' checkpoints have them, where 8 bits have rounded the second one to 0."""
    stored = FORMATS[states].choose(ADAM.states)
    m, v = torch.randn(300), torch.rand(300)
    v[::3] = 0
    fresh = store_states(stored, [m, v])
    back = load_states(stored, lambda s: fresh[s.state].parts, 300)
    assert torch.equal(back[0] == 0, (v == 0) | (fresh[0].kept == 0)) and back[0].isfinite().all()
    scale = fresh[0].parts["scale"].repeat_interleave(stored[1].format.block)[:300]
    assert ((back[0] - m).abs() <= 0.501 * scale * back[1].sqrt())[v > 0].all()
    assert scale.max() * stored[1].format.most < 1000


# -- steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "states, bound",
    [
        ("dynamic8", 0.05),
        ("dynamic8sr", 0.05),
        ("float8", 0.15),
        ("ratio8", 0.012),
        ("ratio4_8", 0.14),
        ("ratio4", 0.2),
    ],
)
def test_steps_are_near_those_of_torch(states: str, bound: float) -> None:
    param = nn.Parameter(torch.zeros(20_000))
    exact = nn.Parameter(torch.zeros(20_000))
    run(AdamW([param], lr=1e-3, states=states), [param], 100)
    run(torch.optim.AdamW([exact], lr=1e-3), [exact], 100)
    assert (param - exact).norm() / exact.norm() < bound


@each_ratio
def test_what_rounding_takes_away_is_given_to_the_parameter(states: str) -> None:
    """What a parameter has moved, and will move by what is kept, is what it would have moved."""
    beta, lr = 0.9, 1e-2
    param, exact = (nn.Parameter(torch.zeros(1024)) for _ in range(2))
    opt = AdamW([param], lr=lr, weight_decay=0.0, states=states, min_8bit_size=1)
    theirs = torch.optim.AdamW([exact], lr=lr, weight_decay=0.0)
    run(opt, [param], 1)
    run(theirs, [exact], 1)
    kept, root = moments(opt)[0].double(), moments(opt)[1].double().sqrt()
    unit = lr * math.sqrt(1 - 0.999) / (1 - beta) * beta / (1 - beta)
    lost = theirs.state[exact]["exp_avg"].double() - kept
    wanted = exact.double() - unit * lost / (root + 1e-8 * math.sqrt(1 - 0.999))
    torch.testing.assert_close(param.double(), wanted, rtol=1e-5, atol=1e-7)
    assert (lost != 0).any()


@pytest.mark.parametrize(
    "options", [{"max_unorm": 1e6}, {"dtype": torch.bfloat16}], ids=["trust", "bfloat16"]
)
def test_nothing_is_given_where_it_would_not_be_safe(options: dict) -> None:
    """A trust ratio changes the size of steps, and bfloat16 rounded to nearest loses what it is given."""
    dtype = options.pop("dtype", torch.float32)
    param, exact = (nn.Parameter(torch.ones(2048, dtype=dtype)) for _ in range(2))
    run(AdamW([param], lr=1e-2, states="ratio4", min_8bit_size=1, **options), [param], 1)
    run(AdamW([exact], lr=1e-2, states="float32", **options), [exact], 1)
    torch.testing.assert_close(param, exact, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.slow
@each_low
def test_no_step_of_10_000_is_much_larger_than_one_of_torch(states: str) -> None:
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import formats

    found, exact = (formats.displacement(name, 2, 10_000) for name in (states, "float32"))
    allowed = 3 if FORMATS[states].bits < 8 else 1.3
    for case, result in found.items():
        # What docs/numerics.md says of them.
        excepted = ("dynamic8" in states and case == "log4") or (states == "ratio4" and ".95" in case)
        if not excepted:
            assert result["worst"] <= allowed * exact[case]["worst"], case


OF_ADAM = {name: op for (rule, name), op in OTHER_OPS.items() if rule == "adam"}
STEPS = {
    **{f"{name}, float32": (op, Modes(), torch.float32) for name, op in OF_ADAM.items()},
    "stochastic weights": (OF_ADAM["ratio8"], Modes(stochastic_round=True), torch.bfloat16),
    "stochastic weights, 4 bits": (OF_ADAM["ratio4"], Modes(stochastic_round=True), torch.bfloat16),
    "options": (OF_ADAM["ratio4_8"], Modes(grad_scale=True, skip_zeros=True), torch.float32),
    "trust": (OF_ADAM["ratio8"], Modes(max_unorm=True), torch.float32),
    "no second moment": (OTHER_OPS["ademamix", "ratio4"], Modes(grad_scale=True), torch.bfloat16),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_kernel_is_the_operator(name: str) -> None:
    """All sizes, layouts, missing and unusable gradients."""
    op, modes, dtype = STEPS[name]
    expected = awkward(op, dtype, None, modes).bucket
    actual = copied(expected)
    expected.call(op.in_place)
    actual.launch(Launcher, op)
    assert_close(op, actual, expected)


def test_a_first_step_needs_nothing() -> None:
    op = OF_ADAM["ratio4"]
    expected = make(op, [(0,), (), (1,), (255,), (257,), (33, 40)], first=True)
    actual = copied(expected)
    expected.call(op.in_place)
    actual.launch(Launcher, op)
    assert_close(op, actual, expected)


@each_low
def test_steps_are_repeatable(states: str) -> None:
    (one, first), (other, second) = started(states, 6), started(states, 6)
    assert torch.equal(first, second)
    for key, x in one.state[first].items():
        assert torch.equal(x, other.state[second][key]), key


@pytest.mark.parametrize("states", LOW[2:])
def test_random_bits_are_others_in_each_step(states: str) -> None:
    """With constant gradients, codes of second moments move although the moments do not."""
    param = nn.Parameter(torch.zeros(4096))
    opt = AdamW([param], states=states, betas=(0.9, 0.99))
    grad = torch.rand(4096) + 0.1
    found = []
    for _ in range(800):
        param.grad = grad
        opt.step()
        found.append(moments(opt)[1] if len(found) > 790 else None)
    assert not torch.equal(found[-1], found[-2]) and not torch.equal(found[-1], found[-3])


# -- checkpoints -------------------------------------------------------------------------------------------


@each_low
def test_a_run_resumes_bitwise(states: str) -> None:
    opt, param = started(states)
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    resumed = nn.Parameter(param.detach().clone())
    again = AdamW([resumed], states=states, min_8bit_size=1)
    again.load_state_dict(torch.load(file, weights_only=True))
    run(opt, [param], 4, seed=1)
    run(again, [resumed], 4, seed=1)
    assert torch.equal(param, resumed)
    for key, x in opt.state[param].items():
        assert torch.equal(x, again.state[resumed][key]), key


#: The error of a moment in a format, relative to the largest of its block's.
COARSE = {
    "float32": 0.0,
    "bfloat16": 2**-8,
    "dynamic8": 0.02,
    "dynamic8sr": 0.02,
    "ratio8": 0.02,
    "float8": 0.13,
    "ratio4_8": 0.2,
}
KEYS = {
    "float32": {"state1", "state2"},
    "bfloat16": {"state1", "state2"},
    "dynamic8": {"state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"},
    "dynamic8sr": {"state1", "qmap1", "absmax1", "state2", "qmap2", "absmax2"},
    "float8": {"state1", "unit1", "state2", "unit2"},
    "ratio8": {"state1", "scale1", "state2", "low2", "high2"},
    "ratio4_8": {"nibbles1", "scale1", "state2", "low2", "high2"},
    "ratio4": {"nibbles1", "scale1", "nibbles2", "low2", "high2"},
}


@pytest.mark.parametrize("old, new", list(itertools.permutations(KEYS, 2)))
def test_every_format_loads_every_other(old: str, new: str) -> None:
    opt, param = started(old)
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"][0].keys() == KEYS[old] | {"step"}
    other = nn.Parameter(param.detach().clone())
    again = AdamW([other], states=new, min_8bit_size=1)
    again.load_state_dict(saved)
    again.args.states = new  # which the state dict of another optimizer does not change
    assert again.state[other].keys() == KEYS[new] | {"step"}
    coarse = COARSE.get(new, 0.4)
    for before, after in zip(moments(opt), moments(again)):
        assert ((before - after).abs() <= coarse * before.abs().max() + 1e-12).all()
    run(again, [other], 2)
    assert other.isfinite().all()


def test_bitsandbytes_reads_what_is_rounded_stochastically() -> None:
    from bitsandbytes.optim import AdamW8bit

    opt, param = started("dynamic8sr")
    theirs = AdamW8bit([nn.Parameter(param.detach().clone())])
    theirs.load_state_dict(opt.state_dict())
    entry = theirs.state[theirs.param_groups[0]["params"][0]]
    assert torch.equal(entry["state2"], opt.state[param]["state2"])


def damages(entry: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a checkpoint can have lost."""
    found = {f"no {key}": {k: x for k, x in entry.items() if k != key} for key in entry if key != "step"}
    for key, x in entry.items():
        if isinstance(x, Tensor):
            found[f"short {key}"] = {**entry, key: x.flatten()[:-1]}
            if x.is_floating_point():
                found[f"NaN in {key}"] = {**entry, key: torch.full_like(x, math.nan)}
                if x.dtype.itemsize > 1:
                    found[f"negative {key}"] = {**entry, key: -1 - x.abs()}
    return found


@pytest.mark.parametrize("states", [*RATIOS, "float8"])
def test_a_damaged_checkpoint_raises_and_changes_nothing(states: str) -> None:
    opt, param = started(states)
    saved = copy.deepcopy(opt.state_dict())
    before = {key: x.clone() for key, x in opt.state[param].items()}
    for what, entry in damages(saved["state"][0]).items():
        with pytest.raises(ValueError):
            opt.load_state_dict({**saved, "state": {0: entry}})
            pytest.fail(f"loaded with {what}")
        for key, x in opt.state[param].items():
            assert torch.equal(x, before[key]), what


class Quantised(Tensor):
    """As torchao has states: a tensor that must be asked for its values."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor)


def test_states_that_are_dequantised_load() -> None:
    param = nn.Parameter(torch.randn(5000))
    theirs = torch.optim.AdamW([param])
    run(theirs, [param], 3)
    saved = theirs.state_dict()
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = saved["state"][0][name].as_subclass(Quantised)
    opt = AdamW4bit([nn.Parameter(param.detach().clone())])
    convert.from_torch(opt, saved)
    wanted = theirs.state[param]["exp_avg_sq"]
    assert (moments(opt)[1] / wanted - 1).abs().max() < 0.5


# -- choosing one ------------------------------------------------------------------------------------------


def test_four_bits_have_classes_and_a_number() -> None:
    param = nn.Parameter(torch.randn(8192))
    for opt in (
        AdamW4bit([param]),
        Adam4bit([param]),
        AdamW([param], optim_bits=4),
        AdamW([param], states="ratio4"),
    ):
        (report,) = opt.precision_report()
        assert (report["bits"], report["format"], report["bytes_per_param"]) == (4, "ratio4", 1.0625)
    with pytest.raises(ValueError, match="optim_bits=8, must be 4"):
        AdamW4bit([param], optim_bits=8)
    with pytest.raises(ValueError, match="states='ratio8' has 8 bits, must have 4"):
        AdamW4bit([param], states="ratio8")
    with pytest.raises(ValueError, match="optim_bits: 16, must be 4, 8 or 32"):
        AdamW([param], optim_bits=16)


@pytest.mark.parametrize(
    "states, size",
    [
        ("dynamic8sr", 2.03125),
        ("float8", 2.03125),
        ("ratio8", 2.03125),
        ("ratio4_8", 1.546875),
        ("ratio4", 1.0625),
    ],
)
def test_bytes_are_as_said(states: str, size: float) -> None:
    param = nn.Parameter(torch.randn(256, 1024))
    opt = AdamW([param], states=states)
    assert opt.precision_report()[0]["bytes_per_param"] == size
    run(opt, [param], 1)
    (bucket,) = opt.structure.buckets
    assert sum(x.nbytes for x in bucket.arenas) == size * param.numel()


def test_small_parameters_stay_in_float32() -> None:
    opt = AdamW4bit([nn.Parameter(torch.randn(4095))])
    (report,) = opt.precision_report()
    assert (report["format"], report["reason"]) == ("float32", "fewer than min_8bit_size=4096 elements")


@pytest.mark.parametrize("betas", [(0.95, 0.9), (0.9, 0.81)])
def test_betas_that_do_not_bound_the_ratio_raise(betas: tuple) -> None:
    param = nn.Parameter(torch.randn(8192))
    message = f"beta1={betas[0]}, beta2={betas[1]}: must have beta1\\*\\*2 < beta2"
    with pytest.raises(ValueError, match=message):
        AdamW([param], betas=betas, states="ratio8")
    AdamW([param], betas=betas, states="dynamic8sr")
    opt = AdamW([param], states="ratio8")
    run(opt, [param], 1)
    (bucket,) = opt.structure.buckets
    before = bucket.hyper.table.clone()
    with pytest.raises(ValueError, match=message):
        opt.param_groups[0]["betas"] = betas
    assert opt.param_groups[0]["betas"] == (0.9, 0.999) and torch.equal(bucket.hyper.table, before)
    opt.param_groups[0]["betas"] = (0.9, 0.95)
    run(opt, [param], 1)


def test_betas_that_are_refused_change_no_parameter_at_all() -> None:
    """Not those either that could have them, because they are small and have float32 states."""
    params = [nn.Parameter(torch.randn(count)) for count in (100, 8192)]
    opt = AdamW(params, states="ratio8")
    run(opt, params, 1)
    before = [bucket.hyper.table.clone() for bucket in opt.structure.buckets]
    with pytest.raises(ValueError, match="must have"):
        opt.param_groups[0]["betas"] = (0.95, 0.9)
    for bucket, table in zip(opt.structure.buckets, before):
        assert torch.equal(bucket.hyper.table, table)


def test_one_scale_for_a_parameter_is_refused() -> None:
    param = nn.Parameter(torch.randn(8192))
    with pytest.raises(ValueError, match="block_wise=False, must be True where exp_avg is stored as a ratio"):
        AdamW([param], states="ratio8", block_wise=False)
    opt = optim.Adagrad([param], states="ratio8", block_wise=False)  # no state of it is a ratio
    run(opt, [param], 3)
    assert len(opt.state[param]["low1"].unique()) == len(opt.state[param]["high1"].unique()) == 1


#: What each algorithm stores how, by the name of the state.
OF_CLASS = {
    "AdamW": {"exp_avg": "ratio4", "exp_avg_sq": "log4"},
    "LAMB": {"exp_avg": "ratio4", "exp_avg_sq": "log4"},
    "AdEMAMix": {"exp_avg": "ratio4", "exp_avg_sq": "log4", "exp_avg_slow": "dynamic8"},
    "Adan": {
        "exp_avg": "dynamic8",
        "exp_avg_sq": "log4",
        "exp_avg_diff": "dynamic8",
        "previous_grad": "dynamic8",
    },
    "Adagrad": {"sum": "log4"},
    "RMSprop": {"square_avg": "log4"},
    "Lion": {"momentum_buffer": "dynamic8"},
    "SGD": {"momentum_buffer": "dynamic8"},
    "LARS": {"momentum_buffer": "dynamic8"},
}


@pytest.mark.parametrize("name", OF_CLASS)
def test_every_algorithm_takes_every_format(name: str) -> None:
    options = {"momentum": 0.9} if name in ("SGD", "LARS") else {}
    param = nn.Parameter(torch.randn(5000))
    opt = getattr(optim, name)([param], lr=1e-3, states="ratio4", **options)
    run(opt, [param], 3)
    (bucket,) = opt.structure.buckets
    names = [state.name for state in bucket.op.rule.states]
    found = {names[stored.state]: stored.format.name for stored in bucket.op.stored}
    if name == "Lion":
        found = dict(zip(OF_CLASS[name], found.values()))
    assert found == OF_CLASS[name]
    saved = copy.deepcopy(opt.state_dict())
    again = getattr(optim, name)([nn.Parameter(param.detach().clone())], lr=1e-3, states="ratio4", **options)
    again.load_state_dict(saved)
    run(opt, [param], 2, seed=1)
    run(again, again.param_groups[0]["params"], 2, seed=1)
    assert torch.equal(param, again.param_groups[0]["params"][0]) and param.isfinite().all()


def test_the_largest_second_moment_is_not_rounded_stochastically() -> None:
    """It would grow without end. With constant gradients it becomes the largest of what is rounded so."""
    param = nn.Parameter(torch.zeros(512))
    opt = AdamW([param], states="ratio8", amsgrad=True, min_8bit_size=1, betas=(0.9, 0.99))
    grad = torch.rand(512) + 0.1
    for _ in range(600):
        param.grad = grad
        opt.step()
    (bucket,) = opt.structure.buckets
    assert [s.format.random for s in bucket.op.stored if bucket.op.rule.states[s.state].maximum] == [False]
    state = convert.to_torch(opt)["state"][0]
    assert 0.99 < (state["max_exp_avg_sq"] / grad.square()).mean() < 1.1


# -- everything takes them ---------------------------------------------------------------------------------


@each_ratio
def test_a_captured_step_is_the_launched_one(states: str) -> None:
    (one, first), (other, second) = started(states), started(states)

    @torch.compile(fullgraph=True)
    def step() -> None:
        other.step()

    run(one, [first], 3, seed=1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        second.grad = torch.randn(second.shape, generator=generator)
        step()
    assert torch.equal(first, second)


def test_an_exported_step_is_the_launched_one() -> None:
    (one, first), (other, second) = started("ratio4_8"), started("ratio4_8")
    first.grad = torch.randn(first.shape)
    module = export.OptimizerStep(other)
    arguments = [second.detach().clone()], [first.grad.clone()], module.hyper()
    with torch.no_grad():
        torch.export.export(module, arguments).module()(*arguments)
    one.step()
    torch.testing.assert_close(arguments[0][0], first.detach(), rtol=1e-6, atol=1e-6)


def test_released_gradients_step_the_same() -> None:
    def trained(**options: Any) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
        opt = AdamW4bit(model.parameters(), min_8bit_size=1, **options)
        for _ in range(3):
            model(torch.randn(8, 64)).square().sum().backward()
            opt.step()
            opt.zero_grad()
        return list(model.parameters())

    for one, other in zip(trained(), trained(release_gradients=True)):
        assert torch.equal(one, other)


# -- what users do to them ---------------------------------------------------------------------------------


def test_a_float_state_that_is_assigned_is_taken_over_once() -> None:
    """Where the format has no key of that name it must not stay: it would be loaded instead of codes."""
    opt, param = started("ratio4", 3)
    given = -10 * moments(opt)[0].view_as(param)
    opt.state[param]["state1"] = given
    run(opt, [param], 1)
    assert set(opt.state[param]) == KEYS["ratio4"] | {"step"}
    assert (moments(opt)[0].view_as(param) - 0.9 * given).norm() < 0.3 * given.norm()


@each_ratio
def test_ends_that_are_exchanged_raise(states: str) -> None:
    opt, param = started(states)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["high2"].zero_()
    with pytest.raises(ValueError, match="low2 has numbers that are above those of high2"):
        opt.load_state_dict(saved)


def test_bits_that_are_said_nearer_count_more_than_a_format() -> None:
    params = [nn.Parameter(torch.randn(5000)) for _ in range(3)]
    opt = AdamW([{"params": params[:2]}, {"params": params[2:], "optim_bits": 8}], states="ratio4")
    optim.GlobalOptimManager.get_instance().override_config(params[0], "optim_bits", 32)
    assert [row["format"] for row in opt.precision_report()] == ["float32", "ratio4", "dynamic8"]

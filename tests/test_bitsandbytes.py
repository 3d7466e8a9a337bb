"""Beside the installed bitsandbytes, on the CPU: the same calls, the same trajectories, and none of its bugs.

Where its CPU backend differs by design: LAMB's trust ratio there is of the update without its bias
correction, 8-bit LAMB and LARS have none, and its quantiser looks codes up in a table that is coarser than
they are, see `test_functional.py`.
"""

import copy
import inspect
import warnings

import pytest
import torch
from helpers.formulas import LAMB, LARS, AdEMAMix
from torch import nn

from bnb_compile import optim

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    bnb = pytest.importorskip("bitsandbytes")

both_paths = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
each_bits = pytest.mark.parametrize("bits", [8, 32])


def train(optimizer, params, steps, seed=1):
    """Random gradients, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = (torch.randn(param.shape, generator=generator) * 0.01).to(param.dtype)
        optimizer.step()


def parameters(*shapes, scale=0.1):
    return [nn.Parameter(torch.randn(shape) * scale) for shape in shapes]


def copies(params):
    return [nn.Parameter(param.detach().clone()) for param in params]


def relative_error(values, expected):
    a, b = (torch.cat([x.detach().double().flatten() for x in xs]) for xs in (values, expected))
    return ((a - b).norm() / b.norm()).item()


# -- calls --------------------------------------------------------------------------------------

NAMES = sorted(
    name
    for name, value in vars(bnb.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer)
)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_takes_the_arguments_of_bitsandbytes(name):
    """In its order as far as versions agree on it, by keyword after that, and with its defaults."""
    theirs = inspect.signature(getattr(bnb.optim, name)).parameters
    cls = getattr(optim, name)
    ours = inspect.signature(cls).parameters
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]
    for key, parameter in theirs.items():
        if key in ours:
            assert ours[key].default == parameter.default
        elif key != "max_unorm":
            assert key in optim.Options.__annotations__
    values = {key: p.default for key, p in theirs.items() if p.default is not p.empty}
    values |= {"lr": 0.1} if "lr" not in values else {}
    if cls.paged:
        values.pop("is_paged", None)  # False by default in some, and ignored
    if len(positional) < len(theirs):
        values |= dict(percentile_clipping=100, block_wise=True)  # of its versions to 0.49
    one = cls(parameters((5,)), **values)
    assert one.args.max_unorm == values.get("max_unorm", 0.0)
    with pytest.raises(TypeError):
        cls(*[values.get(key) for key in positional], 0)


def test_there_is_every_optimizer_of_bitsandbytes():
    assert len(NAMES) == 40
    assert [name for name in NAMES if not hasattr(optim, name)] == []


# -- trajectories -------------------------------------------------------------------------------

#: What its CPU backend computes as it says, and arguments that show it.
CASES = {
    "Adam": [dict(weight_decay=0.1), dict(betas=(0.8, 0.95), eps=1e-5)],
    "AdamW": [dict(lr=1e-2)],
    "AdEMAMix": [dict(weight_decay=0.1), dict(alpha=3.0, t_alpha=30, t_beta3=40), dict(t_alpha=10, lr=1e-2)],
    "Lion": [dict(weight_decay=0.1), dict(betas=(0.8, 0.95), lr=1e-3)],
    "SGD": [dict(lr=0.1, momentum=0.9, weight_decay=0.1)],
    "LARS": [dict(lr=0.1, momentum=0.9, weight_decay=0.1), dict(lr=0.1, momentum=0.8, max_unorm=0.001)],
    "RMSprop": [dict(weight_decay=0.1), dict(alpha=0.9, eps=1e-5)],
    "Adagrad": [dict(weight_decay=0.1)],
}
EACH_CASE = [(name, hyper) for name, cases in CASES.items() for hyper in cases]


@pytest.mark.parametrize("name,hyper", EACH_CASE, ids=str)
@both_paths
def test_32_bit_trajectories_are_the_same(name, hyper, compiled):
    params = parameters((1300,), (70, 70))
    others = copies(params)
    train(getattr(optim, name)(params, compile=compiled, **hyper), params, 100)
    train(getattr(bnb.optim, name)(others, **hyper), others, 100)
    assert relative_error(params, others) <= 1e-6


@both_paths
def test_pytorch_lars_is_the_same(compiled):
    """Ours by either of its names."""
    params, hyper = parameters((1300,)), dict(lr=0.1, momentum=0.9, weight_decay=0.1, max_unorm=0.01)
    others = copies(params)
    cls = optim.LARS if compiled else optim.PytorchLARS
    train(cls(params, **hyper), params, 100)
    train(bnb.optim.PytorchLARS(others, **hyper), others, 100)
    assert relative_error(params, others) <= 1e-6


@pytest.mark.parametrize("hyper", [dict(weight_decay=0.1), dict(lr=1e-2, max_unorm=0.1)], ids=str)
@both_paths
def test_lamb_is_the_same_late_in_training(hyper, compiled):
    """After 50,000 steps there is no bias to correct, so that both norms are of the same update."""
    others = parameters((1300,), (70, 70))
    theirs = bnb.optim.LAMB(others, **hyper)
    train(theirs, others, 5)
    for param in others:
        theirs.state[param]["step"] = 50_000
    params = copies(others)
    ours = optim.LAMB(params, compile=compiled, **hyper)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train(theirs, others, 100, seed=2)
    train(ours, params, 100, seed=2)
    assert relative_error(params, others) <= 1e-6


@pytest.mark.parametrize("name,hyper", [*EACH_CASE, ("LAMB", dict(weight_decay=0.1))], ids=str)
@both_paths
def test_8_bit_trajectories_differ_by_what_its_quantiser_loses(name, hyper, compiled):
    params = parameters((1300,), (70, 70), scale=0.0)
    others = copies(params)
    # Its 8-bit LAMB and LARS have no trust ratio.
    free = dict(max_unorm=0.0) if name in ("LAMB", "LARS") else {}
    ours = getattr(optim, name + "8bit")(params, compile=compiled, min_8bit_size=0, **{**hyper, **free})
    theirs = getattr(bnb.optim, name + "8bit")(others, min_8bit_size=0, **hyper)
    train(ours, params, 50)
    train(theirs, others, 50)
    assert relative_error(params, others) <= 0.02


# -- what goes wrong in bitsandbytes, and not here ----------------------------------------------
#
# For every family of tests/opt_*.py, test_optimizers.py has more: coordinates without a gradient, parameters
# that are zero, and lr=0.


@both_paths
def test_ademamix32bit_keeps_both_moments_and_its_schedule(compiled):
    """Issue 2075: there its step raises on a CPU, and writes out of bounds on a GPU."""
    hyper = dict(lr=1e-2, betas=(0.9, 0.99, 0.999), alpha=5.0, eps=1e-8, t_alpha=30, t_beta3=40)
    params = parameters((1300,))
    reference = AdEMAMix(params, **hyper)
    optimizer = optim.AdEMAMix32bit(params, weight_decay=0.0, compile=compiled, **hyper)
    for seed in range(60):
        train(optimizer, params, 1, seed)
        reference.step([param.grad for param in params])
    assert relative_error(params, reference.params) <= 1e-6
    saved = optimizer.state_dict()["state"][0]["state1"]
    fast, _, slow = reference.states[0]
    assert saved.shape == (2, 1300) and relative_error([saved], [fast, slow]) <= 2e-6


@pytest.mark.parametrize("cls,plain", [(optim.LAMB8bit, LAMB), (optim.LARS8bit, LARS)])
@both_paths
def test_lamb8bit_and_lars8bit_have_a_trust_ratio(cls, plain, compiled):
    hyper = dict(betas=(0.9, 0.999), eps=1e-8) if plain is LAMB else dict(momentum=0.9)
    params = parameters((1300,))
    (start,) = copies(params)
    max_unorm = 0.1 if plain is LAMB else 1e-3
    reference = plain(params, lr=0.1, max_unorm=max_unorm, **hyper)
    optimizer = cls(params, lr=0.1, max_unorm=max_unorm, min_8bit_size=0, compile=compiled, **hyper)
    train(optimizer, params, 1)
    reference.step([params[0].grad])
    moved = (params[0].detach() - start.detach()).norm()
    assert moved.item() == pytest.approx(0.1 * max_unorm * start.norm().item(), rel=1e-4)
    for seed in range(30):
        train(optimizer, params, 1, seed)
        reference.step([params[0].grad])
    assert relative_error([params[0] - start], [reference.params[0] - start]) <= 0.025


@pytest.mark.parametrize("numel", [257, 300, 511, 4097])
@both_paths
def test_the_tail_of_ademamix8bit_has_scales_of_its_own(numel, compiled):
    """There the last block of the fast moment and the first one of the slow share a scale on a GPU."""
    whole = parameters((numel,))
    full = numel // 256 * 256
    parts = [nn.Parameter(part.clone()) for part in whole[0].detach().split([full, numel - full])]
    options = dict(min_8bit_size=0, weight_decay=0.0, compile=compiled)
    optimizer, of_parts = optim.AdEMAMix8bit(whole, **options), optim.AdEMAMix8bit(parts, **options)
    for scale in (1.0, 0.1, 10.0):
        whole[0].grad = torch.randn(numel) * 0.01 * scale
        for param, grad in zip(parts, whole[0].grad.split([full, numel - full])):
            param.grad = grad.clone()
        optimizer.step()
        of_parts.step()
    assert torch.equal(whole[0], torch.cat(list(parts)))


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("8bit") and "Paged" not in name])
@both_paths
def test_an_infinite_gradient_poisons_no_block(name, compiled):
    """There its block is NaN after the next step."""
    params = parameters((1000,))
    (start,) = copies(params)
    hyper = dict(lr=1e-2, momentum=0.9) if name[:3] in ("SGD", "LAR") else {}
    optimizer = getattr(optim, name)(params, min_8bit_size=0, compile=compiled, **hyper)
    for step in range(3):
        params[0].grad = torch.full((1000,), 0.01)
        params[0].grad[300] = [float("inf"), 0.01, 0.01][step]
        optimizer.step()
    assert params[0].isfinite().all() and (params[0] != start).all()
    assert all(value.isfinite().all() for value in optimizer.state[params[0]].values())

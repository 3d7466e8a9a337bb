"""Runs that begin in torch.optim and go on here, and the reverse."""

import copy

import pytest
import torch
from torch import nn

from bnb_compile import convert, optim

pytestmark = pytest.mark.quick

#: torch's class, ours, their arguments.
CASES = {
    "AdamW": (torch.optim.AdamW, optim.AdamW, dict(lr=0.01, betas=(0.8, 0.99), weight_decay=0.1)),
    "Adam": (torch.optim.Adam, optim.Adam, dict(lr=0.01)),
    "AMSGrad": (torch.optim.AdamW, optim.AdamW, dict(amsgrad=True)),
    "SGD": (torch.optim.SGD, optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1)),
    "SGD, Nesterov": (torch.optim.SGD, optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "SGD, no momentum": (torch.optim.SGD, optim.SGD, dict(lr=0.1)),
    "RMSprop": (torch.optim.RMSprop, optim.RMSprop, dict(alpha=0.9, eps=1e-5)),
    "RMSprop, all": (torch.optim.RMSprop, optim.RMSprop, dict(centered=True, momentum=0.5, eps=1e-5)),
    "Adagrad": (torch.optim.Adagrad, optim.Adagrad, dict(lr_decay=0.1, initial_accumulator_value=0.2)),
}
each_case = pytest.mark.parametrize("case", CASES)


def run(optimizer, param, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def started(case):
    """torch's optimizer after three steps, its parameter, and another equal one."""
    torch_class, _, hyper = CASES[case]
    param = nn.Parameter(torch.randn(5000))
    optimizer = torch_class([param], **hyper)
    run(optimizer, param, 3, seed=1)
    return optimizer, param, nn.Parameter(param.detach().clone())


@each_case
def test_a_run_of_torch_goes_on_here_and_there_again(case):
    theirs, param, copied = started(case)
    _, our_class, hyper = CASES[case]
    ours = our_class([copied], lr=1.0, compile=False)
    saved = theirs.state_dict()
    before = copy.deepcopy(saved)
    convert.from_torch(ours, saved)
    assert str(saved) == str(before)
    run(theirs, param, 3, seed=2)
    run(ours, copied, 3, seed=2)
    torch.testing.assert_close(copied, param, rtol=1e-5, atol=1e-6)
    again = CASES[case][0]([copied], lr=1.0)
    again.load_state_dict(convert.to_torch(ours))
    assert {k: v for k, v in again.param_groups[0].items() if k in hyper} == hyper
    run(theirs, param, 3, seed=3)
    run(again, copied, 3, seed=3)
    torch.testing.assert_close(copied, param, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["AdamW", "SGD", "RMSprop, all", "Adagrad"])
def test_8_bit_states_are_quantised_and_decoded(case):
    theirs, param, copied = started(case)
    _, our_class, _ = CASES[case]
    ours = our_class([copied], lr=1.0, optim_bits=8, compile=False)
    convert.from_torch(ours, theirs.state_dict())
    assert ours.state[copied]["state1"].dtype == torch.uint8
    decoded = convert.to_torch(ours)["state"][0]
    for name, values in theirs.state[param].items():
        if name != "step" and values is not None:
            torch.testing.assert_close(
                decoded[name], values, rtol=0.05, atol=0.01 * values.abs().max().item()
            )
    run(theirs, param, 3, seed=2)
    run(ours, copied, 3, seed=2)
    moved = (param - copied).norm() / (param - nn.Parameter(started(case)[2])).norm()
    assert moved < 0.1


def test_what_does_not_exist_here_raises_and_changes_nothing():
    param = nn.Parameter(torch.randn(10))
    for theirs, error in (
        (torch.optim.AdamW([param], maximize=True), "maximize=True"),
        (torch.optim.Adam([param], weight_decay=0.1), "weight_decay=0.1"),
        (torch.optim.SGD([param], lr=0.1), "betas"),
    ):
        ours = optim.AdamW([param], compile=False)
        groups = copy.deepcopy(ours.state_dict())
        run(theirs, param, 1, seed=0)
        with pytest.raises(ValueError, match=error):
            convert.from_torch(ours, theirs.state_dict())
        assert str(ours.state_dict()) == str(groups)
    with pytest.raises(ValueError, match="no Lion.*adam"):
        convert.to_torch(optim.Lion([param]))

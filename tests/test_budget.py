"""What `bnb_compile.budget` says is what optimizers allocate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bnb_compile import optim
from bnb_compile.budget import OPTIMIZERS, TORCH, budget, main
from bnb_compile.formats import FORMATS
from bnb_compile.state.portions import SHARE

pytestmark = pytest.mark.quick

#: Whole rows of aligned arenas, so that nothing is added to fill them.
SHAPES = ((64, 256), (256, 256), (128, 512))


def allocated(optimizer: Any) -> int:
    """Bytes of the arenas of an optimizer's states."""
    optimizer.init_state()
    return sum(x.nbytes for bucket in optimizer.structure.buckets for x in bucket.arenas)


def model(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]


NUMEL = sum(param.numel() for param in model())


@pytest.mark.parametrize("states", FORMATS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_what_an_optimizer_allocates(name: str, states: str) -> None:
    optimizer = OPTIMIZERS[name](model(), lr=1e-3, states=states)
    assert budget(NUMEL, states, name).states == allocated(optimizer)


@pytest.mark.parametrize("name", ["SGD", "LARS", "RMSprop"])
def test_states_that_a_hyperparameter_adds(name: str) -> None:
    optimizer = OPTIMIZERS[name](model(), lr=1e-3, momentum=0.9, states="dynamic8")
    found = budget(NUMEL, "dynamic8", name, momentum=0.9).states
    assert found == allocated(optimizer) > budget(NUMEL, "dynamic8", name).states


def test_a_model_with_small_parameters_takes_little_more() -> None:
    layers = nn.Sequential(nn.Linear(300, 500), nn.Linear(500, 300))
    numel = sum(param.numel() for param in layers.parameters())
    real = allocated(optim.AdamW8bit(layers.parameters(), lr=1e-3))
    assert 1 < real / budget(numel, "dynamic8", dtype=torch.float32).states < 1.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_is_measured_too(dtype: torch.dtype) -> None:
    params = model(dtype)
    optimizer = torch.optim.AdamW(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    found = budget(NUMEL, TORCH, dtype=dtype, release=True)
    assert found.states == sum(x.nbytes for x in moments)
    assert found.gradients == found.weights == sum(param.nbytes for param in params)


def test_released_gradients_and_processes() -> None:
    whole, released = budget(NUMEL, "ratio8"), budget(NUMEL, "ratio8", release=True)
    assert released == whole._replace(gradients=whole.gradients * SHARE)
    part = budget(NUMEL, "ratio8", processes=4)
    assert [4 * x for x in part] == list(whole)
    assert budget(1001, "float32", processes=10).params == 101, "the largest part counts"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--params", "8e9", "--release"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "8,000,000,000 parameters of bfloat16, AdamW"
    rows = {line[:12].strip(): line[12:].split() for line in lines[3 : 4 + len(FORMATS)]}
    assert list(rows) == [TORCH, *FORMATS]
    assert rows["dynamic8"] == ["2.031", "4.131", "16.000", "0.800", "16.250", "33.050"]
    assert rows[TORCH] == ["4.000", "8.000", "16.000", "16.000", "32.000", "64.000"]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--params lots", "Invalid params: 'lots', must be a whole number"),
        ("--params 0", "Invalid params: 0, must be in [1, 2**53]"),
        ("--params inf", "Invalid params: 'inf', must be a whole number"),
        ("--params 1.5", "Invalid params: '1.5', must be a whole number"),
        ("--params 8e9 --processes -2", "Invalid processes: -2, must be in [1, "),
        ("--params 8e9 --states int3", "invalid choice: 'int3' (choose from "),
        ("--params 8e9 --dtype float64", "invalid choice: 'float64' (choose from "),
        ("--params 8e9 --optimizer AdamW8bit", "invalid choice: 'AdamW8bit' (choose from "),
        ("--params 8e9 --momentum 0.9", "AdamW got unexpected arguments ['momentum']"),
        ("--params 8e9 --optimizer SGD --momentum 2", "must be in [0, 1.0)"),
        ("", "the following arguments are required: --params"),
    ],
)
def test_wrong_values_are_named(wrong: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(wrong.split())
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_functions_refuse_what_the_command_refuses() -> None:
    with pytest.raises(ValueError, match=r"Invalid optimizer: 'Adem', must be one of \['AdEMAMix'"):
        budget(1, "float32", "Adem")
    with pytest.raises(ValueError, match="Invalid states: 'int3', must be one of"):
        budget(1, "int3")

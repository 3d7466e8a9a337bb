"""Optimizer and training steps as modules: exported, packaged with AOTInductor, and run from Python and C++.

One thread, where sums have one order: what runs the same code then computes the same bits.
"""

import copy
import importlib
import inspect
import io
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnb_compile import optim
from bnb_compile.export import OptimizerStep, TrainStep, load, package
from bnb_compile.optim import AdamW, AdamW8bit, GlobalOptimManager, Optimizer8bit

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 100

# run_decompositions copies a pytree specification, of which torch itself warns
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def manager():
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


# -- what is exported ------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Parameters with 8-bit and 32-bit states, a frozen one, and buffers that training updates."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(16, 64), nn.BatchNorm1d(64)
        self.frozen = nn.Linear(64, 64, bias=False).requires_grad_(False)
        self.down = nn.Linear(64, 8)

    def forward(self, x):
        return self.down(self.frozen(self.norm(self.up(x)).tanh()))


def loss_fn(model, x, y):
    return F.mse_loss(model(x), y)


def train_step(**options):
    """A new step of the same model."""
    torch.manual_seed(0)
    model = Model()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1 and p.requires_grad]},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 3e-3},
    ]
    options = {"lr": 1e-2, "min_8bit_size": 256, "max_grad_norm": 0.5, "compile": False, **options}
    return TrainStep(model, loss_fn, AdamW8bit(groups, **options))


def optimizer_step(cls=AdamW8bit, **options):
    """A new step of the same parameters, one of which has strides."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(4, 8, 8, 8, generator=generator), torch.randn(10, generator=generator)]
    params[0] = params[0].to(memory_format=torch.channels_last)
    options = {"lr": 1e-2, "compile": False, **options}
    if cls is not getattr(optim, "PytorchLARS", None):
        options.setdefault("min_8bit_size", 256)
    return OptimizerStep(cls([nn.Parameter(p) for p in params], **options))


def batches(steps=STEPS, size=32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(steps, size, 16, generator=generator)
    return x, x[..., :8].sin() + 0.1 * torch.randn(steps, size, 8, generator=generator)


def schedule(step, steps=STEPS):
    """(steps, groups, columns) float64, with another learning rate at each step."""
    rows = step.hyper().repeat(steps, 1, 1)
    rows[..., step.hyper_names.index("lr")] *= torch.linspace(1.0, 0.1, steps)[:, None]
    return rows


def gradients(step, steps):
    """Of uneven sizes, so that clipping has an effect."""
    generator = torch.Generator().manual_seed(2)
    for k in range(steps):
        yield [
            torch.randn(p.shape, generator=generator).mul(10.0 ** (k % 3)).to(memory_format=order(p))
            for p in step.params_like
        ]


def order(x):
    return torch.channels_last if x.dim() == 4 else torch.contiguous_format


def run_train(run, step, steps=STEPS):
    return [run(h, x, y).item() for h, x, y in zip(schedule(step.step, STEPS)[:steps], *batches())]


def run_optimizer(run, step, steps=STEPS):
    params = [p.detach() for p in step.params_like]
    for hyper, grads in zip(schedule(step, steps), gradients(step, steps)):
        run(params, grads, hyper)
    return {**{f"param{k}": p for k, p in enumerate(params)}, **step.state_dict()}


def equal(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)


def count_equal(state, expected):
    return sum(torch.equal(state[name], expected[name]) for name in expected)


def difference(state, expected):
    """Relative to the largest, of what is not a code."""
    return max(
        ((state[k] - x).abs().max() / x.abs().max()).item()
        for k, x in expected.items()
        if x.is_floating_point()
    )


# -- packages --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train_package(tmp_path_factory):
    x, y = batches()
    return package(train_step(), str(tmp_path_factory.mktemp("train") / "train.pt2"), x[0], y[0])


@pytest.fixture(scope="module")
def optimizer_package(tmp_path_factory):
    path = tmp_path_factory.mktemp("optimizer") / "step.pt2"
    return package(optimizer_step(percentile_clipping=50), str(path))


def sources(path):
    with zipfile.ZipFile(path) as archive:
        return "".join(archive.read(name).decode() for name in archive.namelist() if name.endswith(".cpp"))


@pytest.mark.parametrize("name", ["train_package", "optimizer_package"])
def test_a_package_has_one_kernel_of_ours_for_each_bucket_and_calls_no_operator_of_ours(name, request):
    text = sources(request.getfixturevalue(name))
    defined = re.findall(r'extern "C" void cpp_(adam_step_\w+?)_\d+\([^)]*\) \{', text)
    assert sorted(defined) == ["adam_step_32bit", "adam_step_8bit"]
    assert text.count("update_bucket<float, float>(") == 2
    assert "bnb_compile::" not in text and "aoti_torch_call_dispatcher" not in text
    assert "aoti_torch_proxy_executor_call_function" not in text


def test_a_packaged_train_step_run_100_times_is_the_module(train_package):
    step, eager = train_step(), train_step()
    losses = run_train(load(train_package, step), step)
    expected = run_train(eager, eager)
    state, reference = step.state_dict(), eager.state_dict()
    assert losses == pytest.approx(expected, rel=1e-3) and losses[-1] < 0.5 * losses[0]
    print(difference(state, reference), count_equal(state, reference), len(reference))
    assert difference(state, reference) < 1e-2


def test_a_packaged_optimizer_step_run_100_times_is_the_module(optimizer_package):
    step, eager = optimizer_step(percentile_clipping=50), optimizer_step(percentile_clipping=50)
    state = run_optimizer(load(optimizer_package, step), step)
    reference = run_optimizer(eager, eager)
    print(difference(state, reference), count_equal(state, reference), len(reference))
    assert difference(state, reference) < 1e-2
    assert all(step.optimizer.state[p]["step"] == STEPS for p in step.optimizer.state)


def test_a_package_takes_batches_of_any_size(train_package):
    step, eager = train_step(), train_step()
    run = load(train_package, step)
    for size in (32, 7, 100, 2):
        x, y = batches(1, size)
        assert run(step.hyper(), x[0], y[0]).item() == pytest.approx(
            eager(eager.hyper(), x[0], y[0]).item(), rel=1e-4
        )


def test_a_package_updates_the_model_and_the_optimizer(train_package):
    step = train_step()
    before = copy.deepcopy(step.model.state_dict())
    run_train(load(train_package, step), step, 2)
    changed = {name for name, x in step.model.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == before.keys() - {"frozen.weight"}
    assert all(entry["step"] == 2 for entry in step.step.optimizer.state.values())


def test_a_package_reads_what_the_optimizer_has_loaded(train_package):
    step, resumed = train_step(), train_step()
    run, rerun = load(train_package, step), load(train_package, resumed)
    run_train(run, step, 3)
    resumed.model.load_state_dict(step.model.state_dict())
    resumed.step.optimizer.load_state_dict(step.step.optimizer.state_dict())
    x, y = batches(1)
    assert torch.equal(run(step.hyper(), x[0], y[0]), rerun(resumed.hyper(), x[0], y[0]))
    assert equal(resumed.state_dict(), step.state_dict())

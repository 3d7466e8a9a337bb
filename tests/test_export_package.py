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
pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # bitwise equal only where sums have one order
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


@pytest.fixture
def manager():
    manager = GlobalOptimManager.get_instance()
    manager.initialize()
    yield manager
    manager.initialize()


# -- what is exported --------------------------------------------------------------------------------------


class Model(nn.Module):
    """Parameters with 8-bit and 32-bit states, a frozen one, and buffers that training updates."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(16, 64, bias=False), nn.BatchNorm1d(64)
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
    if cls is not optim.PytorchLARS:
        options = {"min_8bit_size": 256, "compile": False, **options}
    return OptimizerStep(cls([nn.Parameter(p) for p in params], lr=1e-2, **options))


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
    """Largest relative error of a tensor that is no code, in the Euclidean norm."""
    floats = [name for name, x in expected.items() if x.is_floating_point()]
    return max(((state[k] - expected[k]).norm() / expected[k].norm()).item() for k in floats)


# -- packages ----------------------------------------------------------------------------------------------


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
    assert sorted(defined) == ["adam_step_dynamic8", "adam_step_float32"]
    assert text.count("update_bucket<float, float>(") == 2
    assert "bnb_compile::" not in text and "aoti_torch_call_dispatcher" not in text
    assert "aoti_torch_proxy_executor_call_function" not in text


def test_a_packaged_train_step_run_100_times_is_the_module(train_package):
    """A code may round the other way, and training goes on from there; measured: 1.3e-3."""
    step, eager = train_step(), train_step()
    losses = run_train(load(train_package, step), step)
    expected = run_train(eager, eager)
    state, reference = step.state_dict(), eager.state_dict()
    assert losses == pytest.approx(expected, rel=1e-3) and losses[-1] < 0.5 * losses[0]
    assert difference(state, reference) < 1e-2


def test_a_packaged_optimizer_step_run_100_times_is_the_module(optimizer_package):
    """The same gradients: what differs is rounding; measured: 1.4e-7."""
    step, eager = optimizer_step(percentile_clipping=50), optimizer_step(percentile_clipping=50)
    state = run_optimizer(load(optimizer_package, step), step)
    reference = run_optimizer(eager, eager)
    assert difference(state, reference) < 1e-6
    assert count_equal(state, reference) >= len(reference) // 3
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


# -- what does not fit is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,message",
    [
        (lambda h, x, y: (h, x), r"2 inputs, must be 3: hyper, batch\[0\], batch\[1\]"),
        (
            lambda h, x, y: (h, x[:, :15], y),
            r"batch\[0\] is float32\[\*,15\]:\[16,1\], must be float32\[\*,16\]",
        ),
        (lambda h, x, y: (h, x, y.double()), r"batch\[1\] is float64\[\*,8\], must be float32\[\*,8\]"),
        (lambda h, x, y: (h, x.T.contiguous().T, y), r"batch\[0\] is float32\[\*,16\]:\[1,32\], must be"),
        (lambda h, x, y: (h, x, y[:31]), r"a batch of sizes {'batch\[0\]': 32, 'batch\[1\]': 31}"),
        (lambda h, x, y: (h[:1], x, y), r"hyper is float64\[1,5\], must be float64\[2,5\]"),
        (lambda h, x, y: (h.float(), x, y), r"hyper is float32\[2,5\], must be float64\[2,5\]"),
    ],
)
def test_a_packaged_train_step_refuses_other_arguments(train_package, arguments, message):
    step = train_step()
    run, before = load(train_package, step), copy.deepcopy(step.state_dict())
    x, y = batches(1)
    with pytest.raises(ValueError, match=message):
        run(*arguments(step.hyper(), x[0], y[0]))
    assert equal(step.state_dict(), before)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (lambda p, g, h: (p[:1], g, h), r"1 params, must be 2: \['0', '1'\]"),
        (lambda p, g, h: (p, g[:1], h), r"1 grads, must be 2: \['0', '1'\]"),
        (lambda p, g, h: ([p[0], p[1][:9]], g, h), r"params: 1 is float32\[9\], must be float32\[10\]"),
        (
            lambda p, g, h: (p, [g[0], g[1].bfloat16()], h),
            r"grads: 1 is bfloat16\[10\], must be float32\[10\]",
        ),
        (
            lambda p, g, h: ([p[0].contiguous(), p[1]], g, h),
            r"params: 0 is float32\[4,8,8,8\], must be .*:\[512,",
        ),
        (
            lambda p, g, h: (p, g, h[:, :4]),
            r"hyper is float64\[1,4\], must be float64\[1,5\]: .* lr, beta1,",
        ),
    ],
)
def test_a_packaged_optimizer_step_refuses_other_arguments(optimizer_package, arguments, message):
    step = optimizer_step(percentile_clipping=50)
    run, before = load(optimizer_package, step), copy.deepcopy(step.state_dict())
    params, grads, hyper = step.inputs()
    with pytest.raises(ValueError, match=message):
        run(*arguments(params, grads, hyper))
    assert equal(step.state_dict(), before)


def wider():
    model = nn.Linear(16, 9)
    return TrainStep(model, loss_fn, AdamW8bit(model.parameters()))


def frozen_shape():
    """Only what is not trained has another shape."""
    step = train_step()
    step.model.frozen.weight.data = torch.zeros(64, 65)
    return TrainStep(step.model, loss_fn, step.step.optimizer)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: optimizer_step(), "kind is TrainStep, here it is OptimizerStep"),
        (wider, r"params: up.weight is float32\[64,16\], here it is missing"),
        (frozen_shape, r"tensors: tensor\d is float32\[64,64\], here it is float32\[64,65\]"),
        (lambda: train_step(min_8bit_size=0), "tensors: "),
        (lambda: train_step(max_grad_norm=1.0), "max_grad_norm is 0.5, here it is 1.0"),
        (
            lambda: train_step(skip_zeros=True),
            "buckets is .*'skip_zeros': False.*, here it is .*'skip_zeros': True",
        ),
    ],
)
def test_a_package_is_not_loaded_for_another_step(train_package, make, message):
    with pytest.raises(ValueError, match=f"train.pt2 was compiled for another step: {message}"):
        load(train_package, make())


def test_a_package_of_another_version_is_not_loaded(train_package, monkeypatch):
    monkeypatch.setattr("bnb_compile.export.steps.VERSION", "99.0")
    with pytest.raises(ValueError, match=r"another step: bnb_compile is [\d.]+, here it is 99.0"):
        load(train_package, train_step())


def test_what_cannot_be_exported_says_why():
    step = train_step()
    x, y = batches(1)
    with pytest.raises(ValueError, match=r"a batch of sizes \[31, 32\], must be one size with dynamic=True"):
        package(step, "never.pt2", x[0], y[0, :31])
    with pytest.raises(ValueError, match=r"parameters of shapes \[\(3,\)\] are the optimizer's, but not"):
        TrainStep(step.model, loss_fn, AdamW8bit([nn.Parameter(torch.zeros(3))]))
    with pytest.raises(ValueError, match="1 names of 2 parameters"):
        OptimizerStep(AdamW8bit(step.model.down.parameters()), ["weight"])
    spare = nn.ModuleDict({"used": nn.Linear(16, 8), "spare": nn.Linear(1, 1)})
    spare.forward = spare["used"].forward
    with pytest.raises(ValueError, match=r"the loss does not depend on \['spare.weight', 'spare.bias'\]"):
        TrainStep(spare, loss_fn, AdamW8bit(spare.parameters())).export(x[0], y[0])


# -- torch.export alone ------------------------------------------------------------------------------------


def through_a_file(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


forms = pytest.mark.parametrize(
    "form",
    [lambda p: p, through_a_file, lambda p: p.run_decompositions()],
    ids=["as is", "saved and loaded", "decomposed"],
)


@pytest.fixture(scope="module")
def exported_train():
    x, y = batches(1)
    return train_step().export(x[0], y[0])


@forms
def test_an_exported_train_step_takes_the_same_steps(exported_train, form):
    module, eager = form(exported_train).module(), train_step()
    begin = train_step().state_dict()
    with torch.no_grad():
        for name, x in module.named_buffers():
            x.copy_(begin[name])  # forms share what they were made from
    losses, expected = run_train(module, eager, 5), run_train(eager, eager, 5)
    assert losses == pytest.approx(expected, rel=1e-5) and losses[-1] < losses[0]
    assert difference(dict(module.named_buffers()), eager.state_dict()) < 1e-3


def test_an_exported_train_step_takes_batches_of_any_size(exported_train):
    module = exported_train.module()
    for size in (7, 100):
        x, y = batches(1, size)
        eager = train_step()
        with torch.no_grad():
            for name, buffer in eager.named_buffers():
                buffer.copy_(module.get_buffer(name))
        expected = eager(eager.hyper(), x[0], y[0]).item()
        assert module(eager.hyper(), x[0], y[0]).item() == pytest.approx(expected, rel=1e-5)


def test_the_backward_of_attention_is_exported_right():
    """From examples that are views, too."""

    class Attention(nn.Linear):
        def forward(self, x):
            q, k, v = super().forward(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def make():
        torch.manual_seed(0)
        model = Attention(16, 48)
        return TrainStep(model, loss_fn, AdamW8bit(model.parameters(), lr=1e-2, min_8bit_size=0))

    x = torch.randn(2, 11, 17)[:, 1:, 1:]
    step, eager = make(), make()
    run = step.export(x, x).module()
    x, y = x.contiguous(), x.flip(1)
    for _ in range(3):
        assert run(step.hyper(), x, y).item() == pytest.approx(eager(eager.hyper(), x, y).item())
    assert difference(dict(run.named_buffers()), eager.state_dict()) < 1e-3


BASES = {Optimizer8bit, optim.Optimizer1State, optim.Optimizer2State}
CASES = [
    (cls, bits)
    for cls in vars(optim).values()
    if inspect.isclass(cls) and issubclass(cls, Optimizer8bit) and cls not in BASES
    for bits in ([cls.bits] if cls.bits else [8, 32])
]


@pytest.mark.filterwarnings("ignore:paged optimizer states are in ordinary memory")
@pytest.mark.parametrize("cls,bits", CASES, ids=[f"{cls.__name__} {bits}" for cls, bits in CASES])
def test_the_step_of_every_class_can_be_exported(cls, bits):
    options = {} if cls.bits else {"optim_bits": bits}
    if "momentum" in inspect.signature(cls).parameters:
        options["momentum"] = 0.9
    step, optimizer = optimizer_step(cls, **options), optimizer_step(cls, **options).optimizer
    names = {name for part in step.parts for name, _ in part.named_buffers()}
    assert any(name.endswith("_codes") for name in names) == (bits <= 8)
    run = step.export().module()
    params = [p.detach().clone() for p in step.params_like]
    for grads in gradients(step, 2):
        run(params, grads, step.hyper())
        of_optimizer = optimizer.param_groups[0]["params"]
        for p, grad in zip(of_optimizer, grads):
            p.grad = grad
        optimizer.step()
    assert all(map(torch.equal, params, of_optimizer))
    assert not any(map(torch.equal, params, step.params_like))


def test_overrides_of_single_parameters_are_exported(manager):
    """Their hyperparameters are their own, and their states as well; the others follow `hyper`."""

    def make():
        params = [nn.Parameter(torch.ones(512)) for _ in range(3)]
        manager.register_parameters(params)
        manager.override_config(params[0], key_value_dict={"lr": 0.5})  # but not its weight decay
        manager.override_config(params[1], key_value_dict={"optim_bits": 32})
        return OptimizerStep(AdamW(params, lr=1e-2, optim_bits=8, min_8bit_size=0, compile=False))

    step, optimizer = make(), make().optimizer
    optimizer.param_groups[0].update(lr=0.1, weight_decay=0.2)
    hyper = step.hyper()
    for name in ("lr", "weight_decay"):
        hyper[0, step.hyper_names.index(name)] = optimizer.param_groups[0][name]
    params, of_optimizer = [p.detach().clone() for p in step.params_like], optimizer.param_groups[0]["params"]
    run = step.export().module()
    for p in of_optimizer:
        p.grad = torch.ones(512)
    run(params, [p.grad for p in of_optimizer], hyper)
    optimizer.step()
    assert all(map(torch.equal, params, of_optimizer))
    assert [round(1 - p[0].item(), 2) for p in params] == [0.6, 0.12, 0.12]


def test_percentile_clipping_is_exported():
    step, plain = (optimizer_step(percentile_clipping=p, compile=False) for p in (50, 100))
    optimizer = optimizer_step(percentile_clipping=50).optimizer
    params, run = [p.detach().clone() for p in step.params_like], step.export().module()
    unclipped, run_plain = [p.clone() for p in params], plain.export().module()
    for grads in gradients(step, 6):
        run(params, grads, step.hyper())
        run_plain(unclipped, grads, plain.hyper())
        for p, grad in zip(optimizer.param_groups[0]["params"], grads):
            p.grad = grad
        optimizer.step()
    for p, expected, without in zip(params, optimizer.param_groups[0]["params"], unclipped):
        assert torch.equal(p, expected) and not torch.equal(p, without)


# -- from C++ ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("numpy")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "export")
        patch.setattr(sys, "path", list(sys.path))  # the example adds to it
        yield importlib.import_module("run")


@pytest.fixture(scope="module")
def program(example, tmp_path_factory):
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing")
    if torch.version.cuda and shutil.which("nvcc") is None:
        pytest.skip(f"torch {torch.__version__} asks CMake for a CUDA toolkit, and there is no nvcc")
    return example.build(tmp_path_factory.mktemp("build"))


def data_of(step):
    return {"hyper": schedule(step.step), **{f"batch[{k}]": x for k, x in enumerate(batches())}}


@pytest.fixture(scope="module")
def files(example, tmp_path_factory):
    """Data and state for train.cpp."""
    step = train_step()
    return example.save(step, data_of(step), tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def trained(example, program, train_package, files, tmp_path_factory):
    """Losses of 100 steps from C++, and the file with the state after them."""
    out = tmp_path_factory.mktemp("trained") / "end.pt"
    losses, _ = example.in_cpp(program, train_package, *files, out)
    return losses, out


def test_training_in_cpp_is_bitwise_that_in_python(train_package, trained):
    losses, out = trained
    step, resumed = train_step(), train_step()
    assert losses == pytest.approx(run_train(load(train_package, step), step), rel=1e-8)
    resumed.load_state_dict(torch.load(out))
    assert equal(resumed.state_dict(), step.state_dict())
    for entry, expected in zip(resumed.step.optimizer.state.values(), step.step.optimizer.state.values()):
        assert all(torch.equal(entry[key], expected[key]) for key in expected) and entry["step"] == STEPS


def test_training_in_cpp_is_that_of_the_module_in_python(trained):
    losses, out = trained
    eager = train_step()
    assert losses == pytest.approx(run_train(eager, eager), rel=1e-3)
    assert difference(torch.load(out), eager.state_dict()) < 1e-2


def test_training_resumed_in_cpp_is_bitwise_uninterrupted(
    example, program, train_package, files, trained, tmp_path
):
    half, out = tmp_path / "half.pt", tmp_path / "out.pt"
    first, _ = example.in_cpp(program, train_package, *files, half, 0, 50)
    assert not equal(torch.load(half), torch.load(trained[1]))
    second, _ = example.in_cpp(program, train_package, files[0], half, out, 50)
    assert [*first, *second] == trained[0]
    assert equal(torch.load(out), torch.load(trained[1]))


def test_no_part_of_the_program_needs_python(program, train_package, tmp_path):
    with zipfile.ZipFile(train_package) as archive:
        libraries = [archive.extract(name, tmp_path) for name in archive.namelist() if name.endswith(".so")]
    assert libraries
    for binary in (program, *libraries):
        needed = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
        assert "libtorch_cpu" in needed and "libpython" not in needed and "torch_python" not in needed


def without(name):
    return lambda data, state: (data if name in data else state).pop(name)


def changed(name, change):
    def apply(data, state):
        of = data if name in data else state
        of[name] = change(of[name])

    return apply


@pytest.mark.parametrize(
    "change,arguments,message",
    [
        (changed("version", lambda v: "99.0"), [], r"train.pt2 is of bnb_compile [\d.]+, .*data.pt of 99.0"),
        (without("version"), [], "data.pt has no version"),
        (without("tensor3"), [], "state.pt has no tensor3"),
        (without("step.parts.0.step"), [], "state.pt has no step.parts.0.step"),
        (without("hyper"), [], "data.pt has no hyper"),
        (without("batch[1]"), [], r"data.pt has no batch\[1\]"),
        (changed("tensor0", lambda x: x[:60]), [], r"tensor0 is float32\[60,16\], must be float32\[64,16\]"),
        (
            changed("tensor0", lambda x: x.half()),
            [],
            r"tensor0 is float16\[64,16\], must be float32\[64,16\]",
        ),
        (
            changed("tensor0", lambda x: x.T.contiguous().T),
            [],
            r"tensor0 is float32\[64,16\]:\[1,64\], must be",
        ),
        (changed("hyper", lambda x: x[..., :4]), [], r"hyper is float64\[2,4\].*, must be float64\[2,5\]"),
        (changed("hyper", lambda x: x.float()), [], r"hyper is float32\[2,5\], must be float64\[2,5\]"),
        (changed("hyper", lambda x: x[:9]), [], r"batch\[0\] has 100 steps, must have 9"),
        (changed("batch[0]", lambda x: x[..., 1:].clone()), [], r"batch\[0\] is float32\[\*,15\], must be"),
        (changed("batch[1]", lambda x: x.double()), [], r"batch\[1\] is float64\[\*,8\], must be float32"),
        (changed("batch[1]", lambda x: x[:, :9].clone()), [], r"batch\[1\] has 9 samples, must have 32"),
        (None, [0, 101], "steps 0 to 101, must be in 0 to 100"),
        (None, [2, 1], "steps 2 to 1, must be in 0 to 100"),
        (None, [0, "9x"], "'9x' is not a number of steps"),
        (None, [0, 1, 2], "usage: train PACKAGE DATA STATE OUT"),
    ],
)
def test_the_program_refuses_what_does_not_fit(
    program, train_package, files, tmp_path, change, arguments, message
):
    data, state = (torch.load(file) for file in files)
    if change:
        change(data, state)
    paths = [tmp_path / name for name in ("data.pt", "state.pt", "out.pt")]
    torch.save(data, paths[0])
    torch.save(state, paths[1])
    command = [str(x) for x in (program, train_package, *paths, *arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout and not paths[2].exists()
    assert re.search(message, done.stderr) and done.stderr.startswith("train: ")


def test_the_program_refuses_other_packages_and_files_that_are_missing(
    program, train_package, optimizer_package, files, tmp_path
):
    out = tmp_path / "out.pt"
    for arguments, message in (
        ([optimizer_package, *files, out], "is an OptimizerStep, must be a TrainStep"),
        ([tmp_path / "no.pt2", *files, out], "cannot read .*no.pt2"),
        ([train_package, files[0], tmp_path / "no.pt", out], "cannot read .*no.pt"),
        ([train_package, *files, tmp_path / "no" / "out.pt", 0, 1], "/no does not exist"),
    ):
        done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == 1 and re.search(message, done.stderr), done.stderr


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_packaged_train_step_on_a_gpu_is_the_module(tmp_path):
    def make():
        model = Model().cuda()
        model.load_state_dict(train_step().model.state_dict())
        params = [p for p in model.parameters() if p.requires_grad]
        return TrainStep(model, loss_fn, AdamW8bit(params, lr=1e-2, min_8bit_size=256, compile=False))

    x, y = (tensor.cuda() for tensor in batches(20))
    step, eager = make(), make()
    run = load(package(make(), str(tmp_path / "train.pt2"), x[0], y[0]), step)
    for k in range(20):
        loss = run(step.hyper(), x[k], y[k]).item()
        assert loss == pytest.approx(eager(eager.hyper(), x[k], y[k]).item(), rel=1e-2)
    assert difference(step.state_dict(), eager.state_dict()) < 5e-2
    text = sources(tmp_path / "train.pt2")
    assert "bnb_compile::" not in text and "aoti_torch_call_dispatcher" not in text

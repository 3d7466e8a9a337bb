"""The step operators in torch.export, with decompositions and from a file, and in make_fx."""

import io

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import bnb_compile  # noqa: F401  defines the operators
from bnb_compile.ops.arena import layout

NUMELS = (5000, 257, 1)
OPS = torch.ops.bnb_compile

# run_decompositions copies a pytree specification, of which torch itself warns
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def arguments(bits):
    """Of an Adam step at its beginning, as new tensors: params, grads, arenas, step, hyper."""
    torch.manual_seed(0)
    places = layout(NUMELS)
    params = [torch.randn(n) for n in NUMELS]
    grads = [torch.randn(n) for n in NUMELS]
    if bits == 8:
        codes = [torch.zeros(places.elements, dtype=torch.uint8) for _ in range(2)]
        absmax = [torch.zeros(places.blocks) for _ in range(2)]
        arenas = [codes[0], absmax[0], codes[1], absmax[1]]
    else:
        arenas = [torch.zeros(places.elements) for _ in range(2)]
    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1]], dtype=torch.float64).repeat(len(NUMELS), 1)
    return params, grads, arenas, torch.zeros(len(NUMELS)), hyper


class Functional(nn.Module):
    """One step: takes the state and returns the new one."""

    def __init__(self, bits):
        super().__init__()
        self.op = getattr(OPS, f"adam_step_{bits}bit")

    def forward(self, params, grads, arenas, step, hyper):
        params, *arenas, step = self.op(params, grads, *arenas, step, hyper)
        return params, arenas, step


class InPlace(nn.Module):
    """One step: its buffers are the state."""

    def __init__(self, bits):
        super().__init__()
        self.op = getattr(OPS, f"adam_step_{bits}bit_")
        params, _, arenas, step, hyper = arguments(bits)
        for k, param in enumerate(params):
            self.register_buffer(f"param{k}", param)
        for k, arena in enumerate(arenas):
            self.register_buffer(f"arena{k}", arena)
        self.count = len(arenas)
        self.register_buffer("step", step)
        self.register_buffer("hyper", hyper)

    def forward(self, *grads):
        params = [getattr(self, f"param{k}") for k in range(len(NUMELS))]
        arenas = [getattr(self, f"arena{k}") for k in range(self.count)]
        self.op(params, list(grads), *arenas, self.step, self.hyper)
        return params[0].sum()


def run_five(program, bits):
    params, grads, arenas, step, hyper = arguments(bits)
    for k in range(5):
        params, arenas, step = program(params, [g * (k + 1) for g in grads], arenas, step, hyper)
    return [*params, *arenas, step]


def through_a_file(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


@pytest.fixture(scope="module", params=[8, 32])
def bits(request):
    return request.param


@pytest.fixture(scope="module")
def exported(bits):
    return torch.export.export(Functional(bits), arguments(bits))


def equal(values, expected):
    return len(values) == len(expected) and all(torch.equal(v, e) for v, e in zip(values, expected))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: p,
        through_a_file,
        lambda p: p.run_decompositions(),
        lambda p: through_a_file(p.run_decompositions()),
    ],
    ids=["as is", "saved and loaded", "decomposed", "decomposed, saved and loaded"],
)
def test_an_exported_functional_step_run_five_times_is_eager(exported, bits, make):
    expected = run_five(Functional(bits), bits)
    assert not torch.equal(expected[0], arguments(bits)[0][0]) and expected[-1].eq(5).all()
    assert equal(run_five(make(exported).module(), bits), expected)


def test_an_exported_functional_step_is_one_operator_and_mutates_nothing(exported, bits):
    program = exported.run_decompositions()
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(getattr(OPS, f"adam_step_{bits}bit").default) == 1
    assert not program.graph_signature.buffers_to_mutate
    assert not program.graph_signature.user_inputs_to_mutate


@pytest.mark.parametrize(
    "make",
    [lambda p: p, through_a_file, lambda p: p.run_decompositions()],
    ids=["as is", "saved and loaded", "decomposed"],
)
def test_an_exported_module_around_the_mutating_operator_keeps_its_state_in_buffers(bits, make):
    grads = arguments(bits)[1]
    program = make(torch.export.export(InPlace(bits), tuple(grads)))
    module, eager = program.module(), InPlace(bits)
    for k in range(5):
        scaled = [g * (k + 1) for g in grads]
        assert torch.equal(module(*scaled), eager(*scaled))
    expected = dict(eager.named_buffers())
    assert all(torch.equal(value, expected[name]) for name, value in module.named_buffers())
    assert expected["step"].eq(5).all()
    mutated = set(program.run_decompositions().graph_signature.buffers_to_mutate.values())
    assert mutated == expected.keys() - {"hyper"}


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx_records_the_functional_step(bits, tracing):
    graph = make_fx(Functional(bits), tracing_mode=tracing)(*arguments(bits))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(getattr(OPS, f"adam_step_{bits}bit").default) == 1
    assert equal(run_five(graph, bits), run_five(Functional(bits), bits))

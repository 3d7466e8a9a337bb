"""The step operators in torch.export, with decompositions and from a file, and in make_fx.

Adam in its plain form, and AMSGrad with a trust ratio and one scale for a parameter.
"""

import io

import pytest
import torch
from helpers.buckets import STEP_OPS
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bnb_compile.formats import layout

NUMELS = (5000, 257, 1)

# run_decompositions copies a pytree specification, of which torch itself warns
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch.export.load of torch 2.11
    pytest.mark.core,
]


def arguments(op, trust):
    """Of a step at the beginning, as new tensors: params, grads, arenas, step, hyper, keyword arguments."""
    torch.manual_seed(0)
    params = [torch.randn(n) for n in NUMELS]
    grads = [torch.randn(n) for n in NUMELS]
    shapes = op.shapes(layout(NUMELS))
    arenas = [torch.zeros(shape, dtype=arena.part.dtype) for arena, shape in zip(op.arenas, shapes)]
    hyper = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1]], dtype=torch.float64).repeat(len(NUMELS), 1)
    options = {}
    if trust:
        options = {"max_unorm": torch.tensor([0.01, 0.0, 10.0]), "block_wise": False}
    return params, grads, arenas, torch.zeros(len(NUMELS), dtype=torch.int64), hyper, options


class Functional(nn.Module):
    """One step: takes the state and returns the new one."""

    def __init__(self, op, trust):
        super().__init__()
        self.op = op.functional

    def forward(self, params, grads, arenas, step, hyper, options):
        params, *arenas, step = self.op(params, grads, *arenas, step, hyper, **options)
        return params, arenas, step


class InPlace(nn.Module):
    """One step: its buffers are the state."""

    def __init__(self, op, trust):
        super().__init__()
        self.op = op.in_place
        params, _, arenas, step, hyper, self.options = arguments(op, trust)
        for k, param in enumerate(params):
            self.register_buffer(f"param{k}", param)
        for k, arena in enumerate(arenas):
            self.register_buffer(f"arena{k}", arena)
        self.count = len(arenas)
        self.register_buffer("step", step)
        self.register_buffer("hyper", hyper)
        if trust:
            self.register_buffer("max_unorm", self.options.pop("max_unorm"))
            self.register_buffer("unorm", torch.zeros(len(NUMELS)))

    def forward(self, *grads):
        params = [getattr(self, f"param{k}") for k in range(len(NUMELS))]
        arenas = [getattr(self, f"arena{k}") for k in range(self.count)]
        limits = {name: getattr(self, name, None) for name in ("max_unorm", "unorm")}
        self.op(params, list(grads), *arenas, self.step, self.hyper, **limits, **self.options)
        return params[0].sum()


def run_five(program, case):
    params, grads, arenas, step, hyper, options = arguments(*case)
    for k in range(5):
        params, arenas, step = program(params, [g * (k + 1) for g in grads], arenas, step, hyper, options)
    return [*params, *arenas, step]


def through_a_file(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


#: Operator, and whether it has a trust ratio and one scale for a parameter.
CASES = [
    (STEP_OPS["adam", 8], False),
    (STEP_OPS["adam", 32], False),
    (STEP_OPS["adam_amsgrad", 8], True),
]


@pytest.fixture(scope="module", params=CASES, ids=["8 bits", "32 bits", "two phases"])
def case(request):
    return request.param


@pytest.fixture(scope="module")
def exported(case):
    return torch.export.export(Functional(*case), arguments(*case))


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
def test_an_exported_functional_step_run_five_times_is_eager(exported, case, make):
    expected = run_five(Functional(*case), case)
    assert not torch.equal(expected[0], arguments(*case)[0][0]) and expected[-1].eq(5).all()
    assert equal(run_five(make(exported).module(), case), expected)


def test_an_exported_functional_step_is_one_operator_and_mutates_nothing(exported, case):
    program = exported.run_decompositions()
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(case[0].functional) == 1
    assert not program.graph_signature.buffers_to_mutate
    assert not program.graph_signature.user_inputs_to_mutate


@pytest.mark.parametrize(
    "make",
    [lambda p: p, through_a_file, lambda p: p.run_decompositions()],
    ids=["as is", "saved and loaded", "decomposed"],
)
def test_an_exported_module_around_the_mutating_operator_keeps_its_state_in_buffers(case, make):
    grads = arguments(*case)[1]
    program = make(torch.export.export(InPlace(*case), tuple(grads)))
    module, eager = program.module(), InPlace(*case)
    for k in range(5):
        scaled = [g * (k + 1) for g in grads]
        assert torch.equal(module(*scaled), eager(*scaled))
    expected = dict(eager.named_buffers())
    assert all(torch.equal(value, expected[name]) for name, value in module.named_buffers())
    assert expected["step"].eq(5).all()
    mutated = set(program.run_decompositions().graph_signature.buffers_to_mutate.values())
    assert mutated == expected.keys() - {"hyper", "max_unorm"}


@pytest.mark.parametrize("tracing", ["real", "fake", "symbolic"])
def test_make_fx_records_the_functional_step(case, tracing):
    graph = make_fx(Functional(*case), tracing_mode=tracing)(*arguments(*case))
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(case[0].functional) == 1
    assert equal(run_five(graph, case), run_five(Functional(*case), case))

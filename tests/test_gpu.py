"""What only a GPU can show: fast kernels against the eager operator, CUDA graphs, synchronisation, memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.buckets import Bucket, assert_close
from test_triton import CASES, made
from torch import Tensor, nn

from bnb_compile.ops.operator import StepOp
from bnb_compile.optim import AdamW8bit, AdamW32bit

pytestmark = pytest.mark.gpu

OPTIMIZERS = pytest.mark.parametrize("optimizer", [AdamW8bit, AdamW32bit])
STEPS = 20


def to_gpu(bucket: Bucket) -> Bucket:
    """A copy on the GPU with the same strides."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = torch.empty(0, dtype=x.dtype, device="cuda").set_(x.untyped_storage().cuda())
        return storage.as_strided(x.shape, x.stride(), x.storage_offset())

    return torch.utils._pytree.tree_map(move, bucket)


def through_inductor(op: StepOp, bucket: Bucket) -> None:
    def step(*args: Any, **options: Any) -> None:
        op.in_place(*args, **options)

    bucket.call(torch.compile(step, fullgraph=True))


def through_launch(op: StepOp, bucket: Bucket) -> None:
    from bnb_compile.lowering.triton.launch import Launcher

    bucket.launch(Launcher, op)


@pytest.mark.parametrize("run", [through_inductor, through_launch], ids=["inductor", "launch"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_eager_operator(name: str, run: Callable[[StepOp, Bucket], None]) -> None:
    """Parameters within one ulp, codes at most one apart.

    Approximate square roots and reciprocals are right to 2**-22, and a code in 100 may lie just above half of
    the smallest value, which the fast encoder makes 0.
    """
    op = CASES[name][0]
    torch._dynamo.reset()
    actual, expected = to_gpu(made(name).bucket), to_gpu(made(name).bucket)
    expected.call(op.in_place)
    run(op, actual)
    assert_close(op, actual, expected, rate=2e-2)


# -- training ------------------------------------------------------------------------------------------------


class Training:
    """A small model in bfloat16 and the pieces of its train step, the same for the same seed."""

    def __init__(self, optimizer: type, compile: bool = True) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 130), nn.GELU(), nn.LayerNorm(130), nn.Linear(130, 7))
        self.model.to("cuda", torch.bfloat16)
        self.params = list(self.model.parameters())
        self.optimizer = optimizer(self.params, lr=1e-2, min_8bit_size=0, compile=compile)
        self.optimizer.init_state()
        self.x = torch.zeros(32, 64, device="cuda", dtype=torch.bfloat16)

    def feed(self, k: int) -> None:
        """Make the k-th input and learning rate; gradients change with them."""
        generator = torch.Generator().manual_seed(k)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.optimizer.param_groups[0]["lr"] = 1e-2 / (1 + k)

    def backward(self) -> None:
        self.model(self.x).float().square().mean().backward()

    def step(self) -> None:
        """Forward, backward, clip, step; gradients stay where they are."""
        self.optimizer.zero_grad(set_to_none=False)
        self.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()

    def warm_up(self, function: Callable[[], None]) -> None:
        """Run once as torch.cuda.graph wants it, and take back what it did."""
        params, state = [p.detach().clone() for p in self.params], copy.deepcopy(self.optimizer.state_dict())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
            function()
        torch.cuda.current_stream().wait_stream(stream)
        self.restore(params, state)

    def restore(self, params: list[Tensor], state: dict[str, Any]) -> None:
        with torch.no_grad():
            for param, value in zip(self.params, params):
                param.copy_(value)
        self.optimizer.load_state_dict(state)


def assert_same(actual: Training, expected: Training) -> None:
    """Bit for bit: a graph replays the kernels that it captured."""
    for a, e in zip(actual.params, expected.params, strict=True):
        assert torch.equal(a, e)
    states = actual.optimizer.state_dict()["state"], expected.optimizer.state_dict()["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def capture(function: Callable[[], None]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


@OPTIMIZERS
def test_replayed_steps_equal_eager_steps(optimizer: type) -> None:
    """The graph has the optimizer step only; gradients are written to the same place."""
    captured, eager = Training(optimizer), Training(optimizer)
    for training in (captured, eager):
        for param in training.params:
            param.grad = torch.zeros_like(param)
    captured.warm_up(captured.optimizer.step)
    graph = capture(captured.optimizer.step)
    for k in range(STEPS):
        for training in (captured, eager):
            training.feed(k)
            training.optimizer.zero_grad(set_to_none=False)
            training.backward()
        graph.replay()
        eager.optimizer.step()
    assert_same(captured, eager)
    assert captured.optimizer.state_dict()["state"][0]["step"] == STEPS


@OPTIMIZERS
def test_replayed_training_equals_eager_training(optimizer: type) -> None:
    """Forward, backward, clipping and step in one graph."""
    captured, eager = Training(optimizer), Training(optimizer)
    captured.warm_up(captured.step)
    graph = capture(captured.step)
    for k in range(STEPS):
        captured.feed(k)
        graph.replay()
        eager.feed(k)
        eager.step()
    assert_same(captured, eager)


@OPTIMIZERS
def test_a_graph_replays_on_a_loaded_state(optimizer: type) -> None:
    captured, eager = Training(optimizer), Training(optimizer)
    for k in range(3):
        eager.feed(k)
        eager.step()
    captured.warm_up(captured.step)
    graph = capture(captured.step)
    graph.replay()
    captured.restore([p.detach().clone() for p in eager.params], copy.deepcopy(eager.optimizer.state_dict()))
    for k in range(3, 6):
        captured.feed(k)
        graph.replay()
        eager.feed(k)
        eager.step()
    assert_same(captured, eager)


@OPTIMIZERS
def test_an_eager_step_between_replays_leaves_the_graph_alone(optimizer: type) -> None:
    """The graph goes on to read the gradients that it was captured with."""
    captured, eager = Training(optimizer), Training(optimizer)
    captured.warm_up(captured.step)
    graph = capture(captured.step)
    own = [param.grad for param in captured.params]
    for k in range(4):
        captured.feed(k)
        eager.feed(k)
        eager.step()
        if k % 2 == 0:
            graph.replay()
            continue
        captured.optimizer.zero_grad(set_to_none=True)
        captured.step()
        for param, grad in zip(captured.params, own):
            param.grad = grad
    assert_same(captured, eager)


@OPTIMIZERS
@torch._dynamo.config.patch(trace_autograd_ops=True)
def test_a_compiled_train_step_equals_the_reference(optimizer: type) -> None:
    """In one graph, but for the rounding of bfloat16 in the model's own kernels: 0.05 on a CPU."""
    torch._dynamo.reset()
    compiled, reference = Training(optimizer), Training(optimizer, compile=False)

    @torch.compile(fullgraph=True)
    def train_step(x: Tensor) -> Tensor:
        loss = compiled.model(x).float().square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(compiled.params, 1.0)
        compiled.optimizer.step()
        compiled.optimizer.zero_grad()
        return loss.detach()

    first = [p.detach().clone() for p in compiled.params]
    for k in range(5):
        compiled.feed(k)
        train_step(compiled.x)
        reference.feed(k)
        reference.step()
    for start, a, e in zip(first, compiled.params, reference.params):
        moved = (e - start).float().norm()
        assert moved > 0 and (a - e).float().norm() < 0.2 * moved


@OPTIMIZERS
def test_a_warm_step_does_not_synchronise(optimizer: type) -> None:
    training = Training(optimizer)
    for k in range(2):
        training.feed(k)
        training.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for param in training.params:
            param.grad = torch.ones_like(param)  # at another address
        training.optimizer.step()
        training.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@OPTIMIZERS
def test_reduce_overhead_takes_the_step_into_cuda_graphs(optimizer: type) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled, eager = Training(optimizer), Training(optimizer)
    for training in (compiled, eager):
        for param in training.params:
            param.grad = torch.ones_like(param)
    step = torch.compile(compiled.optimizer.step, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        step()
        eager.optimizer.step()
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert_same(compiled, eager)


@OPTIMIZERS
def test_a_step_allocates_less_than_4_megabytes(optimizer: type) -> None:
    params = [nn.Parameter(torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones_like(param)
    opt = optimizer(params)
    opt.init_state()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        opt.step()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 4 << 20


@torch._dynamo.config.patch(trace_autograd_ops=True)
@pytest.mark.parametrize("graph", [False, True], ids=["hooks", "graph"])
def test_released_gradients_never_all_exist(graph: bool) -> None:
    torch._dynamo.reset()
    layers = [nn.Linear(2048, 2048, bias=False) for _ in range(20)]
    model = nn.Sequential(*layers).to("cuda", torch.bfloat16)
    optimizer = AdamW8bit(model.parameters(), bf16_stochastic_round=True, release_gradients=True)
    x = torch.randn(8, 2048, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    run = torch.compile(step, fullgraph=True) if graph else step
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
    one = 2 * 2048 * 2048
    assert torch.cuda.max_memory_allocated() - before < 4 * one  # of 20


@OPTIMIZERS
def test_a_mesh_of_one_over_nccl_computes_what_no_mesh_does(optimizer: type, tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    def train(shards: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(3)]).cuda()
        if shards:
            fully_shard(model)
        opt = optimizer(model.parameters(), lr=1e-2, max_grad_norm=1.0)
        for k in range(4):
            torch.manual_seed(k)
            model(torch.randn(4, 512, device="cuda")).square().mean().backward()
            opt.step()
            opt.zero_grad()
        return [p.full_tensor() if shards else p.detach() for p in model.parameters()]

    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for a, e in zip(train(shards=True), train(shards=False)):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()

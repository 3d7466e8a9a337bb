"""What a training loop may do to an optimizer, and what that costs: a table beside the others.

    make contract                     or, with the peers installed,
    python benchmarks/contract.py     --ours for ours only

Each loop below is run with each optimizer, compiled and again uncompiled. A cell has what was compiled, graph
breaks, reads of a tensor's value in the steps, for each of which a GPU would be waited for, and the largest
difference of a parameter between both runs. Graphs are captured by Dynamo and then run as they are, without
Inductor, so that captures are what is counted and the table takes minutes.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import math
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

from bnb_compile import backends
from bnb_compile.lowering.cpp import launch
from bnb_compile.optim import AdamW8bit

STEPS = 16
MANY_STEPS = 10  # of the 100 optimizers
LIMIT = torch._dynamo.config.recompile_limit
SHAPES = [(20, 256), (20, 256), (300,), (40,)]  # two have 8-bit states, and two 32-bit ones


# -- the optimizers ---------------------------------------------------------------------------------


def ours(params, compiled, **options):
    return AdamW8bit(params, compile=compiled, **options)


def adamw(params, compiled, **options):
    return torch.optim.AdamW(params, **options)


def bitsandbytes(params, compiled, **options):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, **options)


def torchao(params, compiled, **options):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **options)


@dataclass(frozen=True)
class Column:
    """An optimizer and a way of using it.

    Attributes:
        title: Head of the column.
        make: ``(params, compiled, **options)`` to the optimizer.
        capture: Arguments of ``torch.compile`` around the step; None leaves the step as it is.
        amp: Options with which a ``GradScaler`` hands its verdict to the step.
        module: What must be installed.
    """

    title: str
    make: Callable[..., torch.optim.Optimizer]
    capture: dict[str, Any] | None
    amp: dict[str, Any] = field(default_factory=dict)
    module: str = "torch"


COLUMNS = [
    Column("ours, `opt.step()`", ours, None, dict(amp_fused=True)),
    Column("ours, in a graph", ours, dict(fullgraph=True), dict(amp_fused=True)),
    Column("torch AdamW, compiled", adamw, {}, dict(fused=True)),
    Column("bitsandbytes AdamW8bit, compiled", bitsandbytes, {}, module="bitsandbytes"),
    Column("torchao AdamW8bit", torchao, None, module="torchao"),
]


# -- counting ---------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts the operators that hand a tensor's value to Python."""

    OPS = [getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "equal", "nonzero")]

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Under another mode Dynamo would capture nothing."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Called for each operator that runs; not for those that Dynamo traces."""
        # Float64 is a Python number that Dynamo made an input of its graph: it stays on the host.
        self.count += func in self.OPS and args[0].dtype != torch.float64
        return func(*args, **(kwargs or {}))


class Run:
    """One loop with one optimizer: makes it and its parameters, and counts while it steps.

    Args:
        column: Which optimizer.
        compiled: Whether anything is compiled.
    """

    def __init__(self, column: Column, compiled: bool) -> None:
        self.column, self.compiled = column, compiled
        self.params: list[nn.Parameter] = []
        self.reads = Reads()
        self.graphs = self.kernels = 0
        self.over_limit = False
        self.torch_compile = torch.compile

    def parameters(self, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
        """New parameters, which are compared at the end."""
        generator = torch.Generator().manual_seed(len(self.params))
        new = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        self.params += new
        return new

    def optimizer(self, params: list[nn.Parameter] | None = None, **options: Any) -> torch.optim.Optimizer:
        """The column's optimizer, of new parameters unless they are given."""
        options = {"lr": 0.01, "weight_decay": 0.1, **options}
        return self.column.make(params or self.parameters(), self.compiled, **options)

    def give(self, seed: int, scale: float = 1.0) -> None:
        """New gradients: in place, where there are some."""
        generator = torch.Generator().manual_seed(seed)
        for param in self.params:
            grad = torch.randn(param.shape, generator=generator) * scale
            if param.grad is None:
                param.grad = grad
            else:
                param.grad.copy_(grad)

    def capture(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Compile as the column's user would."""
        if not self.compiled or self.column.capture is None:
            return function
        captured = torch.compile(function, **self.column.capture)

        def call():
            try:
                return captured()
            except FailOnRecompileLimitHit:  # nothing has run; without `fullgraph` Dynamo would do the same
                return function()

        return call

    def counted(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Count the reads of a function's calls."""

        def call():
            with self.reads:
                return function()

        return call

    def stepper(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        """The step, as most loops call it."""
        return self.counted(self.capture(optimizer.step))

    def execute(self, loop: Callable[[Run], None]) -> None:
        """Run a loop in a fresh Dynamo; torchao calls ``torch.compile`` by itself."""
        torch._dynamo.reset()
        counters.clear()
        launch._compile_kernel.cache_clear()
        before = backends.counts["compiled"]
        logger = logging.getLogger("torch._dynamo.convert_frame")
        compile = functools.partial(self.torch_compile, backend=self.count_graph)
        logger.addFilter(self.notice_limit)
        try:
            with mock.patch.object(torch, "compile", compile if self.compiled else lambda f, **options: f):
                loop(self)
        finally:
            logger.removeFilter(self.notice_limit)
        self.kernels = backends.counts["compiled"] - before

    def count_graph(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        """A backend: the graph is not compiled further."""
        self.graphs += 1
        return graph.forward

    def notice_limit(self, record: logging.LogRecord) -> bool:
        """A filter of Dynamo's log, which is the only place where it says that it has given up."""
        hit = "torch._dynamo hit config." in str(record.msg)
        self.over_limit = self.over_limit or hit
        return not hit


def cell(column: Column, loop: Callable[[Run], None]) -> str:
    """Compiles / graph breaks / reads / difference; an exception's name if there is one."""
    run, plain = Run(column, compiled=True), Run(column, compiled=False)
    try:
        run.execute(loop)
        breaks = sum(counters["graph_break"].values())
        plain.execute(loop)
    except Exception as error:
        return type(error).__name__
    graphs = f">{LIMIT}" if run.over_limit else str(run.graphs)
    compiles = [graphs] * (run.graphs > 0 or not run.kernels) + [f"{run.kernels}k"] * (run.kernels > 0)
    pairs = [(p.detach(), q.detach()) for p, q in zip(run.params, plain.params)]
    if all(torch.equal(p, q) for p, q in pairs):
        difference = "bitwise"
    else:
        difference = f"{max((p - q).abs().max().item() for p, q in pairs):.0e}"
    return f"{'+'.join(compiles)} / {breaks} / {run.reads.count} / {difference}"


# -- the loops: schedules ---------------------------------------------------------------------------


def lambda_lr(run: Run) -> None:
    optimizer = run.optimizer()
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 0.9**k)
    step = run.stepper(optimizer)
    for k in range(STEPS):
        run.give(k)
        step()
        scheduler.step()


def one_cycle(run: Run) -> None:
    optimizer = run.optimizer()
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=STEPS + 1)
    step = run.stepper(optimizer)
    for k in range(STEPS):
        run.give(k)
        step()
        scheduler.step()


def reduce_on_plateau(run: Run) -> None:
    optimizer = run.optimizer()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.7)
    step = run.stepper(optimizer)
    for k in range(STEPS):
        run.give(k)
        step()
        scheduler.step(1.0)


def edit_decay_and_eps(run: Run) -> None:
    optimizer = run.optimizer()
    step = run.stepper(optimizer)
    for k in range(STEPS):
        optimizer.param_groups[0]["weight_decay"] = 0.1 / (k + 1)
        optimizer.param_groups[0]["eps"] = 1e-8 * (k + 1)
        run.give(k)
        step()


def tensor_lr(run: Run) -> None:
    lr = torch.tensor(0.01)
    step = run.stepper(run.optimizer(lr=lr))
    for k in range(STEPS):
        lr.fill_(0.01 / (k + 1))
        run.give(k)
        step()


def load_every_third_step(run: Run) -> None:
    """As from a file: copies of the same values."""
    optimizer = run.optimizer()
    step = run.stepper(optimizer)
    for k in range(STEPS):
        run.give(k)
        step()
        if k % 3 == 2:
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=False))


# -- the loops: structure ---------------------------------------------------------------------------


def missing_gradients(run: Run) -> None:
    """12 patterns, each twice."""
    masks = [mask for mask in itertools.product([True, False], repeat=len(SHAPES)) if any(mask)]
    masks = random.Random(0).sample(masks, 12)
    step = run.stepper(run.optimizer())
    for k in range(24):
        run.give(k)
        for param, present in zip(run.params, masks[k % 12]):
            param.grad = param.grad if present else None
        step()


def freeze_and_unfreeze(run: Run) -> None:
    step = run.stepper(run.optimizer())
    for k in range(STEPS):
        frozen = k // 4 % 2 == 1
        run.give(k)
        for param in run.params[::2]:
            param.requires_grad_(not frozen)
            param.grad = None if frozen else param.grad
        step()


def add_group(run: Run) -> None:
    optimizer = run.optimizer()
    step = run.stepper(optimizer)
    for k in range(STEPS):
        if k == 4:
            optimizer.add_param_group(dict(params=run.parameters([(20, 256)]), lr=0.02))
        run.give(k)
        step()


def replace_data(run: Run) -> None:
    step = run.stepper(run.optimizer())
    for k in range(STEPS):
        for param in run.params:
            param.data = param.data.clone()
        run.give(k)
        step()


def move_states(run: Run) -> None:
    """To another place and back, as reinforcement learning does between its phases."""
    optimizer = run.optimizer()
    step = run.stepper(optimizer)
    for k in range(STEPS):
        run.give(k)
        step()
        for state in optimizer.state.values():
            for name, value in list(state.items()):
                if isinstance(value, torch.Tensor):
                    state[name] = value.to("cpu", copy=True)


def reallocate_gradients(run: Run) -> None:
    optimizer = run.optimizer()
    step = run.stepper(optimizer)
    kept = []  # so that the next gradients cannot have their addresses
    for k in range(STEPS):
        optimizer.zero_grad()
        run.give(k)
        kept += [param.grad for param in run.params]
        step()


def one_optimizer_per_parameter(run: Run) -> None:
    """100, of three shapes; where they are captured, in one region."""
    shapes = [(20, 256), (300,), (40,)]
    params = run.parameters([shapes[k % 3] for k in range(100)])
    optimizers = [run.optimizer([param]) for param in params]

    def step_all():
        for optimizer in optimizers:
            optimizer.step()

    step = run.counted(run.capture(step_all))
    for k in range(MANY_STEPS):
        run.give(k)
        step()


# -- the loops: what comes before the update ----------------------------------------------------------


def clip_and_step(run: Run) -> None:
    optimizer = run.optimizer()

    def region():
        nn.utils.clip_grad_norm_(run.params, 1.0)
        optimizer.step()

    step = run.counted(run.capture(region))
    for k in range(STEPS):
        run.give(k)
        step()


def grad_scaler(run: Run) -> None:
    """Every fourth step overflows. Unscaling is a part of the step if the optimizer can do that."""
    optimizer = run.optimizer(**run.column.amp)
    optimizer.step = run.capture(optimizer.step)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(torch.ones(()))
    step = run.counted(lambda: scaler.step(optimizer))
    for k in range(STEPS):
        run.give(k, scaler.get_scale())
        if k % 4 == 3:
            run.params[0].grad[0, 0] = math.inf
        step()
        scaler.update()


def percentile_clipping(run: Run) -> None:
    step = run.stepper(run.optimizer(percentile_clipping=50))
    for k in range(STEPS):
        run.give(k, scale=1.0 + k % 5)
        step()


LOOPS = {
    "`LambdaLR`": lambda_lr,
    "`OneCycleLR`, betas too": one_cycle,
    "`ReduceLROnPlateau`": reduce_on_plateau,
    "weight decay and eps edited": edit_decay_and_eps,
    "lr a tensor, filled": tensor_lr,
    "`load_state_dict` each 3 steps": load_every_third_step,
    "12 patterns of missing gradients": missing_gradients,
    "freezing and unfreezing": freeze_and_unfreeze,
    "`add_param_group`": add_group,
    "`p.data = ...`": replace_data,
    "states moved off and back": move_states,
    "gradients reallocated": reallocate_gradients,
    "100 optimizers of one parameter": one_optimizer_per_parameter,
    "`clip_grad_norm_` and step": clip_and_step,
    "`GradScaler`, overflows": grad_scaler,
    "percentile clipping": percentile_clipping,
}

LEGEND = f"""
Cells: compiles / graph breaks / reads of a value / largest difference of a parameter to the same loop
uncompiled, where a step moves one by 0.01. {STEPS} steps; 24 with missing gradients, {MANY_STEPS} of the 100.
- Compiles are graphs that Dynamo captured; k are kernels that the eager step of ours compiled: one for 8-bit
  states and one for 32-bit states.
- >{LIMIT}: Dynamo's recompile limit was hit. Beyond it the step runs uncompiled, and `fullgraph=True` raises.
- Reads are what a GPU would be waited for, if the value is on it: those of torch's AdamW are of step counts,
  which are on the host by default. That bitsandbytes waits for a GPU after each parameter is not counted.
- Captured graphs run their operators eagerly here, so ours is bitwise. `opt.step()` runs the compiled kernel,
  in which a value within rounding of the midpoint of two 8-bit codes may get either: a few elements differ.
- `clip_grad_norm_` is in the captured region. The GradScaler is outside, and reads its verdict itself unless
  the step takes it (ours with `amp_fused=True`; torch's `fused=True`, which Dynamo does not capture).
- A name is the exception that was raised."""


def table(columns: list[Column]) -> None:
    print("| | " + " | ".join(column.title for column in columns) + " |")
    print("|---|" + "--:|" * len(columns))
    for label, loop in LOOPS.items():
        print(f"| {label} | " + " | ".join(cell(column, loop) for column in columns) + " |", flush=True)
    print(LEGEND)
    modules = ["bnb_compile", *dict.fromkeys(column.module for column in columns)]
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in modules) + ", on a CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", action="store_true", help="only the columns of bnb_compile")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the tensors are small
    installed = [column for column in COLUMNS if importlib.util.find_spec(column.module)]
    table([column for column in installed if column.make is ours or not args.ours])


if __name__ == "__main__":
    main()

"""What is shown when the runs have finished: a table of measurements, and the loss curves."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch._dynamo.utils import get_compilation_metrics
from torch.utils._python_dispatch import TorchDispatchMode


class CountCalls(TorchDispatchMode):
    """Counts the calls of each torch operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and call `op`."""
        self.calls[op] += 1
        return op(*args, **(kwargs or {}))


def measure_optimizer(opt: torch.optim.Optimizer, code: Sequence[str]) -> dict[str, float]:
    """Measurements of an optimizer whose parameters have gradients; it takes many steps.

    Args:
        opt: The optimizer.
        code: What Inductor generated for the region that it was captured in.
    """
    with CountCalls() as count:
        opt.step()
    fused = count.calls[torch.ops.aten._fused_adamw_.default]
    captured = sum(len(re.findall(r"^ *\w*adam_step\w*(?:\.run)?\(", source, re.M)) for source in code)
    times = []
    for _ in range(200):
        start = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - start)
    return {
        "optimizer state, bytes": state_bytes(opt),
        "optimizer step, ms": 1e3 * statistics.median(times),
        "optimizer kernels per step": fused + captured,
    }


def measure_compilation() -> dict[str, float]:
    """What Dynamo has compiled since its metrics were cleared."""
    compilations = get_compilation_metrics()
    return {
        "compile, s": sum(c.entire_frame_compile_time_s or 0.0 for c in compilations),
        "graphs": len(compilations),
        "recompiles": sum(c.recompile_reason is not None for c in compilations),
    }


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Memory of all state tensors, with what they share counted once."""
    tensors = (t for state in opt.state.values() for t in state.values() if isinstance(t, Tensor))
    storages = (t.untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """The measurements of each run side by side, by title."""
    lines = [" " * 28 + "".join(f"{title:>14}" for title in columns)]
    for name in next(iter(columns.values())):
        values = [column[name] for column in columns.values()]
        cells = (f"{v:14,}" if isinstance(v, int) else f"{v:14.3f}" for v in values)
        lines.append(f"{name:28}" + "".join(cells))
    return "\n".join(lines)


def plot(curves: Mapping[str, tuple[Sequence[float], Mapping[int, float]]], path: Path) -> None:
    """Draw loss curves, by title: the loss of each step, averaged over a few, and the validation losses."""
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    # The runs often lie on top of one another, so the second one has gaps and crosses.
    for (title, (losses, validation)), color, line, marker in zip(
        curves.items(), ("tab:blue", "tab:orange"), ("-", "--"), ("o", "x")
    ):
        width = max(1, len(losses) // 50)
        means = torch.tensor(losses).unfold(0, width, 1).mean(1)
        steps = torch.arange(len(means)) + (width - 1) / 2  # steps before each loss
        axes.plot(steps, means, line, color=color, label=f"{title}, training")
        axes.plot(*zip(*validation.items()), marker, color=color, label=f"{title}, validation")
    axes.set(xlabel="step", ylabel="loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.figure.savefig(path, dpi=120)

"""What a train step holds in memory, by category, and how that is shown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

CATEGORIES = ("weights", "states", "gradients", "activations and rest")


def bytes_of(tensors: Iterable[Any]) -> int:
    """Memory of tensors, of which some may be subclasses around others; what they share counts once."""
    storages = {}
    todo = [x for x in tensors if isinstance(x, Tensor)]
    while todo:
        x = todo.pop()
        if hasattr(x, "__tensor_flatten__"):
            todo += [getattr(x, name) for name in x.__tensor_flatten__()[0]]
        else:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def allocations(step: Callable[[], Any]) -> list[int]:
    """Bytes of every allocation of a call, in their order; of a tensor that is freed, less than 0."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        step()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def peak_of(step: Callable[[], Any], params: Sequence[Tensor], states: Callable[[], int]) -> dict[str, int]:
    """Bytes by category at the moment of a step when most is allocated.

    Gradients are told from the rest by their sizes: choose batches so that no activation has a weight's size.

    Args:
        step: A train step, of which earlier ones have created the states.
        params: What it updates, with no gradients left from an earlier step.
        states: Says how large the optimizer's states are.
    """
    sizes = {param.nbytes for param in params if param.dim() > 1}
    gradients = rest = 0
    peak = (0, 0, 0)
    for size in allocations(step):
        if abs(size) in sizes:
            gradients += size
        else:
            rest += size
        peak = max(peak, (gradients + rest, gradients, rest))
    return dict(zip(CATEGORIES, (bytes_of(params), states(), *peak[1:])))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of an optimizer's states."""
    return bytes_of(x for entry in optimizer.state.values() for x in entry.values())


def table(rows: Mapping[str, Mapping[str, Any]], numel: int) -> str:
    """What was measured of each optimizer: GB by category, bytes a parameter, the step and the losses."""
    heads = [*CATEGORIES, "sum", "bytes/param*", "step, s", "first loss", "last loss"]
    lines = ["| optimizer | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, row in rows.items():
        parts = [row["peak"][category] for category in CATEGORIES]
        cells = [f"{x / 1e9:.2f}" for x in (*parts, sum(parts))]
        cells += [f"{sum(parts[:3]) / numel:.2f}", f"{row['seconds']:.2f}"]
        cells += [f"{row['losses'][0]:.3f}", f"{row['losses'][-1]:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", "* weights, states and gradients; GB are 1e9 bytes, at the peak of a train step"]
    )


def plot(rows: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw the memory of each optimizer by category, and its losses."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=[3, 2])
    left = [0.0] * len(rows)
    for category in CATEGORIES:
        width = [row["peak"][category] / 1e9 for row in rows.values()]
        bars.barh(list(rows), width, left=left, label=category)
        left = [a + b for a, b in zip(left, width)]
    bars.invert_yaxis()
    bars.set(xlabel="GB at the peak of a train step")
    bars.legend()
    for (name, row), line in zip(rows.items(), ["-", "--", "-.", ":"] * 2):
        curves.plot(range(1, len(row["losses"]) + 1), row["losses"], line, label=name)
    curves.set(xlabel="step", ylabel="loss, nats per byte")
    curves.grid(alpha=0.3)
    curves.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def expected_bytes(model: nn.Module, share: float) -> dict[str, float]:
    """What fine-tuning will need: bfloat16 weights, 8-bit states, and a share of the gradients."""
    numel = sum(param.numel() for param in model.parameters())
    largest = max(param.numel() for param in model.parameters())
    return {
        "weights": 2 * numel,
        "states": 2 * numel * (1 + 4 / 256),
        "gradients": 2 * max(share * numel, largest),
    }

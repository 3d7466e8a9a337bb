"""What releasing gradients costs and saves, and what clipping by the norm of the step before costs.

    python benchmarks/release.py           24 equal layers, 201 million bfloat16 parameters
    python benchmarks/release.py --loss    a GPT of 3.3 million, clipped by this step's norm or the last one's

Each run of the first is a process of its own: the peak that a train step allocates above what there was, and
the median of its time. A train step is one graph, or eager with hooks.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import bnb_compile as bnb

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

WIDTH, LAYERS, ROUNDS = 1024, 24, 9


class Layer(nn.Module):
    """A layer of 8.4 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Input and output: ``(batch, WIDTH)``."""
        return x + self.down(nn.functional.gelu(self.up(nn.functional.rms_norm(x, (WIDTH,)))))


def measure(released: bool, graph: bool) -> None:
    """Print a row of the table."""
    from memory import allocations

    torch.manual_seed(0)
    torch._dynamo.config.trace_autograd_ops = True
    model = nn.Sequential(*[Layer() for _ in range(LAYERS)]).bfloat16()
    numel = sum(param.numel() for param in model.parameters())
    optimizer = bnb.optim.AdamW8bit(
        model.parameters(), lr=1e-4, bf16_stochastic_round=True, release_gradients=released
    )

    def step(x: Tensor) -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    run = torch.compile(step, fullgraph=True) if graph else step
    x = torch.randn(8, WIDTH).bfloat16()
    begin = time.perf_counter()
    run(x)
    first = time.perf_counter() - begin
    run(x)
    peak = max(itertools.accumulate(allocations(lambda: run(x))))
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        run(x)
        times.append(time.perf_counter() - begin)
    states = sum(t.nbytes for b in optimizer.structure.buckets for t in b.arenas)
    total = (sum(p.nbytes for p in model.parameters()) + states + peak) / numel
    print(
        f"| {'one graph' if graph else 'eager'} | {'yes' if released else 'no'} | "
        f"{len(optimizer.structure.buckets)} | {peak / 1e6:.0f} | {total:.2f} | "
        f"{1e3 * statistics.median(times):.0f} | {first:.0f} |",
        flush=True,
    )


def losses(seeds: int, steps: int) -> None:
    """Print the last losses of runs that are clipped by this step's norm and by the last one's."""
    from gpt import GPT, Size, loss_of
    from text import read_text, windows

    size = Size(context=64)
    text, _ = read_text(None, least=1000)
    print(f"mean loss of the last 20 of {steps} steps, max_grad_norm=0.5\n")
    print("| seed | this step's norm | the last step's norm | difference |\n|--:|--:|--:|--:|")
    differences = []
    for seed in range(seeds):
        ends = []
        for previous in (False, True):
            torch.manual_seed(seed)
            model = GPT(size)
            optimizer = bnb.optim.AdamW8bit(
                model.parameters(), lr=1e-3, max_grad_norm=0.5, previous_norm=previous
            )
            found = []
            for _ in range(steps):
                starts = torch.randint(len(text) - size.context, (8,))
                loss = loss_of(model, *windows(text, starts, size.context))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                found.append(loss.item())
            ends.append(statistics.mean(found[-20:]))
        differences.append(ends[1] - ends[0])
        print(f"| {seed} | {ends[0]:.4f} | {ends[1]:.4f} | {differences[-1]:+.4f} |", flush=True)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    print(f"\nmean difference {statistics.mean(differences):+.4f}, standard error {error:.4f}")


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loss", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--one", nargs=2, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loss:
        losses(args.seeds, args.steps)
    elif args.one:
        measure(*map(bool, args.one))
    else:
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
        print("| train step | released | kernels | peak, MB | bytes/param | ms | first step, s |")
        print("|---|---|--:|--:|--:|--:|--:|", flush=True)
        for graph in (1, 0):
            for released in (0, 1):
                subprocess.run([sys.executable, __file__, "--one", str(released), str(graph)], check=True)


if __name__ == "__main__":
    main()

"""Train a small GPT from C++, without Python: export, package, build, train, and compare with Python.

The training step (forward, backward, clipping and 8-bit AdamW) is packaged with AOTInductor. train.cpp feeds
the package with batches and a schedule from a file, stops half way, resumes from what it has saved, and saves
again. The same steps are taken in Python: eagerly, under torch.compile, and with the package. All with one
thread, where sums have one order: the package then computes the same bits in C++ and in Python.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from gpt import GPT, Size, loss_of  # noqa: E402
from text import read_text, windows  # noqa: E402

from bnb_compile.export import TrainStep, load, package  # noqa: E402
from bnb_compile.optim import AdamW8bit  # noqa: E402
from bnb_compile.version import VERSION  # noqa: E402

SIZE = Size(layers=2, width=64, heads=2, context=64)
BATCH = 8
LR = 5e-3
WARMUP = 10  # steps
TOLERANCE = 0.02  # of the parameters after 100 steps, see `relative_error`

Run = Callable[..., Tensor]  # (hyper, *batch) -> loss


class Result(NamedTuple):
    """Of one way to train."""

    losses: list[float]
    times: list[float]  # milliseconds of each step
    state: dict[str, Tensor]  # of the `TrainStep`


def make_step() -> TrainStep:
    """The same model and optimizer at every call."""
    torch.manual_seed(0)
    model = GPT(SIZE)
    return TrainStep(model, loss_of, AdamW8bit(model.parameters(), lr=LR, max_grad_norm=1.0))


def make_data(step: TrainStep, steps: int) -> dict[str, Tensor]:
    """Arguments of `step`, for all steps, by the names that a package has for them."""
    k = torch.arange(steps, dtype=torch.float64)
    schedule = ((k + 1) / WARMUP).clamp(max=1) * (1 + torch.cos(torch.pi * k / steps)) / 2
    hyper = step.hyper().repeat(steps, 1, 1)
    hyper[:, :, step.step.hyper_names.index("lr")] *= schedule[:, None]
    text, _ = read_text(None, SIZE.context + 1)
    x, y = windows(text, torch.randint(len(text) - SIZE.context, (steps * BATCH,)), SIZE.context)
    x, y = (tokens.contiguous().unflatten(0, (steps, BATCH)) for tokens in (x, y))
    return {"hyper": hyper, "batch[0]": x, "batch[1]": y}


def in_python(step: TrainStep, compile: bool) -> Run:
    """An ordinary training loop's step."""
    optimizer = step.step.optimizer

    def train(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(step.model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    if compile:
        torch._dynamo.config.trace_autograd_ops = True
        train = torch.compile(train, fullgraph=True)

    def run(hyper: Tensor, x: Tensor, y: Tensor) -> Tensor:
        optimizer.param_groups[0]["lr"] = hyper[0, 0].item()
        return train(x, y)

    return run


def measure(step: TrainStep, run: Run, data: dict[str, Tensor]) -> Result:
    """Train on all data."""
    losses, times = [], []
    for arguments in zip(*data.values()):
        start = time.perf_counter()
        losses.append(run(*arguments).item())
        times.append((time.perf_counter() - start) * 1e3)
    return Result(losses, times, step.state_dict())


def build(folder: Path) -> Path:
    """Compile train.cpp; returns the program."""
    if shutil.which("cmake") is None:
        raise FileNotFoundError("cmake is missing: it builds train.cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    configure = ["cmake", "-S", HERE, "-B", folder, "-DCMAKE_BUILD_TYPE=Release", prefix]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return folder / "train"


def save(step: TrainStep, data: dict[str, Tensor], folder: Path) -> tuple[Path, Path]:
    """Write what train.cpp reads: data, and the state to begin from."""
    torch.save({"version": VERSION, **data}, folder / "data.pt")
    torch.save(dict(step.state_dict()), folder / "begin.pt")
    return folder / "data.pt", folder / "begin.pt"


def in_cpp(program: Path, *arguments: object) -> tuple[list[float], list[float]]:
    """Losses and times of train.cpp; its arguments are described there."""
    command = [str(program), *map(str, arguments)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=one_thread, check=True, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines()
    _, losses, times = zip(*(map(float, line.split()) for line in lines))
    return list(losses), list(times)


def relative_error(state: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of the model's parameters, in the Euclidean norm."""
    names = [name for name in expected if name.startswith("tensor")]
    difference = torch.cat([(state[name] - expected[name]).flatten() for name in names])
    return (difference.norm() / torch.cat([expected[name].flatten() for name in names]).norm()).item()


def count_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> int:
    """How many tensors are equal in all bits."""
    return sum(torch.equal(state[name], expected[name]) for name in expected)


def print_table(results: dict[str, Result]) -> None:
    """Losses, times, and what differs from the first."""
    reference = next(iter(results.values())).state
    print(f"{'':22}{'first loss':>12}{'last loss':>12}{'ms/step':>10}{'difference':>12}{'equal tensors':>15}")
    for name, (losses, times, state) in results.items():
        median = statistics.median(times[len(times) // 10 :])  # the first ones compile
        error = relative_error(state, reference)
        equal = f"{count_equal(state, reference)} of {len(reference)}"
        print(f"{name:22}{losses[0]:12.5f}{losses[-1]:12.5f}{median:10.3f}{error:12.1e}{equal:>15}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100, help="2 or more (100)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/export"), help="folder to write to (runs/export)"
    )
    args = parser.parse_args(arguments)
    if args.steps < 2:
        parser.error(f"argument --steps: {args.steps}, must be 2 or more")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    step = make_step()
    data = make_data(step, args.steps)
    start = time.perf_counter()
    path = package(step, str(args.out / "train.pt2"), data["batch[0]"][0], data["batch[1]"][0])
    print(f"packaged in {time.perf_counter() - start:.0f} s: {path}")
    start = time.perf_counter()
    program = build(args.out / "build")
    print(f"built in {time.perf_counter() - start:.0f} s: {program}\n")

    results = {}
    for name, make in {
        "Python, eager": lambda step: in_python(step, compile=False),
        "Python, torch.compile": lambda step: in_python(step, compile=True),
        "Python, AOTInductor": lambda step: load(path, step),
    }.items():
        step = make_step()
        results[name] = measure(step, make(step), data)
    files = save(make_step(), data, args.out)
    half, end = args.out / "half.pt", args.out / "end.pt"
    losses, times = in_cpp(program, path, *files, end)
    step = make_step()
    step.load_state_dict(torch.load(end))
    results["C++, AOTInductor"] = Result(losses, times, step.state_dict())
    print_table(results)
    print()

    in_cpp(program, path, *files, half, 0, args.steps // 2)
    in_cpp(program, path, files[0], half, half, args.steps // 2)
    state = results["C++, AOTInductor"].state
    for name, other in (
        ("with the package in Python", results["Python, AOTInductor"].state),
        ("in C++, resumed half way", torch.load(half)),
    ):
        print(f"{name}: {count_equal(other, state)} of {len(state)} tensors equal those of C++")
    worst = max(relative_error(result.state, results["Python, eager"].state) for result in results.values())
    if worst > TOLERANCE:
        print(f"a difference of {worst:.1e}, must be {TOLERANCE} or less", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

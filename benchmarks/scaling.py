"""How a step's time grows with its elements, and the first step's with its tensors, as JSON for pictures.py.

    python benchmarks/scaling.py --out benchmarks/results/scaling-DATE.json

Optimizers take turns; times are medians. A first step is that of a process of its own with nothing cached,
from the construction of the optimizer to the end of the step. torch's step is compiled as a whole there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

ELEMENTS = [1 << power for power in range(12, 27, 2)]
TENSORS = [1, 10, 100, 300]


def steppers(params: list[nn.Parameter]) -> dict[str, Callable[[], Any]]:
    """The step of each optimizer; those that are installed."""
    from bnb_compile import optim

    found: dict[str, Any] = {
        "AdamW8bit": partial(optim.AdamW8bit, min_8bit_size=0),
        "AdamW, ratio8": partial(optim.AdamW, states="ratio8", min_8bit_size=0),
        "torch AdamW, fused": partial(torch.optim.AdamW, fused=True),
    }
    try:
        from bitsandbytes.optim import AdamW8bit as theirs
    except ImportError:
        print("bitsandbytes is not installed", file=sys.stderr)
    else:
        found["bitsandbytes AdamW8bit"] = partial(theirs, min_8bit_size=0)
    return {name: make(params, lr=1e-4).step for name, make in found.items()}


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def times(elements: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of a step of one tensor."""
    steps = steppers(parameters([(elements,)]))
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 3):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(of[3:]) for name, of in taken.items()}


def first_step(name: str, tensors: int) -> None:
    """Print the seconds of a first step of so many tensors of 40 shapes."""
    from bnb_compile.optim import AdamW8bit

    params = parameters([(100 + k % 40, 77) for k in range(tensors)])
    begin = time.perf_counter()
    if name == "AdamW8bit":
        AdamW8bit(params, lr=1e-4, min_8bit_size=0).step()
    elif name == "AdamW8bit, in a graph":
        torch.compile(AdamW8bit(params, lr=1e-4, min_8bit_size=0).step, fullgraph=True)()
    else:
        torch.compile(torch.optim.AdamW(params, lr=1e-4).step)()
    print(time.perf_counter() - begin)


def first_steps(tensors: int, limit: int) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name in ("AdamW8bit", "AdamW8bit, in a graph", "torch AdamW, compiled"):
        with tempfile.TemporaryDirectory() as cache:
            env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
            command = [sys.executable, "-W", "ignore", __file__, "--first-step", name, str(tensors)]
            try:
                run = subprocess.run(
                    command, env=env, capture_output=True, text=True, check=True, timeout=limit
                )
            except subprocess.TimeoutExpired:
                found[name] = None
            else:
                found[name] = float(run.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.json"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300, help="seconds that a first step may take")
    parser.add_argument("--first-step", nargs=2, metavar=("NAME", "TENSORS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.first_step:
        return first_step(args.first_step[0], int(args.first_step[1]))
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "threads": args.threads,
        "steps": {}, "first steps": {},
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for elements in ELEMENTS:
        found["steps"][elements] = times(elements, args.rounds if elements < 1 << 26 else 5)
        print(elements, {name: round(ms, 3) for name, ms in found["steps"][elements].items()}, flush=True)
    for tensors in TENSORS:
        found["first steps"][tensors] = first_steps(tensors, args.limit)
        print(tensors, found["first steps"][tensors], flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

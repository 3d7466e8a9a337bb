"""Time a step of every algorithm, with 8-bit and with float32 states, beside bitsandbytes' and torch's.

    python benchmarks/families.py  --elements 16777216  --rounds 11

All take turns on one tensor of their own on the CPU; the table has medians in milliseconds. torch's are those
of `torch.optim`, fused where it has that and foreach elsewhere, with states of the weights' dtype. `--fast`
leaves bitsandbytes out, whose steps take up to half a second.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import bnb_compile.optim

ARGUMENTS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "LAMB": {},
    "AdEMAMix": {},
    "Lion": {},
    "SGD": dict(lr=1e-3, momentum=0.9),
    "LARS": dict(lr=1e-3, momentum=0.9),
    "RMSprop": {},
    "Adagrad": {},
    "Adan": {},
}


def contenders(name: str, fast: bool) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Columns of the table: classes with their arguments."""
    arguments = ARGUMENTS[name]
    yield "8 bits", getattr(bnb_compile.optim, f"{name}8bit"), arguments
    yield "float32 states", getattr(bnb_compile.optim, f"{name}32bit"), arguments
    if not fast:
        import bitsandbytes

        if hasattr(bitsandbytes.optim, f"{name}8bit"):
            yield "bitsandbytes, 8 bits", getattr(bitsandbytes.optim, f"{name}8bit"), arguments
    if hasattr(torch.optim, name):
        fused = name in ("AdamW", "SGD", "Adagrad")
        yield "torch", getattr(torch.optim, name), {**arguments, "fused" if fused else "foreach": True}


def medians(name: str, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of a step."""
    steps = {}
    for column, cls, arguments in contenders(name, args.fast):
        param = nn.Parameter(torch.randn(args.elements).to(dtype))
        param.grad = torch.randn(args.elements).to(dtype)
        steps[column] = cls([param], **arguments).step
    times: dict[str, list[float]] = {column: [] for column in steps}
    for _ in range(args.rounds + 2):
        for column, step in steps.items():
            begin = time.perf_counter()
            step()
            times[column].append(1e3 * (time.perf_counter() - begin))
    return {column: statistics.median(of[2:]) for column, of in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--fast", action="store_true", help="without bitsandbytes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    columns = ["8 bits", "float32 states", "bitsandbytes, 8 bits", "torch"]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.elements:,} elements")
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\n| {str(dtype).removeprefix('torch.')} | {' | '.join(columns)} | 8 bits, of AdamW's |")
        print("|---|" + "--:|" * (len(columns) + 1))
        of_adamw = None
        for name in ARGUMENTS:
            found = medians(name, args, dtype)
            of_adamw = of_adamw or found["8 bits"]
            cells = [f"{found[column]:.1f}" if column in found else "" for column in columns]
            print(f"| {name} | {' | '.join(cells)} | {found['8 bits'] / of_adamw:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Time the optimizers of examples/own_optimizer.py beside the same formulas written by hand.

    python benchmarks/own_optimizer.py  --elements 16777216

By hand means torch's foreach functions on float32 states, as they stand and compiled by `torch.compile`. All
take turns on parameters of their own; the table has medians in milliseconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import own_optimizer as own

LR, DECAY = 1e-3, 0.01
List = list[Tensor]


def tiger(params: List, grads: List, states: list[List], step: Tensor) -> None:
    (mean,) = states
    torch._foreach_lerp_(mean, grads, 1 - 0.965)
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_add_(params, torch._foreach_sign(mean), alpha=-LR)


def cautious_lion(params: List, grads: List, states: list[List], step: Tensor) -> None:
    (mean,) = states
    update = torch._foreach_sign(torch._foreach_lerp(mean, grads, 1 - 0.9))
    agrees = [u * g > 0 for u, g in zip(update, grads)]
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_add_(params, torch._foreach_mul(update, agrees), alpha=-LR)
    torch._foreach_lerp_(mean, grads, 1 - 0.99)


def _moments(grads: List, mean: List, square: List) -> None:
    torch._foreach_lerp_(mean, grads, 1 - 0.9)
    torch._foreach_mul_(square, 0.999)
    torch._foreach_addcmul_(square, grads, grads, 1 - 0.999)


def grams(params: List, grads: List, states: list[List], step: Tensor) -> None:
    mean, square = states
    _moments(grads, mean, square)
    root = (1 - 0.999**step).sqrt()
    below = torch._foreach_sqrt(square)
    torch._foreach_add_(below, 1e-8)
    size = torch._foreach_div(torch._foreach_abs(mean), below)
    torch._foreach_mul_(size, torch._foreach_sign(grads))
    torch._foreach_mul_(size, LR * root / (1 - 0.9**step))
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_sub_(params, size)


def adopt(params: List, grads: List, states: list[List], step: Tensor) -> None:
    mean, square = states
    below = torch._foreach_sqrt(square)
    torch._foreach_maximum_(below, 1e-6)
    scaled = torch._foreach_div(grads, below)
    limit = step**0.25
    scaled = [x.clamp(-limit, limit) for x in scaled]
    torch._foreach_lerp_(mean, scaled, 1 - 0.9)
    torch._foreach_mul_(params, 1 - LR * DECAY)
    torch._foreach_add_(params, mean, alpha=-LR)
    torch._foreach_mul_(square, 0.9999)
    torch._foreach_addcmul_(square, grads, grads, 1 - 0.9999)


def schedule_free(params: List, grads: List, states: list[List], step: Tensor) -> None:
    z, square = states
    torch._foreach_mul_(square, 0.999)
    torch._foreach_addcmul_(square, grads, grads, 1 - 0.999)
    below = torch._foreach_sqrt(square)
    torch._foreach_div_(below, (1 - 0.999**step).sqrt())
    torch._foreach_add_(below, 1e-8)
    update = torch._foreach_div(grads, below)
    torch._foreach_add_(update, params, alpha=DECAY)
    torch._foreach_lerp_(params, z, 1 / float(step))
    torch._foreach_add_(params, update, alpha=LR * (0.9 * (1 - 1 / float(step)) - 1))
    torch._foreach_add_(z, update, alpha=-LR)


BY_HAND: dict[str, tuple[Callable[..., None], int]] = {
    "Tiger": (tiger, 1),
    "CautiousLion": (cautious_lion, 1),
    "Grams": (grams, 2),
    "ADOPT": (adopt, 2),
    "ScheduleFreeAdamW": (schedule_free, 2),
}


def by_hand(function: Callable[..., None], states: int, elements: int, compiled: bool) -> Callable[[], None]:
    """A step of one tensor; its number is a tensor, so that nothing is compiled again."""
    params = [torch.randn(elements)]
    grads = [torch.randn(elements) * 0.01]
    held = [[torch.rand(elements) * 1e-4] for _ in range(states)]
    step = torch.tensor(10.0)
    run = torch.compile(function) if compiled else function
    return lambda: run(params, grads, held, step)


def of_ours(name: str, elements: int, states: str) -> Callable[[], Any]:
    param = nn.Parameter(torch.randn(elements))
    param.grad = torch.randn(elements) * 0.01
    return getattr(own, name)([param], lr=LR, weight_decay=DECAY, states=states).step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch._dynamo.config.capture_scalar_outputs = True
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.elements:,} elements\n")
    print("| | foreach | compiled foreach | ours, float32 states | ours, dynamic8 |\n|---|--:|--:|--:|--:|")
    for name, (function, states) in BY_HAND.items():
        steps = [
            by_hand(function, states, args.elements, compiled=False),
            by_hand(function, states, args.elements, compiled=True),
            of_ours(name, args.elements, "float32"),
            of_ours(name, args.elements, "dynamic8"),
        ]
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(args.rounds + 2):
            for step, of in zip(steps, times):
                begin = time.perf_counter()
                step()
                of.append(1e3 * (time.perf_counter() - begin))
        cells = " | ".join(f"{statistics.median(of[2:]):.1f}" for of in times)
        print(f"| {name} | {cells} |", flush=True)


if __name__ == "__main__":
    main()

"""Time the 8-bit step of every algorithm beside bitsandbytes', in one process.

    python benchmarks/families.py  --elements 16777216  --rounds 15

The two take turns on one float32 tensor on the CPU; the table has medians in milliseconds and their ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from torch import nn

import bnb_compile.optim

ARGUMENTS = {
    "AdamW8bit": {},
    "LAMB8bit": {},
    "AdEMAMix8bit": {},
    "Lion8bit": {},
    "SGD8bit": dict(lr=1e-3, momentum=0.9),
    "LARS8bit": dict(lr=1e-3, momentum=0.9),
    "RMSprop8bit": {},
    "Adagrad8bit": {},
    "Adan8bit": {},
}


def milliseconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import bitsandbytes

    versions = f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads")
    print("| 8 bits | ours | bitsandbytes | ratio |\n|---|--:|--:|--:|")
    for name, arguments in ARGUMENTS.items():
        optimizers = []
        for module in (bnb_compile.optim, bitsandbytes.optim):
            if hasattr(module, name):
                param = nn.Parameter(torch.randn(args.elements))
                param.grad = torch.randn(args.elements)
                optimizers.append(getattr(module, name)([param], **arguments))
        times = [[milliseconds(optimizer) for optimizer in optimizers] for _ in range(args.rounds + 3)][3:]
        medians = [statistics.median(column) for column in zip(*times)]
        theirs = f"{medians[1]:.0f} | {medians[1] / medians[0]:.0f}" if len(medians) > 1 else "– | –"
        print(f"| {name} | {medians[0]:.1f} | {theirs} |", flush=True)


if __name__ == "__main__":
    main()

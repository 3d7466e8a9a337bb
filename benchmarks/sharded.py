"""Time the eager step of many small DTensors beside that of ordinary tensors: what the host does.

    python benchmarks/sharded.py

One process, a mesh of one, float32 parameters of 8 x 256 elements and one thread, so that the kernels take
little; medians of rounds in which the optimizers take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import bnb_compile as bnb


def parameters(count: int, make: Callable[[torch.Tensor], torch.Tensor]) -> list[nn.Parameter]:
    """Parameters with gradients, of tensors that `make` is given."""
    params = [nn.Parameter(make(torch.randn(8, 256))) for _ in range(count)]
    for param in params:
        param.grad = make(torch.randn(8, 256))
    return params


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=31)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        mesh = init_device_mesh("cpu", (1,))
        kinds = {"plain": lambda x: x, "DTensor": lambda x: distribute_tensor(x, mesh, [Shard(0)])}
        optimizers = {
            "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=False),
            "torch AdamW, foreach": lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
            "AdamW32bit": lambda params: bnb.optim.AdamW32bit(params, lr=1e-3),
            "AdamW8bit": lambda params: bnb.optim.AdamW8bit(params, lr=1e-3, min_8bit_size=0),
        }
        made = {
            (name, kind): make(parameters(args.count, distribute))
            for name, make in optimizers.items()
            for kind, distribute in kinds.items()
        }
        times: dict[tuple[str, str], list[float]] = {key: [] for key in made}
        for turn in range(args.rounds + 3):
            for key, optimizer in made.items():
                begin = time.perf_counter()
                optimizer.step()
                if turn >= 3:
                    times[key].append(1e3 * (time.perf_counter() - begin))
        print(f"ms for a step of {args.count} parameters, torch {torch.__version__}")
        print("| optimizer | plain | DTensor | ratio |\n|---|--:|--:|--:|")
        for name in optimizers:
            plain, sharded = (statistics.median(times[name, kind]) for kind in kinds)
            print(f"| {name} | {plain:.2f} | {sharded:.2f} | {sharded / plain:.2f} |")
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

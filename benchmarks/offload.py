"""What an optimizer on the host has to do: gradients arrive in chunks, in bfloat16, and weights leave.

    make offload                      or, where deepspeed is installed,
    python benchmarks/offload.py      --elements 67108864 --chunk 4194304 --threads 2

For each chunk its gradient is copied into the buffer where it would arrive, the optimizer takes a step of the
chunk, and the weights are in bfloat16 afterwards, ready to be sent. An optimizer with float32 weights keeps
the bfloat16 ones beside them; ours rounds bfloat16 weights stochastically. A table of the median time of all
chunks, in turns, and of what the host holds for a parameter.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnb_compile.optim import AdamW


class Job:
    """The weights of one optimizer in chunks.

    Args:
        make: Makes the optimizer.
        chunks: Number of chunks.
        size: Elements in each.
        dtype: Of the weights that are optimized.
    """

    def __init__(self, make: Callable[..., Any], chunks: int, size: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter((torch.randn(size) * 0.02).to(dtype)) for _ in range(chunks)]
        self.sent = [
            param.detach() if dtype == torch.bfloat16 else param.detach().bfloat16() for param in self.params
        ]
        self.arrived = torch.empty(size, dtype=torch.bfloat16)
        self.grad = self.arrived if dtype == torch.bfloat16 else torch.empty(size, dtype=dtype)
        self.opt = make(self.params, lr=1e-4, weight_decay=0.01)

    def run(self, gradients: list[Tensor]) -> None:
        """Take a step of all chunks, one after another."""
        for k, (param, sent) in enumerate(zip(self.params, self.sent)):
            self.arrived.copy_(gradients[k % len(gradients)])
            if self.grad is not self.arrived:
                self.grad.copy_(self.arrived)
            param.grad = self.grad
            self.opt.step()
            param.grad = None
            if sent.dtype != param.dtype:
                sent.copy_(param.detach())

    def bytes_per_parameter(self) -> float:
        """Of weights, of their copies, and of states; without the buffers of a chunk."""
        held = {}
        states = [x for state in self.opt.state.values() for x in state.values() if isinstance(x, Tensor)]
        for x in [*self.params, *self.sent, *states]:
            if x.numel() > 1:  # counts of steps are not of a parameter
                held[x.data_ptr()] = x.numel() * x.element_size()
        return sum(held.values()) / sum(param.numel() for param in self.params)


def jobs() -> Iterator[tuple[str, Callable[..., Any], torch.dtype]]:
    for states in ("dynamic8", "ratio8", "ratio4_8"):
        make = partial(AdamW, states=states, bf16_stochastic_round=True)
        yield f"ours, {states}, bfloat16 weights", make, torch.bfloat16
    yield "ours, dynamic8, float32 weights", partial(AdamW, states="dynamic8"), torch.float32
    yield "ours, float32 states and weights", partial(AdamW, states="float32"), torch.float32
    yield "torch fused, float32 weights", partial(torch.optim.AdamW, fused=True), torch.float32
    yield "torch fused, bfloat16 weights and states", partial(torch.optim.AdamW, fused=True), torch.bfloat16
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam
    except ImportError:
        print("deepspeed is not installed", file=sys.stderr)
    else:
        yield "DeepSpeed CPUAdam, float32 weights", partial(DeepSpeedCPUAdam, adamw_mode=True), torch.float32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--chunk", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    chunks = args.elements // args.chunk
    gradients = [(torch.randn(args.chunk) * 1e-3).bfloat16() for _ in range(2)]
    made = {name: Job(make, chunks, args.chunk, dtype) for name, make, dtype in jobs()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(args.rounds + 2):
        for name, job in made.items():
            begin = time.perf_counter()
            job.run(gradients)
            times[name].append(1e3 * (time.perf_counter() - begin))
    print(f"torch {torch.__version__}, {args.threads} threads, {chunks} chunks of {args.chunk:,} elements\n")
    print("| | ms | beside torch fused, float32 | bytes a parameter on the host |\n|---|--:|--:|--:|")
    medians = {name: statistics.median(of[2:]) for name, of in times.items()}
    for name, ms in medians.items():
        ratio = ms / medians["torch fused, float32 weights"]
        print(f"| {name} | {ms:.0f} | {ratio:.2f} | {made[name].bytes_per_parameter():.2f} |")


if __name__ == "__main__":
    main()

"""Time one optimizer step, side by side with torch, bitsandbytes and torchao in one process.

    make bench                        or, with the peers installed,
    python benchmarks/step.py         --only ours,fused  --rounds 21  --device cpu|cuda

The optimizers take turns, so that a busy moment of the machine hits all of them; the table has medians, and
their ratios to ``torch.optim.AdamW(fused=True)``. With ``--beside 1`` a process copies memory meanwhile, as
on a machine where more cores share a channel: ``--threads 1 --beside 1 --no-first-step``. A second table has
the cold and warm first step and what a step allocates beyond what it keeps, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import torch

SHAPES = {
    "1 x 16.8M": [(4096, 4096)],
    "200 x 80,000": [(200, 400)] * 200,
    "300 x 16": [(16,)] * 300,
    "3,000 x 16": [(16,)] * 3000,
}
GPU_SHAPES = {
    "1.3e9 in an LLM's shapes": [(50304, 2048)]
    + 24 * [(6144, 2048), (2048, 2048), (8192, 2048), (2048, 8192), (2048,), (2048,)],
    "GPT-2 small, 148 tensors": [(50257, 768), (1024, 768), (768,), (768,)]
    + 12 * [(2304, 768), (2304,), (768, 768), (768,), (3072, 768), (3072,), (768, 3072), *[(768,)] * 5],
    "3,000 LoRA tensors": [(8, 4096), (4096, 8)] * 1500,
}
COLD = {
    "300 tensors of 40 shapes": [(100 + i % 40, 77) for i in range(300)],
    "3,000 tensors of 40 shapes": [(100 + i % 40, 77) for i in range(3000)],
    "1 x 16.8M": [(4096, 4096)],
}


def ours(params, **kwargs):
    from bnb_compile.optim import AdamW8bit

    return AdamW8bit(params, min_8bit_size=0, **kwargs)


def ours_32bit(params, **kwargs):
    from bnb_compile.optim import AdamW32bit

    return AdamW32bit(params, **kwargs)


def fused(params, **kwargs):
    return torch.optim.AdamW(params, fused=True, **kwargs)


def bitsandbytes(params, **kwargs):
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(params, min_8bit_size=0, **kwargs)


def ours_ratio8(params, **kwargs):
    from bnb_compile.optim import AdamW

    return AdamW(params, states="ratio8", min_8bit_size=0, **kwargs)


def torchao(params, **kwargs):
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **kwargs)


OPTIMIZERS: dict[str, Callable] = {
    "fused": fused,
    "ours": ours,
    "ours_32bit": ours_32bit,
    "ours_ratio8": ours_ratio8,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
}


def parameters(shapes, device):
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(shape):
        return (torch.randn(shape, generator=generator, device=device) * 0.02).to(dtype)

    params = [torch.nn.Parameter(normal(shape)) for shape in shapes]
    for param in params:
        param.grad = normal(param.shape)
    return params


_COPY = """
import torch
torch.set_num_threads(1)
source, target = torch.zeros(2, 1 << 26)
while True:
    target.copy_(source)
"""


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """Processes that read and write memory as fast as a core can."""
    processes = [subprocess.Popen([sys.executable, "-c", _COPY]) for _ in range(count)]
    try:
        time.sleep(3 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()


def milliseconds(step, device) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def table(names: list[str], rounds: int, device: str) -> None:
    print(f"{'ms per step, median':24}" + "".join(f"{name:>20}" for name in names))
    for label, shapes in (GPU_SHAPES if device == "cuda" else SHAPES).items():
        steps = {}
        for name in names:
            optimizer = OPTIMIZERS[name](parameters(shapes, device), lr=1e-3, weight_decay=0.01)
            optimizer.step()
            steps[name] = optimizer.step
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(milliseconds(step, device))
        median = {name: statistics.median(ts) for name, ts in times.items()}
        reference = median.get("fused", float("nan"))
        cells = (f"{ms:11.2f} ({ms / reference:5.2f}x)" for ms in median.values())
        print(f"{label:24}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def copy_bandwidth() -> float:
    """Bytes per second that a plain copy on the GPU reads and writes."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [milliseconds(lambda: target.copy_(source), "cuda") for _ in range(11)]
    return 2 * source.numel() / statistics.median(times) * 1e3


def first_step(name: str, label: str, device: str) -> None:
    """Run in a process of its own: the first step with its imports, then what another step allocates."""
    params = parameters(COLD[label], device)
    start = time.perf_counter()
    optimizer = OPTIMIZERS[name](params, lr=1e-3, weight_decay=0.01)
    optimizer.step()
    seconds = time.perf_counter() - start
    peak = extra_peak(optimizer.step, device)
    print(json.dumps({"seconds": seconds, "peak_mb": peak / 1e6}))


def extra_peak(step, device: str) -> float:
    """Bytes that a step holds at its peak beyond what was allocated before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as prof:
        step()
    held = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def first_steps(names: list[str], device: str) -> None:
    print(
        f"\n{'first step: cold s / warm s / MB allocated in a step':56}" + "".join(f"{n:>24}" for n in names)
    )
    for label in COLD:
        cells = []
        for name in names:
            with tempfile.TemporaryDirectory() as cache:
                env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                command = [sys.executable, __file__, "--first-step", name, label, "--device", device]
                runs = [
                    json.loads(
                        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
                    )
                    for _ in range(2)
                ]
            cold, warm = (run["seconds"] for run in runs)
            cells.append(f"{cold:6.1f} /{warm:6.1f} /{runs[1]['peak_mb']:7.2f}")
        print(f"{label:56}" + "".join(f"{cell:>24}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(OPTIMIZERS), help="comma-separated names")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--beside", type=int, default=0, help="processes that copy memory meanwhile")
    parser.add_argument("--no-first-step", action="store_true", help="only the first table")
    parser.add_argument("--first-step", nargs=2, metavar=("NAME", "LABEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.first_step:
        return first_step(*args.first_step, args.device)
    names = args.only.split(",")
    besides = f", beside {args.beside} that copy" if args.beside else ""
    print(f"torch {torch.__version__}, {args.threads} threads, {args.device}, {args.rounds} rounds{besides}")
    if args.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, bfloat16, a copy moves {copy_bandwidth() / 1e12:.2f} TB/s")
    with beside(args.beside):
        table(names, args.rounds, args.device)
    if not args.no_first_step:
        first_steps([name for name in names if name in ("fused", "ours")], args.device)


if __name__ == "__main__":
    main()

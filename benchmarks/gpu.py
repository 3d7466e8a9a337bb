"""All that a GPU must show, in one command of at most eight minutes: checks, times, memory, variants.

    python benchmarks/gpu.py                 writes runs/gpu.jsonl and runs/gpu.md
    python benchmarks/gpu.py --rehearse      without a GPU: tiny sizes, steps under Triton's interpreter

Each part is a process of its own, and its results are written before the next begins; one that fails or takes
too long is noted, and stops no other. `--parts steps,train` runs some. bitsandbytes and torchao take part
where they are installed. Nothing here uses managed memory.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

#: A process that rehearses; and then the device.
REHEARSED = os.environ.get("BNB_COMPILE_REHEARSED") == "1"
DEVICE = "cpu" if REHEARSED else "cuda"
SECONDS = 480

Row = dict[str, Any]


def synchronize() -> None:
    if not REHEARSED:
        torch.cuda.synchronize()


def milliseconds(run: Callable[[], Any], rounds: int = 15, warm: int = 3) -> float:
    """Median time on the device, of runs that are each waited for."""
    if REHEARSED:
        rounds, warm = 1, 1
    for _ in range(warm):
        run()
    synchronize()
    times = []
    for _ in range(rounds):
        if REHEARSED:
            begin = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def uncompiled() -> int:
    """How many of our steps ran as the eager reference, which no time here must be of."""
    from bnb_compile import backends

    return backends.counts["operator"] + backends.counts["fallback"]


def peak(run: Callable[[], Any]) -> int:
    """Bytes that a run holds at its peak beyond what there was."""
    if REHEARSED:
        run()
        return 0
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def parameters(numel: int, dtype: torch.dtype) -> list[nn.Parameter]:
    """Tensors of a language model's shapes with about `numel` elements, with gradients."""
    width = 64 if REHEARSED else 2048
    of_layer = [
        (3 * width, width),
        (width, width),
        (4 * width, width),
        (width, 4 * width),
        (width,),
        (width,),
    ]
    elements = sum(torch.Size(shape).numel() for shape in of_layer)
    shapes = of_layer[:2] if REHEARSED else of_layer * max(1, numel // elements)
    params = [nn.Parameter(torch.randn(s, device=DEVICE, dtype=dtype) * 0.02) for s in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return params


def optimizers(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[list[nn.Parameter]], Any]]]:
    """AdamW in all its forms, by name; each is made when it is wanted."""
    from bnb_compile import optim
    from bnb_compile.formats import FORMATS

    least = dict(min_8bit_size=1) if REHEARSED else {}
    for states in FORMATS:
        yield f"ours, {states}", lambda p, s=states: optim.AdamW(p, states=s, **least)
    if dtype == torch.bfloat16:
        yield (
            "ours, ratio8, stochastic rounding",
            lambda p: optim.AdamW(p, states="ratio8", bf16_stochastic_round=True, **least),
        )
    yield "torch fused", lambda p: torch.optim.AdamW(p, fused=True)
    yield "torch foreach", lambda p: torch.optim.AdamW(p, foreach=True)
    for package in ("bitsandbytes", "torchao"):
        yield f"{package} AdamW8bit", lambda p, n=package: importlib.import_module(f"{n}.optim").AdamW8bit(p)


# -- parts: each yields rows ---------------------------------------------------------------------------------


def device() -> Iterator[Row]:
    """What this is measured on, and how fast it copies."""
    row: Row = dict(
        date=datetime.date.today().isoformat(), python=platform.python_version(), torch=torch.__version__
    )
    for package in ("triton", "bitsandbytes", "torchao"):
        try:
            row[package] = importlib.import_module(package).__version__
        except Exception as error:
            row[package] = f"none ({type(error).__name__})"
    size = 1 << 16 if REHEARSED else 1 << 31
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    row["copy GB/s"] = round(2 * size / milliseconds(lambda: target.copy_(source)) / 1e6)
    row["name"] = "rehearsed" if REHEARSED else torch.cuda.get_device_name()
    if not REHEARSED:
        row["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    yield row


def tests() -> Iterator[Row]:
    """The tests that wait for a GPU."""
    chosen = ["tests/test_triton.py", "-k", "mars"] if REHEARSED else ["tests/test_gpu.py", "-m", "gpu"]
    command = [sys.executable, "-m", "pytest", *chosen, "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    print(run.stdout[-4000:], run.stderr[-2000:], file=sys.stderr)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.M)
    yield dict(result=(run.stdout.strip().splitlines() or ["nothing was printed"])[-1], failed=failed)


def steps() -> Iterator[Row]:
    """A step of AdamW: every format, and the others'."""
    sizes = (10**8, 10**9)
    for numel, dtype in itertools.product(sizes, (torch.bfloat16, torch.float32)):
        params = parameters(numel, dtype)
        count = sum(param.numel() for param in params)
        for name, make in optimizers(dtype):
            # torchao compiles each tensor, and torch's foreach holds copies.
            if numel > sizes[0] and name.startswith(("torchao", "torch foreach")):
                continue
            row = dict(optimizer=name, dtype=str(dtype).removeprefix("torch."), elements=count)
            try:
                opt = make(params)
                ms = milliseconds(opt.step)
                row |= dict(ms=round(ms, 3), transient_mb=round(peak(opt.step) / 1e6, 1))
                row["uncompiled"] = uncompiled()
                del opt
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
            yield row


def family() -> Iterator[Row]:
    """A step of each algorithm, with 8 and 32 bits, beside bitsandbytes' of the same name."""
    from bnb_compile import optim

    names = ["AdamW", "LAMB", "AdEMAMix", "Lion", "SGD", "LARS", "RMSprop", "Adagrad", "Adan"]
    params = parameters(10**8, torch.bfloat16)
    for name in names:
        own = dict(lr=1e-3, momentum=0.9) if name in ("SGD", "LARS") else {}
        row: Row = dict(algorithm=name, elements=sum(param.numel() for param in params))
        for bits in (8, 32):
            for label, module in (("ours", optim), ("bitsandbytes", "bitsandbytes.optim")):
                try:
                    of = importlib.import_module(module) if isinstance(module, str) else module
                    opt = getattr(of, f"{name}{bits}bit")(params, **own)
                    row[f"{label}, {bits} bits"] = round(milliseconds(opt.step), 3)
                    del opt
                except Exception as error:
                    row[f"{label}, {bits} bits"] = type(error).__name__
        row["uncompiled"] = uncompiled()
        yield row


def host() -> Iterator[Row]:
    """Time of the host for many small tensors, and the launches of a step."""
    from torch.profiler import ProfilerActivity, profile

    from bnb_compile.optim import AdamW8bit

    count = 3 if REHEARSED else 300
    params = [nn.Parameter(torch.randn(16, device=DEVICE)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn_like(param)
    makers = {"ours": AdamW8bit, "torch fused": lambda p: torch.optim.AdamW(p, fused=True)}
    for name, make in makers.items():
        opt = make(params)
        for _ in range(3):
            opt.step()
        synchronize()
        times = []
        for _ in range(3 if REHEARSED else 50):
            begin = time.perf_counter()
            opt.step()
            times.append(1e6 * (time.perf_counter() - begin))
            synchronize()
        row: Row = dict(optimizer=name, tensors=count, host_us=round(statistics.median(times), 1))
        if not REHEARSED:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                opt.step()
                synchronize()
            kernels = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
            row["launches"] = len(kernels)
        yield row


def _gpt() -> tuple[nn.Module, Tensor, Tensor]:
    from gpt import GPT, Size

    torch.manual_seed(0)
    size = Size(layers=2, width=64, context=32) if REHEARSED else Size(layers=12, width=1024, context=512)
    model = GPT(size).to(DEVICE, torch.bfloat16)
    x, y = torch.randint(256, (2, 2 if REHEARSED else 16, size.context), device=DEVICE)
    return model, x, y


def train() -> Iterator[Row]:
    """A train step of a GPT: one graph with ours; the others' steps after a compiled backward pass."""
    from gpt import loss_of

    from bnb_compile import optim

    torch._dynamo.config.trace_autograd_ops = True
    for name, mode in (
        ("ours, one graph", None),
        ("ours, one graph, reduce-overhead", "reduce-overhead"),
        ("ours, one graph, released gradients", None),
        ("ours, ratio8, one graph", None),
        ("torch fused", None),
        ("bitsandbytes AdamW8bit", None),
    ):
        torch._dynamo.reset()
        if REHEARSED and mode:
            continue  # there are no CUDA graphs
        try:
            model, x, y = _gpt()
            if name.startswith("ours"):
                states = "ratio8" if "ratio8" in name else "dynamic8"
                opt = optim.AdamW(model.parameters(), states=states, release_gradients="released" in name)
            elif name == "torch fused":
                opt = torch.optim.AdamW(model.parameters(), fused=True)
            else:
                opt = importlib.import_module("bitsandbytes.optim").AdamW8bit(model.parameters())

            def loss_and_gradients(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = loss_of(model, x, y)
                loss.backward()
                return loss.detach()

            def whole(opt: Any = opt, before: Callable[[], Tensor] = loss_and_gradients) -> Tensor:
                loss = before()
                opt.step()
                opt.zero_grad()
                return loss

            if name.startswith("ours"):
                step = torch.compile(whole, fullgraph=True, mode=mode)
            else:
                compiled = torch.compile(loss_and_gradients, fullgraph=True)

                def step(opt: Any = opt, compiled: Callable[[], Tensor] = compiled) -> Tensor:
                    return whole(opt, compiled)

            begin = time.perf_counter()
            step()
            synchronize()
            row: Row = dict(train_step=name, parameters=sum(p.numel() for p in model.parameters()))
            row["first_s"] = round(time.perf_counter() - begin, 1)
            row |= dict(ms=round(milliseconds(step), 2), peak_mb=round(peak(step) / 1e6, 1))
            row["loss"] = round(float(step()), 4)
        except Exception as error:
            row = dict(train_step=name, error=f"{type(error).__name__}: {error}"[:300])
        yield row


def variants() -> Iterator[Row]:
    """How many blocks a program takes, warps, and the encoder without NVIDIA's instructions."""
    for tile, warps, fast in [(8, 4, 1), (4, 4, 1), (16, 4, 1), (4, 2, 1), (8, 8, 1), (16, 8, 1), (8, 4, 0)]:
        for states in ("dynamic8", "ratio8"):
            row: Row = dict(states=states, blocks=tile, warps=warps, nvidia_instructions=bool(fast))
            run = _child("variant", states, str(tile), str(warps), str(fast), limit=60)
            try:
                row["ms"] = json.loads(run.stdout.strip().splitlines()[-1])
            except (IndexError, json.JSONDecodeError):
                row["error"] = run.stderr[-200:]
            yield row
        if REHEARSED:
            return


def variant(states: str, tile: str, warps: str, fast: str) -> None:
    """Print the time of a step of one variant, in a process that has printed no kernel yet."""
    from bnb_compile.lowering.triton import source

    source.TILE, source.WARPS = int(tile), int(warps)  # before plan.py and graph.py are imported
    source.COMPILE["num_warps"] = int(warps)
    if fast == "0":
        source.has_fast_instructions = lambda device: False
    from bnb_compile.optim import AdamW

    opt = AdamW(parameters(10**8, torch.bfloat16), states=states, min_8bit_size=1)
    print(json.dumps(round(milliseconds(opt.step), 3)))


#: With the seconds that each may take.
PARTS: dict[Callable[[], Iterator[Row]], int] = {
    device: 40, tests: 240, steps: 120, host: 40, train: 150, family: 60, variants: 150
}  # fmt: skip


# -- all of it -----------------------------------------------------------------------------------------------


def _child(*args: str, limit: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit, cwd=ROOT)
    except subprocess.TimeoutExpired as error:
        found, said = (x.decode() if isinstance(x, bytes) else x or "" for x in (error.stdout, error.stderr))
        return subprocess.CompletedProcess(command, 124, found, f"{said}\ntook more than {limit:.0f} s")


def child(name: str, args: list[str]) -> None:
    """What runs in a process of its own: a part, of which each row is printed at once."""
    if REHEARSED and name != "train":  # whose graph is for the CPU
        from bnb_compile.devices import BACKENDS

        BACKENDS["cpu"] = BACKENDS["cuda"]
    if name == "variant":
        return variant(*args)
    (part,) = (part for part in PARTS if part.__name__ == name)
    for row in part():
        print(json.dumps(row), flush=True)


def tables(rows: list[Row]) -> Iterator[str]:
    """The results as Markdown."""
    for name, of_part in itertools.groupby(rows, lambda row: row["part"]):
        found = [{k: v for k, v in row.items() if k != "part"} for row in of_part]
        columns = list(dict.fromkeys(key for row in found for key in row))
        yield f"\n## {name}\n"
        yield "| " + " | ".join(columns) + " |"
        yield "|" + "---|" * len(columns)
        for row in found:
            yield "| " + " | ".join(str(row.get(key, "")).replace("|", "/") for key in columns) + " |"


def main() -> None:
    names = [part.__name__ for part in PARTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.jsonl"), help="file of results")
    parser.add_argument("--parts", default=",".join(names), help=f"of {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, on tiny sizes")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], args.child[1:])
    wanted = args.parts.split(",")
    if not set(wanted) <= set(names):
        parser.error(f"--parts {args.parts}: must be of {', '.join(names)}")
    if args.rehearse:
        os.environ |= {"BNB_COMPILE_REHEARSED": "1", "TRITON_INTERPRET": "1"}
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --rehearse runs without one")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("")
    begin, rows = time.perf_counter(), []
    for part, limit in PARTS.items():
        if part.__name__ not in wanted:
            continue
        left = SECONDS - (time.perf_counter() - begin)
        limit = 1800 if args.rehearse else min(limit, left)
        if limit < 10:
            run = subprocess.CompletedProcess([], 1, "", "no time was left")
        else:
            run = _child(part.__name__, limit=limit)
        found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        if run.returncode:
            found.append(dict(error=f"exit {run.returncode}: {run.stderr.strip()[-300:]}"))
        rows += [dict(part=part.__name__, **row) for row in found]
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
        args.out.with_suffix(".md").write_text("\n".join(tables(rows)) + "\n")
        print(f"{part.__name__}: {len(found)} rows, {time.perf_counter() - begin:.0f} s", flush=True)
        if run.returncode or part is tests:
            print(run.stderr[-3000:], file=sys.stderr)
    print(args.out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()

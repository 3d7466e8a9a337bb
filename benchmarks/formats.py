"""How near each format of optimizer states is to float32, in displacement and in training.

    python benchmarks/formats.py displacement            # a table in minutes
    python benchmarks/formats.py train --tasks gpt       # hours; goes on where it was stopped
    python benchmarks/formats.py report                  # both as tables, and a picture

`displacement` runs AdamW with the compiled kernels beside float64 on made gradients: how far the parameters
are from where they would be, relative to how far they have gone; the largest step of any element, in learning
rates; and the sum of the second moments over what it should be. `train` trains small models with the same
weights and batches for every format, and `report` gives the difference of the validation loss from float32's,
paired by seed, with its standard error. Each finished part is a line of --out. `--quick` is a form of
minutes. torchao's optimizers take part where it is installed, and FlashOptim's (on the CPU, too) with
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnb_compile import convert
from bnb_compile.optim import AdamW

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

OURS = ("float32", "dynamic8", "dynamic8sr", "float8", "ratio8", "ratio4_8", "ratio4")
PEERS = ("torchao 8", "torchao fp8", "torchao 4", "FlashOptim")
BLOCK = 256


def optimizer(name: str, groups: Any, **options: Any) -> torch.optim.Optimizer:
    """AdamW with its states in a format, or a peer's."""
    if name in OURS:
        return AdamW(groups, states=name, min_8bit_size=1024, **options)
    if name == "FlashOptim":
        from interpreted_flashoptim import FlashAdamW

        options.pop("bf16_stochastic_round", None)  # it keeps 24 bits of such weights instead
        return FlashAdamW(groups, **options)
    import torchao.optim

    kind = {"8": "AdamW8bit", "fp8": "AdamWFp8", "4": "AdamW4bit"}[name.removeprefix("torchao ")]
    return getattr(torchao.optim, kind)(groups, **options)


# -- displacement --------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Gradients of one kind."""

    name: str
    kind: str
    beta2: float = 0.999
    scale: float = 1e-3


CASES = [
    *(Case(kind, kind) for kind in ("iid", "mean", "t2", "log4", "sparse", "rows", "drift")),
    Case("rows, beta2 .95", "rows", 0.95),
    Case("iid at 1e-6", "iid", scale=1e-6),
    Case("iid at 1e-10", "iid", scale=1e-10),
]


class Gradients:
    """The gradients of a step for every kind, ``(blocks, BLOCK)`` each, of scale 1."""

    def __init__(self, blocks: int, steps: int) -> None:
        self.size, self.half = (blocks, BLOCK), steps // 2
        self.generator = torch.Generator().manual_seed(1)
        self.decades = 10 ** (-4 * torch.rand(self.size, generator=self.generator))
        self.activity = torch.logspace(0, -2.5, 8).repeat_interleave(32)
        quarter = torch.arange(BLOCK) % 4
        self.drifted = torch.where(quarter == 0, 10.0, torch.where(quarter == 1, 0.1, 1.0))

    def __call__(self, step: int) -> dict[str, Tensor]:
        """Those of a step, counted from 1; steps must be taken in turn."""

        def normal() -> Tensor:
            return torch.randn(self.size, generator=self.generator)

        def uniform(*size: int) -> Tensor:
            return torch.rand(*size, generator=self.generator)

        n = normal()
        chi_squared = (normal().square() + normal().square()) / 2
        active = uniform(self.size[0], 8).repeat_interleave(32, 1) < self.activity
        return {
            "iid": n,
            "mean": 1 + 0.3 * n,
            "t2": n / chi_squared.sqrt(),
            "log4": n * self.decades,
            "sparse": n * (uniform(*self.size) < 0.1),
            "rows": n * active,
            "drift": n * (self.drifted if step > self.half else 1.0),
        }


def displacement(name: str, blocks: int, steps: int) -> dict[str, dict[str, float]]:
    """For each case: `error`, `worst` step, and `ratio` of the second moments' sum."""
    groups = [
        dict(
            params=[nn.Parameter(torch.zeros(blocks, BLOCK))],
            betas=(0.9, case.beta2),
            eps=1e-6 * case.scale,  # so that every scale is the same problem
        )
        for case in CASES
    ]
    params = [group["params"][0] for group in groups]
    opt = optimizer(name, groups, lr=1.0, weight_decay=0.0)
    exact = [torch.zeros(3, blocks, BLOCK, dtype=torch.float64) for _ in CASES]  # place, both moments
    worst = [0.0] * len(CASES)
    gradients = Gradients(blocks, steps)
    for step in range(1, steps + 1):
        of_kind = gradients(step)
        before = [param.detach().clone() for param in params]
        for case, param, (place, mean, square) in zip(CASES, params, exact):
            param.grad = of_kind[case.kind] * case.scale
            grad = param.grad.double()
            mean.lerp_(grad, 1 - 0.9)
            square.lerp_(grad.square(), 1 - case.beta2)
            root = (square / (1 - case.beta2**step)).sqrt() + 1e-6 * case.scale
            place.sub_(mean / (1 - 0.9**step) / root)
        opt.step()
        for k, (param, old) in enumerate(zip(params, before)):
            worst[k] = max(worst[k], (param.detach() - old).abs().max().item())
    found = {}
    squares = _second_moments(opt, params)
    for k, case in enumerate(CASES):
        place, _, square = exact[k]
        error = (params[k].detach() - place).norm() / place.norm()
        found[case.name] = {
            "error": error.item(),
            "worst": worst[k],
            "ratio": (squares[k].double().sum() / square.sum()).item(),
        }
    return found


def _second_moments(opt: torch.optim.Optimizer, params: list[nn.Parameter]) -> list[Tensor]:
    if isinstance(opt, AdamW):
        states = convert.to_torch(opt)["state"]
        return [states[k]["exp_avg_sq"] for k in range(len(params))]
    if hasattr(opt, "second_moment"):  # FlashOptim's
        return [opt.second_moment(param) for param in params]
    squares = (opt.state[param]["exp_avg_sq"] for param in params)
    return [x.dequantize() if hasattr(x, "dequantize") else x for x in squares]


# -- training ------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """Something to train.

    Attributes:
        make: Makes the model, from torch's global generator.
        data: ``quick -> (batch, validation)``: a function of a generator that gives a batch, and the
            arguments of the validation loss.
        loss: ``(model, *batch) -> loss``.
        options: Of the optimizer.
        dtype: Of the weights.
    """

    make: Callable[[bool], nn.Module]
    data: Callable[[bool], tuple[Callable[[torch.Generator], tuple], tuple]]
    loss: Callable[..., Tensor]
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32


def _text_data(quick: bool) -> tuple[Callable[[torch.Generator], tuple], tuple]:
    from text import read_text, windows

    training, validation = read_text(None, 10_000)
    context, batch = 64, 4 if quick else 8

    def draw(generator: torch.Generator) -> tuple:
        return windows(
            training, torch.randint(len(training) - context, (batch,), generator=generator), context
        )

    places = torch.linspace(0, len(validation) - context - 1, 64 if quick else 256, dtype=torch.float64)
    return draw, windows(validation, places.long(), context)


def _gpt(quick: bool) -> nn.Module:
    from gpt import GPT, Size

    return GPT(Size(layers=2, width=64, context=64) if quick else Size(context=64))


def _text_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


def _digits(quick: bool) -> tuple[Callable[[torch.Generator], tuple], tuple]:
    from sklearn.datasets import load_digits

    images, labels = (torch.tensor(x) for x in load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]

    def draw(generator: torch.Generator) -> tuple:
        chosen = torch.randint(1400, (64,), generator=generator)
        # Moved by a pixel, so that 1,400 images last.
        moved = torch.roll(images[chosen], tuple(torch.randint(-1, 2, (2,), generator=generator)), (2, 3))
        return moved, labels[chosen]

    return draw, (images[1400:], labels[1400:])


def _convolutions(quick: bool) -> nn.Module:
    width = 32 if quick else 96
    layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.GELU()]
    for _ in range(3):
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))


def _label_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), y)


def _word_data(quick: bool) -> tuple[Callable[[torch.Generator], tuple], tuple]:
    """The next byte from the last four words' hashes: rare rows of a large embedding."""
    from text import read_text

    def hashed(text: Tensor) -> tuple[Tensor, Tensor]:
        bytes_ = text.long()
        grams = torch.stack([bytes_[k : len(bytes_) - 5 + k] for k in range(5)])
        keys = []
        for length in (1, 2, 3, 4):
            key = torch.zeros_like(grams[0])
            for k in range(5 - length, 5):
                key = (key * 1_000_003 + grams[k] + 1) % 2_147_483_647
            keys.append(key % 16_384 + 16_384 * (length - 1))
        return torch.stack(keys, 1)[:-1], bytes_[5:-1]

    training, validation = (hashed(text[:2_000_000]) for text in read_text(None, 10_000))

    def draw(generator: torch.Generator) -> tuple:
        chosen = torch.randint(len(training[1]), (256,), generator=generator)
        return training[0][chosen], training[1][chosen]

    return draw, tuple(x[:: max(1, len(x) // 8192)][:8192] for x in validation)


class _Words(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(65_536, width)
        nn.init.normal_(self.rows.weight, std=0.02)
        self.out = nn.Sequential(nn.Linear(4 * width, 256), nn.GELU(), nn.Linear(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rows(x).flatten(1))


TASKS = {
    "gpt": Task(_gpt, _text_data, _text_loss, {}),
    "gpt, beta2 .95": Task(_gpt, _text_data, _text_loss, {"betas": (0.9, 0.95)}),
    "gpt, bf16 weights": Task(
        _gpt, _text_data, _text_loss, {"bf16_stochastic_round": True}, dtype=torch.bfloat16
    ),
    "digits": Task(_convolutions, _digits, _label_loss, {}),
    "embedding": Task(lambda quick: _Words(32 if quick else 48), _word_data, _label_loss, {}),
}


def train(task: Task, name: str, seed: int, steps: int, quick: bool) -> dict[str, Any]:
    """Train once: the mean of the last five evaluations of the validation loss, and the curve."""
    torch.manual_seed(seed)
    model = task.make(quick).to(task.dtype)
    draw, validation = task.data(quick)
    opt = optimizer(name, model.parameters(), lr=2e-3, weight_decay=0.1, **task.options)
    generator = torch.Generator().manual_seed(seed)
    floating = [x.to(task.dtype) if x.is_floating_point() else x for x in validation]
    curve = []
    for step in range(steps):
        warmup = max(1, steps // 20)
        share = (step + 1) / warmup if step < warmup else 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in opt.param_groups:
            if isinstance(group["lr"], Tensor):  # torchao's
                group["lr"].fill_(2e-3 * share)
            else:
                group["lr"] = 2e-3 * share
        batch = [x.to(task.dtype) if x.is_floating_point() else x for x in draw(generator)]
        task.loss(model, *batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        if (step + 1) % max(1, steps // 20) == 0:
            with torch.no_grad():
                curve.append(task.loss(model, *floating).item())
    parameters = sum(p.numel() for p in model.parameters())
    return {"loss": sum(curve[-5:]) / 5, "curve": curve, "parameters": parameters}


# -- time ----------------------------------------------------------------------------------------------------


def step_times(names: list[str], numel: int) -> dict[str, float]:
    """Median milliseconds of a step of one tensor, in turns."""
    opts = {}
    for name in names:
        param = nn.Parameter(torch.randn(numel))
        param.grad = torch.randn(numel) * 0.01
        opts[name] = optimizer(name, [param])
    taken: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(15):
        for name, opt in opts.items():
            begin = time.perf_counter()
            opt.step()
            taken[name].append(1e3 * (time.perf_counter() - begin))
    return {name: sorted(times[3:])[len(times[3:]) // 2] for name, times in taken.items()}


# -- results -------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def report(path: Path) -> Iterator[str]:
    results = read(path)
    moved = {r["format"]: r for r in results if r["part"] == "displacement"}
    if moved:
        some = next(iter(moved.values()))
        yield f"\nDisplacement, {some['steps']} steps, {some['elements']} elements a case\n"
        for key in ("error", "worst", "ratio"):
            yield f"\n| {key} | " + " | ".join(case.name for case in CASES) + " |"
            yield "|---|" + "--:|" * len(CASES)
            for name, result in moved.items():
                cells = " | ".join(f"{result['cases'][case.name][key]:.3g}" for case in CASES)
                yield f"| {name} | {cells} |"
    trained = [r for r in results if r["part"] == "train"]
    timed = [r for r in results if r["part"] == "time"]
    ms = timed[-1]["ms"] if timed else {}
    for task in dict.fromkeys(r["task"] for r in trained):
        of_task = [r for r in trained if r["task"] == task]
        base = {r["seed"]: r["loss"] for r in of_task if r["format"] == "float32"}
        some = of_task[0]
        yield f"\n{task}: {some['parameters']:,} parameters, {some['steps']} steps\n"
        yield "| format | seeds | loss | difference from float32 | standard error | a step, see below, ms |"
        yield "|---|--:|--:|--:|--:|--:|"
        for name in dict.fromkeys(r["format"] for r in of_task):
            own = {r["seed"]: r["loss"] for r in of_task if r["format"] == name}
            paired = torch.tensor([own[s] - base[s] for s in own if s in base], dtype=torch.float64)
            loss = sum(own.values()) / len(own)
            difference = f"{paired.mean().item():+.4f}" if len(paired) else ""
            spread = f"{paired.std().item() / math.sqrt(len(paired)):.4f}" if len(paired) > 1 else ""
            step = f"{ms[name]:.1f}" if name in ms else ""
            yield f"| {name} | {len(own)} | {loss:.4f} | {difference} | {spread} | {step} |"
    for result in timed:
        threads = result["threads"]
        yield f"\nA step of {result['elements']:,} elements, threads: {threads}; milliseconds\n"
        yield from (f"- {name}: {taken:.2f}" for name, taken in result["ms"].items())


def plot(path: Path) -> None:
    """Curves of the validation loss beside float32's, a panel for each task."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    trained = [r for r in read(path) if r["part"] == "train"]
    tasks = list(dict.fromkeys(r["task"] for r in trained))
    if not tasks:
        return
    figure, axes = pyplot.subplots(1, len(tasks), figsize=(6 * len(tasks), 4), squeeze=False)
    for axis, task in zip(axes[0], tasks):
        of_task = [r for r in trained if r["task"] == task]
        base = {r["seed"]: torch.tensor(r["curve"]) for r in of_task if r["format"] == "float32"}
        for name in dict.fromkeys(r["format"] for r in of_task):
            own = [
                torch.tensor(r["curve"]) - base[r["seed"]]
                for r in of_task
                if r["format"] == name and r["seed"] in base
            ]
            if own and name != "float32":
                places = torch.linspace(0.05, 1, len(own[0])) * of_task[0]["steps"]
                axis.plot(places, torch.stack(own).mean(0), label=name)
        axis.axhline(0, color="gray", linewidth=1)
        axis.set(title=task, xlabel="steps", ylabel="validation loss less float32's")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="*", default=["displacement", "train", "time", "report"])
    parser.add_argument("--out", type=Path, default=Path("runs/formats.jsonl"), help="file of results")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--formats", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="2,000 by default")
    parser.add_argument("--blocks", type=int, default=64, help="blocks of 256 elements in a case")
    parser.add_argument("--quick", action="store_true", help="small models, few steps and two seeds")
    args = parser.parse_args()
    steps = args.steps or (200 if args.quick else 2000)
    seeds = min(args.seeds, 2) if args.quick else args.seeds
    known = read(args.out)

    def missing(**wanted: Any) -> bool:
        return not any(all(r.get(k) == v for k, v in wanted.items()) for r in known)

    def attempt(what: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
        if not missing(**what):
            return
        begin = time.perf_counter()
        try:
            result = {**what, **run(), "seconds": round(time.perf_counter() - begin, 1)}
        except (ImportError, RuntimeError, NotImplementedError) as error:  # a peer that does not run here
            print(f"{what} left out: {type(error).__name__}: {error}"[:300], file=sys.stderr)
            return
        write(args.out, result)
        print(json.dumps({k: v for k, v in result.items() if k not in ("curve", "cases")}), flush=True)

    if "displacement" in args.what:
        for name in args.formats:
            blocks = 16 if args.quick else args.blocks  # 4,096: torchao quantises no fewer
            attempt(
                dict(part="displacement", format=name, steps=steps, elements=blocks * BLOCK),
                lambda name=name, blocks=blocks: {"cases": displacement(name, blocks, steps)},
            )
    if "time" in args.what:
        numel, threads = 2**18 if args.quick else 2**24, torch.get_num_threads()
        what = dict(part="time", elements=numel, threads=threads)
        peers = importlib.util.find_spec("torchao") is not None
        timed = [f for f in args.formats if f in OURS or (peers and f != "FlashOptim")]  # not an interpreter
        attempt(what, lambda: {"ms": step_times(timed, numel)})
    if "train" in args.what:
        for seed in range(seeds):
            for task in args.tasks:
                for name in args.formats:
                    what = dict(
                        part="train", task=task, format=name, seed=seed, steps=steps, quick=args.quick
                    )
                    attempt(
                        what,
                        lambda *a, w=what: train(TASKS[w["task"]], w["format"], w["seed"], steps, args.quick),
                    )
    if "report" in args.what:
        print("\n".join(report(args.out)))
        plot(args.out)


if __name__ == "__main__":
    main()

"""Train a small GPT with 32-bit and with 8-bit AdamW, and compare them.

Both runs start from the same weights and see the same batches. Without --data the text is the source code
of Python's standard library. `train_step` below is all that a training loop needs to use the package.
"""

import argparse
import copy
import math
import os
import pickle
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, Size, loss_of
from report import measure_compilation, measure_optimizer, plot, table
from text import read_text, windows
from torch import Tensor, nn
from torch._dynamo.utils import clear_compilation_metrics
from tqdm import tqdm

import bnb_compile

SIZE = Size()
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "torch": partial(torch.optim.AdamW, fused=True),
    "8bit": bnb_compile.optim.AdamW8bit,
}
TITLES = {"torch": "torch AdamW", "8bit": "AdamW8bit"}
WINDOWS = 32  # that a loss is evaluated on


# A training step


def compile_step(model: nn.Module, opt: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that takes a batch, trains on it and returns the loss."""
    params = list(model.parameters())

    def gradients(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        return loss.detach()

    @torch.compile(fullgraph=True)
    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = gradients(x, y)
        opt.step()
        opt.zero_grad()
        return loss

    if not isinstance(opt, torch.optim.AdamW):
        return train_step

    # The step of torch's fused AdamW would break the graph, so it runs after the compiled region.
    compiled_gradients = torch.compile(gradients, fullgraph=True)

    def train_step_in_two(x: Tensor, y: Tensor) -> Tensor:
        loss = compiled_gradients(x, y)
        opt.step()
        opt.zero_grad()
        return loss

    return train_step_in_two


def warmup_cosine(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first twentieth of the steps, then down to a tenth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


# A run


class Run:
    """A model in training, and everything that its checkpoint holds.

    Args:
        name: Of the optimizer, a key of `OPTIMIZERS`.
        args: The command line.
        settings: What a run that continues this one must have in common with it.
    """

    def __init__(self, name: str, args: argparse.Namespace, settings: dict[str, Any]) -> None:
        torch.manual_seed(args.seed)
        self.name, self.settings, self.device = name, settings, args.device
        self.path = args.out / f"{name}.pt"
        self.batch_size, self.steps = args.batch_size, args.steps
        self.model = GPT(SIZE).to(args.device)
        self.opt = OPTIMIZERS[name](self.model.parameters(), lr=args.lr, weight_decay=0.1)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.opt, partial(warmup_cosine, steps=args.steps))
        self.batches = torch.Generator().manual_seed(args.seed)
        self.losses: list[float] = []  # of each step
        self.validation: dict[int, float] = {}  # by the number of steps before it
        self.result: dict[str, float] = {}  # measured when all steps are done

    def next_batch(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets at random places of a text."""
        starts = torch.randint(len(text) - SIZE.context, (self.batch_size,), generator=self.batches)
        x, y = windows(text, starts, SIZE.context)
        return x.to(self.device), y.to(self.device)

    @torch.no_grad()
    def evaluate(self, text: Tensor) -> float:
        """Mean loss on windows spread evenly over a text."""
        starts = torch.linspace(0, len(text) - SIZE.context - 1, WINDOWS, dtype=torch.float64).long()
        x, y = windows(text, starts, SIZE.context)
        return loss_of(self.model, x.to(self.device), y.to(self.device)).item()

    def validate(self, text: Tensor) -> None:
        """Note the loss on the validation text."""
        loss = self.evaluate(text)
        self.check_finite("validation loss", loss)
        self.validation[len(self.losses)] = loss

    def save(self) -> None:
        """Write the checkpoint; whenever this is cut short, the file is the old or the new one."""
        temporary = self.path.with_suffix(".tmp")
        torch.save(
            {
                "settings": self.settings,
                "model": self.model.state_dict(),
                "opt": self.opt.state_dict(),
                "schedule": self.schedule.state_dict(),
                "batches": self.batches.get_state(),
                "losses": self.losses,
                "validation": self.validation,
                "result": self.result,
            },
            temporary,
        )
        os.replace(temporary, self.path)

    def load(self) -> None:
        """Continue where the checkpoint was saved."""
        try:
            saved = torch.load(self.path, weights_only=True)
            settings = saved["settings"]
        except (EOFError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} is not a checkpoint of this script") from error
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(f"{self.path} was saved with {name} {settings.get(name)}, not {value}")
        self.model.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["opt"])
        self.schedule.load_state_dict(saved["schedule"])
        self.batches.set_state(saved["batches"])
        self.losses, self.validation = saved["losses"], saved["validation"]
        self.result = saved["result"]

    def check_finite(self, what: str, loss: float) -> None:
        """End the program if a loss is not finite."""
        if not math.isfinite(loss):
            sys.exit(f"{what} is {loss} at step {len(self.losses)}; the last good checkpoint is {self.path}")


# Lets Dynamo trace loss.backward().
@torch._dynamo.config.patch(trace_autograd_ops=True)
def train(run: Run, training: Tensor, validation: Tensor, interrupted: threading.Event) -> None:
    """Take the steps that are left, or those until an interrupt.

    Ten times in a run the model is validated and, if that loss is finite, saved.
    """
    from torch._inductor.utils import run_and_get_code  # imported here because it takes seconds

    train_step = compile_step(run.model, run.opt)
    clear_compilation_metrics()
    code: list[str] | None = None  # of the compiled region
    tokens = run.batch_size * SIZE.context
    with tqdm(
        desc=f"{TITLES[run.name]:11}",
        total=run.steps * tokens,
        initial=len(run.losses) * tokens,
        unit="tok",
        unit_scale=True,
        postfix="compiling",
    ) as bar:
        while len(run.losses) < run.steps and not interrupted.is_set():
            if len(run.losses) % max(1, run.steps // 10) == 0:
                run.validate(validation)
                run.save()
            x, y = run.next_batch(training)
            if code is None:  # the first step compiles
                loss, code = run_and_get_code(train_step, x, y)
            else:
                loss = train_step(x, y)
            run.losses.append(loss.item())
            run.check_finite("loss", run.losses[-1])
            run.schedule.step()
            bar.set_postfix_str(f"loss {run.losses[-1]:.3f}", refresh=False)
            bar.update(tokens)
    if len(run.losses) == run.steps:
        run.validate(validation)
        run.result = measure(run, training, validation, code)
    run.save()


def measure(run: Run, training: Tensor, validation: Tensor, code: list[str]) -> dict[str, float]:
    """The column of a finished run in the table; `code` is what Inductor made of its step."""
    compilation = measure_compilation()
    # The optimizer is timed on a copy, with the gradients of one more batch.
    model, opt = copy.deepcopy((run.model, run.opt))
    loss_of(model, *run.next_batch(training)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    losses = {"training loss": run.evaluate(training), "validation loss": run.evaluate(validation)}
    return losses | measure_optimizer(opt, code) | compilation


# The command


class Parser(argparse.ArgumentParser):
    """A parser whose errors take one line."""

    def error(self, message: str) -> None:
        """Say what is wrong and exit."""
        self.exit(2, f"train.py: error: {message}\n")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    convert.__name__ = kind.__name__  # argparse names it when `kind` fails
    return convert


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="your own text, a file or a folder")
    parser.add_argument("--steps", type=positive(int), default=500)
    parser.add_argument("--batch-size", type=positive(int), default=4)
    parser.add_argument("--lr", type=positive(float), default=2e-3, help="the highest of the schedule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=["both", *OPTIMIZERS], default="both")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/train"), help="folder for checkpoints and plot"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoints in --out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return parser


def prepare(args: argparse.Namespace) -> tuple[list[Run], Tensor, Tensor]:
    """The runs that the command line asks for, and their text."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine or this torch has no CUDA")
    training, validation = read_text(args.data, least=SIZE.context + 1)
    settings = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "seed")}
    settings |= {"size": list(SIZE), "text": zlib.crc32(training.numpy())}
    args.out.mkdir(parents=True, exist_ok=True)
    names = OPTIMIZERS if args.optimizer == "both" else [args.optimizer]
    runs = [Run(name, args, settings) for name in names]
    if args.resume:
        found = [run for run in runs if run.path.exists()]
        if not found:
            raise ValueError(f"--resume: no checkpoint in {args.out}")
        for run in found:
            run.load()
    return runs, training, validation


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Set an event at the first Ctrl-C, so that no step is left half done; the second one kills."""
    event = threading.Event()

    def request(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, usual)
        print("\nstopping after this step; Ctrl-C again stops at once, without saving", file=sys.stderr)

    usual = signal.signal(signal.SIGINT, request)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, usual)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        runs, training, validation = prepare(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = sum(p.numel() for p in runs[0].model.parameters())
    print(f"{count:,} parameters, {len(training):,} bytes to train on, {len(validation):,} to validate on")
    with deferred_interrupt() as interrupted:
        for run in runs:
            if not run.result:
                train(run, training, validation, interrupted)
            if interrupted.is_set():
                print(
                    f"stopped at step {len(run.losses)}, saved in {run.path}; "
                    "the same command with --resume continues",
                    file=sys.stderr,
                )
                return 130
    print(table({TITLES[run.name]: run.result for run in runs}))
    plot({TITLES[run.name]: (run.losses, run.validation) for run in runs}, args.out / "loss.png")
    print("(compiling takes less time where Inductor's cache on disk already has some of the code)")
    print(f"loss curves: {args.out / 'loss.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

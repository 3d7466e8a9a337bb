"""Full fine-tuning in 4.1 bytes a parameter: bfloat16 weights, 8-bit states, gradients that never all exist.

    make finetune
    python examples/finetune.py --data TEXT --model DIR --out DIR

The first trains a GPT of 302 million parameters on the source code of Python's standard library, with six
optimizers, and measures what each holds in memory. With --data a user's text is trained on instead, and with
--model a Hugging Face checkpoint (needs transformers) is fine-tuned, by our optimizer alone.

`train_step` is all that a training loop needs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, Size, loss_of
from memory import expected_bytes, peak_of, plot, state_bytes, table
from text import read_text, windows
from torch import Tensor, nn
from tqdm import tqdm

from bnb_compile.optim import AdamW8bit
from bnb_compile.state.portions import SHARE

#: 302 million parameters.
SIZE = Size(layers=24, width=1024, heads=16, context=96)
BATCH = 1
LR = 3e-5


def ours(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """What this example is about."""
    return AdamW8bit(model.parameters(), lr=LR, weight_decay=0.01, bf16_stochastic_round=True, **options)


def bitsandbytes(model: nn.Module) -> torch.optim.Optimizer:
    """The 8-bit AdamW of bitsandbytes."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR, weight_decay=0.01)


def torchao(model: nn.Module) -> torch.optim.Optimizer:
    """The 8-bit AdamW of torchao."""
    from torchao.optim import AdamW8bit

    return AdamW8bit(model.parameters(), lr=LR, weight_decay=0.01, bf16_stochastic_round=True)


def fused(model: nn.Module) -> torch.optim.Optimizer:
    """The fused AdamW of torch."""
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)


#: Title: the weights' dtype, whether the train step is one graph, and the optimizer.
OPTIMIZERS: dict[str, tuple[torch.dtype, bool, Callable[[nn.Module], torch.optim.Optimizer]]] = {
    "torch AdamW, float32": (torch.float32, False, fused),
    "torch AdamW, bfloat16": (torch.bfloat16, False, fused),
    "bitsandbytes AdamW8bit": (torch.bfloat16, False, bitsandbytes),
    "torchao AdamW8bit": (torch.bfloat16, False, torchao),
    "ours": (torch.bfloat16, True, ours),
    "ours, releasing": (torch.bfloat16, True, partial(ours, release_gradients=True)),
}


def compile_step(model: nn.Module, optimizer: torch.optim.Optimizer, graph: bool) -> Callable[..., Tensor]:
    """The function that trains on a batch and returns the loss."""

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return torch.compile(train_step, fullgraph=True) if graph else train_step


def compare_one(title: str, data: Path | None, steps: int) -> dict[str, Any]:
    """Train with one optimizer; returns its losses, seconds of a step, and bytes by category."""
    torch.manual_seed(0)
    torch._dynamo.config.trace_autograd_ops = True
    dtype, graph, make = OPTIMIZERS[title]
    model = GPT(SIZE).to(dtype)
    optimizer = make(model)
    step = compile_step(model, optimizer, graph)
    text, _ = read_text(data, least=2 * SIZE.context)
    starts = torch.randint(
        len(text) - SIZE.context, (steps + 1, BATCH), generator=torch.Generator().manual_seed(0)
    )
    losses, times = [], []
    for of_step in tqdm(starts[:steps], desc=f"{title:24}", leave=True):
        begin = time.perf_counter()
        losses.append(step(*windows(text, of_step, SIZE.context)).item())
        times.append(time.perf_counter() - begin)
    params = list(model.parameters())
    peak = peak_of(
        lambda: step(*windows(text, starts[steps], SIZE.context)), params, lambda: state_bytes(optimizer)
    )
    seconds = sorted(times[2:])[len(times[2:]) // 2]  # the first ones compile, and create states
    return {"losses": losses, "seconds": seconds, "peak": peak, "numel": sum(p.numel() for p in params)}


def compare(args: argparse.Namespace) -> None:
    """Train with every optimizer, each in a process of its own; print a table and draw a picture."""
    rows = {}
    for title in args.only or OPTIMIZERS:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [
                sys.executable,
                __file__,
                "--steps",
                str(args.steps),
                "--one",
                title,
                "--out",
                str(result),
            ]
            command += ["--data", str(args.data)] if args.data else []
            subprocess.run(command, check=True)
            rows[title] = json.loads(result.read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    numel = next(iter(rows.values()))["numel"]
    text = table(rows, numel)
    print(f"\n{numel / 1e6:.0f} million parameters, {args.steps} steps of {BATCH} x {SIZE.context} bytes")
    print(f"\n{text}")
    (args.out / "finetune.md").write_text(text + "\n")
    (args.out / "finetune.json").write_text(json.dumps(rows) + "\n")
    plot(rows, args.out / "finetune.png")
    print(f"\n{args.out / 'finetune.png'}")


def finetune(args: argparse.Namespace) -> None:
    """Fine-tune a checkpoint, layer by layer: gradients are used, and freed, by hooks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    needs = expected_bytes(model, SHARE)
    print(", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in needs.items()), end=", ")
    print(f"together {sum(needs.values()) / 1e9:.2f} GB, and the activations of a layer", flush=True)
    if args.data is None:
        raise SystemExit("--model needs --data: the text to train on")
    tokens = tokenizer(args.data.read_text(), return_tensors="pt").input_ids[0]
    if len(tokens) <= args.context:
        raise SystemExit(f"{args.data} has {len(tokens)} tokens, must be more than --context {args.context}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = AdamW8bit(
        model.parameters(), lr=args.lr, weight_decay=0.01, bf16_stochastic_round=True, release_gradients=True
    )
    generator = torch.Generator().manual_seed(0)
    progress = tqdm(range(args.steps))
    for _ in progress:
        starts = torch.randint(len(tokens) - args.context, (args.batch, 1), generator=generator)
        x = tokens[starts + torch.arange(args.context)].to(device)
        loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(args.out)


def main() -> None:
    """Read the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, help="a text file, or a folder of them")
    parser.add_argument("--model", type=Path, help="a Hugging Face checkpoint to fine-tune")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="*", choices=OPTIMIZERS, help="optimizers to compare")
    parser.add_argument("--lr", type=float, default=1e-5, help="with --model")
    parser.add_argument("--context", type=int, default=512, help="tokens, with --model")
    parser.add_argument("--batch", type=int, default=1, help="with --model")
    parser.add_argument("--one", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(compare_one(args.one, args.data, args.steps)))
    elif args.model:
        finetune(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()

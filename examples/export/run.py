"""Train a small GPT from C++ with no Python: export, package, build, train, and compare with Python.

    make export
    make export ARGS="--steps 500 --out /tmp/export"

The training step (forward, backward, clipping and 8-bit AdamW) is packaged with AOTInductor; train.cpp runs the
package, is fed batches and a learning-rate schedule from a file, stops half way, resumes from what it saved,
and saves again. The same steps are taken in Python eagerly, under torch.compile, and with the package.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from gpt import GPT, Size, loss_of  # noqa: E402
from text import read_text  # noqa: E402

from bnb_compile.export import TrainStep, load, package  # noqa: E402
from bnb_compile.optim import AdamW8bit  # noqa: E402

SIZE = Size(layers=2, width=64, heads=2, context=64)
BATCH = 8
LR = 5e-3
WARMUP = 10  # steps
#: Allowed between compiled and eager Python after 100 steps, see `relative_error`.
TOLERANCE = 0.02

Run = Callable[..., Tensor]  # (hyper, *batch) -> loss


class Result(NamedTuple):
    """Of one way to train."""

    losses: list[float]
    milliseconds: list[float]
    state: dict[str, Tensor]  # of the `TrainStep`


def make_step() -> TrainStep:
    """The same model and optimizer at every call."""
    torch.manual_seed(0)
    model = GPT(SIZE)
    return TrainStep(model, loss_of, AdamW8bit(model.parameters(), lr=LR, max_grad_norm=1.0))


def make_data(step: TrainStep, steps: int) -> dict[str, Tensor]:
    """Arguments of all steps by the names that the package has for them."""
    at = torch.arange(steps, dtype=torch.float64)
    decay = (1 + torch.cos(torch.pi * at / steps)) / 2
    hyper = step.hyper().repeat(steps, 1, 1)
    hyper[:, :, step.step.hyper_names.index("lr")] *= (decay * ((at + 1) / WARMUP).clamp(max=1))[:, None]
    text, _ = read_text(None, SIZE.context + 1)
    places = torch.randint(len(text) - SIZE.context, (steps, BATCH, 1)) + torch.arange(SIZE.context)
    return {"hyper": hyper, "batch[0]": text[places].long(), "batch[1]": text[places + 1].long()}


def eager(step: TrainStep) -> Run:
    """What one writes in Python."""
    optimizer = step.step.optimizer

    def run(hyper: Tensor, x: Tensor, y: Tensor) -> Tensor:
        optimizer.param_groups[0]["lr"] = hyper[0, 0].item()
        return train(x, y)

    def train(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(step.model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run


def compiled(step: TrainStep) -> Run:
    """The same, captured in one graph."""
    optimizer = step.step.optimizer

    @torch.compile(fullgraph=True)
    def train(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(step.model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def run(hyper: Tensor, x: Tensor, y: Tensor) -> Tensor:
        optimizer.param_groups[0]["lr"] = hyper[0, 0].item()
        return train(x, y)

    return run

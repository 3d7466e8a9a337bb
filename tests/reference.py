"""Plain optimizers to compare with, and the record that a `tests/opt_*.py` file fills in.

A reference keeps its states in float64 and rounds a parameter to its own dtype once a step, as the
optimizers under test must. It is called with gradients, and knows nothing of groups or checkpoints.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class AdamW:
    """Adam whose weight decay is decoupled, scaled by lr, and comes before the update.

    That is `torch.optim.AdamW`; bitsandbytes' Adam is the same with weight_decay=0 by default.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.params = [param.detach().clone() for param in params]
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = [0 for _ in self.params]
        self.states = [[torch.zeros_like(p, dtype=torch.float64) for _ in range(2)] for p in self.params]

    def step(self, grads: Sequence[Tensor | None]) -> None:
        (beta1, beta2), lr = self.betas, self.lr
        for k, (param, grad) in enumerate(zip(self.params, grads)):
            if grad is None:
                continue
            self.steps[k] += 1
            t, g, p, (m, v) = self.steps[k], grad.double(), param.double(), self.states[k]
            p *= 1 - lr * self.weight_decay
            m.mul_(beta1).add_(g, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p -= lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + self.eps)
            param.copy_(p)


@dataclass(frozen=True)
class OptTest:
    """What the tests must know of a family of optimizers."""

    name: str
    general: type  # takes optim_bits
    #: Bits of each class (None: optim_bits decides), and its defaults that are not the reference's.
    classes: dict[type, tuple[int | None, dict[str, Any]]]
    reference: Callable[..., Any]
    torch_class: type  # computes what the 32-bit classes do
    variants: tuple[dict[str, Any], ...]  # hyperparameters to try
    states: int
    invalid: tuple[tuple[dict[str, Any], str], ...]  # arguments, and what the ValueError must say
    unsupported: tuple[dict[str, Any], ...]  # arguments that must be refused, not ignored
    relative_error_8bit: float  # of 200 steps' displacement
    #: Mean absolute and relative error of a parameter after an 8-bit step, as bitsandbytes bounds them.
    step_error_8bit: dict[torch.dtype, tuple[float, float]]


def all_families() -> list[OptTest]:
    """The `TEST` of each opt_*.py here."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("opt_*.py"))
    return [importlib.import_module(name).TEST for name in names]

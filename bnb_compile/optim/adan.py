"""Adan, which bitsandbytes does not have: the worked example of "Adding an optimizer" in CONTRIBUTING.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import ADAN
from .by_name import Optimizer2State
from .family import add_family
from .options import Options

add_family(
    "adan",
    moments=2,
    rule=lambda group: ADAN,
    betas=("beta1", "beta2", "beta3"),
)


class Adan(Optimizer2State):
    """Adan, see `bnb_compile.rules.adan`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the averages of gradients, of their differences, and of squares.
        eps: Added to the root of the second moment.
        weight_decay: A parameter is divided by ``1 + lr * weight_decay`` in each step.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.98, 0.92, 0.99),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__("adan", params, lr, betas, eps, weight_decay, **options)


class Adan8bit(Adan):
    """Adan with 8-bit states."""

    bits = 8


class Adan32bit(Adan):
    """Adan with 32-bit states."""

    bits = 32

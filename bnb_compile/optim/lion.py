"""Lion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import LION
from .by_name import Optimizer1State
from .family import add_family
from .options import Options

add_family(
    "lion",
    moments=1,
    rule=lambda group: LION,
    unused=("eps",),
)


class Lion(Optimizer1State):
    """Lion, see `bnb_compile.rules.lion`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the momentum, first for the update and then for what is remembered.
        weight_decay: What is taken away of a parameter in each step, times `lr`.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-4,
        betas: Sequence[float | str] | str = (0.9, 0.99),
        weight_decay: float | str = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__("lion", params, lr, betas, 0.0, weight_decay, **options)


class Lion8bit(Lion):
    """Lion with 8-bit states."""

    bits = 8


class Lion32bit(Lion):
    """Lion with 32-bit states."""

    bits = 32


class PagedLion(Lion):
    """Lion with paged states."""

    paged = True


class PagedLion8bit(Lion8bit):
    """Lion with paged 8-bit states."""

    paged = True


class PagedLion32bit(Lion32bit):
    """Lion with paged 32-bit states."""

    paged = True

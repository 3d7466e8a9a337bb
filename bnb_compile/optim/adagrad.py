"""Adagrad."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import ADAGRAD
from .by_name import Optimizer1State
from .family import add_family
from .options import Options

add_family(
    "adagrad",
    moments=1,
    rule=lambda group: ADAGRAD,
    unused=("betas",),
    extras={"lr_decay": 0.0, "initial_accumulator_value": 0.0},
    initial=lambda group: (float(group["initial_accumulator_value"]),),
)


class Adagrad(Optimizer1State):
    """Adagrad, see `bnb_compile.rules.adagrad`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        lr_decay: Step t has the learning rate ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: Added to the gradient, times the parameter.
        initial_accumulator_value: What the sum of squares begins with.
        eps: Added to the root of the sum of squares.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-2,
        lr_decay: float | str = 0.0,
        weight_decay: float | str = 0.0,
        initial_accumulator_value: float | str = 0.0,
        eps: float | str = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        further = dict(lr_decay=lr_decay, initial_accumulator_value=initial_accumulator_value)
        super().__init__("adagrad", params, lr, (0.0, 0.0), eps, weight_decay, **further, **options)


class Adagrad8bit(Adagrad):
    """Adagrad with an 8-bit sum of squares."""

    bits = 8


class Adagrad32bit(Adagrad):
    """Adagrad with a 32-bit sum of squares."""

    bits = 32

"""ADOPT, which bitsandbytes does not have: the worked example of "Adding an optimizer" in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import ADOPT as ADOPT_RULE
from .family import Family
from .optimizer import Optimizer2State, Options


def _check(group: Mapping[str, Any]) -> None:
    if group["eps"] == 0:
        raise ValueError("Invalid epsilon value: 0, must be positive: the second moment may be zero")


Family(
    "adopt",
    moments=2,
    rule=lambda group: ADOPT_RULE,
    hyper=lambda group: (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
    check=_check,
)


class ADOPT(Optimizer2State):
    """ADOPT, see `bnb_compile.rules.adopt`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the two moments, each in ``[0, 1)``.
        eps: Least divisor of a gradient; positive.
        weight_decay: What is taken away of a parameter in each step, times `lr`.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.9999),
        eps: float | str = 1e-6,
        weight_decay: float | str = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__("adopt", params, lr, betas, eps, weight_decay, **options)


class ADOPT8bit(ADOPT):
    """ADOPT with 8-bit states."""

    bits = 8


class ADOPT32bit(ADOPT):
    """ADOPT with 32-bit states."""

    bits = 32

"""RMSprop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import RMSPROP
from .by_name import Optimizer1State
from .family import add_family
from .options import Options


def _check(group: Mapping[str, Any]) -> None:
    if group["betas"][1] and group["eps"] == 0:
        raise ValueError(
            "Invalid epsilon value: 0, must be positive with momentum: a zero gradient gives 0/0"
        )


add_family(
    "rmsprop",
    moments=1,
    rule=lambda group: RMSPROP[group["centered"], bool(group["betas"][1])],
    betas=("alpha", "momentum"),
    extras={"centered": False},
    check=_check,
)


class RMSprop(Optimizer1State):
    """RMSprop, see `bnb_compile.rules.rmsprop`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        alpha: Decay rate of the second moment, in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: Added to the gradient, times the parameter.
        momentum: Share of the buffer that a step keeps, in ``[0, 1)``; a buffer is one more state.
        centered: Whether to divide by the deviation from the mean gradient, which is one more state.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-2,
        alpha: float | str = 0.99,
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        momentum: float | str = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        betas = (alpha, momentum)
        super().__init__("rmsprop", params, lr, betas, eps, weight_decay, centered=centered, **options)


class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit states."""

    bits = 8


class RMSprop32bit(RMSprop):
    """RMSprop with 32-bit states."""

    bits = 32

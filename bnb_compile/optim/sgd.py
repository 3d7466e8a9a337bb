"""SGD with or without momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import SGD as SGD_RULE
from ..rules import SGD_PLAIN, Rule
from .by_name import Optimizer1State
from .family import add_family
from .options import Options


def rule(group: Mapping[str, Any]) -> Rule:
    """The rule without states where there is no momentum."""
    return SGD_PLAIN if group["betas"][0] == 0 else SGD_RULE


def check(group: Mapping[str, Any]) -> None:
    """Nesterov's form is defined for undampened momentum only."""
    momentum, dampening = group["betas"]
    if group["nesterov"] and (momentum == 0 or dampening != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={momentum} and dampening={dampening}"
        )


add_family(
    "momentum",
    moments=1,
    rule=rule,
    unused=("eps",),
    betas=("momentum", "dampening"),
    extras={"nesterov": False},
    check=check,
)


class SGD(Optimizer1State):
    """Stochastic gradient descent, see `bnb_compile.rules.sgd`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        momentum: Share of the buffer that a step keeps, in ``[0, 1)``; without momentum there is no state.
        dampening: Share of a gradient, after the first, that is kept out of the buffer, in ``[0, 1)``.
        weight_decay: Added to the gradient, times the parameter.
        nesterov: Whether to use Nesterov's momentum.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str,
        momentum: float | str = 0.0,
        dampening: float | str = 0.0,
        weight_decay: float | str = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        betas = (momentum, dampening)
        super().__init__("momentum", params, lr, betas, 0.0, weight_decay, nesterov=nesterov, **options)


class SGD8bit(SGD):
    """SGD with an 8-bit momentum."""

    bits = 8


class SGD32bit(SGD):
    """SGD with a 32-bit momentum."""

    bits = 32

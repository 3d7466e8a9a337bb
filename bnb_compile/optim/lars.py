"""LARS: SGD with an update that is limited by the norm of its parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from . import sgd
from .by_name import Optimizer1State
from .family import add_family
from .options import Options

add_family(
    "lars",
    moments=1,
    rule=sgd.rule,
    betas=("momentum", "dampening"),
    extras={"nesterov": False},
    check=sgd.check,
    unused=("eps",),
)


class LARS(Optimizer1State):
    """LARS, You et al., https://arxiv.org/abs/1708.03888.

    As in bitsandbytes the trust ratio is a limit: an update, before the learning rate, has at most
    `max_unorm` times the norm of its parameter.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        momentum: Share of the buffer that a step keeps, in ``[0, 1)``; without momentum there is no state.
        dampening: Share of a gradient, after the first, that is kept out of the buffer, in ``[0, 1)``.
        weight_decay: Added to the gradient, times the parameter.
        nesterov: Whether to use Nesterov's momentum.
        options: See `bnb_compile.optim.Options`; `max_unorm` is 0.02 by default.

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
        options.setdefault("max_unorm", 0.02)
        super().__init__("lars", params, lr, betas, 0.0, weight_decay, nesterov=nesterov, **options)


class LARS8bit(LARS):
    """LARS with an 8-bit momentum."""

    bits = 8


class LARS32bit(LARS):
    """LARS with a 32-bit momentum."""

    bits = 32


class PytorchLARS(LARS):
    """LARS with a 32-bit momentum in plain PyTorch operations: the reference, which compiles nothing."""

    bits = 32
    key_names = {"state1": "momentum_buffer"}

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 0.01,
        momentum: float | str = 0.0,
        dampening: float | str = 0.0,
        weight_decay: float | str = 0.0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, max_unorm=max_unorm, compile=False
        )

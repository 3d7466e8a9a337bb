"""Adam and AdamW, which in bitsandbytes and here differ in their default weight decay only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import ADAM, ADAM_AMSGRAD
from .by_name import Optimizer2State
from .family import add_family
from .options import Options

add_family(
    "adam",
    moments=2,
    rule=lambda group: ADAM_AMSGRAD if group["amsgrad"] else ADAM,
    extras={"amsgrad": False},
)


class Adam(Optimizer2State):
    """Adam with decoupled weight decay, see `bnb_compile.rules.adam`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the two moments, each in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: What is taken away of a parameter in each step, times `lr`.
        amsgrad: Whether to divide by the largest second moment so far, which is one more state.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.999),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        *,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__("adam", params, lr, betas, eps, weight_decay, amsgrad=amsgrad, **options)


class Adam8bit(Adam):
    """Adam with 8-bit states."""

    bits = 8


class Adam4bit(Adam):
    """Adam with 4-bit states: a moment has half a byte, and both together have 1.06."""

    bits = 4


class Adam32bit(Adam):
    """Adam with 32-bit states."""

    bits = 32


class PagedAdam(Adam):
    """Adam with paged states."""

    paged = True


class PagedAdam8bit(Adam8bit):
    """Adam with paged 8-bit states."""

    paged = True


class PagedAdam32bit(Adam32bit):
    """Adam with paged 32-bit states."""

    paged = True


class AdamW(Adam):
    """Adam with a weight decay of 0.01 by default."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.999),
        eps: float | str = 1e-8,
        weight_decay: float | str = 1e-2,
        *,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad=amsgrad, **options)


class AdamW8bit(AdamW):
    """AdamW with 8-bit states."""

    bits = 8


class AdamW4bit(AdamW):
    """AdamW with 4-bit states: a moment has half a byte, and both together have 1.06."""

    bits = 4


class AdamW32bit(AdamW):
    """AdamW with 32-bit states."""

    bits = 32


class PagedAdamW(AdamW):
    """AdamW with paged states."""

    paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW with paged 8-bit states."""

    paged = True


class PagedAdamW32bit(AdamW32bit):
    """AdamW with paged 32-bit states."""

    paged = True

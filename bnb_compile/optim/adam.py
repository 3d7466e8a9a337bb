"""Adam and AdamW, which in bitsandbytes and here differ in their default weight decay only."""

from __future__ import annotations

import ast
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Unpack

from ..rules import ADAM
from .optimizer import AbstractOptimizer, Options, number


class AbstractAdam(AbstractOptimizer):
    """Adam with decoupled weight decay, see `bnb_compile.rules.adam`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the two moments, each in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: Share of a parameter, times `lr`, that is taken away in each step. By default 0
            for Adam and 0.01 for AdamW.
        amsgrad: Must be False.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    rule = ADAM
    default_weight_decay: ClassVar[float]

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: tuple[float, float] | str = (0.9, 0.999),
        eps: float | str = 1e-8,
        weight_decay: float | str | None = None,
        *,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if amsgrad:
            raise ValueError(f"{type(self).__name__} does not support amsgrad=True")
        if weight_decay is None:
            weight_decay = self.default_weight_decay
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults, **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        betas = ast.literal_eval(betas) if isinstance(betas, str) else betas
        if len(betas) != 2:
            raise ValueError(f"Invalid betas: {betas}, must be two numbers")
        checked = dict(
            lr=number("learning rate", group["lr"]),
            betas=tuple(
                number(f"beta parameter at index {i}", beta, below=1.0) for i, beta in enumerate(betas)
            ),
            eps=number("epsilon value", group["eps"]),
            weight_decay=number("weight_decay value", group["weight_decay"]),
        )
        group.update(checked)

    def _hyper(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return group["lr"], *group["betas"], group["eps"], group["weight_decay"]


class Adam(AbstractAdam):
    """Adam with states of `optim_bits` bits."""

    default_weight_decay = 0.0


class Adam8bit(AbstractAdam):
    """Adam with 8-bit states."""

    default_weight_decay = 0.0
    bits = 8


class Adam32bit(AbstractAdam):
    """Adam with 32-bit states."""

    default_weight_decay = 0.0
    bits = 32


class AdamW(AbstractAdam):
    """AdamW with states of `optim_bits` bits."""

    default_weight_decay = 1e-2


class AdamW8bit(AbstractAdam):
    """AdamW with 8-bit states."""

    default_weight_decay = 1e-2
    bits = 8


class AdamW32bit(AbstractAdam):
    """AdamW with 32-bit states."""

    default_weight_decay = 1e-2
    bits = 32

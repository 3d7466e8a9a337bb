"""The two bases that take an `optimizer_name`, as bitsandbytes has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .family import FAMILIES
from .optimizer import Optimizer8bit


class _ByName(Optimizer8bit):
    """The constructor of both bases that take an `optimizer_name`."""

    moments: ClassVar[int]

    def __init__(self, optimizer_name: str, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        family = FAMILIES.get(optimizer_name)
        if family is None or family.moments != self.moments:
            names = sorted(f.name for f in FAMILIES.values() if f.moments == self.moments)
            raise ValueError(f"Unsupported optimizer name: {optimizer_name}, must be one of {names}")
        for key in family.unused:
            off = {"eps": (0.0, 1e-8), "betas": ((0.0, 0.0), (0.9, 0.0))}[key]
            if defaults[key] not in off:
                raise ValueError(f"{optimizer_name} has no {key}, got {defaults[key]}, must be {off[0]}")
        self.family = family
        super().__init__(params, defaults, **options)


class Optimizer1State(_ByName):
    """An optimizer by name that bitsandbytes keeps one state for: momentum, lars, lion, rmsprop or adagrad.

    Args:
        optimizer_name: The algorithm.
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: ``(momentum, dampening)``, ``(alpha, momentum)`` of RMSprop, both betas of Lion.
        eps: Added to the root of a second moment.
        weight_decay: Added to the gradient, times the parameter; decoupled in Lion.
        options: See `bnb_compile.optim.Options`; and hyperparameters of the algorithm, such as `nesterov`.
    """

    moments = 1

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.0),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        **options: Any,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(optimizer_name, params, defaults, **options)


class Optimizer2State(_ByName):
    """An optimizer by name that bitsandbytes keeps two states for: adam, lamb or ademamix.

    Args:
        optimizer_name: The algorithm.
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the moments, each in ``[0, 1)``; three for AdEMAMix.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled: what is taken away of a parameter, times `lr`.
        options: See `bnb_compile.optim.Options`; and hyperparameters of the algorithm, such as `amsgrad`.
    """

    moments = 2

    def __init__(
        self,
        optimizer_name: str,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.999),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        **options: Any,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(optimizer_name, params, defaults, **options)

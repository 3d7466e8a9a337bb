"""LAMB: Adam with an update that is limited by the norm of its parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import LAMB as LAMB_RULE
from ..rules import LAMB_AMSGRAD
from .by_name import Optimizer2State
from .family import add_family
from .options import Options

add_family(
    "lamb",
    moments=2,
    rule=lambda group: LAMB_AMSGRAD if group["amsgrad"] else LAMB_RULE,
    extras={"amsgrad": False, "bias_correction": True, "adam_w_mode": True},
)


class LAMB(Optimizer2State):
    """LAMB, see `bnb_compile.rules.lamb`.

    As in bitsandbytes the trust ratio is a limit: an update, before the learning rate, has at most
    `max_unorm` times the norm of its parameter.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        bias_correction: Whether the moments' bias towards zero is corrected.
        betas: Decay rates of the two moments, each in ``[0, 1)``.
        eps: Added to the root of the second moment.
        weight_decay: What is taken away of a parameter in each step, times `lr`.
        amsgrad: Whether to divide by the largest second moment so far, which is one more state.
        adam_w_mode: Whether weight decay is decoupled; otherwise it is added to the gradient.
        options: See `bnb_compile.optim.Options`; `max_unorm` is 1 by default.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        bias_correction: bool = True,
        betas: Sequence[float | str] | str = (0.9, 0.999),
        eps: float | str = 1e-8,
        weight_decay: float | str = 0.0,
        *,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        **options: Unpack[Options],
    ) -> None:
        options.setdefault("max_unorm", 1.0)
        super().__init__(
            "lamb",
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad=amsgrad,
            bias_correction=bias_correction,
            adam_w_mode=adam_w_mode,
            **options,
        )


class LAMB8bit(LAMB):
    """LAMB with 8-bit states."""

    bits = 8


class LAMB32bit(LAMB):
    """LAMB with 32-bit states."""

    bits = 32

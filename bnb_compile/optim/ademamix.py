"""AdEMAMix: Adam with a fast and a slow first moment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..rules import ADEMAMIX
from .by_name import Optimizer2State
from .family import add_family
from .options import Options


def _check(group: Mapping[str, Any]) -> None:
    if group["t_beta3"] and not (group["betas"][0] > 0 and group["betas"][2] > 0):
        raise ValueError(
            f"Invalid betas: {group['betas']}, a schedule of beta3 (t_beta3={group['t_beta3']}) needs "
            "positive betas at index 0 and 2"
        )


add_family(
    "ademamix",
    moments=2,
    rule=lambda group: ADEMAMIX,
    betas=("beta1", "beta2", "beta3"),
    extras={"alpha": 5.0, "t_alpha": None, "t_beta3": None},
    check=_check,
    numbers=((0, 2), (1,)),  # bitsandbytes keeps both first moments in one tensor with one more dimension
)


class AdEMAMix(Optimizer2State):
    """AdEMAMix, see `bnb_compile.rules.ademamix`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
        lr: Learning rate.
        betas: Decay rates of the fast first moment, the second moment and the slow first moment.
        alpha: Weight of the slow moment.
        t_alpha: Steps over which `alpha` grows from 0; None for a constant.
        t_beta3: Steps over which the slow decay rate grows from the fast one; None for a constant.
        eps: Added to the root of the second moment.
        weight_decay: What is taken away of a parameter in each step, times `lr`.
        options: See `bnb_compile.optim.Options`.

    Raises:
        ValueError: If a hyperparameter is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor | str = 1e-3,
        betas: Sequence[float | str] | str = (0.9, 0.999, 0.9999),
        alpha: float | str = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float | str = 1e-8,
        weight_decay: float | str = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        schedule = dict(alpha=alpha, t_alpha=t_alpha, t_beta3=t_beta3)
        super().__init__("ademamix", params, lr, betas, eps, weight_decay, **schedule, **options)


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit states."""

    bits = 8


class AdEMAMix32bit(AdEMAMix):
    """AdEMAMix with 32-bit states."""

    bits = 32


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix with paged states."""

    paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with paged 8-bit states."""

    paged = True


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """AdEMAMix with paged 32-bit states."""

    paged = True

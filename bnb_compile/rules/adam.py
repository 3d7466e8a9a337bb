"""Adam with decoupled weight decay.

Kingma & Ba, https://arxiv.org/abs/1412.6980; Loshchilov & Hutter, https://arxiv.org/abs/1711.05101.
The decay comes before the update and `eps` is added to the bias-corrected root, as in
``torch.optim.AdamW``; bitsandbytes' ``Adam`` and ``AdamW`` are both this, with other defaults.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .rule import Rule, State


class Hyper(NamedTuple):
    """Hyperparameters of Adam."""

    lr: Tensor
    beta1: Tensor
    beta2: Tensor
    eps: Tensor
    weight_decay: Tensor


class Scalars(NamedTuple):
    """What all elements of a parameter share in one step."""

    keep: Tensor  # what weight decay leaves of the parameter
    beta1: Tensor
    one_minus_beta1: Tensor
    beta2: Tensor
    one_minus_beta2: Tensor
    step_size: Tensor
    eps: Tensor


def _scalars(h: Hyper, step: Tensor) -> Scalars:
    correction1 = 1 - h.beta1**step
    correction2 = (1 - h.beta2**step).sqrt()
    return Scalars(
        keep=1 - h.lr * h.weight_decay,
        beta1=h.beta1,
        one_minus_beta1=1 - h.beta1,
        beta2=h.beta2,
        one_minus_beta2=1 - h.beta2,
        step_size=h.lr * correction2 / correction1,
        eps=h.eps * correction2,
    )


def _update(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars
) -> tuple[Tensor, Tensor, Tensor]:
    exp_avg = s.beta1 * exp_avg + s.one_minus_beta1 * grad
    exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * grad * grad
    param = s.keep * param - s.step_size * (exp_avg / (exp_avg_sq.sqrt() + s.eps))
    return param, exp_avg, exp_avg_sq


ADAM = Rule(
    name="adam",
    hyper=Hyper,
    states=(State("exp_avg", signed=True), State("exp_avg_sq", signed=False)),
    scalars=_scalars,
    update=_update,
)

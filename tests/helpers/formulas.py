"""Plain optimizers to compare with, and the record that a `tests/opt_*.py` file fills in.

A reference keeps its states in float64 and rounds a parameter to its own dtype once a step, as the
optimizers under test must. It is called with gradients, and knows nothing of groups or checkpoints.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Reference:
    """The loop; a subclass says what the update is.

    Weight decay is decoupled, scaled by lr and before the update, or L2: added to the gradient. An update
    whose norm, before lr and without decoupled decay, is more than `max_unorm` times its parameter's is
    scaled down to that; a parameter that is zero sets no limit.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        weight_decay: float,
        decoupled: bool,
        initial: Sequence[float],
        max_unorm: float = 0.0,
        skip_zeros: bool = False,
    ) -> None:
        self.params = [param.detach().clone() for param in params]
        self.lr, self.weight_decay, self.decoupled = lr, weight_decay, decoupled
        self.max_unorm, self.skip_zeros = max_unorm, skip_zeros
        self.steps = [0 for _ in self.params]
        self.states = [[torch.full_like(p, x, dtype=torch.float64) for x in initial] for p in self.params]

    def update(self, g: Tensor, t: int, *states: Tensor) -> tuple[Tensor, ...]:
        """What step t takes away before the learning rate, and the new states."""
        raise NotImplementedError

    def rate(self, t: int) -> float:
        """The learning rate of step t."""
        return self.lr

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for k, (param, grad) in enumerate(zip(self.params, grads)):
            if grad is None:
                continue
            self.steps[k] += 1
            p, t = param.double(), self.steps[k]
            l2, decay = (0, self.weight_decay) if self.decoupled else (self.weight_decay, 0)
            update, *states = self.update(grad.double() + l2 * p, t, *self.states[k])
            moves = (grad != 0) | (not self.skip_zeros)
            limit, norm = self.max_unorm * p.norm(), update.where(moves, 0.0).norm()
            ratio = limit / norm if 0 < limit < norm else 1.0
            new = p - self.rate(t) * decay * p - self.rate(t) * ratio * update
            param.copy_(new.where(moves, p))
            self.states[k] = [state.where(moves, old) for state, old in zip(states, self.states[k])]


class Adam(Reference):
    """`torch.optim.AdamW`; bitsandbytes' Adam is the same with weight_decay=0 by default."""

    def __init__(
        self, params, lr, betas, eps, weight_decay=0.0, amsgrad=False, decoupled=True, **options
    ) -> None:
        super().__init__(params, lr, weight_decay, decoupled, [0.0] * (2 + amsgrad), **options)
        self.betas, self.eps = betas, eps

    def corrections(self, t):
        return [1 - beta**t for beta in self.betas[:2]]

    def update(self, g, t, m, v, *largest):
        beta1, beta2 = self.betas[:2]
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = [torch.maximum(v, old) for old in largest]
        c1, c2 = self.corrections(t)
        return (m / c1) / (((largest or [v])[0] / c2).sqrt() + self.eps), m, v, *largest


class LAMB(Adam):
    """Algorithm 2 of https://arxiv.org/abs/1904.00962 with bitsandbytes' trust ratio, see `Reference`."""

    def __init__(self, params, *, bias_correction=True, adam_w_mode=True, max_unorm=1.0, **hyper) -> None:
        super().__init__(params, decoupled=adam_w_mode, max_unorm=max_unorm, **hyper)
        self.bias_correction = bias_correction

    def corrections(self, t):
        return super().corrections(t) if self.bias_correction else (1, 1)


class AdEMAMix(Reference):
    """Section 3 and the schedulers of https://arxiv.org/abs/2409.03137."""

    def __init__(
        self, params, lr, betas, alpha, eps, weight_decay=0.0, t_alpha=None, t_beta3=None, **options
    ) -> None:
        super().__init__(params, lr, weight_decay, True, [0.0] * 3, **options)
        self.betas, self.alpha, self.eps, self.t_alpha, self.t_beta3 = betas, alpha, eps, t_alpha, t_beta3

    def update(self, g, t, fast, v, slow):
        beta1, beta2, beta3 = self.betas
        alpha = self.alpha
        if self.t_alpha:
            alpha = min(t * alpha / self.t_alpha, alpha)
        if self.t_beta3:
            log1, log3, mu = math.log(beta1), math.log(beta3), t / self.t_beta3
            beta3 = min(math.exp(log1 * log3 / ((1 - mu) * log3 + mu * log1)), beta3)
        fast = beta1 * fast + (1 - beta1) * g
        slow = beta3 * slow + (1 - beta3) * g
        v = beta2 * v + (1 - beta2) * g**2
        update = (fast / (1 - beta1**t) + alpha * slow) / ((v / (1 - beta2**t)).sqrt() + self.eps)
        return update, fast, v, slow


class Lion(Reference):
    """Program 1 of https://arxiv.org/abs/2302.06675."""

    def __init__(self, params, lr, betas, weight_decay=0.0, **options) -> None:
        super().__init__(params, lr, weight_decay, True, [0.0], **options)
        self.betas = betas

    def update(self, g, t, m):
        beta1, beta2 = self.betas
        return (beta1 * m + (1 - beta1) * g).sign(), beta2 * m + (1 - beta2) * g


class SGD(Reference):
    """`torch.optim.SGD`: the first gradient fills the buffer, undampened."""

    def __init__(
        self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, **options
    ) -> None:
        super().__init__(params, lr, weight_decay, False, [0.0] * (momentum != 0), **options)
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov

    def update(self, g, t, *buffer):
        if not buffer:
            return (g,)
        m = g if t == 1 else self.momentum * buffer[0] + (1 - self.dampening) * g
        return g + self.momentum * m if self.nesterov else m, m


class LARS(SGD):
    """SGD with bitsandbytes' trust ratio, see `Reference`; the paper's L2 term is a part of the update."""

    def __init__(self, params, *, max_unorm=0.02, **hyper) -> None:
        super().__init__(params, max_unorm=max_unorm, **hyper)


class RMSprop(Reference):
    """`torch.optim.RMSprop`, but that the first state of the centered form is the variance."""

    def __init__(
        self, params, lr, alpha, eps, weight_decay=0.0, momentum=0.0, centered=False, **options
    ) -> None:
        states = 1 + centered + (momentum != 0)
        super().__init__(params, lr, weight_decay, False, [0.0] * states, **options)
        self.alpha, self.eps, self.momentum, self.centered = alpha, eps, momentum, centered

    def update(self, g, t, square, *others):
        others, states = list(others), []
        if self.centered:
            mean = others.pop(0)
            square = self.alpha * (square + mean**2) + (1 - self.alpha) * g**2
            mean = self.alpha * mean + (1 - self.alpha) * g
            square = square - mean**2
            states = [mean]
        else:
            square = self.alpha * square + (1 - self.alpha) * g**2
        update = g / (square.sqrt() + self.eps)
        if others:
            update = self.momentum * others[0] + update
            states.append(update)
        return update, square, *states


class Adagrad(Reference):
    """`torch.optim.Adagrad`."""

    def __init__(
        self, params, lr, eps, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, **options
    ) -> None:
        super().__init__(params, lr, weight_decay, False, [initial_accumulator_value], **options)
        self.eps, self.lr_decay = eps, lr_decay

    def rate(self, t):
        return self.lr / (1 + (t - 1) * self.lr_decay)

    def update(self, g, t, total):
        total = total + g**2
        return g / (total.sqrt() + self.eps), total


@dataclass(frozen=True)
class OptTest:
    """What the tests must know of a family of optimizers."""

    name: str
    cls: type  # takes optim_bits
    classes: tuple[type, ...]  # the family, `cls` included; some are named for their number of bits
    plain: type[Reference]
    #: Hyperparameters to try. The first must keep a state, move parameters and have no weight decay, and the
    #: other variants differ from it.
    variants: tuple[dict[str, Any], ...]
    relative_error_8bit: float  # of the displacement after 100 steps, in all variants
    relative_error_32bit: float = 2.5e-6  # the same, of float32 states and parameters
    compiled_error_8bit: float = 1e-3  # of the displacement, compiled beside eager
    torch_class: type | None = None  # computes the same, for the same hyperparameters
    invalid: tuple[tuple[dict[str, Any], str], ...] = ()  # arguments, and what the error must say

    def general(self, params: Any, **changes: Any) -> Any:
        """An optimizer of the first variant's hyperparameters, but for these."""
        return self.cls(params, **{**self.variants[0], **changes})

    def reference(self, params: Any, **changes: Any) -> Reference:
        """What `general` must compute."""
        return self.plain(params, **{**self.variants[0], **changes})


def all_families() -> list[OptTest]:
    """The `TEST` of each opt_*.py."""
    names = sorted(path.stem for path in Path(__file__).parents[1].glob("opt_*.py"))
    return [importlib.import_module(name).TEST for name in names]


def of_rule(name: str) -> type[Reference]:
    """The formula of a rule."""
    families = {family.name: family.plain for family in all_families()}
    return families[name.removesuffix("_amsgrad").removesuffix("_plain").partition("_")[0]]


def arguments_of(name: str, hyper: dict[str, float]) -> dict[str, Any]:
    """What a formula takes, of the values of its rule's hyperparameters."""
    found: dict[str, Any] = dict(hyper)
    betas = [found.pop(beta) for beta in ("beta1", "beta2", "beta3") if beta in found]
    if betas:
        found["betas"] = betas
    for flag in ("nesterov", "bias_correction", "adam_w_mode"):
        if flag in found:
            found[flag] = bool(found[flag])
    if "_amsgrad" in name:
        found["amsgrad"] = True
    if name.startswith("rmsprop"):
        found["centered"] = "centered" in name
        found["momentum"] *= "momentum" in name
    return found

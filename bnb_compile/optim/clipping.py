"""Clipping without a synchronisation: percentiles of earlier norms, a global norm, and a scaler's verdict.

All of it becomes one factor for each parameter's gradient, which the step multiplies in, so nothing reads or
writes the gradients an additional time but their norms.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.norms import norms_op

NORMS = 100  # of earlier gradients that are remembered


def gradient_norms(grads: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Euclidean norms of gradients.

    Args:
        grads: n gradients of any dtypes, or None, whose norm is 0.
        like: ``(n,)``, on the device.

    Returns:
        Tensor: ``(n,)`` float32.
    """
    norms = torch.zeros_like(like)
    for dtype in sorted({grad.dtype for grad in grads if grad is not None}, key=str):
        absent = torch.empty(0, dtype=dtype, device=like.device)
        same = [absent if grad is None or grad.dtype != dtype else grad for grad in grads]
        norms = norms + norms_op(same)
    return norms


def present_mask(grads: Sequence[Tensor | None], device: torch.device) -> Tensor | None:
    """Which gradients there are: (n,) bool, or None if all are."""
    mask = tuple(grad is not None for grad in grads)
    if all(mask):
        return None
    if torch.compiler.is_compiling():
        return torch.tensor(mask, device=device)
    return _on_device(mask, device)


@functools.lru_cache(maxsize=1000)
def _on_device(mask: tuple[bool, ...], device: torch.device) -> Tensor:
    # Kept, as a CUDA graph that is being captured cannot copy it from the host.
    return torch.tensor(mask, device="cpu").to(device, non_blocking=True)


def percentile_factor(
    ring: Tensor, squares: Tensor, present: Tensor | None, step: Tensor, percentile: int
) -> Tensor:
    """Record the norms of gradients, and say what to multiply the gradients by.

    The norm of step t goes to entry t modulo 100, the first one to all entries: bitsandbytes 0.49's clipping.
    A norm that is not finite is not recorded, and nothing is scaled then.

    Args:
        ring: ``(n, 100)`` float32, squared norms of earlier gradients; updated.
        squares: ``(n,)`` float32, squared norms of the gradients.
        present: ``(n,)`` bool, which of them there are; None for all.
        step: ``(n,)`` float32, steps taken so far.
        percentile: In [1, 99]: which of the 100 sorted norms is the largest allowed.

    Returns:
        Tensor: ``(n,)`` float32, at most 1.
    """
    active = squares.isfinite()
    if present is not None:
        active = active & present
    entry = torch.arange(NORMS, device=step.device) == (step[:, None] + 1) % NORMS
    # An empty ring, not the first step: that one may have had no finite gradient.
    entry = entry | (ring == 0).all(1, keepdim=True)
    ring.copy_(torch.where(active[:, None] & entry, squares[:, None], ring))
    limit = ring.sort(1).values[:, percentile]
    return torch.where(active & (squares > limit), (limit / squares).sqrt(), 1.0)


def norm_factor(total: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients by, as ``torch.nn.utils.clip_grad_norm_``; NaN if `total` is not finite."""
    return torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), torch.nan)


class Clipped(Protocol):
    """What is known of parameters whose gradients are clipped."""

    @property
    def step(self) -> Tensor:
        """Steps taken so far: (n,) float32."""

    @property
    def gnorm(self) -> Tensor | None:
        """Ring of squared norms, if there is percentile clipping: (n, 100) float32."""

    @property
    def percentile(self) -> int:
        """See `percentile_factor`."""


def gradient_factors(
    buckets: Sequence[Clipped],
    grads: Sequence[Sequence[Tensor | None]],
    factor: Tensor | None = None,
    max_norm: float | None = None,
) -> list[Tensor | None]:
    """What to multiply the gradients of each bucket by.

    Args:
        buckets: What is known of them; rings are updated.
        grads: Their gradients.
        factor: One element: for all of them, before anything is clipped; NaN to skip the step.
        max_norm: Largest norm of all gradients together.

    Returns:
        list[Tensor | None]: (n,) float32 for each bucket; None is 1.
    """
    norms = [
        None if max_norm is None and bucket.gnorm is None else gradient_norms(of_bucket, bucket.step)
        for bucket, of_bucket in zip(buckets, grads)
    ]
    if max_norm is not None and buckets:
        device = buckets[0].step.device
        total = torch.stack([n.square().sum().to(device) for n in norms if n is not None]).sum().sqrt()
        if factor is not None:
            factor = factor.to(device)
            total = total * factor.abs()
        clip = norm_factor(total, max_norm)
        factor = clip if factor is None else factor * clip
    factors: list[Tensor | None] = []
    for bucket, of_bucket, of_norms in zip(buckets, grads, norms):
        own = None if factor is None else torch.ones_like(bucket.step) * factor.to(bucket.step.device)
        if bucket.gnorm is not None and of_norms is not None:
            squares = (of_norms if own is None else of_norms * own).square()
            present = present_mask(of_bucket, bucket.step.device)
            clip = percentile_factor(bucket.gnorm, squares, present, bucket.step, bucket.percentile)
            own = clip if own is None else own * clip
        factors.append(own)
    return factors


class PercentileClipper:
    """Clips gradients in place to a percentile of their last 100 norms, for any optimizer.

    There is no synchronisation and no branch: it can be a part of a compiled or a CUDA graph.

    Args:
        parameters: Whose gradients to clip.
        percentile: In [1, 99]: a norm is limited to this percentile of the last 100, itself included.
        per_parameter: Whether each gradient has a norm of its own, as in bitsandbytes; otherwise there is one
            norm of all of them.

    Raises:
        ValueError: If there are no parameters, or `percentile` is out of its range.

    Example:
        >>> clipper = PercentileClipper(model.parameters(), percentile=5)
        >>> loss.backward()
        >>> clipper.clip_()
        >>> optimizer.step()
    """

    def __init__(self, parameters: Iterable[Tensor], percentile: int = 5, per_parameter: bool = True) -> None:
        self.parameters = list(parameters)
        if not self.parameters:
            raise ValueError("parameters is empty, must have at least one")
        if not 1 <= percentile <= 99:
            raise ValueError(f"Invalid percentile: {percentile}, must be in [1, 99]")
        self.percentile, self.per_parameter = percentile, per_parameter
        count = len(self.parameters) if per_parameter else 1
        device = self.parameters[0].device
        #: Squared norms, and how many steps each has seen.
        self.ring = torch.zeros(count, NORMS, dtype=torch.float32, device=device)
        self.step = torch.zeros(count, dtype=torch.float32, device=device)

    @torch.no_grad()
    def clip_(self) -> Tensor:
        """Scale the gradients that there are.

        Returns:
            Tensor: Norms before clipping, float32: ``(n,)`` for the n parameters, 0 where there is no
            gradient; ``(1,)`` with one norm for all.
        """
        grads = [param.grad for param in self.parameters]
        norms = gradient_norms(grads, self.ring.new_zeros(len(grads)))
        present = None
        if self.per_parameter:
            present = present_mask(grads, self.ring.device)
        else:
            norms = norms.square().sum(0, keepdim=True).sqrt()
        factor = percentile_factor(self.ring, norms.square(), present, self.step, self.percentile)
        self.step += 1 if present is None else present
        factors = factor.expand(len(grads)).unbind()
        for grad, scale in zip(grads, factors):
            if grad is not None:
                grad.mul_(scale)
        return norms

    def state_dict(self) -> dict[str, Any]:
        """The ring, (n, 100), and the steps, (n,)."""
        return {"ring": self.ring, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, in place.

        Raises:
            ValueError: If it is of another number of parameters.
        """
        for name, own in self.state_dict().items():
            if state_dict[name].shape != own.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state_dict[name].shape)}, must be {tuple(own.shape)}"
                )
        for name, own in self.state_dict().items():
            own.copy_(state_dict[name])

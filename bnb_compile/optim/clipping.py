"""Clipping without a synchronisation: percentiles of earlier norms, a global norm, and a scaler's verdict.

All of it becomes one factor for each parameter's gradient, which the step multiplies in, so clipping adds one
read of the gradients (for the norms) and no write.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.norms import norms_op
from ..state.checkpoint import RING
from ..validate import number


def gradient_norms(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Euclidean norms of gradients.

    Args:
        grads: n gradients of any dtypes, or None, whose norm is 0.
        device: Theirs.

    Returns:
        Tensor: ``(n,)`` float32.
    """
    norms = torch.zeros(len(grads), dtype=torch.float32, device=device)
    for dtype in sorted({grad.dtype for grad in grads if grad is not None}, key=str):
        absent = torch.empty(0, dtype=dtype, device=device)
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
    ring: Tensor, squares: Tensor, present: Tensor | None, step: Tensor, percentile: Tensor
) -> Tensor:
    """Record the norms of gradients, and say what to multiply the gradients by.

    The norm of step t goes to entry t modulo 100, the first one to all entries: bitsandbytes 0.49's clipping.
    A norm that is not finite is not recorded, and nothing is scaled then.

    Args:
        ring: ``(n, 100)`` float32, squared norms of earlier gradients; updated.
        squares: ``(n,)`` float32, squared norms of the gradients.
        present: ``(n,)`` bool, which of them there are; None for all.
        step: ``(n,)`` int64, steps taken so far.
        percentile: ``(n,)`` int64 in [1, 99]: which of the 100 sorted norms is the largest allowed.

    Returns:
        Tensor: ``(n,)`` float32, at most 1.
    """
    active = squares.isfinite()
    if present is not None:
        active = active & present
    entry = torch.arange(RING, device=step.device) == (step[:, None] + 1) % RING
    # An empty ring, not the first step: that one may have had no finite gradient.
    entry = entry | (ring == 0).all(1, keepdim=True)
    ring.copy_(torch.where(active[:, None] & entry, squares[:, None], ring))
    limit = ring.sort(1).values.gather(1, percentile[:, None])[:, 0]
    return torch.where(active & (squares > limit), (limit / squares).sqrt(), 1.0)


def norm_factor(total: Tensor, max_norm: Tensor) -> Tensor:
    """What to multiply gradients by, as ``torch.nn.utils.clip_grad_norm_``; NaN if `total` is not finite."""
    return torch.where(total.isfinite(), (max_norm / (total + 1e-6)).clamp(max=1.0), torch.nan)


class KnownNorm:
    """A norm of all gradients that is known before the first of them is used; 0 at first.

    Attributes:
        norm: () float32, of the gradients of the step before, or of those that a first pass has measured.
        squares: () float32, the sum of the squares of those gradients that have come since.
        measured: Whether a first pass has.
        seen: Whether any gradient has come since.
    """

    def __init__(self, device: torch.device) -> None:
        self.norm, self.squares = (torch.zeros((), dtype=torch.float32, device=device) for _ in range(2))
        self.measured = self.seen = False

    def add(self, squares: Tensor) -> None:
        """Add squared norms of gradients, on any device."""
        self.squares.add_(squares.sum().to(self.squares.device))
        self.seen = True

    def end(self, only_finite: bool) -> None:
        """Begin another sum: what has been added is the norm; `only_finite`: or else the norm stays."""
        norm = self.squares.sqrt()
        self.norm.copy_(torch.where(norm.isfinite(), norm, self.norm) if only_finite else norm)
        self.forget()

    def forget(self) -> None:
        """Begin another sum."""
        self.squares.zero_()
        self.seen = False


class NormLimit:
    """`max_grad_norm`, where a step reads it.

    Attributes:
        limit: () float32: the largest norm of all gradients; None for none.
        known: A norm that may be compared with it in place of that of the step's gradients; None without.
    """

    def __init__(self) -> None:
        self.limit: Tensor | None = None
        self.known: KnownNorm | None = None
        self._written: Any = None  # what is in `limit`
        self._first = 0.0  # what the known norm is at first

    def bring(self, value: Any, device: torch.device | None) -> None:
        """Bring a limit (a number, a tensor or None) to the device of the step; None if there is none yet."""
        if value is None:
            self.limit = None
        if value is None or device is None:
            return
        if self.limit is None or self.known is None or self.limit.device != device:
            self.limit = torch.zeros((), dtype=torch.float32, device=device)
            self._written = None
            self.known = KnownNorm(device)
            self.known.norm.fill_(self._first)
        if isinstance(value, Tensor) or value != self._written:
            self.limit.copy_(torch.as_tensor(number("max_grad_norm", value)))
            self._written = value

    @property
    def norm(self) -> float:
        """The known norm; 0 if there is none."""
        return self._first if self.known is None else self.known.norm.item()

    @norm.setter
    def norm(self, norm: float) -> None:
        self._first = norm
        if self.known is not None:
            self.known.norm.fill_(norm)

    def forget(self) -> None:
        """Forget gradients that have been added to the known norm since the last step."""
        if self.known is not None:
            self.known.forget()


class Clipped(Protocol):
    """What is known of parameters whose gradients are clipped."""

    @property
    def step(self) -> Tensor:
        """Steps taken so far: (n,) int64."""

    @property
    def gnorm(self) -> Tensor | None:
        """Ring of squared norms, if there is percentile clipping: (n, 100) float32."""

    @property
    def percentile(self) -> Tensor | None:
        """See `percentile_factor`."""

    def whole(self, squares: Tensor) -> Tensor:
        """Squared norms of whole gradients, (n,), from those of what this process holds."""


def gradient_factors(
    buckets: Sequence[Clipped],
    grads: Sequence[Sequence[Tensor | None]],
    factor: Tensor | None = None,
    max_norm: Tensor | None = None,
    known: KnownNorm | None = None,
) -> list[Tensor | None]:
    """What to multiply the gradients of each bucket by.

    Args:
        buckets: What is known of them; rings are updated.
        grads: Their gradients.
        factor: One element: for all of them, before anything is clipped; NaN to skip the step.
        max_norm: One element: the largest norm of all gradients together.
        known: The norm that is compared with it, if it is not that of these gradients, which are added to it
            unless it was measured.

    Returns:
        list[Tensor | None]: (n,) float32 for each bucket; None is 1.
    """
    adds = known is not None and not known.measured
    squared = [
        None
        if bucket.gnorm is None and (max_norm is None or (known is not None and not adds))
        else bucket.whole(gradient_norms(of_bucket, bucket.step.device).square())
        for bucket, of_bucket in zip(buckets, grads)
    ]
    if max_norm is not None and buckets:
        device = buckets[0].step.device
        factor = None if factor is None else factor.to(device)
        if known is None or adds:
            total = torch.stack([x.sum().to(device) for x in squared if x is not None]).sum().sqrt()
            if factor is not None:
                total = total * factor.abs()
        if known is not None:
            if not known.measured and any(grad is not None for of_bucket in grads for grad in of_bucket):
                known.add(total.square())
            total = known.norm.to(device)
        clip = norm_factor(total, max_norm.to(device))
        factor = clip if factor is None else factor * clip
    factors: list[Tensor | None] = []
    for bucket, of_bucket, squares in zip(buckets, grads, squared):
        own = None if factor is None else factor.to(bucket.step.device).expand(len(of_bucket)).contiguous()
        if bucket.gnorm is not None and bucket.percentile is not None and squares is not None:
            squares = squares if own is None else squares * own.square()
            present = present_mask(of_bucket, bucket.step.device)
            clip = percentile_factor(bucket.gnorm, squares, present, bucket.step, bucket.percentile)
            own = clip if own is None else own * clip
        factors.append(own)
    return factors

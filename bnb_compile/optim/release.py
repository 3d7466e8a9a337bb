"""Gradients that are used and freed while the backward pass runs, outside of a graph.

In a graph nothing of this is needed: there a bucket is a kernel of its own, and a gradient's memory is free
behind the last kernel that reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..state.bucket import Bucket
from .base import AbstractOptimizer
from .changes import Changes

_USED = (
    "release_gradients: this gradient has been used and freed during the backward pass, so nothing can read, "
    "clip, unscale or accumulate it. Call step() after every backward pass; for a norm use "
    "percentile_clipping or max_unorm; bfloat16 needs no GradScaler"
)


class Released(Tensor):
    """What stands in the place of a gradient that has been used: it has no memory, and no operation takes it.

    So ``clip_grad_norm_``, a ``GradScaler`` or another backward pass raises, where it would see None and do
    nothing, or forget what came first.
    """

    @staticmethod
    def __new__(cls, like: Tensor) -> Released:
        """The placeholder of a gradient of a parameter's shape."""
        return Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Released({tuple(self.shape)})"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_USED)  # as of a DTensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        """Raise."""
        raise RuntimeError(f"{func}: {_USED}")


class Release:
    """Steps each bucket of an optimizer when the last of its gradients has come.

    Attributes:
        stepped: Buckets that have been updated since the last step ended, or measured.
        measures: Whether gradients are only measured, see `MeasuringNorm`.
    """

    def __init__(self, optimizer: AbstractOptimizer, changes: Changes) -> None:
        self._optimizer: Any = weakref.ref(optimizer)
        self._changes = changes
        self._hooks: dict[int, Any] = {}
        self._waiting: dict[Bucket, set[int]] = {}  # parameters whose gradients have not come
        self._began: Any = None  # what hyperparameters were when the first bucket was stepped
        self.stepped: set[Bucket] = set()
        self.measures = False

    def watch(self, params: Iterable[Tensor]) -> None:
        """Hear of the gradients of parameters."""
        for param in params:
            if param.requires_grad and param.is_leaf and id(param) not in self._hooks:
                handle = param.register_post_accumulate_grad_hook(_Hook(self))
                self._hooks[id(param)] = handle
                weakref.finalize(param, self._hooks.pop, id(param), None)

    def forget(self) -> None:
        """Hear of nothing any more."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()

    @torch.no_grad()
    def came(self, param: Tensor) -> None:
        """Use a gradient that has been accumulated, if it is the last of its bucket.

        Raises:
            RuntimeError: If its bucket has been updated already, or gradients are not what they will be.
        """
        optimizer = self._optimizer()
        if optimizer is None or not optimizer.release_gradients:
            return
        if not self._waiting:
            self._changes.prepare()
            self._waiting = {
                bucket: {k for k, x in enumerate(bucket.params) if x.requires_grad} - bucket.idle
                for bucket in optimizer.structure.buckets
            }
        place = optimizer.structure.places.get(id(param))
        if place is None or place.bucket not in self._waiting:
            return  # its gradient waits for the step
        bucket, k = place
        if bucket in self.stepped:
            raise RuntimeError(f"a second gradient of a parameter of shape {tuple(param.shape)}: {_USED}")
        self._waiting[bucket].discard(k)
        if self._waiting[bucket]:
            return
        _check_complete(bucket)
        self.stepped.add(bucket)
        if self.measures:
            optimizer.measure_buckets([bucket])
            return
        if len(self.stepped) == 1:
            self._began = self._changes.written()
            optimizer.bring_links(inwards=True)
        optimizer.update_buckets([bucket])
        for member in bucket.params:
            if member.grad is not None:
                member.grad = Released(member)

    def forget_round(self) -> None:
        """Begin anew after gradients have been measured."""
        self.measures = False
        self.stepped.clear()
        self._waiting.clear()

    def check_ended(self) -> None:
        """Raise if gradients are to be forgotten of which some have been used.

        Raises:
            RuntimeError: If they have.
        """
        if self.stepped:
            raise RuntimeError(
                "zero_grad() between the backward pass and step(), with release_gradients: some gradients "
                "have been used already; call step(), which frees all"
            )

    def end(self) -> bool:
        """Begin anew, at the end of a step; returns whether buckets have been updated.

        Raises:
            RuntimeError: If something has changed that those buckets should have known.
        """
        optimizer = self._optimizer()
        stepped, self.stepped = self.stepped, set()
        self._waiting.clear()
        if not stepped:
            return False
        for param in (param for bucket in stepped for param in bucket.params):
            if isinstance(param.grad, Released):
                param.grad = None
        if any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            raise RuntimeError(
                "release_gradients: a GradScaler says whether to step when gradients have been used already; "
                "bfloat16 needs none"
            )
        if self._changes.written() != self._began:
            raise RuntimeError(
                "release_gradients: a hyperparameter has changed after some gradients were used; set it "
                "before the backward pass"
            )
        return True


class MeasuringNorm:
    """The context of `Optimizer8bit.measuring_norm`."""

    def __init__(self, optimizer: AbstractOptimizer, release: Release) -> None:
        self._optimizer, self._release = optimizer, release

    def __enter__(self) -> None:
        self._release.check_ended()
        self._release.measures = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._release.forget_round()
        if kind is None:
            self._optimizer.end_of_measuring()


class _Hook:
    """What a parameter calls, without keeping the optimizer alive."""

    def __init__(self, release: Release) -> None:
        self._release = weakref.ref(release)

    def __call__(self, param: Tensor) -> None:
        release = self._release()
        if release is not None:
            release.came(param)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return self


def _check_complete(bucket: Bucket) -> None:
    """Raise if a gradient may be only what this process has found.

    Raises:
        RuntimeError: If there are other processes, and no DTensor that says which part this one has.
    """
    distributed = torch.distributed
    if bucket.kind.sharding is None and distributed.is_available() and distributed.is_initialized():
        if distributed.get_world_size() > 1:
            raise RuntimeError(
                "release_gradients with ordinary tensors in several processes: DistributedDataParallel adds "
                "gradients up after they have been used, and keeps them all anyway; use "
                "torch.distributed.fsdp.fully_shard"
            )

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
    "clip, unscale or accumulate it. Call step() after every backward pass. To clip by the norm of all "
    "gradients use max_grad_norm with previous_norm=True, or a backward pass in measuring_norm() first; "
    "bfloat16 needs no GradScaler"
)


class Released(Tensor):
    """What stands in the place of a gradient that has been used: it has no memory, and no operation takes it.

    So ``clip_grad_norm_``, a ``GradScaler`` or another backward pass raises, where it would see None and do
    nothing, or forget what came first.
    """

    @staticmethod
    def __new__(cls, like: Tensor) -> Released:
        """The placeholder of a gradient."""
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
        self._placed: list[tuple[Tensor, Released]] = []
        self._began: Any = None  # what a step depends on, when the first bucket was stepped
        self.stepped: set[Bucket] = set()
        self.measures = False
        weakref.finalize(optimizer, _remove, self._hooks)

    def watch(self, params: Iterable[Tensor]) -> None:
        """Hear of the gradients of parameters."""
        for param in params:
            if param.requires_grad and param.is_leaf and not self._watches(param):
                self._hooks[id(param)] = param.register_post_accumulate_grad_hook(_Hook(self))

    def _watches(self, param: Tensor) -> bool:
        # By the hook, not by a weak reference to the parameter, which could not be swapped then.
        hook = self._hooks.get(id(param))
        hooks = getattr(param, "_post_accumulate_grad_hooks", None)
        return hook is not None and hooks is not None and hook.id in hooks and hook.hooks_dict_ref() is hooks

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
            self._waiting = {bucket: _awaited(bucket, absent=False) for bucket in optimizer.structure.buckets}
        place = optimizer.structure.places.get(id(param))
        if place is None or place.bucket not in self._waiting or place.k in place.bucket.idle:
            return  # its gradient waits for the step
        bucket, k = place
        if bucket in self.stepped:
            raise RuntimeError(f"a second gradient of a parameter of shape {tuple(param.shape)}: {_USED}")
        self._waiting[bucket].discard(k)
        if not self._waiting[bucket]:  # but some may have been forgotten since they came
            self._waiting[bucket] = _awaited(bucket, absent=True)
        if not self._waiting[bucket]:
            _check_complete(bucket)
            self._use(optimizer, bucket)

    def _use(self, optimizer: AbstractOptimizer, bucket: Bucket) -> None:
        if self.measures:
            optimizer.measure_buckets([bucket])
            self.stepped.add(bucket)
            return
        if not self.stepped:
            self._changes.prepare()
            if bucket not in optimizer.structure.buckets:
                self._waiting.clear()  # it was formed anew, and waits for the step
                return
            self._began = self._changes.seen()
            optimizer.bring_links(inwards=True)
        optimizer.update_buckets([bucket])
        self.stepped.add(bucket)
        for k, member in enumerate(bucket.params):
            if k not in bucket.idle and member.grad is not None:
                placeholder = Released(member.grad)
                member.grad = placeholder
                self._placed.append((member, placeholder))

    def forget_round(self) -> None:
        """Begin anew after gradients have been measured."""
        self.measures = False
        self.stepped.clear()
        self._waiting.clear()

    def check_ended(self, what: str) -> None:
        """Raise if something cannot be done as long as only a part of the parameters has been updated.

        Args:
            what: What is to be done.

        Raises:
            RuntimeError: If a part has been.
        """
        if self.stepped:
            raise RuntimeError(
                f"{what} between a backward pass and step(), with release_gradients: some gradients have "
                "been used, and their parameters updated; call step(), which updates the rest and frees all"
            )
        self._waiting.clear()

    def end(self) -> bool:
        """Begin anew, at the end of a step; returns whether buckets have been updated.

        Raises:
            RuntimeError: If something has changed that those buckets should have known.
        """
        optimizer = self._optimizer()
        stepped, self.stepped = self.stepped, set()
        placed, self._placed = self._placed, []
        self._waiting.clear()
        if not stepped:
            return False
        kept = [param.grad is placeholder for param, placeholder in placed]
        for (param, _), is_kept in zip(placed, kept):
            if is_kept:
                param.grad = None
        why = None
        if not all(kept):
            why = "a gradient was replaced or removed after it had been used"
        elif any(getattr(optimizer, name, None) is not None for name in ("grad_scale", "found_inf")):
            why = "a GradScaler says whether to step when gradients have been used; bfloat16 needs none"
        elif self._changes.seen() != self._began:
            why = (
                "groups, options or hyperparameters have changed after some gradients were used: change them "
                "before the backward pass"
            )
        if why is not None:
            optimizer.norms.forget()
            raise RuntimeError(f"release_gradients: {why}")
        return True


def _awaited(bucket: Bucket, absent: bool) -> set[int]:
    """Parameters of a bucket whose gradients may come; or, of those, the ones that have none."""
    return {
        k
        for k, param in enumerate(bucket.params)
        if param.requires_grad and k not in bucket.idle and (not absent or param.grad is None)
    }


def _remove(hooks: dict[int, Any]) -> None:
    for hook in hooks.values():
        hook.remove()


class MeasuringNorm:
    """The context of `Optimizer8bit.measuring_norm`."""

    def __init__(self, optimizer: AbstractOptimizer, release: Release) -> None:
        self._optimizer, self._release = optimizer, release

    def __enter__(self) -> None:
        if self._release.measures:
            raise RuntimeError("measuring_norm() inside of another: the norm of which gradients is meant?")
        self._release.check_ended("measuring_norm()")
        self._release.measures = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._release.forget_round()
        if kind is None:
            self._optimizer.end_of_measuring()
        else:
            self._optimizer.norms.forget()


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

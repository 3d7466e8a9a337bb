"""Dicts that a user may write to, and an optimizer must know of it: param groups and states of parameters."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import Optimizer8bit


class Watched(dict):
    """A dict that calls `_written` after each write."""

    def _written(self) -> None:
        raise NotImplementedError

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._written()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of a dict."""
        super().update(*args, **kwargs)
        self._written()

    def setdefault(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        if key not in self:
            self[key] = default
        return self[key]

    def __ior__(self, other: Any) -> Watched:  # type: ignore[misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy belongs to no optimizer


class StateEntry(Watched):
    """State of a parameter, ``optimizer.state[param]``: views of the arenas that the step works on.

    A tensor that is put in place of a view, such as one that was moved to another device and back, is copied
    into the arenas before the next step.
    """

    replaced = False

    def _written(self) -> None:
        self.replaced = True


class ParamGroup(Watched):
    """An entry of ``optimizer.param_groups``: an ordinary dict for its user.

    A captured step, in the user's own ``torch.compile`` or a CUDA graph, runs without this package's
    Python, so it could not look whether a scheduler has changed ``group["lr"]``. Therefore the write
    itself brings the new value to the tensor that the step reads.
    """

    def __init__(self, group: dict[str, Any], optimizer: Optimizer8bit) -> None:
        super().__init__(group)
        self._optimizer = weakref.ref(optimizer)

    def _written(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._mirror_hyper(self)

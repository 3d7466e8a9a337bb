"""Containers that a user may write to, and their optimizer must know of it.

A captured step, in the user's own ``torch.compile`` or a CUDA graph, runs without this package's Python, so
it could not look whether ``group["lr"]`` or ``optimizer.state[param]`` has changed. Therefore a write itself
brings the new value to the tensors that the step reads; or, where the parameters themselves change, makes a
compiled graph outdated.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .optimizer import Optimizer8bit


class Watched(dict):
    """A dict that calls `_write` for each key that is set."""

    def _write(self, key: Any, value: Any) -> None:
        raise NotImplementedError

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write(key, value)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As of a dict."""
        for key, value in dict(*args, **kwargs).items():
            self._write(key, value)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        if key not in self:
            self._write(key, default)
        return self[key]

    def __ior__(self, other: Any) -> Watched:  # type: ignore[misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy belongs to no optimizer


class StateEntry(Watched):
    """State of a parameter, ``optimizer.state[param]``: views of the arenas that the step works on.

    A tensor that is assigned, such as one that was moved to another device and back, is copied into the
    arena; one of another shape or dtype is kept and looked at before the next step.
    """

    replaced = False

    def _write(self, key: Any, value: Any) -> None:
        view = self.get(key)
        if isinstance(value, Tensor) and isinstance(view, Tensor) and not self.replaced:
            if key.startswith("qmap") and torch.equal(value.to(view), view):
                return
            if value.shape == view.shape and value.dtype == view.dtype and not key.startswith("qmap"):
                view.copy_(value)
                return
        super(Watched, self).__setitem__(key, value)
        self.replaced = True


class States(defaultdict):
    """``optimizer.state``: what is assigned to a parameter is copied into its arenas."""

    def __init__(self, optimizer: Optimizer8bit) -> None:
        super().__init__(dict)
        self._optimizer = weakref.ref(optimizer)

    def __setitem__(self, param: Any, state: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or not optimizer._assign(param, state):
            self.keep(param, state)
            self._changed()

    def keep(self, param: Any, state: Any) -> None:
        """Set an entry without a copy."""
        super().__setitem__(param, state)

    def _changed(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._outdate()

    def __delitem__(self, param: Any) -> None:
        super().__delitem__(param)
        self._changed()

    def pop(self, *args: Any) -> Any:
        """As of a dict."""
        self._changed()
        return super().pop(*args)

    def clear(self) -> None:
        """As of a dict."""
        super().clear()
        self._changed()

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))


class ParamList(list):
    """The parameters of a group."""

    def __init__(self, params: Any, changed: Callable[[], None]) -> None:
        super().__init__(params)
        self._changed = changed

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def _watched(name: str) -> Callable[..., Any]:
    def method(self: ParamList, *args: Any) -> Any:
        result = getattr(list, name)(self, *args)
        self._changed()
        return result

    method.__name__ = name
    return method


for _name in (
    "__setitem__",
    "__delitem__",
    "__iadd__",
    "append",
    "extend",
    "insert",
    "pop",
    "remove",
    "clear",
):
    setattr(ParamList, _name, _watched(_name))


class ParamGroup(Watched):
    """An entry of ``optimizer.param_groups``: an ordinary dict for its user."""

    def __init__(self, group: dict[str, Any], optimizer: Optimizer8bit) -> None:
        super().__init__(group)
        self._optimizer = weakref.ref(optimizer)
        self._watch_params()

    def _watch_params(self) -> None:
        super(Watched, self).__setitem__("params", ParamList(self["params"], self._params_changed))

    def _params_changed(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._outdate()

    def _write(self, key: Any, value: Any) -> None:
        super(Watched, self).__setitem__(key, value)
        if key == "params":
            self._watch_params()
            self._params_changed()
        optimizer = self._optimizer()
        if optimizer is not None:
            optimizer._mirror_hyper(self)

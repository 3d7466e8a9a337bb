"""Dicts that tell a listener when the user changes them: param groups and states.

A replayed CUDA graph runs no Python, so it could not look whether ``group["lr"]`` or
``optimizer.state[param]`` has changed. Therefore a write itself brings the new value to the tensors that the
step reads. (Every other step looks, see `optim.changes`; it needs no containers that watch.)
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any, Protocol

from torch import Tensor


class GroupListener(Protocol):
    """Whom param groups tell of a user's writes."""

    def group_written(self, group: dict[str, Any]) -> None:
        """A param group has changed; raises ValueError to refuse it."""


class Listener(Protocol):
    """Whom the states tell of a user's writes."""

    def entry_written(self, entry: Entry, key: str, value: Any) -> bool:
        """A value is put into the state of a parameter; returns whether it is copied, so need not be kept."""

    def state_assigned(self, param: Tensor, state: Any) -> Any:
        """A parameter is given another state; returns what to keep for it."""

    def state_removed(self, param: Tensor) -> None:
        """The state of a parameter is taken away: it begins anew."""


_MISSING = object()


class Watched(dict):
    """A dict whose writes all go through `_write` and `_remove`."""

    def _write(self, items: dict[Any, Any]) -> None:
        raise NotImplementedError

    def _remove(self, keys: list[Any]) -> None:
        raise NotImplementedError

    def __setitem__(self, key: Any, value: Any) -> None:
        self._write({key: value})

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self._remove([key])

    def __ior__(self, other: Any) -> Watched:  # type: ignore[misc]
        self._write(dict(other))
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """See ``dict.update``."""
        self._write(dict(*args, **kwargs))

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """See ``dict.setdefault``."""
        if key not in self:
            self._write({key: default})
        return self[key]

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        """See ``dict.pop``."""
        if key not in self and default is not _MISSING:
            return default
        value = self[key]
        self._remove([key])
        return value

    def popitem(self) -> tuple[Any, Any]:
        """See ``dict.popitem``."""
        if not self:
            raise KeyError("popitem(): dictionary is empty")
        key = list(self)[-1]
        return key, self.pop(key)

    def clear(self) -> None:
        """See ``dict.clear``."""
        self._remove(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy belongs to no optimizer


class ParamGroup(Watched):
    """An entry of ``optimizer.param_groups``: an ordinary dict for its user."""

    def __init__(self, group: dict[str, Any], listener: GroupListener) -> None:
        super().__init__(group)
        self._listener = weakref.ref(listener)

    @property
    def listener(self) -> Any:
        """Whom it tells; None if that is gone."""
        return self._listener()

    def _write(self, items: dict[Any, Any]) -> None:
        before, listener = dict(self), self.listener
        dict.update(self, items)
        if listener is None:
            return
        try:
            listener.group_written(self)
        except ValueError:
            dict.clear(self)
            dict.update(self, before)
            raise

    def _remove(self, keys: list[Any]) -> None:
        for key in keys:
            dict.__delitem__(self, key)


class Entry(Watched):
    """State of a parameter, ``optimizer.state[param]``: views of the tensors that the step works on.

    A value that is assigned, such as a tensor that was moved to another device and back, is copied into them.
    One that does not fit is kept; then the next step takes over the entry as a whole, or raises.
    """

    #: Whether it has values that are not in the step's tensors.
    replaced = False

    def __init__(self, listener: Any) -> None:
        super().__init__()
        self._listener = weakref.ref(listener)

    @property
    def listener(self) -> Any:
        """Who owns the step's tensors; None of an entry that belongs to no parameter any more."""
        return self._listener()

    def _write(self, items: dict[Any, Any]) -> None:
        listener = self.listener
        for key, value in items.items():
            if listener is None or not listener.entry_written(self, key, value):
                dict.__setitem__(self, key, value)

    def _remove(self, keys: list[Any]) -> None:
        for key in keys:
            dict.__delitem__(self, key)
            if self.listener is not None:
                self.listener.entry_written(self, key, None)

    def detach(self) -> None:
        """Keep the values, as copies, when the views will be of something else."""
        self._listener = lambda: None  # type: ignore[assignment]
        for key, value in self.items():
            if isinstance(value, Tensor):
                dict.__setitem__(self, key, value.clone())

    def keep(self, views: dict[str, Any], others: dict[str, Any]) -> None:
        """Show these views from now on, and what the user has put beside them."""
        dict.clear(self)
        dict.update(self, views, **others)
        self.replaced = False


class States(defaultdict):
    """``optimizer.state``: what is assigned to a parameter is copied into the step's tensors.

    Attributes:
        listener: Owns those tensors, and lives as long as this.
    """

    def __init__(self, listener: Any) -> None:
        super().__init__(dict)
        self.listener = listener

    def keep(self, param: Tensor, state: Any) -> None:
        """Set an entry without telling anybody."""
        defaultdict.__setitem__(self, param, state)

    def __setitem__(self, param: Any, state: Any) -> None:
        self.keep(param, self.listener.state_assigned(param, state))

    def __delitem__(self, param: Any) -> None:
        self.pop(param)

    def __ior__(self, other: Any) -> States:  # type: ignore[misc]
        self.update(other)
        return self

    def update(self, *args: Any, **kwargs: Any) -> None:
        """See ``dict.update``."""
        for param, state in dict(*args, **kwargs).items():
            self[param] = state

    def setdefault(self, param: Any, default: Any = None) -> Any:
        """See ``dict.setdefault``."""
        if param not in self:
            self[param] = default
        return self[param]

    def pop(self, param: Any, default: Any = _MISSING) -> Any:
        """See ``dict.pop``."""
        if param not in self and default is not _MISSING:
            return default
        state = self[param] if param in self else super().pop(param)  # raises KeyError
        self.listener.state_removed(param)
        super().pop(param)
        return state

    def popitem(self) -> tuple[Any, Any]:
        """See ``dict.popitem``."""
        if not self:
            raise KeyError("popitem(): dictionary is empty")
        param = list(self)[-1]
        return param, self.pop(param)

    def clear(self) -> None:
        """See ``dict.clear``."""
        for param in list(self):
            del self[param]

    def __reduce__(self) -> tuple[Any, ...]:
        return defaultdict, (dict, dict(self))

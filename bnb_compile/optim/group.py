"""A parameter group that tells its optimizer when something writes to it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .optimizer import Optimizer8bit


class ParamGroup(dict):
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

    def __ior__(self, other: Any) -> ParamGroup:  # type: ignore[misc]
        self.update(other)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy belongs to no optimizer

"""Formats without scales: each element is a floating-point number of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .arena import Part
from .format import AbstractFormat, check_dense, check_finite


class Elements(AbstractFormat):
    """A state as floating-point numbers.

    Args:
        name: Of the format.
        dtype: Of the numbers.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.parts = (Part("values", dtype),)

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `AbstractFormat`."""
        return numbers

    def encode(self, states: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[Tensor]:
        """See `AbstractFormat`; rounds to nearest."""
        return states

    def entries(self, parts: Mapping[str, Tensor], number: int, shape: torch.Size) -> dict[str, Tensor]:
        """See `AbstractFormat`."""
        return {f"state{number}": parts["values"].view(shape)}

    def parts_of(
        self, saved: Mapping[str, Any], number: int, numel: int, row: int = 0
    ) -> dict[str, Tensor] | None:
        """See `AbstractFormat`."""
        name = f"state{number}"
        values = check_dense(name, saved.get(name))
        if values.dtype != self.dtype:
            return None
        check_finite(name, values)
        return {"values": values.reshape(-1)}

    def decode_saved(self, saved: Mapping[str, Any], number: int, numel: int) -> list[Tensor] | None:
        """See `AbstractFormat`; reads any floating-point dtype."""
        name = f"state{number}"
        values = check_dense(name, saved.get(name))
        if not values.is_floating_point():
            return None
        return [check_finite(name, values).reshape(-1)]

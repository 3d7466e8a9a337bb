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

    keys: Mapping[str, str] = {"values": "state"}

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.parts = (Part("values", dtype),)

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        """See `AbstractFormat`."""
        return numbers[0]

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        """See `AbstractFormat`; rounds to nearest."""
        return [state]

    def is_in(self, saved: Mapping[str, Any], number: int) -> bool:
        """See `AbstractFormat`; any floating-point dtype is read but those of 8 bits, which need a scale."""
        values = saved.get(f"state{number}")
        return isinstance(values, Tensor) and values.is_floating_point() and values.dtype.itemsize > 1

    def parts_of(
        self, saved: Mapping[str, Any], number: int, numel: int, row: int = 0
    ) -> dict[str, Tensor] | None:
        """See `AbstractFormat`."""
        name = f"state{number}"
        if not self.is_in(saved, number) or saved[name].dtype != self.dtype:
            return None
        values = check_dense(name, saved[name])
        check_finite(name, values)
        return {"values": values.reshape(-1)}

    def decode_saved(self, saved: Mapping[str, Any], number: int, numel: int) -> Tensor:
        """See `AbstractFormat`; reads any floating-point dtype."""
        name = f"state{number}"
        return check_finite(name, check_dense(name, saved[name])).reshape(-1)

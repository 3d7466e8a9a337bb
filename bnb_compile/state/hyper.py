"""The hyperparameters of a bucket's parameters, in the tensor that its step reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class HyperTable:
    """A row of hyperparameters for each parameter of a bucket.

    Numbers are written into the table when they change. A tensor, such as a learning rate that a schedule
    fills, is read at each step, also in a graph.

    Args:
        count: n, parameters.
        columns: h, hyperparameters of the rule.
        device: Of the bucket.

    Attributes:
        table: (n, h) float64.
        live: Entries of the table, flat int64, and the tensor that they are read from.
    """

    def __init__(self, count: int, columns: int, device: torch.device) -> None:
        self.table = torch.zeros(count, columns, dtype=torch.float64, device=device)
        self.live: list[tuple[Tensor, Tensor]] = []
        self._live_of: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def forget_tensors(self) -> None:
        """Read no tensors any more, until `write` names them again."""
        self._live_of.clear()
        self.live.clear()

    def write(self, source: int, rows: Sequence[int], values: Sequence[Any]) -> None:
        """Set hyperparameters.

        Args:
            source: Identifies what the values are of: tensors that it had before are read no longer.
            rows: Of which parameters, ascending.
            values: h numbers or tensors with one element.
        """
        device, columns = self.table.device, self.table.shape[1]
        numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
        row = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(device, non_blocking=True)
        together = rows[-1] - rows[0] == len(rows) - 1
        self.table[slice(rows[0], rows[-1] + 1) if together else self._index(rows)] = row
        self._live_of[source] = [
            (self._index([k * columns + column for k in rows]), value)
            for column, value in enumerate(values)
            if isinstance(value, Tensor)
        ]
        self.live[:] = [entry for entries in self._live_of.values() for entry in entries]

    def _index(self, places: Sequence[int]) -> Tensor:
        return torch.tensor(places, device="cpu").to(self.table.device)

    def refresh(self) -> None:
        """Read the tensors."""
        flat = self.table.view(-1)
        for places, value in self.live:
            one = value.detach().to(device=flat.device, dtype=flat.dtype).reshape(())
            flat.index_put_((places,), one)

"""Parameters that several processes hold together: the DTensors of FSDP2, HSDP and tensor parallelism.

A process steps what it holds, so arenas and kernels are of local tensors. What it computes must not depend on
the mesh:

- Blocks end where rows of the *whole* tensor end (all its dimensions but the first), so that no block is in
  two processes if only first dimensions are sharded. Rows shorter than SHORTEST_ROW, those of vectors among
  them, would have a scale for a few elements: such parameters have float32 states. Where rows are whole
  blocks, as in every matrix of a language model, all this is the layout of an ordinary tensor.
- Stochastic rounding takes its bits from a parameter's number and an element's place in the whole tensor.
- Norms and maxima are added up over the mesh.

Where a later dimension is sharded, blocks end at the ends of the local rows: the same blocks if those are
multiples of 256 elements, others if not.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import BLOCK, Geometry

#: Elements; of shorter rows no block is made.
SHORTEST_ROW = 32
_GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio: numbers of parameters become keys far apart


class Sharding(NamedTuple):
    """How the parameters of a bucket are distributed.

    Attributes:
        mesh: The processes.
        placements: For each dimension of the mesh, what it does with a parameter.
    """

    mesh: Any
    placements: tuple[Any, ...]

    def local(self, grad: Any) -> Tensor:
        """What this process holds of a gradient, placed as its parameter is.

        Raises:
            ValueError: If it is not a DTensor of the same mesh.
        """
        if not is_sharded(grad) or grad.device_mesh != self.mesh:
            where = f"on {grad.device_mesh}" if is_sharded(grad) else "an ordinary tensor"
            raise ValueError(f"a gradient is {where}, of a parameter that is a DTensor on {self.mesh}")
        if grad.placements != self.placements:  # partial sums, of tensor parallelism
            grad = grad.redistribute(self.mesh, self.placements)
        return _waited(grad.to_local())

    def total(self, x: Tensor, how: str = "sum") -> Tensor:
        """Numbers of what this process holds, over all that hold parts of the same parameters.

        Args:
            x: Any shape, the same in every process.
            how: "sum" or "max".
        """
        from torch.distributed._functional_collectives import all_reduce

        for dim, placement in enumerate(self.placements):
            if not placement.is_replicate():
                x = _waited(all_reduce(x, how, (self.mesh, dim)))
        return x


def is_sharded(x: Any) -> bool:
    """Whether something is a DTensor; does not import them where nothing can be one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def sharding_of(param: Any) -> Sharding | None:
    """How a parameter is distributed; None of an ordinary tensor."""
    return Sharding(param.device_mesh, tuple(param.placements)) if is_sharded(param) else None


def local(param: Any) -> Tensor:
    """What this process holds of a parameter: of an ordinary tensor all."""
    if not is_sharded(param):
        return param
    with torch.no_grad():
        return _waited(param.to_local())


def _waited(x: Any) -> Tensor:
    return x.wait() if hasattr(x, "wait") else x


def check_placements(param: Any) -> None:
    """Raise if a DTensor cannot be updated.

    Raises:
        TypeError: If its processes hold something else than parts or copies of it.
    """
    for placement in param.placements:
        if not (placement.is_replicate() or _sharded_dim(placement) is not None):
            raise TypeError(f"a parameter is a DTensor placed {placement}: must be Shard or Replicate")


def _sharded_dim(placement: Any) -> int | None:
    """The dimension that a placement shards; also of FSDP over tensor parallelism, which is no `Shard`."""
    return getattr(placement, "dim", None) if not placement.is_partial() else None


def _dims(param: Any) -> list[int]:
    return [dim for dim in map(_sharded_dim, param.placements) if dim is not None]


def row_of(param: Any) -> int:
    """Elements of a row of the whole tensor."""
    return math.prod(param.shape[1:]) if param.dim() > 1 else 1


def has_blocks(param: Any) -> bool:
    """Whether blocks of a parameter are long enough to share something; the same on any mesh."""
    return not is_sharded(param) or row_of(param) >= SHORTEST_ROW


def ends_with_rows(param: Any) -> bool:
    """Whether the layout is not that of an ordinary tensor; the same in every process."""
    if not is_sharded(param) or param.dim() < 2:
        return False
    return row_of(param) % BLOCK != 0 or any(dim > 0 for dim in _dims(param))


def geometry_of(param: Any, number: int) -> Geometry:
    """Which elements this process holds.

    Args:
        param: The parameter.
        number: Its place among all parameters of the optimizer.
    """
    key = number * _GOLDEN & 0xFFFFFFFF
    if not is_sharded(param):
        return Geometry(0, 0, key)
    size, offset = part_of(param, param.shape)
    strides = [math.prod(param.shape[d + 1 :]) for d in range(param.dim())]
    first = key + sum(o * s for o, s in zip(offset, strides))
    if not ends_with_rows(param):
        return Geometry(0, 0, first)
    cut = max([1, *_dims(param)])
    return Geometry(max(math.prod(size[cut:]), 1), math.prod(param.shape[cut:]), first)


def part_of(param: Any, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Size and offset of what this process holds of a tensor that is placed as a parameter is."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    size, offset = compute_local_shape_and_global_offset(
        torch.Size(shape), param.device_mesh, param.placements
    )
    return tuple(size), tuple(offset)

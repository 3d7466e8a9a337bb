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
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import BLOCK, Geometry
from ..rules import State
from .checkpoint import decode, numbers_in, shared_in, stem_of

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

    def locals(self, grads: Sequence[Any]) -> list[Tensor | None]:
        """What this process holds of gradients, or None, placed as their parameters are.

        Raises:
            ValueError: If one is not a DTensor of the same mesh.
        """
        if not torch.compiler.is_compiling() and id(None) not in map(id, grads):
            # The same, with loops in C. A graph would take the attribute for another input.
            try:
                if list(map(_PLACED, grads)) == [self] * len(grads):
                    found = list(map(_LOCAL, grads))
                    if set(map(type, found)) <= {Tensor}:
                        return found
            except AttributeError:  # an ordinary tensor
                pass
        return [None if grad is None else self._local(grad) for grad in grads]

    def _local(self, grad: Any) -> Tensor:
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


_LOCAL, _PLACED = attrgetter("_local_tensor"), attrgetter("_spec.mesh", "_spec.placements")


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


def locals_of(params: Sequence[Any]) -> list[Tensor]:
    """As `local`, of many DTensors outside of a graph."""
    found = list(map(_LOCAL, params))
    return found if set(map(type, found)) <= {Tensor} else list(map(local, params))


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


def check_whole(param: Any) -> None:
    """Raise if a process has pieces of a parameter, without what would tell them from a whole one.

    Raises:
        ValueError: If FSDP1 has flattened it.
    """
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "FullyShardedDataParallel gives each process pieces of flattened parameters, of which norms and "
            "scales of whole parameters (trust ratios, max_unorm, block_wise=False, percentile_clipping, "
            "max_grad_norm) cannot be found: use torch.distributed.fsdp.fully_shard"
        )


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


def ends_with_rows(param: Any, shares: bool = True, numbered: bool = False) -> bool:
    """Whether the layout is not that of an ordinary tensor; the same in every process.

    Args:
        param: The parameter.
        shares: Whether its states share something in blocks.
        numbered: Whether a step must know the numbers of its elements.

    Raises:
        ValueError: If it must, and cannot.
    """
    if not is_sharded(param) or param.dim() < 2:
        return False
    later = {dim for dim in _dims(param) if dim > 0}
    if numbered and len(later) > 1:
        raise ValueError(
            f"a DTensor is sharded in the dimensions {sorted(later)}, but stochastic rounding can follow "
            "one only"
        )
    return (shares and (bool(later) or row_of(param) % BLOCK != 0)) or (numbered and bool(later))


def geometry_of(param: Any, number: int, rows: bool) -> Geometry:
    """Which elements this process holds.

    Args:
        param: The parameter.
        number: Its place among all parameters of the optimizer.
        rows: Whether it `ends_with_rows`.
    """
    key = number * _GOLDEN & 0xFFFFFFFF
    if not is_sharded(param):
        return Geometry(0, 0, key)
    size, offset = part_of(param, param.shape)
    strides = [math.prod(param.shape[d + 1 :]) for d in range(param.dim())]
    first = key + sum(o * s for o, s in zip(offset, strides))
    if not rows:
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


# State dicts.


def to_global(entry: Mapping[str, Any], param: Any) -> dict[str, Any]:
    """A parameter's entry of a state dict: the states as DTensors that are placed as it is.

    Scales have the shape (rows, blocks of a row). Tensors are copies: a DTensor of a view that begins inside
    of its storage cannot be copied, pickled or saved.

    Args:
        entry: Of what this process holds.
        param: The parameter, of which `can_be_placed` is true if states have scales.
    """
    size, _ = part_of(param, param.shape)
    found = dict(entry)
    for number in numbers_in(entry):
        name, lead = f"state{number}", ()
        if name in entry:
            lead = entry[name].shape[: entry[name].dim() - param.dim()]
            found[name] = _wrapped(entry[name], param, lead, param.shape, size)
        for name, each in shared_in(entry, number).items():
            shape = param.shape[0], -(-row_of(param) // BLOCK) * each
            here = size[0], -(-math.prod(size[1:]) // BLOCK) * each
            found[name] = _wrapped(entry[name], param, lead, shape, here)
    return found


def _wrapped(x: Tensor, param: Any, lead: Sequence[int], shape: Sequence[int], size: Sequence[int]) -> Any:
    """A DTensor with a parameter's placements.

    Args:
        x: What this process holds.
        param: The parameter.
        lead: Dimensions before those that are placed: of several states together.
        shape: Of the whole, without `lead`.
        size: Of `x`, likewise.
    """
    from torch.distributed.tensor import DTensor

    whole = torch.Size([*lead, *shape])
    return DTensor.from_local(
        x.clone().view(*lead, *size),
        param.device_mesh,
        [_shifted(placement, len(lead)) for placement in param.placements],
        run_check=False,
        shape=whole,
        stride=torch.empty(whole, device="meta").stride(),
    )


def _shifted(placement: Any, by: int) -> Any:
    """A placement of a tensor with more dimensions before the others."""
    if not by or _sharded_dim(placement) is None:
        return placement
    # FSDP over tensor parallelism has a placement of its own, with a factor besides the dimension.
    factors = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + by, **factors)


def can_be_placed(param: Any) -> bool:
    """Whether scales in rows can be placed as a parameter is; the same in every process."""
    later = [dim for dim in _dims(param) if dim > 0]
    if not later:
        return True
    processes = math.prod(
        size for size, place in zip(param.device_mesh.shape, param.placements) if _sharded_dim(place) == 1
    )
    return max(later) == 1 and row_of(param) % (BLOCK * processes) == 0 and param.shape[1] % processes == 0


def placed_as(values: Tensor, param: Any) -> Any:
    """What this process holds of a tensor of a parameter's shape, as a DTensor with its placements."""
    size, _ = part_of(param, param.shape)
    return _wrapped(values, param, (), param.shape, size)


def moved(values: Tensor, param: Any) -> tuple[Tensor, Any]:
    """States of what this process holds, placed so that it has whole rows.

    Args:
        values: ``(numel,)`` float32.
        param: The parameter.

    Returns:
        tuple: The values, and an empty DTensor that is placed as they are.
    """
    from torch.distributed.tensor import Replicate

    rows = [p if _sharded_dim(p) in (0, None) else Replicate() for p in param.placements]
    placed = placed_as(values, param).redistribute(param.device_mesh, rows)
    return _waited(placed.to_local()).reshape(-1), placed


def to_local(saved: Mapping[str, Any], param: Any, states: Sequence[State]) -> dict[str, Any]:
    """What this process holds of a saved entry.

    Args:
        saved: Of DTensors of any placements, of whole tensors, or of local ones.
        param: The parameter.
        states: Those of its rule.
    """
    entry = dict(saved)
    for number in numbers_in(saved):
        name, shared = f"state{number}", shared_in(saved, number)
        names = [name, *shared] if name in saved else [*shared]
        lead = saved[name].dim() - param.dim() if name in saved else 0
        if all(_is_placed(saved[key], param, lead) for key in names):
            own = {key: _waited(saved[key].to_local()) for key in names}
        else:
            whole = {key: _whole(saved[key]) for key in names}
            in_rows = {key: _in_rows(whole[key], param, lead, each) for key, each in shared.items()}
            if name in whole and whole[name].shape[lead:] != param.shape:
                continue  # a local one
            if name not in whole and None in in_rows.values():
                continue  # likewise
            if None not in in_rows.values() and (can_be_placed(param) or not in_rows):
                whole |= in_rows
            else:  # blocks of which this process has parts
                whole = {name: _decoded(saved, number, param, lead, states)}
                entry = {key: x for key, x in entry.items() if key[len(stem_of(key)) :] != number}
                shared = {}
            own = {key: _inside(x, param, lead) for key, x in whole.items()}
        for key, x in own.items():
            # What blocks share is in rows, or as in an ordinary tensor.
            entry[key] = x.flatten(-2) if key in shared and not ends_with_rows(param) else x
    return entry


def _whole(x: Any) -> Any:
    return x.full_tensor() if is_sharded(x) else x


def _inside(x: Tensor, param: Any, lead: int) -> Tensor:
    """What this process holds of a whole tensor that is placed as a parameter is."""
    size, offset = part_of(param, x.shape[lead:])
    for dim, (length, first) in enumerate(zip(size, offset), lead):
        x = x.narrow(dim, first if length else 0, length)
    return x.contiguous()


def _is_placed(x: Any, param: Any, lead: int) -> bool:
    if not is_sharded(x) or x.device_mesh != param.device_mesh:
        return False
    return list(x.placements) == [_shifted(placement, lead) for placement in param.placements]


def _in_rows(shared: Tensor, param: Any, lead: int, each: int) -> Tensor | None:
    """What blocks of a whole tensor share, in rows; None if it has other blocks.

    Args:
        shared: It.
        param: The parameter.
        lead: Dimensions before those of the parameter.
        each: Entries of a block.
    """
    rows, row = param.shape[0] if param.dim() else 1, row_of(param)
    shape = (rows, -(-row // BLOCK) * each)
    if shared.shape[lead:] == shape:
        return shared
    if row % BLOCK == 0 and shared.shape[lead:] == (rows * row // BLOCK * each,):
        return shared.view(*shared.shape[:lead], *shape)
    return None


def _decoded(saved: Mapping[str, Any], number: str, param: Any, lead: int, states: Sequence[State]) -> Tensor:
    """States of whole tensors as float32, of several together if they have a dimension for it."""
    whole = {key: _whole(x) for key, x in saved.items()}
    if not lead:
        return decode(whole, int(number) - 1, param.numel(), states).view(param.shape)
    together = [f"state{number}", *shared_in(saved, number)]
    found = []
    for k in range(len(whole[together[0]])):
        own = {**whole, **{key: whole[key][k] for key in together}}
        found.append(decode(own, int(number) - 1, param.numel(), states).view(param.shape))
    return torch.stack(found)

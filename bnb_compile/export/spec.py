"""What tensors an artefact is for, in words that its metadata has and errors show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_hyper(hyper: Tensor, groups: int, names: Sequence[str]) -> None:
    """Raise ValueError if a table of hyperparameters has not a row for each group."""
    if tuple(hyper.shape) != (groups, len(names)) or hyper.dtype != torch.float64:
        raise ValueError(
            f"hyper is {spec(hyper)}, must be float64[{groups},{len(names)}]: for each param group "
            f"{', '.join(names)}"
        )


def spec(x: Tensor, any_size: bool = False) -> str:
    """Dtype and shape, and strides if not contiguous: ``float32[*,3,8,8]:[192,1,24,3]``.

    Args:
        x: The tensor.
        any_size: Whether the first dimension is written as ``*``.
    """
    sizes = ["*" if any_size and k == 0 else str(n) for k, n in enumerate(x.shape)]
    strides = "" if x.is_contiguous() else f":[{','.join(map(str, x.stride()))}]"
    return f"{str(x.dtype).removeprefix('torch.')}[{','.join(sizes)}]{strides}"


def lines(specs: dict[str, str]) -> str:
    """One line for each tensor."""
    return "\n".join(f"{spec} {name}" for name, spec in specs.items())


def difference(key: str, found: dict[str, Any], expected: dict[str, Any]) -> str:
    """What an entry of an artefact's metadata says that is not so here."""
    theirs, ours = found[key], expected[key]
    if not isinstance(ours, dict):
        return f"{key} is {theirs}, here it is {ours}"
    for name in (*theirs, *ours):
        there, here = theirs.get(name, "missing"), ours.get(name, "missing")
        if there != here:
            return f"{key}: {name} is {there}, here it is {here}"
    return f"the order of {key} is {list(theirs)}, here it is {list(ours)}"

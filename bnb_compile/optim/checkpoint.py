"""Reading a state dict: what bitsandbytes or this package saved, checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.arena import BLOCK
from ..ops.blockwise import dequantize
from ..rules import Rule
from .family import number

#: bitsandbytes 0.49.2 and later keep the tensors of a parameter under this key.
_NESTED = "__bnb_optimizer_quant_state__"
_OLD_BLOCK = 2048  # of bitsandbytes before 0.44


class SavedMoment(NamedTuple):
    """One state of a parameter: float values, or codes with their scales and map."""

    values: Tensor
    absmax: Tensor
    qmap: Tensor

    @staticmethod
    def full(param: Tensor, value: float) -> SavedMoment:
        """The same value for each element."""
        values = torch.full_like(param, value, dtype=torch.float32)
        return SavedMoment(values, values, values)

    @property
    def block_size(self) -> int:
        """Elements that share a scale; 1 of float values."""
        if self.values.is_floating_point():
            return 1
        return BLOCK if self.absmax.numel() == -(-self.values.numel() // BLOCK) else _OLD_BLOCK

    @property
    def one_scale(self) -> bool:
        """Whether all blocks have the same scale."""
        return bool((self.absmax == self.absmax.flatten()[:1]).all())

    def has_format(self, block_size: int, qmap: Tensor) -> bool:
        """Whether codes mean the same with these blocks and this map."""
        return self.block_size == block_size and torch.equal(self.qmap.to(qmap), qmap)

    def decode(self) -> Tensor:
        """The values in float32."""
        if self.values.is_floating_point():
            return self.values.float()
        return dequantize(self.values, self.absmax, self.qmap, self.block_size)


class SavedState(NamedTuple):
    """The state of a parameter: steps taken, a moment for each state of the rule, squared gradient norms."""

    step: float
    moments: list[SavedMoment]
    gnorm: Tensor | None = None


def flatten(saved: Any) -> dict[str, Any]:
    """A parameter's entry in a state dict without bitsandbytes' nesting.

    Raises:
        ValueError: If it is no dict.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"the state of a parameter must be a dict, got {saved!r}")
    return {**saved, **saved.get(_NESTED, {})}


def match_groups(
    groups: Sequence[dict[str, Any]], state_dict: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[Any, Tensor]]:
    """Match saved groups with the optimizer's.

    Args:
        groups: The optimizer's groups.
        state_dict: The saved state.

    Returns:
        tuple: New contents of every group, where keys that were not saved keep their values; and the
        parameter of each saved index.

    Raises:
        ValueError: If groups or parameters are not as many as saved, or something is missing.
    """
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"no {key!r} in the state dict, only {sorted(state_dict)}")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    contents: list[dict[str, Any]] = []
    params: dict[Any, Tensor] = {}
    for k, (group, saved) in enumerate(zip(groups, saved_groups)):
        if "params" not in saved:
            raise ValueError(f"group {k} has no 'params', only {sorted(saved)}")
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {k} has {len(saved['params'])} parameters, the optimizer's has "
                f"{len(group['params'])}"
            )
        own = copy.deepcopy({key: value for key, value in saved.items() if key != "params"})
        contents.append({**group, **own, "params": group["params"]})
        params.update(zip(saved["params"], group["params"]))
    unknown = [key for key in state_dict["state"] if key not in params]
    if unknown:
        raise ValueError(f"the state dict has states of {unknown}, which are in none of its groups")
    return contents, params


def read_state(rule: Rule, key: Any, param: Tensor, saved: dict[str, Any]) -> SavedState:
    """Read and check the saved state of a parameter.

    Args:
        rule: The optimizer's.
        key: The saved index, for messages.
        param: The parameter.
        saved: Its entry in the state dict, flat.

    Returns:
        SavedState: What was saved; the tensors are those of `saved`.

    Raises:
        ValueError: If an entry is missing or does not fit to the parameter.
    """
    where = f"state of parameter {key}, shape {tuple(param.shape)}"

    def tensor(name: str) -> Tensor:
        if not isinstance(saved.get(name), Tensor):
            raise ValueError(f"{where}: {name} must be a tensor, got {saved.get(name)!r}")
        return saved[name]

    moments = []
    for i, kind in enumerate(rule.states, 1):
        values = tensor(f"state{i}")
        if values.shape != param.shape:
            raise ValueError(f"{where}: state{i} ({kind.name}) has shape {tuple(values.shape)}")
        if values.is_floating_point():
            moments.append(SavedMoment(values, values, values))
            continue
        blocks = [-(-values.numel() // size) for size in (BLOCK, _OLD_BLOCK)]
        if f"absmax{i}" in saved or f"max{i}" not in saved:
            absmax = tensor(f"absmax{i}")
        else:  # bitsandbytes up to 0.49 with block_wise=False
            absmax = tensor(f"max{i}").float()
            absmax = absmax.expand(blocks[0]) if absmax.numel() == 1 else absmax
        moment = SavedMoment(values, absmax, tensor(f"qmap{i}"))
        scales, qmap = tuple(moment.absmax.shape), tuple(moment.qmap.shape)
        if values.dtype != torch.uint8 or qmap != (256,) or scales not in [(count,) for count in blocks]:
            raise ValueError(
                f"{where}: state{i} is {values.dtype} with scales of shape {scales} and a map of shape "
                f"{qmap}; must be uint8 with {blocks[0]} scales (blocks of {BLOCK}; or {blocks[1]}, blocks "
                f"of {_OLD_BLOCK}) and a map of 256"
            )
        moments.append(moment)
    if f"state{len(rule.states) + 1}" in saved:
        raise ValueError(
            f"{where}: has {sorted(saved)}, but {rule.name} keeps {len(rule.states)} states: it is "
            "another algorithm's"
        )
    step = number(f"step of parameter {key}", saved.get("step"))
    gnorm = saved.get("gnorm_vec")
    if gnorm is not None and (not isinstance(gnorm, Tensor) or gnorm.shape != (100,)):
        raise ValueError(f"{where}: gnorm_vec must be a tensor of shape (100,), got {gnorm!r}")
    return SavedState(float(step), moments, gnorm)

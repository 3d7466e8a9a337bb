"""Reading a state dict: what bitsandbytes or this package saved, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..ops.arena import BLOCK
from ..rules import Rule

#: bitsandbytes 0.49.2 and later keep the tensors of a parameter under this key.
_NESTED = "__bnb_optimizer_quant_state__"


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
        ValueError: If groups or parameters are not as many as saved.
    """
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    contents, params = [], {}
    for k, (group, saved) in enumerate(zip(groups, saved_groups)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of optimizer's "
                f"group: group {k} has {len(saved['params'])} parameters, the optimizer's has "
                f"{len(group['params'])}"
            )
        contents.append({**group, **saved, "params": group["params"]})
        params.update(zip(saved["params"], group["params"]))
    return contents, params


def check_state(rule: Rule, key: Any, param: Tensor, saved: dict[str, Any]) -> dict[str, Any]:
    """Check the saved state of a parameter.

    Args:
        rule: The optimizer's.
        key: The saved index, for messages.
        param: The parameter.
        saved: Its saved state.

    Returns:
        dict: The state with bitsandbytes' nesting removed.

    Raises:
        ValueError: If an entry is missing or does not fit to the parameter.
    """
    flat = {name: value for name, value in saved.items() if name != _NESTED}
    flat.update(saved.get(_NESTED, {}))
    where = f"state of parameter {key}, shape {tuple(param.shape)}"

    def entry(name: str) -> Any:
        if name not in flat:
            raise ValueError(f"{where}: no {name!r}, only {sorted(flat)}")
        return flat[name]

    float(entry("step"))
    for i, kind in enumerate(rule.states, 1):
        state = entry(f"state{i}")
        if state.shape != param.shape:
            raise ValueError(f"{where}: state{i} ({kind.name}) has shape {tuple(state.shape)}")
        if state.dtype.is_floating_point:
            continue
        absmax, qmap = entry(f"absmax{i}"), entry(f"qmap{i}")
        blocks = -(-state.numel() // BLOCK)
        if (
            state.element_size() != 1
            or qmap.numel() != 256
            or not (absmax.numel() == blocks or absmax.numel() == -(-state.numel() // 2048))
        ):
            raise ValueError(
                f"{where}: state{i} is {state.dtype} with {absmax.numel()} scales and a map of "
                f"{qmap.numel()} values; must be uint8, {blocks} scales (one for each {BLOCK} elements, "
                "or 2048 as bitsandbytes before 0.44 had) and 256 values"
            )
    return flat

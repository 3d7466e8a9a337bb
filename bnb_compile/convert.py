"""Continue a run of ``torch.optim`` here, or one from here there.

AdamW, Adam without weight decay, SGD, RMSprop and Adagrad have counterparts on both sides. States may be
quantised tensors that can be dequantised, as those of torchao's optimizers, which in turn load what
`to_torch` returns, and keep it in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .optim import Optimizer8bit
from .optim.options import ARGS
from .optim.saving import NORM
from .rules import Rule
from .state.checkpoint import decode
from .state.sharding import is_sharded, local, placed_as, to_local

#: torch's class for each family.
_COUNTERPARTS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.AdamW,
    "momentum": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def from_torch(optimizer: Optimizer8bit, state_dict: dict[str, Any]) -> None:
    """Load the state of a ``torch.optim`` optimizer.

    Args:
        optimizer: Of the same algorithm, with as many groups and parameters. 32-bit states are copied, 8-bit
            states quantised.
        state_dict: What ``state_dict`` of the ``torch.optim`` optimizer returned; it is not changed.

    Raises:
        ValueError: If it does not fit, or has an option that does not exist here; the optimizer is left as it
            was then.
    """
    torch_class = _counterpart(optimizer)
    groups = [_group_from_torch(optimizer, torch_class, group) for group in state_dict["param_groups"]]
    rules = {
        index: optimizer.family.rule(optimizer.family.checked({**optimizer.defaults, **group}))
        for group in groups
        for index in group["params"]
    }
    states = {index: _state_from_torch(rules[index], state) for index, state in state_dict["state"].items()}
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def to_torch(optimizer: Optimizer8bit) -> dict[str, Any]:
    """The state as the ``torch.optim`` optimizer of the same algorithm loads it, with float32 states.

    Args:
        optimizer: AdamW, Adam, SGD, RMSprop or Adagrad, of any precision. States of DTensors are DTensors.

    Raises:
        ValueError: If torch has no such optimizer.
    """
    torch_class = _counterpart(optimizer)
    (defaults,) = torch_class([torch.zeros(1)]).param_groups  # type: ignore[call-arg]
    saved = optimizer.state_dict()
    family_keys = {"lr", "betas", "eps", "weight_decay", NORM, *optimizer.family.extras, *ARGS}
    groups = []
    for group in saved["param_groups"]:
        ours = {**group, **dict(zip(optimizer.family.betas, group["betas"]))}
        # What a schedule or a user has put beside the hyperparameters goes along.
        others = {key: value for key, value in group.items() if key not in family_keys}
        groups.append({**{key: ours.get(key, default) for key, default in defaults.items()}, **others})
    params = [param for group in optimizer.param_groups for param in group["params"]]
    rules = [optimizer.family.rule(g) for g in optimizer.param_groups for _ in g["params"]]
    states = {
        index: _state_to_torch(rules[index], entry, params[index]) for index, entry in saved["state"].items()
    }
    return {"state": states, "param_groups": groups}


def _counterpart(optimizer: Optimizer8bit) -> type[torch.optim.Optimizer]:
    try:
        return _COUNTERPARTS[optimizer.family.name]
    except KeyError:
        raise ValueError(
            f"torch.optim has no {type(optimizer).__name__}; it has {sorted(_COUNTERPARTS)}"
        ) from None


def _group_from_torch(
    optimizer: Optimizer8bit, torch_class: type[torch.optim.Optimizer], group: dict[str, Any]
) -> dict[str, Any]:
    (defaults,) = torch_class([torch.zeros(1)]).param_groups  # type: ignore[call-arg]
    known = (*optimizer.defaults, "betas", *optimizer.family.betas)
    missing = [key for key in known if key in defaults and key not in group]
    if missing:
        raise ValueError(f"a group has no {missing}, only {sorted(group)}: the state is of another algorithm")
    if group.get("maximize"):
        raise ValueError("maximize=True does not exist here, only maximize=False")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"]:
        raise ValueError(
            f"weight_decay={group['weight_decay']} of torch.optim.Adam is added to the gradient; here it is "
            "decoupled as in torch.optim.AdamW, so only 0 can be taken over"
        )
    kept = {key: value for key, value in group.items() if key in known or key not in defaults}
    return {**kept, "params": group["params"]}


def _state_from_torch(rule: Rule, state: dict[str, Any]) -> dict[str, Any]:
    state = dict(state)
    if "grad_avg" in state:
        variance = state["square_avg"].float() - state["grad_avg"].float().square()
        state["variance"] = variance.clamp_min(0)
    # torch's SGD does not count; it has taken a step if it has a buffer.
    entry = {"step": state.get("step", 1)}
    for k, kind in enumerate(rule.states, 1):
        if not isinstance(state.get(kind.name), Tensor):
            raise ValueError(f"{kind.name} must be a tensor, got {state.get(kind.name)!r}")
        entry[f"state{k}"] = _dense(state[kind.name]).float()
    return entry


def _dense(x: Tensor) -> Tensor:
    """An ordinary tensor, or a DTensor, in the place of a quantised one such as torchao's."""
    quantised = type(x) is not Tensor and not is_sharded(x) and hasattr(x, "dequantize")
    return x.dequantize() if quantised else x


def _state_to_torch(rule: Rule, state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    entry = {"step": torch.tensor(float(state["step"]))}
    sharded = is_sharded(param)
    state = to_local(state, param, rule.states) if sharded else state
    for k, kind in enumerate(rule.states):
        values = decode(state, k, local(param).numel(), rule.states).clone()
        entry[kind.name] = placed_as(values, param) if sharded else values.view(param.shape)
    if "variance" in entry:
        entry["square_avg"] = entry.pop("variance") + entry["grad_avg"].square()
    return entry

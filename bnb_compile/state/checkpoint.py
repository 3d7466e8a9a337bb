"""Reading a saved state: what bitsandbytes or this package saved, checked before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..formats import BLOCK, STEMS, Slot, Stored, find, store_states
from ..formats.ratio import roots
from ..rules import Rule, State
from ..validate import number

#: bitsandbytes 0.49.2 and later keep the tensors of a parameter under this key.
_NESTED = "__bnb_optimizer_quant_state__"
MOST_STEPS = 2**31 - 1  # as bitsandbytes counts them
#: No state gets there, as the step leaves elements alone whose gradient is 2^60 or more.
MOST, MOST_SQUARE = 2.0**80, 2.0**126
RING = 100  # entries of gnorm_vec
_NORMS = {"gnorm_vec": RING, "unorm_vec": 1}

#: Which states of a rule each number in bitsandbytes' keys stands for: state1, state2, ...
Numbers = tuple[tuple[int, ...], ...]


class SavedState(NamedTuple):
    """The state of a parameter, checked.

    Attributes:
        step: Steps taken, a number or a tensor.
        entry: What was saved, flat, with a key for each of the rule's states by itself: state1, state2, ...
        states: The rule's.
        gnorm: (100,) squared gradient norms, or None.
        unorm: (1,) squared norm of the last update, or None.
    """

    step: Any
    entry: Mapping[str, Any]
    states: Sequence[State]
    gnorm: Tensor | None = None
    unorm: Tensor | None = None

    def parts(self, stored: Sequence[Stored], slot: Slot) -> dict[int, dict[str, Tensor]]:
        """The tensors of each state in its format: those that were saved, or converted ones."""
        row = slot.row if slot.row < slot.numel else 0
        given = {}
        for one in stored:
            parts = one.format.parts_of(self.entry, one.state + 1, slot.numel, row)
            if parts is not None:
                given[one.state] = parts
        if len(given) == len(stored):
            return given
        return encode(stored, self.values(slot.numel), slot, given=given)

    def values(self, numel: int) -> list[Tensor]:
        """The values of all states, (numel,) float32 each."""
        return [decode(self.entry, k, numel, self.states) for k in range(len(self.states))]


def encode(
    stored: Sequence[Stored],
    values: Sequence[Tensor],
    slot: Slot,
    maxima: Sequence[Tensor] | None = None,
    given: Mapping[int, Mapping[str, Tensor]] | None = None,
) -> dict[int, dict[str, Tensor]]:
    """The parts of a parameter's states, from (numel,) float32 each; see `store_states`."""
    pers = {one.state: {part.name: part.per for part in one.format.parts} for one in stored}
    padded = {
        state: {name: slot.padded_part(x, pers[state][name]) for name, x in parts.items()}
        for state, parts in (given or {}).items()
    }
    fresh = store_states(stored, [slot.padded(x) for x in values], maxima, given=padded)
    return {
        state: {name: slot.unpadded_part(x, pers[state][name]) for name, x in of_state.parts.items()}
        for state, of_state in fresh.items()
    }


def decode(entry: Mapping[str, Any], state: int, numel: int, states: Sequence[State]) -> Tensor:
    """A state of a parameter, whatever format it was saved in.

    Args:
        entry: As of `SavedState`.
        state: Which of the rule's, counted from 0.
        numel: Of the parameter.
        states: The rule's.

    Returns:
        Tensor: (numel,) float32.

    Raises:
        ValueError: If it is damaged, or in no format that is known.
    """
    of = find(entry, state + 1)
    if of is None:
        x = entry.get(f"state{state + 1}")
        raise ValueError(f"state{state + 1} is {getattr(x, 'dtype', x)}, which no format has")
    values = of.decode_saved(entry, state + 1, numel)
    if not of.ratio:
        return values
    name = states[state].over
    if name is None:
        raise ValueError(f"state{state + 1} ({states[state].name}) is a ratio, but over no other state")
    return values * roots(decode(entry, [s.name for s in states].index(name), numel, states))[0]


def numbers_in(entry: Mapping[str, Any]) -> list[str]:
    """The numbers of the states that are in an entry, as in its keys."""
    found = dict.fromkeys(str(key)[len(stem_of(key)) :] for key in entry if stem_of(key) in STEMS)
    return [n for n in found if n and find(entry, int(n)) is not None]


def shared_in(entry: Mapping[str, Any], number: str) -> dict[str, int]:
    """Keys of what elements of a state share, in an entry, with the entries that there are for a block."""
    of = find(entry, int(number))
    assert of is not None
    return {f"{of.keys[part.name]}{number}": BLOCK // part.per for part in of.parts if part.per > 1}


def stem_of(key: Any) -> str:
    """A key without its number."""
    return str(key).rstrip("0123456789")


def is_own_key(key: Any) -> bool:
    """Whether a key of an entry is of this package or bitsandbytes, and no user's."""
    return key in ("step", *_NORMS, _NESTED) or stem_of(key) in STEMS


def flatten(saved: Any) -> dict[str, Any]:
    """A parameter's entry in a state dict without bitsandbytes' nesting.

    Raises:
        ValueError: If it is no dict.
    """
    nested = saved.get(_NESTED, {}) if isinstance(saved, Mapping) else None
    if not isinstance(nested, Mapping):
        raise ValueError(f"the state of a parameter must be a dict, got {saved!r}")
    return {key: value for key, value in {**saved, **nested}.items() if key != _NESTED}


def unpack(entry: Mapping[str, Any], numbers: Numbers, where: str) -> dict[str, Any]:
    """An entry with a number in its keys for each state, where bitsandbytes has one number for several.

    Raises:
        ValueError: If what stands for several states has not one of each.
    """
    states = sum(map(len, numbers))
    if all(len(members) == 1 for members in numbers) or f"state{states}" in entry:
        return dict(entry)
    unpacked = {key: value for key, value in entry.items() if not key[-1:].isdigit()}
    for n, members in enumerate(numbers, 1):
        for name in {key.rstrip("0123456789") for key in entry if key.endswith(str(n))}:
            value = entry[f"{name}{n}"]
            together = len(members) > 1 and isinstance(value, Tensor) and name != "qmap"
            if together and (not value.dim() or len(value) != len(members)):
                raise ValueError(
                    f"{where}: {name}{n} has shape {tuple(value.shape)}, must have {len(members)} rows, one "
                    f"for each of its states"
                )
            for j, k in enumerate(members):
                unpacked[f"{name}{k + 1}"] = value[j] if together else value
    return unpacked


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
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"a state dict must be a dict, got {state_dict!r}")
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if key not in state_dict:
            raise ValueError(f"no {key!r} in the state dict, only {sorted(map(str, state_dict))}")
        if not isinstance(state_dict[key], kind):
            raise ValueError(f"{key!r} of the state dict is {state_dict[key]!r}, must be a {kind.__name__}")
    saved_groups = state_dict["param_groups"]
    if len(saved_groups) != len(groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(saved_groups)}, the optimizer has {len(groups)}"
        )
    contents: list[dict[str, Any]] = []
    params: dict[Any, Tensor] = {}
    for k, (group, saved) in enumerate(zip(groups, saved_groups)):
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), Sequence):
            raise ValueError(f"group {k} has no list of 'params', it is {saved!r}")
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


def read_state(
    rule: Rule, numbers: Numbers, key: Any, param: Tensor, saved: Any, check: bool = True
) -> SavedState:
    """Read and check the saved state of a parameter.

    Args:
        rule: The optimizer's.
        numbers: How bitsandbytes numbers its states.
        key: The saved index, for messages.
        param: The parameter.
        saved: Its entry in the state dict.
        check: Whether to look at values, which takes a pass over them; shapes are always checked.

    Returns:
        SavedState: What was saved; the tensors are those of `saved`.

    Raises:
        ValueError: If an entry is missing, damaged, or does not fit to the parameter.
    """
    where = f"state of parameter {key}, shape {tuple(param.shape)}"
    entry = unpack(flatten(saved), numbers, where)
    look = check and not backends.replaces_tensors()
    for k, state in enumerate(rule.states):
        name = f"state{k + 1}"
        if (
            name not in entry
            and find(entry, k + 1) is None
            or name in entry
            and not isinstance(entry[name], Tensor)
        ):
            raise ValueError(f"{where}: {name} ({state.name}) must be a tensor, got {entry.get(name)!r}")
        if name in entry and entry[name].shape != param.shape:
            raise ValueError(f"{where}: {name} ({state.name}) has shape {tuple(entry[name].shape)}")
        if not look:
            continue
        try:
            values = decode(entry, k, param.numel(), rule.states)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not values.numel():
            continue
        least, most = map(float, values.aminmax())
        if state.nonnegative and least < 0:
            raise ValueError(f"{where}: {name} ({state.name}) is negative, the least is {least}")
        if max(-least, most) >= (MOST_SQUARE if state.nonnegative else MOST):
            raise ValueError(f"{where}: {name} ({state.name}) has values as large as {max(-least, most)}")
    if f"state{len(rule.states) + 1}" in entry:
        raise ValueError(
            f"{where}: has {sorted(entry)}, but {rule.name} keeps {len(rule.states)} states: it is "
            "another algorithm's"
        )
    norms = [_squares(entry.get(name), name, size, where, look) for name, size in _NORMS.items()]
    return SavedState(_steps(entry.get("step"), where), entry, rule.states, *norms)


def _squares(x: Any, name: str, size: int, where: str, look: bool) -> Tensor | None:
    """Squared norms, if there are any."""
    if x is None:
        return None
    plain = isinstance(x, Tensor) and x.layout is torch.strided and x.is_floating_point()
    if not plain or x.shape != (size,) or x.device.type == "meta":
        raise ValueError(f"{where}: {name} must be a dense tensor of shape ({size},) of floats, got {x!r}")
    if look and not bool((x >= 0).all() & x.isfinite().all()):
        raise ValueError(f"{where}: {name} has values that are negative or not finite: {x}")
    return x


def _steps(step: Any, where: str) -> Any:
    if isinstance(step, Tensor) and backends.replaces_tensors():
        return step
    if isinstance(step, Tensor) and step.device.type == "meta":
        raise ValueError(f"{where}: step is on the meta device and has no value")
    steps = number(f"step in the {where}", step)
    if not 0 <= steps <= MOST_STEPS or steps != int(steps):
        raise ValueError(f"{where}: step is {steps}, must be a whole number up to {MOST_STEPS}")
    return int(steps)

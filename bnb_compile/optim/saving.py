"""State dicts, copies and reports of an optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..formats import FORMATS, STEMS, layout
from ..ops.operator import StepOp
from ..state.checkpoint import encode, flatten, match_groups, numbers_in, read_state, shared_in, stem_of
from ..state.sharding import (
    SHORTEST_ROW,
    can_be_placed,
    ends_with_rows,
    has_blocks,
    is_sharded,
    local,
    moved,
    row_of,
    to_global,
    to_local,
)
from ..state.structure import Place
from .base import AbstractOptimizer
from .changes import Changes, params_of
from .family import FAMILIES
from .manager import GlobalOptimManager
from .options import OF_BITS, format_of

#: Key of the first group of a state dict: what `previous_norm` compares with next.
NORM = "norm_before"


@torch._disable_dynamo
def state_dict(optimizer: AbstractOptimizer, changes: Changes) -> dict[str, Any]:
    """See `Optimizer8bit.state_dict`."""
    for before in optimizer._optimizer_state_dict_pre_hooks.values():
        before(optimizer)
    optimizer.check_ended("state_dict()")
    index: dict[int, int] = {}
    groups = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            index.setdefault(id(param), len(index))
        packed = {key: value for key, value in group.items() if key != "params"}
        groups.append({**packed, "params": [index[id(param)] for param in group["params"]]})
    if optimizer.previous_norm:
        groups[0][NORM] = optimizer.norms.norm
    structure = changes.structure
    steps = {bucket: bucket.step.tolist() for bucket in structure.buckets}
    states: dict[Any, Any] = {}
    for key, entry in optimizer.state.items():
        if not isinstance(key, Tensor):
            states[key] = entry
        elif id(key) in index and entry:
            place = structure.places.get(id(key))
            saved = dict(entry)
            if place is not None and entry is place.bucket.entries[place.k] and not entry.replaced:
                saved["step"] = int(steps[place.bucket][place.k])
                if is_sharded(key):
                    saved = _of_all_processes(place, saved)
            elif isinstance(saved.get("step"), Tensor):
                saved["step"] = int(saved["step"])
            states[index[id(key)]] = saved
    found = {"state": states, "param_groups": groups}
    for after in optimizer._optimizer_state_dict_post_hooks.values():
        found = after(optimizer, found) or found
    return found


def _of_all_processes(place: Place, saved: dict[str, Any]) -> dict[str, Any]:
    """The entry of a DTensor in a state dict."""
    bucket, k = place
    param = bucket.params[k]
    if can_be_placed(param) or not any(shared_in(saved, number) for number in numbers_in(saved)):
        return to_global(saved, param)
    # Its blocks are those of columns, which no other mesh has: encode those of whole rows.
    own, numel = bucket.saved(k), bucket.local[k].numel()
    found = {key: x for key, x in saved.items() if stem_of(key) not in STEMS}
    values, placed = zip(*(moved(x, param) for x in own.values(numel)))
    (slot,) = layout([values[0].numel()], (row_of(param), 0, 0)).slots
    fresh = encode(bucket.op.stored, values, slot)
    shape = placed[0].to_local().shape
    for number, members in enumerate(bucket.numbers, 1):
        formats = {stored.state: stored.format for stored in bucket.op.stored}
        of_members = [formats[state].entries(fresh[state], number, shape) for state in members]
        entry = of_members[0]
        if len(members) > 1:
            together = [f"state{number}", *shared_in(entry, str(number))]
            entry |= {key: torch.stack([x[key] for x in of_members]) for key in together}
        found.update(to_global(entry, placed[0]))
    return found


@torch._disable_dynamo
def load_state_dict(optimizer: AbstractOptimizer, changes: Changes, state_dict: dict[str, Any]) -> None:
    """See `Optimizer8bit.load_state_dict`."""
    state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
    for before in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = before(optimizer, state_dict) or state_dict
    optimizer.check_ended("load_state_dict()")
    family, structure = optimizer.family, changes.structure
    contents, params = match_groups(optimizer.param_groups, state_dict)
    contents = [family.checked(content) for content in contents]
    own = {
        x.untyped_storage().data_ptr() for bucket in structure.buckets for x in [*bucket.arenas, bucket.step]
    }
    rules = {}
    for content in contents:
        for param in content["params"]:
            config = changes.config(content, param)
            rules[id(param)] = family.rule(config)
    entries = {}
    for key, saved in state_dict["state"].items():
        if not flatten(structure.renamed(saved)):
            continue
        param = params[key]
        rule = rules[id(param)]
        own_part = structure.renamed(saved)
        if is_sharded(param):
            own_part = to_local(flatten(own_part), param, rule.states)
        read = read_state(rule, family.numbers_of(rule), key, local(param), own_part)
        # What is a view of the arenas must not change while they are written.
        entry = {k: x.clone() if _lies_in(x, own) else x for k, x in read.entry.items()}
        entries[param] = read._replace(
            entry=entry, gnorm=entry.get("gnorm_vec"), unorm=entry.get("unorm_vec")
        )

    norm = contents[0].pop(NORM, None)
    if norm is not None:
        optimizer.norms.norm = float(norm)
    for group, content in zip(optimizer.param_groups, contents):
        group.update(content)
    known = params_of(optimizer.param_groups)
    if optimizer.state is not structure.states:
        structure = changes.begin_anew()  # what replaced the state is replaced in turn
    elif structure.buckets:
        changes.prepare()
    for param in known:
        structure.load(param, entries.get(param))
    if entries:
        changes.prepare()
    for after in optimizer._optimizer_load_state_dict_post_hooks.values():
        after(optimizer)


def _lies_in(x: Any, storages: set[int]) -> bool:
    plain = isinstance(x, Tensor) and x.layout is torch.strided and x.device.type != "meta"
    return plain and x.untyped_storage().data_ptr() in storages


def getstate(optimizer: AbstractOptimizer, changes: Changes) -> dict[str, Any]:
    """What a copy of an optimizer needs; see ``object.__getstate__``."""
    return {
        "defaults": optimizer.defaults,
        "param_groups": [dict(group) for group in optimizer.param_groups],
        "state": {param: dict(entry) for param, entry in optimizer.state.items()},
        "overrides": [
            (param, changes.overrides[id(param)])
            for param in params_of(optimizer.param_groups)
            if id(param) in changes.overrides
        ],
        "args": optimizer.args,
        "family": optimizer.family.name,
        "is_paged": optimizer.is_paged,
        "max_grad_norm": optimizer.max_grad_norm,
        "bf16_stochastic_round": optimizer.bf16_stochastic_round,
        "release_gradients": optimizer.release_gradients,
        "previous_norm": optimizer.previous_norm,
        NORM: optimizer.norms.norm,
        "_step_supports_amp_scaling": optimizer._step_supports_amp_scaling,
        "_compile": optimizer._compile,
    }


def setstate(optimizer: AbstractOptimizer, state: dict[str, Any]) -> None:
    """Make an optimizer from what `getstate` returned."""
    for param, config in state.pop("overrides"):
        GlobalOptimManager.get_instance().override_config(param, key_value_dict=config)
    for option in ("release_gradients", "previous_norm"):
        state.setdefault(option, False)  # saved before there was such an option
    by_name, entries, norm = FAMILIES[state.pop("family")], state.pop("state"), state.pop(NORM, 0.0)
    # A class of a rule has its own, also when a newer one has its name.
    family = getattr(type(optimizer), "family", by_name)
    torch.optim.Optimizer.__setstate__(optimizer, {**state, "family": family})
    optimizer.begin()
    optimizer.norms.norm = norm
    optimizer.state = optimizer.structure.new_states(entries)
    optimizer.adopt_groups()
    if any(entries.values()):
        optimizer.init_state()


def replace(optimizer: AbstractOptimizer, state: dict[str, Any]) -> None:
    """Replace some attributes, as ``torch.optim.Optimizer.__setstate__``."""
    torch.optim.Optimizer.__setstate__(optimizer, state)
    optimizer.adopt_groups()


def precision_report(optimizer: AbstractOptimizer, changes: Changes) -> list[dict[str, Any]]:
    """See `Optimizer8bit.precision_report`."""
    overrides = GlobalOptimManager.get_instance().overrides(optimizer.param_groups)
    report: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or range(len(report), len(report) + len(group["params"]))
        for name, param in zip(names, group["params"]):
            override = overrides.get(id(param), {})
            config = changes.config(group, param, override)
            op, chosen = changes.kind(config, param).op, format_of(config, param.numel(), has_blocks(param))
            report.append(
                dict(
                    name=name,
                    shape=tuple(param.shape),
                    numel=param.numel(),
                    bits=FORMATS[chosen].bits if op.stored else None,
                    format=chosen if op.stored else None,
                    reason=_reason(op, chosen, config, {"optim_bits", "states"} & override.keys(), param),
                    bytes_per_param=op.bytes_per_param(
                        param.numel(), (row_of(param), 0, 0) if ends_with_rows(param) else None
                    ),
                )
            )
    return report


def _reason(op: StepOp, chosen: str, config: dict[str, Any], overridden: set[str], param: Tensor) -> str:
    """Why a parameter has states of so many bits."""
    if not op.stored:
        return "the algorithm keeps no states"
    asked = (
        f"optim_bits={config['optim_bits']}" if config["states"] is None else f"states={config['states']!r}"
    )
    by = " by an override" if overridden else ""
    wanted = config["states"] or OF_BITS[config["optim_bits"]]
    if FORMATS[wanted].bits > 8:
        return asked + by
    if not has_blocks(param):
        return f"a DTensor with rows of fewer than {SHORTEST_ROW} elements"
    least = f"min_8bit_size={config['min_8bit_size']} elements"
    return f"{asked} and at least {least}" if chosen == wanted else f"fewer than {least}"

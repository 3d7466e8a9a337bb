"""What of an algorithm, its options and the formats of its states does not go together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..formats import Stored, ratio
from ..rules import Rule


def check_options(rule: Rule, config: Mapping[str, Any], shared_in_blocks: bool, dtype: torch.dtype) -> None:
    """Raise if a rule cannot have some options.

    Args:
        rule: The rule.
        config: Options of a parameter.
        dtype: Of the parameter.
        shared_in_blocks: Whether its states share something in blocks.

    Raises:
        ValueError: If a trust ratio has no direction to measure, or what an option needs is known too late,
            or the rule is for parameters of another dtype.
    """
    if rule.rounds_to not in (None, dtype):
        raise ValueError(
            f"a parameter of {dtype}, must be of {rule.rounds_to}, to which rule {rule.name} rounds"
        )
    limited = config["max_unorm"] > 0
    if rule.has_update and limited:
        raise ValueError(
            f"max_unorm={config['max_unorm']}, must be 0: rule {rule.name} has an update, no part of which "
            "is a direction that a trust ratio could measure"
        )
    if rule.means and (limited or (shared_in_blocks and not config["block_wise"])):
        raise ValueError(
            f"max_unorm={config['max_unorm']}, block_wise={config['block_wise']}: must be 0 and True, as "
            f"rule {rule.name} takes means over a parameter, and what those two need is known only when the "
            "means are"
        )


def check_ratios(
    rule: Rule, stored: Sequence[Stored], config: Mapping[str, Any], values: Sequence[Any]
) -> None:
    """Raise if a state cannot be stored as its ratio to the root of another.

    Args:
        rule: The rule.
        stored: How its states are stored.
        config: Options of a parameter.
        values: Of the rule's hyperparameters; what is in a tensor is not looked at.

    Raises:
        ValueError: If a block shall not have its own scale, or the ratio has no bound.
    """
    named = dict(zip(rule.hyper._fields, values))
    for one in stored:
        state = rule.states[one.state]
        if one.over is None or state.decays is None:
            continue
        if not config.get("block_wise", True):
            raise ValueError(
                f"block_wise=False, must be True where {state.name} is stored as a ratio "
                f"({one.format.name}), of which each block has its own scale"
            )
        (mean, decay), (squares, decay_over) = ((name, named[name]) for name in state.decays)
        if isinstance(decay, Tensor) or isinstance(decay_over, Tensor):
            continue
        if ratio.most(float(decay), float(decay_over)) == math.inf:
            raise ValueError(
                f"{mean}={decay}, {squares}={decay_over}: must have {mean}**2 < {squares} where {state.name} "
                f"is stored as its ratio to the root of {state.over} ({one.format.name}), which has no bound "
                'otherwise; states="dynamic8" takes any'
            )

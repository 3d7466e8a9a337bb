"""Changes of a rule that are rules again, so that they can be combined; each is elementwise.

    Rule("tiger", ...)  ->  cautious(Rule("tiger", ...)), named cautious_tiger

They work for every rule with a `direction`, of this package or a user's.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .rule import Rule, extended


def cautious(rule: Rule) -> Rule:
    """Only elements whose direction agrees with the gradient are moved.

    Liang et al., https://arxiv.org/abs/2411.16085, without the division by the share of such elements, which
    would need a second pass over the parameter.

    Args:
        rule: With a direction.
    """

    def direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        moved, *states = rule.direction(param, grad, *rest)
        return torch.where(moved * grad > 0, moved, torch.zeros_like(moved)), *states

    # What rounding takes away would not be masked.
    states = tuple(state._replace(impulse=None) for state in rule.states)
    return _changed("cautious", rule, direction=direction, states=states)


def decoupled_weight_decay(rule: Rule) -> Rule:
    """A parameter loses `lr` times `weight_decay` of itself in each step, whatever its gradient is.

    Loshchilov & Hutter, https://arxiv.org/abs/1711.05101. The rule must not have a `weight_decay` yet.
    """
    hyper = _with_weight_decay(rule)

    def scalars(h: Any, step: Tensor) -> Any:
        found = rule.shared(_without_weight_decay(rule, h), step)
        return found._replace(keep=found.keep * (1 - h.lr * h.weight_decay))

    return _changed("decoupled", rule, hyper=hyper, scalars=scalars)


def coupled_weight_decay(rule: Rule) -> Rule:
    """`weight_decay` times the parameter is added to its gradient.

    The rule must not have a `weight_decay` yet.
    """
    hyper = _with_weight_decay(rule)

    def scalars(h: Any, step: Tensor) -> Any:
        found = rule.shared(_without_weight_decay(rule, h), step)
        kind: Any = type(found)
        return extended(kind, "weight_decay")(*found, weight_decay=h.weight_decay)

    def direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return rule.direction(param, grad + rest[-1].weight_decay * param, *rest)

    return _changed("coupled", rule, hyper=hyper, scalars=scalars, direction=direction)


def _changed(prefix: str, rule: Rule, **fields: Any) -> Rule:
    if rule.has_update:
        raise ValueError(f"rule {rule.name} has an update, must have a direction to be made {prefix}")
    given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    return Rule(**{**given, "update": None, "name": f"{prefix}_{rule.name}", **fields})


def _with_weight_decay(rule: Rule) -> Any:
    """The hyperparameters with one more, which is 0 by default."""
    if "weight_decay" in rule.hyper._fields:
        raise ValueError(f"rule {rule.name} has a weight_decay already: {list(rule.hyper._fields)}")
    fields = [(name, Any) for name in (*rule.hyper._fields, "weight_decay")]
    hyper = cast(Any, NamedTuple("Hyper", fields))
    defaults = {**rule.hyper._field_defaults, "weight_decay": 0.0}
    hyper.__new__.__defaults__ = tuple(defaults[name] for name, _ in fields if name in defaults)
    hyper._field_defaults = defaults
    return hyper


def _without_weight_decay(rule: Rule, h: Any) -> Any:
    return rule.hyper(*(getattr(h, name) for name in rule.hyper._fields))

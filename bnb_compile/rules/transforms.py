"""Changes of a rule that are rules again, so that they can be combined.

    Rule("tiger", ...)  ->  cautious(Rule("tiger", ...)), named cautious_tiger

They work for every rule with a `direction`, of this package or a user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .rule import Rule, extended


def cautious(rule: Rule, normalised: bool = False) -> Rule:
    """Only elements whose direction agrees with the gradient are moved.

    Liang et al., https://arxiv.org/abs/2411.16085.

    Args:
        rule: With a direction, and without means if `normalised`.
        normalised: Whether what is left is divided by the share of such elements in the parameter, or by
            0.001, as in the paper. That needs a second pass over everything.
    """

    def agrees(param: Tensor, grad: Tensor, *rest: Any) -> Tensor:
        moved, *_ = rule.direction(param, grad, *rest)
        return torch.where(moved * grad > 0, torch.ones_like(moved), torch.zeros_like(moved))

    def direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        moved, *states = rule.direction(param, grad, *rest)
        moved = torch.where(moved * grad > 0, moved, torch.zeros_like(moved))
        return (moved / rest[-1].agreement.clamp(min=1e-3) if normalised else moved), *states

    # What rounding takes away would not be masked.
    states = tuple(state._replace(impulse=None) for state in rule.states)
    means = _only_means(rule, "agreement", agrees) if normalised else rule.means
    prefix = "normalised_cautious" if normalised else "cautious"
    return _changed(prefix, rule, direction=direction, states=states, means=means)


def clipped_update(rule: Rule, limit: float = 1.0) -> Rule:
    """A direction is made smaller where the root of its mean square over the parameter is above a limit.

    Shazeer & Stern, https://arxiv.org/abs/1804.04235, section 6. It needs a second pass over everything.

    Args:
        rule: With a direction, and without means.
        limit: For the direction times `unit`, that is, before the learning rate.
    """

    def square(param: Tensor, grad: Tensor, *rest: Any) -> Tensor:
        moved, *_ = rule.direction(param, grad, *rest)
        return (rest[-1].unit * moved) * (rest[-1].unit * moved)

    def direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        moved, *states = rule.direction(param, grad, *rest)
        return moved / (rest[-1].mean_square.sqrt() / limit).clamp(min=1.0), *states

    states = tuple(state._replace(impulse=None) for state in rule.states)
    means = _only_means(rule, "mean_square", square)
    return _changed("clipped", rule, direction=direction, states=states, means=means)


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


def _only_means(rule: Rule, name: str, number: Callable[..., Tensor]) -> tuple:
    if rule.means:
        raise ValueError(
            f"rule {rule.name} takes the means {[own for own, _ in rule.means]} already, and its direction, "
            f"of which {name} is to be a mean, is known only when those are"
        )
    return ((name, number),)


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

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

from .rounding import to_bfloat16
from .rule import Rule, State, extended


def cautious(rule: Rule, normalised: bool = False, sign: Callable[..., Tensor] | None = None) -> Rule:
    """Only elements whose direction agrees with the gradient are moved.

    Liang et al., https://arxiv.org/abs/2411.16085.

    Args:
        rule: With a direction, and without means if `normalised`.
        normalised: Whether what is left is divided by the share of such elements in the parameter, or by
            0.001, as in the paper. That needs a first pass over everything.
        sign: ``(param, grad, *states, scalars) -> number``, elementwise, which has the sign of the direction
            and is cheaper, for that pass: what it does not use is not read. Of Adam it is the new `exp_avg`.
    """

    def agrees(param: Tensor, grad: Tensor, *rest: Any) -> Tensor:
        moved = sign(param, grad, *rest) if sign else rule.direction(param, grad, *rest)[0]
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


def mars(rule: Rule, clipped: bool = True) -> Rule:
    """A gradient is corrected by how far it is from the last one, which reduces its variance.

    Yuan et al., https://arxiv.org/abs/2411.10438, the approximate form, which takes the last step's gradient
    in place of this step's at the last parameters. There is one more state, `previous_grad`, and one more
    hyperparameter, `gamma`, 0.025 by default; with 0 the rule is what it was, but for the clipping.

    Args:
        rule: With a direction and a hyperparameter `beta1`, and without means if `clipped`.
        clipped: Whether the corrected gradient of a parameter is scaled down to a norm of 1, as in the paper.
            That needs a first pass over everything.
    """
    if "beta1" not in rule.hyper._fields:
        raise ValueError(f"rule {rule.name}: must have a hyperparameter beta1, has {rule.hyper._fields}")
    hyper = _with_hyper(rule, "gamma", 0.025)

    def scalars(h: Any, step: Tensor) -> Any:
        found = rule.shared(_without(rule, h), step)
        kind: Any = type(found)
        return extended(kind, "correction")(*found, correction=h.gamma * h.beta1 / (1 - h.beta1))

    def corrected(grad: Tensor, *rest: Any) -> Tensor:
        *_, previous_grad, s = rest
        return grad + s.correction * (grad - previous_grad)

    def square(param: Tensor, grad: Tensor, *rest: Any) -> Tensor:
        return corrected(grad, *rest).square()

    def direction(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        *states, _, s = rest
        now = corrected(grad, *rest)
        if clipped:
            now = now / (s.mean_square * s.elements).sqrt().clamp(min=1.0)
        return *rule.direction(param, now, *states, s), grad

    states = (*rule.states, State("previous_grad"))
    means = _only_means(rule, "mean_square", square) if clipped else rule.means
    return _changed(
        "mars", rule, hyper=hyper, states=states, scalars=scalars, direction=direction, means=means
    )


def error_feedback(rule: Rule) -> Rule:
    """Of bfloat16 parameters: what rounding takes away is given to a mean, which brings it back.

    Nikdan et al., ECO, https://arxiv.org/abs/2601.22101. The paper's factor is minus the inverse of what a
    part of the mean moves the parameter in the steps to come, which is the state's `impulse`. Parameters are
    rounded to nearest. It takes no memory; the error of one step is lost where the second moment is 0.

    Args:
        rule: Of which a state has an `impulse`, such as `ADAM`.
    """
    carriers = [state for state in rule.states if state.impulse is not None]
    if not carriers:
        raise ValueError(f"rule {rule.name}: must have a state with an impulse, which carries the error")
    carrier, impulse = carriers[0], cast(Any, carriers[0].impulse)
    assert carrier.over is not None
    place, over = rule.place_of(carrier.name), rule.place_of(carrier.over)

    def update(param: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        s = rest[-1]
        moved, *states = rule.update(param, grad, *rest)
        rounded = to_bfloat16(moved)
        lost = moved - rounded
        of_one = s.step_size * impulse(torch.ones_like(lost), states[over].sqrt(), s)
        # Nothing is lost where nothing moves, that is, where it would be divided by 0.
        given = torch.where(of_one > 0, lost / of_one, 0.0)
        states[place] = states[place] - torch.where(lost == 0, 0.0, given)
        return rounded, *states

    states = tuple(state._replace(impulse=None) for state in rule.states)
    fields = dict(states=states, direction=None, update=update, rounds_to=torch.bfloat16)
    return _changed("error_feedback", rule, **fields)


def decoupled_weight_decay(rule: Rule) -> Rule:
    """A parameter loses `lr` times `weight_decay` of itself in each step, whatever its gradient is.

    Loshchilov & Hutter, https://arxiv.org/abs/1711.05101. The rule must not have a `weight_decay` yet.
    """
    hyper = _with_hyper(rule, "weight_decay", 0.0)

    def scalars(h: Any, step: Tensor) -> Any:
        found = rule.shared(_without(rule, h), step)
        return found._replace(keep=found.keep * (1 - h.lr * h.weight_decay))

    return _changed("decoupled", rule, hyper=hyper, scalars=scalars)


def coupled_weight_decay(rule: Rule) -> Rule:
    """`weight_decay` times the parameter is added to its gradient.

    The rule must not have a `weight_decay` yet.
    """
    hyper = _with_hyper(rule, "weight_decay", 0.0)

    def scalars(h: Any, step: Tensor) -> Any:
        found = rule.shared(_without(rule, h), step)
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


def _with_hyper(rule: Rule, name: str, default: float) -> Any:
    """The hyperparameters with one more."""
    if name in rule.hyper._fields:
        raise ValueError(f"rule {rule.name} has a {name} already: {list(rule.hyper._fields)}")
    fields = [(own, Any) for own in (*rule.hyper._fields, name)]
    hyper = cast(Any, NamedTuple("Hyper", fields))
    defaults = {**rule.hyper._field_defaults, name: default}
    hyper.__new__.__defaults__ = tuple(defaults[own] for own, _ in fields if own in defaults)
    hyper._field_defaults = defaults
    return hyper


def _without(rule: Rule, h: Any) -> Any:
    """The rule's own hyperparameters."""
    return rule.hyper(*(getattr(h, name) for name in rule.hyper._fields))

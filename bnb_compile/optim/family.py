"""How an algorithm reads its param groups: what bitsandbytes calls an `optimizer_name`."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..rules import Rule
from ..validate import flag, number

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One algorithm's param groups.

    Attributes:
        name: bitsandbytes' `optimizer_name`.
        moments: 1 or 2, states of an element in bitsandbytes: the base is `Optimizer1State` or `...2State`.
        rule: The rule that a group asks for.
        betas: Names of the entries of ``group["betas"]``; none if groups have no such key. They are fields of
            the rule's hyperparameters; as keys of a group they take the place of the entry.
        extras: Further keys of a group, with their defaults; flags have a bool.
        check: Raises ValueError for values that do not go together.
        unused: Which of `betas` and `eps` the algorithm does not have.
        initial: What the states of a group's parameters begin with, see `State.initial`; zeros by default.
        least: The smallest value that an extra may have.
        numbers: Which states of the rule stand under each number in bitsandbytes' keys (`state1`, `state2`,
            ...); by default each state has a number of its own.
    """

    name: str
    moments: int
    rule: Callable[[Group], Rule]
    betas: tuple[str, ...] = ("beta1", "beta2")
    extras: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Group], None] = lambda group: None
    unused: tuple[str, ...] = ()
    initial: Callable[[Group], tuple[float | str, ...]] = lambda group: ()
    least: float = 0.0
    numbers: tuple[tuple[int, ...], ...] = ()

    def defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The defaults of an optimizer, from its arguments.

        What a schedule of momentum may change is found there by torch's schedulers: ``betas``, of which they
        take the first, or ``momentum``.
        """
        if not self.betas:
            return dict(given)
        if self.betas[0] in ("beta1", "momentum") and "betas" not in self.unused:
            return dict(given)
        rest = {key: value for key, value in given.items() if key != "betas"}
        return rest if "betas" in self.unused else {**rest, **dict(zip(self.betas, _as_list(given["betas"])))}

    def numbers_of(self, rule: Rule) -> tuple[tuple[int, ...], ...]:
        """Which states stand under each number in bitsandbytes' keys."""
        return self.numbers or tuple((k,) for k in range(len(rule.states)))

    def hyper(self, group: Group) -> tuple[Any, ...]:
        """A group's values of its rule's hyperparameters: numbers or tensors with one element.

        Raises:
            ValueError: If the group has no such value, or not as many betas as the algorithm.
        """
        betas = group.get("betas", ()) if self.betas else ()
        if len(betas) != len(self.betas):
            raise ValueError(f"Invalid betas: {betas!r}, must be {len(self.betas)} numbers: {self.betas}")
        values = {**dict(zip(self.betas, betas)), **group}
        fields = self.rule(group).hyper._fields
        try:
            return tuple(0.0 if values[name] is None else values[name] for name in fields)
        except KeyError as missing:
            raise ValueError(f"a group has no {missing.args[0]!r}, only {sorted(group)}") from None

    def is_complete(self, group: Group) -> bool:
        """Whether a group has all that `hyper` reads; it may be in the middle of a change."""
        present = {*group, *self.betas}
        return ("betas" in group or not self.betas) and present.issuperset(self.rule(group).hyper._fields)

    def fold_betas(self, group: dict[str, Any]) -> None:
        """Put betas that were written under their own names, as momentum is by schedules, into ``betas``."""
        named = [name for name in self.betas if name in group]
        if named:
            betas = zip(self.betas, group["betas"])
            dict.__setitem__(group, "betas", tuple(group.get(name, beta) for name, beta in betas))
            for name in named:
                dict.__delitem__(group, name)

    def checked(self, group: Group) -> dict[str, Any]:
        """The group with numeric strings as numbers.

        Raises:
            ValueError: If a hyperparameter is out of its range.
        """
        betas = _as_list(group.get("betas", [0.0] * len(self.betas)))
        if not isinstance(betas, (tuple, list)) or len(betas) != len(self.betas):
            raise ValueError(f"Invalid betas: {betas!r}, must be {len(self.betas)} numbers")
        checked = dict(group)
        betas = [checked.pop(name, beta) for name, beta in zip(self.betas, betas)]
        if self.betas:
            checked["betas"] = tuple(
                number(f"beta parameter at index {i}", beta, below=1.0) for i, beta in enumerate(betas)
            )
        for key, what in _OF_ALL.items():
            if self.betas or key in group:
                checked[key] = number(what, group[key])
        for key, default in self.extras.items():
            if key in _OF_ALL:
                continue
            if isinstance(default, bool):
                checked[key] = flag(key, group[key])
            elif not (default is None and group[key] in (None, "None")):
                checked[key] = number(key, group[key], least=self.least)
            else:
                checked[key] = None
        self.check(checked)
        return checked


#: Keys of every group, with what they are called in errors.
_OF_ALL = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value"}


def _as_list(betas: Any) -> Any:
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(betas) if isinstance(betas, str) else betas
    return betas


#: By name.
FAMILIES: dict[str, Family] = {}


def add_family(name: str, **attributes: Any) -> Family:
    """Make a family known under its name."""
    FAMILIES[name] = Family(name, **attributes)
    return FAMILIES[name]

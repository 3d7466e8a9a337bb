"""How the groups of an algorithm are read: what bitsandbytes calls an `optimizer_name`."""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..rules import Rule

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One algorithm's param groups.

    Attributes:
        name: bitsandbytes' `optimizer_name`.
        moments: 1 or 2, states of an element in bitsandbytes: the base is `Optimizer1State` or `...2State`.
        rule: The rule that a group asks for.
        hyper: A group's values of the rule's hyperparameters, each a number or a tensor with one element.
        betas: How many `betas` a group has.
        beta_names: What they are called otherwise: keys of a group that take their places.
        extras: Further keys of a group, with their defaults; flags have a bool.
        check: Raises ValueError for values that do not go together.
        unused: Which of `betas` and `eps` the algorithm does not have.
        initial: What the states of a group's parameters begin with; zeros by default.
        pack: A parameter's state as bitsandbytes lays it out, from one with a tensor for each of the rule's.
        unpack: The reverse.
    """

    name: str
    moments: int
    rule: Callable[[Group], Rule]
    hyper: Callable[[Group], tuple[Any, ...]]
    betas: int = 2
    beta_names: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Group], None] = lambda group: None
    unused: tuple[str, ...] = ()
    initial: Callable[[Group], tuple[float, ...]] = lambda group: ()
    pack: Callable[[dict[str, Any]], dict[str, Any]] = dict
    unpack: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def __post_init__(self) -> None:
        FAMILIES[self.name] = self

    def checked(self, group: Group) -> dict[str, Any]:
        """The group with numeric strings as numbers.

        Raises:
            ValueError: If a hyperparameter is out of its range.
        """
        betas = group["betas"]
        with contextlib.suppress(ValueError, SyntaxError):
            betas = ast.literal_eval(betas) if isinstance(betas, str) else betas
        if not isinstance(betas, (tuple, list)) or len(betas) != self.betas:
            raise ValueError(f"Invalid betas: {betas!r}, must be {self.betas} numbers")
        if self.beta_names:
            group = dict(group)
            betas = [group.pop(name, beta) for name, beta in zip(self.beta_names, betas)]
        checked = {
            **group,
            "lr": number("learning rate", group["lr"]),
            "betas": tuple(
                number(f"beta parameter at index {i}", beta, below=1.0) for i, beta in enumerate(betas)
            ),
            "eps": number("epsilon value", group["eps"]),
            "weight_decay": number("weight_decay value", group["weight_decay"]),
        }
        for key, default in self.extras.items():
            if isinstance(default, bool):
                checked[key] = flag(key, group[key])
            elif not (default is None and group[key] in (None, "None")):
                checked[key] = number(key, group[key])
            else:
                checked[key] = None
        self.check(checked)
        return checked


#: By name; each module of optim/ that defines a family adds it.
FAMILIES: dict[str, Family] = {}


def number(name: str, value: Any, below: float = math.inf) -> Any:
    """A hyperparameter, with a numeric string as a float.

    Raises:
        ValueError: If it is no number, or not in ``[0, below)``.
    """
    mistake = f"Invalid {name}: {value!r}, must be a number or a tensor with one element"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise ValueError(mistake)
    else:
        try:
            as_float = float(value)
        except (TypeError, ValueError):
            raise ValueError(mistake) from None
        value = as_float if isinstance(value, str) else value
    if not 0.0 <= value < below:  # also for NaN
        raise ValueError(f"Invalid {name}: {value}, must be in [0, {below})")
    return value


def integer(name: str, value: Any) -> int:
    """An option, with a numeric string as an int.

    Raises:
        ValueError: If it is no whole number.
    """
    try:
        if float(value) == int(float(value)):
            return int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"Invalid {name}: {value!r}, must be a whole number")


def flag(name: str, value: Any) -> bool:
    """An option that is on or off, also as 0, 1, "true" or "false".

    Raises:
        ValueError: If it is none of these.
    """
    known = {"true": True, "1": True, "false": False, "0": False}
    try:
        return known[str(value).lower()]
    except KeyError:
        raise ValueError(f"Invalid {name}: {value!r}, must be True or False") from None

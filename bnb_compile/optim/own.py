"""An optimizer from a user's own rule, with everything that the others have."""

from __future__ import annotations

import sys
from typing import Any

from ..ops.step import step_op
from ..rules import ALL, Rule
from .family import FAMILIES, Family, add_family
from .manager import allow_overrides
from .optimizer import Optimizer8bit
from .options import Options

#: Rules that have been made classes, by name.
_OWN: dict[str, Rule] = {}
#: Keys of a group, or arguments, that are not a rule's.
_TAKEN = frozenset({"params", "betas", "param_names", "initial_lr", *Options.__annotations__})


def optimizer(rule: Rule, name: str | None = None) -> type[Optimizer8bit]:
    """A class of optimizers from a rule.

    The rule is traced here, once, and refused here if it cannot become a kernel. Each field of its
    hyperparameters becomes an argument of the constructor and a key of groups, of which the value in the
    NamedTuple is the default. All options of `bnb_compile.optim.Options` come with it.

    Args:
        rule: The algorithm.
        name: Of the class; by default the rule's, with capitals.

    Returns:
        type: A subclass of `Optimizer8bit`. Assign it to a variable of its name, so that it can be pickled.

    Raises:
        ValueError: If the rule is not as it must be, or another module has one of its name. Defining a rule
            again where it has been defined, as in a notebook, is no error: the class that is returned is the
            new one's.
        NotImplementedError: If a function uses an operation that kernels have not; the error names its line.
    """
    own_name = name or "".join(part.capitalize() for part in rule.name.split("_"))
    defaults = rule.hyper._field_defaults
    for field in rule.hyper._fields:
        if field in _TAKEN:
            raise ValueError(
                f"rule {rule.name}: {field!r} cannot be a hyperparameter, as groups have it already"
            )
        if field not in defaults:
            raise ValueError(f"rule {rule.name}: hyperparameter {field} must have a default")
    if "lr" not in defaults:
        raise ValueError(f"rule {rule.name}: hyper has no 'lr', only {list(rule.hyper._fields)}")
    known = _OWN.get(rule.name) or next((own for own in ALL if own.name == rule.name), None)
    if known is None and rule.name in FAMILIES:
        raise ValueError(f"rule {rule.name}: bnb_compile has an algorithm of this name, take another one")
    if known is not None and known.origin != rule.origin:
        raise ValueError(f"rule {rule.name}: {known.origin[0]} has a rule of this name, take another one")
    step_op(rule, "float32")  # checks all of it
    initial = tuple(state.initial for state in rule.states)
    family: Family = add_family(
        rule.name,
        moments=0,
        rule=lambda group: rule,
        betas=(),
        extras={key: value for key, value in defaults.items() if key != "lr"},
        initial=lambda group: initial if any(initial) else (),
        least=float("-inf"),
    )
    _OWN[rule.name] = rule
    allow_overrides(rule.hyper._fields)

    def __init__(self: Any, params: Any, lr: Any = defaults["lr"], **options: Any) -> None:
        Optimizer8bit.__init__(self, params, {"lr": lr}, **options)

    arguments = "\n".join(f"        {key}: {value!r} by default." for key, value in defaults.items())
    doc = f"""Rule {rule.name}, {rule.origin[0]}.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of them.
{arguments}
        options: See `bnb_compile.optim.Options`.
    """
    module = sys._getframe(1).f_globals.get("__name__", "__main__")
    members = {"__init__": __init__, "__doc__": doc, "__module__": module, "family": family, "rule": rule}
    return type(own_name, (Optimizer8bit,), members)

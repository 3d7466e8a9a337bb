"""Arguments as numbers and flags, checked; strings are read, as launchers and YAML files give them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor


def number(name: str, value: Any, below: float = math.inf, least: float = 0.0) -> Any:
    """A hyperparameter, with a numeric string as a float.

    Raises:
        ValueError: If it is no number, or not in ``[least, below)``.
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
        except OverflowError:
            raise ValueError(
                f"Invalid {name}: a whole number of {len(str(value))} digits is too large"
            ) from None
        value = as_float if isinstance(value, str) else value
    if not least <= value < below:  # also for NaN
        raise ValueError(f"Invalid {name}: {value}, must be in [{least:g}, {below})")
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

"""How an operator of this package is registered with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("bnb_compile", "DEF")


def define(schema: str, eager: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register ``bnb_compile::<schema>`` with its reference kernel and its shape function.

    Args:
        schema: Name, arguments and results in torch's schema language.
        eager: The reference kernel, plain torch code for any device.
        fake: Checks the arguments and returns empty results; runs while a graph is traced.

    Returns:
        The operator's overload.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, eager, "CompositeExplicitAutograd")

    def traced(*args: Any, **kwargs: Any) -> Any:
        # The first graph with one of our operators brings in their lowerings. Importing them with
        # the package would import Inductor, which takes seconds.
        import bnb_compile.lowering  # noqa: F401

        return fake(*args, **kwargs)

    torch.library.register_fake(f"bnb_compile::{name}", traced, lib=_LIBRARY)
    return getattr(torch.ops.bnb_compile, name).default

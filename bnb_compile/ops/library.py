"""How an operator of this package is registered with torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import backends

_LIBRARY = torch.library.Library("bnb_compile", "DEF")


def define(
    schema: str, eager: Callable[..., Any], fake: Callable[..., Any], lowered: Any = None
) -> torch._ops.OpOverload:
    """Register ``bnb_compile::<schema>`` with its reference kernel and its shape function.

    Args:
        schema: Name, arguments and results in torch's schema language.
        eager: The reference kernel, plain torch code for any device.
        fake: Checks the arguments and returns empty results; runs while a graph is traced.
        lowered: What `lowering.register` takes, of an operator that is made on demand.

    Returns:
        The operator's overload.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _LIBRARY.impl(name, eager, "CompositeExplicitAutograd")

    def traced(*args: Any, **kwargs: Any) -> Any:
        # A graph that has the operator will need its lowering.
        backends.register_lowering(lowered)
        return fake(*args, **kwargs)

    torch.library.register_fake(f"bnb_compile::{name}", traced, lib=_LIBRARY)
    return getattr(torch.ops.bnb_compile, name).default

"""How TorchInductor emits each operation of `bnb_compile.ops`; importing this registers it.

Imports Inductor, so nothing outside imports it before something is compiled; see `backends`.
"""

from __future__ import annotations

if __name__ != "bnb_compile.lowering":
    raise ImportError(f"import this package as bnb_compile.lowering, not as {__name__}")

from ..ops.operator import StepOp
from . import blockwise as blockwise
from . import norms as norms
from . import step as step
from .cache_key import mark_caches

mark_caches()


def register(op: StepOp | None) -> None:
    """Tell Inductor how to lower an operator that was made on demand; once is enough."""
    if op is not None:
        mark_caches(op)
        step.lower(op)

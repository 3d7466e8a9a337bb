"""What the parts of an optimizer know of it, which `optimizer` puts together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch

from ..state.bucket import Bucket
from ..state.structure import Structure
from .clipping import NormLimit
from .family import Family


class AbstractOptimizer(torch.optim.Optimizer):
    """An optimizer whose states live in arenas.

    Attributes:
        family: Its algorithm.
        structure: The buckets of parameters with states, and where each one is.
        args: bitsandbytes' name for the options that are not per group.
        key_names: What keys of ``optimizer.state[param]`` are called instead of bitsandbytes' usual names.
        is_paged: Whether large states are in CUDA managed memory.
        max_grad_norm: Limit of the norm of all gradients, None for none.
        norms: It, where a step reads it.
        bf16_stochastic_round: Whether bfloat16 parameters are rounded stochastically.
        release_gradients: See `Options`, as `previous_norm`.
    """

    family: Family
    structure: Structure
    args: SimpleNamespace
    key_names: ClassVar[Mapping[str, str]] = {}
    is_paged: bool
    max_grad_norm: float | None
    bf16_stochastic_round: bool
    release_gradients: bool | int
    previous_norm: bool
    norms: NormLimit
    _step_supports_amp_scaling: bool
    _compile: Any
    _opt_called: bool  # what torch's schedulers set and read

    def adopt_groups(self) -> None:
        """Make every group a dict that tells of a user's writes."""
        raise NotImplementedError

    def init_state(self) -> None:
        """Create the states of all parameters that a step may update; `step` does it when it must."""
        raise NotImplementedError

    def update_buckets(self, buckets: Sequence[Bucket]) -> None:
        """Update the parameters of some buckets that have a gradient."""
        raise NotImplementedError

    def measure_buckets(self, buckets: Sequence[Bucket]) -> None:
        """Add the gradients of some buckets to the norm that is measured, and forget them."""
        raise NotImplementedError

    def end_of_measuring(self) -> None:
        """Measure the gradients that are left, and know the norm of all."""
        raise NotImplementedError

    def check_ended(self, what: str) -> None:
        """Raise if something cannot be done while only a part of the parameters has been updated."""
        raise NotImplementedError

    def has_begun(self) -> bool:
        """Whether gradients have been used, and freed, that belong to the step that comes."""
        raise NotImplementedError

    def bring_links(self, inwards: bool) -> None:
        """Bring states that a user has put in the place of ours to the arenas, or back."""
        raise NotImplementedError

    def begin(self) -> None:
        """Have no states and no history of changes."""
        raise NotImplementedError

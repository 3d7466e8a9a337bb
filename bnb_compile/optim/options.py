"""Options of every optimizer besides its hyperparameters, and what the machine lets them be."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings
from typing import Any, TypedDict

import torch

from . import paging
from .family import flag, integer, number


class Options(TypedDict, total=False):
    """Arguments that every optimizer takes besides its hyperparameters, by keyword.

    Attributes:
        optim_bits: 8 for block-wise quantised states, 32 (the default) for float32. A class named for a
            number of bits has that many; there 32 is also accepted as bitsandbytes' default.
        args: An object whose attributes `optim_bits`, `min_8bit_size`, ... replace these arguments.
        min_8bit_size: Parameters with fewer elements have float32 states, whatever `optim_bits` is.
        max_unorm: Largest norm of an update before the learning rate, relative to the parameter's norm; 0
            is none.
        skip_zeros: Whether an element whose gradient is zero keeps its value and its states.
        percentile_clipping: Percentile of the last 100 gradient norms of a parameter, to which its gradient
            is clipped; 100 is off.
        block_wise: Whether each block of 256 elements of an 8-bit state has a scale of its own; otherwise a
            parameter has one.
        is_paged: Whether states of parameters with 100,000 elements or more are in CUDA managed memory, from
            which the driver moves to the host what does not fit into the GPU. Without a GPU: ordinary memory.
        max_grad_norm: Largest norm of all gradients together, to which the step clips them; None is off.
        amp_fused: Whether a ``GradScaler`` hands its scale and its verdict to the step, which then unscales,
            and skips itself, without a synchronisation. Off by default, as Lightning refuses to clip then.
        bf16_stochastic_round: Whether bfloat16 parameters are rounded up or down by chance, so that small
            updates are not lost; see `bnb_compile.rules.rounding`.
        compile: Whether `step` runs the compiled kernel; False runs the eager reference; "auto" the kernel if
            it can be compiled here, and else, with a warning, the reference.
    """

    optim_bits: int
    args: Any
    min_8bit_size: int
    max_unorm: float
    skip_zeros: bool
    percentile_clipping: int
    block_wise: bool
    is_paged: bool
    max_grad_norm: float | None
    amp_fused: bool
    bf16_stochastic_round: bool
    compile: bool | str


#: What bitsandbytes keeps in ``optimizer.args``.
ARGS: dict[str, Any] = {
    "optim_bits": 32,
    "min_8bit_size": 4096,
    "max_unorm": 0.0,
    "skip_zeros": False,
    "percentile_clipping": 100,
    "block_wise": True,
}
#: Elements; below, paging is not worth it (bitsandbytes' number).
PAGED_SIZE = 100_000


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """Options as numbers, checked.

    Raises:
        ValueError: If one is out of its range.
    """
    bits, percentile = integer("optim_bits", args["optim_bits"]), args["percentile_clipping"]
    if bits not in (8, 32):
        raise ValueError(f"Invalid optim_bits: {bits}, must be 8 or 32")
    percentile = integer("percentile_clipping", percentile)
    if not 1 <= percentile <= 100:
        raise ValueError(f"Invalid percentile_clipping: {percentile}, must be in [1, 100]; 100 is off")
    return {
        **args,
        "optim_bits": bits,
        "min_8bit_size": integer("min_8bit_size", args["min_8bit_size"]),
        "max_unorm": number("max_unorm", args["max_unorm"]),
        "skip_zeros": flag("skip_zeros", args["skip_zeros"]),
        "percentile_clipping": percentile,
        "block_wise": flag("block_wise", args["block_wise"]),
    }


@functools.cache
def no_compiler(device: str) -> str | None:
    """Why steps cannot be compiled for a type of device; warns once."""
    reason = None
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        reason = "TORCH_COMPILE_DISABLE=1"
    elif device != "cpu" and importlib.util.find_spec("triton") is None:
        reason = "there is no triton"
    elif device == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        reason = "there is no C++ compiler"
    if reason is not None:
        warnings.warn(f"optimizer steps on {device} run uncompiled: {reason}", stacklevel=2)
    return reason


@functools.cache
def has_managed_memory(device: torch.device) -> bool:
    """Whether states can be paged on a device; warns once if not."""
    reason = paging.unavailable(device)
    if reason is not None:
        warnings.warn(f"paged optimizer states are in ordinary memory: {reason}", stacklevel=2)
    return reason is None

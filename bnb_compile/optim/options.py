"""Options that every optimizer shares, besides its hyperparameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from ..formats import FORMATS
from ..validate import flag, integer, number


class Options(TypedDict, total=False):
    """Arguments that every optimizer takes besides its hyperparameters, by keyword.

    Attributes:
        optim_bits: 8 for block-wise quantised states, 32 (the default) for float32, 4 for half of 8. A class
            named for a number of bits has that many; there 32 is also accepted as bitsandbytes' default.
        states: Name of a state format (see `bnb_compile.formats`), more exactly than by `optim_bits`:
            "dynamic8" is what 8 stands for, "float32" what 32 does, "ratio4" what 4 does; "dynamic8sr" rounds
            second moments stochastically, "ratio8" and "ratio4_8" are nearer to float32, "bfloat16" has two
            bytes and no scales.
        args: An object, or a dict, whose `optim_bits`, `min_8bit_size`, ... replace these arguments.
        min_8bit_size: Parameters with fewer elements have float32 states instead of ones of 8 or fewer bits.
        max_unorm: Largest norm of an update before the learning rate, relative to the parameter's norm; 0
            is none.
        skip_zeros: Whether an element whose gradient is zero keeps its value and its states.
        percentile_clipping: Percentile of the last 100 gradient norms of a parameter, to which its gradient
            is clipped; 100 is off.
        block_wise: Whether each block of an 8-bit state has a scale of its own; otherwise a parameter has
            one.
        is_paged: Whether states of parameters with 100,000 elements or more are in CUDA managed memory, from
            which the driver moves to the host what does not fit into the GPU. Without a GPU: ordinary memory.
        max_grad_norm: Largest norm of all gradients together, to which the step clips them; None is off.
        previous_norm: Whether the norm that is compared with `max_grad_norm` is that of the gradients of the
            step before, which is known before the first gradient is used. The first step clips nothing.
        amp_fused: Whether a ``GradScaler`` hands its scale and its verdict to the step, which then unscales,
            and skips itself, without a synchronisation. Off by default, as Lightning refuses to clip then.
        bf16_stochastic_round: Whether bfloat16 parameters are rounded stochastically, so that small updates
            are not lost; see `bnb_compile.rules.rounding`.
        release_gradients: Whether gradients are used and freed while the backward pass runs: in a graph that
            has both, or outside by hooks, which leave the rest to `step`. A number is the most bytes of
            gradients that may wait, DTensors counted whole; True for a twentieth of all. See
            `bnb_compile.optim.release`.
        compile: Whether `step` runs the compiled kernel; False runs the eager reference; "auto" the kernel if
            it can be compiled here, and else, with a warning, the reference.
    """

    optim_bits: int
    states: str | None
    args: Any
    min_8bit_size: int
    max_unorm: float
    skip_zeros: bool
    percentile_clipping: int
    block_wise: bool
    is_paged: bool
    max_grad_norm: float | None
    previous_norm: bool
    amp_fused: bool
    bf16_stochastic_round: bool
    release_gradients: bool | int
    compile: bool | str


#: What bitsandbytes keeps in ``optimizer.args``.
ARGS: dict[str, Any] = {
    "optim_bits": 32,
    "states": None,
    "min_8bit_size": 4096,
    "max_unorm": 0.0,
    "skip_zeros": False,
    "percentile_clipping": 100,
    "block_wise": True,
}
#: The format that a number of bits stands for.
OF_BITS = {4: "ratio4", 8: "dynamic8", 32: "float32"}
#: Elements; below, paging is not worth it (bitsandbytes' number).
PAGED_SIZE = 100_000


def check_args(args: dict[str, Any]) -> dict[str, Any]:
    """Options as numbers, checked.

    Raises:
        ValueError: If one is out of its range.
    """
    bits, percentile = integer("optim_bits", args["optim_bits"]), args["percentile_clipping"]
    if bits not in OF_BITS:
        raise ValueError(f"Invalid optim_bits: {bits}, must be 4, 8 or 32")
    percentile = integer("percentile_clipping", percentile)
    if not 1 <= percentile <= 100:
        raise ValueError(f"Invalid percentile_clipping: {percentile}, must be in [1, 100]; 100 is off")
    states = args["states"]
    if states is not None and states not in FORMATS:
        raise ValueError(f"Invalid states: {states!r}, must be one of {sorted(FORMATS)}")
    return {
        **args,
        "optim_bits": bits,
        "min_8bit_size": integer("min_8bit_size", args["min_8bit_size"]),
        "max_unorm": number("max_unorm", args["max_unorm"]),
        "skip_zeros": flag("skip_zeros", args["skip_zeros"]),
        "percentile_clipping": percentile,
        "block_wise": flag("block_wise", args["block_wise"]),
    }


def read_args(args: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `ARGS` that an optimizer is constructed with.

    Args:
        args: An object or a dict with some of them, which count first; or None.
        given: The others that were given as arguments.

    Raises:
        ValueError: If one is out of its range.
        TypeError: If `args` is neither, or has none of them.
    """
    if args is not None:
        known = args if isinstance(args, Mapping) else {k: getattr(args, k) for k in ARGS if hasattr(args, k)}
        if not known or not known.keys() <= ARGS.keys():
            raise TypeError(
                f"Invalid args: {args!r}, must be an object or a dict with some of {sorted(ARGS)}"
            )
        given = {**given, **known}
    return check_args({**ARGS, **given})


def format_of(config: Mapping[str, Any], numel: int, has_blocks: bool = True) -> str:
    """Name of the format that the states of a parameter have, from checked options.

    Args:
        config: The options.
        numel: Of the parameter.
        has_blocks: Whether blocks of it can share something.
    """
    name = config["states"] or OF_BITS[config["optim_bits"]]
    few = numel < config["min_8bit_size"] or not has_blocks
    return "float32" if FORMATS[name].bits <= 8 and few else name

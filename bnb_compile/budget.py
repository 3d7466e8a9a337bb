"""What a model's weights, gradients and optimizer states take: ``python -m bnb_compile.budget --params 8e9``.

Every number comes from what allocates it: bytes of states from `Optimizer8bit.precision_report`, of torch's
AdamW from its states on the meta device, the share of gradients from `bnb_compile.state.portions`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import optim
from .formats import FORMATS
from .ops.step import PARAM_DTYPES
from .optim import Optimizer8bit
from .optim.options import ARGS
from .state.portions import SHARE
from .validate import integer

#: What has a row of its own in the table, to compare with.
TORCH = "torch AdamW"
#: By name: the classes that take any format.
OPTIMIZERS: dict[str, type[Any]] = {
    name: cls
    for name, cls in vars(optim).items()
    if isinstance(cls, type) and issubclass(cls, Optimizer8bit) and cls.bits is None and not cls.paged
    if name not in ("Optimizer8bit", "Optimizer1State", "Optimizer2State")  # the bases
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in PARAM_DTYPES}


class Budget(NamedTuple):
    """Bytes that each process holds.

    Attributes:
        params: Elements that it holds of all parameters.
        weights: Of the parameters.
        gradients: The most that are there at a time.
        states: Of the optimizer.
    """

    params: int
    weights: float
    gradients: float
    states: float

    @property
    def sum(self) -> float:
        """Of all three."""
        return self.weights + self.gradients + self.states


def budget(
    params: int,
    states: str,
    optimizer: str = "AdamW",
    dtype: torch.dtype = torch.bfloat16,
    release: bool = False,
    processes: int = 1,
    **hyper: Any,
) -> Budget:
    """What training takes, but for activations.

    Args:
        params: Elements of all parameters together.
        states: A format of `bnb_compile.formats.FORMATS`, or `TORCH` for what torch's AdamW has.
        optimizer: One of `OPTIMIZERS`; torch's AdamW does not look at it.
        dtype: Of parameters and gradients.
        release: Whether `release_gradients` is on; torch's AdamW keeps all gradients.
        processes: Among which FSDP divides everything evenly.
        hyper: Hyperparameters on which the number of states depends, such as `momentum`.

    Returns:
        Budget: Of the process with the largest part.

    Raises:
        ValueError: If there is no such format or optimizer, or numbers are out of their range.
        TypeError: If the optimizer has no such hyperparameter.
    """
    for name, value in (("params", params), ("processes", processes)):
        if not 1 <= value <= 2**53:
            raise ValueError(f"Invalid {name}: {value}, must be in [1, 2**53]")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"Invalid optimizer: {optimizer!r}, must be one of {sorted(OPTIMIZERS)}")
    numel = -(-params // processes)
    param = torch.nn.Parameter(torch.empty(numel, dtype=dtype, device="meta"))
    if states == TORCH:
        param.grad = torch.empty_like(param)
        theirs = torch.optim.AdamW([param], foreach=False)
        theirs.step()
        of_states = float(sum(x.nbytes for x in theirs.state[param].values() if x.shape == param.shape))
    else:
        # `numel` is of all parameters, so that its being small would say nothing of any.
        ours = OPTIMIZERS[optimizer]([param], lr=1e-3, states=states, min_8bit_size=0, **hyper)
        of_states = ours.precision_report()[0]["bytes_per_param"] * numel
    gradients = param.nbytes * (SHARE if release and states != TORCH else 1)
    return Budget(numel, param.nbytes, gradients, of_states)


def table(rows: dict[str, Budget]) -> str:
    """Bytes a parameter, and GB of each kind, a line for each."""
    lines = [
        f"{'':12}{'bytes a parameter':>26}{'GB':>36}",
        f"{'states':12}{'states':>13}{'sum':>13}{'weights':>12}{'gradients':>12}{'states':>12}{'sum':>12}",
    ]
    for name, row in rows.items():
        each = (f"{x / row.params:13.3f}" for x in (row.states, row.sum))
        parts = (f"{x / 1e9:12.3f}" for x in (row.weights, row.gradients, row.states, row.sum))
        lines.append(f"{name:12}{''.join(each)}{''.join(parts)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bnb_compile.budget", description="Plan memory.")
    parser.add_argument("--params", required=True, metavar="N", help="of the model, such as 8e9")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="of weights and gradients")
    parser.add_argument("--states", choices=FORMATS, help="a format; by default all, beside torch's AdamW")
    parser.add_argument("--optimizer", default="AdamW", choices=OPTIMIZERS)
    parser.add_argument("--momentum", type=float, help="of SGD, LARS and RMSprop; without, a state fewer")
    parser.add_argument(
        "--release", action="store_true", help="release_gradients=True: a twentieth, or the largest tensor"
    )
    parser.add_argument("--processes", default="1", metavar="N", help="among which FSDP divides all")
    args = parser.parse_args(arguments)
    hyper = {} if args.momentum is None else {"momentum": args.momentum}
    try:
        params, processes = integer("params", args.params), integer("processes", args.processes)
        rows = {
            name: budget(params, name, args.optimizer, DTYPES[args.dtype], args.release, processes, **hyper)
            for name in ([args.states] if args.states else [TORCH, *FORMATS])
        }
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    shared = f", each of {processes} processes" if processes > 1 else ""
    print(f"{params:,} parameters of {args.dtype}, {args.optimizer}{shared}\n\n{table(rows)}\n")
    print("GB are 1e9 bytes. Activations, and with FSDP the layers that are gathered, come on top.")
    print(f"Parameters of fewer than {ARGS['min_8bit_size']:,} elements have float32 states (min_8bit_size).")
    return 0


if __name__ == "__main__":
    sys.exit(main())

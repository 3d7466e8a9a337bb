"""What runs the kernel of a bucket outside of a graph."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..ops.operator import Arguments, StepOp


class AbstractLauncher:
    """The compiled step of one bucket.

    Args:
        op: The step operator that it replaces.
        a: The operator's arguments, which stay the same but for the gradients; those are given to each call.
    """

    def __init__(self, op: StepOp, a: Arguments) -> None:
        self.op, self.params = op, a.params
        self.modes = op.modes(a.options)
        #: What the kernel takes after parameters and gradients, by name.
        self.tensors = a.tensors(op)

    def __call__(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Update the parameters that have a gradient.

        Args:
            grads: For each parameter None or a gradient of its shape, on its device, with memory of its own;
                at least one of them.
            dtype: Of all gradients.
        """
        self.launch(grads, dtype)
        backends.counts["kernel"] += 1
        # As after any write in place, so that autograd notices if it still needs the old values.
        torch.autograd.graph.increment_version(self.params)

    def compile(self, dtype: torch.dtype) -> None:
        """Compile the kernel for gradients of a dtype, where that has not been done.

        Raises:
            CompileError: If this machine cannot.
        """
        try:
            self.load(dtype)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise backends.CompileError(f"{type(error).__name__}: {error}") from error

    def load(self, dtype: torch.dtype) -> None:
        """As `compile`, with whatever exceptions compilers raise."""
        raise NotImplementedError

    def measure(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """What the measure operator returns, of a step that has the option `totals`."""
        raise NotImplementedError

    def launch(self, grads: Sequence[Tensor | None], dtype: torch.dtype) -> None:
        """Run the kernel.

        Args:
            grads: As of a call.
            dtype: Of the gradients.
        """
        raise NotImplementedError


def addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    """Addresses for a kernel: 0 for None, and 1 for an empty tensor, which has none.

    Raises:
        ValueError: If a tensor has elements but no memory.
    """
    if id(None) in map(id, tensors):
        found = [0 if x is None else x.data_ptr() or 1 for x in tensors]
    else:
        found = list(map(Tensor.data_ptr, tensors))  # type: ignore[arg-type]
        if 0 in found:
            found = [address or 1 for address in found]
    if 1 in found:
        for k, (x, address) in enumerate(zip(tensors, found)):
            if address == 1 and x is not None and x.numel():
                raise ValueError(
                    f"tensor {k} of {len(tensors)}, {x.dtype} {tuple(x.shape)}, has no memory: its storage "
                    f"was freed, or it is a {type(x).__name__} around other tensors"
                )
    return found

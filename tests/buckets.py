"""Random arguments for the step operators of Adam, the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnb_compile.ops.arena import layout
from bnb_compile.ops.step import StepOp

#: Tensors with values in another than row-major order, or with gaps between them.
STRIDED: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: torch.randn(40, 33).t(),
    "channels_last": lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last),
    "every other": lambda: torch.randn(700)[::2],
    "columns": lambda: torch.randn(30, 50)[:, 3:40],
    "permuted": lambda: torch.randn(6, 7, 8, 9).permute(2, 0, 3, 1),
}
#: Gradients may also overlap themselves.
EXPANDED: dict[str, Callable[[], Tensor]] = {
    "expanded scalar": lambda: torch.randn(()).expand(19, 31),
    "expanded row": lambda: torch.randn(31).expand(19, 31),
    "expanded column": lambda: torch.randn(19, 1).expand(19, 31),
}


class Bucket(NamedTuple):
    """Arguments of a step operator."""

    params: list[Tensor]
    grads: list[Tensor | None]
    arenas: list[Tensor]
    step: Tensor
    hyper: Tensor

    @property
    def arguments(self) -> tuple:
        return self.params, self.grads, *self.arenas, self.step, self.hyper

    @property
    def state(self) -> list[Tensor]:
        """What a step changes besides the parameters."""
        return [*self.arenas, self.step]


def make(
    op: StepOp,
    shapes: Sequence[tuple[int, ...] | Tensor],
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    without_grad: Sequence[int] = (),
    seed: int = 0,
    grads: Sequence[Tensor] | None = None,
) -> Bucket:
    """Arguments in the middle of a training run.

    Args:
        op: The operator.
        shapes: Of the parameters, or the parameters.
        param_dtype: Of the parameters that are given by their shape.
        grad_dtype: Of the gradients; by default that of the parameters.
        without_grad: Indices of the parameters that have no gradient.
        seed: Of the random numbers.
        grads: The gradients, if they shall not be random.
    """
    torch.manual_seed(seed)
    params = [s if isinstance(s, Tensor) else torch.randn(s, dtype=param_dtype) for s in shapes]
    if grads is None:
        grads = [(0.1 * torch.randn(p.shape)).to(grad_dtype or p.dtype) for p in params]
    places = layout(p.numel() for p in params)
    arenas = []
    for (name, _), size in zip(op.arenas, op.arena_sizes(places)):
        if name.endswith("codes"):
            arena = torch.randint(0, 256, (size,), dtype=torch.uint8)
        else:
            arena = 0.1 * torch.rand(size) ** (4 if "sq" in name else 1)
            if op.bits == 32 and "sq" not in name:
                arena *= torch.randn(size).sign()
        arenas.append(arena)
    n = len(params)
    step = torch.randint(0, 1000, (n,)).float()
    hyper = torch.rand(n, 5, dtype=torch.float64)
    hyper = torch.tensor([1e-3, 0.8, 0.99, 1e-8, 0.1], dtype=torch.float64) + hyper * torch.tensor(
        [1e-2, 0.15, 0.0099, 1e-6, 0.1], dtype=torch.float64
    )
    return Bucket(
        params, [None if k in without_grad else g for k, g in enumerate(grads)], arenas, step, hyper
    )


def assert_close(op: StepOp, actual: Bucket, expected: Bucket, rate: float = 1e-4) -> None:
    """Both results of a step are equal except for rounding.

    Codes may be one apart where rounding decides, for at most `rate` of them; everything else may differ
    by a few units in the last place of what was added.
    """
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for a, e in zip(actual.params, expected.params, strict=True):
        allowed = tolerance[e.dtype]
        torch.testing.assert_close(a, e, rtol=allowed, atol=1e-6 if e.dtype == torch.float32 else allowed)
    for (name, dtype), a, e in zip(op.arenas, actual.arenas, expected.arenas, strict=True):
        if dtype == torch.uint8:
            apart = (a.int() - e.int()).abs()
            assert apart.numel() == 0 or apart.max() <= 1, f"{name}: {apart.max()} codes apart"
            assert apart.sum() <= max(1, rate * apart.numel()), f"{name}: {apart.sum()} codes differ"
        else:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-7)
    assert torch.equal(actual.step, expected.step)

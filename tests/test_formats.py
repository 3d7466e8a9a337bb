"""A format from outside of the package: two states that need one another, a table, and two scales a block.

The reference runs its functions; the kernels are printed from them, in every language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import fake_gpu
from helpers.buckets import Bucket, assert_close, copy, make
from torch import Tensor

from bnb_compile import rules
from bnb_compile.formats import BLOCK, AbstractFormat, Part, Stored, layout
from bnb_compile.formats.table import AbstractTable
from bnb_compile.formats.trace import trace_format
from bnb_compile.lowering.cpp.launch import Launcher
from bnb_compile.ops.operator import Modes
from bnb_compile.ops.step import parts_of, step_op

pytestmark = pytest.mark.core


class Linear(AbstractTable):
    """Steps of 1/127 from -1 to 1."""

    name = "linear"

    def values(self, device: torch.device) -> Tensor:
        return ((torch.arange(256, device="cpu") - 128) / 127).to(device)

    def nearest(self, x: Tensor) -> Tensor:
        return self.code(x).to(torch.uint8)

    def code(self, x: Tensor) -> Tensor:
        return torch.floor(x.clamp(-1, 1) * 127 + 128.5)


class Ratio(AbstractFormat):
    """The first moment over the root of the second, in 8 bits; the second in bfloat16 under its largest."""

    name = "ratio"
    parts = (
        Part("codes", torch.uint8),
        Part("scale", torch.float32, per=BLOCK),
        Part("squares", torch.bfloat16),
        Part("most", torch.float32, per=BLOCK),
    )
    tables = {"codes": Linear()}
    states = 2
    maxima = 2

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[Tensor]:
        exp_avg_sq = numbers[1] * shared[1]
        return [numbers[0] * shared[0] * exp_avg_sq.sqrt(), exp_avg_sq]

    def _ratio(self, states: Sequence[Tensor]) -> Tensor:
        return torch.where(states[1] > 1e-30, states[0] * states[1].clamp(min=1e-30).rsqrt(), 0.0)

    def magnitudes(self, states: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._ratio(states).abs(), states[1]]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        return maxima

    def encode(self, states: Sequence[Tensor], shared: Sequence[Tensor]) -> Sequence[Tensor]:
        scale, most = (torch.where(x > 1e-30, x.clamp(min=1e-30).reciprocal(), 0.0) for x in shared)
        return [self._ratio(states) * scale, states[1] * most]


OP = step_op(rules.ADAM, (Stored(Ratio(), (0, 1)),))
SHAPES = [(1,), (255,), (256,), (1000,), (3, 700)]


def whole(states: Sequence[Tensor]) -> list[Tensor]:
    """The maxima of a whole parameter."""
    return [x.amax(0, keepdim=True) for x in OP.stored[0].format.magnitudes(states)]


def bucket(modes: Modes) -> Bucket:
    """With states that a step could have left."""
    made = make(OP, SHAPES, modes=modes)
    (stored,) = OP.stored
    for slot in layout(param.numel() for param in made.params).slots:
        root = 0.1 * torch.rand(slot.numel) ** 3
        states = [root * torch.randn(slot.numel).clamp(-3, 3), root.square()]
        fresh = stored.format.store(states, None if modes.block_wise else whole(states))
        for name, view in parts_of(OP, made.arenas, stored, slot).items():
            view.copy_(fresh[name])
    return made


def launch(b: Bucket) -> None:
    b.launch(Launcher, OP)


def graph(b: Bucket) -> None:
    torch._dynamo.reset()  # every test compiles the same function
    torch.compile(OP.in_place, fullgraph=True)(*b.arguments, **b.options)


def triton(b: Bucket) -> None:
    """The emitted kernels under the interpreter."""

    def on_gpu(x: Any) -> Any:
        return torch.empty_like(x, device="cuda:0") if isinstance(x, Tensor) else x

    def step(arguments: tuple, options: dict) -> None:
        OP.in_place(*arguments, **options)

    arguments = b.arguments, b.options
    source = fake_gpu.emit(step, lambda: torch.utils._pytree.tree_map(on_gpu, arguments), fast=False)
    fake_gpu.interpret(source, arguments)


@pytest.mark.parametrize(
    "modes", [Modes(), Modes(block_wise=False, grad_scale=True)], ids=["blocks", "whole"]
)
@pytest.mark.parametrize("path", [launch, graph, triton])
def test_kernels_printed_from_a_format_equal_the_reference(path: Callable, modes: Modes) -> None:
    old = bucket(modes)
    expected, actual = copy(old), copy(old)
    expected.call(OP.in_place)
    path(actual)
    assert_close(OP, actual, expected, rate=2e-3)
    codes = expected.arenas[0]
    assert len(codes.unique()) > 100 and not torch.equal(codes, old.arenas[0])


def test_what_is_stored_is_near() -> None:
    torch.manual_seed(0)
    root = torch.rand(1000)
    states = [root * torch.randn(1000), root.square()]
    for maxima in (None, whole(states)):
        loaded = OP.stored[0].format.load(OP.stored[0].format.store(states, maxima))
        assert (loaded[1] - states[1]).abs().max() <= 2**-9
        assert ((loaded[0] - states[0]).abs() <= 0.02 * root + 0.01 * states[0].abs()).all()


def test_a_format_that_no_kernel_can_have_says_so() -> None:
    class Halves(Ratio):
        parts = (*Ratio.parts[:3], Part("most", torch.float32, per=128))

    with pytest.raises(NotImplementedError, match="most is shared by 128 elements, not 256"):
        trace_format(Halves())

    class Sorted(Ratio):
        def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
            return [x.sin() for x in maxima]

    with pytest.raises(NotImplementedError, match="sin.*may use abs, add"):
        trace_format(Sorted())

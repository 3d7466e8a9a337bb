"""Formats from outside of the package: one of ratios, with a table, and one that it is over.

The reference runs its functions; the kernels are printed from them, in every language.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import fake_gpu
from helpers.buckets import Bucket, assert_close, copy, fill, make
from torch import Tensor

from bnb_compile import rules
from bnb_compile.formats import BLOCK, AbstractFormat, Part, Stored, layout, load_states, store_states
from bnb_compile.formats.dynamic8 import UNSIGNED
from bnb_compile.formats.table import AbstractTable
from bnb_compile.formats.trace import trace_format
from bnb_compile.lowering.cpp.launch import Launcher
from bnb_compile.ops.operator import Modes, StepOp
from bnb_compile.ops.step import step_op

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


class Squares(AbstractFormat):
    """A second moment in float16, under the block's largest."""

    name = "squares"
    parts = (Part("squares", torch.float16), Part("most", torch.float32, per=BLOCK))
    keys = {"squares": "squares", "most": "most"}
    maxima = 1

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return numbers[0] * shared[0]

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        return [state]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        return maxima

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        most = shared[0]
        return [state * torch.where(most > 1e-30, most.clamp(min=1e-30).reciprocal(), 0.0)]


class Ratio(AbstractFormat):
    """A first moment over the root of the second, as codes of a table under the block's largest."""

    name = "tabled_ratio"
    parts = (Part("codes", torch.uint8), Part("scale", torch.float32, per=BLOCK))
    keys = {"codes": "codes", "scale": "scale"}
    tables = {"codes": Linear()}
    maxima = 1
    ratio = True

    def decode(self, numbers: Sequence[Tensor], shared: Sequence[Tensor]) -> Tensor:
        return numbers[0] * shared[0]

    def magnitudes(self, state: Tensor) -> Sequence[Tensor]:
        return [state.abs()]

    def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
        return maxima

    def encode(self, state: Tensor, shared: Sequence[Tensor], noise: Any) -> Sequence[Tensor]:
        scale = shared[0]
        return [state * torch.where(scale > 1e-30, scale.clamp(min=1e-30).reciprocal(), 0.0)]


OP = step_op(rules.ADAM, (Stored(Squares(), 1), Stored(Ratio(), 0, over=1)))
SQUARES = step_op(rules.ADAGRAD, (Stored(Squares(), 0),))
SHAPES = [(1,), (255,), (256,), (1000,), (3, 700)]


def bucket(op: StepOp, modes: Modes) -> Bucket:
    """With states that a step could have left."""
    made = make(op, SHAPES, modes=modes)
    for slot in layout(param.numel() for param in made.params).slots:
        fill(op, made.arenas, slot)
    return made


def launch(op: StepOp, b: Bucket) -> None:
    b.launch(Launcher, op)


def graph(op: StepOp, b: Bucket) -> None:
    torch._dynamo.reset()  # every test compiles the same function
    torch.compile(op.in_place, fullgraph=True)(*b.arguments, **b.options)


def triton(op: StepOp, b: Bucket) -> None:
    """The emitted kernels under the interpreter."""

    def on_gpu(x: Any) -> Any:
        return torch.empty_like(x, device="cuda:0") if isinstance(x, Tensor) else x

    def step(arguments: tuple, options: dict) -> None:
        op.in_place(*arguments, **options)

    arguments = b.arguments, b.options
    source = fake_gpu.emit(step, lambda: torch.utils._pytree.tree_map(on_gpu, arguments), fast=False)
    fake_gpu.interpret(source, arguments)


@pytest.mark.parametrize(
    ("op", "modes"),
    [(OP, Modes()), (SQUARES, Modes(block_wise=False, grad_scale=True))],
    ids=["ratio", "whole"],
)
@pytest.mark.parametrize("path", [launch, graph, triton])
def test_kernels_printed_from_a_format_equal_the_reference(path: Callable, op: StepOp, modes: Modes) -> None:
    old = bucket(op, modes)
    expected, actual = copy(old), copy(old)
    expected.call(op.in_place)
    path(op, actual)
    assert_close(op, actual, expected, rate=2e-3)
    for arena, before, after in zip(op.arenas, old.arenas, expected.arenas):
        if arena.part.per == 1:
            assert len(after.unique()) > 100 and not torch.equal(after, before)


def test_what_is_stored_is_near() -> None:
    torch.manual_seed(0)
    root = 0.1 + torch.rand(1000)
    states = [root * torch.randn(1000), root.square()]
    fresh = store_states(OP.stored, states)
    loaded = load_states(OP.stored, lambda stored: fresh[stored.state].parts, 1000)
    assert (loaded[1] - states[1]).abs().max() <= 2**-9
    assert ((loaded[0] - states[0]).abs() <= 0.02 * root + 0.01 * states[0].abs()).all()


def test_a_format_that_no_kernel_can_have_says_so() -> None:
    class Mixed(Squares):
        parts = (*Squares.parts, Part("other", torch.float32, per=128))

    with pytest.raises(NotImplementedError, match="most is shared by 256 elements, must be by as many"):
        trace_format(Mixed())

    class Sine(Squares):
        def share(self, maxima: Sequence[Tensor]) -> Sequence[Tensor]:
            return [x.sin() for x in maxima]

    with pytest.raises(NotImplementedError, match="sin.*may use abs, add"):
        trace_format(Sine())


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ((Stored(Ratio(), 0), Stored(Squares(), 1)), "a format of ratios, and no other, is over another"),
        ((Stored(Squares(), 1, over=0), Stored(Squares(), 0)), "a format of ratios, and no other"),
        ((Stored(Ratio(), 0, over=1), Stored(Squares(), 1)), "must be stored before it"),
        ((Stored(UNSIGNED, 1), Stored(Ratio(), 0, over=1)), "over dynamic8, which has a table"),
    ],
)
def test_formats_that_do_not_go_together_say_so(stored: tuple, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        step_op(rules.ADAM, stored)

"""Blocks that end where the rows of a whole tensor end, for parts of tensors that several processes hold.

What a part is computed to must not depend on how the tensor was cut: its rows alone, as parameters of their
own, are the reference, and two parts together are the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import fake_gpu
from helpers.buckets import STEP_OPS, Bucket, assert_close, copy, make
from torch import Tensor

from bnb_compile.formats import Slot, layout
from bnb_compile.lowering.cpp.launch import Launcher
from bnb_compile.ops.operator import Arguments, Modes, StepOp
from bnb_compile.ops.step import parts_of

pytestmark = pytest.mark.core

#: Rows, elements of a row.
SHAPES = [(7, 300), (1, 40), (4, 256), (3, 1000), (0, 300), (5, 33)]


def eager(op: StepOp, b: Bucket) -> None:
    b.call(op.in_place)


def launch(op: StepOp, b: Bucket) -> None:
    b.launch(Launcher, op)


def graph(op: StepOp, b: Bucket) -> None:
    torch._dynamo.reset()  # every test compiles the same function
    torch.compile(op.in_place, fullgraph=True)(*b.arguments, **b.options)


def on_gpu(x: Any) -> Any:
    return torch.empty_like(x, device="cuda:0") if isinstance(x, Tensor) else x


def triton(op: StepOp, b: Bucket) -> None:
    """The emitted kernels under the interpreter."""

    def step(arguments: tuple, options: dict) -> None:
        op.in_place(*arguments, **options)

    arguments = b.arguments, b.options
    source = fake_gpu.emit(step, lambda: torch.utils._pytree.tree_map(on_gpu, arguments), fast=False)
    fake_gpu.interpret(source, arguments)


def measured_in_triton(op: StepOp, arguments: tuple[tuple, dict]) -> Tensor:
    def measure(arguments: tuple, options: dict) -> list[Tensor]:
        return [op.measure(*arguments, **options)]

    source = fake_gpu.emit(measure, lambda: torch.utils._pytree.tree_map(on_gpu, arguments), fast=False)
    return fake_gpu.interpret(source, arguments)[0]


def places(b: Bucket) -> tuple[Slot, ...]:
    return layout((p.numel() for p in b.params), b.options.get("geometry")).slots


def contents(op: StepOp, b: Bucket) -> list[Tensor]:
    """Parameters and states, as the parts of each parameter by itself."""
    found = [p.reshape(-1) for p in b.params]
    for slot in places(b):
        for stored in op.stored:
            found += parts_of(op, b.arenas, stored, slot).values()
    return found


def cut(op: StepOp, whole: Bucket, pieces: list[tuple[int, int, int]], geometry: list[int] | None) -> Bucket:
    """The same parameters and states in other parts.

    Args:
        op: The operator.
        whole: Parameters with a geometry.
        pieces: For each part: of which parameter, its first row and its number of rows.
        geometry: Of the parts.
    """
    shapes = [whole.params[k][r : r + n].clone() for k, r, n in pieces]
    part = make(op, shapes, grads=[whole.grads[k][r : r + n].clone() for k, r, n in pieces])
    part = part._replace(options={**whole.options, "geometry": geometry})
    part = part._replace(
        arenas=[
            torch.zeros(s, dtype=a.part.dtype)
            for a, s in zip(op.arenas, op.shapes(layout((p.numel() for p in part.params), geometry)))
        ]
    )
    index = [k for k, _, _ in pieces]
    part.step.copy_(whole.step[index])
    part.hyper.copy_(whole.hyper[index])
    for (k, r, n), slot in zip(pieces, places(part)):
        old = places(whole)[k]
        for stored in op.stored:
            views = parts_of(op, part.arenas, stored, slot)
            given = parts_of(op, whole.arenas, stored, old)
            for of in stored.format.parts:
                each = old.row if of.per == 1 else old.row_blocks
                views[of.name].copy_(given[of.name][r * each : (r + n) * each])
    return part


def in_rows(op: StepOp, modes: Modes, dtype: torch.dtype = torch.float32) -> Bucket:
    geometry = [x for _, row in SHAPES for x in (row, row, 1000)]
    made = make(op, SHAPES, dtype, modes=modes)
    shapes = op.shapes(layout((p.numel() for p in made.params), geometry))
    longer = make(op, [(s[1] if s[1] else 1,) for s in shapes[:1]] * 2, dtype)  # more states than are needed
    arenas = [x[:, : s[1]].contiguous() for x, s in zip(longer.arenas, shapes)]
    for x, s in zip(arenas, shapes):
        assert x.shape == s
    return made._replace(arenas=arenas, options={**made.options, "geometry": geometry})


CASES = [
    ("adam", 8, Modes(), torch.float32),
    ("adam", 8, Modes(skip_zeros=True), torch.bfloat16),
    ("adam", 32, Modes(), torch.float32),
]


@pytest.mark.parametrize("path", [eager, launch, graph, triton])
@pytest.mark.parametrize("name, bits, modes, dtype", CASES, ids=["8 bits", "8 bits, zeros", "32 bits"])
def test_a_row_is_updated_as_a_parameter_of_its_own(
    path: Callable, name: str, bits: int, modes: Modes, dtype: torch.dtype
) -> None:
    op = STEP_OPS[name, bits]
    whole = in_rows(op, modes, dtype)
    rows = [(k, r, 1) for k, (count, _) in enumerate(SHAPES) for r in range(count)]
    alone = cut(op, whole, rows, None)
    eager(op, alone)
    old, actual = copy(whole), copy(whole)
    path(op, actual)
    together = cut(op, actual, rows, None)
    for a, e in zip(contents(op, together), contents(op, alone)):
        if path is eager:
            assert torch.equal(a, e)
    assert_close(op, together, alone._replace(step=together.step))
    assert not torch.equal(actual.arenas[0], old.arenas[0])


@pytest.mark.parametrize("path", [eager, launch, triton])
def test_two_parts_are_rounded_stochastically_as_the_whole(path: Callable) -> None:
    op = STEP_OPS["adam", 8]
    whole = in_rows(op, Modes(stochastic_round=True), torch.bfloat16)
    pieces, geometry = [], []
    for k, (count, row) in enumerate(SHAPES):
        for r, n in ((0, count // 2), (count // 2, count - count // 2)):
            pieces.append((k, r, n))
            geometry += [row, row, 1000 + r * row]
    parts = cut(op, whole, pieces, geometry)
    path(op, whole)
    path(op, parts)
    for a, e in zip(contents(op, cut(op, whole, pieces, geometry)), contents(op, parts)):
        assert torch.equal(a, e)


def test_columns_are_rounded_stochastically_as_the_whole() -> None:
    op = STEP_OPS["adam", 32]
    whole = make(op, [(6, 512)], torch.bfloat16, modes=Modes(stochastic_round=True))
    whole.options["geometry"] = [512, 512, 77]
    half = make(op, [whole.params[0][:, 256:].clone()], grads=[whole.grads[0][:, 256:].clone()])
    half.options.update(stochastic_round=True, geometry=[256, 512, 77 + 256])
    for of_half, of_whole in zip(half.arenas, whole.arenas):
        of_half.copy_(of_whole.view(-1, 6, 512)[:, :, 256:].reshape(of_half.shape))
    half.step.copy_(whole.step)
    half.hyper.copy_(whole.hyper)
    launch(op, whole)
    launch(op, half)
    assert torch.equal(whole.params[0][:, 256:], half.params[0])


@pytest.mark.parametrize(
    "geometry, mistake", [([300, 300], "three for each of 1"), ([7, 7, 0], "no rows of 7")]
)
def test_a_geometry_that_does_not_fit_raises(geometry: list[int], mistake: str) -> None:
    op = STEP_OPS["adam", 8]
    made = make(op, [(2, 300)])
    with pytest.raises(ValueError, match=mistake):
        op.in_place(*made.arguments, **made.options, geometry=geometry)


@pytest.mark.parametrize("path", [eager, launch, graph, triton])
@pytest.mark.parametrize(
    "name, bits, modes",
    [
        ("lamb", 32, Modes(max_unorm=True)),
        ("adam", 8, Modes(block_wise=False, max_unorm=True, grad_scale=True)),
    ],
    ids=["lamb", "one scale"],
)
def test_parts_that_know_what_all_have_found_are_the_whole(
    path: Callable, name: str, bits: int, modes: Modes
) -> None:
    op = STEP_OPS[name, bits]
    whole = in_rows(op, modes)
    pieces, geometry = [], []
    for k, (count, row) in enumerate(SHAPES):
        for r, n in ((0, count // 2), (count // 2, count - count // 2)):
            pieces.append((k, r, n))
            geometry += [row, row, 1000 + r * row]
    parts = cut(op, whole, pieces, geometry)
    index = [k for k, _, _ in pieces]
    for option in ("max_unorm", "unorm", "grad_scale"):
        if option in parts.options:
            parts.options[option] = parts.options[option][index].clone()
    read = {option: x for option, x in parts.options.items() if option != "unorm"}
    found = op.measure(*parts.arguments, **read)
    if path is not eager:
        measured = {
            triton: lambda: measured_in_triton(op, (parts.arguments, read)),
            launch: lambda: Launcher(
                op, Arguments.of(parts.arguments, {**parts.options, "totals": found})
            ).measure(parts.grads, torch.float32),
            graph: lambda: torch.compile(op.measure, fullgraph=True)(*parts.arguments, **read),
        }[path]()
        used = [k for k in range(len(pieces)) if read.get("grad_scale", torch.ones(99))[k].isfinite()]
        torch.testing.assert_close(measured[used], found[used], rtol=1e-5, atol=1e-8)
    together = torch.stack([found[::2, :2] + found[1::2, :2]]).squeeze(0)
    totals = torch.cat([together, torch.maximum(found[::2, 2:], found[1::2, 2:])], 1)
    parts.options["totals"] = totals.repeat_interleave(2, 0)
    eager(op, whole)
    path(op, parts)
    expected = cut(op, whole, pieces, geometry)
    expected.options.update({k: parts.options[k] for k in ("unorm",)})
    assert_close(op, parts, expected)
    finite = parts.options.get("grad_scale", torch.ones(len(index))).isfinite()
    used = [k for k, (_, _, n) in enumerate(pieces) if finite[k] and n]  # an empty tensor may have no address
    torch.testing.assert_close(
        parts.options["unorm"][used], whole.options["unorm"][index][used], rtol=1e-5, atol=1e-12
    )

"""The C++ kernels on 64-bit ARM: compiled for NEON, run by an emulator, and compared with the eager operator.

All kernels are one program, which begins with the tensors and writes what has become of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import aarch64
from helpers.buckets import OTHER_OPS, STEP_OPS, Bucket, assert_close, make
from torch import Tensor

from bnb_compile.formats import layout
from bnb_compile.lowering.cpp import source
from bnb_compile.ops.operator import Modes, StepOp

CASES: dict[str, tuple[StepOp, torch.dtype, Modes]] = {
    "8 bits": (STEP_OPS["adam", 8], torch.float32, Modes()),
    "8 bits, bfloat16": (STEP_OPS["adam", 8], torch.bfloat16, Modes(stochastic_round=True)),
    "32 bits, float16": (STEP_OPS["adam", 32], torch.float16, Modes()),
    "ratio8": (OTHER_OPS["adam", "ratio8"], torch.float32, Modes()),
    "ratio4": (OTHER_OPS["adam", "ratio4"], torch.float32, Modes()),
    "float8": (OTHER_OPS["adam", "float8"], torch.float32, Modes()),
    "trust ratio": (STEP_OPS["lamb", 8], torch.float32, Modes(max_unorm=True)),
    "means": (OTHER_OPS["clipped_lion", "dynamic8"], torch.float32, Modes(means=True)),
}
SHAPES = [(300,), (512,), (7, 40), (1,)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("ziglang") and importlib.util.find_spec("unicorn")),
        reason="ziglang or unicorn is not installed: pip install -e .[arm]",
    ),
]


def array(name: str, tensor: Tensor) -> str:
    """A tensor's bytes as C++."""
    data = ", ".join(map(str, tensor.contiguous().view(-1).view(torch.uint8).tolist()))
    return f"alignas(64) unsigned char {name}[] = {{{data}}};"


def program_of(buckets: dict[str, Bucket]) -> str:
    """A program that takes a step of each bucket, and writes parameters, arenas and steps."""
    texts, calls = [], []
    for k, (name, b) in enumerate(buckets.items()):
        op, dtype, modes = CASES[name]
        table = "const int64_t* table, int64_t count, int64_t elements, int64_t blocks"
        rows = "const Parameter* rows = (const Parameter*)table;"
        texts.append(source.kernel(op, modes, f"kernel{k}", dtype, dtype, table, rows))
        places = layout(p.numel() for p in b.params)
        arenas = {f"{arena.name}": x for arena, x in zip(op.arenas, b.arenas)}
        tensors = arenas | {"step": b.step, "hyper": b.hyper}
        tensors |= {key: x for key, x in b.options.items() if isinstance(x, Tensor)}
        given = source.state_arguments(op, modes)
        texts += [array(f"k{k}_{key}", tensors[key]) for key in given]
        texts += [array(f"k{k}_p{j}", p) for j, p in enumerate(b.params)]
        texts += [array(f"k{k}_g{j}", g) for j, g in enumerate(b.grads) if g is not None]
        fields = [
            f"(int64_t)k{k}_p{j}, (int64_t)k{k}_g{j}, {s.numel}, {s.offset}, {s.block}, 0, 0, "
            + ", ".join(map(str, source.of_row(s)))
            for j, s in enumerate(places.slots)
        ]
        tensors_given = ", ".join(f"({kind})k{k}_{key}" for key, kind in given.items())
        calls.append(f"const int64_t table{k}[] = {{{', '.join(fields)}}};")
        calls.append(
            f"kernel{k}(table{k}, {len(b.params)}, {places.elements}, {places.blocks}, {tensors_given});"
        )
        written = [f"p{j}" for j in range(len(b.params))] + [*arenas, "step"]
        calls += [f"fwrite(k{k}_{key}, 1, sizeof k{k}_{key}, stdout);" for key in written]
    return "\n".join(["#include <cstdio>", *texts, "int main() {", *calls, "}"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bucket, Bucket]]:
    """Of each case what the kernel and what the eager operator make of the same bucket."""
    folder: Path = tmp_path_factory.mktemp("aarch64")
    made = {
        name: [make(op, SHAPES, dtype, modes=modes) for _ in range(2)]
        for name, (op, dtype, modes) in CASES.items()
    }
    output = aarch64.run(aarch64.compile_program(program_of({k: b[0] for k, b in made.items()}), folder))
    found = {}
    for name, (actual, expected) in made.items():
        expected.call(CASES[name][0].in_place)
        for tensor in [*actual.params, *actual.arenas, actual.step]:
            size = tensor.numel() * tensor.element_size()
            bytes_, output = bytearray(output[:size]), output[size:]
            tensor.data.copy_(torch.frombuffer(bytes_, dtype=tensor.dtype).view(tensor.shape))
        found[name] = actual, expected
    assert not output
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_on_arm_equals_the_eager_operator(
    name: str, results: dict[str, tuple[Bucket, Bucket]]
) -> None:
    op, _, modes = CASES[name]
    actual, expected = results[name]
    assert torch.equal(actual.step, expected.step)
    if modes.max_unorm:
        actual.options["unorm"] = expected.options["unorm"]
    assert_close(op, actual, expected)

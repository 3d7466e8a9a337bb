"""The C++ kernels on 64-bit ARM: compiled for NEON and SVE, run by an emulator, compared with the eager ones.

All kernels are one program, which begins with the tensors and writes what has become of them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers import aarch64
from helpers.buckets import OTHER_OPS, STEP_OPS, Bucket, assert_close, make

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


@pytest.fixture(scope="module", params=aarch64.FLAGS)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Bucket, Bucket]]:
    """Of each case what the kernel and what the eager operator make of the same bucket."""
    folder: Path = tmp_path_factory.mktemp("aarch64")
    made = {
        name: [make(op, SHAPES, dtype, modes=modes) for _ in range(2)]
        for name, (op, dtype, modes) in CASES.items()
    }
    program = aarch64.program_of([(*CASES[name], b[0]) for name, b in made.items()])
    output = aarch64.run(aarch64.compile_program(program, folder, request.param)).written
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

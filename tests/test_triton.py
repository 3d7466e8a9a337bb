"""The step on a GPU, proven without one: emitted, run under Triton's interpreter, assembled.

The interpreter runs the portable kernels; the fast ones, with NVIDIA's instructions, differ from them in
`sqrt`, `div` and `encode_fast`, which is run here in an emulation of those instructions.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton.language as tl
from expecttest import assert_expected_inline
from helpers import fake_gpu
from helpers.buckets import (
    EVERYTHING,
    FEW_SIZES,
    OTHER_OPS,
    SIZES,
    STEP_OPS,
    Awkward,
    Bucket,
    assert_close,
    awkward,
    copy,
    make,
)
from torch import Tensor

from bnb_compile.formats import layout
from bnb_compile.formats.codebook import bounds, create_dynamic_map, nearest, outward_bounds
from bnb_compile.lowering.triton import device, dynamic_map
from bnb_compile.lowering.triton import source as triton_lowering
from bnb_compile.lowering.triton.source import print_rule
from bnb_compile.ops.blockwise import dequantize_op, quantize_op
from bnb_compile.ops.norms import norms_op
from bnb_compile.ops.operator import Arguments, Modes, StepOp

pytestmark = pytest.mark.core

#: Bits, dtype of the parameters, dtype of the gradients.
KINDS = [
    (8, torch.float32, torch.float32),
    (8, torch.bfloat16, torch.bfloat16),
    (8, torch.float16, torch.float32),
    (32, torch.float32, torch.bfloat16),
    (32, torch.bfloat16, torch.float32),
    (32, torch.float16, torch.bfloat16),
]
NAMES = [f"{bits} bits, {p}, {g}".replace("torch.", "") for bits, p, g in KINDS]


#: Steps that must know a whole parameter first, and one that need not.
MODES = {
    ("lamb", 8): EVERYTHING,
    ("sgd_plain", 32): EVERYTHING,
    ("lion", 8): Modes(max_unorm=True),
    ("ademamix", 32): Modes(max_unorm=True, grad_scale=True),
    ("rmsprop_momentum", 8): Modes(block_wise=False),
    ("adam", 8): Modes(grad_scale=True, skip_zeros=True),
}


def adam(bits: int) -> StepOp:
    return STEP_OPS["adam", bits]


def _cases() -> dict[str, tuple[StepOp, Modes, torch.dtype, torch.dtype]]:
    """Adam in many dtypes, every rule and every format in some, and a few in other modes."""
    steps = {name: (adam(bits), Modes(), *dtypes) for name, (bits, *dtypes) in zip(NAMES, KINDS)}
    steps["adam_step_bfloat16"] = (adam(16), Modes(), torch.bfloat16, torch.float32)
    rules = [op for (name, bits), op in STEP_OPS.items() if bits == 8 and name != "adam"]
    # The interpreter of Triton 3.7 loses a carry where it rounds to float8: 1.97 becomes 1.0.
    rules += [op for (_, format), op in OTHER_OPS.items() if format != "float8"]
    for op, (_, *dtypes) in zip(rules, itertools.cycle(KINDS[:2] + KINDS[3:])):
        steps[op.name] = (op, Modes(), *dtypes)
    for (rule, bits), modes in MODES.items():
        steps[f"{rule}, {bits} bits, modes"] = (STEP_OPS[rule, bits], modes, *KINDS[1][1:])
    return steps


CASES = _cases()
EVERY = [*STEP_OPS.values(), *OTHER_OPS.values()]


def on_gpu(x: Any) -> Any:
    """A fake tensor with the layout of `x`; only under a FakeTensorMode."""
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0")


def emit(op: StepOp, made: Bucket | Callable[[], Bucket]) -> str:
    """Source of the step in place; a function makes its bucket on a fake GPU."""

    def step(arguments: tuple, options: dict) -> None:
        op.in_place(*arguments, **options)

    def arguments() -> tuple:
        bucket = made() if callable(made) else made
        return torch.utils._pytree.tree_map(on_gpu, (bucket.arguments, bucket.options))

    return fake_gpu.emit(step, arguments)


def launches(source: str) -> list[str]:
    """The kernels that a call launches, without their numbers; fails if it does anything else."""
    call = re.sub("#.*", "", source[source.index("def call(") : source.index("runner = Runner")])
    assert not re.search(r"torch\.ops\.|extern_kernels\.|aten\.|\.copy_\(|\.clone\(", call)
    return [re.sub(r"_\d+$", "", name) for name in re.findall(r"^ +(\w+)\.run\(", call, re.M)]


# -- the kernels under the interpreter -----------------------------------------------------------------------


def made(name: str) -> Awkward:
    """The bucket of a step, before it."""
    op, modes, *dtypes = CASES[name]
    return awkward(op, *dtypes, modes, SIZES if name in (NAMES[1], NAMES[3]) else FEW_SIZES)


@pytest.fixture(scope="module")
def stepped() -> dict[str, Bucket]:
    """By name: a bucket after a step of the emitted kernels."""
    buckets = {name: copy(made(name).bucket) for name in CASES}

    def step(*buckets: Any) -> None:
        for (op, *_), (arguments, options) in zip(CASES.values(), buckets):
            op.in_place(*arguments, **options)

    arguments = tuple((bucket.arguments, bucket.options) for bucket in buckets.values())
    source = fake_gpu.emit(step, lambda: torch.utils._pytree.tree_map(on_gpu, arguments), fast=False)
    fake_gpu.interpret(source, arguments)
    return buckets


@pytest.mark.parametrize("name", CASES)
def test_emitted_kernels_equal_the_eager_operator(name: str, stepped: dict[str, Bucket]) -> None:
    """Parameters of 16 bits may differ by one ulp: the interpreter truncates where a GPU rounds.

    At most one code in 10,000 (or one in all) is the neighbour, where x / absmax lies within rounding of a
    midpoint: the kernel multiplies with 1 / absmax.
    """
    op, modes, *_ = CASES[name]
    before, without_grad, unusable, places = made(name)
    actual, expected = stepped[name], copy(before)
    expected.call(op.in_place)
    assert_close(op, actual, expected)
    for k, (old, new) in enumerate(zip(before.params, actual.params)):
        if k == without_grad or (modes.grad_scale and k >= len(before.params) - 2):
            assert torch.equal(old, new)
        elif old.numel() > 1:
            assert bool((old != new).any())
    assert torch.equal(before.params[unusable][places], actual.params[unusable][places])


# Each changes the gradients of a bucket and steps it.


def _moving(bucket: Bucket, step: Callable[[], None]) -> None:
    step()
    bucket.grads[:] = [None if g is None else g.neg() for g in bucket.grads]
    step()


def _absent(bucket: Bucket, step: Callable[[], None]) -> None:
    grads = list(bucket.grads)
    for missing in ([0, 4, 8], [], [1, 4], range(len(grads)), [2]):
        bucket.grads[:] = [None if k in missing else g for k, g in enumerate(grads)]
        step()


def _other_layout(bucket: Bucket, step: Callable[[], None]) -> None:
    step()
    for k, grad in enumerate(bucket.grads):
        if grad is not None and grad.dim() == 2:
            bucket.grads[k] = grad.t().contiguous().t()
    step()
    for k, grad in enumerate(bucket.grads):
        if grad is not None and grad.dim() == 1:
            bucket.grads[k] = torch.cat([grad[:1], grad])[1:]  # not at a multiple of 16 bytes
    step()


def _no_gradient_at_all(bucket: Bucket, step: Callable[[], None]) -> None:
    bucket.grads[:] = [None] * len(bucket.grads)
    step()


#: Name of the step, function, number of steps.
SCENARIOS = {
    "gradients that move": (NAMES[0], _moving, 2),
    "other gradients that are None": (NAMES[1], _absent, 5),
    "gradients of another layout": (NAMES[4], _other_layout, 3),
    "no gradient at all": (NAMES[0], _no_gradient_at_all, 1),
    "two phases and gradients that are None": ("lamb, 8 bits, modes", _absent, 5),
    "two phases and another layout": ("ademamix, 32 bits, modes", _other_layout, 3),
    "two phases without a trust ratio": ("rmsprop_momentum, 8 bits, modes", _moving, 2),
    "two phases without a state": ("sgd_plain, 32 bits, modes", _moving, 2),
    "gradients that are None, measured apart": ("lamb, 8 bits, modes", _absent, 5),
    "another layout, measured apart": ("ademamix, 32 bits, modes", _other_layout, 3),
}


def _run_scenarios(result: str) -> None:
    """In a process with TRITON_INTERPRET=1: every step of all scenarios by Launcher and by the operator."""
    from bnb_compile.lowering.triton.launch import Launcher

    pairs: dict[str, list[tuple[Bucket, Bucket]]] = {}
    for name, (case, scenario, _) in SCENARIOS.items():
        op, bucket = CASES[case][0], made(case).bucket
        n, totals = len(bucket.params), {}
        if name.endswith("measured apart"):
            totals["totals"] = torch.full((n, 2 + op.maxima), math.nan, dtype=torch.float64)
        launch = Launcher(op, Arguments.of(bucket.arguments, bucket.options | totals))
        pairs[name] = []

        def step(op=op, bucket=bucket, launch=launch, compared=pairs[name], totals=totals) -> None:
            expected = copy(bucket)
            expected.call(op.in_place)
            for dtype in {grad.dtype for grad in bucket.grads if grad is not None}:
                if totals:
                    totals["totals"].copy_(launch.measure(bucket.grads, dtype))
                launch(bucket.grads, dtype)
            compared.append((copy(bucket), expected))
            check_written_addresses(launch)

        scenario(bucket, step)
    torch.save({n: [(tuple(a), tuple(e)) for a, e in compared] for n, compared in pairs.items()}, result)


def check_written_addresses(launch: Any) -> None:
    """What a CUDA graph captures in place of a copy from the host leaves the same table."""
    if not launch._uploaded:
        return
    expected = torch.tensor(launch._uploaded).view(-1, 2)
    launch.addresses.zero_()
    launch._write(launch._uploaded)
    of_empty = launch.addresses == triton_lowering.NO_NUMBER - 1
    assert torch.equal(torch.where(of_empty, 1, launch.addresses), expected)


@pytest.fixture(scope="module")
def launched() -> dict[str, list[tuple[Bucket, Bucket]]]:
    """By scenario: for each step, the bucket after Launcher and after the eager operator."""
    with tempfile.TemporaryDirectory() as folder:
        result = os.path.join(folder, "result.pt")
        subprocess.run(
            [sys.executable, __file__, result], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True
        )
        pairs = torch.load(result)
    return {n: [(Bucket(*a), Bucket(*e)) for a, e in compared] for n, compared in pairs.items()}


@pytest.mark.parametrize(("name", "steps"), [(n, s) for n, (_, _, s) in SCENARIOS.items()])
def test_each_eager_launch_equals_the_eager_operator_with(
    name: str, steps: int, launched: dict[str, list[tuple[Bucket, Bucket]]]
) -> None:
    assert len(launched[name]) == steps
    for actual, expected in launched[name]:
        assert_close(CASES[SCENARIOS[name][0]][0], actual, expected)


# -- launches ------------------------------------------------------------------------------------------------

PREPARE, STEP = "triton_adam_step_dynamic8_prepare", "triton_adam_step_dynamic8"


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [PREPARE, STEP]), (100, [PREPARE, STEP]), (1000, ["triton_addresses", PREPARE, STEP])],
)
def test_a_step_is_two_launches_and_one_more_for_1500_more_tensors(count: int, expected: list[str]) -> None:
    source = emit(adam(8), make(adam(8), [(64,)] * count, torch.bfloat16))
    assert launches(source) == expected
    assert len(re.findall(r" = empty_strided_cuda\(", source)) == 2  # the tables of addresses and scalars


def test_tensors_without_vector_accesses_are_one_more_launch() -> None:
    source = emit(adam(8), awkward(adam(8), *KINDS[1][1:]).bucket)
    assert launches(source) == [PREPARE, STEP, STEP]


@pytest.mark.parametrize("modes", [EVERYTHING, Modes(max_unorm=True), Modes(block_wise=False)], ids=str)
@pytest.mark.parametrize("shapes", [[(64,)] * 4, [(64,), (63,), (8,), (7,)]], ids=["vectors", "irregular"])
def test_a_step_of_two_phases_measures_and_finishes_before_it_updates(modes: Modes, shapes: list) -> None:
    count = 2 if (63,) in shapes else 1
    source = emit(adam(8), make(adam(8), shapes, torch.bfloat16, modes=modes))
    measure, finish = f"{STEP}_measure", f"{STEP}_finish"
    assert launches(source) == [PREPARE, *[measure] * count, finish, *[STEP] * count]


def test_parts_of_tensors_are_measured_by_one_call_and_updated_by_another() -> None:
    op = adam(8)
    bucket = make(op, [(64,), (63,)], torch.bfloat16, modes=Modes(block_wise=False))
    tensors = bucket.arguments, bucket.options

    def measure(arguments: tuple, options: dict) -> list[Tensor]:
        return [op.measure(*arguments, **options)]

    source = fake_gpu.emit(measure, lambda: torch.utils._pytree.tree_map(on_gpu, tensors))
    assert launches(source) == [PREPARE, f"{STEP}_measure", f"{STEP}_measure", f"{STEP}_total"]
    bucket.options["totals"] = torch.zeros(2, 2 + op.maxima, dtype=torch.float64)
    assert launches(emit(op, bucket)) == [PREPARE, f"{STEP}_finish", STEP, STEP]


def test_other_modes_are_the_same_launches() -> None:
    source = emit(adam(8), make(adam(8), [(64,)] * 4, modes=Modes(grad_scale=True, skip_zeros=True)))
    assert launches(source) == [PREPARE, STEP]


def test_the_functional_step_copies_what_it_returns_and_nothing_else() -> None:
    op = adam(8)
    source = fake_gpu.emit(
        lambda *args: torch.utils._pytree.tree_leaves(op.functional(*args)),
        lambda: torch.utils._pytree.tree_map(on_gpu, make(op, [(64,), (300,)]).arguments),
    )
    names = launches(source)
    copies = [name for name in names if name.startswith("triton_poi_fused")]
    assert [name for name in names if name not in copies] == [PREPARE, STEP, STEP]
    assert len(copies) == 2 + len(op.arenas) + 1  # parameters, arenas, step


def test_emitted_norms_are_right_in_three_launches_and_one_more_for_irregular_tensors() -> None:
    shapes = [(5,), (300,), (0,), (), (100, 257), (64, 512), (40, 2)]
    xs = [torch.randn(shape) for shape in shapes] + [torch.randn(30, 40).t(), torch.randn(1).expand(77)]
    source = fake_gpu.emit(
        lambda xs: (norms_op(xs),), lambda: torch.utils._pytree.tree_map(on_gpu, (xs,)), fast=False
    )
    assert launches(source) == [
        "triton_addresses",
        "triton_tensor_sums",
        "triton_tensor_sums",
        "triton_tensor_norms",
    ]
    (norms,) = fake_gpu.interpret(source, (xs,))
    torch.testing.assert_close(norms, norms_op(xs), rtol=1e-6, atol=0)


def huge(op: StepOp, numel: int) -> Callable[[], Bucket]:
    def bucket() -> Bucket:
        param = torch.empty(numel, dtype=torch.bfloat16, device="meta")
        shapes = op.shapes(layout([numel]))
        arenas = [torch.empty(s, dtype=a.part.dtype, device="meta") for a, s in zip(op.arenas, shapes)]
        step = torch.empty(1, dtype=torch.int64, device="meta")
        hyper = torch.empty(1, 5, dtype=torch.float64, device="meta")
        return Bucket([param], [param], arenas, step, hyper, {})

    return bucket


@pytest.mark.parametrize(("numel", "index"), [(2**31, "int64"), (2**31 - 256, "int32")])
def test_places_have_64_bits_from_2_31_elements(numel: int, index: str) -> None:
    source = emit(adam(8), huge(adam(8), numel))
    assert f"INDEX=tl.{index}" in source


# -- structure -----------------------------------------------------------------------------------------------


def test_launches_and_signature_of_a_small_bucket() -> None:
    source = emit(adam(8), make(adam(8), [(64,), (32, 16), (300,)], torch.bfloat16, without_grad=[1]))
    assert launches(source) == [PREPARE, STEP, STEP]
    source = source.replace("raw_stream0", "stream0")  # as it is called since torch 2.13
    lines = [textwrap.fill(line, 100) for line in re.findall(r"^ +(\w+\.run\(.*)$", source, re.M)]
    assert_expected_inline(
        "\n".join(lines),
        """\
triton_adam_step_dynamic8_prepare_0.run(arg0_1, arg1_1, arg2_1, arg3_1, arg4_1, buf0, constant0,
arg7_1, arg8_1, buf1, 3, 1, 1, 1, stream=stream0)
triton_adam_step_dynamic8_1.run(buf0, constant3, constant4, reinterpret_tensor(arg5_1, (880, ), (1,
), 0), reinterpret_tensor(arg5_1, (880, ), (1, ), 880), reinterpret_tensor(arg6_1, (16, ), (1, ),
0), reinterpret_tensor(arg6_1, (16, ), (1, ), 16), constant1, constant2, buf1, 1, 1, 1,
stream=stream0)
triton_adam_step_dynamic8_2.run(buf0, constant5, constant6, reinterpret_tensor(arg5_1, (880, ), (1,
), 0), reinterpret_tensor(arg5_1, (880, ), (1, ), 880), reinterpret_tensor(arg6_1, (16, ), (1, ),
0), reinterpret_tensor(arg6_1, (16, ), (1, ), 16), constant1, constant2, buf1, 1, 1, 1,
stream=stream0)""",
    )
    (signature,) = re.findall(r"^def triton_adam_step_dynamic8_1\((.*)\):$", source, re.M)
    assert_expected_inline(
        textwrap.fill(signature, 100),
        """\
addresses, rows, owner, dynamic8_codes_0, dynamic8_codes_1, dynamic8_absmax_0, dynamic8_absmax_1,
signed_map, unsigned_map, scalars""",
    )


def test_the_printed_update() -> None:
    assert_expected_inline(
        print_rule(adam(8), True),
        """\
@triton.jit
def update(param, grad, states, s, ratio):
    FAST: tl.constexpr = True
    exp_avg = states[0]
    exp_avg_sq = states[1]
    keep = s[0]
    beta1 = s[1]
    one_minus_beta1 = s[2]
    beta2 = s[3]
    one_minus_beta2 = s[4]
    step_size = s[5]
    eps = s[6]
    unit = s[7]
    if ratio is not None:
        step_size = step_size * ratio
    t0 = beta1 * exp_avg
    t1 = one_minus_beta1 * grad
    t2 = t0 + t1
    t3 = beta2 * exp_avg_sq
    t4 = one_minus_beta2 * grad
    t5 = t4 * grad
    t6 = t3 + t5
    t7 = sqrt(t6, FAST)
    t8 = t7 + eps
    t9 = div(t2, t8, FAST)
    t10 = keep * param
    t11 = step_size * t9
    t12 = t10 - t11
    return t12, (t2, t6, )

@triton.jit
def direction(param, grad, states, s):
    FAST: tl.constexpr = True
    exp_avg = states[0]
    exp_avg_sq = states[1]
    keep = s[0]
    beta1 = s[1]
    one_minus_beta1 = s[2]
    beta2 = s[3]
    one_minus_beta2 = s[4]
    step_size = s[5]
    eps = s[6]
    unit = s[7]
    t0 = beta1 * exp_avg
    t1 = one_minus_beta1 * grad
    t2 = t0 + t1
    t3 = beta2 * exp_avg_sq
    t4 = one_minus_beta2 * grad
    t5 = t4 * grad
    t6 = t3 + t5
    t7 = sqrt(t6, FAST)
    t8 = t7 + eps
    t9 = div(t2, t8, FAST)
    return t9, (t2, t6, )

@triton.jit
def load_scalars(scalars, k, measured):
    row = scalars + k * 8
    keep = tl.load(row + 0)
    beta1 = tl.load(row + 1)
    one_minus_beta1 = tl.load(row + 2)
    beta2 = tl.load(row + 3)
    one_minus_beta2 = tl.load(row + 4)
    step_size = tl.load(row + 5)
    eps = tl.load(row + 6)
    unit = tl.load(row + 7)
    return (keep, beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, eps, unit, )


@triton.jit
def keep(used, fresh, old):
    return (tl.where(used, fresh[0], old[0]), tl.where(used, fresh[1], old[1]), )
""",
    )


# -- quantise and dequantise ---------------------------------------------------------------------------------


def test_arithmetic_between_dequantise_and_quantise_is_one_kernel_and_equals_eager() -> None:
    def shrink(codes: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
        x = dequantize_op(codes, absmax, None, 256, torch.float32)
        return quantize_op(x * 0.9 + 0.01, None, 256)

    arguments = torch.randint(0, 256, (16, 256), dtype=torch.uint8), torch.rand(16)
    source = fake_gpu.emit(shrink, lambda: torch.utils._pytree.tree_map(on_gpu, arguments))
    names = launches(source)
    assert len(names) == (1 if torch.__version__ >= "2.13" else 2)
    assert sum("per_fused" in name for name in names) == 1
    codes, absmax = fake_gpu.interpret(source, arguments)
    expected_codes, expected_absmax = shrink(*arguments)
    torch.testing.assert_close(absmax, expected_absmax, rtol=2e-7, atol=0)  # the kernel has an fma
    assert (codes.int() - expected_codes.int()).abs().max() <= 1
    assert (codes != expected_codes).float().mean() < 1e-3


# -- the fast kernels, assembled -----------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [80, 90, 100])
@pytest.mark.parametrize("bits", [8, 32])
def test_assembled_kernels_stay_in_registers_and_access_16_bytes(bits: int, sm: int) -> None:
    """With 8-bit states a bfloat16 parameter takes at most 82 instructions on sm_90."""
    assembly, instructions = fake_gpu.assemble_step(adam(bits), torch.bfloat16, sm)
    assert (assembly.stack, assembly.local) == (0, 0)
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= assembly.accesses
    if (bits, sm) == (8, 90):
        assert instructions <= 82
    assert assembly.registers <= 128


@pytest.mark.parametrize("op", [adam(8), adam(32), OTHER_OPS["adam", "ratio8"]], ids=lambda op: op.name)
def test_kernels_for_amd_stay_in_registers(op: StepOp) -> None:
    assembly, instructions = fake_gpu.assemble_step(op, torch.bfloat16, "gfx942", fast=False)
    assert assembly.stack == 0
    assert assembly.registers <= 128
    assert instructions <= 200
    assert any(access.startswith("global_load_dwordx4") for access in assembly.accesses)


@pytest.mark.parametrize("op", EVERY, ids=[op.name for op in EVERY])
def test_every_rule_stays_in_registers(op: StepOp) -> None:
    assembly, _ = fake_gpu.assemble_step(op, torch.bfloat16, 90)
    assert (assembly.stack, assembly.local) == (0, 0)


@pytest.mark.parametrize("measure", [True, False], ids=["measure", "step"])
@pytest.mark.parametrize("rule, bits", [("lamb", 8), ("sgd_plain", 32)])
def test_kernels_of_two_phases_stay_in_registers(rule: str, bits: int, measure: bool) -> None:
    op = STEP_OPS[rule, bits]
    assembly, _ = fake_gpu.assemble_step(op, torch.bfloat16, 90, modes=EVERYTHING, measure=measure)
    assert (assembly.stack, assembly.local) == (0, 0)


# -- the fast encoder ----------------------------------------------------------------------------------------


class _Float32(torch.Tensor):
    """A float32 tensor with the conversions of Triton's."""

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        return self.view(dtype) if bitcast else super().to(dtype)


def _float32(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)


def _round(exact: Tensor, down: bool) -> Tensor:
    x = exact.to(torch.float32)
    return torch.where(x.double() > exact, torch.nextafter(x, torch.tensor(-math.inf)), x) if down else x


def _fma(a: Any, b: Any, c: Any, down: bool = False) -> Tensor:
    """Rounded once, but for float64 (the product is exact there)."""
    return _round(_float32(a).double() * _float32(b).double() + _float32(c).double(), down)


def emulated_encode_fast(log2_error: float, exp2_error: float) -> Callable[[Tensor, bool], Tensor]:
    """dynamic_map.encode_fast itself, run with tensors in place of Triton's language.

    Args:
        log2_error: Of ``lg2.approx``, in units of 2**-22, which it is documented to be right to: absolute for
            magnitudes below 1, else relative.
        exp2_error: Of ``ex2.approx``, relative, in the same units.
    """
    unit = 2.0**-22

    def instruction(text: str, constraints: str, args: list[Tensor], **options: Any) -> Tensor:
        name = text.partition(" ")[0]
        if name == "lg2.approx.ftz.f32":
            exact = args[0].double().log2()
            return (exact + log2_error * unit * exact.abs().clamp(min=1)).to(torch.float32)
        if name == "ex2.approx.ftz.f32":
            return (args[0].double().exp2() * (1 + exp2_error * unit)).to(torch.float32)
        if name == "add.rm.ftz.f32":
            return _fma(args[0], 1.0, args[1], down=True)
        if name == "fma.rm.ftz.f32":
            return _fma(*args, down=True)
        raise NotImplementedError(name)

    language = types.SimpleNamespace(
        float32=torch.float32,
        int32=torch.int32,
        constexpr=None,
        abs=torch.abs,
        where=torch.where,
        maximum=lambda a, b: torch.maximum(_float32(a), _float32(b)),
        minimum=lambda a, b: torch.minimum(_float32(a), _float32(b)),
        fma=_fma,
        inline_asm_elementwise=instruction,
    )
    names: dict[str, Any] = {}
    for name, value in [*vars(device).items(), *vars(dynamic_map).items()]:
        value = getattr(value, "fn", value)  # a function without @triton.jit
        value = value.value if isinstance(value, tl.constexpr) else value
        names[name] = (
            types.FunctionType(value.__code__, names) if isinstance(value, types.FunctionType) else value
        )
    names["tl"] = language

    def encode(x: Tensor, signed: bool) -> Tensor:
        return names["encode_fast"](x.as_subclass(_Float32), signed).as_subclass(Tensor) & 255

    return encode


def dense_floats(signed: bool) -> Tensor:
    """Every 501st float of [1e-9, 1], and 300 on either side of each midpoint and each power of ten."""
    between = bounds(create_dynamic_map(signed))
    special = torch.cat([between[between > 0], 10.0 ** -torch.arange(8.0)]).view(torch.int32)
    parts = [
        torch.arange(0x3089705F, 0x3F800001, 501, dtype=torch.int32).view(torch.float32),
        (special[:, None] + torch.arange(-300, 301, dtype=torch.int32)).flatten().view(torch.float32),
    ]
    x = torch.cat(parts)
    x = x[x <= 1]
    return torch.cat([x, -x]) if signed else x


RANDOM = 2_000_000


def log_uniform(signed: bool) -> Tensor:
    x = torch.exp2(-30 * torch.rand(RANDOM))
    return x * torch.randn(RANDOM).sign() if signed else x


@pytest.mark.parametrize("signed", [True, False])
def test_the_fast_encoder_is_at_most_one_code_off(signed: bool) -> None:
    """Whatever the errors of the approximate instructions, within their documented bounds.

    Of log-uniform magnitudes in [1e-9, 1] a signed code in 1,000 is the neighbour, nearly all of them where a
    magnitude just above half of the smallest value becomes 0; above 1e-6, and without a sign, it is one in
    100,000.
    """
    torch.manual_seed(0)
    x = torch.cat([dense_floats(signed), log_uniform(signed)])
    expected = nearest(x, signed, outward_bounds(signed)).int()
    if not signed:
        expected = torch.where(x > 0, expected.clamp(min=1), expected)
    for errors in ((0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)):
        encode = emulated_encode_fast(*errors)
        apart = (encode(x, signed) - expected).abs()
        assert apart.max() <= 1, (errors, x[apart > 1])
        ends = torch.tensor([0.0, 1.0, -1.0, -0.0] if signed else [0.0, 1.0])
        assert encode(ends, signed).tolist() == ([127, 255, 0, 127] if signed else [0, 255]), errors
        random = x[-RANDOM:].abs()
        differs = apart[-RANDOM:].double()
        assert differs.mean() < (2e-3 if signed else 3e-5)
        assert differs[random > 1e-6].mean() < 3e-5


if __name__ == "__main__":
    _run_scenarios(sys.argv[1])

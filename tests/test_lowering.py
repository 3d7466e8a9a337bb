"""What Inductor makes of the operators: equal to eager, and as many kernels as it should be."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from helpers.buckets import (
    EVERYTHING,
    EXPANDED,
    FEW_SIZES,
    OTHER_OPS,
    STEP_OPS,
    STRIDED,
    Awkward,
    Bucket,
    assert_close,
    awkward,
    copy,
    make,
)
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from bnb_compile.ops.blockwise import dequantize_op, quantize_op
from bnb_compile.ops.operator import Modes, StepOp
from bnb_compile.ops.step import GRAD_LIMIT

BITS = pytest.mark.parametrize("bits", [8, 32])
DTYPES = [*itertools.product((torch.float32, torch.bfloat16, torch.float16), (torch.float32, torch.bfloat16))]
TRUST = Modes(max_unorm=True)


def _steps() -> dict[str, tuple[StepOp, Modes, torch.dtype, torch.dtype]]:
    """Every operator, with another pair of dtypes each, and some of them in other modes."""
    kinds = [(op, Modes()) for op in [*STEP_OPS.values(), *OTHER_OPS.values()]]
    for rule, bits in (("lamb", 8), ("sgd_plain", 32)):
        kinds += [(STEP_OPS[rule, bits], modes) for modes in (TRUST, EVERYTHING)]
    kinds.append((STEP_OPS["rmsprop_momentum", 8], Modes(block_wise=False)))
    kinds.append((STEP_OPS["ademamix", 8], Modes(grad_scale=True, skip_zeros=True)))
    return {
        f"{op.name}{''.join(f', {k}={v}' for k, v in modes._asdict().items() if v != getattr(Modes(), k))}": (
            op,
            modes,
            *dtypes,
        )
        for (op, modes), dtypes in zip(kinds, itertools.cycle(DTYPES))
    }


STEPS = _steps()
#: Those compiled in a graph: each rule with 8-bit or 32-bit states in turn, and all modes.
IN_GRAPH = {
    name: step
    for k, (name, step) in enumerate(STEPS.items())
    if k % 4 in (0, 3) or step[1] != Modes() or step[0].name == "sgd_plain_step"
}


@pytest.fixture(autouse=True)
def no_recompile_limits_across_tests() -> None:
    torch._dynamo.reset()


def step_of(op: StepOp) -> Callable[..., None]:
    def step(params: list, grads: list, *rest: Tensor, **options: Any) -> None:
        op.in_place(params, grads, *rest, **options)

    return step


def through_inductor(op: StepOp, bucket: Bucket) -> str:
    """Run the step compiled, and return the generated code."""
    step = torch.compile(step_of(op), fullgraph=True)
    _, (code,) = run_and_get_code(step, *bucket.arguments, **bucket.options)
    return code


def through_launch(op: StepOp, bucket: Bucket) -> str:
    """Run the kernel without a graph."""
    from bnb_compile.lowering.cpp.launch import Launcher

    bucket.launch(Launcher, op)
    return ""


PATHS = pytest.mark.parametrize("run", [through_inductor, through_launch], ids=["inductor", "launch"])


def body(code: str) -> str:
    """The part of the generated code that runs on each call."""
    return code[code.index("def call(self, args)") : code.index("runner = Runner")]


def assert_kernels(code: str, count: int) -> None:
    """So many kernels are defined and called, and none of our operators is left to eager code."""
    defined = re.findall(r"^(\w+) = async_compile\.\w+\(", code, re.M)
    assert len(defined) == count, defined
    called = re.findall(rf"^ +(?:{'|'.join(defined) or '$^'})\(", code, re.M)
    assert len(called) == (count), called
    assert not re.search(r"torch\.ops\.|extern_kernels\.|aten\.", body(code)), (
        "an operator is left to eager code"
    )


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and (
        torch.equal(a.isnan(), b.isnan())
    )  # fmt: skip


# -- the step ------------------------------------------------------------------------------------------------


def assert_stepped(op: StepOp, actual: Bucket, case: Awkward) -> None:
    """A bucket after a compiled step is as after an eager one, which is made here."""
    old, expected = case.bucket, copy(case.bucket)
    expected.call(op.in_place)
    assert_close(op, actual, expected)
    assert torch.equal(actual.params[case.without_grad], old.params[case.without_grad])
    kept = actual.params[case.unusable] == old.params[case.unusable]
    assert kept[case.places].all()
    for grad, before in zip(actual.grads, old.grads):
        assert grad is None or equal(grad, before)
    assert torch.equal(actual.hyper, old.hyper)
    if "grad_scale" in old.options:
        for k in (-2, -1):  # not finite
            assert torch.equal(actual.params[k], old.params[k]) and actual.step[k] == old.step[k]


@pytest.mark.parametrize("case", STEPS)
def test_each_launch_equals_the_eager_operator(case: str) -> None:
    op, modes, *dtypes = STEPS[case]
    made = awkward(op, *dtypes, modes)
    actual = copy(made.bucket)
    through_launch(op, actual)
    assert_stepped(op, actual, made)


@pytest.fixture(scope="module")
def in_one_graph() -> tuple[str, dict[str, Bucket]]:
    """The generated code of a graph that steps a bucket of every case, and the buckets after it."""
    buckets = {
        name: awkward(op, *dtypes, modes, FEW_SIZES).bucket for name, (op, modes, *dtypes) in IN_GRAPH.items()
    }
    buckets = {name: copy(bucket) for name, bucket in buckets.items()}

    def step(buckets: list[tuple[tuple, dict]]) -> None:
        for (op, *_), (arguments, options) in zip(IN_GRAPH.values(), buckets):
            op.in_place(*arguments, **options)

    torch._dynamo.reset()
    arguments = [(bucket.arguments, bucket.options) for bucket in buckets.values()]
    _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), arguments)
    return code, buckets


@pytest.mark.parametrize("case", IN_GRAPH)
def test_each_kernel_of_a_graph_equals_the_eager_operator(case: str, in_one_graph: tuple) -> None:
    op, modes, *dtypes = IN_GRAPH[case]
    assert_stepped(op, in_one_graph[1][case], awkward(op, *dtypes, modes, FEW_SIZES))


def test_each_step_of_a_graph_is_one_kernel_and_copies_nothing(in_one_graph: tuple) -> None:
    code, _ = in_one_graph
    assert_kernels(code, len(IN_GRAPH))
    assert not re.search(r"empty_strided|clone|\.copy_\(|reinterpret_tensor\(", body(code))


@pytest.mark.parametrize("case", [name for name, (_, modes, *_) in STEPS.items() if modes.two_phases])
def test_sums_over_a_parameter_do_not_depend_on_the_number_of_threads(case: str) -> None:
    op, modes, *dtypes = STEPS[case]
    one, two = (make(op, [(300_000,), (5,), (700, 3)], *dtypes, modes=modes) for _ in range(2))
    threads = torch.get_num_threads()
    for bucket, count in ((one, 1), (two, 2)):
        torch.set_num_threads(count)
        try:
            through_launch(op, bucket)
        finally:
            torch.set_num_threads(threads)
    for a, b in zip([*one.params, *one.state], [*two.params, *two.state]):
        assert torch.equal(a, b)


@BITS
def test_steps_of_any_number_of_parameters_are_one_kernel(bits: int) -> None:
    op = STEP_OPS["adam", bits]
    expected, actual = (make(op, [(k % 7, 50 + k) for k in range(40)]) for _ in range(2))
    expected.call(op.in_place)
    code = through_inductor(op, actual)
    assert_kernels(code, 1)
    assert_close(op, actual, expected)


@BITS
def test_functional_step_equals_eager_in_one_kernel_of_its_own(bits: int) -> None:
    op = STEP_OPS["adam", bits]

    def bucket() -> Bucket:
        torch.manual_seed(1)
        return make(
            op,
            [(300,), (), (0,), (70,), STRIDED["transposed"](), STRIDED["channels_last"]()],
            without_grad=[3],
        )

    old, given = bucket(), bucket()
    params, *state = op.functional(*old.arguments)
    expected = old._replace(params=params, arenas=state[:-1], step=state[-1])

    def step(params: list, grads: list, *rest: Tensor) -> tuple:
        return op.functional(params, grads, *rest)

    (params, *state), (code,) = run_and_get_code(torch.compile(step, fullgraph=True), *given.arguments)
    actual = given._replace(params=params, arenas=state[:-1], step=state[-1])
    assert_close(op, actual, expected)
    assert [p.stride() for p in actual.params] == [p.stride() for p in expected.params]
    for result, untouched in zip([*given.params, *given.state], [*old.params, *old.state], strict=True):
        assert torch.equal(result, untouched)
    assert len(re.findall(r"^cpp_adam_step_\w+ = ", code, re.M)) == 1
    assert len(re.findall(r"^ +cpp_adam_step_\w+\(", code, re.M)) == 1
    assert "torch.ops.bnb_compile" not in body(code)


@BITS
@PATHS
def test_nothing_happens_without_gradients(run: Callable, bits: int) -> None:
    op = STEP_OPS["adam", bits]
    old, new = (make(op, [(300,), (5,)], without_grad=[0, 1]) for _ in range(2))
    run(op, new)
    for a, b in zip([*new.params, *new.state], [*old.params, *old.state]):
        assert torch.equal(a, b)


@BITS
@PATHS
def test_unusable_gradients_in_compiled_code_equal_eager(run: Callable, bits: int) -> None:
    op = STEP_OPS["adam", bits]

    def bucket() -> Bucket:
        b = make(op, [(1000,), (256,), (257,), (256,), (4096,)])
        b.grads[0][::7] = math.nan
        b.grads[1].fill_(math.inf)
        b.grads[2][-1] = -math.inf
        b.grads[3].fill_(GRAD_LIMIT)
        b.grads[3][::2] = GRAD_LIMIT * (1 - 2**-24)
        b.grads[4][5], b.grads[4][300], b.grads[4][301] = 1e30, -3e38, 1e-40
        return b

    expected, actual, old = bucket(), bucket(), bucket()
    expected.call(op.in_place)
    run(op, actual)
    assert_close(op, actual, expected)
    for param, grad, before in zip(actual.params, actual.grads, old.params):
        kept = ~(grad.abs() < GRAD_LIMIT)
        assert kept.any() and torch.equal(param[kept], before[kept])


@PATHS
@pytest.mark.parametrize("scale", [1e-16, 1e-12, 1e-6, 1e6, 1e17])
def test_every_gradient_scale_equals_eager(run: Callable, scale: float) -> None:
    op = STEP_OPS["adam", 8]

    def bucket() -> Bucket:
        b = make(op, [(3000,), (256,)])
        absmax = b.arenas[1]
        absmax[0] *= scale
        absmax[1] *= scale**2
        return b._replace(grads=[g * scale for g in b.grads])

    expected, actual = bucket(), bucket()
    expected.call(op.in_place)
    run(op, actual)
    (codes, absmax), (expected_codes, expected_absmax) = actual.arenas, expected.arenas
    assert (codes.int() - expected_codes.int()).abs().max() <= 1 and (codes != expected_codes).sum() <= 4
    torch.testing.assert_close(absmax, expected_absmax, rtol=1e-5, atol=0)
    for a, e in zip(actual.params, expected.params):
        torch.testing.assert_close(a, e, rtol=2e-6, atol=1e-6)


@BITS
@pytest.mark.parametrize("which", ["hyper", "step", "arena"])
def test_states_and_hyperparameters_must_be_contiguous(bits: int, which: str) -> None:
    op = STEP_OPS["adam", bits]

    def bucket() -> Bucket:
        b = make(op, [(300,), (500,), (20,)])
        if which == "hyper":
            return b._replace(hyper=b.hyper[:1].expand(3, 5))
        if which == "step":
            return b._replace(step=b.step.repeat_interleave(2)[::2])
        return b._replace(arenas=[b.arenas[0].repeat_interleave(2)[::2], *b.arenas[1:]])

    with pytest.raises(ValueError, match="contiguous"):
        op.in_place(*bucket().arguments)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="contiguous"):
        through_inductor(op, bucket())


def test_parameters_that_are_views_made_in_the_graph() -> None:
    op = STEP_OPS["adam", 8]

    def step(flat: Tensor, scale: Tensor, grads: list, *rest: Tensor) -> Tensor:
        params = [flat[:300], flat[300:].view(20, 35)]
        op.in_place(params, [g * scale for g in grads], *rest)
        return flat * 2

    flat, scale = torch.randn(1000), torch.tensor(0.5)
    flat_compiled = flat.clone()
    expected, actual = (make(op, [(300,), (20, 35)]) for _ in range(2))
    step(flat, scale, *expected.arguments[1:])
    doubled, (code,) = run_and_get_code(
        torch.compile(step, fullgraph=True), flat_compiled, scale, *actual.arguments[1:]
    )
    assert torch.equal(doubled, flat_compiled * 2)
    assert_close(op, actual._replace(params=[flat_compiled]), expected._replace(params=[flat]))
    assert "torch.ops.bnb_compile" not in body(code)


def test_what_follows_a_step_in_the_graph_sees_it() -> None:
    op = STEP_OPS["adam", 8]

    def twice(params: list, grads: list, *rest: Tensor) -> Tensor:
        before = params[0].sum()
        op.in_place(params, grads, *rest)
        middle = params[0].sum()
        op.in_place(params, [-3 * params[0]], *rest)
        return torch.stack([before, middle, params[0].sum(), rest[-2].sum()])

    a, b = make(op, [(300,)]), make(op, [(300,)])
    expected = twice(*a.arguments)
    actual = torch.compile(twice, fullgraph=True)(*b.arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert_close(op, b, a)


def test_wrong_arguments_are_named_while_compiling() -> None:
    op = STEP_OPS["adam", 8]
    bucket = make(op, [(300,)])
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match=r"step .*\(4,\)"):
        through_inductor(op, bucket._replace(step=torch.zeros(4)))


def test_launch_ignores_default_dtype_and_device() -> None:
    op = STEP_OPS["adam", 8]
    expected, actual = (make(op, [(300,), STRIDED["transposed"]().zero_()]) for _ in range(2))
    expected.call(op.in_place)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            through_launch(op, actual)
    finally:
        torch.set_default_dtype(dtype)
    assert_close(op, actual, expected)


def test_printed_rule_of_adam() -> None:
    from bnb_compile.lowering.cpp.source import print_rule

    text = print_rule(STEP_OPS["adam", 8])
    update = text[text.index("static inline void update") :]
    assert_expected_inline(
        update,
        """\
static inline void update(V& param, const V& grad, V* state, const V* s) {
    const V exp_avg = state[0];
    const V exp_avg_sq = state[1];
    const V keep = s[0];
    const V beta1 = s[1];
    const V one_minus_beta1 = s[2];
    const V beta2 = s[3];
    const V one_minus_beta2 = s[4];
    const V step_size = s[5];
    const V eps = s[6];
    const V unit = s[7];
    const auto t0 = beta1 * exp_avg;
    const auto t1 = at::vec::fmadd(one_minus_beta1, grad, t0);
    const auto t2 = beta2 * exp_avg_sq;
    const auto t3 = one_minus_beta2 * grad;
    const auto t4 = at::vec::fmadd(t3, grad, t2);
    const auto t5 = (t4).sqrt();
    const auto t6 = t5 + eps;
    const auto t7 = t1 / t6;
    const auto t8 = keep * param;
    const auto t9 = at::vec::fnmadd(step_size, t7, t8);
    param = t9;
    state[0] = t1;
    state[1] = t4;
  }
  static inline V direction(const V& param, const V& grad, V* state, const V* s) {
    const V exp_avg = state[0];
    const V exp_avg_sq = state[1];
    const V keep = s[0];
    const V beta1 = s[1];
    const V one_minus_beta1 = s[2];
    const V beta2 = s[3];
    const V one_minus_beta2 = s[4];
    const V step_size = s[5];
    const V eps = s[6];
    const V unit = s[7];
    const auto t0 = beta1 * exp_avg;
    const auto t1 = at::vec::fmadd(one_minus_beta1, grad, t0);
    const auto t2 = beta2 * exp_avg_sq;
    const auto t3 = one_minus_beta2 * grad;
    const auto t4 = at::vec::fmadd(t3, grad, t2);
    const auto t5 = (t4).sqrt();
    const auto t6 = t5 + eps;
    const auto t7 = t1 / t6;
    const V direction = t7;
    state[0] = t1;
    state[1] = t4;
    return direction;
  }
  static inline void measure(
      const V& param, const V& grad, const V* state, const V* s, V* numbers) {
  }
  template <int FORMAT>
  static inline V impulse(const V& lost, const V& root, const V* s) {
    return V(0.f);
  }
};""",
    )


# -- quantise and dequantise ---------------------------------------------------------------------------------

#: Number of elements and block size: whole blocks, a partial one, fewer elements than a block.
PARTS = [
    (4096, 256),
    (4097, 256),
    (5000, 100),
    (301, 3),
    (77, 1),
    (100, 4096),
    (30000, 10000),
    (30001, 10000),
]


CASES = [(n, block, torch.float32, True) for n, block in PARTS] + [
    (4097, 256, torch.bfloat16, True),
    (4097, 100, torch.float16, True),
    (4097, 256, torch.float32, False),
    (4096, 256, torch.bfloat16, False),
]


@pytest.mark.parametrize("numel, block_size, dtype, signed", CASES)
def test_compiled_quantise_and_dequantise_equal_eager_exactly(
    numel: int, block_size: int, dtype: torch.dtype, signed: bool
) -> None:
    x = torch.randn(numel, dtype=torch.float32).to(dtype)
    x = x if signed else x.abs()

    def both(x: Tensor) -> tuple:
        codes, absmax = quantize_op(x, None, block_size, signed)
        return codes, absmax, dequantize_op(codes, absmax, None, block_size, dtype, signed)

    expected = both(x)
    actual, (code,) = run_and_get_code(torch.compile(both, fullgraph=True), x)
    for a, e in zip(actual, expected):
        assert equal(a, e)
    assert "torch.ops.bnb_compile" not in body(code)


@pytest.mark.parametrize("block_size", [100])
def test_any_shapes_and_strides_in_compiled_code(block_size: int) -> None:
    inputs = [STRIDED["transposed"](), STRIDED["channels_last"](), EXPANDED["expanded row"]()]
    inputs += [torch.randn(()), torch.randn(3, 0, 2), torch.randn(50).half()]

    def both(*inputs: Tensor) -> list[Tensor]:
        results = []
        for x in inputs:
            codes, absmax = quantize_op(x, None, block_size)
            results += [codes, absmax, dequantize_op(codes, absmax, None, block_size, torch.float32)]
        return results

    for a, e in zip(torch.compile(both, fullgraph=True)(*inputs), both(*inputs), strict=True):
        assert equal(a, e)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_dequantise_arithmetic_quantise_is_one_kernel(signed: bool) -> None:
    for numel in (4096, 4097):
        codes = torch.randint(0, 256, (numel,), dtype=torch.uint8)
        absmax = torch.rand(-(-numel // 256))
        x = torch.randn(numel)

        def update(codes: Tensor, absmax: Tensor, x: Tensor) -> Any:
            m = dequantize_op(codes, absmax, None, 256, torch.float32, signed)
            m = m * 0.5 + x.abs() * 0.25
            return quantize_op(m, None, 256, signed)

        expected = update(codes, absmax, x)
        actual, (code,) = run_and_get_code(torch.compile(update, fullgraph=True), codes, absmax, x)
        assert_kernels(code, 1)
        for a, e in zip(actual, expected):
            assert equal(a, e)


def test_absmax_feeds_further_arithmetic() -> None:
    def update(x: Tensor) -> Any:
        codes, absmax = quantize_op(x.sin(), None, 100)
        y = dequantize_op(codes, absmax * 2, None, 100, torch.bfloat16)
        return codes.float().sum(), y.relu(), absmax.max()

    x = torch.randn(1050)
    for a, e in zip(torch.compile(update, fullgraph=True)(x), update(x), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_custom_map_in_compiled_code() -> None:
    code = torch.linspace(-1, 1, 256) ** 3

    def both(x: Tensor, code: Tensor) -> Any:
        codes, absmax = quantize_op(x, code, 100)
        return codes, absmax, dequantize_op(codes, absmax, code, 100, torch.float32)

    for x in (torch.randn(1000), torch.randn(1001)):
        x[150], x[250] = math.nan, math.inf
        actual, (text,) = run_and_get_code(torch.compile(both, fullgraph=True), x, code)
        for a, e in zip(actual, both(x, code), strict=True):
            assert equal(a, e)
        assert "torch.ops.bnb_compile" not in body(text)


@pytest.mark.parametrize("numel", [1024, 1000])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_not_finite_and_vanishing_blocks_in_compiled_code(signed: bool, numel: int) -> None:
    def both(x: Tensor) -> Any:
        codes, absmax = quantize_op(x, None, 128, signed)
        return codes, absmax, dequantize_op(codes, absmax, None, 128, torch.float32, signed)

    x = torch.randn(numel) if signed else torch.rand(numel)
    x[5], x[130], x[260] = math.nan, math.inf, -math.inf
    x[384:512] = 0
    x[512:640] = 1e-39
    x[640:768] *= 3e38 / x[640:768].abs().max()
    x[999] = math.nan
    actual = torch.compile(both, fullgraph=True)(x)
    for a, e in zip(actual, both(x), strict=True):
        assert equal(a, e)
    assert actual[2][:384].isnan().all() and (actual[2][384:640] == 0).all()


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_every_midpoint_in_compiled_code(signed: bool) -> None:
    from bnb_compile.formats.codebook import bounds, create_dynamic_map

    at = bounds(create_dynamic_map(signed))
    x = torch.cat([torch.nextafter(at, torch.full_like(at, end)) for end in (-2.0, 2.0)] + [at])
    x = torch.cat([x, torch.tensor([1.0, 0.0, -0.0])])
    x = x if signed else x.clamp(min=0)
    actual, expected = (
        torch.compile(quantize_op, fullgraph=True)(x, None, 1000, signed),
        quantize_op(x, None, 1000, signed),
    )
    assert torch.equal(actual[0], expected[0])


def test_dynamic_shapes_need_no_second_compilation() -> None:
    def both(x: Tensor) -> Any:
        codes, absmax = quantize_op(x * 2, None, 256)
        return codes, absmax, dequantize_op(codes, absmax, None, 256, torch.float32)

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(both, backend=counter, fullgraph=True)
    for numel in (1000, 1001, 5003, 257, 2048, 255):
        x = torch.randn(numel)
        torch._dynamo.mark_dynamic(x, 0)
        for a, e in zip(compiled(x), both(x), strict=True):
            assert equal(a, e)
        # Whole blocks, and a single one, have code of their own.
        assert counter.frame_count == 1 or numel in (2048, 255)


def test_dynamic_rows_of_whole_blocks() -> None:
    def both(x: Tensor) -> Any:
        codes, absmax = quantize_op(x, None, 128)
        return codes, absmax, dequantize_op(codes, absmax, None, 128, torch.float32)

    compiled = torch.compile(both, fullgraph=True, dynamic=True)
    for rows in (2, 3, 7):
        x = torch.randn(rows, 256)
        for a, e in zip(compiled(x), both(x), strict=True):
            assert equal(a, e)


PORTABLE = """
import sys, warnings
sys.path.insert(0, {tests!r})
import torch
from helpers.buckets import make, assert_close
from bnb_compile.lowering.cpp.launch import Launcher
from helpers.buckets import STEP_OPS
from torch._inductor.cpu_vec_isa import pick_vec_isa

assert {isa!r} in str(pick_vec_isa()).lower(), pick_vec_isa()
op = STEP_OPS["adam", 8]
expected, actual = (make(op, [(300,), (40, 70), (4096,)]) for _ in range(2))
expected.call(op.in_place)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    actual.launch(Launcher, op)
    actual.launch(Launcher, op)
    expected.call(op.in_place)
found = ["no instruction set" in str(w.message) for w in caught]
assert sum(found) == ({isa!r} == "invalid"), found
assert_close(op, actual, expected)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 names its instruction sets so")
@pytest.mark.parametrize("capability, isa", [("avx2", "avx2"), ("default", "invalid")])
def test_the_portable_form_runs_without_avx512(capability: str, isa: str) -> None:
    script = PORTABLE.format(tests=os.path.dirname(__file__), isa=isa)
    subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "ATEN_CPU_CAPABILITY": capability}, check=True
    )

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from bnb_compile.ops.norms import norms_op

pytestmark = pytest.mark.quick


def tensors(dtype: torch.dtype) -> list[Tensor]:
    shapes = ((5,), (300,), (0,), (), (100, 257), (64, 64))
    xs = [torch.randn(shape).to(dtype) for shape in shapes]
    return [*xs, torch.randn(30, 40).to(dtype).t(), torch.randn(1).to(dtype).expand(77), xs[4][::3, 1::2]]


def expected(xs: list[Tensor]) -> Tensor:
    return torch.tensor([x.double().pow(2).sum().sqrt().item() for x in xs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_and_eager_norms_are_right_in_one_kernel(dtype: torch.dtype) -> None:
    xs = tensors(dtype)
    torch.library.opcheck(norms_op, (xs,))
    compiled, (code,) = run_and_get_code(torch.compile(lambda xs: norms_op(xs), fullgraph=True), xs)
    torch.testing.assert_close(norms_op(xs), expected(xs), rtol=1e-6, atol=0)
    torch.testing.assert_close(compiled, expected(xs), rtol=1e-6, atol=0)
    assert code.count("async_compile.cpp_pybinding(") == 1
    assert "torch.ops.bnb_compile" not in code


def test_norms_do_not_depend_on_the_number_of_threads() -> None:
    xs = [torch.randn(1_000_003), torch.randn(77)]
    norms = torch.compile(lambda xs: norms_op(xs), fullgraph=True)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(norms(xs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_norm_of_large_values_does_not_overflow_where_the_result_is_finite() -> None:
    xs = [torch.full((3,), 1e19), torch.tensor([float("inf"), 1.0]), torch.tensor([float("nan")])]
    norms = norms_op(xs)
    assert norms[0].isfinite() and norms[1].isinf() and norms[2].isnan()


@pytest.mark.parametrize(
    "xs", [[], [torch.zeros(3, dtype=torch.int32)], [torch.zeros(3), torch.zeros(3).bfloat16()]]
)
def test_wrong_tensors_are_named(xs: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="tensor_norms: xs are of"):
        norms_op(xs)

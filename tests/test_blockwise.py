"""quantize_blockwise and dequantize_blockwise in eager mode, against float64 arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bnb_compile.formats.codebook import create_dynamic_map
from bnb_compile.ops.blockwise import dequantize_op, quantize_op

pytestmark = pytest.mark.usefixtures("nan_filled_empty")

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCK_SIZES = (1, 3, 100, 256, 4096, 10000)
SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
ZERO = {True: 127, False: 0}

INPUTS = {
    "vector": lambda: torch.randn(5000),
    "whole blocks": lambda: torch.randn(1, 10000),
    "one element": lambda: torch.randn(1),
    "0-dim": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "transposed": lambda: torch.randn(60, 70).t(),
    "with gaps": lambda: torch.randn(60, 70)[::2, 1:50],
    "channels_last": lambda: torch.randn(3, 5, 7, 9).to(memory_format=torch.channels_last),
    "expanded": lambda: torch.randn(7, 1, 9).expand(7, 30, 9),
    "zero blocks": lambda: torch.cat([torch.zeros(700), torch.randn(500), torch.zeros(300)]),
}
#: An ascending table that is nothing like the dynamic map.
CUSTOM = torch.linspace(-1, 1, 256) ** 3


def of_each_element(scales: Tensor, block_size: int, shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(block_size)[: shape.numel()].view(shape)


def reference_quantize(x: Tensor, code: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Each element is compared with each value; ties go to the lower code."""
    blocks = x.reshape(-1).float().split(block_size) if x.numel() else []
    absmax = torch.tensor([block.abs().max() for block in blocks])
    scale = torch.where(absmax > 0, absmax, 1.0)
    normalised = x.float() / of_each_element(scale, block_size, x.shape)
    return (normalised.double()[..., None] - code.double()).abs().argmin(-1).to(torch.uint8), absmax


def reference_dequantize(codes: Tensor, absmax: Tensor, code: Tensor, block_size: int) -> Tensor:
    return code[codes.int()].double() * of_each_element(absmax.double(), block_size, codes.shape)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("kind", INPUTS)
def test_equals_float64_arithmetic(kind: str, block_size: int) -> None:
    for dtype, code, signed in [
        (torch.float32, None, True),
        (torch.float32, None, False),
        (torch.float16, None, True),
        (torch.bfloat16, None, True),
        (torch.float32, CUSTOM, True),
    ]:
        x = INPUTS[kind]().to(dtype)
        x = x if signed else x.abs()
        before = x.clone()
        values = create_dynamic_map(signed) if code is None else code
        codes, absmax = quantize_op(x, code, block_size, signed)
        assert torch.equal(x, before)
        assert codes.dtype == torch.uint8 and absmax.dtype == torch.float32
        expected_codes, expected_absmax = reference_quantize(x, values, block_size)
        assert torch.equal(absmax, expected_absmax)
        assert torch.equal(codes, expected_codes)
        for out in FLOATS:
            decoded = dequantize_op(codes, absmax, code, block_size, out, signed)
            assert decoded.dtype == out and decoded.shape == x.shape
            assert torch.equal(
                decoded, reference_dequantize(codes, absmax, values, block_size).float().to(out)
            )


def test_signed_map_is_the_default() -> None:
    x = torch.randn(100)
    codes, absmax = quantize_op(x, None, 32)
    assert torch.equal(codes, quantize_op(x, create_dynamic_map(True), 32)[0])
    decoded = dequantize_op(codes, absmax, None, 32, torch.float32)
    assert torch.equal(decoded, dequantize_op(codes, absmax, create_dynamic_map(True), 32, torch.float32))


@SIGNED
def test_codes_of_any_strides_decode_in_logical_order(signed: bool) -> None:
    codes = torch.randint(0, 256, (60, 70), dtype=torch.uint8)
    absmax = torch.rand(42)
    expected = dequantize_op(codes.t().contiguous(), absmax, None, 100, torch.float32, signed)
    assert torch.equal(dequantize_op(codes.t(), absmax, None, 100, torch.float32, signed), expected)


@SIGNED
@pytest.mark.parametrize("code", [None, CUSTOM], ids=["dynamic", "custom"])
def test_zero_blocks_decode_to_zero(signed: bool, code: Tensor | None) -> None:
    x = torch.zeros(300)
    x[100:200] = torch.rand(100)
    codes, absmax = quantize_op(x, code, 100, signed)
    assert absmax[0] == 0 and absmax[2] == 0
    decoded = dequantize_op(codes, absmax, code, 100, torch.float32, signed)
    assert (decoded[:100] == 0).all() and (decoded[200:] == 0).all()


@SIGNED
def test_blocks_below_the_smallest_normal_count_as_zero(signed: bool) -> None:
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([tiny / 2, 1e-45, 0.0, tiny, tiny / 2, 0.0])
    codes, absmax = quantize_op(x, None, 3, signed)
    assert absmax.tolist() == [0.0, tiny]
    assert dequantize_op(codes, absmax, None, 3, torch.float32, signed)[:4].tolist() == [0.0] * 3 + [tiny]


@SIGNED
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_decodes_to_nan(signed: bool, bad: float) -> None:
    x = torch.rand(400)
    x[150] = bad
    codes, absmax = quantize_op(x, None, 100, signed)
    torch.testing.assert_close(absmax[1], torch.tensor(bad).abs(), equal_nan=True, rtol=0, atol=0)
    assert (codes[100:200] == ZERO[signed]).all()
    decoded = dequantize_op(codes, absmax, None, 100, torch.float32, signed)
    assert decoded[100:200].isnan().all()
    clean = torch.cat([x[:100], x[200:]])
    expected = dequantize_op(*quantize_op(clean, None, 100, signed), None, 100, torch.float32, signed)
    assert torch.equal(torch.cat([decoded[:100], decoded[200:]]), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_stays_so_with_a_custom_map(bad: float) -> None:
    x = torch.rand(100)
    x[50] = bad
    decoded = dequantize_op(*quantize_op(x, CUSTOM, 100), CUSTOM, 100, torch.float32)
    assert not decoded.isfinite().any()
    with_zero = torch.cat([CUSTOM[:127], torch.zeros(2), CUSTOM[129:]])
    assert dequantize_op(*quantize_op(x, with_zero, 100), with_zero, 100, torch.float32).isnan().all()


@SIGNED
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e20, 3e38])
def test_every_scale_is_resolved_alike(signed: bool, scale: float) -> None:
    x = torch.randn(512) if signed else torch.rand(512)
    x /= x.abs().max()
    x = (x * scale).clamp(-scale, scale)
    codes, absmax = quantize_op(x, None, 512, signed)
    decoded = dequantize_op(codes, absmax, None, 512, torch.float32, signed)
    cells = {True: 64, False: 128}[signed]  # of the top decade, 0.9 wide together
    assert ((decoded.double() - x.double()).abs() <= 0.9 / cells / 2 * 1.0001 * scale).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantising_what_was_decoded_changes_nothing(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    decoded = dequantize_op(codes, torch.tensor([4.0]), None, 256, dtype)
    assert torch.equal(quantize_op(decoded, None, 256)[0], codes)


def test_default_dtype_and_device_do_not_matter() -> None:
    x = torch.randn(1000)
    expected = quantize_op(x, None, 300)
    decoded = dequantize_op(*expected, None, 300, torch.float32)
    dtype = torch.get_default_dtype()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        try:
            with torch.device("meta"):
                actual = quantize_op(x, None, 300)
                torch.testing.assert_close(actual, expected, rtol=0, atol=0)
                torch.testing.assert_close(
                    dequantize_op(*actual, None, 300, torch.float32), decoded, rtol=0, atol=0
                )
        finally:
            torch.set_default_dtype(dtype)


def test_opcheck() -> None:
    cases = [
        (INPUTS["vector"]().half(), None, 256, True),
        (INPUTS["whole blocks"]().bfloat16(), None, 10000, False),
        (INPUTS["transposed"](), None, 100, True),
        (INPUTS["expanded"](), CUSTOM, 3, True),
        (INPUTS["0-dim"](), None, 1, False),
        (INPUTS["empty"](), None, 256, True),
    ]
    for x, code, block_size, signed in cases:
        torch.library.opcheck(quantize_op, (x, code, block_size, signed))
        codes, absmax = quantize_op(x, code, block_size, signed)
        torch.library.opcheck(dequantize_op, (codes, absmax, code, block_size, torch.bfloat16, signed))


@pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(9, dtype=torch.float64)), "float64"),
        (dict(x=torch.zeros(9, dtype=torch.int32)), "int32"),
        (dict(code=torch.zeros(255)), "256"),
        (dict(code=torch.zeros(256, dtype=torch.float16)), "float32"),
        (dict(code=torch.zeros(16, 16)), "256"),
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (dict(block_size=-4), "block_size must be at least 1, got -4"),
    ],
)
def test_quantize_refuses(change: dict, message: str, fake: bool) -> None:
    arguments = dict(x=torch.zeros(9), code=None, block_size=4) | change
    if fake:
        arguments = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        quantize_op(**arguments)


@pytest.mark.parametrize("fake", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(codes=torch.zeros(9)), "codes must be uint8, got torch.float32"),
        (dict(dtype=torch.float64), "float64"),
        (dict(dtype=torch.int32), "int32"),
        (dict(code=torch.zeros(100)), "256"),
        (dict(block_size=0), "block_size must be at least 1, got 0"),
        (dict(absmax=torch.zeros(2)), "3 float32 scales.*blocks? of 4.*got 2"),
        (dict(absmax=torch.zeros(4)), "3 float32 scales.*got 4"),
        (dict(absmax=torch.zeros(3, dtype=torch.float16)), "float16"),
    ],
)
def test_dequantize_refuses(change: dict, message: str, fake: bool) -> None:
    arguments = (
        dict(
            codes=torch.zeros(9, dtype=torch.uint8),
            absmax=torch.zeros(3),
            code=None,
            block_size=4,
            dtype=torch.float32,
        )
        | change
    )
    if fake:
        arguments = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        dequantize_op(**arguments)

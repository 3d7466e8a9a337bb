"""bitsandbytes' functional names: the maps, the two functions and the state between them."""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist
from typing import Any

import pytest
import torch
from torch import Tensor

from bnb_compile.functional import (
    QuantState,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dequantize_blockwise,
    quantize_blockwise,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAPS = {
    "dynamic": create_dynamic_map(),
    "dynamic of 4 bits": create_dynamic_map(True, 2, 4),
    "linear": create_linear_map(),
    "linear of 3 bits": create_linear_map(total_bits=3),
    "fp8": create_fp8_map(),
    "fp4": create_fp8_map(True, 2, 1, 4),
    "normal": create_normal_map(),
}
SHAPES = {
    "tail block": (1000,),
    "whole blocks": (4, 300),
    "one element": (1, 1),
    "0-dim": (),
    "empty": (3, 0, 2),
}
CODE = pytest.mark.parametrize("code", [None, MAPS["fp8"]], ids=["default", "custom"])
NESTED = pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])


@pytest.fixture(scope="module")
def peer() -> Any:
    return pytest.importorskip("bitsandbytes.functional")


def equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def tensors(state: QuantState) -> dict[str, Any]:
    return {key: value for key, value in state.as_dict().items() if isinstance(value, Tensor | float)}


def spread(scales: Tensor, blocksize: int, shape: torch.Size) -> Tensor:
    return scales.repeat_interleave(blocksize)[: shape.numel()].view(shape)


# The maps


def test_the_dynamic_map_has_the_published_bits() -> None:
    for signed, sha in [(True, "e732639a65f497b4"), (False, "305f002cc11278fb")]:
        assert hashlib.sha256(create_dynamic_map(signed).numpy().tobytes()).hexdigest().startswith(sha)


@pytest.mark.parametrize("total_bits", range(2, 9))
def test_a_linear_map_is_multiples_of_one_step(total_bits: int) -> None:
    signed, unsigned = create_linear_map(True, total_bits), create_linear_map(False, total_bits)
    steps = 2 ** (total_bits - 1) - 1
    torch.testing.assert_close(signed.unique() * steps, torch.arange(-steps, steps + 1.0), rtol=1e-5, atol=0)
    steps = 2**total_bits - 1
    torch.testing.assert_close(unsigned.unique() * steps, torch.arange(steps + 1.0), rtol=1e-6, atol=0)


def test_a_linear_map_without_a_zero_uses_every_code() -> None:
    expected = torch.arange(-255.0, 256, 2)
    torch.testing.assert_close(create_linear_map(add_zero=False) * 255, expected, rtol=1e-6, atol=2e-5)


def test_fp8_maps_are_the_formats_written_out() -> None:
    # Largest exponent 2, fractions 1 and 1.5; below them zero and half of 2**-2.
    magnitudes = torch.tensor([0, 0.125, 1, 1.5, 2, 3, 4, 6])
    signed = create_fp8_map(True, 2, 1, 4)
    equal(signed.unique(), torch.cat([-magnitudes[1:], magnitudes]).sort().values / 6)
    equal(create_fp8_map(False, 2, 1, 3)[-8:], magnitudes / 6)
    # E5M2 is torch's own but for its subnormals, and an exponent that torch keeps for infinities.
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).float()
    normal = every[every.isfinite() & (every.abs() >= 2.0**-14)] / 2**16 / 1.75
    assert torch.isin(normal, create_fp8_map()).all()


def test_the_normal_map_is_nf4() -> None:
    # "QLoRA", appendix E
    positive = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    positive += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    negative = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    negative += [-0.28444138169288635, -0.18477343022833334, -0.09105003625154495]
    equal(create_normal_map(), torch.tensor(negative + [0.0] * 241 + positive))


@pytest.mark.parametrize("offset", [0.6, 0.9, 0.999])
@pytest.mark.parametrize("extra", [False, True])
def test_a_normal_map_has_equal_probability_between_its_values(offset: float, extra: bool) -> None:
    values, normal = create_normal_map(offset, extra).double(), NormalDist()
    top = normal.inv_cdf(offset)
    for side, count in [(values[values > 0], 7 + extra), (-values[values < 0].flip(0), 7)]:
        probabilities = torch.tensor([normal.cdf(v * top) for v in side.tolist()]).double()
        expected = torch.linspace(0.5, offset, count + 1, dtype=torch.float64)[1:]
        torch.testing.assert_close(probabilities, expected, rtol=1e-6, atol=0)


def test_every_map_is_256_ascending_values_up_to_1() -> None:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            made = [create_linear_map(), create_linear_map(False, 3), create_fp8_map(), create_normal_map()]
    finally:
        torch.set_default_dtype(dtype)
    for values in [*made, *MAPS.values()]:
        assert values.dtype == torch.float32 and values.device.type == "cpu" and values.shape == (256,)
        assert values[-1] == 1 and (values[:-1] <= values[1:]).all()
    equal(made[2], MAPS["fp8"])


def test_maps_are_bitsandbytes_maps(peer: Any) -> None:
    for bits in range(1, 9):
        for signed, zero in [(True, True), (True, False), (False, True), (False, False)]:
            if bits > signed:
                expected = peer.create_linear_map(signed, bits, zero)
                expected[expected.abs() < 1e-7] = 0
                equal(create_linear_map(signed, bits, zero), expected.sort().values)
        for signed in (True, False):
            for exponent_bits in range(1, bits - signed + 1):
                if exponent_bits < 8:  # it overflows and is NaN
                    split = signed, exponent_bits, bits - signed - exponent_bits, bits
                    equal(create_fp8_map(*split), peer.create_fp8_map(*split))
    equal(create_normal_map().unique(), peer.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (create_linear_map, dict(total_bits=9), "2 to 8 with signed=True, got 9"),
        (create_linear_map, dict(total_bits=1), "2 to 8 with signed=True, got 1"),
        (create_linear_map, dict(signed=False, total_bits=0), "1 to 8 with signed=False, got 0"),
        (create_fp8_map, dict(exponent_bits=4), "sum.*signed=True, exponent_bits=4, precision_bits=2"),
        (create_fp8_map, dict(signed=False), "sum.*signed=False"),
        (create_fp8_map, dict(exponent_bits=0, precision_bits=7), "exponent_bits=0"),
        (create_fp8_map, dict(exponent_bits=8, precision_bits=-1), "precision_bits=-1"),
        (create_fp8_map, dict(exponent_bits=6, total_bits=9), "total_bits=9"),
        (create_normal_map, dict(offset=0.5), "between 0.5 and 1, got 0.5"),
        (create_normal_map, dict(offset=1), "between 0.5 and 1, got 1"),
        (create_normal_map, dict(offset=math.nan), "got nan"),
    ],
)
def test_a_map_that_does_not_exist_is_refused(make: Any, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


# The functions


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", MAPS)
def test_codes_are_of_the_nearest_values(name: str, shape: tuple[int, ...]) -> None:
    code = MAPS[name]
    for dtype in FLOATS:
        for blocksize in (1, 100, 4096):
            x = torch.randn(shape).to(dtype)
            codes, state = quantize_blockwise(x, code, blocksize=blocksize)
            blocks = x.float().reshape(-1).split(blocksize) if x.numel() else []
            equal(state.absmax, torch.tensor([block.abs().max() for block in blocks]))
            normalised = x.float() / spread(state.absmax, blocksize, x.shape)
            values = code[(normalised.double()[..., None] - code.double()).abs().argmin(-1)]
            assert codes.dtype == torch.uint8
            equal(code[codes.int()], values)
            expected = (values * spread(state.absmax, blocksize, x.shape)).to(dtype)
            equal(dequantize_blockwise(codes, state), expected)


def test_what_the_defaults_are() -> None:
    x = torch.randn(9000)
    codes, state = quantize_blockwise(x)
    expected, _ = quantize_blockwise(x, create_dynamic_map(), blocksize=4096)
    equal(codes, expected)
    equal(state.code, create_dynamic_map())
    assert (state.blocksize, state.dtype, state.nested, state.quant_type) == (4096, x.dtype, False, None)
    assert (state.shape, state.offset, state.state2) == (None, None, None)
    equal(dequantize_blockwise(codes, absmax=state.absmax), dequantize_blockwise(codes, state))
    assert state == QuantState(state.absmax)


@CODE
def test_states_share_no_map(code: Tensor | None) -> None:
    x = torch.randn(1000)
    codes, state = quantize_blockwise(x, code)
    expected = dequantize_blockwise(codes, state)
    _, other = quantize_blockwise(x, code)
    other.code.zero_()
    QuantState(state.absmax).code.zero_()
    equal(dequantize_blockwise(*quantize_blockwise(x, code)), expected)


def test_decoding_without_a_state() -> None:
    codes = torch.randint(0, 256, (50, 10), dtype=torch.uint8)
    absmax, code = torch.rand(8), MAPS["linear"]
    decoded = dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=64)
    equal(decoded, code[codes.int()] * spread(absmax, 64, codes.shape))
    # beside a state they count for nothing, as in bitsandbytes
    state = QuantState(absmax, code=code, blocksize=64, dtype=torch.float16)
    equal(dequantize_blockwise(codes, state, absmax=absmax + 1, blocksize=7), decoded.half())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@CODE
def test_nested_scales_are_quantised_too(shape: tuple[int, ...], code: Tensor | None) -> None:
    x = torch.randn(shape).bfloat16()
    codes, state = quantize_blockwise(x, code, blocksize=30, nested=True)
    plain, plain_state = quantize_blockwise(x, code, blocksize=30)
    equal(codes, plain)
    assert state.nested and state.absmax.dtype == torch.uint8
    offset = plain_state.absmax.mean() if x.numel() else torch.tensor(0.0)
    equal(state.offset, offset)
    absmax, state2 = quantize_blockwise(plain_state.absmax - offset, blocksize=30)
    equal(state.absmax, absmax)
    assert state.state2 == state2
    scales = dequantize_blockwise(absmax, state2) + offset
    expected = dequantize_blockwise(codes, QuantState(scales, None, code, 30, dtype=x.dtype))
    for nested in (False, True):
        equal(dequantize_blockwise(codes, state, nested=nested), expected)


@NESTED
@CODE
def test_results_are_written_where_asked(code: Tensor | None, nested: bool) -> None:
    x = torch.randn(60, 70).half()
    expected, expected_state = quantize_blockwise(x, code, blocksize=100, nested=nested)
    out = torch.zeros(70, 60, dtype=torch.uint8).t()
    absmax = torch.zeros(42, dtype=torch.uint8 if nested else torch.float32)
    codes, state = quantize_blockwise(x, code, absmax, out, 100, nested)
    assert codes is out and state.absmax is absmax and state == expected_state
    equal(codes, expected)
    out = torch.zeros(70, 60, dtype=torch.float16).t()
    assert dequantize_blockwise(codes, state, out=out) is out
    equal(out, dequantize_blockwise(codes, state))


def test_no_gradient_flows() -> None:
    x = torch.randn(100, requires_grad=True)
    codes, state = quantize_blockwise(x, nested=True)
    assert not any(value.requires_grad for value in tensors(state).values() if isinstance(value, Tensor))
    assert not dequantize_blockwise(codes, absmax=x[:1]).requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(A=torch.ones(9).double()), "only supports 16/32-bit floats, but got torch.float64"),
        (dict(A=torch.ones(9).int()), "only supports 16/32-bit floats, but got torch.int32"),
        (dict(blocksize=0), "blocksize must be positive, got 0"),
        (dict(blocksize=-1), "blocksize must be positive, got -1"),
        (dict(code=torch.linspace(-1, 1, 16)), "256 ascending"),
        (dict(code=torch.linspace(1, -1, 256)), "256 ascending"),
        (dict(code=torch.full((256,), math.nan)), "256 ascending"),
        (dict(code=torch.linspace(-1, 1, 256).half()), "256 ascending float32"),
        (dict(out=torch.zeros(9)), r"out must be torch.uint8 of shape \(9,\), got torch.float32"),
        (dict(out=torch.zeros(8, dtype=torch.uint8)), r"out must be .*got torch.uint8 of shape \(8,\)"),
        (dict(absmax=torch.zeros(1)), r"absmax must be torch.float32 of shape \(3,\), .*\(1,\)"),
        (dict(nested=True), r"absmax must be torch.uint8 of shape \(3,\), got torch.float32"),
    ],
)
def test_quantize_refuses_and_writes_nothing(change: dict, message: str) -> None:
    buffers = dict(out=torch.zeros(9, dtype=torch.uint8), absmax=torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(**dict(A=torch.ones(9), blocksize=4) | buffers | change)
    assert not any(buffer.any() for buffer in buffers.values())


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(absmax=None), "requires either quant_state or absmax"),
        (dict(A=torch.ones(9)), "A must be uint8, got torch.float32"),
        (dict(blocksize=0), "blocksize must be positive, got 0"),
        (dict(quant_state=QuantState(torch.ones(3), blocksize=-2)), "blocksize must be positive, got -2"),
        (dict(quant_state=QuantState(torch.ones(3), dtype=torch.float64)), "float64"),
        (dict(absmax=torch.ones(2)), "3 float32 scales"),
        (dict(code=torch.ones(16)), "256"),
        (dict(nested=True), "needs a nested quant_state"),
        (dict(nested=True, quant_state=QuantState(torch.ones(3), blocksize=4)), "needs a nested quant_state"),
        (dict(out=torch.zeros(9).half()), r"out must be torch.float32 of shape \(9,\), got torch.float16"),
        (dict(out=torch.zeros(3, 3)), r"out must be .*got torch.float32 of shape \(3, 3\)"),
    ],
)
def test_dequantize_refuses(change: dict, message: str) -> None:
    arguments = dict(A=torch.ones(9, dtype=torch.uint8), absmax=torch.ones(3), blocksize=4)
    with pytest.raises(ValueError, match=message):
        dequantize_blockwise(**arguments | change)


def test_compiled_functions_are_the_eager_ones() -> None:
    def both(x: Tensor, half: Tensor, code: Tensor, out: Tensor, absmax: Tensor, decoded: Tensor) -> tuple:
        plain = quantize_blockwise(x, absmax=absmax, out=out, blocksize=100)
        # Two blocks, whose mean does not depend on the order of summation.
        nested = quantize_blockwise(half, code, blocksize=600, nested=True)
        return plain, nested, dequantize_blockwise(*plain, out=decoded), dequantize_blockwise(*nested)

    def run(function: Any) -> tuple:
        buffers = torch.zeros(50, 21, dtype=torch.uint8), torch.zeros(11), torch.zeros(50, 21)
        (codes, state), (nested_codes, nested_state), *decoded = function(
            x, x.bfloat16(), MAPS["linear"], *buffers
        )
        assert codes is buffers[0] and state.absmax is buffers[1] and decoded[0] is buffers[2]
        return codes, nested_codes, decoded, tensors(state), tensors(nested_state)

    x = torch.randn(50, 21)
    equal(run(torch.compile(both, fullgraph=True)), run(both))


# The state


@NESTED
def test_a_state_survives_its_dictionary(nested: bool) -> None:
    codes, state = quantize_blockwise(torch.randn(999).half(), MAPS["fp8"], blocksize=10, nested=nested)
    state.shape = torch.Size([9, 111])
    made = state.as_dict()
    assert made["dtype"] == "float16" and made["shape"] == (9, 111) and made["blocksize"] == 10
    assert tensors(QuantState.from_dict(state.as_dict(packed=True), "cpu")).keys() == tensors(state).keys()
    loaded = QuantState.from_dict({f"weight.{key}": value for key, value in made.items()}, "cpu")
    assert loaded == state and loaded.shape == state.shape and loaded.dtype == state.dtype
    equal(dequantize_blockwise(codes, loaded), dequantize_blockwise(codes, state))


def test_states_that_differ_are_not_equal() -> None:
    x = torch.randn(100)
    state = quantize_blockwise(x, blocksize=10)[1]
    assert state == quantize_blockwise(x, blocksize=10)[1]
    assert state != "a state"
    for other in [
        quantize_blockwise(x * (1 + 1e-6), blocksize=10),
        quantize_blockwise(x, MAPS["linear"], blocksize=10),
        quantize_blockwise(x, blocksize=10, nested=True),
        quantize_blockwise(x.bfloat16(), blocksize=10),
    ]:
        assert state != other[1]
    assert QuantState(torch.ones(1), torch.Size([3])) != QuantState(torch.ones(1), torch.Size([4]))
    assert QuantState(torch.ones(1), blocksize=3) != QuantState(torch.ones(1), blocksize=4)


@NESTED
def test_a_state_moves_as_a_whole(nested: bool) -> None:
    _, state = quantize_blockwise(torch.randn(100), nested=nested)
    state.to("meta")
    found = [state.absmax, state.code]
    if nested:
        found += [state.offset, state.state2.absmax, state.state2.code]
    assert [value.device.type for value in found] == ["meta"] * len(found)


def test_a_state_that_cannot_be_is_refused() -> None:
    absmax = torch.ones(2)
    with pytest.raises(ValueError, match="8 bits, got 'nf4'"):
        QuantState(absmax, quant_type="nf4")
    with pytest.raises(ValueError, match="both offset and state2"):
        QuantState(absmax, offset=torch.tensor(0.0))
    with pytest.raises(ValueError, match="both offset and state2"):
        QuantState(absmax, state2=QuantState(absmax))
    good = QuantState(absmax).as_dict()
    for change, message in [
        (dict(dtype="float64"), "float32, float16, bfloat16, got 'float64'"),
        (dict(quant_type="fp4"), "got 'fp4'"),
        (dict(nested_absmax=absmax), "nested_offset"),
        ({"quant_state.bitsandbytes__nf4": absmax}, "bitsandbytes__nf4"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantState.from_dict(good | change, "cpu")
    with pytest.raises(ValueError, match="quant_map"):
        QuantState.from_dict({key: good[key] for key in good if key != "quant_map"}, "cpu")


# Against bitsandbytes


@NESTED
@CODE
@pytest.mark.parametrize("dtype", FLOATS)
def test_bitsandbytes_codes_decode_to_the_same_bits(
    peer: Any, dtype: torch.dtype, code: Tensor | None, nested: bool
) -> None:
    x = torch.randn(30, 111).to(dtype)
    codes, theirs = peer.quantize_blockwise(x, code, blocksize=64, nested=nested)
    ours = QuantState.from_dict(theirs.as_dict(), "cpu")
    assert ours.as_dict().keys() == theirs.as_dict().keys()
    assert ours == QuantState.from_dict(peer.QuantState.from_dict(ours.as_dict(), "cpu").as_dict(), "cpu")
    equal(dequantize_blockwise(codes, ours), peer.dequantize_blockwise(codes, theirs))
    equal(dequantize_blockwise(codes, theirs), peer.dequantize_blockwise(codes, theirs))


@NESTED
@CODE
def test_codes_are_bitsandbytes_codes_but_for_the_rounding_of_its_table(
    peer: Any, code: Tensor | None, nested: bool
) -> None:
    x = torch.randn(2**17)
    codes, ours = quantize_blockwise(x, code, blocksize=256, nested=nested)
    expected, theirs = peer.quantize_blockwise(x, code, blocksize=256, nested=nested)
    assert (codes != expected).float().mean() < 0.01
    # Its CPU kernel looks the code up for the magnitude in 2**16 steps; ours is the nearest.
    error = (dequantize_blockwise(codes, ours) - x).abs().mean()
    their_error = (peer.dequantize_blockwise(expected, theirs) - x).abs().mean()
    assert 0.98 * their_error < error < 1.01 * their_error
    equal(
        peer.dequantize_blockwise(codes, peer.QuantState.from_dict(ours.as_dict(), "cpu")),
        dequantize_blockwise(codes, ours),
    )

"""The dynamic map against bitsandbytes' table, and its closed form against the nearest value."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from bnb_compile.formats import codebook

pytestmark = [pytest.mark.usefixtures("nan_filled_empty"), pytest.mark.quick]

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
SHA256 = {
    True: "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    False: "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
ZERO = {True: 127, False: 0}


def nearest(x: Tensor, signed: bool) -> Tensor:
    return codebook.nearest(x, signed, codebook.outward_bounds(signed))


def obviously_nearest(x: Tensor, code: Tensor) -> Tensor:
    """Nearest of all values in float64, the first of two that are equally near.

    Differences of float32 values of the map's range are exact in float64, so ties are seen as ties.
    """
    parts = [(part.double()[:, None] - code.double()).abs().argmin(1) for part in x.split(2**14)]
    return torch.cat(parts).to(torch.uint8)


def neighbours(x: Tensor, count: int) -> Tensor:
    """The values, and `count` floats to either side of each."""
    found = [x]
    for end in (math.inf, -math.inf):
        moved = x
        for _ in range(count):
            moved = torch.nextafter(moved, torch.full_like(x, end))
            found.append(moved)
    return torch.cat(found)


def samples(signed: bool) -> dict[str, Tensor]:
    code = codebook.create_dynamic_map(signed)
    low = -1 if signed else 0
    sign = torch.randint(0, 2, (2**18,)).float() * (1 - low) + low if signed else 1
    return {
        "uniform": torch.rand(2**18) * (1 - low) + low,
        "log-uniform": 10 ** (-9 * torch.rand(2**18)) * sign,
        "midpoints and neighbours": neighbours(((code[1:].double() + code[:-1].double()) / 2).float(), 4),
        "values and neighbours": neighbours(code, 2).clamp(low, 1),
        "zeros and ends": torch.tensor([0.0, -0.0, 1.0, float(low), 1e-45, 1e-38]),
    }


@SIGNED
def test_map_has_the_published_bits(signed: bool) -> None:
    values = codebook.create_dynamic_map(signed)
    assert values.dtype == torch.float32
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == SHA256[signed]


def test_map_is_bitsandbytes_map() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for total_bits in range(2, 9):
        for signed, bits in [(True, bits) for bits in range(1, total_bits)] + [(False, total_bits - 1)]:
            expected = functional.create_dynamic_map(signed, bits, total_bits)
            actual = codebook.create_dynamic_map(signed, bits, total_bits)
            assert torch.equal(actual, expected), (signed, bits, total_bits)


@SIGNED
def test_nearest_is_the_nearest_value_with_ties_to_the_lower_code(signed: bool) -> None:
    code = codebook.create_dynamic_map(signed)
    for what, x in samples(signed).items():
        wrong = x[nearest(x, signed) != obviously_nearest(x, code)]
        assert not len(wrong), f"{what}: {len(wrong)} of {len(x)}, such as {wrong[0].item()!r}"


@SIGNED
def test_ties_exist_and_go_to_the_lower_code(signed: bool) -> None:
    code = codebook.create_dynamic_map(signed).double()
    middle = (code[1:] + code[:-1]) / 2
    tie = middle.float().double() == middle
    assert tie.sum() > 10
    assert torch.equal(nearest(middle[tie].float(), signed), torch.arange(255, dtype=torch.uint8)[tie])


@SIGNED
def test_values_are_their_own_codes(signed: bool) -> None:
    codes = nearest(codebook.create_dynamic_map(signed), signed)
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))


@SIGNED
def test_nan_is_zero_and_what_is_out_of_range_saturates(signed: bool) -> None:
    x = torch.tensor([math.nan, -math.nan, 1.5, 3e38, math.inf, -1.0, -3e38, -math.inf])
    assert nearest(x, signed).tolist() == [ZERO[signed]] * 2 + [255] * 3 + [0] * 3


@SIGNED
def test_nearest_takes_any_shape(signed: bool) -> None:
    x = torch.rand(6, 7, 8)
    expected = nearest(x.reshape(-1), signed).view(x.shape)
    assert torch.equal(nearest(x, signed), expected)
    assert torch.equal(nearest(x.permute(2, 0, 1), signed), expected.permute(2, 0, 1))
    assert nearest(x[0, 0, 0], signed) == expected[0, 0, 0]
    assert nearest(x[:0], signed).shape == (0, 7, 8)


@SIGNED
def test_closed_form_is_one_cell_off_only_at_midpoints(signed: bool) -> None:
    code = codebook.create_dynamic_map(signed)
    for what, x in samples(signed).items():
        a = x.abs()
        cell = codebook.closed_form(a, signed).int()
        off = cell - (obviously_nearest(a, code).int() - ZERO[signed])
        assert off.abs().max() <= 1, what
        if what.endswith("uniform"):
            assert off.abs().float().mean() < 1e-4, what
        # Wherever it is off, the midpoint is within rounding of the magnitude.
        middle = (code[1:].double() + code[:-1].double()) / 2
        distance = (a[off != 0].double()[:, None] - middle).abs().amin(1)
        assert (distance <= 1e-6 * a[off != 0]).all(), what


def fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    def exact(x: Tensor | float) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32).double()

    return (exact(a) * exact(b) + exact(c)).float()


@SIGNED
def test_register_tables_decode_every_code(signed: bool) -> None:
    tables = {name: torch.tensor(x) for name, x in codebook.register_tables(signed).items()}
    code = torch.arange(256)
    t = (4 * (code - 127) if signed else 2 * code + 3).float()
    index = (t.view(torch.int32) >> 23) & 7
    value = fma(t.abs(), tables["SLOPE"][index], tables["START"][index])
    expected = codebook.create_dynamic_map(signed)
    assert value[ZERO[signed]] == 0
    torch.testing.assert_close(value, expected.abs(), rtol=7e-7, atol=0)


@SIGNED
def test_register_tables_find_every_cell_but_within_rounding_of_a_midpoint(signed: bool) -> None:
    """In the vector registers' arithmetic, lowering/cpp/dynamic_map.h."""
    tables = codebook.register_tables(signed)
    above, per_unit, first = (torch.tensor(tables[name]) for name in ("ABOVE", "PER_UNIT", "FIRST"))
    (least,), (per_bit,), (bias,) = tables["LEAST"], tables["PER_BIT"], tables["BIAS"]
    code = codebook.create_dynamic_map(signed)
    middle = (code[1:].double() + code[:-1].double()) / 2
    for what, x in samples(signed).items():
        a = x.abs()
        kept = a.clamp(min=torch.tensor(least).item())
        decade = fma(kept.view(torch.int32).float(), per_bit, bias + 3 * 2**22).view(torch.int32) & 7
        decade += kept > above[decade]
        start = first[decade]
        end = fma(start, 2.25, -0.5 if signed else 0.75)
        cell = torch.minimum(fma(kept, per_unit[decade], start), end).int()
        expected = obviously_nearest(a, code).int() - ZERO[signed]
        if not signed:
            cell = torch.where(a > 0, cell, 0)
            expected = torch.where(a > 0, expected.clamp(min=1), 0)
        off = cell - expected
        assert off.abs().max() <= 1, what
        if what.endswith("uniform"):
            assert off.abs().float().mean() < 1e-4, what
        distance = (a[off != 0].double()[:, None] - middle).abs().amin(1)
        assert (distance <= 1e-6 * a[off != 0]).all(), what


@SIGNED
def test_bounds_are_the_last_floats_of_their_cells(signed: bool) -> None:
    code = codebook.create_dynamic_map(signed)
    bounds = codebook.bounds(code)
    above = torch.nextafter(bounds, torch.full_like(bounds, math.inf))
    lower = torch.arange(255, dtype=torch.uint8)
    assert torch.equal(obviously_nearest(bounds, code), lower)
    assert torch.equal(obviously_nearest(above, code), lower + 1)


@pytest.mark.parametrize(
    "signed, exponent_bits, total_bits",
    [(True, 8, 8), (True, 9, 8), (False, 9, 8), (True, 7, 9), (True, 7, 0)],
)
def test_a_map_that_does_not_exist_is_refused(signed: bool, exponent_bits: int, total_bits: int) -> None:
    with pytest.raises(ValueError, match=f"max_exponent_bits={exponent_bits}"):
        codebook.create_dynamic_map(signed, exponent_bits, total_bits)


def test_default_dtype_and_device_do_not_matter() -> None:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            for signed in (True, False):
                values = codebook.create_dynamic_map(signed)
                assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == SHA256[signed]
                assert nearest(values, signed).tolist() == list(range(256))
    finally:
        torch.set_default_dtype(dtype)


@pytest.mark.slow
@SIGNED
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nearest_for_every_float32(signed: bool, compiled: bool) -> None:
    outward = codebook.outward_bounds(signed)
    bounds = codebook.bounds(codebook.create_dynamic_map(signed))
    function = torch.compile(codebook.nearest, fullgraph=True) if compiled else codebook.nearest
    size = 2**22 if compiled else 2**18
    for start in range(-(2**31), 2**31, size):
        x = torch.arange(start, start + size, dtype=torch.int32).view(torch.float32)
        expected = torch.bucketize(x, bounds, out_int32=True)
        expected = torch.where(x.isnan(), ZERO[signed], expected)
        actual = function(x, signed, outward)
        assert torch.equal(actual, expected.to(torch.uint8)), x[actual != expected]

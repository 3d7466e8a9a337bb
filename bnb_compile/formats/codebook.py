"""The 8-bit dynamic map: its 256 values, and the nearest of them found without a search.

The map ("8-bit Optimizers via Block-wise Quantization", Dettmers et al., https://arxiv.org/abs/2110.02861)
spreads its codes over seven decades: decade ``i`` of ``10**(i-7) .. 10**(i-6)`` is cut into
``2**i`` equal cells (``2**(i+1)`` in the unsigned map), and a code stands for the middle of its cell.
Counted away from zero the codes of decade ``i`` are the integers of one binade, so

    cell(a) = floor(a * slope[i] + start[i])        with i found by comparing a with seven thresholds

is the code: a few comparisons that every backend can vectorise, where a table search is eight
dependent loads. `closed_form` is that formula, and the only place where it is written: eager code
runs it, and the lowerings print it or take its constants from `SEGMENTS`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

DECADES = 7
#: Room left below an exact result of `closed_form`, in codes; see `nearest`.
_MARGIN = 2.0**-10


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> Tensor:
    """Values of the dynamic map, ascending.

    Args:
        signed: Whether the map has negative values.
        max_exponent_bits: Number of decades.
        total_bits: Bits of a code, at most 8.

    Returns:
        Tensor: ``(256,)`` float32, padded with zeros where `total_bits` is less than 8.

    Raises:
        ValueError: If the decades do not use up the ``2**total_bits`` codes.
    """
    spare_bits = total_bits - 1 - max_exponent_bits
    cells = [2 ** (i + spare_bits + (not signed)) for i in range(max_exponent_bits)]
    if signed and spare_bits > 0:  # the codes left over refine the last decade once more
        cells.append(2**spare_bits - 1)
    values = [0.0, 1.0]
    for i, count in enumerate(cells):
        if count < 1:
            break
        edges = torch.linspace(0.1, 1, int(count) + 1, dtype=torch.float32, device="cpu")
        decade = min(i, max_exponent_bits - 1) - (max_exponent_bits - 1)
        middles = 10.0**decade * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist()
        if signed:
            values += (-middles).tolist()
    if not 0 < total_bits <= 8 or len(values) != 2**total_bits:
        raise ValueError(
            f"no dynamic map with {signed=}, {max_exponent_bits=}, {total_bits=}: total_bits must be at most "
            "8, and max_exponent_bits less than it, or for an unsigned map just one less"
        )
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu")


def bounds(code: Tensor) -> Tensor:
    """Where the nearest code changes: the largest float32 that still belongs to the lower code.

    Args:
        code: ``(n,)`` float32, ascending.

    Returns:
        Tensor: ``(n - 1,)`` float32; ``x`` is nearer to ``code[k + 1]`` than to ``code[k]`` exactly
        when ``x > bounds[k]``, ties going to the lower code.
    """
    exact = (code[:-1].double() + code[1:].double()) / 2  # exact: 25 bits of 53
    rounded = exact.float()
    below = torch.nextafter(rounded, torch.full_like(rounded, -math.inf))
    return torch.where(rounded.double() > exact, below, rounded)


class Segment(NamedTuple):
    """A run of equal cells: magnitudes above `above` have code ``min(floor(a*slope + start), last)``.

    Codes are counted away from zero: signed ``0..128``, unsigned ``0..255``.
    """

    above: float
    slope: float
    start: float
    last: int


def _segments(signed: bool) -> tuple[Segment, ...]:
    between = bounds(create_dynamic_map(signed)).tolist()[127 if signed else 0 :]
    first_width = 1 if signed else 2
    shift = first_width - 1  # unsigned codes begin at 1 with a decade of two cells
    found = [Segment(-math.inf, 0.0, 0.0, 0)]
    for i in range(DECADES):
        width = first_width * 2**i  # cells in this decade, and the first cell's number + shift
        slope = width / (0.9 * 10.0 ** (i - DECADES + 1))
        start = width * 8 / 9 - shift
        found.append(Segment(between[width - shift - 1], slope, start, 2 * width - 1 - shift))
    found.append(Segment(between[-1], 0.0, float(len(between)), len(between)))
    return tuple(found)


#: By signedness: the nine segments of ``[0, 1]``, which are zero, seven decades, and the code of 1.0.
#: Made here, because no tensor can be read while the functions below are traced.
SEGMENTS = {signed: _segments(signed) for signed in (True, False)}


def closed_form(a: Tensor, signed: bool, margin: float = 0.0) -> Tensor:
    """Number of the cell that holds a magnitude, counted away from zero.

    Args:
        a: Magnitudes ``|x| / absmax``, float32, any shape; NaN gives 0.
        signed: Which map.
        margin: Subtracted before rounding down, in cells.

    Returns:
        Tensor: float32, as `a`; the nearest code but for magnitudes within rounding of a midpoint.
    """
    zero, lowest, *higher, one = SEGMENTS[signed]
    slope = torch.full_like(a, lowest.slope)
    start = torch.full_like(a, lowest.start - margin)
    last = torch.full_like(a, float(lowest.last))
    for segment in higher:
        inside = a > segment.above
        slope = torch.where(inside, segment.slope, slope)
        start = torch.where(inside, segment.start - margin, start)
        last = torch.where(inside, float(segment.last), last)
    cell = torch.minimum(torch.floor(a * slope + start), last)
    cell = torch.where(a > lowest.above, cell, float(zero.last))
    return torch.where(a > one.above, float(one.last), cell)


def stochastic(a: Tensor, noise: Tensor) -> Tensor:
    """A number whose nearest code is one of the two around `a`, the upper one as often as `a` is near to it.

    So the mean of what is decoded is `a`, between any two codes but the lowest: below the first code above 0
    it is that one, see `never_zero`.

    Args:
        a: Numbers times ``1 / absmax`` of the unsigned map, float32, any shape.
        noise: Uniform in [1, 2).
    """
    zero, lowest, *higher, one = SEGMENTS[False]
    slope, end = torch.full_like(a, lowest.slope), torch.full_like(a, float(lowest.last))
    for segment in higher:
        inside = a > segment.above
        slope = torch.where(inside, segment.slope, slope)
        end = torch.where(inside, float(segment.last), end)
    # A decade has twice the codes of the one before it: its last one is twice its first one.
    first, start = end * 0.5, end * (4 / 9) - 1 / 9
    last = float(segment.last)
    # In cells of a's decade. From its first code down to the code before it are 0.6 cells, a fifth of a cell
    # being one there; from its last code up to the next one are 3, or up to 1.0 half a one.
    place = a * slope + start - 0.5
    before, after = (
        torch.minimum(place - first, torch.zeros_like(a)),
        torch.maximum(place - end, torch.zeros_like(a)),
    )
    before = torch.where(first > 1, before * (2 / 3), -before)
    after = torch.where(end < last, after * (-2 / 3), after)
    code = torch.floor(place + before + after + (noise - 1.0))
    place = torch.where(code < first, first - 0.1, code + 0.5)
    place = torch.where(code > end, torch.where(end < last, end + 3.5, end + 1.0), place)
    return torch.where(a > 0, (place - start) / slope, 0.0)


def outward_bounds(signed: bool) -> Tensor:
    """Magnitudes above which the next code away from zero is nearer.

    Ties go to the lower code, which for a negative value is the one away from zero.

    Returns:
        Tensor: float32. Unsigned: ``(256,)``, by code. Signed: ``(257,)``, the negative cells
        127..0 and then the positive cells 0..128.
    """
    between = bounds(create_dynamic_map(signed))
    nothing = torch.tensor([math.inf], device="cpu")
    if not signed:
        return torch.cat([between, nothing])
    negative = torch.nextafter(-between[:127], -nothing)  # one below: a tie moves outward
    return torch.cat([nothing, negative, between[127:], nothing])


def never_zero(codes: Tensor, x: Tensor) -> Tensor:
    """Codes of the unsigned map for a state: a number above 0 does not get the code of 0.

    While a first moment survives, a second moment of 0 would make a step of ``exp_avg / eps``.
    """
    return torch.where(x > 0, torch.maximum(codes, torch.ones_like(codes)), 0)


def code(x: Tensor, signed: bool) -> Tensor:
    """The code of a state's element as portable kernels compute it, which print it.

    Args:
        x: Elements times ``1 / absmax``, float32, any shape.
        signed: Which map.

    Returns:
        Tensor: float32, as `x`: the nearest code, or next to it within rounding of a midpoint; `never_zero`.
    """
    if not signed:
        return never_zero(closed_form(x, signed), x)
    cell = closed_form(x.abs(), signed)
    # The map has 1.0 but no -1.0: cell 128 of a negative value is code 0.
    mirrored = torch.maximum(127 - cell, torch.zeros_like(cell))
    return torch.where(x < 0, mirrored, 127 + cell)


def nearest(x: Tensor, signed: bool, outward: Tensor) -> Tensor:
    """Nearest code of the dynamic map, exactly: ties go to the lower code.

    `closed_form`, lowered by a margin larger than its rounding error, is the nearest code or the one
    before it; one comparison decides which.

    Args:
        x: Values in ``[-1, 1]`` (``[0, 1]`` for the unsigned map), float32, any shape. NaN gives the
            code of zero.
        signed: Which map.
        outward: `outward_bounds(signed)` on the device of `x`.

    Returns:
        Tensor: uint8, shape of `x`.
    """
    a = x.abs() if signed else x
    cell = closed_form(a, signed, _MARGIN).to(torch.int32)
    if not signed:
        return (cell + (a > outward[cell]).to(torch.int32)).to(torch.uint8)
    negative = x < 0
    # The map has 1.0 but no -1.0: the last negative cell is 127, code 0.
    place = torch.clamp(torch.where(negative, 127 - cell, 128 + cell), min=0)
    cell = (a > outward[place]).to(torch.int32)
    return torch.where(negative, place - cell, place - 1 + cell).to(torch.uint8)


def register_tables(signed: bool) -> dict[str, list[float]]:
    """`SEGMENTS` as tables of 8 floats, which fit into a vector register.

    Returns:
        dict[str, list[float]]: To decode, by the low 3 bits of the exponent of ``t = 4*cell`` (unsigned:
        ``2*code + 3``): the magnitude is ``t * SLOPE + START``. To encode magnitudes from LEAST on, by their
        decade: that of `a` is the one that ``bits(a) * PER_BIT + BIAS`` is nearest to, or above its ABOVE the
        next; the cell is ``floor(a * PER_UNIT + FIRST)``, and at most the last, which FIRST gives, too.
    """
    zero, *decades, one = SEGMENTS[signed]
    slope, start = [0.0] * 8, [0.0] * 8
    for decade in decades:
        # cell = floor(a * slope + start), so the middle of a cell is at (cell + 1/2 - start) / slope.
        if signed:
            exponent = int(math.log2(decade.last)) + 1  # and 128, which is cut off
            slope[exponent] = 0.25 / decade.slope
            start[exponent] = (0.5 - decade.start) / decade.slope
        else:
            exponent = int(math.log2(decade.last + 1))
            slope[exponent] = 0.5 / decade.slope
            start[exponent] = -(decade.start + 1) / decade.slope
    # The last cell and the first one, of 0, share an entry. In 22 bits, three times the slope is a float.
    slope[0] = 1 / 512 if signed else round(2.0**30 / 510) / 2.0**30
    start[0] = 0.0 if signed else -3 * slope[0]

    # A float's bits are nearly its logarithm, at most 0.03 decades less. A decade may begin as late as 0.28
    # after a power of ten, so 0.32 are subtracted, and those from a bound on are found by comparison. BIAS
    # must be a whole number, as it is added to 3 * 2^22: the rest is in PER_BIT, 0.01 more for the lowest.
    whole = DECADES - 1 - math.floor(127 * math.log10(2))
    per_bit = (DECADES - 0.5 - 0.33 - whole) / (127 * 2**23)
    least = 0.98 * decades[0].above if signed else create_dynamic_map(False)[1].item()
    # Below the bound of the first decade its line, which is flatter then, gives cell 0.
    lowest = (1 - decades[0].start) / decades[0].above if signed else decades[0].slope
    return dict(
        SLOPE=slope,
        START=start,
        ABOVE=[*(segment.above for segment in (*decades[1:], one)), torch.finfo(torch.float32).max],
        PER_UNIT=[lowest, *(decade.slope for decade in decades[1:]), 0.0],
        FIRST=[*(decade.start for decade in decades), one.last + 0.5],
        PER_BIT=[per_bit],
        BIAS=[float(whole)],
        LEAST=[least],
    )


class Logarithmic(NamedTuple):
    """The map for an encoder that finds the decade by a logarithm, see lowering/triton/dynamic8.py.

    With ``i = floor(log10(a)) + 7`` the cells of decade i are the integers above ``a * slope + start`` with
    ``slope = 2**(log2_slope - i * log2(5))`` and ``start = first_start * 2**i``, counted so that each
    decade's are those of a binade.
    """

    least: float  # what smaller magnitudes are encoded as
    log2_slope: float  # of decade 0, rounded down to a float32: cells shall not begin early
    first_start: float  # of decade 0
    one: float  # above it, the code is that of 1.0
    one_cell: float  # unsigned: where the cell of 1.0 begins, in cells of the last decade


def _logarithmic(signed: bool) -> Logarithmic:
    first, *_, last, one = SEGMENTS[signed][1:]
    shift = 0 if signed else 1  # of unsigned cells, see _segments
    return Logarithmic(
        # Within the lowest decade and nearer to 0 than to the first code; without a sign the first code
        # itself.
        least=1.2 * 10.0**-DECADES if signed else create_dynamic_map(signed)[1].item(),
        log2_slope=_down(math.log2(first.slope)),
        first_start=first.start + shift,
        one=one.above,
        one_cell=one.above * last.slope + last.start + shift,
    )


def _down(x: float) -> float:
    as_float = torch.tensor(x, dtype=torch.float32, device="cpu")
    below = torch.nextafter(as_float, torch.tensor(-math.inf, device="cpu"))
    return (below if as_float.item() > x else as_float).item()


#: By signedness.
LOGARITHMIC = {signed: _logarithmic(signed) for signed in (True, False)}

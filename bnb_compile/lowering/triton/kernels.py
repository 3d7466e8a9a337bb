"""The kernels of a step and of tensor_norms, but for what a rule and its formats bring.

`source` prints a function for each of these as the last argument of a program here, and an entry that passes
the tensors on; an argument that an entry does not have is None. Arguments, for n parameters in the bucket:

    addresses   (n, 2) int64, of the parameter and its gradient, which is 0 where there is none
    rows        (n, 8) int64: elements, first element and first block in the arenas, first program; and for
                parts of tensors that several processes hold, as formats/arena.py says: elements and blocks
                of a row, stride of rows, number of the first element
    owner       (programs,) int32, the parameter of each program
    strides     (n, 2, 2, DIMS) int64: sizes and strides of the parameter and of its gradient
    arenas      tuple of the arenas' rows, then of the constant tables of the formats
    scalars     (n, SCALARS) float32, the rule's
    grad_scale  (n,) float32
    step        (n,) int64
    measured    (n, columns) float32: the trust ratio, the MAXIMA largest of what the formats must know, and
                if the rule has means, these MEANS and the number of elements
    found       (programs, SUMS + MAXIMA) float32: sums of the squares of the direction and of the parameter,
    of
                elements and their numbers for the means, and those maxima
    spans       (n, 2) int64: the rows of `found` that are of a parameter, from the first to before the second

How a step is parallelised: a program takes TILE blocks of BLOCK elements of one parameter, a warp one or more
whole blocks, so that a block's maximum is a reduction inside a warp.
"""

import triton
import triton.language as tl

from ...formats import BLOCK as _BLOCK
from ...ops.step import GRAD_LIMIT as _GRAD_LIMIT

BLOCK = tl.constexpr(_BLOCK)
GRAD_LIMIT = tl.constexpr(_GRAD_LIMIT)


@triton.jit
def place_of(i, strides, k, WHICH: tl.constexpr, DIMS: tl.constexpr):
    """Where the elements `i` of a tensor are in memory; WHICH is 0 for the parameter, 1 for its gradient."""
    if DIMS == 0:
        place = i
    else:
        row = strides + (k * 2 + WHICH) * (2 * DIMS)
        left = i
        place = tl.zeros_like(i)
        for d in tl.static_range(DIMS):
            size = tl.load(row + (DIMS - 1 - d)).to(i.dtype)
            place += left % size * tl.load(row + (2 * DIMS - 1 - d)).to(i.dtype)
            left = left // size
    return place


@triton.jit
def elements_of(
    pid, k, rows, TILE: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr
):
    """The elements of a program, (TILE, BLOCK), its blocks, (TILE,), and which of both there are."""
    numel = tl.load(rows + 8 * k).to(INDEX)
    b = (pid - tl.load(rows + 8 * k + 3)).to(INDEX) * TILE + tl.arange(0, TILE)
    lane = tl.max_contiguous(tl.arange(0, BLOCK), 8)[None, :]
    if ROWS:
        row = tl.load(rows + 8 * k + 4).to(INDEX)
        row_blocks = tl.load(rows + 8 * k + 5).to(INDEX)
        column = (b % row_blocks * BLOCK)[:, None] + lane
        begin = b // row_blocks * row
        whole = b < numel // row * row_blocks
        if ALIGNED:
            begin = tl.multiple_of(begin, 8)
            inside = column // 8 < row // 8
        else:
            inside = column < row
        i = begin[:, None] + column
        inside = inside & whole[:, None]
    else:
        i = b[:, None] * BLOCK + lane
        whole = b * BLOCK < numel
        if ALIGNED:
            inside = i // 8 < numel // 8
        else:
            inside = i < numel
    return i, b, inside, whole


@triton.jit
def index_of(i, k, rows, ROWS: tl.constexpr):
    """The number of the elements `i` in the whole tensor, in its low 32 bits."""
    first = tl.load(rows + 8 * k + 7)
    if ROWS:
        row = tl.load(rows + 8 * k + 4)
        index = first + i // row * tl.load(rows + 8 * k + 6) + i % row
    else:
        index = first + i
    return index.to(tl.int32)


@triton.jit
def load_grad(
    address, place, inside, scale, GRAD: tl.constexpr, ALIGNED: tl.constexpr, SKIP_ZEROS: tl.constexpr
):
    """The gradient in float32, and where it is used; past the end it is not."""
    pointer = address.to(tl.pointer_type(GRAD))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    grad = tl.load(pointer + place, inside, float("nan")).to(tl.float32)
    if scale is not None:
        grad = grad * scale
    used = tl.abs(grad) < GRAD_LIMIT
    if SKIP_ZEROS:
        used = (grad != 0) & used
    return grad, used


@triton.jit
def load_codes(codes, table, i, inside, ZERO: tl.constexpr):
    """The numbers that codes, (TILE, BLOCK), stand for; past the end they are 0, which is the code ZERO."""
    code = tl.load(codes + i, inside, ZERO).to(tl.int32)
    values = tl.load(table + tl.arange(0, 256))
    flat = tl.reshape(code, [code.shape[0] * code.shape[1]])
    return tl.reshape(tl.gather(values, flat, 0), code.shape)


@triton.jit
def grouped(x, GROUPS: tl.constexpr):
    """(TILE, BLOCK) elements as (TILE, GROUPS, elements of a group)."""
    return tl.reshape(x, [x.shape[0], GROUPS, x.shape[1] // GROUPS])


@triton.jit
def flat(x):
    """The reverse of `grouped`."""
    return tl.reshape(x, [x.shape[0], x.shape[1] * x.shape[2]])


@triton.jit
def groups_of(block, GROUPS: tl.constexpr):
    """The numbers of the groups of blocks, (TILE, GROUPS)."""
    return block[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]


@triton.jit
def load_nibbles(row, block, whole, SIGNED: tl.constexpr):
    """Codes of 4 bits of blocks, (TILE, BLOCK), of which each has whole bytes to itself."""
    lane = tl.arange(0, BLOCK)[None, :]
    entry = tl.load(row + block[:, None] * (BLOCK // 2) + lane // 2, whole[:, None], 0).to(tl.int32)
    code = (entry >> (lane % 2 * 4)) & 15
    if SIGNED:
        code = (code ^ 8) - 8
    return code


@triton.jit
def store_nibbles(codes, row, block, whole):
    """The reverse of `load_nibbles`."""
    pairs = tl.reshape(codes & 15, [codes.shape[0], codes.shape[1] // 2, 2])
    low, high = tl.split(pairs)
    half = tl.arange(0, BLOCK // 2)[None, :]
    entry = (low | (high << 4)).to(row.dtype.element_ty)
    tl.store(row + block[:, None] * (BLOCK // 2) + half, entry, whole[:, None])


@triton.jit
def block_maxima(x, of_parameter, b):
    """The largest of each block, (TILE,), or group, (TILE, GROUPS); or that of the whole parameter."""
    if of_parameter is None:
        # Of numbers that are not negative the bits have the same order, and a warp has an instruction for it.
        bits = tl.max(x.to(tl.int32, bitcast=True), len(x.shape) - 1)
        largest = bits.to(tl.float32, bitcast=True)
    else:
        largest = tl.load(of_parameter) + tl.zeros_like(b).to(tl.float32)
    return largest


@triton.jit
def update_program(
    k,
    grad_address,
    addresses,
    rows,
    strides,
    arenas,
    scalars,
    step,
    measured,
    scale,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    MAX_UNORM: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    BLOCK_WISE: tl.constexpr,
    ROWS: tl.constexpr,
    MAXIMA: tl.constexpr,
    MEANS: tl.constexpr,
    load_scalars,
    load_states,
    update,
    keep,
    store_states,
    random_bits,
    round_bits,
    compensate,
):
    """Update the elements of this program, which are of parameter `k`, and its states."""
    pid = tl.program_id(0)
    i, b, inside, whole = elements_of(pid, k, rows, TILE, ALIGNED, INDEX, ROWS)
    offset = tl.multiple_of(tl.load(rows + 8 * k + 1), 16)
    block = tl.load(rows + 8 * k + 2)
    row = None
    if MAX_UNORM or not BLOCK_WISE or MEANS > 0:
        MEASURED: tl.constexpr = 2 + MAXIMA + MEANS if MEANS > 0 else 1 + MAXIMA
        row = measured + k * MEASURED
    s = load_scalars(scalars, k, row)
    grad, used = load_grad(
        grad_address, place_of(i, strides, k, 1, DIMS), inside, scale, GRAD, ALIGNED, SKIP_ZEROS
    )
    pointer = tl.load(addresses + 2 * k).to(tl.pointer_type(PARAM))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    pointer = pointer + place_of(i, strides, k, 0, DIMS)
    old_param = tl.load(pointer, inside, 0.0).to(tl.float32)
    old = load_states(arenas, offset, i, block, b, inside, whole)
    ratio = None
    if MAX_UNORM:
        ratio = tl.load(row)
    param, fresh = update(old_param, grad, old, s, ratio)
    random = None
    if random_bits is not None:
        random = random_bits(index_of(i, k, rows, ROWS), tl.load(step + k).to(tl.int32))[0]
    if compensate is None:
        store_param(pointer, param, old_param, used, inside, random, PARAM, round_bits)
    fresh = keep(used, fresh, old)
    of_param = inside
    if SKIP_ZEROS and BLOCK_WISE:
        # Encoding a block anew may change it, so one without any gradient is left alone.
        touched = tl.max(used.to(tl.int32), 1) > 0
        whole = whole & touched
        inside = inside & touched[:, None]
    of_parameter = None
    if not BLOCK_WISE:
        of_parameter = row + 1
    lost = store_states(arenas, fresh, random, offset, i, block, b, inside, whole, of_parameter)
    if compensate is not None:
        param = compensate(param, lost, s)
        store_param(pointer, param, old_param, used, of_param, random, PARAM, round_bits)


@triton.jit
def store_param(pointer, param, old_param, used, inside, random, PARAM: tl.constexpr, round_bits):
    """Write the parameter, where its gradient is used."""
    if round_bits is not None:
        bits = round_bits(param.to(tl.int32, bitcast=True), random)[0]
        param = bits.to(tl.float32, bitcast=True)
    tl.store(pointer, tl.where(used, param, old_param).to(PARAM), inside)


@triton.jit
def measure_program(
    k,
    grad_address,
    addresses,
    rows,
    strides,
    arenas,
    scalars,
    found,
    scale,
    FIRST: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
    SKIP_ZEROS: tl.constexpr,
    ROWS: tl.constexpr,
    MAXIMA: tl.constexpr,
    MEANS: tl.constexpr,
    load_scalars,
    load_states,
    numbers_of,
    direction,
    keep,
    store_maxima,
):
    """Find out what a step must know of whole parameters; FIRST is the launch's row."""
    pid = tl.program_id(0)
    i, b, inside, whole = elements_of(pid, k, rows, TILE, ALIGNED, INDEX, ROWS)
    offset = tl.multiple_of(tl.load(rows + 8 * k + 1), 16)
    block = tl.load(rows + 8 * k + 2)
    s = load_scalars(scalars, k, None)
    grad, used = load_grad(
        grad_address, place_of(i, strides, k, 1, DIMS), inside, scale, GRAD, ALIGNED, SKIP_ZEROS
    )
    pointer = tl.load(addresses + 2 * k).to(tl.pointer_type(PARAM))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    param = tl.load(pointer + place_of(i, strides, k, 0, DIMS), inside, 0.0).to(tl.float32)
    old = load_states(arenas, offset, i, block, b, inside, whole)
    SUMS: tl.constexpr = 3 + MEANS if MEANS > 0 else 2
    row = found + (FIRST + pid) * (SUMS + MAXIMA)
    if MEANS > 0:
        for m in tl.static_range(2 + MAXIMA):
            tl.store(row + (m if m < 2 else 1 + MEANS + m), 0.0)
        tl.store(row + 2, tl.sum(used.to(tl.float32)))
        numbers_of(row + 3, param, grad, old, s, used)
    else:
        tl.store(row + 1, tl.sum(param * param))
        moved, fresh = direction(param, grad, old, s)
        moved = tl.where(used, moved, 0.0)
        tl.store(row, tl.sum(moved * moved))
        store_maxima(row + SUMS, keep(used, fresh, old))


@triton.jit
def finish_program(
    addresses,
    grad_scale,
    found,
    spans,
    scalars,
    max_unorm,
    unorm,
    measured,
    MAXIMA: tl.constexpr,
    MEANS: tl.constexpr,
    SCALARS: tl.constexpr,
    UNIT: tl.constexpr,
    trust_ratio,
):
    """Find out from what was found of one parameter how it is updated.

    Of parts of tensors, `found` is the option `totals`, a row of float64 for each, and `spans` is None.
    """
    SUMS: tl.constexpr = 3 + MEANS if MEANS > 0 else 2
    COLUMNS: tl.constexpr = SUMS + MAXIMA
    k = tl.program_id(0).to(tl.int64)
    MEASURED: tl.constexpr = 2 + MAXIMA + MEANS if MEANS > 0 else 1 + MAXIMA
    row = measured + k * MEASURED
    if max_unorm is not None:
        limit = tl.load(max_unorm + k).to(tl.float64)
        unit = tl.load(scalars + k * SCALARS + UNIT)
        update_norm = tl.sqrt(sum_of(found, spans, k, COLUMNS)) * unit
        if is_active(k, addresses, grad_scale):
            tl.store(unorm + k, (update_norm * update_norm).to(tl.float32))
        ratio = trust_ratio(limit, tl.sqrt(sum_of(found + 1, spans, k, COLUMNS)), update_norm)[0]
        tl.store(row, ratio.to(tl.float32))
    for m in tl.static_range(MAXIMA):
        tl.store(row + 1 + m, largest_of(found + SUMS + m, spans, k, COLUMNS))
    if MEANS > 0:
        count = tl.maximum(sum_of(found + 2, spans, k, COLUMNS), 1.0)
        for m in tl.static_range(MEANS):
            mean = sum_of(found + 3 + m, spans, k, COLUMNS) / count
            tl.store(row + 1 + MAXIMA + m, mean.to(tl.float32))
        tl.store(row + 1 + MAXIMA + MEANS, count.to(tl.float32))


@triton.jit
def total_program(addresses, grad_scale, found, spans, totals, SUMS: tl.constexpr, MAXIMA: tl.constexpr):
    """Add up what was found of one parameter: its row of `totals`, (n, SUMS + MAXIMA) float64."""
    COLUMNS: tl.constexpr = SUMS + MAXIMA
    k = tl.program_id(0).to(tl.int64)
    active = is_active(k, addresses, grad_scale)
    row = totals + k * COLUMNS
    for m in tl.static_range(SUMS):
        tl.store(row + m, tl.where(active, sum_of(found + m, spans, k, COLUMNS), 0.0))
    for m in tl.static_range(MAXIMA):
        largest = largest_of(found + SUMS + m, spans, k, COLUMNS)
        tl.store(row + SUMS + m, tl.where(active, largest, 0.0).to(tl.float64))


@triton.jit
def is_active(k, addresses, grad_scale):
    """Whether a parameter is updated at all."""
    active = tl.load(addresses + 2 * k + 1) != 0
    if grad_scale is not None:
        scale = tl.load(grad_scale + k)
        active = active & (scale - scale == 0)  # finite
    return active


@triton.jit
def rows_of(spans, k):
    """The first row of `found` that is of a parameter, and the one after its last."""
    if spans is None:
        first = k
        end = k + 1
    else:
        first = tl.load(spans + 2 * k)
        end = tl.load(spans + 2 * k + 1)
    return first, end


@triton.jit
def sum_of(column, spans, k, COLUMNS: tl.constexpr):
    """The sum of a parameter's rows of a column of `found`, in float64."""
    first, end = rows_of(spans, k)
    lane = tl.arange(0, 1024)
    total = tl.zeros([1024], tl.float64)
    while first < end:
        total += tl.load(column + (first + lane) * COLUMNS, first + lane < end, 0.0)
        first += 1024
    return tl.sum(total)


@triton.jit
def largest_of(column, spans, k, COLUMNS: tl.constexpr):
    """The largest of a parameter's rows of a column of `found`, in float32."""
    first, end = rows_of(spans, k)
    lane = tl.arange(0, 1024)
    largest = tl.zeros([1024], tl.float32)
    while first < end:
        x = tl.load(column + (first + lane) * COLUMNS, first + lane < end, 0.0)
        largest = tl.maximum(largest, x.to(tl.float32))
        first += 1024
    return tl.max(largest)


@triton.jit
def prepare_program(
    present,
    step,
    hyper,
    scalars,
    grad_scale,
    count,
    PREPARE: tl.constexpr,
    STRIDE: tl.constexpr,
    ADVANCE: tl.constexpr,
    write_scalars,
):
    """Advance `step`, if ADVANCE, and compute the scalars of the next step for PREPARE of `count` parameters.

    `present` has an entry for each parameter, STRIDE apart, that is not 0 where there is a gradient.
    """
    k = tl.program_id(0) * PREPARE + tl.arange(0, PREPARE)
    there = k < count
    advance = tl.load(present + k * STRIDE, there, 0) != 0
    if grad_scale is not None:
        scale = tl.load(grad_scale + k, there, 0.0)
        advance = advance & (scale - scale == 0)  # finite
    steps = tl.load(step + k, there, 0) + advance.to(tl.int64)
    if ADVANCE:
        tl.store(step + k, steps, there)
    write_scalars(hyper, scalars, k, tl.maximum(steps, 1).to(tl.float64), there)


@triton.jit
def sums_program(
    addresses,
    rows,
    owner,
    strides,
    sums,
    FIRST: tl.constexpr,
    DTYPE: tl.constexpr,
    ELEMENTS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DIMS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """The sum of the squares of ELEMENTS elements of one tensor, which is in the place of a parameter."""
    pid = tl.program_id(0)
    k = tl.load(owner + pid).to(tl.int64)
    pointer = tl.load(addresses + 2 * k).to(tl.pointer_type(DTYPE))
    numel = tl.load(rows + 8 * k).to(INDEX)
    first = (pid - tl.load(rows + 8 * k + 3)).to(INDEX) * ELEMENTS
    i = first + tl.max_contiguous(tl.arange(0, ELEMENTS), 8)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        inside = i // 8 < numel // 8
    else:
        inside = i < numel
    x = tl.load(pointer + place_of(i, strides, k, 0, DIMS), inside, 0.0).to(tl.float32)
    tl.store(sums + FIRST + pid, tl.sum(x * x))


@triton.jit
def norms_program(sums, spans, out):
    """The root of the sums of one tensor, added in their order; `spans` (n, 2) int64 says where."""
    k = tl.program_id(0)
    first = tl.load(spans + 2 * k)
    last = tl.load(spans + 2 * k + 1)
    total = tl.zeros([1024], tl.float32)
    lane = tl.arange(0, 1024)
    while first < last:
        total += tl.load(sums + first + lane, first + lane < last, 0.0)
        first += 1024
    tl.store(out + k, tl.sqrt_rn(tl.sum(total)))

"""What a convolution's program does with its sums: store them, and make the GroupNorms that follow of them.

A part is the pixels of a sample that a program surely has (`statistics_rows`), a unit the channels of the smaller
group. Each program reduces its registers to mean and sum of squared distances from it of each part and unit, never
E[x^2] - E[x]^2; where other programs have the rest of the image, it writes these to memory, waits until all of them
have, and reads them back; then it merges all parts of the image (Chan, Golub & LeVeque 1979), and normalises what it
still has in registers. All sums are trees of two at a time whose order is the indices', not the layout's: in every tile
the same bits.
"""

import triton
import triton.language as tl

from .group_norm_parts import silu_of


@triton.jit
def halves(values, BIT: tl.constexpr):
    """Values whose flat indices differ in bit BIT alone, along axis 1: no data moves."""
    return values.reshape(values.numel >> (BIT + 1), 2, 1 << BIT)


@triton.jit
def pair_sums(values, ROW_BITS: tl.constexpr, COLUMN_BITS: tl.constexpr, UNIT_BITS: tl.constexpr):
    """Sums of 2^ROW_BITS rows (16 at most) x 2^UNIT_BITS of the 2^COLUMN_BITS columns, of two at a time.

    First those pairs that a thread has in the layout of a tensor core's result: columns 1 apart, rows 8 apart, columns
    8 apart. Each of them halves what the shuffles have to move.
    """
    LOW: tl.constexpr = 1 if UNIT_BITS > 0 else 0
    if UNIT_BITS > 0:
        values = tl.sum(halves(values, 0), 1)
    if ROW_BITS > 3:
        values = tl.sum(halves(values, COLUMN_BITS - LOW + 3), 1)
    for _ in tl.static_range(3, UNIT_BITS):
        values = tl.sum(halves(values, 2), 1)
    for _ in tl.static_range(1, 3 if UNIT_BITS > 3 else UNIT_BITS):
        values = tl.sum(halves(values, 0), 1)
    for _ in tl.static_range(0, 3 if ROW_BITS > 3 else ROW_BITS):
        values = tl.sum(halves(values, COLUMN_BITS - UNIT_BITS), 1)
    return values.reshape(values.numel >> (COLUMN_BITS - UNIT_BITS), 1 << (COLUMN_BITS - UNIT_BITS))


@triton.jit
def together(mean, squares, mean_2, squares_2, count: tl.constexpr):
    """Mean and squares of two sets of `count` values each (Chan, Golub & LeVeque 1979)."""
    away = mean - mean_2
    return (mean + mean_2) * 0.5, squares + squares_2 + away * away * (count * 0.5)


@triton.jit
def pairs(values, BIT: tl.constexpr):
    """Those whose flat index has bit BIT clear, and those that have it set. (A `tl.sum` here would need a barrier for
    each of several copies, where the two lie in different warps.)
    """
    return tl.split(tl.permute(halves(values, BIT), (0, 2, 1)))


@triton.jit
def merged(mean, squares, count: tl.constexpr, BIT: tl.constexpr, LEVELS: tl.constexpr):
    """Mean and squares of 2^LEVELS neighbours together, in index bits BIT and above, of `count` values each."""
    for level in tl.static_range(LEVELS):
        mean, mean_2 = pairs(mean, BIT)
        squares, squares_2 = pairs(squares, BIT)
        mean, squares = together(mean, squares, mean_2, squares_2, count << level)
    return mean.reshape(mean.numel >> BIT, 1 << BIT), squares.reshape(mean.numel >> BIT, 1 << BIT)


@triton.jit
def moments(values, PART_BITS: tl.constexpr, COLUMN_BITS: tl.constexpr, UNIT_BITS: tl.constexpr):
    """Mean and sum of squared distances from it, [rows / 2^PART_BITS, 2^COLUMN_BITS / 2^UNIT_BITS].

    16 rows of a unit lie in one warp; what follows is between warps, and small.
    """
    ROW_BITS: tl.constexpr = 4 if PART_BITS > 4 else PART_BITS
    PART: tl.constexpr = 1 << ROW_BITS
    UNIT: tl.constexpr = 1 << UNIT_BITS
    mean = pair_sums(values, ROW_BITS, COLUMN_BITS, UNIT_BITS) * (1.0 / (PART * UNIT))
    M: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    away = values.reshape(M // PART, PART, N // UNIT, UNIT) - mean[:, None, :, None]
    squares = pair_sums((away * away).reshape(M, N), ROW_BITS, COLUMN_BITS, UNIT_BITS)
    return merged(mean, squares, PART * UNIT, COLUMN_BITS - UNIT_BITS, PART_BITS - ROW_BITS)


@triton.jit
def added(total, partial_ptr, counter_ptr, segment, SEGMENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Leave a segment's sum in memory; the last program to do so has (True, all of them added in order)."""
    tile = tl.program_id(0).to(tl.int64)
    place = partial_ptr + tile * (SEGMENTS * M * N) + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(place + segment * (M * N), total)
    tl.debug_barrier()  # all threads have
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SEGMENTS - 1
    if last:
        tl.store(counter_ptr + tile, 0)  # for the next launch
        total = tl.load(place, cache_modifier=".cg")
        for other in tl.static_range(1, SEGMENTS):
            total += tl.load(place + other * (M * N), cache_modifier=".cg")
    return last, total


@triton.jit
def all_there(counter_ptr, PROGRAMS: tl.constexpr, WAIT: tl.constexpr):
    """Wait until PROGRAMS programs (a power of two) are here: 0, or NaN where it took too long.

    The counter never goes back: each launch adds PROGRAMS to it, and may find any multiple of that.
    """
    tl.debug_barrier()  # all threads have written what the others will read
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    target = before - (before & (PROGRAMS - 1)) + PROGRAMS
    missing = target - before - 1
    if WAIT:
        rounds = 0
        while (missing > 0) & (rounds < 4194304):  # seconds: something is broken, and a hang would hide what
            missing = target - tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
            rounds += 1
    late = missing > 0 if WAIT else missing > PROGRAMS
    return tl.where(late, float("nan"), 0.0)


@triton.jit
def read_back(at, units, there, count: tl.constexpr, PARTS: tl.constexpr, LEAVES: tl.constexpr):
    """Mean and squares of LEAVES parts together, then of the next unit's, in the order of `merged`: all in a thread."""
    if LEAVES == 1:
        mean = tl.load(at, there, other=0.0)
        squares = tl.load(at + units, there, other=0.0)
    else:
        HALF: tl.constexpr = LEAVES // 2
        mean, squares = read_back(at, units, there, count, PARTS, HALF)
        at = at + (HALF * 2 * units if HALF < PARTS else HALF // PARTS)
        mean_2, squares_2 = read_back(at, units, there, count, PARTS, HALF)
        mean, squares = together(mean, squares, mean_2, squares_2, count * HALF)
    return mean, squares


@triton.jit
def leave(
    mean,  # float32 [IMAGES OWN, units]
    squares,
    statistics_ptr,  # float32 [B, PARTS, 2, cout / UNIT]
    sample,  # int64, the tile's first
    batch,
    first_part,  # of the tile's first sample
    column,  # the tile's first
    cout,
    OWN: tl.constexpr,  # parts of an image that a tile has
    PARTS: tl.constexpr,  # that there are
    UNIT_BITS: tl.constexpr,
):
    """Write the statistics of a tile's parts."""
    units = cout >> UNIT_BITS
    u = (column >> UNIT_BITS) + tl.arange(0, mean.shape[1])
    i = tl.arange(0, mean.shape[0])
    there = (sample + i // OWN < batch)[:, None] & (u < units)[None, :]
    to = statistics_ptr + sample * (PARTS * 2) * units
    to += ((i // OWN * PARTS + first_part + i % OWN) * 2 * units)[:, None] + u[None, :]
    tl.store(to, mean, there)
    tl.store(to + units, squares, there)


@triton.jit
def found(
    statistics_ptr,
    sample,
    batch,
    column,
    cout,
    IMAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_BITS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
):
    """Mean and squares of GROUPS groups of whole images, [IMAGES, GROUPS]."""
    # The two halves of what is merged lie in neighbouring lanes: without a sum between threads the compiler would have
    # every thread load the groups of all its columns, and spill.
    RATIO: tl.constexpr = 1 << (GROUP_BITS - UNIT_BITS)
    HALF: tl.constexpr = PARTS * RATIO // 2
    COUNT: tl.constexpr = 1 << (PART_BITS + UNIT_BITS)
    units = cout >> UNIT_BITS
    i = tl.arange(0, IMAGES * GROUPS)
    u = (column >> UNIT_BITS) + i % GROUPS * RATIO
    there = ((sample + i // GROUPS < batch) & (u < units))[:, None]
    half = tl.arange(0, 2)
    at = statistics_ptr + sample * (PARTS * 2) * units
    at += (i // GROUPS * (PARTS * 2) * units + u)[:, None]
    at += (half * (HALF * 2 * units if HALF < PARTS else HALF // PARTS))[None, :]
    mean, squares = read_back(at, units, there, COUNT, PARTS, HALF)
    away = tl.sum(mean * (1.0 - 2.0 * half.to(tl.float32))[None, :], 1)
    squares = tl.sum(squares, 1) + away * away * (0.5 * COUNT * HALF)
    mean = tl.sum(mean, 1) * 0.5
    return mean.reshape(IMAGES, GROUPS), squares.reshape(IMAGES, GROUPS)


@triton.jit
def grouped(mean, squares, count: tl.constexpr, LEVELS: tl.constexpr):
    """`merged` of 2^LEVELS neighbours, where they lie in neighbouring lanes."""
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    for level in tl.static_range(LEVELS):
        both = mean.reshape(mean.shape[0], mean.shape[1] // 2, 2)
        away = tl.sum(both * sign[None, None, :], 2)
        squares = tl.sum(squares.reshape(both.shape), 2) + away * away * (count * 0.5 * (1 << level))
        mean = tl.sum(both, 2) * 0.5
    return mean, squares


@triton.jit
def column_halves(values):
    """Two halves of the columns: registers of the same threads, since a tensor core's result has 8 in a row."""
    M: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    return tl.split(tl.permute(values.reshape(M, 2, N // 2), (0, 2, 1)))


@triton.jit
def store_norm(
    values,  # float32 [rows, columns]
    mean,  # float32 [IMAGES, units]; EXCHANGE: of anything
    squares,
    statistics_ptr,  # as `leave` fills it
    late,  # 0, or NaN where they are not there
    norm,  # pointers to out, weight, bias, scale and shift; the strides of the last two; eps
    place,  # int32 [rows], from the first sample's beginning
    valid,  # [rows]
    sample,  # int64, the tile's first
    batch,
    start,  # int64, that sample's beginning in `out`
    column,  # the first
    cout,
    IMAGES: tl.constexpr,
    PIXEL_BITS: tl.constexpr,  # of a sample's output
    PART_BITS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    EXCHANGE: tl.constexpr,
    FULL_COUT: tl.constexpr,  # all columns are there
):
    """Normalise, and store. 64 columns at once: else their weights and the sums need more than 128 registers."""
    M: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    GROUP: tl.constexpr = 1 << GROUP_BITS
    if N > 64:
        low, high = column_halves(values)
        mean_low, mean_high, squares_low, squares_high = mean, mean, squares, squares
        if not EXCHANGE:
            mean_low, mean_high = column_halves(mean)
            squares_low, squares_high = column_halves(squares)
        store_norm(
            low,
            mean_low,
            squares_low,
            statistics_ptr,
            late,
            norm,
            place,
            valid,
            sample,
            batch,
            start,
            column,
            cout,
            IMAGES,
            PIXEL_BITS,
            PART_BITS,
            UNIT_BITS,
            GROUP_BITS,
            SCALE,
            SILU,
            EXCHANGE,
            FULL_COUT,
        )
        store_norm(
            high,
            mean_high,
            squares_high,
            statistics_ptr,
            late,
            norm,
            place,
            valid,
            sample,
            batch,
            start,
            column + N // 2,
            cout,
            IMAGES,
            PIXEL_BITS,
            PART_BITS,
            UNIT_BITS,
            GROUP_BITS,
            SCALE,
            SILU,
            EXCHANGE,
            FULL_COUT,
        )
    else:
        out_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, eps = norm
        if EXCHANGE:
            PARTS: tl.constexpr = 1 << (PIXEL_BITS - PART_BITS)
            GROUPS: tl.constexpr = N >> GROUP_BITS
            mean, squares = found(
                statistics_ptr, sample, batch, column, cout, IMAGES, GROUPS, PARTS, PART_BITS, UNIT_BITS, GROUP_BITS
            )
            mean += late
        else:
            mean, squares = grouped(mean, squares, 1 << (PIXEL_BITS + UNIT_BITS), GROUP_BITS - UNIT_BITS)
        deviation = tl.rsqrt(squares * (1.0 / (1 << (PIXEL_BITS + GROUP_BITS))) + eps)
        n = column + tl.arange(0, N)
        there = tl.full((N,), True, tl.int1) if FULL_COUT else n < cout
        a = tl.load(weight_ptr + n, there, other=0.0)[None, :]
        b = tl.load(bias_ptr + n, there, other=0.0)[None, :]
        if SCALE:
            image = tl.arange(0, IMAGES)
            inside = (sample + image < batch)[:, None] & there[None, :]
            scale = scale_ptr + sample * scale_stride + (image * scale_stride)[:, None] + n[None, :]
            shift = shift_ptr + sample * shift_stride + (image * shift_stride)[:, None] + n[None, :]
            factor = 1.0 + tl.load(scale, inside, other=0.0)
            b = tl.fma(tl.broadcast_to(b, factor.shape), factor, tl.load(shift, inside, other=0.0))
            a = a * factor
        a = a.reshape(a.shape[0], N // GROUP, GROUP) * deviation[:, :, None]
        b = b.reshape(b.shape[0], 1, N // GROUP, GROUP)
        away = values.reshape(IMAGES, M // IMAGES, N // GROUP, GROUP) - mean[:, None, :, None]
        y = tl.fma(away, tl.broadcast_to(a[:, None], away.shape), tl.broadcast_to(b, away.shape))
        if SILU:
            y = silu_of(y)
        at = out_ptr + start + (place[:, None] + n[None, :])
        tl.store(at, y.to(out_ptr.dtype.element_ty).reshape(M, N), valid[:, None] & there[None, :])


@triton.jit
def store_raw(values, at, column, cout, valid, FULL_COUT: tl.constexpr):
    """Round and store. 64 columns at once, as `store_norm`: wider moves to the store's layout take more registers."""
    N: tl.constexpr = values.shape[1]
    if N > 64:
        low, high = column_halves(values)
        store_raw(low, at, column, cout, valid, FULL_COUT)
        store_raw(high, at, column + N // 2, cout, valid, FULL_COUT)
    else:
        n = column + tl.arange(0, N)
        there = tl.full((N,), True, tl.int1) if FULL_COUT else n < cout
        tl.store(at[:, None] + n[None, :], values.to(at.dtype.element_ty), valid[:, None] & there[None, :])

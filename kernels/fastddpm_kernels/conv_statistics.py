"""Mean and sum of squared distances from it, of a convolution's sums in registers: never E[x^2] - E[x]^2.

All sums are trees of two at a time whose order is the indices', not the layout's: in every tile the same bits.
"""

import triton
import triton.language as tl


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
def grouped(mean, squares, count: tl.constexpr, LEVELS: tl.constexpr):
    """`merged` of 2^LEVELS neighbours, where they lie in neighbouring lanes."""
    sign = 1.0 - 2.0 * tl.arange(0, 2).to(tl.float32)
    for level in tl.static_range(LEVELS):
        both = mean.reshape(mean.shape[0], mean.shape[1] // 2, 2)
        away = tl.sum(both * sign[None, None, :], 2)
        squares = tl.sum(squares.reshape(both.shape), 2) + away * away * (count * 0.5 * (1 << level))
        mean = tl.sum(both, 2) * 0.5
    return mean, squares

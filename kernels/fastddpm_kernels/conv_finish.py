"""What a convolution's program does with its sums: store them, and make the GroupNorms that follow of them.

A part is the pixels of a sample that a program surely has (`statistics_rows`), a unit the channels of the smaller
group. Each program reduces its registers to mean and squares of each part and unit; where other programs have the rest
of the image, it leaves these in memory, waits until all of them have, and reads them back; then it merges all parts of
the image (Chan, Golub & LeVeque 1979), and normalises what it still has in registers.
"""

import triton
import triton.language as tl

from .conv_exchange import found
from .conv_statistics import grouped
from .group_norm_parts import silu_of


@triton.jit
def column_halves(values):
    """Two halves of the columns: registers of the same threads, since a tensor core's result has 8 in a row."""
    M: tl.constexpr = values.shape[0]
    N: tl.constexpr = values.shape[1]
    return tl.split(tl.permute(values.reshape(M, 2, N // 2), (0, 2, 1)))


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


@triton.jit
def store_norm(
    values,  # float32 [rows, columns]
    statistics,  # mean and squares [IMAGES, units], EXCHANGE: of anything; what `leave` fills; 0 or NaN by `all_there`
    norm,  # pointers to out, weight, bias, scale and shift; the strides of the last two; eps
    where,  # [rows]: int32 places from the first sample's beginning, and whether they are there; then the first sample,
    # the batch, that beginning in `out`, and cout
    column,  # the first
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
    mean, squares, statistics_ptr, late = statistics
    if N > 64:
        means, both = (mean, mean), (squares, squares)
        if not EXCHANGE:
            means, both = column_halves(mean), column_halves(squares)
        halves = column_halves(values)
        for i in tl.static_range(2):
            store_norm(
                halves[i], (means[i], both[i], statistics_ptr, late), norm, where, column + i * (N // 2),
                IMAGES, PIXEL_BITS, PART_BITS, UNIT_BITS, GROUP_BITS, SCALE, SILU, EXCHANGE, FULL_COUT,
            )  # fmt: skip
    else:
        place, valid, sample, batch, start, cout = where
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

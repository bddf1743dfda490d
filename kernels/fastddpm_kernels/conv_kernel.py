"""The convolution's kernel: a tile of pixels and channels, its sum, and what follows it."""

import triton
import triton.language as tl

from .conv_exchange import added, all_there, leave
from .conv_finish import store_norm, store_raw
from .conv_parts import accumulate, begin, rows_left
from .conv_statistics import merged, moments


@triton.jit(do_not_specialize=["batch"])
def conv_kernel(
    x_ptr,  # [B, height, width, c0]
    second_ptr,  # [B, height, width, c1]
    weight_ptr,  # [phases, taps (c0 + c1), columns]
    shortcut_x_ptr,  # [B, height, width, s0]
    shortcut_second_ptr,  # [B, height, width, s1]
    shortcut_weight_ptr,  # [s0 + s1, columns]
    bias_ptr,  # float32 [cout]
    row_ptr,  # float32 [B, cout], each sample's row_units * COUT_UNIT from the one before
    residual_ptr,  # [B, out_height, out_width, cout]
    out_ptr,  # [B, out_height, out_width, cout]
    scratch_ptr,  # float32: SPLIT [programs, SEGMENTS, BLOCK_M, BLOCK_N]; EXCHANGE [B, parts, 2, cout / unit]
    counter_ptr,  # int32: of each SPLIT tile; EXCHANGE of each column tile of a sample, or of a tile's samples
    norm_out_ptr,  # [B, out_height, out_width, cout]
    norm_weight_ptr,  # float32 [cout]
    norm_bias_ptr,
    norm_scale_ptr,  # float32 [B, cout], by its stride
    norm_shift_ptr,
    norm_scale_stride,
    norm_shift_stride,
    norm_eps,
    other_out_ptr,  # and of a second norm
    other_weight_ptr,
    other_bias_ptr,
    other_scale_ptr,
    other_shift_ptr,
    other_scale_stride,
    other_shift_stride,
    other_eps,
    batch,
    height,
    width,
    tall,
    wide,  # rows a sample are tall x wide: the output's size, or UP a quarter of it
    c0_units,
    c1_units,
    s0_units,
    s1_units,  # channels / UNIT
    column_units,  # weight columns / COLUMN_UNIT
    cout_units,  # output channels / COUT_UNIT
    row_units,
    steps,  # of a segment
    all_steps,
    scale,
    KERNEL: tl.constexpr,  # taps a side: 3, 1; UP: 2
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    UP: tl.constexpr,
    TWO: tl.constexpr,
    SHORTCUT: tl.constexpr,
    FLAT: tl.constexpr,
    FULL_K: tl.constexpr,
    FULL_N: tl.constexpr,
    UNIT: tl.constexpr,
    COLUMN_UNIT: tl.constexpr,
    COUT_UNIT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,  # one segment a program; the last one to be done adds them
    BIAS: tl.constexpr,
    ROW: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,  # no tile has pixels of two
    FULL_COUT: tl.constexpr,
    RAW: tl.constexpr,  # whether `out` is wanted
    NORMS: tl.constexpr,
    PIXEL_BITS: tl.constexpr,  # of a sample's output, 2^PIXEL_BITS where there are norms
    PART_BITS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
    OTHER_GROUP_BITS: tl.constexpr,
    OTHER_SCALE: tl.constexpr,
    OTHER_SILU: tl.constexpr,
    EXCHANGE: tl.constexpr,  # a sample is not one program's
    WAIT: tl.constexpr,
    TILES: tl.constexpr,  # of a sample, of a phase; 1 where they don't wait for each other
    WIDEN: tl.constexpr,
    COLUMN_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    c0, c1, s0, s1 = c0_units * UNIT, c1_units * UNIT, s0_units * UNIT, s1_units * UNIT
    columns, cout = column_units * COLUMN_UNIT, cout_units * COUT_UNIT
    # Programs that share pixels run together: their pixels come from L2, and weights, few, stay there. So do those that
    # wait for each other: all of a sample are started before any of the next one.
    across = tl.cdiv(cout, BLOCK_N)
    rest = tl.program_id(0) // across
    column_tile = tl.program_id(0) - rest * across
    column = column_tile * BLOCK_N
    PHASES: tl.constexpr = 4 if UP else 1
    span = rest // (PHASES * TILES)
    phase = rest // TILES % PHASES
    tile = span * TILES + rest % TILES
    py, px = phase // 2, phase % 2

    pixels = tall * wide
    start = tile.to(tl.int64) * BLOCK_M
    sample = start // pixels
    first = (start - sample * pixels).to(tl.int32)
    rows = rows_left(batch, sample, pixels)
    r = first + tl.arange(0, BLOCK_M)
    behind = r // pixels
    y = (r - behind * pixels) // wide
    x = r - behind * pixels - y * wide

    n = column + tl.arange(0, BLOCK_N)
    valid, there = r < rows, n < cout
    if ONE_SAMPLE:
        valid = tl.full((BLOCK_M,), True, tl.int1)
    if FULL_COUT:
        there = tl.full((BLOCK_N,), True, tl.int1)
    to, out_pixels = r, pixels
    if UP:
        to = (behind * (2 * tall) + 2 * y + py) * (2 * wide) + 2 * x + px
        out_pixels = 4 * pixels
    segment = tl.program_id(1)
    total = begin(
        (bias_ptr, row_ptr, residual_ptr), sample, behind, to, valid, n, there & (segment == 0) if SPLIT else there,
        out_pixels, cout, row_units * COUT_UNIT, BIAS, ROW, RESIDUAL, ONE_SAMPLE, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    top, left = y * STRIDE - PADDING, x * STRIDE - PADDING
    if UP:
        top, left = y - 1 + py, x - 1 + px
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for tap in tl.static_range(KERNEL * KERNEL):
        ty, tx = top + tap // KERNEL, left + tap % KERNEL
        inside |= ((ty >= 0) & (ty < height) & (tx >= 0) & (tx < width)).to(tl.int32) << tap
    if SHORTCUT:
        inside |= 1 << (KERNEL * KERNEL)
    inside = tl.where(valid, inside, 0)
    from_pixel = (behind * height + top) * width + left

    at = sample * height * width
    given = (
        x_ptr + at * c0,
        second_ptr + at * c1,
        weight_ptr + phase * (KERNEL * KERNEL * (c0 + c1)) * columns,
        shortcut_x_ptr + at * s0,
        shortcut_second_ptr + at * s1,
        shortcut_weight_ptr,
    )
    sizes = (width, c0, c1, s0, s1, columns)
    total = accumulate(
        total, given, sizes, from_pixel, inside, n, segment * steps, tl.minimum(segment * steps + steps, all_steps),
        KERNEL, TWO, SHORTCUT, FLAT, FULL_K, FULL_N, WIDEN, BLOCK_K,
    )  # fmt: skip
    for later in range(1, 1 if SPLIT else SEGMENTS):
        nothing = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total += accumulate(
            nothing, given, sizes, from_pixel, inside, n, later * steps, tl.minimum(later * steps + steps, all_steps),
            KERNEL, TWO, SHORTCUT, FLAT, FULL_K, FULL_N, WIDEN, BLOCK_K,
        )  # fmt: skip
    done = True
    if SPLIT:
        done, total = added(total, scratch_ptr, counter_ptr, segment, SEGMENTS, BLOCK_M, BLOCK_N)
    if done:
        if SCALED:
            total *= scale
        begins = sample * out_pixels * cout
        if RAW:
            store_raw(total, out_ptr + begins + to * cout, column, cout, valid, FULL_COUT)
        if NORMS > 0:
            PARTS: tl.constexpr = 1 << (PIXEL_BITS - PART_BITS)  # of a sample
            IMAGES: tl.constexpr = (BLOCK_M * PHASES + (1 << PIXEL_BITS) - 1) >> PIXEL_BITS  # in a tile
            mean, squares = moments(total, PART_BITS, COLUMN_BITS, UNIT_BITS)
            late = 0.0
            if EXCHANGE:
                OWN: tl.constexpr = (BLOCK_M >> PART_BITS) // IMAGES
                part = (phase * pixels + first) >> PART_BITS
                leave(mean, squares, scratch_ptr, sample, batch, part, column, cout, OWN, PARTS, UNIT_BITS)
                late = all_there(counter_ptr + span * across + column_tile, PHASES * TILES, WAIT)
            else:
                UNITS: tl.constexpr = 1 << (COLUMN_BITS - UNIT_BITS)
                PART: tl.constexpr = 1 << (PART_BITS + UNIT_BITS)
                mean, squares = merged(mean, squares, PART, COLUMN_BITS - UNIT_BITS, PIXEL_BITS - PART_BITS)
                mean, squares = mean.reshape(IMAGES, UNITS), squares.reshape(IMAGES, UNITS)
            statistics = (mean, squares, scratch_ptr, late)
            where = (to * cout, valid, sample, batch, begins, cout)
            norm = (
                norm_out_ptr, norm_weight_ptr, norm_bias_ptr, norm_scale_ptr, norm_shift_ptr,
                norm_scale_stride, norm_shift_stride, norm_eps,
            )  # fmt: skip
            store_norm(
                total, statistics, norm, where, column,
                IMAGES, PIXEL_BITS, PART_BITS, UNIT_BITS, GROUP_BITS, SCALE, SILU, EXCHANGE, FULL_COUT,
            )  # fmt: skip
            if NORMS > 1:
                other = (
                    other_out_ptr, other_weight_ptr, other_bias_ptr, other_scale_ptr, other_shift_ptr,
                    other_scale_stride, other_shift_stride, other_eps,
                )  # fmt: skip
                store_norm(
                    total, statistics, other, where, column,
                    IMAGES, PIXEL_BITS, PART_BITS, UNIT_BITS, OTHER_GROUP_BITS, OTHER_SCALE, OTHER_SILU,
                    EXCHANGE, FULL_COUT,
                )  # fmt: skip

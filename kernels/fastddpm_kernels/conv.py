"""Convolution as a matrix product on tensor cores, over NHWC activations, with all that follows it in the UNet.

Rows are output pixels, columns output channels, and the sum runs over taps x channels. No im2col tensor exists: each
block of the sum is read from the image where it lies, and a tap outside the image is zero. Nor does any of these:

- the concatenation of two sources: each tap's channels are first those of `x`, then those of `second`;
- the upsampled image: a 3x3 convolution of it is four 2x2 convolutions of the small one (`phase_weights`);
- the 1x1 shortcut's output: its input channels are a tenth tap, with weights of their own;
- what bias, time row, residual and scale would each read and write.

The order of every sum is fixed by the channels and the size of the map: a sample's bits depend neither on its slot nor
on the batch. Where a map is so small that the sum is divided (`segments_of`), each segment is summed alone and the
segments are added in order: by one program, or by many and a second kernel, to the same bits.

Not measured on a GPU. `tests/test_conv_codegen.py` has what the machine code shows.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .conv_norm import NormOut
from .conv_parts import accumulate, begin, finish, rows_left
from .conv_reference import COLUMNS
from .conv_tiles import Tile, segments_of, side_by_side, statistics_rows, step_of, tile_of
from .group_norm import launch_group_norm


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
    partial_ptr,  # float32 [segments, B, out_height, out_width, cout]
    statistics_ptr,  # float32 [B, parts, groups, 2]
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
    SPLIT: tl.constexpr,  # one segment a program, to `partial`
    BIAS: tl.constexpr,
    ROW: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    PARTS: tl.constexpr,
    PART_BITS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    c0, c1, s0, s1 = c0_units * UNIT, c1_units * UNIT, s0_units * UNIT, s1_units * UNIT
    columns, cout = column_units * COLUMN_UNIT, cout_units * COUT_UNIT
    # Programs that share pixels run together: their pixels come from L2, and weights, few, stay there.
    across = tl.cdiv(cout, BLOCK_N)
    tile = tl.program_id(0) // across
    column = (tl.program_id(0) - tile * across) * BLOCK_N
    phase = tl.program_id(1)
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
    to, out_pixels = r, pixels
    if UP:
        to = (behind * (2 * tall) + 2 * y + py) * (2 * wide) + 2 * x + px
        out_pixels = 4 * pixels
    segment = tl.program_id(2)
    total = begin(
        bias_ptr,
        row_ptr,
        residual_ptr,
        sample,
        behind,
        to,
        r < rows,
        n,
        out_pixels,
        cout,
        row_units * COUT_UNIT,
        segment == 0,
        BIAS,
        ROW,
        RESIDUAL,
        ONE_SAMPLE,
        BLOCK_M,
        BLOCK_N,
    )

    top, left = y * STRIDE - PADDING, x * STRIDE - PADDING
    if UP:
        top, left = y - 1 + py, x - 1 + px
    inside = tl.zeros((BLOCK_M,), tl.int32)
    for tap in tl.static_range(KERNEL * KERNEL):
        ty, tx = top + tap // KERNEL, left + tap % KERNEL
        inside |= ((ty >= 0) & (ty < height) & (tx >= 0) & (tx < width)).to(tl.int32) << tap
    if SHORTCUT:
        inside |= 1 << (KERNEL * KERNEL)
    inside = tl.where(r < rows, inside, 0)
    from_pixel = (behind * height + top) * width + left

    at = sample * height * width
    source, second = x_ptr + at * c0, second_ptr + at * c1
    shortcut_x, shortcut_second = shortcut_x_ptr + at * s0, shortcut_second_ptr + at * s1
    weight = weight_ptr + phase * (KERNEL * KERNEL * (c0 + c1)) * columns
    total = accumulate(
        total,
        source,
        second,
        weight,
        shortcut_x,
        shortcut_second,
        shortcut_weight_ptr,
        from_pixel,
        inside,
        n,
        segment * steps,
        tl.minimum(segment * steps + steps, all_steps),
        width,
        c0,
        c1,
        s0,
        s1,
        columns,
        KERNEL,
        TWO,
        SHORTCUT,
        FLAT,
        FULL_K,
        FULL_N,
        WIDE,
        BLOCK_K,
    )
    for later in range(1, 1 if SPLIT else SEGMENTS):
        total += accumulate(
            tl.zeros((BLOCK_M, BLOCK_N), tl.float32),
            source,
            second,
            weight,
            shortcut_x,
            shortcut_second,
            shortcut_weight_ptr,
            from_pixel,
            inside,
            n,
            later * steps,
            tl.minimum(later * steps + steps, all_steps),
            width,
            c0,
            c1,
            s0,
            s1,
            columns,
            KERNEL,
            TWO,
            SHORTCUT,
            FLAT,
            FULL_K,
            FULL_N,
            WIDE,
            BLOCK_K,
        )
    if SPLIT:
        keep = (r < rows)[:, None] & (n < cout)[None, :]
        whole = batch.to(tl.int64) * out_pixels * cout
        place = partial_ptr + segment * whole + sample * out_pixels * cout
        tl.store(place + (to * cout)[:, None] + n[None, :], total, keep)
    else:
        finish(
            total,
            out_ptr,
            statistics_ptr,
            sample,
            first,
            rows,
            to,
            column,
            pixels,
            out_pixels,
            cout,
            scale,
            phase,
            SCALED,
            PARTS,
            PART_BITS,
            GROUP_BITS,
            BLOCK_M,
            BLOCK_N,
        )


@triton.jit(do_not_specialize=["batch"])
def add_segments_kernel(
    partial_ptr,  # float32 [SEGMENTS, B, pixels, cout]
    out_ptr,  # [B, pixels, cout]
    statistics_ptr,  # float32 [B, pixels / PART, groups, 2]
    batch,
    pixels,
    cout_units,
    scale,
    COUT_UNIT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    PART_BITS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the segments in order, and finish."""
    cout = cout_units * COUT_UNIT
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    column = tl.program_id(1) * BLOCK_N
    sample = start // pixels
    first = (start - sample * pixels).to(tl.int32)
    rows = rows_left(batch, sample, pixels)
    r = first + tl.arange(0, BLOCK_M)
    n = column + tl.arange(0, BLOCK_N)
    keep = (r < rows)[:, None] & (n < cout)[None, :]
    whole = batch.to(tl.int64) * pixels * cout
    place = partial_ptr + sample * pixels * cout
    place += (r * cout)[:, None] + n[None, :]
    total = tl.load(place, keep, other=0.0)
    for segment in tl.static_range(1, SEGMENTS):
        total += tl.load(place + segment * whole, keep, other=0.0)
    finish(
        total,
        out_ptr,
        statistics_ptr,
        sample,
        first,
        rows,
        r,
        column,
        pixels,
        pixels,
        cout,
        scale,
        0,
        SCALED,
        PARTS,
        PART_BITS,
        GROUP_BITS,
        BLOCK_M,
        BLOCK_N,
    )


def launch_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    *,
    norms: Sequence[NormOut] = (),
    second: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    shortcut_x: torch.Tensor | None = None,
    shortcut_second: torch.Tensor | None = None,
    shortcut_weight: torch.Tensor | None = None,
    scale: float = 1.0,
    stride: int = 1,
    padding: int = 1,
    statistics: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    tile: Tile | None = None,
    segments: int | None = None,
    split: bool | None = None,
) -> None:
    """Write scale * (conv(x, second) + bias + row + residual + shortcut) to `out`. Checks nothing.

    All tensors are contiguous. `x`, `second`, `residual`, the shortcut's sources, the weights and `out` have one dtype,
    bfloat16, float16 or float32; sums are float32. A sample has fewer than 2^31 elements.

    Args:
        x, second: [B, H, W, c0] and [B, H, W, c1] or None; the convolution is over x's channels, then second's.
        weight: by `pack_weight`, 3x3 or 1x1; or by `phase_weights`, [4, ...]: the 3x3 convolution of the 2x image.
        bias: float32 [c_out]; of a block with a shortcut, the sum of both biases; None where it is in `row` already.
        out: [B, OH, OW, c_out], or None where only its norms are wanted.
        norms: at most two, where `can_exchange` says so: of the result before it is rounded.
        row: float32 [B, c_out], added to every pixel of its sample: the time embedding, best with the bias in it. A
            slice of a table's columns is no copy: only the last dimension must be contiguous.
        residual: [B, OH, OW, c_out].
        shortcut_x, shortcut_second, shortcut_weight: a 1x1 convolution, added; [B, H, W, s0], [B, H, W, s1] or None,
            and [s0 + s1, columns] by `pack_weight`. With a 3x3 or 1x1 convolution of stride 1 only.
        scale: 1 / rescale factor.
        stride, padding: of a 3x3 convolution; stride 1 or 2. Padding is 1 pixel on all sides, or, 0, one zero row
            below and one column to the right (diffusers' `downsample_padding=0`).
        statistics: float32 [B, parts, groups, 2], or None: of each group of channels in each part of a sample the mean
            of the stored values, and the sum of the squares of their distances from it. A part is `statistics_rows`
            pixels, in order; of an upsampled image first those of phase 0, and so on.
        workspace, counters: float32 and int32, `conv_scratch`'s numbers of elements or more; allocated where they are
            needed and None. The counters are zeros, or as a launch of the same shapes left them.
        tile, segments, split: `tile_of`, `segments_of`, `side_by_side` unless given. Only `tile.k` and `segments`
            change the order of the sums, and so the last bits.
    """
    if out is None:
        out = torch.empty_like(norms[0].out)
    if out.numel() == 0:
        return
    batch, height, width, c0 = x.shape
    _, out_height, out_width, cout = out.shape
    c1, s0, s1 = (0 if t is None else t.shape[3] for t in (second, shortcut_x, shortcut_second))
    up = weight.ndim == 3
    tall, wide = (height, width) if up else (out_height, out_width)
    kernel = 2 if up else 3 if weight.shape[0] == 9 * (c0 + c1) else 1
    flat = kernel == 3 and c0 < 16 and c1 == s0 == 0
    rows, phases, columns = batch * tall * wide, 4 if up else 1, weight.shape[-1]

    part, group = 0, 0
    if statistics is not None:
        part, group = statistics_rows(tall * wide), cout // statistics.shape[2]
    k = tile.k if tile else step_of((c0, c1, s0, s1), x.dtype, flat=flat)
    counts = [9 * c0] if flat else [c0, c1] * kernel * kernel + [s0, s1]
    steps = sum(triton.cdiv(count, k) for count in counts)
    segments = segments or (1 if up else segments_of(tall * wide, steps))
    if tile is None:
        # Segments have a second total; statistics need registers; and a 1x1 convolution is over too soon.
        most = 64 * 64 if segments > 1 else 128 * 128 if part or kernel == 1 else 128 * 256
        spare = residual is None and not part and not flat
        tile = tile_of(rows * phases, cout, k, x.dtype, most=most, spare=spare, shared=_shared(x.device))
    tiles = triton.cdiv(rows, tile.m) * triton.cdiv(cout, tile.n)
    split = segments > 1 and (side_by_side(tiles) if split is None else split)
    if split and workspace is None:
        workspace = torch.empty(segments * out.numel(), dtype=torch.float32, device=out.device)

    unit = 8 if all(c % 8 == 0 for c in (c0, c1, s0, s1)) else 1
    apart = cout if row is None else row.stride(0)
    cout_unit = 8 if cout % 8 == 0 and apart % 8 == 0 else 1
    end = dict(SCALED=scale != 1.0, PARTS=part > 0, PART_BITS=part.bit_length() - 1, GROUP_BITS=group.bit_length() - 1)
    conv_kernel[(tiles, phases, segments if split else 1)](
        x,
        _or(second, x),
        weight,
        _or(shortcut_x, x),
        _or(shortcut_second, x),
        _or(shortcut_weight, weight),
        _or(bias, out),
        _or(row, out),
        _or(residual, out),
        out,
        _or(workspace, out),
        _or(statistics, out),
        batch,
        height,
        width,
        tall,
        wide,
        c0 // unit,
        c1 // unit,
        s0 // unit,
        s1 // unit,
        columns // COLUMNS,
        cout // cout_unit,
        apart // cout_unit,
        triton.cdiv(steps, segments),
        steps,
        scale,
        KERNEL=kernel,
        STRIDE=stride,
        PADDING=padding if kernel == 3 else 0,
        UP=up,
        TWO=c1 > 0,
        SHORTCUT=s0 > 0,
        FLAT=flat,
        FULL_K=not flat and all(c % tile.k == 0 for c in (c0, c1, s0, s1)),
        FULL_N=columns % tile.n == 0,
        UNIT=unit,
        COLUMN_UNIT=COLUMNS,
        COUT_UNIT=cout_unit,
        SEGMENTS=segments,
        SPLIT=split,
        ONE_SAMPLE=tall * wide % tile.m == 0,
        WIDE=triton.knobs.runtime.interpret and x.dtype == torch.bfloat16,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BIAS=bias is not None,
        ROW=row is not None,
        RESIDUAL=residual is not None,
        **end,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
    if split:
        block_m, pixels = max(16, part), out_height * out_width
        add_segments_kernel[(triton.cdiv(rows, block_m), triton.cdiv(cout, 64))](
            workspace,
            out,
            _or(statistics, out),
            batch,
            pixels,
            cout // cout_unit,
            scale,
            COUT_UNIT=cout_unit,
            SEGMENTS=segments,
            BLOCK_M=block_m,
            BLOCK_N=64,
            **end,
            num_warps=4,
        )
    for norm in norms:
        launch_group_norm(
            out,
            None,
            norm.out,
            norm.weight,
            norm.bias,
            groups=cout // norm.group,
            eps=norm.eps,
            scale=norm.scale,
            shift=norm.shift,
            silu=norm.silu,
        )


@lru_cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 232448
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is not used must still be one."""
    return other if tensor is None else tensor

"""Convolution as a matrix product on tensor cores, over NHWC activations, with all that follows it in the UNet.

Rows are output pixels, columns output channels, and the sum runs over taps x channels. No im2col tensor exists: each
block of the sum is read from the image where it lies, and a tap outside the image is zero. Nor does any of these:

- the concatenation of two sources: each tap's channels are first those of `x`, then those of `second`;
- the upsampled image: a 3x3 convolution of it is four 2x2 convolutions of the small one (`phase_weights`);
- the 1x1 shortcut's output: its input channels are a tenth tap, with weights of their own;
- what bias, time row, residual and scale would each read and write;
- nor, where only its norms are read, the convolution's own output (`conv_finish`).

The order of every sum is fixed by the channels and the size of the map: a sample's bits depend neither on its slot nor
on the batch. Where a map is so small that the sum is divided (`segments_of`), each segment is summed alone and the
segments are added in order: by one program, or by the last of many to be done, to the same bits.

Not measured on a GPU. `tests/test_conv_codegen.py` has what the machine code shows.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from .conv_finish import added, all_there, leave, merged, moments, store_norm, store_raw
from .conv_norm import NormOut
from .conv_parts import accumulate, begin, rows_left
from .conv_reference import COLUMNS
from .conv_tiles import Tile, segments_of, side_by_side, statistics_rows, step_of, tile_of


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
    WIDE: tl.constexpr,
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
        bias_ptr,
        row_ptr,
        residual_ptr,
        sample,
        behind,
        to,
        valid,
        n,
        there & (segment == 0) if SPLIT else there,
        out_pixels,
        cout,
        row_units * COUT_UNIT,
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
    inside = tl.where(valid, inside, 0)
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
            store_norm(
                total,
                mean,
                squares,
                scratch_ptr,
                late,
                (
                    norm_out_ptr,
                    norm_weight_ptr,
                    norm_bias_ptr,
                    norm_scale_ptr,
                    norm_shift_ptr,
                    norm_scale_stride,
                    norm_shift_stride,
                    norm_eps,
                ),
                to * cout,
                valid,
                sample,
                batch,
                begins,
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
            if NORMS > 1:
                store_norm(
                    total,
                    mean,
                    squares,
                    scratch_ptr,
                    late,
                    (
                        other_out_ptr,
                        other_weight_ptr,
                        other_bias_ptr,
                        other_scale_ptr,
                        other_shift_ptr,
                        other_scale_stride,
                        other_shift_stride,
                        other_eps,
                    ),
                    to * cout,
                    valid,
                    sample,
                    batch,
                    begins,
                    column,
                    cout,
                    IMAGES,
                    PIXEL_BITS,
                    PART_BITS,
                    UNIT_BITS,
                    OTHER_GROUP_BITS,
                    OTHER_SCALE,
                    OTHER_SILU,
                    EXCHANGE,
                    FULL_COUT,
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
        workspace, counters: float32 and int32, `conv_scratch`'s numbers of elements or more; allocated where they are
            needed and None. The counters are zeros, or as a launch of the same shapes left them.
        tile, segments, split: `tile_of`, `segments_of`, `side_by_side` unless given. Only `tile.k` and `segments`
            change the order of the sums, and so the last bits.
    """
    like = norms[0].out if out is None else out
    if like.numel() == 0:
        return
    batch, height, width, c0 = x.shape
    _, out_height, out_width, cout = like.shape
    c1, s0, s1 = (0 if t is None else t.shape[3] for t in (second, shortcut_x, shortcut_second))
    up = weight.ndim == 3
    tall, wide = (height, width) if up else (out_height, out_width)
    kernel = 2 if up else 3 if weight.shape[0] == 9 * (c0 + c1) else 1
    flat = kernel == 3 and c0 < 16 and c1 == s0 == 0
    pixels, phases, columns = tall * wide, 4 if up else 1, weight.shape[-1]

    k = tile.k if tile else step_of((c0, c1, s0, s1), x.dtype, flat=flat)
    counts = [9 * c0] if flat else [c0, c1] * kernel * kernel + [s0, s1]
    steps = sum(triton.cdiv(count, k) for count in counts)
    segments = segments or (1 if up else segments_of(pixels, steps))
    groups = [norm.group for norm in norms]
    if tile is None:
        # Segments have a second total; norms need registers; and a 1x1 convolution is over too soon.
        most = 64 * 64 if segments > 1 else 128 * 128 if norms or kernel == 1 else 128 * 256
        few = _hopper(x.device) and phases * pixels >= 128  # statistics of several samples are not few
        spare = few if norms else residual is None and not flat
        tile = tile_of(
            batch * pixels,
            cout,
            k,
            x.dtype,
            most=most,
            spare=spare,
            shared=_shared(x.device),
            phases=phases,
            pixels=pixels if norms else 0,
            group=max(groups, default=1),
        )
    tiles, across = triton.cdiv(batch * pixels, tile.m), triton.cdiv(cout, tile.n)
    together = max(1, pixels // tile.m) if norms else 1  # tiles of a sample that wait for each other
    exchange = len(norms) > 0 and together * phases > 1
    split = segments > 1 and not exchange and (side_by_side(tiles * across) if split is None else split)
    part_bits = statistics_rows(pixels).bit_length() - 1
    if workspace is None and (split or exchange):
        statistics = 2 * like.numel() // min(groups, default=1) >> part_bits
        floats = tiles * across * segments * tile.m * tile.n if split else statistics
        workspace = torch.empty(floats, dtype=torch.float32, device=x.device)
    if counters is None and (split or exchange):
        counters = torch.zeros(tiles * across, dtype=torch.int32, device=x.device)

    unit = 8 if all(c % 8 == 0 for c in (c0, c1, s0, s1)) else 1
    apart = cout if row is None else row.stride(0)
    cout_unit = 8 if cout % 8 == 0 and apart % 8 == 0 else 1
    normalised, other = (_norm(norms[i] if i < len(norms) else None, like) for i in range(2))
    interpreted = triton.knobs.runtime.interpret
    # The interpreter runs one program after the other: in its first run all statistics are left, in the second found.
    for _ in range(2 if interpreted and exchange else 1):
        conv_kernel[(tiles * phases * across, segments if split else 1)](
            x,
            _or(second, x),
            weight,
            _or(shortcut_x, x),
            _or(shortcut_second, x),
            _or(shortcut_weight, weight),
            _or(bias, like),
            _or(row, like),
            _or(residual, like),
            like,
            _or(workspace, like),
            _or(counters, like),
            *normalised,
            *other,
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
            ONE_SAMPLE=pixels % tile.m == 0,
            FULL_COUT=cout % tile.n == 0,
            WIDE=interpreted and x.dtype == torch.bfloat16,
            COLUMN_BITS=tile.n.bit_length() - 1,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BIAS=bias is not None,
            ROW=row is not None,
            RESIDUAL=residual is not None,
            SCALED=scale != 1.0,
            RAW=out is not None,
            PIXEL_BITS=(phases * pixels).bit_length() - 1 if norms else 0,
            PART_BITS=part_bits,
            UNIT_BITS=min(groups, default=1).bit_length() - 1,
            EXCHANGE=exchange,
            WAIT=not interpreted,
            TILES=together,
            **_constants(norms),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )


def _norm(norm: NormOut | None, other: torch.Tensor) -> list[torch.Tensor | int | float]:
    """The kernel's arguments of a norm."""
    if norm is None:
        return [other] * 5 + [0, 0, 0.0]
    scale, shift = _or(norm.scale, other), _or(norm.shift, other)
    return [norm.out, norm.weight, norm.bias, scale, shift, scale.stride(0), shift.stride(0), norm.eps]


def _constants(norms: Sequence[NormOut]) -> dict[str, int | bool]:
    """What is compiled for the norms."""
    constants: dict[str, int | bool] = {"NORMS": len(norms)}
    for i, prefix in enumerate(("", "OTHER_")):
        norm = norms[i] if i < len(norms) else None
        constants[prefix + "GROUP_BITS"] = norm.group.bit_length() - 1 if norm else 0
        constants[prefix + "SCALE"] = norm is not None and norm.scale is not None
        constants[prefix + "SILU"] = norm is not None and norm.silu
    return constants


@lru_cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have."""
    if device.type != "cuda":
        return 232448
    return driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


@lru_cache
def _hopper(device: torch.device) -> bool:
    """Whether a thread has few columns of a product: a warp of Blackwell's has 32 rows, and a thread all of a row."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is not used must still be one."""
    return other if tensor is None else tensor

"""GroupNorm of samples of any size: statistics of tiles of positions, and the kernel that merges and applies them.

A convolution that stores such statistics takes the first kernel's place. They are of units of channels, not of groups,
since a skip connection is normalised twice, in groups of different sizes. They are merged by the formula of Chan, Golub
& LeVeque (1979), in the order of the tiles:

    n = sum n_i,  mean = sum n_i mean_i / n,  M2 = sum M2_i + n_i (mean_i - mean)^2.

A tile's mean is one float32: half an ulp of it is what the result may be off, in units of the deviation. Not measured
on a GPU.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .group_norm_parts import Tile, affine, by_unit, columns, given, in_group, in_tile, load_tile, normalised, unit_of

TILES = 64  # of positions, a sample, at most, where this file's own kernel makes the statistics
CHUNK = 32  # tiles that are merged at a time, at most
WIDE = 64  # bytes of a position that a program reads at least: a DRAM access
EACH = 32  # elements a thread
MANY = 64  # and of a large sample's: a channel's numbers are shared by more, at 80 to 130 registers [sm_90]
LARGE = 4096  # positions of a large sample; a smaller one's programs are smaller, to fill the GPU at small batches


def stream_of(positions: int, group: int, width: int) -> Tile:
    """The tile of the kernels that keep nothing on chip: whole groups, at least 64 bytes of a position."""
    channels = group
    while channels * width < WIDE:
        channels *= 2
    block_c = triton.next_power_of_2(channels)
    threads, each = (256, MANY) if positions >= LARGE else (128, EACH)
    block_p = max(1, min(threads * each // block_c, triton.next_power_of_2(positions)))
    return Tile(channels, block_c, block_p, max(1, min(threads // 32, block_p * block_c // (32 * each))))


def tile_positions(positions: int) -> int:
    """Positions of a tile of `launch_group_statistics`: at least 128, and at most TILES tiles a sample."""
    return max(128, triton.next_power_of_2(triton.cdiv(positions, TILES)))


@triton.jit
def statistics_kernel(
    x_ptr,  # float [B, P, C]
    row_ptr,  # float [B, C], where ROW
    stats_ptr,  # float32 [B, tiles, C / UNIT, 2]
    row_stride,
    P: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,  # positions a program
    BLOCK_P: tl.constexpr,  # at a time
    BLOCK_C: tl.constexpr,
    ROW: tl.constexpr,
):
    """Mean and sum of squared distances from it, of each unit in each tile of positions.

    Distances are from the mean of the tile's first positions; that it is the mean of some of them bounds what the
    difference E[d^2] - E[d]^2 can lose: a factor of as many as there are blocks.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    sample = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    tile = tl.program_id(0) // blocks % tiles
    c = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    there = c < C
    start, step = columns(x_ptr, x_ptr, sample, c, P, C, 0)
    row = tl.load(row_ptr + sample * row_stride + c, there, other=0.0).to(tl.float32) if ROW else 0.0
    end = tl.minimum(tile * TILE + TILE, P)
    p = tile * TILE + tl.arange(0, BLOCK_P)
    x = by_unit(load_tile(start, step, p, row, (p < end)[:, None] & there[None, :], ROW), UNIT)
    shift = in_tile(x) / (tl.minimum(end - tile * TILE, BLOCK_P) * UNIT).to(tl.float32)
    d = tl.where((p < end)[:, None, None], x - shift[None, :, None], 0.0)
    sums, squares = tl.sum(d, axis=2), tl.sum(d * d, axis=2)
    for ahead in range(BLOCK_P, TILE if TILE < P else P, BLOCK_P):
        inside = p + ahead < end
        x = by_unit(load_tile(start, step, p + ahead, row, inside[:, None] & there[None, :], ROW), UNIT)
        d = tl.where(inside[:, None, None], x - shift[None, :, None], 0.0)
        sums += tl.sum(d, axis=2)
        squares += tl.sum(d * d, axis=2)
    total, within = tl.split(tl.sum(tl.join(sums, squares), axis=0))
    off = total / ((end - tile * TILE) * UNIT).to(tl.float32)
    u = tl.program_id(0) % blocks * (BLOCK_C // UNIT) + tl.arange(0, BLOCK_C // UNIT)
    at = stats_ptr + (sample * tiles + tile) * (C // UNIT * 2) + u * 2
    tl.store(at, shift + off, u < C // UNIT)
    tl.store(at + 1, tl.maximum(within - total * off, 0.0), u < C // UNIT)


@triton.jit
def merged(
    stats_ptr,
    second_stats_ptr,
    sample,
    u,  # units of the program's channels
    P: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    SECOND_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALONE: tl.constexpr,
):
    """Of each unit's group: a mean, what it lacks, and the variance. Chan's formula, in the order of the tiles.

    The formula's differences are from a mean that is summed first, so that equal tiles have none.
    """
    units: tl.constexpr = GROUP // UNIT
    tiles: tl.constexpr = (P + TILE - 1) // TILE
    second_tiles: tl.constexpr = (P + SECOND_TILE - 1) // SECOND_TILE if C1 else 0
    of_x = u < C0 // UNIT
    begin, begin_2 = sample * (tiles * (C0 // UNIT * 2)), sample * (second_tiles * (C1 // UNIT * 2))
    start = tl.where(of_x, stats_ptr + begin + u * 2, second_stats_ptr + begin_2 + (u - C0 // UNIT) * 2)
    step = tl.where(of_x, C0 // UNIT * 2, C1 // UNIT * 2).to(tl.int64)[None, :]
    size = tl.where(of_x, TILE, SECOND_TILE)[None, :]
    there = (u < (C0 + C1) // UNIT)[None, :]
    t = tl.arange(0, BLOCK_T)[:, None]
    totals = tl.zeros((BLOCK_T, u.shape[0]), tl.float32)
    for first in range(0, max(tiles, second_tiles), BLOCK_T):
        count = tl.minimum(P - (t + first) * size, size)  # positions
        inside = (count > 0) & there
        mean = tl.load(start[None, :] + (t + first) * step, inside, other=0.0)
        totals += count.to(tl.float32) * mean
    group_mean = in_group(tl.sum(totals, axis=0), units, ALONE) / (P * units)
    totals = tl.zeros((BLOCK_T, u.shape[0]), tl.float32)
    squares = tl.zeros((BLOCK_T, u.shape[0]), tl.float32)
    for first in range(0, max(tiles, second_tiles), BLOCK_T):
        count = tl.minimum(P - (t + first) * size, size)
        inside = (count > 0) & there
        at = start[None, :] + (t + first) * step
        away = tl.where(inside, tl.load(at, inside, other=0.0) - group_mean[None, :], 0.0)
        part = count.to(tl.float32) * away
        totals += part
        squares += tl.load(at + 1, inside, other=0.0) + UNIT * part * away
    off = in_group(tl.sum(totals, axis=0), units, ALONE) / (P * units)
    return group_mean, off, in_group(tl.sum(squares, axis=0), units, ALONE) / (P * GROUP) - off * off


@triton.jit
def apply_kernel(
    x_ptr,  # float [B, P, C0]
    second_ptr,  # float [B, P, C1]
    stats_ptr,  # float32 [B, tiles, C0 / UNIT, 2]
    second_stats_ptr,  # float32 [B, second tiles, C1 / UNIT, 2]
    out_ptr,  # float [B, P, C]
    weight_ptr,  # float [C]
    bias_ptr,  # float [C]
    row_ptr,  # float [B, C], where ROW
    scale_ptr,  # float [B, C], where SCALE
    shift_ptr,  # float [B, C], where SCALE
    row_stride,
    scale_stride,
    shift_stride,
    eps,
    P: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    SECOND_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROW: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
):
    """Each program merges the statistics of its groups, and normalises some of their positions."""
    programs: tl.constexpr = (C0 + C1 + CHANNELS - 1) // CHANNELS
    blocks: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    sample = (tl.program_id(0) // (programs * blocks)).to(tl.int64)
    k = tl.arange(0, BLOCK_C)
    first = tl.program_id(0) % programs * CHANNELS
    c = first + k
    p = tl.program_id(0) // programs % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    there = (k < CHANNELS) & (c < C0 + C1)
    inside = (p < P)[:, None] & there[None, :]
    start, step = columns(x_ptr, second_ptr, sample, c, P, C0, C1)
    row = tl.load(row_ptr + sample * row_stride + c, there, other=0.0).to(tl.float32) if ROW else 0.0
    x = by_unit(load_tile(start, step, p, row, inside, ROW), UNIT)
    a, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, sample, c, there, SCALE)
    alone: tl.constexpr = GROUP == CHANNELS
    u = first // UNIT + tl.arange(0, BLOCK_C // UNIT)
    mean, off, variance = merged(
        stats_ptr, second_stats_ptr, sample, u, P, C0, C1, GROUP, UNIT, TILE, SECOND_TILE, BLOCK_T, alone
    )
    y = normalised(x - mean[None, :, None], off, variance, eps, a, b, UNIT, SILU)
    start, step = columns(out_ptr, out_ptr, sample, c, P, C0 + C1, 0)
    tl.store(start[None, :] + p.to(tl.int64)[:, None] * step[None, :], y, inside)


def launch_group_statistics(
    x: torch.Tensor, stats: torch.Tensor, *, tile: int, row: torch.Tensor | None = None
) -> None:
    """Fill `stats` with what `launch_group_norm_apply` merges: the statistics of x, or of x + row.

    Args:
        x: [B, H, W, C], contiguous, float32, bfloat16 or float16.
        stats: float32 [B, ceil(H W / tile), C / unit, 2], contiguous: for each tile of positions, in order, and each
            unit of adjacent channels, the mean and the sum of squared distances from it. `unit` is a power of two that
            divides C.
        tile: positions a tile; its choice, as that of `unit`, decides the last bits.
        row: [B, C], its last dimension contiguous, or None.
    """
    if x.numel() == 0:
        return
    batch, positions, channels = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    unit = channels // stats.shape[2]
    by = stream_of(positions, unit, x.element_size())
    block_p = min(by.block_p, triton.next_power_of_2(tile))
    statistics_kernel[(batch * triton.cdiv(channels, by.block_c) * stats.shape[1],)](
        x,
        x if row is None else row,
        stats,
        0 if row is None else row.stride(0),
        P=positions,
        C=channels,
        UNIT=unit,
        TILE=tile,
        BLOCK_P=block_p,
        BLOCK_C=by.block_c,
        ROW=row is not None,
        num_warps=max(1, min(8, block_p * by.block_c // (32 * EACH))),
        enable_fp_fusion=True,
    )


def launch_group_norm_apply(
    x: torch.Tensor,
    second: torch.Tensor | None,
    stats: torch.Tensor,
    second_stats: torch.Tensor | None,
    out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    eps: float,
    tile: int,
    second_tile: int = 1,
    row: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> None:
    """`launch_group_norm` with statistics that are there already, of tiles of x's positions and of second's.

    Args:
        stats, second_stats: as `launch_group_statistics` describes them, of x + row and of second + row: float32
            [B, ceil(H W / tile), C0 / unit, 2] and [B, ceil(H W / second_tile), C1 / unit, 2], of the same unit, which
            divides a group.
        tile, second_tile: positions a tile.
    """
    if x.numel() == 0:
        return
    batch, positions, c0 = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    c1 = 0 if second is None else second.shape[3]
    group = (c0 + c1) // groups
    by = stream_of(positions, group, x.element_size())
    tiles = max(stats.shape[1], 0 if second_stats is None else second_stats.shape[1])
    programs = triton.cdiv(c0 + c1, by.channels) * triton.cdiv(positions, by.block_p)
    apply_kernel[(batch * programs,)](
        x,
        x if second is None else second,
        stats,
        stats if second_stats is None else second_stats,
        out,
        weight,
        bias,
        *given(x, row, scale, shift),
        eps,
        P=positions,
        C0=c0,
        C1=c1,
        GROUP=group,
        UNIT=c0 // stats.shape[2],
        TILE=tile,
        SECOND_TILE=second_tile,
        BLOCK_T=min(CHUNK, triton.next_power_of_2(tiles)),
        CHANNELS=by.channels,
        BLOCK_P=by.block_p,
        BLOCK_C=by.block_c,
        ROW=row is not None,
        SCALE=scale is not None,
        SILU=silu,
        num_warps=by.warps,
        enable_fp_fusion=True,
    )


def split_group_norm(
    x: torch.Tensor,
    second: torch.Tensor | None,
    out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    row: torch.Tensor | None = None,
    **options: Any,
) -> None:
    """`launch_group_norm` by statistics of tiles, for samples of any size: x is read twice."""
    sources = [v for v in (x, second) if v is not None]
    positions, widths = x.shape[1] * x.shape[2], [v.shape[3] for v in sources]
    tile = tile_positions(positions)
    unit = unit_of(math.gcd(sum(widths) // groups, *widths))
    made = []
    for v, part in zip(sources, [None, None] if row is None else row.split(widths, 1), strict=False):
        shape = (v.shape[0], triton.cdiv(positions, tile), v.shape[3] // unit, 2)
        made.append(v.new_empty(shape, dtype=torch.float32))
        launch_group_statistics(v, made[-1], tile=tile, row=part)
    statistics = (made[0], None if second is None else made[1])
    launch_group_norm_apply(
        x, second, *statistics, out, weight, bias, groups=groups, tile=tile, second_tile=tile, row=row, **options
    )

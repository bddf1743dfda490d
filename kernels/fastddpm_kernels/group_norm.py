"""GroupNorm of NHWC activations, with what stands around it in a UNet: time row, scale and shift, SiLU.

One launch where a program can hold whole groups of a sample in registers: x is read once. Else `group_norm_tiles`:
statistics of each tile of positions, then a kernel that merges and applies them.

Statistics are float32, of distances from a mean, never E[x^2] - E[x]^2: the mean is summed first, then the distances d
from it and their squares, and variance = E[d^2] - E[d]^2, where E[d] is but the rounding of the mean (the corrected
two-pass algorithm of Chan, Golub & LeVeque 1983).

No order of summation depends on the batch or on a sample's place in it. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from .group_norm_parts import (
    Tile,
    affine,
    both_in_tile,
    by_unit,
    columns,
    given,
    in_group,
    in_tile,
    load_tile,
    normalised,
    unit_of,
)
from .group_norm_tiles import launch_group_norm_apply, launch_group_statistics, split_group_norm

__all__ = ["launch_group_norm", "launch_group_norm_apply", "launch_group_statistics", "split_group_norm"]

# The one-pass kernel's elements a program, at most: 64 of each of 512 threads, float32 in 105 registers [sm_90].
ONE_PASS = 32768
EACH = 32  # elements a thread of it where that is enough: at most 64 registers, so that 32 warps fit an SM
RUN = 32  # bytes of a position that a program reads at least: a sector, the unit of traffic from DRAM and L2
WIDE = 64  # and what it reads where the tile still is small: a DRAM access
LARGE, SMALL = 8192, 1024  # elements from which a tile is not widened any further for the one, the other


def tile_of(positions: int, channels: int, group: int, width: int) -> Tile | None:
    """The one-pass kernel's tile for groups of `group` channels, elements of `width` bytes; None where none fits.

    Adjacent groups are taken together until a position's run of them is a sector (32 bytes), as long as registers hold
    them; and to two sectors or more as long as the tile is small. Not further: small tiles fill the GPU at small
    batches, and where several programs share an SM one's loads overlap another's arithmetic.
    """
    block_p = triton.next_power_of_2(positions)
    taken = 0
    for size in (group * 2**k for k in range(channels.bit_length())):
        elements = block_p * triton.next_power_of_2(size)
        enough = LARGE if taken * width >= RUN else ONE_PASS
        if size > channels or elements > (SMALL if taken * width >= WIDE else enough):
            break
        taken = size
    if taken == 0 or taken * width < min(RUN, channels * width):
        return None
    block_c = triton.next_power_of_2(taken)
    return Tile(taken, block_c, block_p, max(1, min(16, block_p * block_c // (32 * EACH))))


@triton.jit
def group_norm_kernel(
    x_ptr,  # float [B, P, C0]
    second_ptr,  # float [B, P, C1]
    out_ptr,  # float [B, P, C]
    weight_ptr,  # float [C]
    bias_ptr,  # float [C]
    row_ptr,  # float [B, C], where ROW
    scale_ptr,  # float [B, C], where SCALE
    shift_ptr,  # float [B, C], where SCALE
    row_stride,  # elements between samples
    scale_stride,
    shift_stride,
    eps,
    P: tl.constexpr,  # positions
    C0: tl.constexpr,
    C1: tl.constexpr,
    GROUP: tl.constexpr,  # channels a group
    UNIT: tl.constexpr,  # channels a unit
    CHANNELS: tl.constexpr,  # of a program: whole groups
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROW: tl.constexpr,
    SCALE: tl.constexpr,
    SILU: tl.constexpr,
):
    """One pass: a program has all positions of some groups of one sample."""
    programs: tl.constexpr = (C0 + C1 + CHANNELS - 1) // CHANNELS
    # The programs of one sample are neighbours: what one leaves of a 64-byte DRAM access, the next takes from L2.
    sample = (tl.program_id(0) // programs).to(tl.int64)
    k = tl.arange(0, BLOCK_C)
    c = tl.program_id(0) % programs * CHANNELS + k
    p = tl.arange(0, BLOCK_P)
    there = (k < CHANNELS) & (c < C0 + C1)
    inside = (p < P)[:, None] & there[None, :]
    start, step = columns(x_ptr, second_ptr, sample, c, P, C0, C1)
    row = tl.load(row_ptr + sample * row_stride + c, there, other=0.0).to(tl.float32) if ROW else 0.0
    x = by_unit(load_tile(start, step, p, row, inside, ROW), UNIT)
    units: tl.constexpr = GROUP // UNIT
    alone: tl.constexpr = GROUP == CHANNELS
    count: tl.constexpr = P * GROUP
    mean = in_group(in_tile(x), units, alone) / count
    d = x - mean[None, :, None]
    if BLOCK_P > P:
        d = tl.where((p < P)[:, None, None], d, 0.0)
    total, squares = both_in_tile(d, d * d)
    off = in_group(total, units, alone) / count
    variance = in_group(squares, units, alone) / count - off * off
    a, b = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, sample, c, there, SCALE)
    y = normalised(d, off, variance, eps, a, b, UNIT, SILU)
    start, step = columns(out_ptr, out_ptr, sample, c, P, C0 + C1, 0)
    tl.store(start[None, :] + p.to(tl.int64)[:, None] * step[None, :], y, inside)


def launch_group_norm(
    x: torch.Tensor,
    second: torch.Tensor | None,
    out: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    groups: int,
    eps: float,
    row: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> None:
    """Fill `out` with `reference_unet.group_norm`: act(norm(x + row) * weight + bias), or * (1 + scale) + shift.

    One launch where a program can hold whole groups of a sample; else two, three for two sources, and statistics
    between them.

    Args:
        x: [B, H, W, C0], contiguous, float32, bfloat16 or float16.
        second: [B, H, W, C1], in x's dtype, the channels that follow, or None; groups may have channels of both.
        out: [B, H, W, C0 + C1], in x's dtype; x itself where there is no second.
        weight, bias: [C0 + C1], any float dtype, as are the following.
        groups: how many; they divide C0 + C1.
        row, scale, shift: [B, C0 + C1], their last dimension contiguous, or None: a slice of a table is no copy, and a
            row that all samples share is `expand`ed.
        silu: whether to apply SiLU.
    """
    if x.numel() == 0:
        return
    batch, positions, c0 = x.shape[0], x.shape[1] * x.shape[2], x.shape[3]
    c1 = 0 if second is None else second.shape[3]
    group = (c0 + c1) // groups
    by = tile_of(positions, c0 + c1, group, x.element_size())
    if by is None:
        split_group_norm(
            x, second, out, weight, bias, groups=groups, eps=eps, row=row, scale=scale, shift=shift, silu=silu
        )
        return
    group_norm_kernel[(batch * triton.cdiv(c0 + c1, by.channels),)](
        x,
        x if second is None else second,
        out,
        weight,
        bias,
        *given(x, row, scale, shift),
        eps,
        P=positions,
        C0=c0,
        C1=c1,
        GROUP=group,
        UNIT=unit_of(group),
        CHANNELS=by.channels,
        BLOCK_P=by.block_p,
        BLOCK_C=by.block_c,
        ROW=row is not None,
        SCALE=scale is not None,
        SILU=silu,
        num_warps=by.warps,
        enable_fp_fusion=True,
    )

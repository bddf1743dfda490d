"""What the GroupNorm kernels share: tiles of NHWC activations, sums over units and groups, and the result.

A tile is [positions, channels]: whole groups of one sample. A unit is the power of two of adjacent channels that sums
are kept of. It divides a group, and a thread's vector has whole units (or a unit whole vectors), so that most of a sum
stays inside a thread, and what threads exchange is one number a unit. A group of 12 channels is three units of 4.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tile(NamedTuple):
    """What a program takes of a sample, by shape alone (the batch must not change the order of a sum)."""

    channels: int  # whole groups
    block_c: int  # the power of two that they are padded to
    block_p: int  # positions
    warps: int


def unit_of(group: int) -> int:
    """Channels of a unit: the largest power of two that divides the group."""
    return group & -group


def given(x: torch.Tensor, *by_sample: torch.Tensor | None) -> list[torch.Tensor | int]:
    """Pointers and strides for a kernel: where there is none, x and 0."""
    pointers = [x if v is None else v for v in by_sample]
    return pointers + [0 if v is None else v.stride(0) for v in by_sample]


@triton.jit
def columns(x_ptr, second_ptr, sample, c, P: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Each channel's address at position 0 of the sample, and from there to the next position."""
    if C1 == 0:
        return x_ptr + sample * (P * C0) + c, tl.full(c.shape, C0, tl.int64)
    in_x = c < C0
    start = tl.where(in_x, x_ptr + sample * (P * C0) + c, second_ptr + sample * (P * C1) + (c - C0))
    return start, tl.where(in_x, C0, C1).to(tl.int64)


@triton.jit
def load_tile(start, step, p, row, inside, ROW: tl.constexpr):
    """x (+ row) of the positions p, float32; 0 outside."""
    x = tl.load(start[None, :] + p.to(tl.int64)[:, None] * step[None, :], inside, other=0.0).to(tl.float32)
    if ROW:
        x = tl.where(inside, x + row[None, :], 0.0)
    return x


@triton.jit
def by_unit(v, UNIT: tl.constexpr):
    """[positions, channels] as [positions, units, UNIT]; which thread has what stays as it was."""
    return tl.reshape(v, (v.shape[0], v.shape[1] // UNIT, UNIT))


@triton.jit
def in_tile(v):
    """The sum of each unit, [units]: first inside a thread."""
    return tl.sum(tl.sum(v, axis=2), axis=0)


@triton.jit
def both_in_tile(v, w):
    """The sums of each unit of both, [units]: exchanged between threads at once."""
    return tl.split(tl.sum(tl.join(tl.sum(v, axis=2), tl.sum(w, axis=2)), axis=0))


@triton.jit
def in_group(v, UNITS: tl.constexpr, ALONE: tl.constexpr):
    """For each unit the sum over the UNITS units of its group. ALONE: the tile is one group."""
    if UNITS == 1:
        return v
    u = tl.arange(0, v.shape[0])
    if ALONE:
        return tl.zeros_like(v) + tl.sum(tl.where(u < UNITS, v, 0.0))
    same = (u // UNITS)[:, None] == (u // UNITS)[None, :]
    return tl.sum(tl.where(same, v[:, None], 0.0), axis=0)


@triton.jit
def silu_of(z):
    """z / (1 + exp(-z)) in 6 instructions; a division and tl.exp, which handle denormals, make it 12 [sm_90]."""
    root = tl.rsqrt(1.0 + tl.exp2(z * -1.4426950408889634))
    return z * root * root


@triton.jit
def affine(
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, scale_stride, shift_stride, sample, c, there, SCALE: tl.constexpr
):
    """What a channel's normalised values are multiplied with, and what is added."""
    a = tl.load(weight_ptr + c, there, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + c, there, other=0.0).to(tl.float32)
    if SCALE:
        factor = 1.0 + tl.load(scale_ptr + sample * scale_stride + c, there, other=0.0).to(tl.float32)
        a *= factor
        b = tl.fma(b, factor, tl.load(shift_ptr + sample * shift_stride + c, there, other=0.0).to(tl.float32))
    return a, b


@triton.jit
def normalised(d, off, variance, eps, a, b, UNIT: tl.constexpr, SILU: tl.constexpr):
    """The result, of distances d from a mean which is `off` too small; [positions, channels]."""
    deviation = tl.rsqrt(tl.maximum(variance, 0.0) + eps)
    a = tl.reshape(a, (a.shape[0] // UNIT, UNIT)) * deviation[:, None]
    b = tl.reshape(b, (b.shape[0] // UNIT, UNIT)) - off[:, None] * a
    y = tl.fma(d, tl.broadcast_to(a[None], d.shape), tl.broadcast_to(b[None], d.shape))
    if SILU:
        y = silu_of(y)
    return tl.reshape(y, (d.shape[0], d.shape[1] * UNIT))

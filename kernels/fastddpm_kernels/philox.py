"""Philox4x32-10 and Box-Muller for the Triton kernels; `reference` has the torch twins, `constants` the numbers."""

import torch
import triton
import triton.language as tl

from . import constants as const
from .lanes import element, grid, sample_and_lane

M0, M1 = tl.constexpr(const.PHILOX_M0), tl.constexpr(const.PHILOX_M1)
W0, W1 = tl.constexpr(const.PHILOX_W0), tl.constexpr(const.PHILOX_W1)
ROUNDS = tl.constexpr(const.PHILOX_ROUNDS)
U_SCALE, U_OFFSET = tl.constexpr(const.U_SCALE), tl.constexpr(const.U_OFFSET)
MINUS_TWO_LN2 = tl.constexpr(const.MINUS_TWO_LN2)
L0, L1, L2, L3, L4, L5, L6 = (tl.constexpr(c) for c in const.LOG)
S0, S1, S2, S3, S4 = (tl.constexpr(c) for c in const.SIN)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, rounds: tl.constexpr = ROUNDS):
    """Four uint32 words from four counter words and two key words, all uint32 (scalars or blocks).

    A 64-bit product is one IMAD.WIDE; `tl.umulhi` beside a 32-bit product would be two multiplications. The key
    schedule goes through uint64 so that the interpreter, like the GPU, wraps without a warning.
    """
    for _ in tl.static_range(rounds):
        p0 = c0.to(tl.uint64) * M0
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + W0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def sin_turns(a):
    """sin(2 pi a) for |a| <= 1/4."""
    square = a * a
    return a * ((((S4 * square + S3) * square + S2) * square + S1) * square + S0)


@triton.jit
def box_muller(w0, w1):
    """Two float32 normals from two uint32 words; line by line `reference.box_muller`."""
    u0 = w0.to(tl.float32) * U_SCALE + U_OFFSET
    u1 = w1.to(tl.float32) * U_SCALE + U_OFFSET
    bits = u0.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    log = (((((L6 * f + L5) * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    r = tl.sqrt(f * log + exponent.to(tl.float32) * MINUS_TWO_LN2)
    s = u1 - 0.5
    a = tl.abs(s) - 0.25
    b = 0.25 - tl.abs(a)
    b = tl.where(s > 0, -b, b)
    return r * sin_turns(a), r * sin_turns(b)


@triton.jit
def normal4(seed, step, stream: tl.constexpr, lane):
    """The four normals of each lane, for a sample's 64-bit seed (int64) and a step (int32), by the noise contract."""
    key = seed.to(tl.uint64)
    step = step.to(tl.uint32)
    c2 = tl.full(lane.shape, stream, tl.uint32)
    c3 = tl.full(lane.shape, 0, tl.uint32)
    w0, w1, w2, w3 = philox4x32(lane.to(tl.uint32), step, c2, c3, key.to(tl.uint32), (key >> 32).to(tl.uint32))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit(do_not_specialize=["step"])  # a step of 1 would become a constant, and others recompile
def normal_kernel(
    out_ptr,  # float32 [B, n]
    seeds_ptr,  # int64 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    step,
    stream: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane = sample_and_lane(BLOCK)
    z = normal4(tl.load(seeds_ptr + sample), step, stream, lane)
    for k in tl.static_range(4):
        e, inside = element(lane, k, n, q)
        tl.store(out_ptr + sample * n + e, z[k], inside)


def launch_normal(out: torch.Tensor, seeds: torch.Tensor, *, step: int, stream: int, block: int = 512) -> None:
    """Fill `out`, float32 [B, ...] contiguous, with the noise of `seeds`, int64 [B]."""
    if out.numel() == 0:
        return
    n = out[0].numel()
    q = const.chunk(n)
    normal_kernel[grid(out.shape[0], q, block)](
        out, seeds, n, q, step, stream, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )

"""Philox4x32-10 and Box-Muller for the Triton kernels; `reference` has the torch twins, `constants` the numbers."""

import torch
import triton
import triton.language as tl

from . import constants as const
from .lanes import division, grid, program

M0, M1 = tl.constexpr(const.PHILOX_M0), tl.constexpr(const.PHILOX_M1)
W0, W1 = tl.constexpr(const.PHILOX_W0), tl.constexpr(const.PHILOX_W1)
ROUNDS = tl.constexpr(const.PHILOX_ROUNDS)
U_SCALE, U_OFFSET = tl.constexpr(const.U_SCALE), tl.constexpr(const.U_OFFSET)
LOG_SPLIT, LOG_EXPONENT = tl.constexpr(const.LOG_SPLIT), tl.constexpr(const.LOG_EXPONENT)
L0, L1, L2, L3, L4, L5 = (tl.constexpr(c) for c in const.LOG)
S0, S1, S2, S3, S4 = (tl.constexpr(c) for c in const.SIN)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, zero, rounds: tl.constexpr = ROUNDS):
    """Four uint32 words from four counter words and two key words, all uint32 (scalars or blocks).

    `zero` is a uint64 0 that the compiler can't see. With a constant multiplier it would compute the product's high
    and low word by two multiplications (IMAD.HI, IMAD) for what is one (IMAD.WIDE): 46 instructions an element of the
    DDPM step become 49 [compiled for sm_90]. Sums go through uint64 so that the interpreter wraps without a warning.
    """
    m0 = (zero + M0).to(tl.uint32).to(tl.uint64)
    m1 = (zero + M1).to(tl.uint32).to(tl.uint64)
    for _ in tl.static_range(rounds):
        p0 = c0.to(tl.uint64) * m0
        p1 = c2.to(tl.uint64) * m1
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
    u = w0.to(tl.float32) * U_SCALE + U_OFFSET
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - LOG_SPLIT) & -(1 << 23)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    log = ((((L5 * f + L4) * f + L3) * f + L2) * f + L1) * f + L0
    r = tl.sqrt(f * log + exponent.to(tl.float32) * LOG_EXPONENT)
    turns = w1.to(tl.int32, bitcast=True)
    a = 0.25 - tl.abs(turns.to(tl.float32) * U_SCALE)
    b = 0.25 - tl.abs(a)
    b = (b.to(tl.int32, bitcast=True) | (turns & -(1 << 31))).to(tl.float32, bitcast=True)
    return r * sin_turns(a), r * sin_turns(b)


@triton.jit
def normal4(seed, step, stream: tl.constexpr, lane, q):
    """Normals [4, BLOCK] for the lanes [1, BLOCK] of a sample with an int64 seed, at a step; by the noise contract."""
    key = seed.to(tl.uint64)
    lane = lane.to(tl.uint32)
    c2 = tl.full(lane.shape, stream, tl.uint32)
    c3 = tl.full(lane.shape, 0, tl.uint32)
    zero = (q >> 31).to(tl.uint64)  # q is below 2^31; the compiler doesn't know
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(lane, step.to(tl.uint32), c2, c3, k0, k1, zero)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    k = tl.arange(0, 4)[:, None]  # known in every register: these selections cost nothing
    return tl.where(k < 2, tl.where(k == 0, z0, z1), tl.where(k == 2, z2, z3))


@triton.jit(do_not_specialize=["step"])  # a step of 1 would become a constant, and others recompile
def normal_kernel(
    out_ptr,  # float32 [B, n]
    seeds_ptr,  # int64 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    step,
    stream: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane, e, inside = program(n, q, FULL, VECTOR, BLOCK)
    z = normal4(tl.load(seeds_ptr + sample), step, stream, lane, q)
    tl.store(out_ptr + sample * n + e, z, inside)


def launch_normal(out: torch.Tensor, seeds: torch.Tensor, *, step: int, stream: int, block: int | None = None) -> None:
    """Fill `out`, float32 [B, ...] contiguous, with the noise of `seeds`, int64 [B]."""
    if out.numel() == 0:
        return
    n = out[0].numel()
    q, by = const.chunk(n), division(n, block)
    normal_kernel[grid(out.shape[0], q, by.block)](
        out,
        seeds,
        n,
        q,
        step,
        stream,
        FULL=by.full,
        VECTOR=by.vector,
        BLOCK=by.block,
        num_warps=by.warps,
        enable_fp_fusion=True,
    )

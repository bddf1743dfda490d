"""Self-attention of the UNet on NHWC activations: softmax(q k^T / sqrt(d)) v, read from one packed product.

The block is three launches: q, k and v of the normalised tokens in one product; this kernel; and the projection with
its residual (`linear.py`, or `conv.py` where a norm is behind it). A program owns BLOCK_M queries of one head of one
sample, keeps their scores on chip, and goes over the keys once, in order, with a running maximum and sum in float32
(Milakov & Gimelshein 2018; Dao et al. 2022). So bits depend neither on the batch nor on a sample's place in it. Not
measured on a GPU.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .products import interpreted, multiplied


class AttentionTiles(NamedTuple):
    """How one head of one sample is divided."""

    block_m: int  # queries of a program
    block_n: int  # keys at a time
    block_v: int  # columns of v of a program: all, or a half where the head has 512
    warps: int
    stages: int


def attention_tiles(tokens: int, head_dim: int, itemsize: int) -> AttentionTiles:
    """The division by shape alone, never by the batch.

    Raises `ValueError` for heads of more than 512 dimensions, or more than 256 in float32.
    """
    wide = max(16, triton.next_power_of_2(head_dim))
    if wide > (512 if itemsize == 2 else 256):
        raise ValueError(
            f"a head has {head_dim} dimensions of {itemsize} bytes; this kernel takes 512 of 2 bytes or 256 of 4: "
            "use torch's scaled_dot_product_attention"
        )
    if itemsize == 4:  # without tensor cores; larger blocks spill
        return AttentionTiles(16, 16, min(wide, 128), 4, 1)
    few = max(16, triton.next_power_of_2(tokens))
    if few <= 32:  # one block of keys: 16 rows are enough for a warp's instruction
        return AttentionTiles(few, few, min(wide, 256), 1 if wide <= 64 else 4, 1)
    if few == 64:
        return AttentionTiles(64, 64, min(wide, 256), 8 if wide > 128 else 4, 1)
    if wide <= 64:  # what limits these is 2^x; with 128 keys at a time wider heads have 243 registers [sm_80]
        return AttentionTiles(128, 128 if wide <= 16 else 64, wide, 8, 2)
    # One warpgroup of 64 queries: 204 to 254 registers at 256, and four programs a sample of 256 tokens.
    return AttentionTiles(64, 32 if wide == 512 else 64, min(wide, 256), 4, 2)


@triton.jit
def attention_kernel(
    qkv_ptr,  # [B, TOKENS, 3, HEADS, HEAD_DIM]
    out_ptr,  # [B, TOKENS, HEADS, HEAD_DIM]
    scale,  # float: log2(e) / sqrt(HEAD_DIM)
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDE: tl.constexpr,  # HEAD_DIM, to the next power of two
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Neighbouring programs: the slices of v, then the heads, which share the sectors of memory, then the queries.
    slices: tl.constexpr = WIDE // BLOCK_V
    blocks: tl.constexpr = (TOKENS + BLOCK_M - 1) // BLOCK_M
    row: tl.constexpr = 3 * HEADS * HEAD_DIM
    pid = tl.program_id(0)
    part = pid % slices
    head = pid // slices % HEADS
    query = pid // (slices * HEADS) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    sample = (pid // (slices * HEADS * blocks)).to(tl.int64)

    d = tl.arange(0, WIDE)
    e = part * BLOCK_V + tl.arange(0, BLOCK_V)
    key = tl.arange(0, BLOCK_N)
    qkv = qkv_ptr + sample * (TOKENS * row) + head * HEAD_DIM
    q = tl.load(
        qkv + query.to(tl.int64)[:, None] * row + d[None, :],
        (query < TOKENS)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )
    k_ptrs = qkv + HEADS * HEAD_DIM + key.to(tl.int64)[:, None] * row + d[None, :]
    v_ptrs = qkv + 2 * HEADS * HEAD_DIM + key.to(tl.int64)[:, None] * row + e[None, :]
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # the highest score so far, in powers of two
    weight = tl.zeros((BLOCK_M,), tl.float32)  # the sum of 2^(score - top)
    total = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in tl.range(0, TOKENS, BLOCK_N, num_stages=STAGES):
        there = start + key < TOKENS
        k = tl.load(k_ptrs, there[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        score = multiplied(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), WIDEN)
        if TOKENS % BLOCK_N != 0:
            score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale)
        p = tl.exp2(score * scale - higher[:, None])
        shrunk = tl.exp2(top - higher)
        weight = weight * shrunk + tl.sum(p, 1)
        total = total * shrunk[:, None]
        v = tl.load(v_ptrs, there[:, None] & (e < HEAD_DIM)[None, :], other=0.0)
        total = multiplied(p.to(v.dtype), v, total, WIDEN)
        top = higher
        k_ptrs += BLOCK_N * row
        v_ptrs += BLOCK_N * row
    total = total / weight[:, None]
    token = sample * TOKENS + query
    tl.store(
        out_ptr + token[:, None] * (HEADS * HEAD_DIM) + head * HEAD_DIM + e[None, :],
        total.to(out_ptr.dtype.element_ty),
        (query < TOKENS)[:, None] & (e < HEAD_DIM)[None, :],
    )


def launch_attention(qkv: torch.Tensor, out: torch.Tensor, *, heads: int, tiles: AttentionTiles | None = None) -> None:
    """out = softmax(q k^T / sqrt(head_dim)) v, of every head of every sample.

    Checks nothing. Both contiguous and 16-byte aligned, of one dtype: bfloat16, float16 or float32. The products take
    that dtype and sum in float32; scores and sums are float32, the weights of v are rounded to the dtype.

    Args:
        qkv: [B, tokens, 3 C] (any number of axes between): a token's q, then k, then v, each head after head.
        out: [B, tokens, C].
        heads: C is heads x head_dim.
        tiles: another division than that of `attention_tiles`.

    Raises:
        ValueError: for a head that is too wide; see `attention_tiles`.
    """
    if out.numel() == 0:
        return
    batch, channels = out.shape[0], out.shape[-1]
    tokens, head_dim = out.numel() // (batch * channels), channels // heads
    by = attention_tiles(tokens, head_dim, qkv.element_size()) if tiles is None else tiles
    wide = max(16, triton.next_power_of_2(head_dim))
    attention_kernel[(batch * triton.cdiv(tokens, by.block_m) * heads * (wide // by.block_v),)](
        qkv,
        out,
        math.log2(math.e) / math.sqrt(head_dim),
        TOKENS=tokens,
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDE=wide,
        BLOCK_M=by.block_m,
        BLOCK_N=by.block_n,
        BLOCK_V=by.block_v,
        STAGES=by.stages,
        WIDEN=interpreted(),
        num_warps=by.warps,
        num_stages=by.stages,
    )

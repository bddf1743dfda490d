"""A matrix product over the channels of NHWC activations: out = (x @ weight + bias (+ residual)) (* factor).

Every position is a row. A program owns a tile of rows and columns and sums over all of K, in an order that K and the
dtype decide: a row's bits depend neither on the number of rows nor on its place among them. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from .conv_tiles import Tile, step_of, tile_of
from .products import interpreted, multiplied


def linear_tile(rows: int, k: int, columns: int, dtype: torch.dtype, *, residual: bool = False) -> Tile:
    """The largest tile, up to 128 x 128, that fills the GPU with programs; all tiles give the same bits.

    A tile of 128 x 128 reads 2/3 as much from L2 as one of 128 x 64, and 1/2 as much as 64 x 64. Not 128 x 256: K is
    short, 4 steps of the usual 256 channels, so what counts is a second program on the multiprocessor, which multiplies
    while this one waits for its first steps or stores its sums. With a residual 128 x 128 takes too many registers for
    a second program on some GPUs; 128 x 64 leaves room for two or three.
    """
    return tile_of(rows, columns, step_of((k,), dtype), dtype, most=128 * (64 if residual else 128))


@triton.jit(do_not_specialize=["rows"])  # one binary a tile, whatever the batch
def linear_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [K, N]
    bias_ptr,  # float32 [N]
    residual_ptr,  # [rows, N], read where RESIDUAL
    out_ptr,  # [rows, N]
    factor,  # float
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Neighbouring programs have the same rows and other columns, so that x comes from memory once.
    across: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    row = (pid // across).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid % across * BLOCK_N + tl.arange(0, BLOCK_N)
    there = row < rows
    inside = column < N

    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + k[:, None].to(tl.int64) * N + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        left = start + k < K
        a = tl.load(x_ptrs, there[:, None] & left[None, :], other=0.0)
        b = tl.load(weight_ptrs, left[:, None] & inside[None, :], other=0.0)
        total = multiplied(a, b, total, WIDEN)
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K * N

    total += tl.load(bias_ptr + column, inside, other=0.0)[None, :]
    at = row[:, None] * N + column[None, :]
    stored = there[:, None] & inside[None, :]
    if RESIDUAL:
        total += tl.load(residual_ptr + at, stored, other=0.0).to(tl.float32)
    if SCALED:
        total *= factor
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), stored)


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    factor: float = 1.0,
    tile: Tile | None = None,
) -> None:
    """out = (x @ weight + bias + residual) * factor.

    Checks nothing. All tensors contiguous and 16-byte aligned; products and sums are float32.

    Args:
        x: [..., K], bfloat16, float16 or float32.
        weight: [K, N], x's dtype. A multiple of 8 for K and N makes every access 128 bits.
        bias: float32 [N].
        out: [..., N], x's dtype. May be `residual` itself.
        residual: [..., N], x's dtype.
        factor: multiplies the sum; 1 / rescale of the module.
        tile: another than that of `linear_tile`.
    """
    if out.numel() == 0:
        return
    k, n = weight.shape
    rows = x.numel() // k
    by = linear_tile(rows, k, n, x.dtype, residual=residual is not None) if tile is None else tile
    linear_kernel[(triton.cdiv(rows, by.m) * triton.cdiv(n, by.n),)](
        x,
        weight,
        bias,
        out if residual is None else residual,
        out,
        factor,
        rows,
        K=k,
        N=n,
        RESIDUAL=residual is not None,
        SCALED=factor != 1.0,
        BLOCK_M=by.m,
        BLOCK_N=by.n,
        BLOCK_K=by.k,
        STAGES=by.stages,
        WIDEN=interpreted(),
        num_warps=by.warps,
        num_stages=by.stages,
    )

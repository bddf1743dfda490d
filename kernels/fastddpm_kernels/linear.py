"""A matrix product over the channels, out = (x @ weight + bias (+ residual)) (* factor), with partial norm statistics.

Rows are the positions of NHWC activations. A program owns a tile of SAMPLES x ROWS rows and BLOCK_N columns and sums
over all of K, in one order: a row's bits depend neither on the batch nor on the row's place in it. Where a GroupNorm
follows, the program also leaves statistics of what it stores, for a reader that puts the tiles together (Chan, Golub &
LeVeque 1979): of each unit of adjacent channels, a power of two that divides the norm's group, the mean and the sum of
squared distances from it. No atomics. Not measured on a GPU.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .products import interpreted, multiplied


class Tiles(NamedTuple):
    """How the rows [B, tokens] and the columns of a product are divided among programs."""

    samples: int  # of a tile
    rows: int  # of a sample in a tile, counted with those that it does not have
    block_n: int  # columns of a tile
    block_k: int
    warps: int
    stages: int


def linear_tiles(tokens: int, columns: int, itemsize: int, *, wide: bool = False) -> Tiles:
    """The division for samples of `tokens` rows, by their shape alone: never by the batch, which could change bits.

    Args:
        tokens: rows of a sample, of which a tile has as many as fit, and of other samples only if all of them fit.
            1 without statistics: then every row is a sample.
        columns: of the weight.
        itemsize: bytes of an element.
        wide: 128 x 128 instead of 64 x 128. It reads 2/3 of the bytes from L2, and has half as many programs: for large
            batches. The order of a row's sums is the same.
    """
    # 64 rows are the least of a warpgroup's instruction; 128 columns halve what is read of x. 24 KB a stage, three
    # programs an SM. Samples below 64 tokens, and float32, which has no tensor cores here, take 64 x 64.
    full = itemsize == 2 and columns >= 128 and (tokens >= 64 or tokens == 1)
    wide = wide and full
    block_m = 128 if wide else 64
    rows = min(block_m, triton.next_power_of_2(tokens))
    return Tiles(block_m // rows, rows, 128 if full else 64, 64 if itemsize == 2 else 32, 8 if wide else 4, 3)


@triton.jit(do_not_specialize=["batch"])  # one binary, and so the same bits, for every batch
def linear_kernel(
    x_ptr,  # [B, TOKENS, K]
    weight_ptr,  # [K, N]
    bias_ptr,  # float32 [N]
    residual_ptr,  # [B, TOKENS, N], read where RESIDUAL
    out_ptr,  # [B, TOKENS, N]
    statistics_ptr,  # float32 [B, tiles, N // UNIT, 2], written where UNIT > 0
    factor,  # float
    batch,
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr,
    UNIT: tl.constexpr,  # channels whose statistics are written; 0: none are
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
):
    # Neighbouring programs have the same rows and other columns, so that x comes from memory once.
    tiles: tl.constexpr = (TOKENS + ROWS - 1) // ROWS
    column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    column_tile = pid % column_tiles
    tile = pid // column_tiles % tiles
    first = pid // (column_tiles * tiles) * SAMPLES

    i = tl.arange(0, SAMPLES * ROWS)
    token = tile * ROWS + i % ROWS
    sample = first + i // ROWS
    row = sample.to(tl.int64) * TOKENS + token
    there = (sample < batch) & (token < TOKENS)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N

    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row[:, None] * K + k[None, :]
    weight_ptrs = weight_ptr + k[:, None].to(tl.int64) * N + column[None, :]
    total = tl.zeros((SAMPLES * ROWS, BLOCK_N), tl.float32)
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
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, stored)
    if UNIT > 0:
        units: tl.constexpr = BLOCK_N // UNIT
        values = tl.where(stored, out.to(tl.float32), 0.0).reshape(SAMPLES, ROWS, units, UNIT)
        count = (tl.minimum(TOKENS - tile * ROWS, ROWS) * UNIT).to(tl.float32)
        mean = tl.sum(tl.sum(values, 3), 1) / count  # [SAMPLES, units]
        away = tl.where(stored.reshape(SAMPLES, ROWS, units, UNIT), values - mean[:, None, :, None], 0.0)
        squares = tl.sum(tl.sum(away * away, 3), 1)
        owner = (first + tl.arange(0, SAMPLES))[:, None]
        unit = (column_tile * units + tl.arange(0, units))[None, :]
        to = statistics_ptr + ((owner.to(tl.int64) * tiles + tile) * (N // UNIT) + unit) * 2
        kept = (owner < batch) & (unit < N // UNIT)
        tl.store(to, mean, kept)
        tl.store(to + 1, squares, kept)


def launch_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    factor: float = 1.0,
    statistics: torch.Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """out = (x @ weight + bias + residual) * factor, and the partial statistics of what is stored.

    Checks nothing. All tensors contiguous and 16-byte aligned; products and sums are float32.

    Args:
        x: [B, tokens, K] (any number of axes between), bfloat16, float16 or float32.
        weight: [K, N], x's dtype. A multiple of 8 for K and N makes every access 128 bits.
        bias: float32 [N].
        out: [B, tokens, N], x's dtype. May be `residual` itself.
        residual: [B, tokens, N], x's dtype.
        factor: multiplies the sum; 1 / rescale of the module.
        statistics: float32 [B, ceil(tokens / rows), N / unit, 2], written: of each tile of `rows` tokens of a sample,
            the last of which may have fewer, and each unit of adjacent channels the mean and the sum of squared
            distances from it. `rows` is that of `linear_tiles(tokens, N, itemsize)`; the unit a power of two up to 64
            that divides N.
        tiles: another division than that of `linear_tiles(tokens if there are statistics else 1, N, itemsize)`.
    """
    if out.numel() == 0:
        return
    k, n = weight.shape
    batch, tokens, unit = x.numel() // k, 1, 0
    if statistics is not None:
        batch, unit = x.shape[0], n // statistics.shape[2]
        tokens = x.numel() // (batch * k)
    by = linear_tiles(tokens, n, x.element_size()) if tiles is None else tiles
    programs = triton.cdiv(batch, by.samples) * triton.cdiv(tokens, by.rows) * triton.cdiv(n, by.block_n)
    linear_kernel[(programs,)](
        x,
        weight,
        bias,
        out if residual is None else residual,
        out,
        bias if statistics is None else statistics,
        factor,
        batch,
        TOKENS=tokens,
        K=k,
        N=n,
        RESIDUAL=residual is not None,
        SCALED=factor != 1.0,
        UNIT=unit,
        SAMPLES=by.samples,
        ROWS=by.rows,
        BLOCK_N=by.block_n,
        BLOCK_K=by.block_k,
        STAGES=by.stages,
        WIDEN=interpreted(),
        num_warps=by.warps,
        num_stages=by.stages,
    )

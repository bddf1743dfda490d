"""The sum of a convolution's kernel, over taps and channels, and what it begins with."""

import triton
import triton.language as tl

from .products import multiplied


@triton.jit
def rows_left(batch, sample, pixels):
    """How many rows there are from a sample's beginning on: int32, and no more than it holds."""
    return tl.minimum((batch - sample) * pixels, 1 << 30).to(tl.int32)


@triton.jit
def begin(
    given,  # pointers to bias, row and residual
    sample,  # int64, the tile's first
    behind,  # [BLOCK_M], samples behind that one
    pixel,  # [BLOCK_M], in the output, counted from the first sample's beginning
    valid,  # [BLOCK_M]
    n,  # [BLOCK_N]
    there,  # [BLOCK_N], else zeros
    out_pixels,  # of a sample
    cout,
    apart,  # from a sample's row to the next one's
    BIAS: tl.constexpr,
    ROW: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(bias + row) + residual, where the sum begins: after it they would need registers beside it, and spill."""
    bias_ptr, row_ptr, residual_ptr = given
    keep = valid[:, None] & there[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BIAS:
        acc += tl.load(bias_ptr + n, there, other=0.0)[None, :]
    if ROW:
        row = row_ptr + sample * apart
        if ONE_SAMPLE:
            acc += tl.load(row + n, there, other=0.0)[None, :]
        else:
            acc += tl.load(row + (behind * apart)[:, None] + n[None, :], keep, other=0.0)
    if RESIDUAL:
        residual = residual_ptr + sample * out_pixels * cout
        acc += tl.load(residual + (pixel * cout)[:, None] + n[None, :], keep, other=0.0).to(tl.float32)
    return acc


@triton.jit
def accumulate(
    acc,  # float32 [BLOCK_M, BLOCK_N], what it begins with
    given,  # x, second and weight, then the shortcut's: of the tile's first sample, of the phase
    sizes,  # width; c0, c1, s0, s1; columns of the weights
    pixel,  # int32 [BLOCK_M], where the first tap lies
    inside,  # int32 [BLOCK_M], bit t is set where tap t lies in the image
    n,  # int32 [BLOCK_N]
    start,
    stop,  # steps of the sum
    KERNEL: tl.constexpr,
    TWO: tl.constexpr,
    SHORTCUT: tl.constexpr,
    FLAT: tl.constexpr,
    FULL_K: tl.constexpr,
    FULL_N: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the steps start ... stop - 1 of the sum to `acc`.

    A step is BLOCK_K channels of one source at one tap; or, FLAT, so many of taps x channels, where these are few.
    """
    x, second, weight, shortcut_x, shortcut_second, shortcut_weight = given
    width, c0, c1, s0, s1, columns = sizes
    TAPS: tl.constexpr = KERNEL * KERNEL
    k = tl.arange(0, BLOCK_K)
    blocks0 = tl.cdiv(c0, BLOCK_K)
    blocks = blocks0 + tl.cdiv(c1, BLOCK_K) if TWO else blocks0
    tap = start // blocks
    if SHORTCUT:
        tap = tl.minimum(tap, TAPS)
    block = start - tap * blocks
    for step in range(start, stop):
        if FLAT:
            row = step * BLOCK_K + k
            taps = row // c0
            shift = taps // KERNEL * width + taps % KERNEL
            a_ptr = x + (pixel[:, None] + shift[None, :]) * c0 + (row - taps * c0)[None, :]
            real = row < TAPS * c0
            there = ((inside[:, None] >> taps[None, :]) & 1) != 0  # beyond the last tap no bit is set
            w_ptr = weight
        else:
            a_base, w_base, channels, at, row0 = x, weight, c0, block * BLOCK_K, tap * c0
            shift = tap // KERNEL * width + tap % KERNEL
            if TWO:
                later = block >= blocks0
                a_base = tl.where(later, second, x)
                channels = tl.where(later, c1, c0)
                at = tl.where(later, block - blocks0, block) * BLOCK_K
                row0 = tap * (c0 + c1) + tl.where(later, c0, 0)
            if SHORTCUT:
                extra = tap == TAPS
                s_blocks0 = tl.cdiv(s0, BLOCK_K)
                s_later = block >= s_blocks0
                a_base = tl.where(extra, tl.where(s_later, shortcut_second, shortcut_x), a_base)
                w_base = tl.where(extra, shortcut_weight, weight)
                channels = tl.where(extra, tl.where(s_later, s1, s0), channels)
                at = tl.where(extra, tl.where(s_later, block - s_blocks0, block) * BLOCK_K, at)
                row0 = tl.where(extra, tl.where(s_later, s0, 0), row0)
                shift = tl.where(extra, KERNEL // 2 * (width + 1), shift)
            row = row0 + at + k
            real = at + k < channels
            a_ptr = a_base + ((pixel + shift) * channels)[:, None] + (at + k)[None, :]
            there = (((inside >> tap) & 1) != 0)[:, None]
            if not FULL_K:
                there = there & real[None, :]
            w_ptr = w_base
            block += 1
            wrap = block == blocks
            if SHORTCUT:
                wrap = wrap & (tap < TAPS)
            tap = tl.where(wrap, tap + 1, tap)
            block = tl.where(wrap, 0, block)
        a = tl.load(a_ptr, there, other=0.0)
        w_ptr += row[:, None] * columns + n[None, :]
        if FULL_K and FULL_N:  # noqa: SIM108
            w = tl.load(w_ptr)
        else:
            w = tl.load(w_ptr, real[:, None] & (n < columns)[None, :], other=0.0)
        acc = multiplied(a, w, acc, WIDEN)
    return acc

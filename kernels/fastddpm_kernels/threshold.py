"""The bound of dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3): an exact quantile of each abs(x0).

Selected, not sorted. Non-negative floats order as their bits do, and a NaN stands behind infinity; so what is looked
for is the integer of a given rank among 31-bit integers.

- A sample that fits in one program is selected there, in registers, bit by bit: one launch, and one reading of x and m
  (6 bytes an element with a bfloat16 m); 2.5 instructions an element and bit.
- A larger one takes four readings (24 bytes an element) by as many programs as it fills. Each counts a digit, of 8, 8,
  8 and 7 bits, of those elements whose higher digits are already known to be the ones looked for. With the zeroing of
  the counts and the interpolation: six launches.

A sample at a row without a `ratio` reads nothing but its row, and one with a quantile below 1, where the bound is 1
whatever the quantile, is done after one counting. Integer sums have no order: the bits are the same whatever the
division. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from . import columns as col
from .constants import chunk
from .lanes import division, grid, memory_order, program
from .prediction import model_output

WIDTH = tl.constexpr(len(col.COLUMNS))
X0_X, X0_M, CLIP = tl.constexpr(col.X0_X), tl.constexpr(col.X0_M), tl.constexpr(col.CLIP)
RATIO, ADVANCE = tl.constexpr(col.RATIO), tl.constexpr(col.ADVANCE)

LARGEST = tl.constexpr(2**31 - 1)
ONE = tl.constexpr(0x3F800000)  # the bits of 1.0
BELOW_ONE = tl.constexpr(0x3F800000 >> 23)  # values of the first digit, the exponent, that are below 1.0's
COUNTS = tl.constexpr(4 * 256)  # a sample's: four times 256 bins, the last four times but half full
ABOVE = tl.constexpr(4 * 256 - 1)  # one of the free ones: LARGEST - the least element that is above the last bins

WHOLE = 4096  # lanes of a sample that one program selects from: 32 elements each of 512 threads


@triton.jit
def sample_row(table_ptr, cursor_ptr):
    """This program's sample, and the address of the row that it is at."""
    sample = tl.program_id(0).to(tl.int64)
    return sample, table_ptr + tl.load(cursor_ptr + sample).to(tl.int64) * WIDTH


@triton.jit
def magnitudes(
    x_ptr,
    m_ptr,
    guidance_ptr,
    rescale_ptr,
    row,
    n,
    q,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    LEARNED: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bits of the step kernel's abs(x0), int32 [4, BLOCK]; past a sample's end LARGEST, which changes no rank."""
    sample, _, e, inside = program(n, q, FULL, VECTOR, BLOCK)
    moving = tl.load(row + ADVANCE).to(tl.int32) != 0
    x = tl.load(x_ptr + sample * n + e, inside, other=0.0)
    m, _ = model_output(
        m_ptr, guidance_ptr, rescale_ptr, sample, e, inside, moving, n, GUIDED, RESCALED, LEARNED, PLANE, CHANNELS
    )
    x0 = tl.fma(tl.load(row + X0_M), m, tl.load(row + X0_X) * x)
    return tl.where(inside, x0.to(tl.int32, bitcast=True) & LARGEST, LARGEST)


@triton.jit
def ranks(row, n):
    """The rank of the first order statistic, from 0, and the weight of the next one; as the reference, in float64."""
    position = tl.load(row + RATIO).to(tl.float64) * (n - 1)
    low = tl.maximum(tl.minimum(position.to(tl.int64), n - 1), 0).to(tl.int32)
    return low, (position - low).to(tl.float32)


@triton.jit
def store_bound(bound_ptr, row, a, b, weight):
    """Interpolate between two order statistics, given as bits; keep within 1 ... clip.

    Of two infinities the difference is NaN; and behind the last element, where the weight is 0, b is no element.
    """
    a, b = a.to(tl.float32, bitcast=True), b.to(tl.float32, bitcast=True)
    s = tl.where((weight == 0) | (a == b), a, tl.fma(weight, b - a, a))
    s = tl.maximum(s, 1.0, propagate_nan=tl.PropagateNan.ALL)
    s = tl.minimum(s, tl.load(row + CLIP), propagate_nan=tl.PropagateNan.ALL)
    tl.store(bound_ptr, s)
    tl.store(bound_ptr + 1, tl.div_rn(1.0, s))


@triton.jit
def store_clip(bound_ptr, row):
    """What a row without a ratio asks for."""
    tl.store(bound_ptr, tl.load(row + CLIP))
    tl.store(bound_ptr + 1, 1.0)


@triton.jit
def number_below(bits, limit):
    """How many are below: by the signs of differences, which can't overflow.

    Of a sum of comparisons LLVM makes packed bits: a loop of 74 instructions for 16 elements, not 56 [for sm_90].
    """
    return tl.sum(((bits - limit).to(tl.uint32, bitcast=True) >> 31).to(tl.int32))


@triton.jit
def select_kernel(
    x_ptr,  # float32 [B, n]
    m_ptr,  # float, see prediction.model_output
    guidance_ptr,  # float32 [B]
    rescale_ptr,  # float32 [B]
    bound_ptr,  # float32 [B, 2]
    table_ptr,  # float32 [rows, WIDTH]
    cursor_ptr,  # int32 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n); at most BLOCK
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    LEARNED: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The bounds of samples that a program holds whole."""
    sample, row = sample_row(table_ptr, cursor_ptr)
    if tl.load(row + RATIO) == 0:
        store_clip(bound_ptr + 2 * sample, row)
    else:
        bits = magnitudes(
            x_ptr, m_ptr, guidance_ptr, rescale_ptr, row, n, q,
            GUIDED, RESCALED, LEARNED, PLANE, CHANNELS, FULL, VECTOR, BLOCK,
        )  # fmt: skip
        low, weight = ranks(row, n)
        # a becomes the largest integer that no more than `low` elements are below: the element of that rank. Where
        # both elements are at most 1 it stays 0, and the bound will be 1.
        a = low * 0
        for i in range(tl.where(number_below(bits, ONE + 1) > low + 1, 0, 31)):
            raised = a | (1 << (30 - i))
            a = tl.where(number_below(bits, raised) <= low, raised, a)
        up_to_a = tl.sum((bits <= a).to(tl.int32))
        b = tl.where(up_to_a > low + 1, a, tl.min(tl.where(bits > a, bits, LARGEST)))
        store_bound(bound_ptr + 2 * sample, row, a, b, weight)


@triton.jit
def descend(counts, rank, BINS: tl.constexpr):
    """(bin, rank in it) of the element of this rank among those counted."""
    count = tl.load(counts + tl.arange(0, BINS))
    before = tl.cumsum(count) <= rank
    return tl.sum(before.to(tl.int32)), rank - tl.sum(tl.where(before, count, 0))


@triton.jit
def settled(counts, rank):
    """Whether the first digits say that the element of this rank and the next one are below 1."""
    digit = tl.arange(0, 256)
    return tl.sum(tl.load(counts + digit, digit < BELOW_ONE, other=0)) > rank + 1


@triton.jit
def count_kernel(
    x_ptr,  # float32 [B, n]
    m_ptr,  # float, see prediction.model_output
    guidance_ptr,  # float32 [B]
    rescale_ptr,  # float32 [B]
    counts_ptr,  # int32 [B, COUNTS], 0 before the first pass
    table_ptr,  # float32 [rows, WIDTH]
    cursor_ptr,  # int32 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    PASS: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    LEARNED: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count a digit's values, the PASS-th from above, among the elements with the higher digits looked for."""
    sample, row = sample_row(table_ptr, cursor_ptr)
    counts = counts_ptr + sample * COUNTS
    SHIFT: tl.constexpr = 23 - 8 * PASS if PASS < 3 else 0
    BINS: tl.constexpr = 256 if PASS < 3 else 128
    rank, _ = ranks(row, n)
    wanted = tl.load(row + RATIO) != 0
    if PASS > 0:
        wanted = wanted & (not settled(counts, rank))
    if wanted:
        bits = magnitudes(
            x_ptr, m_ptr, guidance_ptr, rescale_ptr, row, n, q,
            GUIDED, RESCALED, LEARNED, PLANE, CHANNELS, FULL, VECTOR, BLOCK,
        )  # fmt: skip
        # The order of elements is of no matter to a histogram: this reshaping moves none.
        bits = tl.ravel(bits, can_reorder=True)
        prefix = rank * 0
        for p in tl.static_range(PASS):
            digit, rank = descend(counts + 256 * p, rank, 256)
            prefix = prefix * 256 + digit
        higher = bits >> SHIFT >> (8 if PASS < 3 else 7)
        among = higher == prefix
        # By the third digit few programs still have anything to count.
        if tl.max(among.to(tl.int32)) > 0:
            count = tl.histogram((bits >> SHIFT) & (BINS - 1), BINS, mask=among)
            tl.atomic_add(counts + 256 * PASS + tl.arange(0, BINS), count, count > 0, sem="relaxed")
        if PASS == 3:
            tl.atomic_max(counts + ABOVE, tl.max(tl.where(higher > prefix, LARGEST - bits, 0)), sem="relaxed")


@triton.jit
def bound_kernel(
    counts_ptr,  # int32 [B, COUNTS]
    bound_ptr,  # float32 [B, 2]
    table_ptr,  # float32 [rows, WIDTH]
    cursor_ptr,  # int32 [B]
    n,  # elements a sample
):
    """The bounds from the counts of all digits."""
    sample, row = sample_row(table_ptr, cursor_ptr)
    counts = counts_ptr + sample * COUNTS
    if tl.load(row + RATIO) == 0:
        store_clip(bound_ptr + 2 * sample, row)
    else:
        rank, weight = ranks(row, n)
        prefix = rank * 0
        if settled(counts, rank):
            store_bound(bound_ptr + 2 * sample, row, prefix, prefix, weight)  # of 0: 1
        else:
            for p in tl.static_range(3):
                digit, rank = descend(counts + 256 * p, rank, 256)
                prefix = prefix * 256 + digit
            last, rank = descend(counts + 256 * 3, rank, 128)
            a = prefix * 128 + last
            # The next element: a again, or the next in the last bins, or the least above all of them.
            digit = tl.arange(0, 128)
            count = tl.load(counts + 256 * 3 + digit)
            again = tl.sum(tl.where(digit == last, count, 0)) > rank + 1
            following = tl.min(tl.where((digit > last) & (count > 0), digit, 128))
            b = tl.where(following < 128, prefix * 128 + following, LARGEST - tl.load(counts + ABOVE))
            store_bound(bound_ptr + 2 * sample, row, a, tl.where(again, a, b), weight)


def launch_threshold(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    cursor: torch.Tensor,
    bound: torch.Tensor,
    *,
    guidance: torch.Tensor | None = None,
    rescale: torch.Tensor | None = None,
    learned: bool = False,
    block: int | None = None,
) -> None:
    """Fill `bound`, float32 [B, 2], for the step kernel: by row (s, 1/s) at a row with a `ratio`, else (clip, 1).

    s is `reference.dynamic_bound` of the x0 that the step kernel makes of these arguments; `rescale` is what the guided
    output is multiplied with, not phi. Where x0 has a NaN, which counts as the largest of all, s may be NaN.

    One launch for samples of up to 4 `WHOLE` elements (2 `WHOLE` if guided and learned), else six, and 4 KiB of scratch
    memory a sample. `block`: lanes of a program; by default chosen by shape alone. Raises `ValueError` for a layout
    that `memory_order` doesn't know.
    """
    if x.numel() == 0:
        return
    n = x[0].numel()
    q = chunk(n)
    # Half as many where both halves of channels and of samples are read: else they spill where nothing is aligned.
    most = WHOLE // 2 if learned and guidance is not None else WHOLE
    whole = q <= (most if block is None else block)
    plane, channels = memory_order(model_output)
    by = division(n, triton.next_power_of_2(q) if whole and block is None else block, plane=plane)
    read = (x, model_output, x if guidance is None else guidance, x if rescale is None else rescale)
    flags = dict(
        GUIDED=guidance is not None,
        RESCALED=rescale is not None,
        LEARNED=learned,
        PLANE=plane,
        CHANNELS=channels,
        FULL=by.full,
        VECTOR=by.vector,
        BLOCK=by.block,
        enable_fp_fusion=False,  # every fused multiply-add is written out: a rank's weight must come from its rounding
    )
    programs = grid(x.shape[0], q, by.block)
    if whole:
        # 16 elements a thread, since a program waits for its sum at each bit; but in more than 16 warps, with 64
        # registers a thread, guided channels_last samples spill [compiled].
        warps = max(1, min(16, by.block // 128))
        select_kernel[programs](*read, bound, table, cursor, n, q, **flags, num_warps=warps)
        return
    counts = torch.zeros(x.shape[0], COUNTS.value, dtype=torch.int32, device=x.device)
    for digit in range(4):
        count_kernel[programs](*read, counts, table, cursor, n, q, PASS=digit, **flags, num_warps=by.warps)
    bound_kernel[programs[:1]](counts, bound, table, cursor, n, enable_fp_fusion=False, num_warps=4)

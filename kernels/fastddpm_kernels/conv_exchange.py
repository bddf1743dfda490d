"""What a convolution's programs leave for each other in memory: segments of a sum, or statistics of a sample's parts.

All threads of a program write, and after a barrier one of them adds to a counter: a release of all that they wrote. Who
has seen the others' additions (an acquire, which empties L1) reads after another barrier.

Nobody waits for ever. Programs start in order, so that in a launch only those of the last samples started can lack one:
at most `conv_tiles.TOGETHER` - 1 = 31 hold a multiprocessor meanwhile. A GPU with room for 32 programs goes on, and one
with room for 132 does with four such launches at once. Where there is less, `all_there` ends in NaN after seconds.
"""

import triton
import triton.language as tl

from .conv_statistics import together

ROUNDS = tl.constexpr(4194304)  # looks at a counter: seconds; something is broken, and a hang would hide what


@triton.jit
def added(total, partial_ptr, counter_ptr, segment, SEGMENTS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Leave a segment's sum in memory; the last program to do so has (True, all of them added in order)."""
    tile = tl.program_id(0).to(tl.int64)
    place = partial_ptr + tile * (SEGMENTS * M * N) + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(place + segment * (M * N), total)
    tl.debug_barrier()  # all threads have
    last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SEGMENTS - 1
    if last:
        tl.store(counter_ptr + tile, 0)  # for the next launch
        total = tl.load(place, cache_modifier=".cg")
        for other in tl.static_range(1, SEGMENTS):
            total += tl.load(place + other * (M * N), cache_modifier=".cg")
    return last, total


@triton.jit
def all_there(counter_ptr, PROGRAMS: tl.constexpr, WAIT: tl.constexpr):
    """Wait until PROGRAMS programs (a power of two) are here: 0, or NaN where it took too long.

    The counter never goes back: each launch adds PROGRAMS to it, and may find any multiple of that.
    """
    tl.debug_barrier()  # all threads have written what the others will read
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    target = before - (before & (PROGRAMS - 1)) + PROGRAMS
    missing = target - before - 1
    if WAIT:
        rounds = 0
        while (missing > 0) & (rounds < ROUNDS):
            missing = target - tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
            rounds += 1
    late = missing > 0 if WAIT else missing > PROGRAMS
    return tl.where(late, float("nan"), 0.0)


@triton.jit
def leave(
    mean,  # float32 [IMAGES OWN, units]
    squares,
    statistics_ptr,  # float32 [B, PARTS, 2, cout / UNIT]
    sample,  # int64, the tile's first
    batch,
    first_part,  # of the tile's first sample
    column,  # the tile's first
    cout,
    OWN: tl.constexpr,  # parts of an image that a tile has
    PARTS: tl.constexpr,  # that there are
    UNIT_BITS: tl.constexpr,
):
    """Write the statistics of a tile's parts."""
    units = cout >> UNIT_BITS
    u = (column >> UNIT_BITS) + tl.arange(0, mean.shape[1])
    i = tl.arange(0, mean.shape[0])
    there = (sample + i // OWN < batch)[:, None] & (u < units)[None, :]
    to = statistics_ptr + sample * (PARTS * 2) * units
    to += ((i // OWN * PARTS + first_part + i % OWN) * 2 * units)[:, None] + u[None, :]
    tl.store(to, mean, there)
    tl.store(to + units, squares, there)


@triton.jit
def read_back(at, units, there, count: tl.constexpr, PARTS: tl.constexpr, LEAVES: tl.constexpr):
    """Mean and squares of LEAVES parts together, then of the next unit's, in the order of `merged`: all in a thread."""
    if LEAVES == 1:
        mean = tl.load(at, there, other=0.0)
        squares = tl.load(at + units, there, other=0.0)
    else:
        HALF: tl.constexpr = LEAVES // 2
        mean, squares = read_back(at, units, there, count, PARTS, HALF)
        at = at + (HALF * 2 * units if HALF < PARTS else HALF // PARTS)
        mean_2, squares_2 = read_back(at, units, there, count, PARTS, HALF)
        mean, squares = together(mean, squares, mean_2, squares_2, count * HALF)
    return mean, squares


@triton.jit
def found(
    statistics_ptr,
    sample,
    batch,
    column,
    cout,
    IMAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    PARTS: tl.constexpr,
    PART_BITS: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
):
    """Mean and squares of GROUPS groups of whole images, [IMAGES, GROUPS]."""
    # The two halves of what is merged lie in neighbouring lanes: without a sum between threads the compiler would have
    # every thread load the groups of all its columns, and spill.
    RATIO: tl.constexpr = 1 << (GROUP_BITS - UNIT_BITS)
    HALF: tl.constexpr = PARTS * RATIO // 2
    COUNT: tl.constexpr = 1 << (PART_BITS + UNIT_BITS)
    units = cout >> UNIT_BITS
    i = tl.arange(0, IMAGES * GROUPS)
    u = (column >> UNIT_BITS) + i % GROUPS * RATIO
    there = ((sample + i // GROUPS < batch) & (u < units))[:, None]
    half = tl.arange(0, 2)
    at = statistics_ptr + sample * (PARTS * 2) * units
    at += (i // GROUPS * (PARTS * 2) * units + u)[:, None]
    at += (half * (HALF * 2 * units if HALF < PARTS else HALF // PARTS))[None, :]
    mean, squares = read_back(at, units, there, COUNT, PARTS, HALF)
    away = tl.sum(mean * (1.0 - 2.0 * half.to(tl.float32))[None, :], 1)
    squares = tl.sum(squares, 1) + away * away * (0.5 * COUNT * HALF)
    mean = tl.sum(mean, 1) * 0.5
    return mean.reshape(IMAGES, GROUPS), squares.reshape(IMAGES, GROUPS)

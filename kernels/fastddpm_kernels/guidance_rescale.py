"""What a guided output is multiplied with to come nearer to the conditional one's deviation (Lin et al. 2023).

Each program sums its elements, and then the squares of their distances from their mean; the sums of several programs
are put together as Chan, Golub & LeVeque (1979) do it, in a fixed order. Distances are taken from the sample's first
element at once, so that what is constant has a deviation of exactly 0. Never E[m^2] - E[m]^2.

A sample that fits in one program takes one launch, a larger one two. Both outputs are read once: 4 bytes an element in
bfloat16. Not measured on a GPU.
"""

import torch
import triton
import triton.language as tl

from .constants import chunk
from .lanes import division, grid, in_memory, memory_order, program

SUMS = tl.constexpr(5)  # of a program: elements; sum and squares of the conditional output; of the guided one
CHUNK = tl.constexpr(256)  # programs whose sums are put together at a time

# Lanes of a sample that one program takes: 32 elements each of 512 threads.
WHOLE = 4096


@triton.jit
def outputs(unconditional, conditional, guidance, at, there):
    """The conditional output and the guided one, float32; by the arithmetic of `prediction.model_output`."""
    m = tl.load(conditional + at, there, other=0.0).to(tl.float32)
    m_u = tl.load(unconditional + at, there, other=0.0).to(tl.float32)
    return m, tl.fma(guidance, m - m_u, m_u)


@triton.jit
def squares(distance, inside, count):
    """The sum of these, and that of the squares of their distances from their mean."""
    total = tl.sum(tl.where(inside, distance, 0.0))
    distance = tl.where(inside, distance - total / count, 0.0)
    return total, tl.sum(distance * distance)


@triton.jit
def store_factor(factor_ptr, rescale, theirs, own):
    """phi std(m_c) / std(m) + 1 - phi from the two sums of squares; 1 where m is constant."""
    ratio = tl.div_rn(tl.sqrt_rn(theirs), tl.sqrt_rn(tl.where(own == 0.0, 1.0, own)))
    tl.store(factor_ptr, tl.where(own == 0.0, 1.0, tl.fma(rescale, ratio, 1.0 - rescale)))


@triton.jit
def rescale_kernel(
    m_ptr,  # float [2 B, n], the unconditional samples first; [2 B, 2 n] where LEARNED
    guidance_ptr,  # float32 [B]
    rescale_ptr,  # float32 [B]
    factor_ptr,  # float32 [B], written where ALONE
    sums_ptr,  # float32 [B, SUMS, blocks], written where not
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    ALONE: tl.constexpr,  # a program has a whole sample
    LEARNED: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, _, e, inside = program(n, q, FULL, VECTOR, BLOCK)
    size = n * (2 if LEARNED else 1)
    unconditional = m_ptr + sample * size
    conditional = unconditional + tl.num_programs(0).to(tl.int64) * size
    guidance = tl.load(guidance_ptr + sample)
    at, there = in_memory(e, inside, PLANE, CHANNELS)
    first_c, first = outputs(unconditional, conditional, guidance, 0, True)
    m_c, m = outputs(unconditional, conditional, guidance, at, there)
    count = tl.sum(there.to(tl.int32)).to(tl.float32)
    total_c, theirs = squares(m_c - first_c, there, count)
    total, own = squares(m - first, there, count)
    if ALONE:
        store_factor(factor_ptr + sample, tl.load(rescale_ptr + sample), theirs, own)
    else:
        blocks = tl.num_programs(1)
        sums = sums_ptr + sample * SUMS * blocks + tl.program_id(1)
        tl.store(sums, count)
        tl.store(sums + blocks, total_c)
        tl.store(sums + 2 * blocks, theirs)
        tl.store(sums + 3 * blocks, total)
        tl.store(sums + 4 * blocks, own)


@triton.jit
def combined(totals, within, counts, blocks, n):
    """The squares of the distances from a sample's mean, summed: from its programs' totals, squares and counts."""
    i = tl.arange(0, CHUNK)
    total = tl.full((CHUNK,), 0.0, tl.float32)
    for start in range(0, blocks, CHUNK):
        total += tl.load(totals + start + i, start + i < blocks, other=0.0)
    mean = tl.sum(total) / n
    all_squares = tl.full((CHUNK,), 0.0, tl.float32)
    for start in range(0, blocks, CHUNK):
        inside = start + i < blocks
        count = tl.load(counts + start + i, inside, other=1.0)
        away = tl.where(inside, tl.load(totals + start + i, inside, other=0.0) / count - mean, 0.0)
        all_squares += tl.load(within + start + i, inside, other=0.0) + count * (away * away)
    return tl.sum(all_squares)


@triton.jit
def combine_kernel(
    sums_ptr,  # float32 [B, SUMS, blocks]
    rescale_ptr,  # float32 [B]
    factor_ptr,  # float32 [B]
    n,  # elements a sample
    blocks,  # programs a sample
):
    """The factors from the programs' sums."""
    sample = tl.program_id(0).to(tl.int64)
    counts = sums_ptr + sample * SUMS * blocks
    theirs = combined(counts + blocks, counts + 2 * blocks, counts, blocks, n)
    own = combined(counts + 3 * blocks, counts + 4 * blocks, counts, blocks, n)
    store_factor(factor_ptr + sample, tl.load(rescale_ptr + sample), theirs, own)


def launch_rescale_factor(
    model_output: torch.Tensor,
    guidance: torch.Tensor,
    rescale: torch.Tensor,
    factor: torch.Tensor,
    *,
    learned: bool = False,
    block: int | None = None,
) -> None:
    """Fill `factor`, float32 [B], with `reference.rescale_factor` of the outputs (arXiv 2305.08891, eq. 15-16).

    Args:
        model_output: [2 B, ...], float32, bfloat16 or float16, contiguous or channels_last; the unconditional samples
            first. Where `learned`, only the first half of the channels counts.
        guidance, rescale: float32 [B], the guidance weight and phi; see `reference.guided`.
        factor: 1 where the guided output is constant. Where an output is not finite, it need not be.
        block: lanes of a program. Its choice, by shape alone, decides the order of the sums, and so the last bits.

    Raises:
        ValueError: for any other memory layout.
    """
    if model_output.numel() == 0:
        return
    batch = guidance.shape[0]
    n = model_output[0].numel() // (2 if learned else 1)
    q, width = chunk(n), model_output.element_size()
    plane, channels = memory_order(model_output)
    if not learned:  # a sum has no order, and all of the memory counts
        plane = channels = 0
    alone = q <= (WHOLE if block is None else block)
    by = division(n, triton.next_power_of_2(q) if alone and block is None else block, plane=plane, width=width)
    programs = grid(batch, q, by.block)
    sums = factor if alone else factor.new_empty(batch, SUMS.value, programs[1])
    rescale_kernel[programs](
        model_output,
        guidance,
        rescale,
        factor,
        sums,
        n,
        q,
        ALONE=alone,
        LEARNED=learned,
        PLANE=plane,
        CHANNELS=channels,
        FULL=by.full,
        VECTOR=by.vector,
        BLOCK=by.block,
        num_warps=max(1, min(16, by.block // 128)),  # with 32 elements each of 128 threads it spills [sm_90]
        enable_fp_fusion=True,
    )
    if not alone:
        combine_kernel[(batch,)](sums, rescale, factor, n, programs[1], num_warps=4, enable_fp_fusion=True)

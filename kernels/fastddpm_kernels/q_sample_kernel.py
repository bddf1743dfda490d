"""Forward noising, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, with eps drawn in the kernel or given."""

import torch
import triton
import triton.language as tl

from . import constants as const
from .lanes import division, grid, program
from .philox import normal4


@triton.jit(do_not_specialize=["step"])
def q_sample_kernel(
    x0_ptr,  # float [B, n]
    noise_ptr,  # float [B, n], written where KEEP, read where not DRAW
    out_ptr,  # float [B, n]
    t_ptr,  # int64 [B]
    table_ptr,  # float32 [T, 2]
    seeds_ptr,  # int64 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    step,
    stream: tl.constexpr,
    DRAW: tl.constexpr,
    KEEP: tl.constexpr,  # write the noise that is drawn
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane, e, inside = program(n, q, FULL, VECTOR, BLOCK)
    row = table_ptr + tl.load(t_ptr + sample) * 2
    a, b = tl.load(row), tl.load(row + 1)
    e += sample * n
    x0 = tl.load(x0_ptr + e, inside, other=0.0).to(tl.float32)
    if DRAW:
        z = normal4(tl.load(seeds_ptr + sample), step, stream, lane, q)
        if KEEP:
            tl.store(noise_ptr + e, z, inside)
    else:
        z = tl.load(noise_ptr + e, inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + e, tl.fma(b, z, a * x0), inside)


def launch_q_sample(
    x0: torch.Tensor,
    noise: torch.Tensor | None,
    out: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    seeds: torch.Tensor | None = None,
    *,
    step: int = 0,
    stream: int = const.STREAM_TRAINING,
    block: int | None = None,
) -> None:
    """Write x_t to `out`; with `seeds` draw the noise and write it to `noise` (or nowhere), without reading it there.

    All of `x0`, `noise`, `out` are [B, ...], contiguous, float32, bfloat16 or float16; the arithmetic is float32.
    """
    if x0.numel() == 0:
        return
    n = x0[0].numel()
    q, by = const.chunk(n), division(n, block, width=x0.element_size())
    q_sample_kernel[grid(x0.shape[0], q, by.block)](
        x0,
        x0 if noise is None else noise,
        out,
        t,
        table,
        t if seeds is None else seeds,
        n,
        q,
        step,
        stream,
        DRAW=seeds is not None,
        KEEP=seeds is not None and noise is not None,
        FULL=by.full,
        VECTOR=by.vector,
        BLOCK=by.block,
        num_warps=by.warps,
        enable_fp_fusion=True,
    )

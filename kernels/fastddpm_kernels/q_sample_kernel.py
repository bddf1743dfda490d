"""Forward noising, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, with eps drawn in the kernel or given."""

import torch
import triton
import triton.language as tl

from . import constants as const
from .lanes import element, grid, load4, sample_and_lane
from .philox import normal4


@triton.jit(do_not_specialize=["step"])
def q_sample_kernel(
    x0_ptr,  # float [B, n]
    noise_ptr,  # float [B, n], written where DRAW, else read
    out_ptr,  # float [B, n]
    t_ptr,  # int64 [B]
    table_ptr,  # float32 [T, 2]
    seeds_ptr,  # int64 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    step,
    stream: tl.constexpr,
    DRAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane = sample_and_lane(BLOCK)
    row = table_ptr + tl.load(t_ptr + sample) * 2
    a, b = tl.load(row), tl.load(row + 1)
    base = sample * n
    # All loads come before all stores: the compiler can't move a load over a store that might alias it.
    x0 = load4(x0_ptr + base, lane, n, q)
    if DRAW:  # noqa: SIM108
        z = normal4(tl.load(seeds_ptr + sample), step, stream, lane)
    else:
        z = load4(noise_ptr + base, lane, n, q)
    for k in tl.static_range(4):
        e, inside = element(lane, k, n, q)
        tl.store(out_ptr + base + e, tl.fma(b, z[k], a * x0[k]), inside)
        if DRAW:
            tl.store(noise_ptr + base + e, z[k], inside)


def launch_q_sample(
    x0: torch.Tensor,
    noise: torch.Tensor,
    out: torch.Tensor,
    t: torch.Tensor,
    table: torch.Tensor,
    seeds: torch.Tensor | None = None,
    *,
    step: int = 0,
    stream: int = const.STREAM_TRAINING,
    block: int = 512,
) -> None:
    """Write x_t to `out`; with `seeds` draw the noise and write it to `noise`, without read it there.

    All of `x0`, `noise`, `out` are [B, ...], contiguous, float32, bfloat16 or float16; the arithmetic is float32.
    """
    if x0.numel() == 0:
        return
    n = x0[0].numel()
    q = const.chunk(n)
    q_sample_kernel[grid(x0.shape[0], q, block)](
        x0,
        noise,
        out,
        t,
        table,
        t if seeds is None else seeds,
        n,
        q,
        step,
        stream,
        DRAW=seeds is not None,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )

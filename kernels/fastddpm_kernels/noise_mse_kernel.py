"""The training loss, each sample's mean (m - target)^2, and its gradient, from noise that is drawn again, not read.

`reference.noise_mse` has the same in PyTorch. The loss: each program's part goes to a place of its own, and a sample's
parts are summed in a fixed order, so that two runs give the same bits. Another block size gives other bits of the loss,
not of the gradient.
"""

import torch
import triton
import triton.language as tl

from . import constants as const
from .lanes import division, grid, in_memory, memory_order, program
from .philox import normal4


@triton.jit(do_not_specialize=["step"])
def noise_mse_kernel(
    m_ptr,  # float [B, n]: the model's output; contiguous or channels_last
    seeds_ptr,  # int64 [B]
    x0_ptr,  # float [B, n], read where MIXED; contiguous
    t_ptr,  # int64 [B]
    table_ptr,  # float32 [T, 2]
    grad_ptr,  # float32 [B], read where GRADIENT: of each sample's loss
    out_ptr,  # GRADIENT: like m, of it; else float32 [B, blocks]: the blocks' parts of each sample's loss
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    scale,  # 2 / n, of the gradient
    step,
    stream: tl.constexpr,
    MIXED: tl.constexpr,  # the target is table[t, 0] z + table[t, 1] x0; else the noise z itself
    GRADIENT: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane, e, inside = program(n, q, FULL, VECTOR, BLOCK)
    at, there = in_memory(e, inside, PLANE, CHANNELS)
    at += sample * n
    m = tl.load(m_ptr + at, there, other=0.0).reshape(e.shape).to(tl.float32)
    if MIXED:
        row = table_ptr + tl.load(t_ptr + sample) * 2
        a, b = tl.load(row), tl.load(row + 1)
        x0 = tl.load(x0_ptr + sample * n + e, inside, other=0.0).to(tl.float32)
    target = normal4(tl.load(seeds_ptr + sample), step, stream, lane, q)
    if MIXED:
        target = tl.fma(a, target, b * x0)
    d = m - target
    if GRADIENT:
        d *= tl.load(grad_ptr + sample) * scale
        tl.store(out_ptr + at, d.reshape(at.shape), there)
    else:
        d = tl.where(inside, d, 0.0)
        total = tl.sum(tl.sum(d * d, axis=0), axis=0)  # a lane's four are in one thread
        tl.store(out_ptr + sample * tl.num_programs(1) + tl.program_id(1), total / n)


def launch_noise_mse(
    model_output: torch.Tensor,
    seeds: torch.Tensor,
    x0: torch.Tensor | None = None,
    t: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    step: int = 0,
    stream: int = const.STREAM_TRAINING,
    *,
    grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    block: int | None = None,
) -> torch.Tensor:
    """The loss of each sample, float32 [B]; or, with `grad` [B], what goes to the model's output, written to `out`.

    `model_output` and `out` are [B, ...], float32, bfloat16 or float16, both contiguous or both channels_last; `x0` is
    contiguous, and there are `t` and `table` with it. The arithmetic is float32.
    """
    batch, n = model_output.shape[0], model_output[:1].numel()
    width = max(model_output.element_size(), 1 if x0 is None else x0.element_size())
    plane, channels = memory_order(model_output)
    if grad is None and block is None:
        block = 256  # one warp, so that its sum needs neither shared memory nor a barrier
    q, by = const.chunk(n), division(n, block, plane=plane, width=width)
    programs = grid(batch, q, by.block)
    if out is None:
        out = torch.empty(programs, dtype=torch.float32, device=model_output.device)
    unused = model_output  # stands for each pointer that this variant doesn't have
    if batch:
        noise_mse_kernel[programs](
            model_output,
            seeds,
            unused if x0 is None else x0,
            unused if t is None else t,
            unused if table is None else table,
            unused if grad is None else grad,
            out,
            n,
            q,
            2.0 / n,
            step,
            stream,
            MIXED=x0 is not None,
            GRADIENT=grad is not None,
            PLANE=plane,
            CHANNELS=channels,
            FULL=by.full,
            VECTOR=by.vector,
            BLOCK=by.block,
            num_warps=by.warps,
            enable_fp_fusion=True,
        )
    return out if grad is not None else out.sum(dim=1)

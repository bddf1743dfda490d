"""One reverse step of any solver: x0, limit, update, noise, history and the next model input, in one pass.

`columns` has the formulas, `reference.reverse_step` the same in PyTorch. A sample's row comes from the table, at the
sample's own cursor. A second, tiny kernel moves the cursors on, since the programs of a sample must not race with that.
"""

import torch
import triton
import triton.language as tl

from . import columns as col
from . import constants as const
from .lanes import element, grid, in_memory, load4, memory_order, sample_and_lane
from .philox import normal4

WIDTH = tl.constexpr(len(col.COLUMNS))
T, C_IN, CLIP, STEP, ADVANCE = (tl.constexpr(c) for c in (col.T, col.C_IN, col.CLIP, col.STEP, col.ADVANCE))
X0_X, X0_M, X_X, X_X0 = (tl.constexpr(c) for c in (col.X0_X, col.X0_M, col.X_X, col.X_X0))
X_M, X_H1, X_H2, X_Z = (tl.constexpr(c) for c in (col.X_M, col.X_H1, col.X_H2, col.X_Z))
STREAM = tl.constexpr(const.STREAM_STEP)


@triton.jit
def reverse_step_kernel(
    x_ptr,  # float32 [B, n]
    m_ptr,  # float [B, n], (C, H, W) or channels_last
    out_ptr,  # float32 [B, n]; may be x
    input_ptr,  # float [B, n], laid out as m
    x0_ptr,  # float32 [B, n]
    h1_ptr,  # float32 [B, n], read and written
    h2_ptr,  # float32 [B, n], read and written
    nonfinite_ptr,  # int32 [B]: 1 + the first step whose x0 was not finite, or 0
    table_ptr,  # float32 [rows, WIDTH]
    cursor_ptr,  # int32 [B]
    seeds_ptr,  # int64 [B]
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    LIMITED: tl.constexpr,
    NOISE: tl.constexpr,
    HISTORY: tl.constexpr,
    WRITE_INPUT: tl.constexpr,
    WRITE_X0: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane = sample_and_lane(BLOCK)
    base = sample * n
    # All loads come before all stores: the compiler can't move a load over a store that might alias it.
    row = table_ptr + tl.load(cursor_ptr + sample).to(tl.int64) * WIDTH
    x0_x, x0_m, clip = tl.load(row + X0_X), tl.load(row + X0_M), tl.load(row + CLIP)
    x_x, x_x0, x_m = tl.load(row + X_X), tl.load(row + X_X0), tl.load(row + X_M)
    x_h1, x_h2, x_z = tl.load(row + X_H1), tl.load(row + X_H2), tl.load(row + X_Z)
    step = tl.load(row + STEP).to(tl.int32)
    advance = tl.load(row + ADVANCE).to(tl.int64)
    c_in = tl.load(row + advance * WIDTH + C_IN)
    moving = advance != 0  # at an identity row the sample stays, whatever the model says of it: that is not read
    clean = tl.load(nonfinite_ptr + sample) == 0  # the flag keeps the first bad step

    x = load4(x_ptr + base, lane, n, q)
    m = load4(m_ptr + base, lane, n, q, moving, PLANE, CHANNELS)
    if HISTORY >= 1:
        h1 = load4(h1_ptr + base, lane, n, q)
    if HISTORY >= 2:
        h2 = load4(h2_ptr + base, lane, n, q)
    if NOISE:
        z = normal4(tl.load(seeds_ptr + sample), step, STREAM, lane)

    check = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(4):
        e, inside = element(lane, k, n, q)
        # Every fused multiply-add is written out: left to the compiler, which ones fuse depends on the block size.
        x0 = tl.fma(x0_m, m[k], x0_x * x[k])
        check += x0 * 0.0  # NaN where x0 is not finite; before the clamp can make a picture of an infinity
        if LIMITED:
            x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)

        out = tl.fma(x_m, m[k], tl.fma(x_x0, x0, x_x * x[k]))
        if HISTORY >= 1:
            out = tl.fma(x_h1, h1[k], out)
            tl.store(h1_ptr + base + e, x0, inside)
        if HISTORY >= 2:
            out = tl.fma(x_h2, h2[k], out)
            tl.store(h2_ptr + base + e, h1[k], inside)
        if NOISE:
            out = tl.fma(x_z, z[k], out)
        tl.store(out_ptr + base + e, out, inside)
        if WRITE_X0:
            tl.store(x0_ptr + base + e, x0, inside)
        if WRITE_INPUT:
            tl.store(input_ptr + base + in_memory(e, PLANE, CHANNELS), c_in * out, inside)
    tl.store(nonfinite_ptr + sample + tl.zeros_like(lane), step + 1, clean & (check != 0.0))


def launch_reverse_step(
    x: torch.Tensor,
    model_output: torch.Tensor,
    table: torch.Tensor,
    cursor: torch.Tensor,
    seeds: torch.Tensor,
    nonfinite: torch.Tensor,
    *,
    out: torch.Tensor,
    model_input: torch.Tensor | None = None,
    x0: torch.Tensor | None = None,
    h1: torch.Tensor | None = None,
    h2: torch.Tensor | None = None,
    limited: bool,
    noise: bool,
    block: int = 512,
) -> None:
    """One launch of the step kernel; the tensors are those of the kernel's signature. `out` may be `x`.

    `model_output` and `model_input` are both contiguous, or both channels_last. Block and warps are a first choice, not
    yet measured on a GPU: 16 elements a thread keep 64 bytes of each float32 tensor in flight at 72 registers.
    """
    if x.numel() == 0:
        return
    n = x[0].numel()
    q = const.chunk(n)
    plane, channels = memory_order(model_output)
    reverse_step_kernel[grid(x.shape[0], q, block)](
        x,
        model_output,
        out,
        x if model_input is None else model_input,
        x if x0 is None else x0,
        x if h1 is None else h1,
        x if h2 is None else h2,
        nonfinite,
        table,
        cursor,
        seeds,
        n,
        q,
        LIMITED=limited,
        NOISE=noise,
        HISTORY=(h1 is not None) + (h2 is not None),
        WRITE_INPUT=model_input is not None,
        WRITE_X0=x0 is not None,
        PLANE=plane,
        CHANNELS=channels,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
def advance_kernel(cursor_ptr, t_ptr, table_ptr, batch, BLOCK: tl.constexpr):
    """cursor[b] += advance of its row; t[b] = the time input of the row it comes to."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = b < batch
    cursor = tl.load(cursor_ptr + b, inside, other=0)
    cursor += tl.load(table_ptr + cursor.to(tl.int64) * WIDTH + ADVANCE, inside, other=0.0).to(tl.int32)
    tl.store(cursor_ptr + b, cursor, inside)
    t = tl.load(table_ptr + cursor.to(tl.int64) * WIDTH + T, inside, other=0.0)
    tl.store(t_ptr + b, t.to(t_ptr.dtype.element_ty), inside)


def launch_advance(cursor: torch.Tensor, t: torch.Tensor, table: torch.Tensor, block: int = 128) -> None:
    """Move each sample's cursor (int32 [B]) on, in place, and write its next time input to `t` ([B])."""
    batch = cursor.shape[0]
    if batch == 0:
        return
    advance_kernel[(triton.cdiv(batch, block),)](cursor, t, table, batch, BLOCK=block, num_warps=4)

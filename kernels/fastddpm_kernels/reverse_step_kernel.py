"""One reverse step of any solver: x0, limit, update, noise, history and the next model input, in one pass.

`columns` has the formulas, `reference.reverse_step` the same in PyTorch. A sample's row comes from the table, at the
sample's own cursor. The kernel can't move that cursor, which the sample's other programs may not have read yet: in a
loop it writes the next one to a second buffer, and the next step reads that; else a second, tiny kernel moves it on.
"""

import torch
import triton
import triton.language as tl

from . import columns as col
from . import constants as const
from .lanes import division, grid, in_memory, memory_order, program
from .philox import normal4
from .prediction import model_output

WIDTH = tl.constexpr(len(col.COLUMNS))
T, C_IN, CLIP, STEP, ADVANCE = (tl.constexpr(c) for c in (col.T, col.C_IN, col.CLIP, col.STEP, col.ADVANCE))
X0_X, X0_M, X_X, X_X0 = (tl.constexpr(c) for c in (col.X0_X, col.X0_M, col.X_X, col.X_X0))
X_M, X_Z, X_H1 = (tl.constexpr(c) for c in (col.X_M, col.X_Z, col.X_H1))
X_H2, X_H3 = tl.constexpr(col.X_H2), tl.constexpr(col.X_H3)
S_0, S_V, K_X, K_Z = (tl.constexpr(c) for c in (col.S_0, col.S_V, col.K_X, col.K_Z))
NOISE_STREAM, KNOWN_STREAM = tl.constexpr(const.STREAM_STEP), tl.constexpr(const.STREAM_INPAINTING)


@triton.jit
def write_next(cursor_ptr, table_ptr, next_ptr, t_ptr, sample, GUIDED: tl.constexpr):
    """The sample's next cursor and time input, by its first program.

    The cursor is loaded again: to keep it costs registers. A mask and no branch: that costs 2 instructions an element.
    """
    first = tl.program_id(1) == 0
    cursor = tl.load(cursor_ptr + sample, first, other=0)
    cursor += tl.load(table_ptr + cursor.to(tl.int64) * WIDTH + ADVANCE, first, other=0.0).to(tl.int32)
    t = tl.load(table_ptr + cursor.to(tl.int64) * WIDTH + T, first, other=0.0).to(t_ptr.dtype.element_ty)
    tl.store(next_ptr + sample, cursor, first)
    tl.store(t_ptr + sample, t, first)
    if GUIDED:
        tl.store(t_ptr + tl.num_programs(0) + sample, t, first)


@triton.jit
def reverse_step_kernel(
    x_ptr,  # float32 [B, n]
    m_ptr,  # float, see prediction.model_output
    out_ptr,  # float32 [B, n]; may be x
    input_ptr,  # float [B, n], or [2 B, n] where GUIDED: the same twice; contiguous or channels_last, as m
    x0_ptr,  # float32 [B, n]
    h1_ptr,  # float32 [B, n], read and written
    h2_ptr,  # float32 [B, n], read and written
    h3_ptr,  # float32 [B, n], read and written
    known_ptr,  # float32 [B, n]
    mask_ptr,  # uint8 [B, n]: not 0 where the sample is known
    z_ptr,  # float32 [B, n]: the noise, where GIVEN
    guidance_ptr,  # float32 [B]
    rescale_ptr,  # float32 [B]
    bound_ptr,  # float32 [B, 2]: bound of abs(x0), and what x0 is then multiplied with
    nonfinite_ptr,  # int32 [B]: 1 + the first step whose x0 was not finite, or 0
    table_ptr,  # float32 [rows, WIDTH]
    cursor_ptr,  # int32 [B]
    seeds_ptr,  # int64 [B]
    next_ptr,  # int32 [B]: where the cursors go; not cursor_ptr
    t_ptr,  # the model's next time input, [B], or [2 B] where GUIDED
    n,  # elements a sample
    q,  # lanes a sample: constants.chunk(n)
    LIMITED: tl.constexpr,  # x0 is clipped: to the row's `clip`, or, where DYNAMIC, to the sample's bound
    DYNAMIC: tl.constexpr,
    NOISE: tl.constexpr,
    GIVEN: tl.constexpr,  # the noise is read instead of made
    LEARNED: tl.constexpr,
    DIRECT: tl.constexpr,  # x' has a term in m itself
    HISTORY: tl.constexpr,  # how many of h1, h2, h3 there are
    INPAINT: tl.constexpr,
    GUIDED: tl.constexpr,
    RESCALED: tl.constexpr,
    WRITE_INPUT: tl.constexpr,
    SCALED: tl.constexpr,  # the model's input is scaled by c_in
    WRITE_X0: tl.constexpr,
    WRITE_NEXT: tl.constexpr,
    PLANE: tl.constexpr,
    CHANNELS: tl.constexpr,
    FULL: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample, lane, e, inside = program(n, q, FULL, VECTOR, BLOCK)
    base = sample * n
    # All loads come before all stores: the compiler can't move a load over a store that might alias it.
    row = table_ptr + tl.load(cursor_ptr + sample).to(tl.int64) * WIDTH
    x0_x, x0_m, clip = tl.load(row + X0_X), tl.load(row + X0_M), tl.load(row + CLIP)
    x_x, x_x0, x_m = tl.load(row + X_X), tl.load(row + X_X0), tl.load(row + X_M)
    x_h1, x_h2, x_h3, x_z = tl.load(row + X_H1), tl.load(row + X_H2), tl.load(row + X_H3), tl.load(row + X_Z)
    s_0, s_v, k_x, k_z = tl.load(row + S_0), tl.load(row + S_V), tl.load(row + K_X), tl.load(row + K_Z)
    step = tl.load(row + STEP).to(tl.int32)
    advance = tl.load(row + ADVANCE).to(tl.int64)
    c_in = tl.load(row + advance * WIDTH + C_IN)
    moving = advance != 0  # at an identity row the sample stays, whatever the model says of it: that is not read
    clean = tl.load(nonfinite_ptr + sample) == 0  # the flag keeps the first bad step
    seed = tl.load(seeds_ptr + sample)

    x = tl.load(x_ptr + base + e, inside, other=0.0)
    m, v = model_output(
        m_ptr, guidance_ptr, rescale_ptr, sample, e, inside, moving, n, GUIDED, RESCALED, LEARNED, PLANE, CHANNELS
    )
    if HISTORY >= 1:
        h1 = tl.load(h1_ptr + base + e, inside & moving, other=0.0)
    if HISTORY >= 2:
        h2 = tl.load(h2_ptr + base + e, inside & moving, other=0.0)
    if HISTORY >= 3:
        h3 = tl.load(h3_ptr + base + e, inside & moving, other=0.0)
    if NOISE and GIVEN:
        z = tl.load(z_ptr + base + e, inside & moving, other=0.0)
    if INPAINT:
        known = tl.load(known_ptr + base + e, inside, other=0.0)
        is_known = (tl.load(mask_ptr + base + e, inside, other=0) != 0) & moving

    # Every fused multiply-add is written out: left to the compiler, which ones fuse depends on the block size.
    x0 = tl.fma(x0_m, m, x0_x * x)
    check = tl.sum(x0 * 0.0, axis=0)  # NaN where x0 is not finite; before the clamp can make a picture of an infinity
    if LEARNED:
        check += tl.sum(v * 0.0, axis=0)
    if DYNAMIC:
        bound, inverse = tl.load(bound_ptr + 2 * sample), tl.load(bound_ptr + 2 * sample + 1)
        x0 = tl.clamp(x0, -bound, bound, propagate_nan=tl.PropagateNan.ALL) * inverse
    elif LIMITED:
        x0 = tl.clamp(x0, -clip, clip, propagate_nan=tl.PropagateNan.ALL)

    out = tl.fma(x_x0, x0, x_x * x)
    if DIRECT:
        out = tl.fma(x_m, m, out)
    if HISTORY >= 1:
        out = tl.fma(x_h1, h1, out)
    if HISTORY >= 2:
        out = tl.fma(x_h2, h2, out)
    if HISTORY >= 3:
        out = tl.fma(x_h3, h3, out)
    if NOISE:
        scale = x_z * tl.exp2(tl.fma(s_v, v, s_0)) if LEARNED else x_z
        if not GIVEN:
            z = normal4(seed, step, NOISE_STREAM, lane, q)
        out = tl.fma(scale, z, out)
    if INPAINT:
        out = tl.where(is_known, tl.fma(k_z, normal4(seed, step, KNOWN_STREAM, lane, q), k_x * known), out)

    tl.store(out_ptr + base + e, out, inside)
    if WRITE_X0:
        tl.store(x0_ptr + base + e, x0, inside)
    if HISTORY >= 1:
        tl.store(h1_ptr + base + e, x0, inside)
    if HISTORY >= 2:
        tl.store(h2_ptr + base + e, h1, inside)
    if HISTORY >= 3:
        tl.store(h3_ptr + base + e, h2, inside)
    if WRITE_INPUT:
        following = c_in * out if SCALED else out
        at, there = in_memory(e, inside, PLANE, CHANNELS // 2 if LEARNED else CHANNELS)
        following = following.reshape(at.shape)
        tl.store(input_ptr + base + at, following, there)
        if GUIDED:
            tl.store(input_ptr + base + tl.num_programs(0).to(tl.int64) * n + at, following, there)
    if WRITE_NEXT:
        write_next(cursor_ptr, table_ptr, next_ptr, t_ptr, sample, GUIDED)
    check = tl.sum(check.reshape(BLOCK // VECTOR, VECTOR), axis=1)  # of lanes that are in one thread
    tl.store(nonfinite_ptr + sample + tl.arange(0, BLOCK // VECTOR) * 0, step + 1, clean & (check != 0.0))


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
    h3: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
    rescale: torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    next_cursor: torch.Tensor | None = None,
    t: torch.Tensor | None = None,
    limited: bool,
    noise: bool,
    learned: bool = False,
    direct: bool = True,
    scaled: bool = True,
    block: int | None = None,
) -> None:
    """One launch of the step kernel; the tensors are those of the kernel's signature. `out` may be `x`.

    `next_cursor` and `t` go together.

    `model_output` and `model_input` are both contiguous, or both channels_last.
    """
    if x.numel() == 0:
        return
    n = x[0].numel()
    history = sum(h is not None for h in (h1, h2, h3))
    tensors = 2 + history + learned + (guidance is not None) + (known is not None) + (z is not None)
    plane, channels = memory_order(model_output)
    q, by = const.chunk(n), division(n, block, plane=plane, tensors=tensors)
    unused = x  # stands for each pointer that this variant doesn't have
    reverse_step_kernel[grid(x.shape[0], q, by.block)](
        x,
        model_output,
        out,
        unused if model_input is None else model_input,
        unused if x0 is None else x0,
        unused if h1 is None else h1,
        unused if h2 is None else h2,
        unused if h3 is None else h3,
        unused if known is None else known,
        unused if mask is None else mask.view(torch.uint8),
        unused if z is None else z,
        unused if guidance is None else guidance,
        unused if rescale is None else rescale,
        unused if bound is None else bound,
        nonfinite,
        table,
        cursor,
        seeds,
        cursor if next_cursor is None else next_cursor,
        cursor if t is None else t,
        n,
        q,
        LIMITED=limited,
        DYNAMIC=bound is not None,
        NOISE=noise,
        GIVEN=noise and z is not None,
        LEARNED=learned,
        DIRECT=direct,
        HISTORY=history,
        INPAINT=known is not None,
        GUIDED=guidance is not None,
        RESCALED=rescale is not None,
        WRITE_INPUT=model_input is not None,
        SCALED=scaled,
        WRITE_X0=x0 is not None,
        WRITE_NEXT=next_cursor is not None,
        PLANE=plane,
        CHANNELS=channels,
        FULL=by.full,
        VECTOR=by.vector,
        BLOCK=by.block,
        num_warps=by.warps,
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

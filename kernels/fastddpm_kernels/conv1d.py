"""A 1-D convolution over [B, L, C] activations with all that follows it in a policy's UNet, in one kernel.

Bias, GroupNorm over a sample's whole group, Mish, and then FiLM or a residual: a tile has all positions of its samples
and whole groups of channels, so that the norm's statistics never leave it. The transposed convolution is two of 2 taps,
one for the even and one for the odd positions; the two inputs of the way up are read where they lie.

Such a network's trajectories are short, 4 to 16 positions, and at batch 1 its time is that of reading the weights. So
channels are the rows of the matrix product and positions its columns, of which 16 are enough; the weights are laid out
in the order in which they are read; and the sum is divided among many programs. Each stores its part, and counts
itself; the last one adds the parts, in their order, and finishes. Nobody waits. Where there are enough tiles, one
program adds all segments of its tile, in the same order: a sample's bits depend neither on its slot nor on the batch.
(As far as the hardware's products of 16 x 16 and 16 x 64 sum alike, which a test on a GPU looks at.)

Not measured on a GPU. `tests/test_conv1d_codegen.py` has what the machine code shows.
"""

import torch
import triton
import triton.language as tl

from .conv1d_tiles import FILL, channels_of, rows_of, segments_of, step_of
from .products import interpreted, multiplied


@triton.jit
def mish(x):
    """x tanh(log(1 + e^x)) = x n / (n + 2), n = e^x (e^x + 2): nothing cancels, and above 20 it is x in float32."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return x * (n / (n + 2.0))


@triton.jit
def in_tile(values, ROW_BITS: tl.constexpr, COLUMN_BITS: tl.constexpr):
    """Sums of 2^ROW_BITS x 2^COLUMN_BITS neighbours, always of two at a time: so in every layout the same bits."""
    for _ in tl.static_range(COLUMN_BITS):
        values = tl.sum(values.reshape(values.shape[0], values.shape[1] // 2, 2), 2)
    for _ in tl.static_range(ROW_BITS):
        values = tl.sum(values.reshape(values.shape[0] // 2, 2, values.shape[1]), 1)
    return values


@triton.jit
def summed(
    total,  # float32 [BLOCK_C, BLOCK_R]
    x,  # the sources, of the tile's first sample
    second,
    weight,  # [steps, BLOCK_C, BLOCK_K]
    behind,  # [BLOCK_R], samples behind the first
    position,  # [BLOCK_R], where the first tap lies
    valid,  # [BLOCK_R]
    start,
    stop,
    LENGTH: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add the steps start ... stop - 1 of the sum."""
    k = tl.arange(0, BLOCK_K)
    at_w = tl.arange(0, BLOCK_C)[:, None] * BLOCK_K + k[None, :]
    of_x: tl.constexpr = (C0 + BLOCK_K - 1) // BLOCK_K
    blocks: tl.constexpr = of_x + (C1 + BLOCK_K - 1) // BLOCK_K
    full: tl.constexpr = C0 % BLOCK_K == 0 and C1 % BLOCK_K == 0
    for step in range(start, stop):
        tap = step // blocks
        block = step - tap * blocks
        source, channels = x, C0
        if C1 > 0:
            later = block >= of_x
            source = tl.where(later, second, x)
            channels = tl.where(later, C1, C0)
            block = tl.where(later, block - of_x, block)
        p = position + tap
        c = block * BLOCK_K + k
        there = (valid & (p >= 0) & (p < LENGTH))[:, None]
        if not full:
            there = there & (c < channels)[None, :]
        a = tl.load(source + ((behind * LENGTH + p) * channels)[:, None] + c[None, :], there, other=0.0)
        w = tl.load(weight + step * (BLOCK_C * BLOCK_K) + at_w)
        total = multiplied(w, tl.trans(a), total, WIDE)
    return total


@triton.jit
def finished(
    total,  # float32 [BLOCK_C, BLOCK_R]
    bias_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    film_ptr,
    residual_ptr,
    out_ptr,
    first,  # int64, the tile's first sample
    tile,  # of the channels
    r_valid,  # [BLOCK_R]
    at,  # [BLOCK_R], the output's position, counted from the first sample's beginning
    film_stride,
    eps,
    COUT: tl.constexpr,
    OUT: tl.constexpr,  # positions a sample of this phase
    OUT_LENGTH: tl.constexpr,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    FILM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    POSITION_BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Bias, norm, Mish, FiLM, residual; store."""
    padded: tl.constexpr = 1 << GROUP_BITS
    positions: tl.constexpr = 1 << POSITION_BITS
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    c_valid = c < COUT
    if NORM and padded != GROUP:
        inside = c % padded
        c = c // padded * GROUP + inside
        c_valid = (inside < GROUP) & (c < COUT)
    keep = c_valid[:, None] & r_valid[None, :]
    total += tl.load(bias_ptr + c, c_valid, other=0.0)[:, None]
    if NORM:
        shape: tl.constexpr = (BLOCK_C // padded, padded, BLOCK_R // positions, positions)
        values = tl.where(keep, total, 0.0)  # a padded position has the bias
        mean = in_tile(values, GROUP_BITS, POSITION_BITS) * (1.0 / (GROUP * OUT))
        away = (total.reshape(shape) - mean[:, None, :, None]).reshape(BLOCK_C, BLOCK_R)
        away = tl.where(keep, away, 0.0)
        variance = in_tile(away * away, GROUP_BITS, POSITION_BITS) * (1.0 / (GROUP * OUT))
        factor = 1.0 / tl.sqrt(variance + eps)
        normal = (away.reshape(shape) * factor[:, None, :, None]).reshape(BLOCK_C, BLOCK_R)
        scale = tl.load(norm_weight_ptr + c, c_valid, other=0.0)
        shift = tl.load(norm_bias_ptr + c, c_valid, other=0.0)
        total = mish(normal * scale[:, None] + shift[:, None])
    if FILM > 0:
        sample = tl.arange(0, BLOCK_R) // positions
        film = film_ptr + first * film_stride + (sample * film_stride)[None, :] + c[:, None]
        if FILM == 2:
            total *= tl.load(film, keep, other=0.0)
            film += COUT
        total += tl.load(film, keep, other=0.0)
    to = first * (OUT_LENGTH * COUT) + (at * COUT)[None, :] + c[:, None]
    if RESIDUAL:
        total += tl.load(residual_ptr + to, keep, other=0.0).to(tl.float32)
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), keep)


@triton.jit(do_not_specialize=["batch"])  # no binary of its own for a batch of 1, or of 16
def conv1d_kernel(
    x_ptr,  # [B, LENGTH, C0]
    second_ptr,  # [B, LENGTH, C1]
    weight_ptr,  # [phases, tiles, STEPS, BLOCK_C, BLOCK_K]
    bias_ptr,  # float32 [COUT]
    norm_weight_ptr,  # float32 [COUT]
    norm_bias_ptr,  # float32 [COUT]
    film_ptr,  # float32 [B, COUT or 2 COUT], rows film_stride apart
    residual_ptr,  # [B, OUT_LENGTH, COUT]
    out_ptr,  # [B, OUT_LENGTH, COUT]
    partial_ptr,  # float32 [phases, tiles of both kinds, SEGMENTS, BLOCK_C, BLOCK_R]
    counter_ptr,  # int32 [phases, tiles of both kinds]
    batch,
    film_stride,
    eps,
    LENGTH: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    COUT: tl.constexpr,
    OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PHASES: tl.constexpr,
    TILES: tl.constexpr,
    NORM: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    FILM: tl.constexpr,  # 1: shift, 2: scale and shift
    RESIDUAL: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SPLIT: tl.constexpr,  # one segment a program
    WIDE: tl.constexpr,
    POSITION_BITS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Programs that share weights run together: these come from memory once.
    positions: tl.constexpr = 1 << POSITION_BITS
    samples: tl.constexpr = BLOCK_R // positions
    each: tl.constexpr = (STEPS + SEGMENTS - 1) // SEGMENTS
    phase, segment = tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(batch, samples)
    tile = tl.program_id(0) // across
    first = (tl.program_id(0) - tile * across).to(tl.int64) * samples
    r = tl.arange(0, BLOCK_R)
    behind, at = r // positions, r % positions
    valid = (at < OUT) & (behind < tl.minimum(batch - first, samples).to(tl.int32))
    x, second = x_ptr + first * (LENGTH * C0), second_ptr + first * (LENGTH * C1)
    weight = weight_ptr + (phase * TILES + tile).to(tl.int64) * (STEPS * BLOCK_C * BLOCK_K)
    begin = segment * each
    total = summed(
        tl.zeros((BLOCK_C, BLOCK_R), tl.float32),
        x,
        second,
        weight,
        behind,
        at * STRIDE - PADDING + phase,
        valid,
        begin,
        tl.minimum(begin + each, STEPS),
        LENGTH,
        C0,
        C1,
        WIDE,
        BLOCK_C,
        BLOCK_K,
    )
    for later in range(1, 1 if SPLIT else SEGMENTS):
        total += summed(
            tl.zeros((BLOCK_C, BLOCK_R), tl.float32),
            x,
            second,
            weight,
            behind,
            at * STRIDE - PADDING + phase,
            valid,
            later * each,
            tl.minimum(later * each + each, STEPS),
            LENGTH,
            C0,
            C1,
            WIDE,
            BLOCK_C,
            BLOCK_K,
        )
    last = True
    if SPLIT:  # as `conv_exchange.added`; calling that, some shapes spill and store in less than 16 bytes
        index = phase * tl.num_programs(0) + tl.program_id(0)
        place = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + r[None, :]
        parts = partial_ptr + index.to(tl.int64) * (SEGMENTS * BLOCK_C * BLOCK_R) + place
        tl.store(parts + segment * (BLOCK_C * BLOCK_R), total)
        tl.debug_barrier()  # of all threads, before one of them says so
        last = tl.atomic_add(counter_ptr + index, 1, sem="acq_rel") == SEGMENTS - 1
    if last:
        if SPLIT:
            tl.debug_barrier()
            total = tl.load(parts, cache_modifier=".cg")  # from L2, where the others' are
            for part in tl.static_range(1, SEGMENTS):
                total += tl.load(parts + part * (BLOCK_C * BLOCK_R), cache_modifier=".cg")
        finished(
            total,
            bias_ptr,
            norm_weight_ptr,
            norm_bias_ptr,
            film_ptr,
            residual_ptr,
            out_ptr,
            first,
            tile,
            valid,
            behind * (OUT * PHASES) + at * PHASES + phase,
            film_stride,
            eps,
            COUT,
            OUT,
            OUT * PHASES,
            NORM,
            GROUP,
            GROUP_BITS,
            FILM,
            RESIDUAL,
            POSITION_BITS,
            BLOCK_C,
            BLOCK_R,
        )


def scratch_of(
    batch: int, out: int, sources: tuple[int, ...], c_out: int, taps: int, *, group: int, up: bool, dtype: torch.dtype
) -> tuple[int, int]:
    """What `launch_conv1d` needs to have: elements of `partial`, elements of `counters`; 0, 0 where no sum is divided.

    Args:
        out: output positions a sample.
        sources, c_out, taps, group, up: of the weight, as `pack_conv1d` has them; taps are 2 where `up`.
    """
    phases = 2 if up else 1
    by, k = channels_of(c_out, group), step_of(sources, dtype)
    steps = taps * sum(triton.cdiv(c, k) for c in sources)
    positions = triton.next_power_of_2(out // phases)
    rows = rows_of(batch, positions)
    tiles = phases * by.tiles * triton.cdiv(batch, rows // positions)
    segments = segments_of(steps, phases * by.tiles)
    if segments == 1 or tiles >= FILL:
        return 0, 0
    return tiles * segments * by.block * rows, tiles


def launch_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    *,
    second: torch.Tensor | None = None,
    stride: int = 1,
    norm: tuple[torch.Tensor, torch.Tensor] | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    film: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    partial: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    split: bool | None = None,
    rows: int | None = None,
) -> None:
    """Write what `conv1d_reference.conv1d` says to `out`. Checks nothing.

    All but film's rows are contiguous; x, second, residual, weight and out have one dtype, bfloat16, float16 or
    float32. Sums are float32. `conv1d_tiles.fits` says which sizes are possible.

    Args:
        x, second: [B, L, c0], and [B, L, c1] or None.
        weight: by `pack_conv1d`, for these sources, norm and dtype; two phases: a transposed convolution's.
        bias: float32 [c_out].
        out: [B, L', c_out].
        norm, groups, eps: GroupNorm's weight and bias, float32 [c_out], and Mish behind it; None: neither.
        film: float32 [B, c_out]: shift; or [B, 2 c_out]: scale and shift. Only the last dimension is contiguous.
        residual: [B, L', c_out].
        partial, counters: float32, and int32 of zeros, as many as `scratch_of` says: of this call alone, until it is
            done. Allocated where they are needed and None.
        split, rows: whether each segment has a program, and rows of a tile; else as is best, on which
            `scratch_of` counts. The bits are the same.
    """
    if out.numel() == 0:
        return
    batch, length, c0 = x.shape
    c1 = 0 if second is None else second.shape[2]
    c_out = out.shape[2]
    phases, tiles, steps, block_c, block_k = weight.shape
    out_length = out.shape[1] // phases
    taps = steps // (triton.cdiv(c0, block_k) + triton.cdiv(c1, block_k))
    group = 0 if norm is None else c_out // groups
    padded = triton.next_power_of_2(group) if group else 1
    positions = triton.next_power_of_2(out_length)
    rows = rows or rows_of(batch, positions)
    across = triton.cdiv(batch, rows // positions)
    segments = segments_of(steps, phases * tiles)
    split = segments > 1 and (phases * tiles * across < FILL if split is None else split)
    if split and partial is None:
        count = phases * tiles * across * segments * block_c * rows
        partial = torch.empty(count, dtype=torch.float32, device=x.device)
    if split and counters is None:
        counters = torch.zeros(phases * tiles * across, dtype=torch.int32, device=x.device)
    norm_weight, norm_bias = (bias, bias) if norm is None else norm
    conv1d_kernel[(tiles * across, phases, segments if split else 1)](
        x,
        x if second is None else second,
        weight,
        bias,
        norm_weight,
        norm_bias,
        bias if film is None else film,
        x if residual is None else residual,
        out,
        bias if partial is None else partial,
        bias if counters is None else counters,
        batch,
        0 if film is None else film.stride(0),
        eps,
        LENGTH=length,
        C0=c0,
        C1=c1,
        COUT=c_out,
        OUT=out_length,
        STRIDE=stride,
        PADDING=1 if phases == 2 else taps // 2,
        PHASES=phases,
        TILES=tiles,
        NORM=norm is not None,
        GROUP=group,
        GROUP_BITS=padded.bit_length() - 1,
        FILM=0 if film is None else film.shape[1] // c_out,
        RESIDUAL=residual is not None,
        STEPS=steps,
        SEGMENTS=segments,
        SPLIT=split,
        WIDE=interpreted() and x.dtype == torch.bfloat16,
        POSITION_BITS=positions.bit_length() - 1,
        BLOCK_C=block_c,
        BLOCK_R=rows,
        BLOCK_K=block_k,
        num_warps=8 if block_c == 128 else 4,
        num_stages=4 if x.element_size() == 2 else 2,
    )

"""What every kernel computes, in plain PyTorch. Read this first.

Each function follows the dtype of the state it is given: in float64 it is the oracle of the tests, in float32 it
is the CPU path. Coefficients come as (table, index): a tensor of rows, and the row that each sample is at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import columns as col
from . import constants as const


def philox4x32(
    counter: Sequence[Tensor | int], key: Sequence[Tensor | int], rounds: int = const.PHILOX_ROUNDS
) -> tuple[Any, ...]:
    """Philox4x32 (Salmon et al. 2011): four 32-bit words from a 128-bit counter and a 64-bit key.

    All words are int64 tensors (or ints) that hold 0 ... 2^32 - 1; they broadcast. The 64-bit products wrap in int64,
    and the mask after the shift takes the sign's copies away, so every bit is that of unsigned arithmetic.
    """
    mask = 0xFFFFFFFF
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        p0, p1 = c0 * const.PHILOX_M0, c2 * const.PHILOX_M1
        c0, c1, c2, c3 = ((p1 >> 32) & mask) ^ c1 ^ k0, p1 & mask, ((p0 >> 32) & mask) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + const.PHILOX_W0) & mask, (k1 + const.PHILOX_W1) & mask
    return c0, c1, c2, c3


def box_muller(w0: Tensor, w1: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Two standard normals from two words (Box & Muller 1958): r cos a and r sin a, r = sqrt(-2 ln u).

    u = w0 2^-32 + 2^-33 in float32, by contract; a = 2 pi w1 2^-32. What follows is in `dtype`: float32 uses the
    kernels' polynomials, float64 the exact functions.
    """
    u = w0.to(torch.float32) * const.U_SCALE + const.U_OFFSET
    turns = torch.where(w1 < 2**31, w1, w1 - 2**32)  # as a signed word: -1/2 ... 1/2 of a turn
    if dtype == torch.float64:
        r, angle = torch.sqrt(-2.0 * torch.log(u.double())), 2.0 * math.pi * const.U_SCALE * turns.double()
        return r * torch.cos(angle), r * torch.sin(angle)

    bits = u.view(torch.int32)
    exponent = (bits - const.LOG_SPLIT) & -(1 << 23)  # u = 2^exponent (1 + f); it stays in its place
    f = (bits - exponent).view(torch.float32) - 1.0
    r = torch.sqrt(torch.addcmul(exponent.to(torch.float32) * const.LOG_EXPONENT, f, _horner(const.LOG, f)))
    s = turns.to(torch.float32) * const.U_SCALE
    a = 0.25 - s.abs()  # cos 2 pi s = sin 2 pi a
    b = torch.copysign(0.25 - a.abs(), s)  # sin 2 pi s = sin 2 pi b, and |b| <= 1/4
    return r * (a * _horner(const.SIN, a * a)), r * (b * _horner(const.SIN, b * b))


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def normal(
    seeds: Tensor, shape: Sequence[int], *, step: int | Tensor, stream: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The noise contract: z[b, e] = normal(seed[b], stream, step, e).

    Args:
        seeds: int64 [B], the bits of each sample's unsigned 64-bit seed.
        shape: shape of one sample, (C, H, W) or any other; e is the row-major index in it.
        step: the counter's step, one for all or int64 [B].
        stream: 0 initial x_T, 1 step noise, 2 training noise, 3 inpainting noise.
        dtype: float32, or float64 for the oracle (the same words).

    Returns:
        [B, *shape], standard normal.
    """
    n, batch = math.prod(shape), seeds.shape[0]
    lane = torch.arange(const.chunk(n), dtype=torch.int64, device=seeds.device)
    seeds = seeds[:, None]
    key = (seeds & 0xFFFFFFFF, (seeds >> 32) & 0xFFFFFFFF)
    step = torch.as_tensor(step, dtype=torch.int64, device=seeds.device).expand(batch)[:, None] & 0xFFFFFFFF
    w0, w1, w2, w3 = philox4x32((lane, step, stream, 0), key)
    z = torch.cat([*box_muller(w0, w1, dtype), *box_muller(w2, w3, dtype)], dim=1)  # [B, 4 q]: chunk after chunk
    return z[:, :n].reshape(batch, *shape).contiguous()


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """q(x_t | x_0): sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Ho et al. 2020, eq. 4).

    `x0` and `noise` are [B, ...]; `t` is int64 [B]; `table` [T, 2] holds the two coefficients. Computed in the table's
    dtype, returned in x0's.
    """
    a, b = (c.reshape(-1, *[1] * (x0.ndim - 1)) for c in table[t].unbind(1))
    return (a * x0.to(table.dtype) + b * noise.to(table.dtype)).to(x0.dtype)


def q_sample(x0: Tensor, t: Tensor, table: Tensor, seeds: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor]:
    """`add_noise` with the contract's own noise: returns (x_t, noise), both in x0's dtype.

    x_t is made from the unrounded noise.
    """
    z = normal(seeds, x0.shape[1:], step=step, stream=stream, dtype=table.dtype)
    return add_noise(x0, z, t, table), z.to(x0.dtype)


def noise_mse(
    model_output: Tensor,
    seeds: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    step: int,
    stream: int,
) -> Tensor:
    """Each sample's mean (m - target)^2 (Ho et al. 2020, eq. 14), [B], float32 (float64 for a float64 output).

    The target is the contract's noise z, or, with `x0` [B, ...], table[t, 0] z + table[t, 1] x0.
    """
    return _off_target(model_output, seeds, x0, t, table, step, stream).square().unsqueeze(-1).flatten(1).mean(1)


def noise_mse_backward(grad: Tensor, model_output: Tensor, *drawn: Any) -> Tensor:
    """Its gradient, 2 (m - target) grad[b] / n, in the output's dtype; `drawn` are the other arguments of the loss."""
    d = _off_target(model_output, *drawn)
    return (per_sample(grad * (2 / math.prod(d.shape[1:])), d) * d).to(model_output.dtype)


def _off_target(
    model_output: Tensor,
    seeds: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    step: int,
    stream: int,
) -> Tensor:
    m = model_output.to(torch.promote_types(model_output.dtype, torch.float32))
    target = normal(seeds, m.shape[1:], step=step, stream=stream, dtype=m.dtype)
    if x0 is not None and t is not None and table is not None:
        target = add_noise(target, x0, t, table)
    return m - target


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to be broadcast over `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def guided(conditional: Tensor, unconditional: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance: m_u + w (m_c - m_u), a weight a sample (Ho & Salimans 2022, eq. 6, w = 1 + theirs)."""
    return unconditional + per_sample(guidance, conditional) * (conditional - unconditional)


def rescale_factor(conditional: Tensor, m: Tensor, rescale: Tensor) -> Tensor:
    """What a guided output m is multiplied with to come nearer to the conditional one's deviation, [B].

    phi std(m_c) / std(m) + 1 - phi (Lin et al. 2023, arXiv 2305.08891, eq. 15-16), with phi = `rescale` [B] and
    deviations over a sample; 1 where m is constant.
    """
    # From the first element, since the deviation of a constant must be 0 and not its rounding.
    flat = (v.unsqueeze(-1).flatten(1) for v in (conditional, m))
    theirs, own = ((v - v[:, :1]).std(1, correction=0) for v in flat)
    return torch.where(own == 0, 1.0, rescale * theirs / own + 1 - rescale)


def dynamic_bound(x0: Tensor, ratio: Tensor, clip: Tensor) -> Tensor:
    """Dynamic thresholding's bound of abs(x0), [B] (Imagen, arXiv 2205.11487, section 2.3).

    The `ratio`-quantile of a sample's abs(x0), interpolated linearly between its neighbours in the order, and kept
    within 1 ... clip.
    """
    ordered = x0.abs().unsqueeze(-1).flatten(1).sort(dim=1).values
    position = ratio.double() * (ordered.shape[1] - 1)
    low = position.long()
    high = (low + 1).clamp(max=ordered.shape[1] - 1)
    a, b = (ordered.gather(1, i[:, None])[:, 0] for i in (low, high))
    weight = (position - low).to(a.dtype)
    between = torch.where((weight == 0) | (a == b), a, a + weight * (b - a))  # the difference of infinities is NaN
    return between.clamp_min(1.0).minimum(clip)


class Step(NamedTuple):
    """What one step gives: the new state, the (limited) predicted clean sample, and where that was not finite."""

    x: Tensor  # [B, ...] the state after the step
    x0: Tensor  # [B, ...] predicted clean sample; the next row's h1
    finite: Tensor  # bool [B]


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    noise: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    *,
    guidance: Tensor | None = None,
    rescale: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    known_noise: Tensor | None = None,
    limited: bool = True,
    dynamic: bool = False,
    learned: bool = False,
    direct: bool = True,
) -> Step:
    """Apply to each sample the table's row that its cursor is at; `columns` has the formulas.

    Args:
        x: state [B, ...], float32 or float64.
        model_output: what the model returned for ``c_in * x``, any float dtype. Like x; with twice as many samples
            where there is guidance, the unconditional ones first; with twice the channels where it learns a variance.
        table: [rows, columns] in the state's dtype.
        cursor: int32 or int64 [B].
        noise: z, [B, ...]; None where the table adds none.
        h1, h2, h3: predicted clean samples of the last three rows, the last one first; None where the table doesn't
            look back as far.
        guidance, rescale: [B], see `guided` and `rescale_factor`.
        known, mask, known_noise: [B, ...], for inpainting: where the mask is set, x' is the known sample, noised.
        limited: whether to clamp x0 to the rows' `clip`.
        dynamic: whether to limit x0 by `dynamic_bound` where the row has a `ratio`.
        learned: whether the model's second half of channels is the variance's v.
        direct: whether there is a term in the model's output itself.
    """
    one = common_row(table, cursor)
    row = table[cursor.long()] if one is None or dynamic else table

    def c(index: int) -> Any:
        return per_sample(row[:, index], x) if one is None else one[index]

    moving = c(col.ADVANCE) != 0

    def read(v: Tensor) -> Tensor:
        """At an identity row the sample stays, whatever the model says of it."""
        return v if moving is True else torch.where(torch.as_tensor(moving, device=v.device), v, 0.0)

    m, v = (read(part) for part in _prediction(model_output, guidance, rescale, learned, x.dtype))
    x0 = c(col.X0_X) * x + c(col.X0_M) * m
    finite = finite_samples(x0, v) if learned else finite_samples(x0)
    if dynamic:
        ratio, clip = row[:, col.RATIO], row[:, col.CLIP]
        bound = per_sample(torch.where(ratio != 0, dynamic_bound(x0, ratio, clip), clip), x)
        x0 = torch.clamp(x0, -bound, bound) / torch.where(per_sample(ratio, x) != 0, bound, 1.0)
    elif limited:
        x0 = torch.clamp(x0, -c(col.CLIP), c(col.CLIP))  # torch's clamp keeps NaN
    out = c(col.X_X) * x + c(col.X_X0) * x0
    x_z = c(col.X_Z) * torch.exp2(c(col.S_0) + c(col.S_V) * v) if learned else c(col.X_Z)
    past = [None if h is None else read(h) for h in (h1, h2, h3, noise)]
    scales = [c(index) for index in (col.X_M, col.X_H1, col.X_H2, col.X_H3)]
    for scale, term in zip([*scales, x_z], [m if direct else None, *past], strict=True):
        if term is not None:
            out = out + scale * term
    if known is not None and mask is not None:
        there = c(col.K_X) * known + (0.0 if known_noise is None else c(col.K_Z) * known_noise)
        out = torch.where(mask & moving, there, out)
    return Step(out, x0, finite)


def finite_samples(*parts: Tensor) -> Tensor:
    """Whether all of a sample is finite, bool [B]; `parts` are [B, ...]."""
    if all(math.isfinite(part.sum().item()) for part in parts):  # the usual case, in a third of the time
        return torch.ones(len(parts[0]), dtype=torch.bool, device=parts[0].device)
    return torch.stack([part.isfinite().unsqueeze(-1).flatten(1).all(dim=1) for part in parts]).all(dim=0)


def common_row(table: Tensor, cursor: Tensor) -> list[float] | None:
    """The row that all samples are at, if it is one: products with its numbers take less time than with [B, 1, ...]."""
    first, *others = cursor.tolist() or [None]
    return None if first is None or any(c != first for c in others) else table[first].tolist()


def _prediction(
    output: Tensor, guidance: Tensor | None, rescale: Tensor | None, learned: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(m, v) from the model's output; v is m where no variance is learned."""
    unconditional, conditional = output.to(dtype).chunk(2) if guidance is not None else (output, output.to(dtype))
    (m, v) = conditional.chunk(2, dim=1) if learned else (conditional, conditional)
    if guidance is None:
        return m, v
    own = m
    m = guided(own, unconditional[:, : own.shape[1]] if learned else unconditional, guidance)
    if rescale is not None:
        m = m * per_sample(rescale_factor(own, m, rescale), m)
    return m, v

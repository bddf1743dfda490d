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
    """Two standard normals from two words (Box & Muller 1958): r cos a and r sin a, r = sqrt(-2 ln u0), a = 2 pi u1.

    The uniforms are float32 by contract; what follows is in `dtype`. float32 uses the kernels' polynomials, float64 the
    exact functions.
    """
    u0, u1 = (w.to(torch.float32) * const.U_SCALE + const.U_OFFSET for w in (w0, w1))
    if dtype == torch.float64:
        r, angle = torch.sqrt(-2.0 * torch.log(u0.double())), 2.0 * math.pi * u1.double()
        return r * torch.cos(angle), r * torch.sin(angle)

    bits = u0.view(torch.int32)
    exponent = (bits - 0x3F2AAAAB) >> 23  # u0 = 2^exponent (1 + f), 1 + f in [2/3, 4/3)
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    r = torch.sqrt(torch.addcmul(exponent * const.MINUS_TWO_LN2, f, _horner(const.LOG, f)))
    s = u1 - 0.5  # cos 2 pi u = -cos 2 pi s, sin 2 pi u = -sin 2 pi s
    a = s.abs() - 0.25  # -cos 2 pi s = sin 2 pi a
    b = torch.copysign(0.25 - a.abs(), -s)  # -sin 2 pi s = sin 2 pi b, |b| <= 1/4
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
    *,
    limited: bool = True,
) -> Step:
    """Apply to each sample the table's row that its cursor is at; `columns` has the formulas.

    Args:
        x: state [B, ...], float32 or float64.
        model_output: what the model returned for ``c_in * x``, same shape, any float dtype.
        table: [rows, columns] in the state's dtype.
        cursor: int32 or int64 [B].
        noise: z, [B, ...]; None where the table adds none.
        h1, h2: predicted clean samples of the last row and of the one before; None where the table has no history.
        limited: whether to clamp x0 to the rows' `clip`.
    """
    row = table[cursor.long()]

    def c(index: int) -> Tensor:
        return row[:, index].reshape(-1, *[1] * (x.ndim - 1))

    moving = c(col.ADVANCE) != 0  # at an identity row the sample stays, whatever the model says of it
    m = torch.where(moving, model_output.to(x.dtype), 0.0)
    x0 = c(col.X0_X) * x + c(col.X0_M) * m
    finite = torch.isfinite(x0).flatten(1).all(dim=1)
    if limited:
        x0 = torch.clamp(x0, -c(col.CLIP), c(col.CLIP))  # torch's clamp keeps NaN
    out = c(col.X_X) * x + c(col.X_X0) * x0 + c(col.X_M) * m
    for index, term in ((col.X_H1, h1), (col.X_H2, h2), (col.X_Z, noise)):
        if term is not None:
            out = out + c(index) * term
    return Step(out, x0, finite)

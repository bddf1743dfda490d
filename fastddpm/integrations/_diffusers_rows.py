"""The coefficients of diffusers' schedulers, all steps at once, in its own arithmetic.

diffusers computes them anew in each step, from float32 scalars. Here the same float32 operations in the same order make
columns of them, one value a step, so that the results stay equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from fastddpm_kernels import columns as col
from numpy.typing import NDArray
from torch import Tensor

Ints = Sequence[int] | Tensor


class Levels(NamedTuple):
    """alpha_bar of each step's noise level and of the one behind it, float32 [n] on the CPU, and where they exist."""

    now: Tensor
    prev: Tensor
    exists: list[bool]


def levels(alphas_cumprod: Tensor, t: Ints, prev: Ints, final: Tensor | float) -> Levels:
    """`Levels` of time steps t with prev behind them; `final` is alpha_bar behind the last one (prev below 0)."""
    n = len(alphas_cumprod)
    own, behind = (torch.as_tensor(v, dtype=torch.int64, device="cpu") for v in (t, prev))
    last = torch.as_tensor(final, dtype=alphas_cumprod.dtype, device="cpu")
    before = torch.where(behind >= 0, alphas_cumprod[behind.clamp(0, n - 1)], last)
    exists = (own >= 0) & (own < n) & (behind < n)
    return Levels(alphas_cumprod[own.clamp(0, n - 1)], before, exists.tolist())


def ddpm_columns(at: Levels, variance_type: str, applied_as: str, last: Tensor) -> list[Tensor]:
    """a, b, c0, c1, sigma of DDPM: x' = c0 x0 + c1 x + sigma z (Ho et al. 2020, eq. 7); [n] each.

    a and b are sqrt(alpha_bar) and sqrt(1 - alpha_bar). diffusers computes the variance by one attribute and applies it
    by another, `applied_as`, which are the same unless somebody sets one. `last`, bool [n]: where t = 0, which adds no
    noise.
    """
    rest, rest_prev = 1 - at.now, 1 - at.prev
    alpha = at.now / at.prev
    beta = 1 - alpha
    x0 = (at.prev**0.5 * beta) / rest
    x = alpha**0.5 * rest_prev / rest
    variance = torch.clamp((1 - at.prev) / (1 - at.now) * beta, min=1e-20)
    if variance_type == "fixed_small_log":
        variance = torch.exp(0.5 * torch.log(variance))
    elif variance_type == "fixed_large":
        variance = beta
    elif variance_type == "fixed_large_log":
        variance = torch.log(beta)  # negative, so that sigma is NaN, as there
    sigma = variance if applied_as == "fixed_small_log" else variance**0.5
    return [at.now**0.5, rest**0.5, x0, x, torch.where(last, 0.0, sigma)]


def ddim_columns(at: Levels, eta: float) -> list[Tensor]:
    """a, b, a_prev, direction, sigma of DDIM: x' = a_prev x0 + direction eps + sigma z (eq. 12 and 16); [n] each."""
    variance = ((1 - at.prev) / (1 - at.now)) * (1 - at.now / at.prev)
    sigma = eta * variance**0.5
    return [at.now**0.5, (1 - at.now) ** 0.5, at.prev**0.5, (1 - at.prev - sigma**2) ** 0.5, sigma]


def dpm_columns(
    alpha: Tensor, sigma: Tensor, order: int, algorithm: str, midpoint: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """DPM-Solver's steps of one order, over levels alpha, sigma [n + 1]; [n] each.

    Returns:
        (x, d0, d1, d2, z), the coefficients of x' = x X + d0 D0 + d1 D1 + d2 D2 + z Z, and (i0, i1, w, u) of the
        differences D1_0 = i0 (m0 - m1), D1_1 = i1 (m1 - m2), D1 = D1_0 + w (D1_0 - D1_1), D2 = u (D1_0 - D1_1);
        DPM-Solver++ (arXiv 2211.01095), algorithm 2 and appendix. What an order doesn't have is 0; the first order - 1
        steps look back beyond the first level, and aren't to be used.
    """
    lam = torch.log(alpha) - torch.log(sigma)
    alpha_t, sigma_t, alpha_s, sigma_s = alpha[1:], sigma[1:], alpha[:-1], sigma[:-1]
    s = lam[:-1]
    h, h0, h1 = lam[1:] - s, s - s.roll(1), s.roll(1) - s.roll(2)
    data, sde = algorithm.endswith("++"), algorithm.startswith("sde")
    scale = alpha_t if data else sigma_t
    if data and sde:  # grows the other way than the others
        grown = 1.0 - torch.exp(-2.0 * h)
        d0, d1 = scale * grown, scale * (grown / (-2.0 * h) + 1.0)
        d2 = scale * ((grown - 2.0 * h) / (2.0 * h) ** 2 - 0.5)
    elif data:
        grown = torch.exp(-h) - 1.0
        d0, d1 = -(scale * grown), scale * (grown / h + 1.0)
        d2 = -(scale * ((grown + h) / h**2 - 0.5))
    else:
        grown, twice = torch.exp(h) - 1.0, 2.0 if sde else 1.0
        d0, d1 = -(twice * (scale * grown)), -(twice * (scale * (grown / h - 1.0)))
        d2 = -(scale * ((grown - h) / h**2 - 0.5))
    if order == 2 and midpoint:
        d1 = 0.5 * d0
    x = (sigma_t / sigma_s * torch.exp(-h) if sde else sigma_t / sigma_s) if data else alpha_t / alpha_s
    z = sigma_t * torch.sqrt(1.0 - torch.exp(-2 * h) if data else torch.exp(2 * h) - 1.0)
    none = torch.zeros_like(h)
    r0, r1 = h0 / h, h1 / h
    steps = [x, d0, d1 if order > 1 else none, d2 if order > 2 else none, z if sde else none]
    back = [1.0 / r0, 1.0 / r1, r0 / (r0 + r1), 1.0 / (r0 + r1)]
    return steps, [back[0] if order > 1 else none, *(v if order > 2 else none for v in back[1:])]


def sigma_columns(kind: str, sigma: Tensor, divisor: Tensor, to: Tensor, *noise: Tensor) -> list[Tensor]:
    """scale, divisor, dt, *noise and, of v alone, v_m, v_x, of a model that's told sigma, as in k-diffusion; [n] each.

    Its input is x / scale; its predicted x0 is x - divisor eps or, of v, v_m v + x / v_x; and Euler's step to the level
    `to` is x' = x + dt (x - x0) / divisor. The divisor is sigma, or what churn lifts it to.
    """
    square = sigma**2 + 1
    scale = square**0.5
    return [scale, divisor, to - divisor, *noise, *([-sigma / scale, square] if kind == "v_prediction" else [])]


def euler_columns(kind: str, sigmas: Tensor, s_churn: float, s_tmin: float, s_tmax: float) -> list[Tensor]:
    """`sigma_columns` of Euler's method over levels sigmas [n + 1] (EDM, arXiv 2206.00364, without its correction).

    With churn the noise has two columns, lift and where there is any: there x is first lifted by lift z. (diffusers'
    model was called before that.)
    """
    sigma, to, gamma = sigmas[:-1], sigmas[1:], min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
    if gamma == 0:
        return sigma_columns(kind, sigma, sigma, to)
    churned = (sigma >= s_tmin) & (sigma <= s_tmax)
    hat = torch.where(churned, sigma * (gamma + 1), sigma)
    lift = torch.where(churned, (hat**2 - sigma**2) ** 0.5, 0.0)
    return sigma_columns(kind, sigma, hat, to, lift, churned & (gamma > 0))


def ancestral_columns(kind: str, sigmas: Tensor) -> list[Tensor]:
    """`sigma_columns` of ancestral sampling over levels sigmas [n + 1].

    Its noise has one column, up: Euler's method down to sqrt(sigma'^2 - up^2), then noise up to sigma'.
    """
    now, to = sigmas[:-1], sigmas[1:]
    up = (to**2 * (now**2 - to**2) / now**2) ** 0.5
    return sigma_columns(kind, now, now, (to**2 - up**2) ** 0.5, up)


def unipc_columns(
    alpha: Tensor, sigma: Tensor, order: int, predict_x0: bool, solver_type: str
) -> tuple[list[Tensor], Tensor]:
    """UniPC's intervals of one order, over levels alpha, sigma [n + 1]; [n] each (arXiv 2302.04867, theorem 3.1).

    Returns:
        x, d0, d1 and then r_i, p_i (i = 1 ... order - 1), q_i (i = 1 ... order). With D_i = (m_i - m_0) / r_i over the
        predictions behind m_0, the predictor is x' = x X - d0 m_0 - d1 sum(p_i D_i); and the corrector, once the model
        has been asked at x', adds -d1 (q_1 D_1 + ... + q_order (m' - m_0)) in its place.
        bool [n]: where all of that exists. The first order - 1 intervals look back beyond the first level.
    """
    lam = torch.log(alpha) - torch.log(sigma)
    s, h = lam[:-1], lam[1:] - lam[:-1]
    hh = -h if predict_x0 else h
    grown = torch.expm1(hh)
    base = hh if solver_type == "bh1" else grown
    scale = alpha[1:] if predict_x0 else sigma[1:]
    x = sigma[1:] / sigma[:-1] if predict_x0 else alpha[1:] / alpha[:-1]
    columns = [x, scale * grown, scale * base]
    r = [(s.roll(i) - s) / h for i in range(1, order)]
    exists = torch.isfinite(columns[2]) & (torch.arange(len(h), device="cpu") >= order - 1)
    half = torch.full_like(h, 0.5)
    if order == 1:
        return [*columns, half], exists
    left, right, term, factorial = [], [], grown / hh - 1, 1
    nodes = torch.stack([*r, torch.ones_like(h)], dim=1)
    for i in range(1, order + 1):
        left.append(torch.pow(nodes, i - 1))
        right.append(term * factorial / base)
        factorial *= i + 1
        term = term / hh - 1 / factorial
    matrix, b = torch.stack(left, dim=1), torch.stack(right, dim=1)
    q, failed = torch.linalg.solve_ex(matrix, b)
    exists &= (failed == 0) | (torch.arange(len(h), device="cpu") == len(h) - 1)  # nothing corrects the last
    p = [half]
    if order > 2:
        solved, failed = torch.linalg.solve_ex(matrix[:, :-1, :-1], b[:, :-1])
        p, exists = list(solved.unbind(1)), exists & (failed == 0)
    return [*columns, *r, *p, *q.unbind(1)], exists


# --- the same as rows of the step table, for the kernel ---------------------------------------------------------------

Floats = NDArray[np.float64]


def predicted(kind: str, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Coefficients of (x, m) in x0."""
    if kind == "epsilon":
        return 1 / a, -b / a
    return (a, -b) if kind == "v_prediction" else (np.zeros_like(a), np.ones_like(a))


def predicted_noise(kind: str, a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """Coefficients of (x, m) in the noise."""
    if kind == "sample":
        return 1 / b, -a / b
    return (b, a) if kind == "v_prediction" else (np.zeros_like(a), np.ones_like(a))


def predicted_ve(kind: str, divisor: Floats, *v: Floats) -> tuple[Floats, Floats]:
    """Coefficients of (x, m) in x0, from `sigma_columns`, whose last two are v."""
    one = np.ones_like(divisor)
    if kind == "epsilon":
        return one, -divisor
    return (1 / v[1], v[0]) if kind == "v_prediction" else (np.zeros_like(one), one)


def table(n: int, **columns: Floats | float) -> Floats:
    """A step table [n + 1, columns], an identity row behind n rows of the columns that are given."""
    rows = np.zeros((n + 1, len(col.COLUMNS)))
    rows[:, [col.C_IN, col.CLIP, col.X_X]] = 1.0, np.inf, 1.0
    rows[:n, col.X_X], rows[:n, col.STEP], rows[:n, col.ADVANCE] = 0.0, np.arange(n), 1.0
    for name, values in columns.items():
        rows[:n, col.COLUMNS.index(name)] = values
    return rows

"""Tables through noise levels that the caller gives, of a model D(x; sigma) that is told sigma and returns x_0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from fastddpm_kernels.columns import X_Z
from numpy.typing import ArrayLike

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..solvers import StepTable, step_table
from ..solvers.churn import Churned
from ..solvers.dpm import multistep_table
from ..solvers.levels import Floats, Levels


def levels(sigmas: ArrayLike | Sequence[float]) -> Floats:
    """`sigmas`, float64 [n + 1]; `ConfigError` unless there are two, all are finite, and above 0 but for the last."""
    given = np.asarray(sigmas, dtype=np.float64)
    good = given.ndim == 1 and len(given) > 1 and np.isfinite(given).all() and (given[:-1] > 0).all() and given[-1] >= 0
    if not good:
        raise ConfigError("sigmas are no noise levels; needed: two at least, finite, above 0 (the last may be 0)")
    return given


def churned(
    sigmas: Floats,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    eta: float = 0.0,
    rounded: Callable[[Floats], Floats] = lambda sigma: sigma,
) -> Churned:
    """Given levels with churn and ancestral noise.

    Args:
        sigmas: what `levels` returns.
        s_churn, s_tmin, s_tmax, s_noise, eta: as in `solvers.euler` and `solvers.euler_ancestral`.
        rounded: from the levels that churn asks for to those that the model knows.

    Raises:
        ConfigError: for a number out of range, or an eta above 0 where the sigmas rise.
    """
    check(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise, eta=eta)
    if eta > 1:
        raise ConfigError(f"eta is {eta!r}; allowed: a number in 0 ... 1")
    if eta and (np.diff(sigmas) > 0).any():
        raise ConfigError("sigmas rise; with ancestral noise they may not; or eta=0")
    now = sigmas[:-1]
    gamma = np.where((s_tmin <= now) & (now <= s_tmax), min(s_churn / len(now), math.sqrt(2) - 1), 0.0)
    hat = np.where(gamma > 0, np.maximum(rounded(now * (1 + gamma)), now), now)
    with np.errstate(divide="ignore"):
        log_hat, log_next = np.log(hat), np.log(sigmas[1:])
        # sigma_down^2 = sigma'^2 (1 - eta^2 (1 - sigma'^2 / sigma^2))
        down = 0.5 * np.log1p(eta**2 * np.expm1(2 * (log_next - log_hat)))
    lift = np.append(np.log1p((hat - now) / now), 0.0)
    log_sigma = np.append(log_hat, log_next[-1])
    return Churned(log_sigma, np.append(0.0, down) - lift, float(s_noise), EDMSchedule(), "sample", "ve", False)


def first_lift(given: Churned) -> float:
    """Scale of the noise that lifts the state to where the first step starts."""
    return given.s_noise * math.exp(given.log_sigma[0]) * math.sqrt(0.0 - math.expm1(2 * given.log_kept[0]))


def multistep(
    sigmas: Floats, order: int, *, eta: float = 0.0, s_noise: float = 1.0, solver_type: str = "midpoint"
) -> StepTable:
    """DPM-Solver++ (2211.01095), of the SDE where eta isn't 0; order 1 only at its beginning and down to sigma = 0.

    Raises `ConfigError` for a number or a word that isn't allowed, or where the sigmas go up and down.
    """
    if solver_type not in ("midpoint", "heun"):
        raise ConfigError(f"solver_type is {solver_type!r}; allowed: 'midpoint', 'heun'")
    check(eta=eta, s_noise=s_noise)
    check_one_way(sigmas, falling=eta > 0)
    orders = np.minimum(order, np.arange(1, len(sigmas)))
    if sigmas[-1] == 0:
        orders[-1] = 1
    table = multistep_table(_at(sigmas), orders, "sde-dpmsolver++", solver_type, float(eta))
    rows = table.rows.copy()
    rows[:, X_Z] *= s_noise
    return replace(table, rows=rows)


def linear_multistep(sigmas: Floats, order: int, denoise: bool = False) -> StepTable:
    """Adams-Bashforth in sigma: dx / dsigma = eps, a polynomial through the last `order` (1 ... 4) predicted eps.

    With `denoise` the step to sigma = 0 has order 1, and returns x_0. Raises `ConfigError` for another order, or where
    the sigmas go up and down.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 4:
        raise ConfigError(f"order is {order!r}; allowed: 1, 2, 3 or 4")
    check_one_way(sigmas)
    points, shares = np.polynomial.legendre.leggauss(2)  # exact up to degree 3
    weights = np.zeros((4, len(sigmas) - 1))
    for i, (start, end) in enumerate(itertools.pairwise(sigmas)):
        oldest = i if denoise and end == 0 else max(i + 1 - order, 0)
        half, known = (end - start) / 2, sigmas[oldest : i + 1][::-1]
        for j, node in enumerate(known):
            others = np.delete(known, j)
            basis = (start + (points + 1)[:, None] * half - others) / (node - others)
            weights[j, i] = half * shares @ basis.prod(axis=1)
    return of_slopes(sigmas, weights)


def of_slopes(sigmas: ArrayLike, weights: Floats, x_z: ArrayLike = 0.0) -> StepTable:
    """x' = x + w_0 d_i + w_1 d_{i-1} + w_2 d_{i-2} + w_3 d_{i-3} + x_z z, with the slopes d = dx / dsigma = eps.

    Args:
        sigmas: the level at which each row finds its state, and the one behind the last, [rows + 1].
        weights: w, float64 [4, rows].
        x_z: scale of each row's noise, [rows].
    """
    at = _at(np.asarray(sigmas, dtype=np.float64))
    return step_table(
        at.t,
        x0_x=at.eps_x,
        x0_m=at.eps_m,
        x_x=1.0,
        x_x0=weights[0],
        x_h1=weights[1],
        x_h2=weights[2],
        x_h3=weights[3],
        x_z=x_z,
        k_x=at.alpha[1:],
        k_z=at.sigma[1:],
        start=at.start,
        init_noise_sigma=at.init_noise_sigma,
        history_of="epsilon",
    )


def check(**numbers: object) -> None:
    """`ConfigError` for what is no number of at least 0 (infinity is one for s_churn, s_tmin and s_tmax)."""
    for name, value in numbers.items():
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        most = math.inf if name in ("s_churn", "s_tmin", "s_tmax") else 1e3
        if not number or not 0 <= value <= most:  # type: ignore[operator]
            raise ConfigError(f"{name} is {value!r}; allowed: a number in 0 ... {most:g}")


def check_one_way(sigmas: Floats, falling: bool = False) -> None:
    """`ConfigError` unless the sigmas fall (or, unless they must, rise) from each to the next."""
    steps = np.diff(sigmas)
    if not (steps < 0).all() and (falling or not (steps > 0).all()):
        what = "fall from each to the next" if falling else "all fall or all rise"
        raise ConfigError(f"sigmas don't {what}, as this sampler needs them to" + ("; or eta=0" if falling else ""))


def _at(sigmas: Floats) -> Levels:
    with np.errstate(divide="ignore"):
        return Levels.at_edm(EDMSchedule(), np.log(sigmas), "sample")

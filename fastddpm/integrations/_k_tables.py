"""The tables of k-diffusion's and ComfyUI's samplers that no solver of fastddpm is: through given noise levels.

The state is x_0 + sigma eps, the model D(x; sigma) returns x_0; d = (x - D) / sigma is the slope dx / dsigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigError
from ..solvers import StepTable, step_table
from ..solvers.churn import Churned
from ..solvers.dpm import weights as exponential_weights
from ..solvers.levels import Floats
from .sigmas import check, check_one_way, of_slopes

_ADAMS_BASHFORTH = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


def dpmpp_2s(given: Churned) -> StepTable:
    """DPM-Solver++(2S) (arXiv 2211.01095, algorithm 1, r = 1/2), with ancestral noise: two rows a step.

    x' = end / sigma x + (1 - end / sigma) D', D' at the geometric mean of sigma and end, reached by an Euler step.
    """
    levels, columns = given.columns_of_two(0.5 * (given.log_sigma[:-1] + given.log_end))
    to_mid = levels.steps[:-1:2]  # rho = mid / sigma = end / mid = exp(-to_mid), and x = (mid - (1 - rho) D) / rho
    x_h1 = np.zeros(len(levels.t))
    x_h1[1::2] = np.exp(-to_mid) * np.expm1(-to_mid)
    columns["x_x0"][1::2] = -np.expm1(-2 * to_mid)
    return step_table(**columns, x_h1=x_h1)


def dpmpp_sde(sigmas: Floats, *, eta: float = 1.0, s_noise: float = 1.0, r: float = 0.5) -> StepTable:
    """k-diffusion's DPM-Solver++ (stochastic): two rows a step, each with noise; one down to sigma = 0.

    The second row goes from where the step began, without the first one's noise. So what the first leaves in the
    history is not its x_0 but its share of the result, end / sigma x + (1 - 1 / 2 r) (1 - end / sigma) D. From that x_0
    isn't to be had where r is 1/2: `predicted` is NaN there.

    Raises `ConfigError` for a number that isn't allowed, or where the sigmas don't fall.
    """
    check(eta=eta, s_noise=s_noise, r=r)
    for name, value, good in (("eta", eta, eta <= 1), ("r", r, 0 < r <= 1)):
        if not good:
            raise ConfigError(f"{name} is {value!r}; allowed: a number in 0 ... 1" + ", not 0" * (name == "r"))
    check_one_way(sigmas, falling=True)
    log = np.log(sigmas[: -1 if sigmas[-1] == 0 else None])
    now, following = log[:-1], log[1:]
    middle = now + r * (following - now)
    log_a, up_a = _ancestral(now, middle, eta)
    log_b, up_b = _ancestral(now, following, eta)
    factor = 1 / (2 * r)
    first: dict[str, Any] = dict(t=np.exp(now), x0_x=np.exp(log_b - now), x0_m=-(1 - factor) * np.expm1(log_b - now))
    first |= dict(x_x=np.exp(log_a - now), x_m=-np.expm1(log_a - now), x_z=s_noise * up_a, k_z=np.exp(middle))
    second: dict[str, Any] = dict(t=np.exp(middle), x0_m=1.0, x_x0=-factor * np.expm1(log_b - now), x_h1=1.0)
    second |= dict(x_z=s_noise * up_b, k_z=np.exp(following))
    columns: dict[str, Any] = {}
    for name in first | second:
        columns[name] = np.zeros(2 * len(now) + int(sigmas[-1] == 0))
        columns[name][: 2 * len(now) : 2], columns[name][1 : 2 * len(now) : 2] = first.get(name, 0), second.get(name, 0)
    if sigmas[-1] == 0:
        for name, value in (("t", sigmas[-2]), ("x0_m", 1.0), ("x_x0", 1.0)):
            columns[name][-1] = value
    made = step_table(**columns, k_x=1.0, start=(1.0, float(sigmas[0])), init_noise_sigma=float(sigmas[0]))
    predicted = np.array(made.predicted)
    share, known = (column[: 2 * len(now) : 2] for column in (columns["x0_x"], columns["x0_m"]))
    with np.errstate(divide="ignore", invalid="ignore"):
        solved = np.stack([-share / known, 1 / known], axis=1)
    predicted[: 2 * len(now) : 2] = np.where(np.isfinite(solved), solved, np.nan)
    return replace(made, predicted=predicted)


def _ancestral(log_from: Floats, log_to: Floats, eta: float) -> tuple[Floats, Floats]:
    """log sigma_down and sigma_up."""
    lost = -(eta**2) * np.expm1(2 * (log_to - log_from))
    with np.errstate(divide="ignore"):
        return log_to + 0.5 * np.log1p(-lost), np.exp(log_to) * np.sqrt(lost)


def dpm_fast(sigma_min: float, sigma_max: float, n: int, *, eta: float = 0.0, s_noise: float = 1.0) -> StepTable:
    """DPM-Solver-fast (Lu et al. 2022, arXiv 2206.00927, section 3.4), with ancestral noise where eta isn't 0.

    n evaluations in steps of order 3, evenly in log sigma; the last steps are of lower orders.
    Raises `ConfigError` for a number that isn't allowed.
    """
    check(eta=eta, s_noise=s_noise)
    good = all(0 < sigma < math.inf for sigma in (sigma_min, sigma_max)) and sigma_min != sigma_max and eta <= 1
    if not good or (eta and sigma_min > sigma_max):
        raise ConfigError(
            f"sigma_min is {sigma_min!r}, sigma_max {sigma_max!r}, eta {eta!r}; allowed: two levels above 0, eta in "
            "0 ... 1, and 0 unless sigma_min is below sigma_max"
        )
    orders = fast_orders(n)
    t = np.linspace(-math.log(sigma_max), -math.log(sigma_min), len(orders) + 1)
    log: list[float] = []
    weights, noise = np.zeros((4, n)), np.zeros(n)
    for order, now, following in zip(orders, t[:-1], t[1:], strict=True):
        end = following
        if eta:
            end = min(t[-1], -_ancestral(np.array(-now), np.array(-following), eta)[0])
        row = len(log)
        log += [-now - k / order * (end - now) for k in range(order)]
        _put(weights, row, _dpm_solver(order, now, end))
        noise[row + order - 1] = s_noise * math.exp(-end) * math.sqrt(max(math.expm1(2 * (end - following)), 0.0))
    return of_slopes(np.exp([*log, -t[-1]]), weights, noise)


def fast_orders(n: int) -> list[int]:
    """The order, and so the evaluations, of each step of `dpm_fast`; raises `ConfigError` unless n is at least 1."""
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ConfigError(f"n is {n!r}; allowed: an integer of at least 1, how often the model is evaluated")
    whole, rest = divmod(int(n), 3)
    return [3] * whole + [rest] if rest else [3] * (whole - 1) + [2, 1]


def _dpm_solver(order: int, now: float, end: float) -> list[list[float]]:
    """Weights of the slopes at each stage of a step from lambda = `now` to `end`, from the step's beginning.

    2206.00927, algorithms 1 and 2, with r1 = 1/2, or r1 = 1/3 and r2 = 2/3.
    """
    h = end - now
    grown = [math.expm1(k / order * h) for k in range(order + 1)]
    sigma = [math.exp(-now - k / order * h) for k in range(order + 1)]
    if order == 1:
        return [[-sigma[1] * grown[1]]]
    last = -sigma[order]
    if order == 2:
        return [[-sigma[1] * grown[1]], [0.0, last * grown[2]]]
    u = -sigma[2] * 2 * (grown[2] / (2 * h / 3) - 1)
    v = last * 1.5 * (grown[3] / h - 1)
    return [[-sigma[1] * grown[1]], [-sigma[2] * grown[2] - u, u], [last * grown[3] - v, 0.0, v]]


def _put(weights: Floats, row: int, stages: Sequence[ArrayLike]) -> None:
    """From the weights of a step's stages, all from its beginning, to those of its rows, each from the one before."""
    before = np.zeros(0)
    for stage, given in enumerate(stages):
        more = np.array(given)
        more[: len(before)] -= before
        weights[: len(more), row + stage] = more[::-1]
        before = np.array(given)


def heunpp2(given: Churned, sigmas: Floats) -> StepTable:
    """ComfyUI's heunpp2, with churn: a mean of up to three slopes, two Euler steps ahead, weighted by their sigmas."""
    counts = heunpp2_evaluations(sigmas)
    hat = np.exp(given.log_sigma)
    lifts = given.s_noise * hat * np.sqrt(0.0 - np.expm1(2 * given.log_kept))
    visited: list[float] = []
    weights, noise = np.zeros((4, sum(counts))), np.zeros(sum(counts))
    for i, count in enumerate(counts):
        levels = np.array([hat[i], *sigmas[i + 1 : i + count]])
        ahead, shares = np.diff(levels), levels / (count * sigmas[0])
        shares[0] = 1 - shares[1:].sum()
        stages = [ahead[: k + 1] for k in range(count - 1)]
        _put(weights, len(visited), [*stages, (sigmas[i + 1] - hat[i]) * shares])
        visited += levels.tolist()
        noise[len(visited) - 1] = lifts[i + 1]
    return of_slopes([*visited, sigmas[-1]], weights, noise)


def heunpp2_evaluations(sigmas: Floats) -> list[int]:
    """How many evaluations each step of `heunpp2` has: three, but two and one where the last sigma is near."""
    steps = range(len(sigmas) - 1)
    return [1 + sum(bool((sigmas[i + 1 : i + 1 + k] != sigmas[-1]).all()) for k in (1, 2)) for i in steps]


def ipndm(sigmas: Floats, *, max_order: int = 4) -> StepTable:
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902): Adams-Bashforth with the weights of equal steps, order 1 ... 4."""
    _check_order(max_order)
    orders = np.minimum(np.arange(len(sigmas) - 1), max_order - 1)
    orders[-1] *= sigmas[-1] != 0
    return of_slopes(sigmas, _ADAMS_BASHFORTH[orders].T * np.diff(sigmas))


def gradient_estimation(sigmas: Floats, *, ge_gamma: float = 2.0) -> StepTable:
    """Euler's method along gamma d_i + (1 - gamma) d_{i-1} (Permenter & Yuan 2023, arXiv 2306.04848, section 4)."""
    check(ge_gamma=ge_gamma)
    more = np.full(len(sigmas) - 1, ge_gamma - 1.0)
    more[0] = 0.0
    more[-1] *= sigmas[-1] != 0
    weights = np.zeros((4, len(more)))
    weights[0], weights[1] = 1 + more, -more
    return of_slopes(sigmas, weights * np.diff(sigmas))


def deis(sigmas: Floats, *, max_order: int = 3, deis_mode: str = "tab") -> StepTable:
    """tAB-DEIS (Zhang & Chen 2022, arXiv 2204.13902): a polynomial in t through the last slopes, order 1 ... 4.

    t is the time of a variance preserving SDE with sigma(0.001) = 0.002 and sigma(1) = 80 (EDM, arXiv 2206.00364,
    table 1). The integrals are ComfyUI's sums over 10,000 points, which the true ones differ from in the fourth digit.
    """
    _check_order(max_order)
    if deis_mode != "tab":
        raise ConfigError(f"deis_mode is {deis_mode!r}; allowed: 'tab'; a polynomial in sigma ('rhoab') is sample_lms")
    check_one_way(sigmas)
    least, most = math.log1p(0.002**2), math.log1p(80.0**2)
    beta_d = 2 * (least / 1e-3 - most) / (1e-3 - 1)
    beta_min = most - beta_d / 2
    t = (np.sqrt(beta_min**2 + 2 * beta_d * np.log1p(sigmas**2)) - beta_min) / beta_d
    weights = np.zeros((4, len(sigmas) - 1))
    for i in range(len(sigmas) - 1):
        order = min(i + 1, max_order)
        if order == 1 or sigmas[i + 1] == 0:
            weights[0, i] = sigmas[i + 1] - sigmas[i]
            continue
        u, known = np.linspace(t[i], t[i + 1], 10_000), t[i + 1 - order : i + 1][::-1]
        growth = np.expm1(beta_d * u**2 / 2 + beta_min * u)  # sigma^2
        slope = 0.5 * (beta_d * u + beta_min) * (1 + growth) / np.sqrt(growth)  # dsigma / dt
        for j, node in enumerate(known):
            others = np.delete(known, j)
            basis = ((u[:, None] - others) / (node - others)).prod(axis=1)
            weights[j, i] = (slope * basis).sum() * (t[i + 1] - t[i]) / len(u)
    return of_slopes(sigmas, weights)


def res_multistep(sigmas: Floats, *, eta: float = 0.0, s_noise: float = 1.0) -> StepTable:
    """ComfyUI's res_multistep (Zhang et al. 2023, arXiv 2308.02157): the second order exponential method in x_0.

    With ancestral noise the previous prediction counts as far back as its step went down: to its sigma_down.
    Raises `ConfigError` for a number that isn't allowed, or where the sigmas don't fall (with eta = 0: rise and fall).
    """
    check(eta=eta, s_noise=s_noise)
    if eta > 1:
        raise ConfigError(f"eta is {eta!r}; allowed: a number in 0 ... 1")
    check_one_way(sigmas, falling=eta > 0)
    with np.errstate(divide="ignore"):
        log = np.log(sigmas)
    down, up = _ancestral(log[:-1], log[1:], eta) if eta else (log[1:], np.zeros(len(log) - 1))
    h = log[:-1] - down
    w0, _, _ = exponential_weights(True, h)
    before = np.zeros(len(h))
    for i in range(1, len(h) - int(sigmas[-1] == 0)):
        c = (down[i - 1] - log[i - 1]) / h[i]
        before[i] = (1 - w0[i] / h[i]) / c
    return step_table(
        sigmas[:-1],
        x0_m=1.0,
        x_x=np.exp(-h),
        x_x0=w0 - before,
        x_h1=before,
        x_z=s_noise * up,
        k_x=1.0,
        k_z=sigmas[1:],
        start=(1.0, float(sigmas[0])),
        init_noise_sigma=float(sigmas[0]),
    )


def lcm(sigmas: Floats, *, s_noise: float = 1.0, s_noise_end: float | None = None) -> StepTable:
    """x_0 and new noise of the next level: multistep consistency sampling (arXiv 2303.01469, algorithm 1)."""
    end = s_noise if s_noise_end is None else s_noise_end
    check(s_noise=s_noise, s_noise_end=end)
    return step_table(
        sigmas[:-1],
        x0_m=1.0,
        x_x0=1.0,
        x_z=sigmas[1:] * np.linspace(s_noise, end, len(sigmas) - 1),
        k_x=1.0,
        k_z=sigmas[1:],
        start=(1.0, float(sigmas[0])),
        init_noise_sigma=float(sigmas[0]),
    )


def _check_order(max_order: object) -> None:
    if isinstance(max_order, bool) or not isinstance(max_order, int) or not 1 <= max_order <= 4:
        raise ConfigError(f"max_order is {max_order!r}; allowed: 1, 2, 3 or 4")

"""Exponential Adams methods: a step in lambda, of which all that is linear in x is taken exactly (DEIS, UniPC).

The probability flow's step from lambda_s to lambda_t, h = lambda_t - lambda_s, is (A, G below)

    x_t = A x_s + G integral_0^h e^-u f(u) du

with f the predicted noise at lambda_s + u (DPM-Solver, arXiv 2206.00927, prop. 3.1), or the predicted x_0 at
lambda_t - u (DPM-Solver++, arXiv 2211.01095, prop. 4.1). A multistep method puts for f the polynomial in lambda through
the predictions that it knows.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .levels import Floats, Levels

Kind = Literal["sample", "epsilon"]

_REACH = 40.0  # e^-40 is nothing beside 1


def transfer(levels: Levels, kind: Kind) -> tuple[Floats, Floats]:
    """(A, G) of each step, [n], where f is the predicted x_0 ("sample") or the predicted noise ("epsilon").

    Raises `ConfigError` for "epsilon" where the first level is pure noise.
    """
    alpha, sigma = levels.alpha, levels.sigma
    if kind == "sample":
        return sigma[1:] / sigma[:-1], alpha[1:]
    if np.isneginf(levels.lam[0]):
        raise ConfigError(
            "this solver looks back at predicted noise, which says nothing about x_0 at a terminal SNR of zero; "
            'use a solver that looks back at x_0, such as "unipc" with predict_x0=True'
        )
    ratio = alpha[1:] / alpha[:-1]
    return ratio, -ratio * sigma[:-1]


def warmed_up(levels: Levels, order: int) -> NDArray[np.int64]:
    """The order of each step, int64 [n]: 1, 2, ... up to `order`, as many predictions as are known.

    The prediction at pure noise (lambda = -infinity) is nowhere that a polynomial could pass. And no polynomial leads
    to lambda = infinity: the step to a level without noise has order 1, and returns x_0.
    """
    known = np.cumsum(np.isfinite(levels.lam[:-1]))
    orders: NDArray[np.int64] = np.clip(known, 1, order)
    orders[-1] = 1 if levels.sigma[-1] == 0 else orders[-1]
    return orders


def adams(lam: Floats, orders: NDArray[np.int64], kind: Kind, *, implicit: bool = False) -> Floats:
    """Weights w, [n, 4], of f at each step's end, at its start, and at the two levels before.

    sum_j w_j f_j = integral_0^h e^-u f(u) du for every polynomial f of a degree below `orders` (explicit: the end has
    no weight), or up to it (implicit). Where the order is 0 all weights are 0.

    Args:
        lam: lambda of the levels, [n + 1].
        orders: 0 ... 3 for each step, [n]; a step of order p looks back at p - 1 levels.
        kind: whether u runs back from the step's end ("sample") or on from its start ("epsilon").
        implicit: with f at the step's end.
    """
    # Gauss-Legendre instead of the closed forms, which cancel at small h: exact to rounding, since e^-u f(u) is smooth
    # and no weight's integrand changes its sign within the step.
    points, shares = np.polynomial.legendre.leggauss(24)
    h = np.diff(lam)
    half = np.minimum(h, _REACH)[:, None] / 2
    u = half * (points + 1.0)
    measure = half * shares * np.exp(-u)
    weights = np.zeros((len(h), 4))
    weights[orders == 1, 1] = -np.expm1(-h[orders == 1])  # f is constant, and h may be infinite
    for order in (1, 2, 3) if implicit else (2, 3):
        rows = np.flatnonzero(orders == order)
        columns = range(0 if implicit else 1, order + 1)
        levels = {c: rows + 1 - c for c in columns}
        if kind == "epsilon":
            nodes = {c: lam[at] - lam[rows] for c, at in levels.items()}
        else:
            nodes = {c: lam[rows + 1] - lam[at] for c, at in levels.items()}
        for c in columns:
            basis = measure[rows]
            for other in set(columns) - {c}:
                basis = basis * (u[rows] - nodes[other][:, None]) / (nodes[c] - nodes[other])[:, None]
            weights[rows, c] = basis.sum(axis=1)
    return weights

"""The oracle of the schedule's and the solvers' tests: the papers' formulas in long double, from the betas alone.

1 - alpha_bar is gathered as a sum of positive terms, so nothing cancels:
1 - a_t = (1 - a_{t-1}) + a_{t-1} beta_t.
"""

import numpy as np
import pytest

Exact = np.longdouble
needs_long_double = pytest.mark.skipif(
    np.finfo(Exact).eps > 1e-18, reason="this platform's long double is no wider than float64"
)


def products(betas):
    """(alpha_bar, 1 - alpha_bar) of the betas, long double [len(betas)]."""
    bar, noise, out = Exact(1), Exact(0), []
    for beta in np.asarray(betas, dtype=Exact):
        noise = noise + bar * beta
        bar = bar * (1 - beta)
        out.append((bar, noise))
    return tuple(np.array(part, dtype=Exact) for part in zip(*out, strict=True))


def relative_error(value, exact):
    """The largest error of float64 `value` relative to `exact`; where `exact` is 0, `value` must be 0."""
    value, exact = np.asarray(value, dtype=Exact), np.asarray(exact, dtype=Exact)
    assert value.shape == exact.shape
    assert (value[exact == 0] == 0).all()
    scale = np.where(exact == 0, 1, np.abs(exact))
    return float((np.abs(value - exact) / scale).max())

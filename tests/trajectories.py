"""What the tests of the solvers share: a table applied in float64, and a model to apply it to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from fastddpm_kernels.columns import COLUMNS
from numpy.typing import NDArray

from fastddpm.solvers import StepTable

Floats = NDArray[np.float64]


def run(table: StepTable, model: Callable[[Floats, float], Floats], x: Floats, noise: Floats) -> Floats:
    """The state after each row, [rows, *x.shape]: what `columns` says a row does, word for word.

    `noise` is [rows, *x.shape], or anything to iterate over.
    """
    states, h1, h2, h3 = [], 0.0, 0.0, 0.0
    for row, z in zip(table.rows, noise, strict=True):
        c = dict(zip(COLUMNS, row, strict=True))
        m = model(c["c_in"] * x, c["t"])
        x0 = np.clip(c["x0_x"] * x + c["x0_m"] * m, -c["clip"], c["clip"])
        past = c["x_h1"] * h1 + c["x_h2"] * h2 + c.get("x_h3", 0.0) * h3
        x = c["x_x"] * x + c["x_x0"] * x0 + c["x_m"] * m + past + c["x_z"] * z
        h1, h2, h3 = x0, h1, h2
        states.append(x)
    return np.array(states)


def awkward_model(x: Floats, t: float) -> Floats:
    """Any smooth function of (x, t) that leaves [-1, 1], so that the clip has work to do."""
    out: Floats = np.tanh(x + 0.001 * t) + 0.3 * x
    return out

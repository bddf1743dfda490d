"""PLMS: Liu et al. 2022, "Pseudo numerical methods for diffusion models on manifolds" (PNDM), arXiv 2202.09778."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..edm import EDMSchedule
from ..schedule import NoiseSchedule
from .exponential import transfer
from .levels import Floats, Levels
from .table import StepTable, step_table

# Adams-Bashforth on equidistant points: the weights of the latest noise and of the three before it (eq. 12, and the
# lower orders to start with).
_ADAMS_BASHFORTH = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55, -59, 37, -9]])
_ADAMS_BASHFORTH[3] /= 24


def plms(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    final_sigma: str = "zero",
    state: str = "vp",
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of PLMS: DDIM's step (eq. 11) with the noise extrapolated by four-step Adams-Bashforth (eq. 12).

    It starts as the PLMS of latent diffusion and of diffusers' PNDMScheduler with ``skip_prk_steps=True`` does: the
    first step is taken, the model evaluated behind it, and the step taken again with the mean of both noises; then the
    orders 2, 3, 4. So there is a row more than `steps`. (The paper's Runge-Kutta start is not offered: the fourth step
    needs noises from four, eight and twelve evaluations before it.) There is no clip: it would have to bound noise.

    Args:
        schedule: what the model was trained with.
        steps: how many noise levels to visit; None: all time steps, or 18 levels of an `EDMSchedule`.
        final_sigma: the state ends at noise "zero" (diffusers' ``set_alpha_to_one=True``), or at "sigma_min", the
            schedule's least.
        state: "vp" or "ve": the scaling of the state (see `Levels`).
        prediction_type: what the model predicts: "epsilon", "v_prediction", "sample" (x_0); "edm" of an `EDMSchedule`.
        spacing: "leading", "linspace", "trailing", "karras" or "log_snr" (see `Levels.of`).
        quantize: round the time input of "karras" and "log_snr" to whole time steps.
        start: leave out so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these, or a schedule that ends at a terminal SNR of zero.
    """
    levels = Levels.of(
        schedule,
        steps,
        spacing=spacing,
        prediction_type=prediction_type,
        state=state,
        final_sigma=final_sigma,
        quantize=quantize,
        start=start,
    )
    kept, gain = transfer(levels, "epsilon")
    gain = -gain * np.expm1(-levels.steps)  # x' = kept x + gain eps
    n = len(gain)
    weights = gain[:, None] * _ADAMS_BASHFORTH[np.minimum(np.arange(n), 3)]
    at, to = np.arange(n), np.arange(1, n + 1)  # the levels where each row finds the state and leaves it
    columns = {"x0_x": levels.eps_x, "x0_m": levels.eps_m, "x_x": kept, "x_x0": weights[:, 0]}
    columns |= {"x_h1": weights[:, 1], "x_h2": weights[:, 2], "x_h3": weights[:, 3]}
    if n > 1:
        at, to = np.insert(at, 1, 1), np.insert(to, 1, 1)
        columns = {name: np.insert(column, 1, 0.0) for name, column in columns.items()}
        _again(columns, levels, gain)
    table = step_table(
        levels.t[at],
        c_in=levels.c_in[at],
        **columns,
        k_x=levels.alpha[to],
        k_z=levels.sigma[to],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        history_of="epsilon",
    )
    if n == 1:
        return table
    predicted = np.array(table.predicted)
    from_noise = predicted[1, 1] * 2 / gain[0]  # row 1 has y = x + gain / 2 e' in place of e'
    predicted[1] += [-from_noise, from_noise - predicted[1, 1]]
    return replace(table, predicted=predicted)


def _again(columns: dict[str, Floats], levels: Levels, gain: Floats) -> None:
    """Fill in row 1, the first step taken again, and move the rows after it past what that leaves in the history.

    Row 0 left x, which has gain e_0 in it. With e' predicted there, the step's second result is y - gain / 2 e_0 with
    y = x + gain / 2 e'; and y, not e', is what row 1 has in place of its "x0".

    So row 2 finds e_0 in h2, and row 3 in h3. Row 4 needs it once more and finds y in h3; but its state is a known
    combination of y, e_0 and the two noises in between (h2, h1), which is solved for e_0.
    """
    columns["x0_x"][1] = 1.0 + gain[0] / 2 * levels.eps_x[1]
    columns["x0_m"][1] = gain[0] / 2 * levels.eps_m[1]
    columns["x_x0"][1], columns["x_h1"][1] = 1.0, -gain[0] / 2
    for row, name, given in ((2, "x_h1", "x_h2"), (3, "x_h2", "x_h3")):
        if row < len(columns["x_x"]):
            columns[given][row], columns[name][row] = columns[name][row], 0.0
    if len(gain) < 4:
        return
    # In units of alpha, in which a step only adds: state = y + e_0 (...) + e_1 (...) + e_2 (...).
    y = 1 / levels.alpha[1]
    step = gain[:3] / levels.alpha[1:4]
    first = -step[0] / 2 + step[1:] @ _ADAMS_BASHFORTH[[1, 2], [1, 2]]
    second = step[1:] @ _ADAMS_BASHFORTH[[1, 2], [0, 1]]
    third = step[2] * _ADAMS_BASHFORTH[2, 0]
    weight = columns["x_h3"][4] / first  # of what is first times e_0
    columns["x_x"][4] += weight / levels.alpha[3]
    columns["x_h1"][4] -= weight * third
    columns["x_h2"][4] -= weight * second
    columns["x_h3"][4] = -weight * y

"""Heun's method with churn: Karras et al. 2022 (EDM), arXiv 2206.00364, algorithm 2."""

from __future__ import annotations

import math

import numpy as np

from ..edm import EDMSchedule
from ..schedule import NoiseSchedule
from .churn import Churned
from .table import StepTable, check_ratio, step_table


def heun(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: str = "karras",
    final_sigma: str = "zero",
    state: str = "ve",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """EDM's sampler (algorithm 2): an Euler step, then the mean of the slopes at its two ends. Order 2.

    Two model evaluations, two rows, a step, but one for the last step to "zero": 2 steps - 1 rows. Both slopes are
    (x - x_0) / sigma, of sigma_hat and of sigma'. Put x' for the Euler step's end, h1 for its x_0: in the corrected
    state x' + (sigma_hat / sigma' - 1) / 2 (x_0 - h1) the Euler step's start has cancelled.

    Args:
        schedule, steps, s_churn, s_tmin, s_tmax, s_noise, prediction_type, clip, dynamic_thresholding_ratio, spacing,
            final_sigma, state, quantize, start: as in `euler`.

    Raises:
        ConfigError: as `euler` does, and where the first level is pure noise, whatever the state.
    """
    churned = Churned.of(
        schedule,
        steps,
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
        prediction_type=prediction_type,
        spacing=spacing,
        final_sigma=final_sigma,
        state=state,
        quantize=quantize,
        start=start,
    )
    return heun_table(churned, clip, dynamic_thresholding_ratio)


def heun_table(churned: Churned, clip: float | None = None, ratio: float | None = None) -> StepTable:
    """The table of Heun's method through given levels; raises `ConfigError` where the first one is pure noise."""
    churned.check_signal("start=1")
    levels, columns = churned.columns_of_two(churned.log_end)
    half = 0.5 * levels.alpha[2::2] * np.expm1(levels.steps[:-1:2])
    x_h1 = np.zeros(len(levels.t))
    x_h1[1::2], columns["x_x0"][1::2] = -half, half
    return step_table(**columns, x_h1=x_h1, clip=clip, ratio=check_ratio(ratio, clip))

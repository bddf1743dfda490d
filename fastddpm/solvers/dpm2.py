"""DPM-Solver-2 as k-diffusion has it: a midpoint method whose midpoint is the geometric mean of the two sigmas.

Lu et al. 2022, arXiv 2206.00927, section 3.2, the levels and the noise being those of Karras et al. 2022.
"""

from __future__ import annotations

import math

import numpy as np

from ..edm import EDMSchedule
from ..schedule import NoiseSchedule
from .churn import Churned
from .table import StepTable, check_ratio, step_table


def dpm2(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
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
    """k-diffusion's dpm_2 and, with eta = 1, its dpm_2_ancestral: x' = x + (sigma' - sigma) slope at the midpoint.

    The midpoint is sqrt(sigma sigma'), reached by an Euler step. Order 2. Two model evaluations, two rows, a step, but
    one for the last step to "zero": 2 steps - 1 rows. (diffusers' KDPM2DiscreteScheduler and its ancestral twin.)

    Args:
        eta: ancestral noise, as in `euler_ancestral`: each step goes down to sigma_down.
        schedule, steps, s_churn, s_tmin, s_tmax, s_noise, prediction_type, clip, dynamic_thresholding_ratio, spacing,
            final_sigma, state, quantize, start: as in `euler`.

    Raises:
        ConfigError: as `euler_ancestral` does, and where the first level is pure noise, whatever the state.
    """
    churned = Churned.of(
        schedule,
        steps,
        eta=eta,
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
    return dpm2_table(churned, clip, dynamic_thresholding_ratio)


def dpm2_table(churned: Churned, clip: float | None = None, ratio: float | None = None) -> StepTable:
    """The table of `dpm2` through given levels; raises `ConfigError` where the first one is pure noise."""
    churned.check_signal("start=1")
    levels, columns = churned.columns_of_two(0.5 * (churned.log_sigma[:-1] + churned.log_end))
    # x' = end / mid x + (1 - sigma / mid) h1 + (sigma - end) / mid x_0, with x at mid; mid / sigma is end / mid
    to_mid = levels.steps[:-1:2]
    x_h1 = np.zeros(len(levels.t))
    x_h1[1::2] = -levels.alpha[2::2] * np.expm1(to_mid)
    columns["x_x0"][1::2] = 2.0 * levels.alpha[2::2] * np.sinh(to_mid)
    return step_table(**columns, x_h1=x_h1, clip=clip, ratio=check_ratio(ratio, clip))

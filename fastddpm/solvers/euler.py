"""Euler's method, with churn or ancestral noise: Karras et al. 2022 (EDM), arXiv 2206.00364, and k-diffusion."""

from __future__ import annotations

import math

from ..edm import EDMSchedule
from ..schedule import NoiseSchedule
from .churn import Churned
from .table import StepTable, check_ratio, step_table


def euler(
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
    """Euler's method with EDM's churn: x' = x + (sigma' - sigma_hat) (x - x_0) / sigma_hat (algorithm 2, lines 4 to 8).

    Before each step noise lifts sigma to sigma_hat = sigma + gamma sigma, where the model is evaluated, gamma =
    min(s_churn / steps, sqrt(2) - 1). Without churn this is DDIM. (diffusers evaluates the model before it adds that
    noise, which is another algorithm.)

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many levels to visit; None: all time steps, or 18 of an `EDMSchedule`.
        s_churn: how much noise is added on the way, in all; 0: none.
        s_tmin, s_tmax: no churn where sigma / alpha is outside of these.
        s_noise: scale of the added noise; EDM has 1.003 to 1.007, since a model removes a little too much.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x_0); with an `EDMSchedule`
            "edm" (its preconditioning around the model) or "sample".
        clip: bound of the predicted abs(x_0); None: no limit. 1.0 for images in [-1, 1].
        dynamic_thresholding_ratio: as in `ddpm`.
        spacing: which levels: "karras" (EDM, eq. 5), "log_snr", or of a `NoiseSchedule` "leading", "linspace",
            "trailing" (see `Levels.of`).
        final_sigma: where to end: at "zero" noise, or at the schedule's least, "sigma_min".
        state: x is scaled as in k-diffusion, "ve" (x = x_0 + sigma eps), or "vp" (alpha^2 + sigma^2 = 1).
        quantize: give the model the nearest whole time step; False: interpolate, as diffusers does.
        start: skip so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these, or "ve" where the schedule ends in pure noise.
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
    return euler_table(churned, clip, dynamic_thresholding_ratio)


def euler_ancestral(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    eta: float = 1.0,
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
    """Ancestral sampling as in k-diffusion: Euler's method down to sigma_down, then noise up to sigma'.

    sigma_up = eta sigma' sqrt(1 - sigma'^2 / sigma^2), sigma_down^2 = sigma'^2 - sigma_up^2. With s_noise = 1 this is
    DDIM with that eta (arXiv 2010.02502, eq. 16), and with eta = 1 DDPM.

    Args:
        eta: 0 adds no noise (Euler's method), 1 replaces as much as DDPM does.
        s_noise: scale of the added noise.
        schedule, steps, prediction_type, clip, dynamic_thresholding_ratio, spacing, final_sigma, state, quantize,
            start: as in `euler`.

    Raises:
        ConfigError: as `euler` does, and for an `eta` outside 0 ... 1.
    """
    churned = Churned.of(
        schedule,
        steps,
        eta=eta,
        s_noise=s_noise,
        prediction_type=prediction_type,
        spacing=spacing,
        final_sigma=final_sigma,
        state=state,
        quantize=quantize,
        start=start,
    )
    return euler_table(churned, clip, dynamic_thresholding_ratio)


def euler_table(churned: Churned, clip: float | None = None, ratio: float | None = None) -> StepTable:
    """The table of Euler's method through given levels; raises `ConfigError` where "ve" can't hold the first one."""
    if churned.state == "ve":
        churned.check_signal('state="vp"')
    _, columns = churned.columns(churned.log_sigma, churned.log_kept[1:])
    return step_table(**columns, clip=clip, ratio=check_ratio(ratio, clip))

"""Ancestral sampling: Ho et al. 2020, "Denoising diffusion probabilistic models", arXiv 2006.11239."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .spacing import Spacing
from .strides import Strides
from .table import StepTable, check_ratio, step_table

LEAST_VARIANCE = 1e-20  # where a logarithm is taken of one that is 0
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: Spacing = "leading",
    start: int = 0,
) -> StepTable:
    """The table of DDPM's ancestral sampler: x_s is drawn from the posterior q(x_s | x_t, x_0) of the predicted x_0.

    With s the time step visited after t, alpha_t = alpha_bar_t / alpha_bar_s and beta_t = 1 - alpha_t, the mean is
    sqrt(alpha_bar_s) beta_t / (1 - alpha_bar_t) x_0 + sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t (eq. 7).
    Without a clip that is eq. 11. The last row returns its x_0 and adds no noise.

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many of its time steps to visit; None: all.
        variance: "fixed_small", sigma_t^2 = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta_t, or "fixed_large", beta_t
            (section 3.2: the best choices for data that is a point, and a unit Gaussian). Learned ones come from v, the
            second half of the model's output channels: "learned_range", log sigma_t^2 = f log beta_t + (1 - f) log of
            the small one, with f = (v + 1) / 2 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 15); "learned",
            log sigma_t^2 = v, as in guided-diffusion.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x_0).
        clip: bound of the predicted abs(x_0); None: no limit. 1.0 for images in [-1, 1].
        dynamic_thresholding_ratio: this quantile of each sample's abs(x_0), within 1 ... clip, is the bound, and x_0 is
            divided by it (Imagen, arXiv 2205.11487, section 2.3). 0.995 there, with a clip above 1. None: off.
        spacing: which time steps to visit: "leading", "linspace", "trailing", or respaced as in guided-diffusion,
            "ddim50", "10,10,20" or [10, 10, 20] (see `spacing.timesteps`).
        start: leave out so many steps at the beginning (to start from a noised picture: SDEdit, arXiv 2108.01073).

    Raises:
        ConfigError: for a value that is not among these.
    """
    strides = Strides.of(schedule, steps, spacing, start)
    noisy = np.arange(len(strides.t)) < len(strides.t) - 1  # Ho et al., algorithm 2: z = 0 at the last step
    options: dict[str, Any] = dict(variance=variance, prediction_type=prediction_type, clip=clip)
    return posterior_table(strides, noisy, ratio=dynamic_thresholding_ratio, **options)


def posterior_table(
    strides: Strides,
    noisy: NDArray[np.bool_],
    *,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    ratio: float | None = None,
) -> StepTable:
    """DDPM between any levels, with noise in the rows that are `noisy`; the options as in `ddpm`."""
    if variance not in VARIANCES:
        raise ConfigError(f"variance is {variance!r}; allowed: {', '.join(map(repr, VARIANCES))}")
    x0_x, x0_m = strides.predicted_x0(prediction_type)
    keep = strides.noise_next / strides.noise
    sigma = np.sqrt(strides.beta if variance == "fixed_large" else strides.beta * keep)
    s_0, s_v = np.zeros(len(sigma)), np.zeros(len(sigma))  # log2 of the noise's scale: s_0 + s_v v
    if variance == "learned":
        s_v = np.full(len(sigma), 0.5 / np.log(2.0))
    if variance == "learned_range":
        large, small = (np.log2(np.maximum(v, LEAST_VARIANCE)) / 2 for v in (strides.beta, strides.beta * keep))
        s_0, s_v = noisy * (large + small) / 2, (large - small) / 2
    if variance.startswith("learned"):
        sigma[:] = 1.0
        s_v = np.where(noisy, s_v, 2.0**-20)  # without effect, but a table of the last row alone must know of the v
    return step_table(
        strides.t,
        x0_x=x0_x,
        x0_m=x0_m,
        x_x0=np.sqrt(strides.bar_next) * strides.beta / strides.noise,
        x_x=np.sqrt(strides.alpha) * keep,
        x_z=noisy * sigma,
        s_0=s_0,
        s_v=s_v,
        k_x=np.sqrt(strides.bar_next),
        k_z=np.sqrt(strides.noise_next),
        start=strides.start,
        clip=clip,
        ratio=check_ratio(ratio, clip),
    )

"""Ancestral sampling: Ho et al. 2020, "Denoising diffusion probabilistic models", arXiv 2006.11239."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .strides import Strides
from .table import StepTable, step_table

VARIANCES = ("fixed_small", "fixed_large")


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    spacing: str = "leading",
) -> StepTable:
    """The table of DDPM's ancestral sampler: x_s is drawn from the posterior q(x_s | x_t, x_0) of the predicted x_0.

    With s the time step visited after t, alpha_t = alpha_bar_t / alpha_bar_s and beta_t = 1 - alpha_t, the mean is
    sqrt(alpha_bar_s) beta_t / (1 - alpha_bar_t) x_0 + sqrt(alpha_t) (1 - alpha_bar_s) / (1 - alpha_bar_t) x_t (eq. 7).
    Without a clip that is eq. 11. The last row returns its x_0 and adds no noise.

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many of its time steps to visit; None: all.
        variance: "fixed_small", sigma_t^2 = (1 - alpha_bar_s) / (1 - alpha_bar_t) beta_t, or "fixed_large", beta_t
            (section 3.2: the best choices for data that is a point, and a unit Gaussian).
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x_0).
        clip: bound of the predicted abs(x_0); None: no limit. 1.0 for images in [-1, 1].
        spacing: which time steps to visit: "leading", "linspace" or "trailing" (see `spacing.timesteps`).

    Raises:
        ConfigError: for a value that is not among these.
    """
    if variance not in VARIANCES:
        raise ConfigError(f"variance is {variance!r}; allowed: {', '.join(map(repr, VARIANCES))}")
    strides = Strides.of(schedule, steps, spacing)
    x0_x, x0_m = strides.predicted_x0(prediction_type)
    keep = strides.noise_next / strides.noise
    sigma = np.sqrt(strides.beta * keep if variance == "fixed_small" else strides.beta)
    sigma[-1] = 0.0  # Ho et al., algorithm 2: z = 0 at the last step
    return step_table(
        strides.t,
        x0_x=x0_x,
        x0_m=x0_m,
        x_x0=np.sqrt(strides.bar_next) * strides.beta / strides.noise,
        x_x=np.sqrt(strides.alpha) * keep,
        x_z=sigma,
        clip=clip,
    )

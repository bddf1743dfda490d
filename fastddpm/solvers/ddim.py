"""DDIM: Song, Meng and Ermon 2020, "Denoising diffusion implicit models", arXiv 2010.02502."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .checks import check_flag
from .spacing import Spacing
from .strides import Strides
from .table import StepTable, check_ratio, step_table


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: Spacing = "leading",
    start: int = 0,
) -> StepTable:
    """The table of DDIM: x_s = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z (eq. 12).

    sigma^2 = eta^2 (1 - alpha_bar_s) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_s) (eq. 16), with s the time step
    visited after t and alpha_bar_s = 1 behind the last.

    A `clip` bounds x_0 but, as in diffusers, not eps, which stays what the model said. The two then contradict each
    other, and where the clip has much to do the state leaves the range that the model knows (on a young Fashion-MNIST
    model abs(x) grew to 100 and the pictures went grey): ``use_clipped_model_output=True`` is the better choice there.

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many of its time steps to visit; None: all.
        eta: 0 is deterministic, 1 has DDPM's variance.
        use_clipped_model_output: take the eps that belongs to x and the bounded x_0,
            (x - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t); with eta = 1 that is DDPM. No effect without a clip.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x_0).
        clip: bound of the predicted abs(x_0); None: no limit. 1.0 for images in [-1, 1].
        dynamic_thresholding_ratio: as in `ddpm`.
        spacing: which time steps to visit: "leading", "linspace", "trailing", or respaced as in guided-diffusion,
            "ddim50", "10,10,20" or [10, 10, 20] (see `spacing.timesteps`).
        start: leave out so many steps at the beginning (to start from a noised picture: SDEdit, arXiv 2108.01073).

    Raises:
        ConfigError: for a value that is not among these, or an `eta` outside 0 ... 1.
    """
    return ddim_table(
        Strides.of(schedule, steps, spacing, start),
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        prediction_type=prediction_type,
        clip=clip,
        ratio=dynamic_thresholding_ratio,
    )


def ddim_table(
    strides: Strides,
    *,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    ratio: float | None = None,
) -> StepTable:
    """`ddim` between any time steps (eq. 12 and 16); `ratio` is its `dynamic_thresholding_ratio`.

    Raises:
        ConfigError: as `ddim` does.
    """
    number = isinstance(eta, int | float | np.number) and not isinstance(eta, bool)
    if not number or not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta is {eta!r}; allowed: a number in 0 ... 1 (0: no noise, 1: as much as DDPM)")
    check_flag("use_clipped_model_output", use_clipped_model_output)
    x0_x, x0_m = strides.predicted_x0(prediction_type)
    eps_x, eps_m = strides.predicted_eps(prediction_type)
    x_x0 = np.sqrt(strides.bar_next)
    # (1 - alpha_bar_s - sigma^2) / (1 - alpha_bar_s), as a sum of terms that are not negative
    kept = ((1.0 - eta) * (1.0 + eta) * strides.beta + strides.alpha * strides.noise_next) / strides.noise
    direction = np.sqrt(strides.noise_next * kept)
    if use_clipped_model_output:
        eps_x, eps_m = 1.0 / np.sqrt(strides.noise), np.zeros(len(strides.t))
        # x_x0 = sqrt(alpha_bar_s) (1 - r), with r^2 = alpha kept noise_s / noise; 1 - r^2 is again a sum of positives
        share = strides.alpha * strides.noise_next / strides.noise
        x_x0 *= strides.beta / strides.noise * (1.0 + eta**2 * share) / (1.0 + np.sqrt(share * kept))
    return step_table(
        strides.t,
        x0_x=x0_x,
        x0_m=x0_m,
        x_x0=x_x0,
        x_x=direction * eps_x,
        x_m=direction * eps_m,
        x_z=eta * np.sqrt(strides.noise_next / strides.noise * strides.beta),
        k_x=np.sqrt(strides.bar_next),
        k_z=np.sqrt(strides.noise_next),
        start=strides.start,
        clip=clip,
        ratio=check_ratio(ratio, clip),
    )

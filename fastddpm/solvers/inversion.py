"""DDIM run the other way: Song, Meng and Ermon 2020, arXiv 2010.02502, section 4.3."""

from __future__ import annotations

import numpy as np

from ..schedule import NoiseSchedule
from .spacing import Spacing
from .strides import Strides
from .table import StepTable, check_ratio, step_table


def ddim_inversion(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: Spacing = "leading",
    start: int = 0,
) -> StepTable:
    """The table of DDIM inversion: from a clean picture to the noise that deterministic DDIM makes it from.

    With t the time step visited after s (the first s is the data, alpha_bar_s = 1),
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, where eps = eps(x_s, t) is the model's and
    x_0 = (x_s - sqrt(1 - alpha_bar_s) eps) / sqrt(alpha_bar_s). That is `ddim`'s step from t to s solved for x_t, but
    for the model being evaluated at x_s, since x_t isn't known yet. So what `ddim` makes of the result differs from
    the picture, by an error that falls with the number of steps::

        options = {"steps": 200, "spacing": "trailing"}
        noise = Sampler(model, solvers.ddim_inversion(schedule, **options)).sample(x.shape, seeds=0, x_T=x)
        again = Sampler(model, solvers.ddim(schedule, **options)).sample(x.shape, seeds=0, x_T=noise)

    The state to start from is the picture itself, ``x_T=x``; noise would be of no use here. The last row ends in noise,
    not in x_0, and none is random.

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many of its time steps to visit; None: all.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x_0). All are understood as the
            eps that they are at time t, so one model gives the same noise in each of these forms. (diffusers'
            ``DDIMInverseScheduler`` understands v and x_0 as if they had been predicted at time s: an x_0-model's first
            step is then 0 / 0.)
        clip: bound of the predicted abs(x_0); eps stays. None: no limit, which an inversion needs to be exact.
        dynamic_thresholding_ratio: as in `ddpm`.
        spacing: which time steps to visit, as in `ddim`.
        start: leave out so many of the noisiest levels: the state ends where `ddim` with the same `start` begins.

    Raises:
        ConfigError: for a value that is not among these.
    """
    strides = Strides.of(schedule, steps, spacing, start)  # of ddim, each to be taken backwards
    eps_x, eps_m = (column[::-1] for column in strides.predicted_eps(prediction_type))
    alpha, sigma = np.sqrt(strides.bar_next)[::-1], np.sqrt(strides.noise_next)[::-1]  # where the state is
    k_x, k_z = np.exp(0.5 * strides.log_bar)[::-1], np.sqrt(strides.noise)[::-1]  # where it goes
    return step_table(
        strides.t[::-1],
        x0_x=(1.0 - sigma * eps_x) / alpha,
        x0_m=-sigma * eps_m / alpha,
        x_x0=k_x,
        x_x=k_z * eps_x,
        x_m=k_z * eps_m,
        k_x=k_x,
        k_z=k_z,
        start=(1.0, 0.0),
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )

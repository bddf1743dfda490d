"""Predictor-corrector samplers: Song et al. 2020, "Score-based generative modeling through SDEs", arXiv 2011.13456."""

from __future__ import annotations

import numpy as np

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import MAX_STEPS, NoiseSchedule
from .checks import check_count, check_number
from .langevin import langevin_columns, score_levels
from .levels import Floats, Levels
from .table import StepTable, check_ratio, step_table

PREDICTORS = ("reverse_diffusion", "ancestral")


def predictor_corrector(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    predictor: str = "reverse_diffusion",
    corrector_steps: int = 1,
    snr: float = 0.16,
    state: str = "vp",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: str = "leading",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of a predictor-corrector sampler (algorithms 2 and 3): a step to the next level, then Langevin steps.

    The predictor goes from a level t to the next, s. With r = alpha_t / alpha_s and g^2 = sigma_t^2 - r^2 sigma_s^2:

    - "reverse_diffusion" (eq. 46; algorithms 2, 3): x' = (2 - r) x + g^2 score + g z;
    - "ancestral" (appendix F): x' = (x + g^2 score) / r + noise, of the deviation g sigma_s / sigma_t in the variance
      exploding state (eq. 47), and g in the variance preserving one (eq. 4: `ddpm` with variance="fixed_large").

    The corrector (algorithms 4, 5) is x' = x + e score + sqrt(2 e) z, `corrector_steps` times at s. The paper sets
    e = 2 (snr |z| / |score|)^2 anew at each step, from norms that are averaged over the batch, so a sample depends on
    its batch. Here e = 2 (snr sigma_s)^2: the same where |score| is |z| / sigma_s, as for the noise that was added to a
    picture. The noise that a model predicts is shorter than that, most so at the least noisy levels, where the paper's
    step is therefore longer. Algorithm 5's factor alpha_i = 1 - beta_i, nearly 1, is left out as well, so that the
    corrector is the same in both states.

    There is no corrector behind the last predictor, which returns its x_0 and adds no noise.

    Args:
        schedule: what the model was trained with. `EDMSchedule` for a model that is given x_0 + sigma eps and sigma
            itself, as the paper's VE models are; then the spacing must be "log_snr" (the paper's) or "karras".
        steps: how many levels; None: as in `Levels.of`. The model is evaluated once for each, and `corrector_steps`
            times more for each but the first.
        predictor: "reverse_diffusion" or "ancestral".
        corrector_steps: how many Langevin steps at each level; 0: the predictor alone.
        snr: the corrector's signal-to-noise ratio, in 0 ... 1 (from 1 on the steps diverge).
        state: "vp", alpha^2 + sigma^2 = 1, or "ve", x_0 + sigma eps; an `EDMSchedule` is "ve" whatever is said here.
        prediction_type: "epsilon", "v_prediction", "sample" (x_0) or "score", the gradient of log p at the model's
            input; with an `EDMSchedule` "edm", "sample", "epsilon" or "score".
        clip: bound of the predicted abs(x_0), and so of the score; None: no limit.
        dynamic_thresholding_ratio: as in `ddpm`.
        spacing, quantize: the levels, and whether time inputs are whole, as in `Levels.of`.
        start: leave out so many levels at the beginning.

    Raises:
        ConfigError: for a value that is not among these, or an infinite noise ("ve" at a terminal SNR of zero).
    """
    if predictor not in PREDICTORS:
        raise ConfigError(f"predictor is {predictor!r}; allowed: {', '.join(map(repr, PREDICTORS))}")
    pull = 2.0 * check_number("snr", snr, 1.0) ** 2
    levels = score_levels(
        schedule, steps, spacing=spacing, prediction_type=prediction_type, state=state, quantize=quantize, start=start
    )
    n = len(levels.t)
    corrections = check_count("corrector_steps", corrector_steps, 0, MAX_STEPS // n)
    # one row of the first level, and of each other its corrections and then the prediction of the next
    at = np.repeat(np.arange(n), [1] + [corrections + 1] * (n - 1))
    predicts = np.append(np.diff(at), 1) > 0
    preserving = state == "vp" and not isinstance(schedule, EDMSchedule)
    update = langevin_columns(levels, at, pull)
    for column, predicted in zip(update, _predictor_columns(levels, predictor, preserving), strict=True):
        column[predicts] = predicted
    x_x, x_x0, x_z = update
    after = at + predicts
    return step_table(
        levels.t[at],
        c_in=levels.c_in[at],
        x0_x=levels.x0_x[at],
        x0_m=levels.x0_m[at],
        x_x=x_x,
        x_x0=x_x0,
        x_z=x_z,
        k_x=levels.alpha[after],
        k_z=levels.sigma[after],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )


def _predictor_columns(levels: Levels, predictor: str, preserving: bool) -> tuple[Floats, Floats, Floats]:
    """(x_x, x_x0, x_z) of each step to the next level, with the score as (alpha_t x_0 - x) / sigma_t^2."""
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    r = alpha / levels.alpha[1:]
    share = -np.expm1(-2.0 * levels.steps)  # g^2 / sigma_t^2
    x_z = sigma * np.sqrt(share)
    if predictor == "ancestral":
        fall = levels.sigma[1:] / sigma
        x_x, x_x0 = r * fall**2, levels.alpha[1:] * share
        if not preserving:
            x_z *= fall
    else:
        x_x, x_x0 = 1.0 - r + np.exp(-2.0 * levels.steps), alpha * share
    x_x[-1], x_x0[-1], x_z[-1] = 0.0, 1.0, 0.0  # returns its x_0
    return x_x, x_x0, x_z

"""Annealed Langevin dynamics: Song and Ermon 2019, "Generative modeling by estimating gradients ...", 1907.05600."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import MAX_STEPS, NoiseSchedule
from .checks import check_count, check_flag, check_number
from .levels import Floats, Levels
from .strides import PREDICTION_TYPES
from .table import StepTable, check_ratio, step_table


def annealed_langevin(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    each: int = 100,
    step_size: float = 0.2,
    denoise: bool = True,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: str = "log_snr",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of annealed Langevin dynamics: x' = x + a_i / 2 score(x, sigma_i) + sqrt(a_i) z (algorithm 1).

    It is done `each` times at each of the levels sigma_1 > ... > sigma_L, with a_i = step_size sigma_i^2. The state is
    x_0 + sigma eps, so with score = (x_0 - x) / sigma^2 a row is x' = x + step_size / 2 (x_0 - x) + sqrt(step_size)
    sigma_i z, the same at all levels but for sigma.

    Args:
        schedule: what the model was trained with. `EDMSchedule` for one that is given x_0 + sigma eps and sigma itself,
            as NCSN's are: with sigma_max = 1, sigma_min = 0.01 and 10 steps these are the paper's levels.
        steps: L, how many levels; None: 10, as in the paper. The model is evaluated `each` times at each.
        each: T, how many Langevin steps at each level.
        step_size: a_i / sigma_i^2, in 0 ... 4 (from 4 on the steps diverge). In the paper a_i = epsilon sigma_i^2 /
            sigma_L^2 with epsilon = 2e-5 and sigma_L = 0.01: 0.2.
        denoise: end with a row that returns the predicted x_0 and adds no noise (Jolicoeur-Martineau et al. 2020,
            arXiv 2009.05475, section 3). False: the state stays one of the last level, with its noise, as in the paper.
        prediction_type: "epsilon", "v_prediction", "sample" (x_0) or "score", the gradient of log p at the model's
            input; with an `EDMSchedule` "edm", "sample", "epsilon" or "score".
        clip: bound of the predicted abs(x_0), and so of the score; None: no limit.
        dynamic_thresholding_ratio: as in `ddpm`.
        spacing, quantize: the levels, and whether time inputs are whole, as in `Levels.of`. "log_snr" is the paper's
            geometric sequence.
        start: leave out so many levels at the beginning.

    Raises:
        ConfigError: for a value that is not among these, or a schedule whose noise is infinite (zero terminal SNR).
    """
    steps = 10 if steps is None else steps
    size = check_number("step_size", step_size, 4.0)
    check_flag("denoise", denoise)
    levels = score_levels(
        schedule, steps, spacing=spacing, prediction_type=prediction_type, state="ve", quantize=quantize, start=start
    )
    n = len(levels.t)
    at = np.repeat(np.arange(n), check_count("each", each, 1, MAX_STEPS // n))
    x_x, x_x0, x_z = langevin_columns(levels, at, size / 2)
    k_z = levels.sigma[at]
    if denoise:
        at = np.append(at, n - 1)
        x_x, x_x0, x_z, k_z = np.append(x_x, 0.0), np.append(x_x0, 1.0), np.append(x_z, 0.0), np.append(k_z, 0.0)
    return step_table(
        levels.t[at],
        c_in=levels.c_in[at],
        x0_x=levels.x0_x[at],
        x0_m=levels.x0_m[at],
        x_x=x_x,
        x_x0=x_x0,
        x_z=x_z,
        k_x=1.0,
        k_z=k_z,
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )


def langevin_columns(levels: Levels, at: NDArray[np.int64], pull: float) -> tuple[Floats, Floats, Floats]:
    """(x_x, x_x0, x_z) of Langevin steps x' = x + e score + sqrt(2 e) z at the levels `at`, with e = pull sigma^2.

    The score is (alpha x_0 - x) / sigma^2, and sigma drops out of the first term: nothing is divided by it.
    """
    return np.full(len(at), 1.0 - pull), pull * levels.alpha[at], np.sqrt(2.0 * pull) * levels.sigma[at]


def score_levels(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None,
    *,
    spacing: str,
    prediction_type: str,
    state: str,
    quantize: bool,
    start: int,
) -> Levels:
    """`Levels.of`, also for models that predict the score, or eps with an `EDMSchedule`: t and c_in as for "sample".

    Raises `ConfigError` as `Levels.of` does, or where the first level is infinitely noisy.
    """
    edm = isinstance(schedule, EDMSchedule)
    allowed = ("edm", "sample", "epsilon", "score") if edm else (*PREDICTION_TYPES, "score")
    if prediction_type not in allowed:
        raise ConfigError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(map(repr, allowed))}")
    own = prediction_type == "score" or (edm and prediction_type == "epsilon")
    asked = ("sample" if edm else "epsilon") if own else prediction_type
    levels = Levels.of(
        schedule, steps, spacing=spacing, prediction_type=asked, state=state, quantize=quantize, start=start
    )
    if not own:
        return levels
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    eps_m = -levels.c_in * sigma if prediction_type == "score" else np.ones(len(sigma))
    return replace(levels, x0_x=1 / alpha, x0_m=-sigma / alpha * eps_m, eps_x=np.zeros(len(sigma)), eps_m=eps_m)

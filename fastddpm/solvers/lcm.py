"""Consistency models: Song et al. 2023, arXiv 2303.01469; latent ones (LCM): Luo et al. 2023, arXiv 2310.04378.

Both sample the same way (2303.01469, algorithm 1): a consistency function f(x, t) says what x_0 is, noise lifts that to
the next level, and so on. f is the identity where there is no noise, through c_skip and c_out around the model.
"""

from __future__ import annotations

import math

import numpy as np

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .checks import check_count
from .levels import RHO, Levels
from .table import StepTable, check_ratio, step_table


def lcm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    start: int = 0,
) -> StepTable:
    """Latent consistency sampling (arXiv 2310.04378, algorithm 3): x' = alpha' f(x, t) + sigma' z, a few steps.

    f = c_skip x + c_out x_0, with c_skip = d^2 / (u^2 + d^2), c_out = u / sqrt(u^2 + d^2), u = `timestep_scaling` t and
    d = `sigma_data` (2303.01469, appendix C, as LCM's authors have it).

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many model evaluations; None: 4.
        original_inference_steps: the length of the schedule from which the model was distilled: time steps k - 1,
            2 k - 1, ... with k = T // original_inference_steps. `steps` of them are visited, from the last one on.
        timestep_scaling: the larger, the less of x is left in f.
        sigma_data: the data's standard deviation, as in the distillation.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample" (x_0).
        clip: bound of the predicted abs(x_0), not of f; None: no limit.
        dynamic_thresholding_ratio: as in `ddpm`.
        start: skip so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these.
    """
    if isinstance(schedule, EDMSchedule):
        raise ConfigError("lcm needs a NoiseSchedule, with time steps; for an EDMSchedule there is `consistency`")
    check_count("original_inference_steps", original_inference_steps, 1, schedule.num_steps)
    steps = min(4, original_inference_steps) if steps is None else steps
    check_count("steps", steps, 1, original_inference_steps)
    check_count("start", start, 0, steps - 1)
    _check_positive("timestep_scaling", timestep_scaling)
    _check_positive("sigma_data", sigma_data)
    distilled = np.arange(original_inference_steps, 0, -1) * (schedule.num_steps // original_inference_steps) - 1
    t = distilled[np.linspace(0, original_inference_steps, steps, endpoint=False).astype(np.int64)][start:]
    log_sigma = np.append(-0.5 * schedule.log_snr[t], -np.inf)
    levels = Levels.at(log_sigma, t, prediction_type=prediction_type)
    u = timestep_scaling * t
    norm = np.hypot(u, sigma_data)
    return step_table(
        t,
        x0_x=levels.x0_x,
        x0_m=levels.x0_m,
        x_x=levels.alpha[1:] * (sigma_data / norm) ** 2,
        x_x0=levels.alpha[1:] * u / norm,
        x_z=levels.sigma[1:],
        k_x=levels.alpha[1:],
        k_z=levels.sigma[1:],
        start=levels.start,
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )


def consistency(
    schedule: EDMSchedule,
    steps: int | None = None,
    *,
    num_scales: int = 40,
    s_noise: float = 1.0,
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    start: int = 0,
) -> StepTable:
    """Consistency sampling (arXiv 2303.01469, algorithm 1): x' = f(x, sigma) + sqrt(sigma'^2 - sigma_min^2) z.

    f = c_skip x + c_out F(c_in x; 250 ln sigma), with c_skip = d^2 / ((sigma - sigma_min)^2 + d^2) and
    c_out = d (sigma - sigma_min) / sqrt(sigma^2 + d^2), d = sigma_data (appendix C).

    Args:
        schedule: the noise levels and sigma_data that the model was trained with.
        steps: how many model evaluations; None: 1.
        num_scales: the number of levels in training, spaced as EDM's (2206.00364, eq. 5). Every (num_scales //
            steps)-th is visited, from the first.
        s_noise: scale of the added noise.
        clip: bound of abs(f); None: no limit. 1.0 for images in [-1, 1].
        dynamic_thresholding_ratio: as in `ddpm`.
        start: skip so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these.
    """
    if not isinstance(schedule, EDMSchedule):
        raise ConfigError("consistency needs an EDMSchedule; for a NoiseSchedule there is `lcm`")
    check_count("num_scales", num_scales, 2, 1_000_000)
    steps = 1 if steps is None else steps
    check_count("steps", steps, 1, num_scales)
    check_count("start", start, 0, steps - 1)
    _check_positive("s_noise", s_noise)
    least, data = schedule.sigma_min, schedule.sigma_data
    ramp = np.arange(start, steps) * (num_scales // steps) / (num_scales - 1)
    first, last = schedule.sigma_max ** (1 / RHO), least ** (1 / RHO)
    sigma = (first + ramp * (last - first)) ** RHO
    norm = np.hypot(sigma, data)
    added = np.append(np.sqrt((sigma[1:] - least) * (sigma[1:] + least)), 0.0)
    return step_table(
        250.0 * np.log(sigma),
        c_in=1.0 / norm,
        x0_x=(data / np.hypot(sigma - least, data)) ** 2,
        x0_m=data * (sigma - least) / norm,
        x_x0=1.0,
        x_z=s_noise * added,
        k_x=1.0,
        k_z=np.append(sigma[1:], 0.0),
        start=(1.0, float(sigma[0])),
        init_noise_sigma=float(sigma[0]),
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )


def _check_positive(name: str, value: object) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; allowed: a number above 0")

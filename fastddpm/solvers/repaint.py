"""RePaint: Lugmayr et al. 2022, "RePaint: Inpainting using denoising diffusion probabilistic models", 2201.09865."""

from __future__ import annotations

import numpy as np
from fastddpm_kernels.columns import K_X, K_Z, STEP, X_M, X_X, X_X0, X_Z
from numpy.typing import NDArray

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .ddim import ddim
from .spacing import Spacing
from .table import StepTable


def repaint(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    eta: float = 1.0,
    use_clipped_model_output: bool = True,
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: Spacing = "leading",
    start: int = 0,
) -> StepTable:
    """The table of RePaint (algorithm 1, section 4.2): from time to time the state jumps back up, to be denoised again.

    It is for inpainting, `Sampler.sample` with `known` and `mask`: what is painted gets several chances to fit what is
    known. A jump from level s up to u draws x_u = a x_s + b z, a = alpha_u / alpha_s, b^2 = sigma_u^2 - a^2 sigma_s^2
    (the forward process, eq. 1, over several steps). It needs no model, and its noise and that of the row before add up
    to one Gaussian: so the row before takes it in, and every row of the table evaluates the model.

    The jumps are those of the authors' code: the levels are numbered from the data, 0 the one with the least noise, and
    whenever one of the levels 0, j, 2 j ... is reached, jump_n_sample - 1 times each, the state goes j levels up. (That
    of diffusers jumps one level earlier, from x_0 itself too.) With 250 steps and the defaults: 2410 rows.

    Args:
        schedule: the noise schedule that the model was trained with.
        steps: how many of its time steps to visit; None: all.
        jump_length: j, how many levels a jump goes up.
        jump_n_sample: how often each stretch of j levels is denoised; 1: no jumps.
        eta, use_clipped_model_output: as in `ddim`; the defaults are DDPM, which the paper samples with.
        prediction_type, clip, dynamic_thresholding_ratio, spacing, start: as in `ddim`.

    Raises:
        ConfigError: for a value that is not allowed, a `jump_length` that isn't below the number of steps among them.
    """
    base = ddim(
        schedule,
        steps,
        eta=eta,
        use_clipped_model_output=use_clipped_model_output,
        prediction_type=prediction_type,
        clip=clip,
        dynamic_thresholding_ratio=dynamic_thresholding_ratio,
        spacing=spacing,
        start=start,
    )
    n = base.num_rows
    if n < 2:
        raise ConfigError("repaint needs at least 2 steps, or there is nothing to jump over; there is 1")
    for name, value, most in (("jump_length", jump_length, n - 1), ("jump_n_sample", jump_n_sample, 1000)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= most:
            why = f", since there are {n} steps" if name == "jump_length" else ""
            raise ConfigError(f"{name} is {value!r}; allowed: an integer in 1 ... {most}{why}")
    order, reached = _walk(n, int(jump_length), int(jump_n_sample))
    levels = base.levels
    rows = base.rows[order]
    up = reached != order + 1
    (alpha_s, sigma_s), (alpha_u, sigma_u) = levels[order[up] + 1].T, levels[reached[up]].T
    a = alpha_u / alpha_s
    share = a * sigma_s / sigma_u
    b = sigma_u * np.sqrt((1.0 - share) * (1.0 + share))
    rows[np.ix_(up, [X_X, X_X0, X_M])] *= a[:, None]
    rows[up, X_Z] = np.hypot(a * rows[up, X_Z], b)
    rows[up, K_X], rows[up, K_Z] = alpha_u, sigma_u
    rows[:, STEP] = np.arange(len(rows))
    return StepTable(rows, base.start, base.init_noise_sigma)


def _walk(n: int, length: int, times: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of n rows are applied one after another, and at which level (0: pure noise, n: data) each ends."""
    left = dict.fromkeys(range(n - 1, length - 1, -length), times - 1)
    order, reached, at = [], [], 0
    while at < n:
        order.append(at)
        at += 1
        if left.get(at, 0):
            left[at] -= 1
            at -= length
        reached.append(at)
    return np.array(order), np.array(reached)

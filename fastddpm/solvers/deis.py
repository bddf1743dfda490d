"""DEIS: Zhang and Chen 2022, "Fast sampling of diffusion models with exponential integrator", arXiv 2204.13902."""

from __future__ import annotations

import numpy as np

from ..edm import EDMSchedule
from ..schedule import NoiseSchedule
from .checks import check_flag, check_order
from .exponential import adams, transfer, warmed_up
from .levels import Levels
from .table import StepTable, step_table


def deis(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    final_sigma: str = "zero",
    state: str = "vp",
    prediction_type: str = "epsilon",
    spacing: str = "linspace",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of multistep DEIS (eq. 14 and 15) with rho = sigma / alpha for time (section 4), in log rho.

    The predicted noise is extrapolated by a polynomial in log(sigma / alpha) through the last `order` predictions, and
    the flow's linear part is taken exactly. Order 1 is DDIM. There is no clip: it would have to bound noise.

    Args:
        schedule: what the model was trained with.
        steps: how many evaluations of the model; None: all time steps but t = 0, or 18 of an `EDMSchedule`.
        order: 1 (DDIM), 2 or 3, the number of predictions that a step looks at.
        lower_order_final: with fewer than 15 steps the last has order 1, and the one before it 2 at most.
        final_sigma: the state ends at noise "zero", where the last row has order 1 and returns its x_0; or at
            "sigma_min", the schedule's least.
        state: "vp" or "ve": the scaling of the state (see `Levels`).
        prediction_type: what the model predicts: "epsilon", "v_prediction", "sample" (x_0); "edm" of an `EDMSchedule`.
        spacing: "linspace", "leading", "trailing", "karras" or "log_snr" (see `Levels.of`); the first two without their
            last point, t = 0, as in diffusers.
        quantize: round the time input of "karras" and "log_snr" to whole time steps.
        start: leave out so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these, or a schedule that ends at a terminal SNR of zero.
    """
    order = check_order(order)
    check_flag("lower_order_final", lower_order_final)
    levels = Levels.of(
        schedule,
        steps,
        spacing=spacing,
        prediction_type=prediction_type,
        state=state,
        final_sigma=final_sigma,
        skip_last=True,
        quantize=quantize,
        start=start,
    )
    orders = warmed_up(levels, order)
    left = np.arange(len(orders), 0, -1)
    if lower_order_final and len(orders) + start < 15:
        orders = np.minimum(orders, left)
    scale, gain = transfer(levels, "epsilon")
    weights = gain[:, None] * adams(levels.lam, orders, "epsilon")
    return step_table(
        levels.t,
        c_in=levels.c_in,
        x0_x=levels.eps_x,
        x0_m=levels.eps_m,
        x_x=scale,
        x_x0=weights[:, 1],
        x_h1=weights[:, 2],
        x_h2=weights[:, 3],
        k_x=levels.alpha[1:],
        k_z=levels.sigma[1:],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        history_of="epsilon",
    )

"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095), singlestep.

Levels come in groups of up to three, and a row goes from one to the next. The k-th row of a group computes the state
behind it from the one at the group's start, with k predictions: orders 1, 2, 3, 1, 2, 3 ...
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .checks import check_flag
from .dpm import FAR, check_common, check_levels, predicted, weights
from .levels import Levels
from .table import StepTable, check_ratio, step_table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ALGORITHMS = ("dpmsolver++", "dpmsolver")
SOLVER_TYPES = ("midpoint", "heun")


def dpm_solver_singlestep(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    final_sigma: str = "zero",
    state: str = "vp",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: str = "linspace",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of DPM-Solver, singlestep: DPM-Solver++(2S) where nothing else is said (2211.01095, algorithm 1).

    diffusers' DPMSolverSinglestepScheduler. The intermediate levels of a group are the schedule's own, so each row
    ends at a level of its spacing. There is no SDE variant: it would need the state at the group's start without the
    noise added since, of which a table keeps no copy.

    Args:
        schedule: what the model was trained with.
        steps: how many evaluations of the model; None: all time steps but t = 0, or 18 of an `EDMSchedule`.
        order: 1 (DDIM), 2 or 3: the length of a group.
        algorithm: "dpmsolver++" integrates a polynomial in x_0, "dpmsolver" in eps.
        solver_type: "midpoint" takes the slope from the group's first and last level (2211.01095, algorithm 1;
            2206.00927, algorithm 2, whose order is 3 where the last level is 2/3 of the way in lambda, as in
            "log_snr"); "heun" integrates the polynomial exactly, and has its order with any spacing.
        lower_order_final: the last rows are groups of a lower order, where `steps` is no multiple of `order` or
            `final_sigma` is "zero". False is allowed where neither is so.
        final_sigma: the state ends at noise "zero", where the last row has order 1 and returns its x_0; or at
            "sigma_min", the schedule's least.
        state: "vp" or "ve": the scaling of the state (see `Levels`).
        prediction_type: what the model predicts: "epsilon", "v_prediction", "sample" (x_0); "edm" of an `EDMSchedule`.
        clip: bound of the predicted abs(x_0); None: no limit. For "dpmsolver++" alone.
        dynamic_thresholding_ratio: as in `ddpm`. For "dpmsolver++" alone.
        spacing: "linspace", "leading", "trailing", "karras" or "log_snr", without t = 0, as in `dpm_solver`.
        quantize: round the time input of "karras" and "log_snr" to whole time steps.
        start: leave out so many levels at the beginning (to start from a noised picture). What is left of the group
            that it falls into has the orders 1, 2.

    Raises:
        ConfigError: for a value that is not among these, or an order above 1 at a terminal SNR of zero.
    """
    check_common(order, algorithm, ALGORITHMS, solver_type, SOLVER_TYPES, clip, dynamic_thresholding_ratio)
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
    of_x0 = check_levels(levels, algorithm)
    if order > 1 and np.isneginf(levels.lam[0]):
        raise ConfigError(f"order is {order}; allowed at a terminal SNR of zero: 1; or use dpm_solver")
    orders = _orders(order, len(levels.t) + start, lower_order_final, final_sigma == "zero")[start:]
    orders = np.minimum(orders, np.arange(1, len(orders) + 1))
    alpha, sigma = levels.alpha, levels.sigma
    x_x = sigma[1:] / sigma[:-1] if of_x0 else alpha[1:] / alpha[:-1]
    x_x0, x_h1, x_h2 = _contributions(levels, orders, of_x0, solver_type == "heun", x_x)
    return step_table(
        levels.t,
        c_in=levels.c_in,
        **predicted(levels, of_x0),
        x_x=x_x,
        x_x0=x_x0,
        x_h1=x_h1,
        x_h2=x_h2,
        k_x=alpha[1:],
        k_z=sigma[1:],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        history_of="sample" if of_x0 else "epsilon",
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )


def _orders(order: int, steps: int, lower_order_final: bool, to_zero: bool) -> Ints:
    """The order of each row."""
    if not lower_order_final:
        if to_zero or steps % order:
            raise ConfigError(
                f"lower_order_final is False with {steps} steps of order {order}; allowed where final_sigma is "
                '"sigma_min" and steps a multiple of the order; use True'
            )
        return np.tile(np.arange(1, order + 1), steps // order)
    orders = np.tile(np.arange(1, order + 1), steps // order + 1)[:steps]
    if to_zero or steps % order == 0:
        orders[-1] = 1
    return orders


def _contributions(levels: Levels, orders: Ints, of_x0: bool, heun: bool, x_x: Floats) -> Floats:
    """The columns x_x0, x_h1 and x_h2, [3, n].

    From the group's start the update is a x_s + sum of f_k m_k. The row finds not x_s but the state before it, which
    was made from x_s by the previous row: a' x_s + sum of f'_k m_k. So x' = a / a' x + sum of (f_k - a / a' f'_k) m_k.
    """
    rows = np.arange(len(orders))
    first = rows + 1 - orders
    lam, begin = levels.lam, levels.lam[first]
    h = np.minimum(lam[1:] - begin, FAR)
    w0, w1, w2 = weights(of_x0, h)
    f = np.zeros((len(rows), 3))  # of the latest prediction, the one before it, and the one before that
    more, three = np.flatnonzero(orders > 1), np.flatnonzero((orders == 3) & heun)
    slope = np.where(orders == 2, w1 if heun else w0 / 2, w1)
    f[more, 0] = slope[more] * h[more] / (lam[more] - begin[more])
    # The parabola through what was predicted at 0, q and p of the way, integrated exactly.
    p, q = ((lam[three - k] - begin[three]) / h[three] for k in (0, 1))
    f[three, 0] = (2 * w2[three] - q * w1[three]) / (p * (p - q))
    f[three, 1] = (p * w1[three] - 2 * w2[three]) / (q * (p - q))
    f[rows, orders - 1] += w0 - f.sum(axis=1)  # together they weigh w0: a constant is integrated exactly
    f *= (levels.alpha[1:] if of_x0 else -levels.alpha[1:] / levels.alpha[first] * levels.sigma[first])[:, None]
    f[more, 1:] -= x_x[more, None] * f[more - 1, :2]
    return f.T

"""UniPC: Zhao et al. 2023, "UniPC: a unified predictor-corrector framework", arXiv 2302.04867."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .checks import check_flag, check_order
from .exponential import Kind, adams, transfer, warmed_up
from .levels import Floats, Levels
from .table import StepTable, check_ratio, step_table

SOLVER_TYPES = ("bh1", "bh2")


def unipc(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    predict_x0: bool = True,
    lower_order_final: bool = True,
    disable_corrector: Iterable[int] = (),
    final_sigma: str = "zero",
    state: str = "vp",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: str = "linspace",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of UniPC-p, multistep: UniP-p predicts the next state, and UniC-p corrects it (theorem 3.1, cor. 3.2).

    The model is evaluated once a step, at the predicted state. So a row corrects the state that it finds and predicts
    the next from it. The corrected state is the predicted one plus the difference between two weighted sums of the same
    predictions: nothing has to be kept but those. (What the last row leaves is not corrected.)

    Args:
        schedule: what the model was trained with.
        steps: how many evaluations of the model; None: all time steps but t = 0, or 18 of an `EDMSchedule`.
        order: p = 1, 2 or 3; the corrector raises the order of accuracy to p + 1.
        solver_type: B(h) = h ("bh1") or e^h - 1 ("bh2"). It matters in the predictor of order 2 and the corrector of
            order 1, which have a_1 = 1/2 whatever h, as the authors' code has; the others don't depend on B.
        predict_x0: extrapolate the predicted x_0; False: the predicted noise.
        lower_order_final: the last steps have the orders p ... 2, 1.
        disable_corrector: the steps, counted from 0, whose result is not corrected; ``range(steps)`` leaves UniP.
        final_sigma: the state ends at noise "zero", where the last row has order 1 and returns its x_0; or at
            "sigma_min", the schedule's least.
        state: "vp" or "ve": the scaling of the state (see `Levels`).
        prediction_type: what the model predicts: "epsilon", "v_prediction", "sample" (x_0); "edm" of an `EDMSchedule`.
        clip: bound of the predicted abs(x_0); None: no limit. With `predict_x0` alone.
        dynamic_thresholding_ratio: as in `ddpm`. With `predict_x0` alone.
        spacing: "linspace", "leading", "trailing", "karras" or "log_snr" (see `Levels.of`); the first two without their
            last point, t = 0, as in diffusers.
        quantize: round the time input of "karras" and "log_snr" to whole time steps.
        start: leave out so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these.
    """
    order = check_order(order)
    if solver_type not in SOLVER_TYPES:
        raise ConfigError(f"solver_type is {solver_type!r}; allowed: {', '.join(map(repr, SOLVER_TYPES))}")
    check_flag("predict_x0", predict_x0)
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
    kind: Kind = "sample" if predict_x0 else "epsilon"
    orders = warmed_up(levels, order)
    if lower_order_final:
        orders = np.minimum(orders, np.arange(len(orders), 0, -1))
    kept, gain = transfer(levels, kind)
    predictor = gain[:, None] * _predictor(levels.lam, orders, kind, solver_type)
    corrected = _corrected(orders, disable_corrector, levels)
    corrector = gain[:, None] * _corrector(levels.lam, corrected, kind, solver_type)
    # What row i adds to the state that it finds: the weights of the prediction there and of the three before it.
    change = np.zeros((len(orders), 4))
    change[1:] = np.where(corrected[:-1, None] > 0, corrector[:-1] - predictor[:-1], 0.0)
    weights = kept[:, None] * change
    weights[:, :3] += predictor[:, 1:]
    return step_table(
        levels.t,
        c_in=levels.c_in,
        x0_x=levels.x0_x if predict_x0 else levels.eps_x,
        x0_m=levels.x0_m if predict_x0 else levels.eps_m,
        x_x=kept,
        x_x0=weights[:, 0],
        x_h1=weights[:, 1],
        x_h2=weights[:, 2],
        x_h3=weights[:, 3],
        k_x=levels.alpha[1:],
        k_z=levels.sigma[1:],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        history_of=kind,
        clip=clip,
        ratio=check_ratio(dynamic_thresholding_ratio, clip),
    )


def _predictor(lam: Floats, orders: NDArray[np.int64], kind: Kind, solver_type: str) -> Floats:
    """UniP's weights of the predictions at each step's end, its start and the levels before, [n, 4], for `transfer`.

    With order 2 the slope is taken once, a_1 = 1/2, and not so that the linear polynomial is integrated exactly.
    """
    weights = adams(lam, orders, kind)
    rows = np.flatnonzero(orders == 2)
    h, before = lam[rows + 1] - lam[rows], lam[rows] - lam[rows - 1]
    slope = 0.5 * _b(h, kind, solver_type) * h / before
    weights[rows, 1], weights[rows, 2] = slope - np.expm1(-h), -slope
    return weights


def _corrector(lam: Floats, orders: NDArray[np.int64], kind: Kind, solver_type: str) -> Floats:
    """UniC's, in the same order; 0 where the order is 0. With order 1, a_1 = 1/2."""
    weights = adams(lam, orders, kind, implicit=True)
    rows = np.flatnonzero(orders == 1)
    h = lam[rows + 1] - lam[rows]
    half = 0.5 * _b(h, kind, solver_type)
    weights[rows, 0], weights[rows, 1] = half, -np.expm1(-h) - half
    return weights


def _b(h: Floats, kind: Kind, solver_type: str) -> Floats:
    """B(h) where `transfer`'s G stands before it: -B(-h) for x_0, e^-h B(h) for noise; of "bh2" they are the same."""
    if solver_type == "bh2":
        return -np.expm1(-h)
    return h if kind == "sample" else h * np.exp(-h)


def _corrected(orders: NDArray[np.int64], disabled: Iterable[int], levels: Levels) -> NDArray[np.int64]:
    """The order of the corrector after each step: that of its predictor, or 0 where there is none."""
    out = orders.copy()
    if not isinstance(disabled, Iterable):
        raise ConfigError(f"disable_corrector is {disabled!r}; allowed: a list of steps, such as [0] or range(10)")
    for step in disabled:
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < len(out):
            raise ConfigError(f"disable_corrector has {step!r}; allowed: a list of integers in 0 ... {len(out) - 1}")
        out[step] = 0
    out[np.isinf(levels.steps)] = 0  # no slope leads from pure noise, nor to no noise at all
    return out

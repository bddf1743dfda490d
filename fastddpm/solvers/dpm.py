"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095), multistep.

With lambda = log(alpha / sigma), x / sigma grows by the integral of exp(lambda) x_0 d lambda (2211.01095, proposition
4.1) and x / alpha falls by that of exp(-lambda) eps d lambda (2206.00927, proposition 3.1). A step puts into the first
(DPM-Solver++) or the second (DPM-Solver) a polynomial through what was predicted at the latest levels, instead of x_0
or eps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .checks import check_flag, check_order
from .levels import Levels
from .table import StepTable, check_ratio, step_table

Floats = NDArray[np.float64]

ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
SOLVER_TYPES = ("midpoint", "heun", "exact")
FAR = 1e3  # in place of an infinite step in lambda: exp(-1000) is 0 in float64, and nothing is inf - inf
FEW = 15  # with fewer steps than this, `lower_order_final` has an effect


def dpm_solver(
    schedule: NoiseSchedule | EDMSchedule,
    steps: int | None = None,
    *,
    order: int = 2,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    eta: float = 1.0,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    final_sigma: str = "zero",
    state: str = "vp",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    dynamic_thresholding_ratio: float | None = None,
    spacing: str = "linspace",
    quantize: bool = True,
    start: int = 0,
) -> StepTable:
    """The table of DPM-Solver, multistep: DPM-Solver++(2M) where nothing else is said (2211.01095, algorithm 2).

    diffusers' DPMSolverMultistepScheduler; with ``state="ve"`` or an `EDMSchedule` k-diffusion's ``sample_dpmpp_2m``,
    ``sample_dpmpp_2m_sde`` and (order 3, "heun") ``sample_dpmpp_3m_sde``. The first rows have order 1 and 2, for there
    is no history yet.

    Args:
        schedule: what the model was trained with.
        steps: how many evaluations of the model; None: all time steps but t = 0, or 18 of an `EDMSchedule`.
        order: 1 (DDIM), 2 or 3, the number of predictions that a step looks at.
        algorithm: "dpmsolver++" extrapolates x_0, "dpmsolver" eps; "sde-dpmsolver++" and "sde-dpmsolver" do so for the
            reverse-time SDE and add noise in each row (2211.01095, SDE-DPM-Solver++).
        solver_type: how the polynomial is integrated. "midpoint" (2211.01095, algorithm 2) and "heun" differ at order
            2, where "heun" is exact. At order 3 both are what the authors' code and the libraries do: the quadratic
            term has half its weight, and the error falls as at order 2. "exact" is "heun" with all of that term, and
            of order 3: the better choice there, unless a library's numbers are wanted.
        eta: how much noise the two SDEs add, 0 (none: the ODE) ... 1. No effect on the other algorithms.
        lower_order_final: with fewer than 15 steps the last has order 1, and the one before it 2 at most.
        euler_at_final: the last step has order 1, however many there are.
        final_sigma: the state ends at noise "zero", where the last row has order 1 and returns its x_0; or at
            "sigma_min", the schedule's least, up to which the SDEs still add noise.
        state: "vp" or "ve": the scaling of the state (see `Levels`).
        prediction_type: what the model predicts: "epsilon", "v_prediction", "sample" (x_0); "edm" of an `EDMSchedule`.
        clip: bound of the predicted abs(x_0); None: no limit. For the "++" algorithms alone.
        dynamic_thresholding_ratio: as in `ddpm`. For the "++" algorithms alone.
        spacing: "linspace", "leading", "trailing", "karras" or "log_snr" (see `Levels.of`), as diffusers' DPM-Solver
            has them: t = 0 is left out.
        quantize: round the time input of "karras" and "log_snr" to whole time steps.
        start: leave out so many levels at the beginning (to start from a noised picture).

    Raises:
        ConfigError: for a value that is not among these.
    """
    check_common(order, algorithm, ALGORITHMS, solver_type, SOLVER_TYPES, clip, dynamic_thresholding_ratio)
    check_flag("lower_order_final", lower_order_final)
    check_flag("euler_at_final", euler_at_final)
    if not isinstance(eta, int | float | np.number) or isinstance(eta, bool) or not 0.0 <= eta <= 1.0:
        raise ConfigError(f"eta is {eta!r}; allowed: a number in 0 ... 1 (0: no noise, 1: all that the SDE has)")
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
    orders = np.minimum(order, np.arange(1, len(levels.t) + 1))
    if lower_order_final and len(levels.t) + start < FEW:
        orders[-2:] = np.minimum(orders[-2:], [2, 1][-len(orders) :])
    if euler_at_final or levels.sigma[-1] == 0:
        orders[-1] = 1
    return multistep_table(levels, orders, algorithm, solver_type, float(eta), clip, dynamic_thresholding_ratio)


def multistep_table(
    levels: Levels,
    orders: NDArray[np.int64],
    algorithm: str,
    solver_type: str,
    eta: float,
    clip: float | None = None,
    ratio: float | None = None,
) -> StepTable:
    """The table of `dpm_solver` through given levels; `orders`, int64 [n], are the steps', the last 1 if it ends at 0.

    Raises `ConfigError` where noise is extrapolated from a level that is pure noise.
    """
    of_x0 = check_levels(levels, algorithm)
    alpha, sigma, h = levels.alpha, levels.sigma, np.minimum(levels.steps, FAR)
    # Noise at the level that has none would have to be removed again by a prediction that was made before it.
    eta_row = np.where(sigma[1:] > 0, eta if algorithm.startswith("sde") else 0.0, 0.0)
    if of_x0:  # x' = sigma' / sigma e^(-eta h) x + alpha' integral of e^(u - H) x_0 du over 0 ... H = (1 + eta) h
        scale, w = alpha[1:], weights(of_x0, (1 + eta_row) * h)
        x_x = sigma[1:] / sigma[:-1] * np.exp(-eta_row * h)
        x_z = sigma[1:] * np.sqrt(np.abs(np.expm1(-2 * eta_row * h)))
    else:  # x' = alpha' / alpha (x - (1 + eta) sigma integral of e^(-u) eps du over 0 ... h)
        x_x = alpha[1:] / alpha[:-1]
        scale, w = -(1 + eta_row) * x_x * sigma[:-1], weights(of_x0, h)
        x_z = x_x * sigma[:-1] * np.sqrt(eta_row * -np.expm1(-2 * h))
    x_x0, x_h1, x_h2 = scale * _extrapolated(levels.steps, h, orders, solver_type, w)
    return step_table(
        levels.t,
        c_in=levels.c_in,
        **predicted(levels, of_x0),
        x_x=x_x,
        x_x0=x_x0,
        x_h1=x_h1,
        x_h2=x_h2,
        x_z=x_z,
        k_x=alpha[1:],
        k_z=sigma[1:],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
        history_of="sample" if of_x0 else "epsilon",
        clip=clip,
        ratio=check_ratio(ratio, clip),
    )


def _extrapolated(
    steps: Floats, h: Floats, orders: NDArray[np.int64], solver_type: str, weights: tuple[Floats, Floats, Floats]
) -> Floats:
    """What the latest three predictions m_0, m_1, m_2 (m_0 the newest) contribute to the integral, [3, n].

    In divided differences, with h_0 and h_1 the steps before h, the polynomial is m_0 + D1 u / h + D2 (u / h)^2, where
    D = (h / h_0) (m_0 - m_1), D' = (h / h_1) (m_1 - m_2), D2 = h / (h_0 + h_1) (D - D'), D1 = D + (h_0 / h) D2.
    """
    w0, w1, w2 = weights
    if solver_type == "midpoint":
        w1 = np.where(orders == 2, w0 / 2, w1)
    if solver_type == "exact":
        w2 = 2 * w2
    n = len(h)
    before = np.concatenate([[np.inf, np.inf], steps])  # h / inf = 0: no slope from a level that is pure noise
    q0, q1 = h / before[1 : n + 1], h / before[:n]
    bend = np.divide(q1, q0 + q1, out=np.zeros(n), where=orders == 3) * (w1 + w2 * q0)  # of D - D'
    slope = np.where(orders > 1, w1 + bend, 0.0)  # of D
    return np.array([w0 + slope * q0, -slope * q0 - bend * q1, bend * q1])


def weights(of_x0: bool, h: Floats) -> tuple[Floats, Floats, Floats]:
    """Integrals of 1, u / h and (u / h)^2 / 2 over 0 ... h: times e^(u - h) for x_0, times e^(-u) for eps.

    They are h phi_1, h phi_2 and h phi_3 of 2206.00927 (appendix B), in which D2 is a second derivative.
    """
    w0 = -np.expm1(-h)
    if of_x0:
        w1 = 1 - w0 / h
        return w0, w1, 0.5 - w1 / h
    w1 = w0 / h - np.exp(-h)
    return w0, w1, w1 / h - 0.5 * np.exp(-h)


def predicted(levels: Levels, of_x0: bool) -> dict[str, Floats]:
    """The columns of what is extrapolated: x_0, or eps in its place."""
    if of_x0:
        return {"x0_x": levels.x0_x, "x0_m": levels.x0_m}
    return {"x0_x": levels.eps_x, "x0_m": levels.eps_m}


def check_levels(levels: Levels, algorithm: str) -> bool:
    """Whether `algorithm` extrapolates x_0; `ConfigError` where it is eps and the first level is pure noise."""
    of_x0 = algorithm.endswith("++")
    if not of_x0 and np.isneginf(levels.lam[0]):
        raise ConfigError(
            f"algorithm={algorithm!r} can't start at a terminal SNR of zero (it divides by alpha); "
            'use an algorithm with "++"'
        )
    return of_x0


def check_common(
    order: object,
    algorithm: object,
    algorithms: tuple[str, ...],
    solver_type: object,
    solver_types: tuple[str, ...],
    clip: object,
    ratio: object,
) -> None:
    """`ConfigError` for what multistep and singlestep both refuse."""
    check_order(order)
    for name, value, allowed in (
        ("algorithm", algorithm, algorithms),
        ("solver_type", solver_type, solver_types),
    ):
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    if not str(algorithm).endswith("++") and (clip is not None or ratio is not None):
        raise ConfigError(
            f"algorithm={algorithm!r} extrapolates noise, which can't be clipped; "
            'use clip=None and dynamic_thresholding_ratio=None, or "dpmsolver++"'
        )

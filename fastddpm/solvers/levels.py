"""The noise levels that a sampler's state visits, and what the model wants at each.

At every level the state is alpha x_0 + sigma eps. Two scalings of it are in use: variance preserving ("vp",
alpha^2 + sigma^2 = 1; Ho et al. 2020, DPM-Solver) and variance exploding ("ve", alpha = 1; Song et al. 2020, EDM,
k-diffusion). Both are the same process with x divided by alpha, so a solver written in alpha, sigma and
lambda = log(alpha / sigma) is right in either.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .spacing import SPACINGS, Spacing, check_start, timesteps
from .strides import PREDICTION_TYPES, check_schedule

Floats = NDArray[np.float64]

BY_LEVEL = ("karras", "log_snr")
STATES = ("vp", "ve")
FINAL_SIGMAS = ("zero", "sigma_min")
RHO = 7.0  # EDM, table 1


@dataclass(frozen=True)
class Levels:
    """n levels at which the model is evaluated, the noise falling, and the level behind the last: all float64.

    Attributes:
        t: the model's time input, [n].
        lam: lambda = log(alpha / sigma), [n + 1]; infinite at the end where no noise is left.
        alpha, sigma: scales of x_0 and of the noise in the state, [n + 1].
        c_in: scale of the model's input, [n].
        x0_x, x0_m: x_0 = x0_x x + x0_m m, [n], with x the state and m the model's output.
        eps_x, eps_m: eps = eps_x x + eps_m m, [n].
        init_noise_sigma: scale of the noise from which sampling starts.
    """

    t: Floats
    lam: Floats
    alpha: Floats
    sigma: Floats
    c_in: Floats
    x0_x: Floats
    x0_m: Floats
    eps_x: Floats
    eps_m: Floats
    init_noise_sigma: float

    @property
    def steps(self) -> Floats:
        """h_i = lambda_{i+1} - lambda_i, [n]; the last is infinite where no noise is left behind it."""
        return np.diff(self.lam)

    @property
    def start(self) -> tuple[float, float]:
        """(alpha, sigma) of the first level."""
        return float(self.alpha[0]), float(self.sigma[0])

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule | EDMSchedule,
        steps: int | None,
        *,
        spacing: Spacing,
        prediction_type: str,
        state: str = "vp",
        final_sigma: str = "zero",
        skip_last: bool = False,
        quantize: bool = True,
        start: int = 0,
    ) -> Levels:
        """The levels of `steps` model evaluations.

        Args:
            schedule: what the model was trained with; an `EDMSchedule` has its own scaling and time input.
            steps: how many; None: all time steps of a `NoiseSchedule`, 18 of an `EDMSchedule` (EDM, table 1).
            spacing: by time step as `spacing.timesteps` has it ("leading", "10,10,20" ...); or by noise level from
                the schedule's greatest to its least: "karras" (EDM, eq. 5, rho = 7), "log_snr" (evenly in lambda;
                DPM-Solver, section 3.4; "exponential" elsewhere). An `EDMSchedule` has the latter two.
            prediction_type: "epsilon", "v_prediction" or "sample"; "edm" or "sample" for an `EDMSchedule`.
            state: "vp" or "ve"; an `EDMSchedule` is "ve" whatever is said here.
            final_sigma: the last level has "zero" noise, or the schedule's least ("sigma_min"), where the spacing stops
                above it ("karras" and "log_snr" don't: it is the last level that the model is evaluated at).
            skip_last: leave out the last point of "leading" and "linspace", as DPM-Solver does (there t = 0, whose
                noise is hardly more than none): steps + 1 points are spaced, and the first `steps` taken.
            quantize: round the time input of "karras" and "log_snr" to whole time steps, as a model with a table of
                time embeddings needs. The noise levels stay.
            start: leave out so many levels at the beginning (to start from a noised picture).

        Raises:
            ConfigError: for a value that is not among these.
        """
        for name, value, allowed in (("state", state, STATES), ("final_sigma", final_sigma, FINAL_SIGMAS)):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
        if not isinstance(quantize, bool):
            raise ConfigError(f"quantize is {quantize!r}; allowed: True (whole time steps) or False")
        if isinstance(schedule, EDMSchedule):
            log_sigma = _log_sigmas(schedule.log_sigmas, _count(steps, 18), spacing)
            t, least = np.zeros(0), schedule.log_sigmas[0]
        else:
            check_schedule(schedule)
            train = -0.5 * schedule.log_snr  # log of sigma / alpha at each time step, rising
            least = train[0]
            if isinstance(spacing, str) and spacing in BY_LEVEL:
                log_sigma = _log_sigmas((train[0], train[-1]), _count(steps, schedule.num_steps), spacing)
                t = times_of(schedule, log_sigma)
                t = t.round() if quantize else t
            else:
                t = _times(schedule.num_steps, steps, _checked(spacing), skip_last).astype(np.float64)
                log_sigma = train[t.astype(np.int64)]
        start = check_start(start, len(log_sigma))
        log_end = -np.inf if final_sigma == "zero" else least
        if log_end >= log_sigma[-1]:
            raise ConfigError(f'final_sigma="sigma_min" is the last level itself with spacing={spacing!r}; use "zero"')
        log_sigma = np.append(log_sigma[start:], log_end)
        if isinstance(schedule, EDMSchedule):
            return cls.at_edm(schedule, log_sigma, prediction_type)
        return cls.at(log_sigma, t[start:], prediction_type=prediction_type, state=state)

    @classmethod
    def at(cls, log_sigma: ArrayLike, t: ArrayLike, *, prediction_type: str, state: str = "vp") -> Levels:
        """The levels with given log(sigma / alpha), [n + 1], and time inputs, [n], of a model of a `NoiseSchedule`.

        Raises `ConfigError` for an unknown prediction type, or "epsilon" where the first level is pure noise.
        """
        log_sigma, t = np.asarray(log_sigma, dtype=np.float64), np.asarray(t, dtype=np.float64)
        log_alpha = -0.5 * np.logaddexp(0.0, 2.0 * log_sigma)  # of the variance preserving state
        with np.errstate(divide="ignore"):
            alpha, sigma = np.exp(log_alpha), np.exp(-0.5 * np.logaddexp(0.0, -2.0 * log_sigma))
        (x0_x, x0_m), (eps_x, eps_m) = _predictions(prediction_type, alpha[:-1], sigma[:-1], log_sigma[:-1])
        vp = state == "vp"
        if not vp and np.isposinf(log_sigma[0]):
            raise ConfigError(
                "the noise at a terminal SNR of zero is infinite where the state is x_0 + sigma eps; "
                'use start=1, or state="vp" if the solver has it'
            )
        c_in = np.ones(len(t)) if vp else alpha[:-1].copy()  # the model's input is the variance preserving state
        return cls(
            t=t,
            lam=-log_sigma,
            alpha=alpha if vp else np.ones(len(alpha)),
            sigma=sigma if vp else np.exp(log_sigma),
            c_in=c_in,
            x0_x=x0_x * c_in,
            x0_m=x0_m,
            eps_x=eps_x * c_in,
            eps_m=eps_m,
            init_noise_sigma=1.0 if vp else float(np.exp(log_sigma[0])),
        )

    @classmethod
    def at_edm(cls, schedule: EDMSchedule, log_sigma: Floats, prediction_type: str) -> Levels:
        """The levels with given log sigma, [n + 1], of an EDM network (EDM, table 1).

        D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with ``prediction_type="edm"``; "sample" is D itself.
        Raises `ConfigError` for another type.
        """
        sigma = np.exp(log_sigma)
        now, data = sigma[:-1], schedule.sigma_data
        if prediction_type == "edm":
            norm = np.hypot(now, data)
            t, c_in, x0_x, x0_m = log_sigma[:-1] / 4, 1 / norm, (data / norm) ** 2, now * data / norm
        elif prediction_type == "sample":
            t, c_in, x0_x, x0_m = now, np.ones(len(now)), np.zeros(len(now)), np.ones(len(now))
        else:
            raise ConfigError(f"prediction_type is {prediction_type!r}; allowed with an EDMSchedule: 'edm', 'sample'")
        # 1 - c_skip without cancellation
        eps_x = now / norm**2 if prediction_type == "edm" else 1 / now
        return cls(
            t=t,
            lam=-log_sigma,
            alpha=np.ones(len(sigma)),
            sigma=sigma,
            c_in=c_in,
            x0_x=x0_x,
            x0_m=x0_m,
            eps_x=eps_x,
            eps_m=-x0_m / now,
            init_noise_sigma=float(sigma[0]),
        )


def times_of(schedule: NoiseSchedule, log_sigma: ArrayLike) -> Floats:
    """The (fractional) time steps of given log(sigma / alpha), interpolated linearly and kept within the schedule."""
    t: Floats = np.interp(np.asarray(log_sigma), -0.5 * schedule.log_snr, np.arange(schedule.num_steps))
    return t


def _times(num_train_steps: int, steps: int | None, spacing: Spacing, skip_last: bool) -> NDArray[np.int64]:
    if not skip_last or not isinstance(spacing, str) or spacing not in ("leading", "linspace"):
        return timesteps(num_train_steps, steps, spacing)
    if steps is None or steps == num_train_steps:
        steps = num_train_steps - 1  # all but t = 0
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps < num_train_steps:
        raise ConfigError(
            f"steps is {steps!r}; allowed: an integer in 1 ... {num_train_steps - 1}, one less than the schedule's "
            "length, since this solver leaves out t = 0"
        )
    return timesteps(num_train_steps, int(steps) + 1, spacing)[:-1]


def _checked(spacing: Spacing) -> Spacing:
    """`spacing`; `ConfigError` for a word that is no spacing, with those by level among the allowed."""
    if isinstance(spacing, str) and spacing not in SPACINGS and spacing.strip(", 0123456789") not in ("", "ddim"):
        allowed = ", ".join(map(repr, (*SPACINGS, *BY_LEVEL)))
        raise ConfigError(f"spacing is {spacing!r}; allowed: {allowed}, or sections as '10,10,20' or 'ddim50'")
    return spacing


def _count(steps: int | None, default: int) -> int:
    steps = default if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= 1_000_000:
        raise ConfigError(f"steps is {steps!r}; allowed: an integer of at least 1")
    return int(steps)


def _log_sigmas(ends: tuple[float, float], n: int, spacing: Spacing) -> Floats:
    """log sigma of n levels from the greatest to the least; `ends` are (least, greatest)."""
    least, greatest = ends
    if not np.isfinite(greatest):
        raise ConfigError(
            f'spacing={spacing!r} needs a least signal; this schedule ends at a terminal SNR of zero; use "trailing"'
        )
    if not isinstance(spacing, str) or spacing not in BY_LEVEL:
        raise ConfigError(
            f"spacing is {spacing!r}; allowed with an EDMSchedule: 'karras', 'log_snr' (and prediction_type 'edm' or "
            "'sample')"
        )
    ramp = np.linspace(0.0, 1.0, n)
    if spacing == "log_snr":
        made = greatest + ramp * (least - greatest)
    else:  # EDM, eq. 5
        a, b = np.exp(greatest / RHO), np.exp(least / RHO)
        made = RHO * np.log(a + ramp * (b - a))
    made[-1] = least  # to the last bit, as `final_sigma` is compared with it
    made[0] = greatest
    return made


def _predictions(
    kind: str, alpha: Floats, sigma: Floats, log_sigma: Floats
) -> tuple[tuple[Floats, Floats], tuple[Floats, Floats]]:
    """Coefficients of (x, m) in x_0 and in eps, for the variance preserving state."""
    zero, one = np.zeros(len(alpha)), np.ones(len(alpha))
    if kind == "epsilon":
        if not np.isfinite(log_sigma).all():
            raise ConfigError(
                "an epsilon-model can't start at a terminal SNR of zero (pure noise says nothing about x_0); "
                'use prediction_type="v_prediction" or "sample"'
            )
        return (1 / alpha, -np.exp(log_sigma)), (zero, one)
    if kind == "v_prediction":  # arXiv 2202.00512, appendix D
        return (alpha, -sigma), (sigma, alpha)
    if kind == "sample":
        return (zero, one), (1 / sigma, -alpha / sigma)
    raise ConfigError(f"prediction_type is {kind!r}; allowed: {', '.join(map(repr, PREDICTION_TYPES))}")

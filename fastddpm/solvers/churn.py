"""Noise added on the way: the churn of EDM (Karras et al. 2022, arXiv 2206.00364, algorithm 2) and ancestral noise.

A step goes from the level sigma down to `end`, and noise then lifts the state to the level at which the next step
starts. Churn lifts it above the level of the schedule, before the model is evaluated there; that noise is merged into
the row before, and into the initial noise where there is none: equal in distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..edm import EDMSchedule
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .levels import Levels, times_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Churned:
    """The levels of n steps with noise added between them, and the model to be evaluated there.

    Attributes:
        log_sigma: log(sigma / alpha) where step i starts, the noise added, and behind the last step, float64 [n + 1].
        log_kept: what `log_sigma` was before that noise, less what it is now, [n + 1]; 0 where none was added.
        s_noise: the added noise's scale is multiplied by this.
        schedule, prediction_type, state, quantize: as in `Levels.of`.
    """

    log_sigma: Floats
    log_kept: Floats
    s_noise: float
    schedule: NoiseSchedule | EDMSchedule
    prediction_type: str
    state: str
    quantize: bool

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule | EDMSchedule,
        steps: int | None,
        *,
        s_noise: float,
        prediction_type: str,
        spacing: str,
        final_sigma: str,
        state: str,
        quantize: bool,
        start: int,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        eta: float = 0.0,
    ) -> Churned:
        """The arguments are those of `euler` and `euler_ancestral`; raises `ConfigError` where they do."""
        for name, value, most in (
            ("s_churn", s_churn, math.inf),
            ("s_tmin", s_tmin, math.inf),
            ("s_tmax", s_tmax, math.inf),
            ("s_noise", s_noise, 1e3),
            ("eta", eta, 1.0),
        ):
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not 0 <= value <= most:
                raise ConfigError(f"{name} is {value!r}; allowed: a number in 0 ... {most:g}")
        levels = Levels.of(
            schedule,
            steps,
            spacing=spacing,
            prediction_type=prediction_type,
            state=state,
            final_sigma=final_sigma,
            quantize=quantize,
            start=start,
        )
        log_sigma = -levels.lam
        sigma = np.exp(log_sigma[:-1])
        within = (s_tmin <= sigma * (1 + 1e-12)) & (sigma * (1 - 1e-12) <= s_tmax)  # the ends, too, but for rounding
        gamma = np.where(within, min(s_churn / (start + len(sigma)), math.sqrt(2) - 1), 0.0)
        lift = np.append(np.log1p(gamma), 0.0)
        # sigma_down^2 = sigma'^2 (1 - eta^2 (1 - sigma'^2 / sigma^2))
        with np.errstate(divide="ignore"):
            down = 0.5 * np.log1p(eta**2 * np.expm1(2 * (log_sigma[1:] - log_sigma[:-1] - lift[:-1])))
        log_kept = np.append(0.0, down) - lift
        return cls(log_sigma + lift, log_kept, float(s_noise), schedule, prediction_type, state, quantize)

    @property
    def log_end(self) -> Floats:
        """log(sigma / alpha) at which step i ends, before noise is added, [n]."""
        return self.log_sigma[1:] + self.log_kept[1:]

    def check_signal(self, remedy: str) -> None:
        """Raises `ConfigError`, with the `remedy`, where the first level is pure noise: sigma / alpha is infinite."""
        if self.log_sigma[0] == np.inf:
            raise ConfigError(
                f"this solver can't start at a terminal SNR of zero, where sigma / alpha is infinite; use {remedy}"
            )

    def columns(self, log_sigma: Floats, log_kept: Floats) -> tuple[Levels, dict[str, Any]]:
        """Levels, and columns of the Euler steps x' = x_0 + end / sigma (x - x_0) from each to the next and the noise.

        `log_sigma`, [rows + 1], are those where the model is evaluated; `log_kept`, [rows], is of those that a row
        leads to.
        """
        levels = self._levels(log_sigma)
        alpha, sigma = levels.alpha[1:], levels.sigma[1:]
        noise = levels.sigma * np.sqrt(0.0 - np.expm1(2 * np.append(self.log_kept[0], log_kept)))
        return (
            levels,
            dict(
                t=levels.t,
                c_in=levels.c_in,
                x0_x=levels.x0_x,
                x0_m=levels.x0_m,
                x_x=sigma / levels.sigma[:-1] * np.exp(log_kept),  # finite even where sigma / alpha is not
                x_x0=-alpha * np.expm1(log_kept - levels.steps),  # 1 - end / sigma
                x_z=self.s_noise * noise[1:],
                k_x=alpha,
                k_z=sigma,
                start=levels.start,
                # the first level's noise has the churn in it already, with s_noise = 1
                init_noise_sigma=math.sqrt(levels.init_noise_sigma**2 + (self.s_noise**2 - 1) * noise[0] ** 2),
            ),
        )

    def columns_of_two(self, log_between: Floats) -> tuple[Levels, dict[str, Any]]:
        """`columns` of two rows a step: from its start to `log_between`, [n], and on to the start of the next.

        Where no noise is left behind the last step, that one is a single row.
        """
        rows = 2 * len(log_between) - int(self.log_sigma[-1] == -np.inf)
        log_sigma = np.zeros(2 * len(log_between) + 1)
        log_sigma[0::2], log_sigma[1::2] = self.log_sigma, log_between
        log_kept = np.zeros(2 * len(log_between))
        log_kept[1::2] = self.log_kept[1:]
        return self.columns(log_sigma[: rows + 1], log_kept[:rows])

    def _levels(self, log_sigma: Floats) -> Levels:
        if isinstance(self.schedule, EDMSchedule):
            return Levels.at_edm(self.schedule, log_sigma, self.prediction_type)
        t = times_of(self.schedule, log_sigma[:-1])  # above the schedule's greatest noise: the last time step
        t = t.round() if self.quantize else t
        return Levels.at(log_sigma, t, prediction_type=self.prediction_type, state=self.state)

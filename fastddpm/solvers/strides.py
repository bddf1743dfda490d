"""What a solver needs to know of the noise schedule between the time steps that it visits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .spacing import Spacing, check_start, timesteps

Floats = NDArray[np.float64]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Strides:
    """The visited time steps t, each with s, the one visited after it (behind the last: the data, alpha_bar = 1).

    All float64 [rows]; no 1 - alpha_bar is ever subtracted, so all have full relative precision.

    Attributes:
        t: time steps, falling.
        alpha, beta: alpha_bar_t / alpha_bar_s and 1 minus it: the stride's alpha_t and beta_t.
        log_bar: log alpha_bar_t.
        bar_next: alpha_bar_s.
        noise, noise_next: 1 - alpha_bar_t and 1 - alpha_bar_s; the last `noise_next` is 0 exactly.
    """

    t: NDArray[np.int64]
    alpha: Floats
    beta: Floats
    log_bar: Floats
    bar_next: Floats
    noise: Floats
    noise_next: Floats

    @classmethod
    def of(cls, schedule: NoiseSchedule, steps: int | None, spacing: Spacing, start: int = 0) -> Strides:
        """The strides of `steps` steps through `schedule`, without the first `start` of them.

        Raises `ConfigError` as `spacing.timesteps` does, for another schedule, or for a `start` that leaves no step.
        """
        check_schedule(schedule)
        t = timesteps(schedule.num_steps, steps, spacing)
        t = t[check_start(start, len(t)) :]
        # Each stride's log alpha is summed on its own: a difference of two log alpha_bar would cancel.
        ends = t[::-1].tolist()
        starts = [0, *(end + 1 for end in ends[:-1])]
        logs = schedule.log_alphas.tolist()
        stride = np.array([math.fsum(logs[a : b + 1]) for a, b in zip(starts, ends, strict=True)][::-1])
        log_bar = schedule.log_alphas_cumprod[t]
        stride[-1] = log_bar[-1]  # the stride to the data, to the last bit
        log_next = np.append(log_bar[1:], 0.0)
        return cls(
            t=t,
            alpha=np.exp(stride),
            beta=-np.expm1(stride),
            log_bar=log_bar,
            bar_next=np.exp(log_next),
            noise=-np.expm1(log_bar),
            noise_next=-np.expm1(log_next) + 0.0,  # + 0.0: no minus zero in the last row
        )

    @property
    def start(self) -> tuple[float, float]:
        """(alpha, sigma) of the first time step: the scales of x_0 and of the noise in its state."""
        return math.exp(0.5 * self.log_bar[0]), math.sqrt(self.noise[0])

    def predicted_x0(self, prediction_type: str) -> tuple[Floats, Floats]:
        """(x0_x, x0_m) with x_0 = x0_x x + x0_m m (arXiv 2006.11239, eq. 15; v: 2202.00512, appendix D).

        Raises `ConfigError` for an unknown type, or "epsilon" where alpha_bar is 0.
        """
        if prediction_type == "epsilon":
            if np.isneginf(self.log_bar).any():
                raise ConfigError(
                    "an epsilon-model can't start at a terminal SNR of zero (pure noise says nothing about x_0); "
                    'use prediction_type="v_prediction" or "sample"'
                )
            return np.exp(-0.5 * self.log_bar), -np.sqrt(np.expm1(-self.log_bar))
        if prediction_type == "v_prediction":
            return np.exp(0.5 * self.log_bar), -np.sqrt(self.noise)
        if prediction_type == "sample":
            return np.zeros(len(self.t)), np.ones(len(self.t))
        raise _unknown(prediction_type)

    def predicted_eps(self, prediction_type: str) -> tuple[Floats, Floats]:
        """(eps_x, eps_m): eps = eps_x x + eps_m m, from the model's output as it is (x_0 not limited).

        Raises `ConfigError` for an unknown type.
        """
        if prediction_type == "epsilon":
            return np.zeros(len(self.t)), np.ones(len(self.t))
        if prediction_type == "v_prediction":
            return np.sqrt(self.noise), np.exp(0.5 * self.log_bar)
        if prediction_type == "sample":
            return 1.0 / np.sqrt(self.noise), -np.exp(0.5 * self.log_bar) / np.sqrt(self.noise)
        raise _unknown(prediction_type)


def check_schedule(schedule: object) -> None:
    """`ConfigError` unless `schedule` is a `NoiseSchedule`."""
    if not isinstance(schedule, NoiseSchedule):
        raise ConfigError(f"schedule is of type {type(schedule).__name__}; this solver needs a NoiseSchedule")


def _unknown(prediction_type: object) -> ConfigError:
    allowed = ", ".join(map(repr, PREDICTION_TYPES))
    return ConfigError(f"prediction_type is {prediction_type!r}; allowed: {allowed}")

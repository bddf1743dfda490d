"""The tables of a guided-diffusion `GaussianDiffusion`. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from fastddpm_kernels.columns import X0_M, X0_X, X_M, X_X, X_X0, X_Z, T
from numpy.typing import NDArray

from .. import solvers
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from ..solvers import StepTable
from ..solvers.levels import Floats
from ..solvers.spacing import timesteps

MEANS = ("previous_x", "start_x", "epsilon")
VARIANCES = ("learned", "fixed_small", "fixed_large", "learned_range")


@dataclass(frozen=True, eq=False)
class Process:
    """A diffusion of which every time step is visited, by a model that may count them otherwise.

    Attributes:
        schedule: of the visited time steps.
        mean: what the model predicts, one of `MEANS`.
        variance: one of `VARIANCES`.
        told: what the model is told of each row's time step, float64 [rows].
        rescaled: whether it is told floats, not whole numbers.
    """

    schedule: NoiseSchedule
    mean: str
    variance: str
    told: Floats
    rescaled: bool

    @classmethod
    def of(
        cls, betas: Floats, mean: str, variance: str, rescaled: bool, visited: list[int], num_trained: int
    ) -> Process:
        """That of the visited time steps' betas; `rescaled`: the model is told t 1000 / num_trained."""
        told = np.array(visited[::-1], dtype=np.float64)
        if rescaled:  # in float32, as theirs, so that it is the same number
            told = (told.astype(np.float32) * np.float32(1000.0 / num_trained)).astype(np.float64)
        return cls(NoiseSchedule.from_betas(betas), mean, variance, told, rescaled)

    def ddpm(self, clip: bool, of_x0: bool) -> StepTable:
        """Ancestral sampling; `of_x0`: for an output that has been made x_0. See `solvers.ddpm`.

        Raises `ConfigError` for that of a model that predicts x_{t-1}, whose mean is its output whatever x_0 is.
        """
        if self.mean == "previous_x" and of_x0:
            raise ConfigError("denoised_fn changes no sample where the model predicts x_{t-1}; leave it out")
        table = solvers.ddpm(
            self.schedule, variance=self.variance, prediction_type=self._kind(of_x0), clip=1.0 if clip else None
        )
        rows = self._told(table, of_x0)
        if self.mean == "previous_x":
            rows[:, [X_X, X_X0, X_M]] = 0.0, 0.0, 1.0
        return replace(table, rows=rows)

    def ddim(self, clip: bool, of_x0: bool, eta: float) -> StepTable:
        """DDIM, its noise derived from the clipped x_0; see `ddpm` and `solvers.ddim`."""
        table = solvers.ddim(
            self.schedule,
            eta=eta,
            use_clipped_model_output=True,
            prediction_type=self._kind(of_x0),
            clip=1.0 if clip else None,
        )
        return replace(table, rows=self._told(table, of_x0))

    @cached_property
    def predicted(self) -> Floats:
        """(x0_x, x0_m) of each row: x_0 from x and the model's output, [rows, 2]."""
        if self.mean == "previous_x":  # solved for x_0 from the posterior's mean (2006.11239, eq. 7)
            posterior = self._posterior
            return np.stack([-posterior[:, X_X], np.ones(len(posterior))], axis=1) / posterior[:, [X_X0]]
        return solvers.ddpm(self.schedule, prediction_type=self._kind(False)).rows[:, [X0_X, X0_M]]

    @cached_property
    def log_variances(self) -> Floats:
        """Logs of the posterior's variance and of beta in each row, [rows, 2]; the last posterior is the one before."""
        small = 2 * np.log(self._posterior[:-1, X_Z]) if len(self.told) > 1 else np.log(self.schedule.betas)
        return np.stack([np.append(small, small[-1:])[: len(self.told)], np.log(self.schedule.betas[::-1])], axis=1)

    def fixed_variance(self, row: int) -> float:
        """That of p(x_{t-1} | x_t): in the last row 0 where it is the posterior's, else the posterior's before."""
        small, large = self.log_variances[row].tolist()
        last = row == len(self.told) - 1
        if self.variance == "fixed_large":
            return math.exp(small if last else large)
        return 0.0 if last else math.exp(small)

    def score_shift(self, table: StepTable, row: int) -> tuple[float, float]:
        """By how much of the gradient x_0 and the new state move where eps moves by -sqrt(1 - alpha_bar) of it.

        x_0 moves by (1 - alpha_bar) / sqrt(alpha_bar); and DDIM's new state, whose eps belongs to x and x_0, by x_x0
        times as much.
        """
        t = len(self.told) - 1 - row
        of_x0 = math.exp(-float(self.schedule.log_snr[t])) * float(self.schedule.sqrt_alphas_cumprod[t])
        return of_x0, of_x0 * float(table.rows[row, X_X0])

    @cached_property
    def _posterior(self) -> Floats:
        return solvers.ddpm(self.schedule).rows

    def _kind(self, of_x0: bool) -> str:
        return "epsilon" if self.mean == "epsilon" and not of_x0 else "sample"

    def _told(self, table: StepTable, of_x0: bool) -> Floats:
        rows = table.rows.copy()
        rows[:, T] = self.told
        if self.mean == "previous_x" and not of_x0:
            rows[:, [X0_X, X0_M]] = self.predicted
        return rows


def visited_steps(num_steps: int, use: str | Iterable[int] | None) -> NDArray[np.int64]:
    """The time steps that `GaussianDiffusion`'s use_timesteps name, int64, rising.

    Raises `ConfigError` for what isn't of 0 ... num_steps - 1.
    """
    if use is None or (isinstance(use, str) and not use):  # "": their scripts' default
        return np.arange(num_steps)
    if isinstance(use, str):
        return timesteps(num_steps, None, use)[::-1]
    visited = sorted(set(use), key=str) if isinstance(use, Iterable) else []
    good = all(isinstance(t, int | np.integer) and not isinstance(t, bool) and 0 <= t < num_steps for t in visited)
    if not visited or not good:
        raise ConfigError(
            f"use_timesteps are not all time steps; allowed: whole numbers in 0 ... {num_steps - 1}, or "
            "words as '250', '10,10,20', 'ddim50'"
        )
    return np.sort(np.array(visited, dtype=np.int64))


def word(name: str, given: Any, allowed: tuple[str, ...]) -> str:
    """A type as a word: that of an enum by its name."""
    made = str(getattr(given, "name", given)).lower()
    if made not in allowed:
        raise ConfigError(f"model_{name}_type is {given!r}; allowed: {', '.join(map(repr, allowed))}, or their enum's")
    return made

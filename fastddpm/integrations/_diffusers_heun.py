"""diffusers' Heun scheduler with a fused step. `fastddpm.integrations.diffusers` is where it is imported from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler, HeunDiscreteSchedulerOutput
from torch import Tensor

from . import _diffusers_rows as rows
from ._diffusers_fused import as_stock
from ._diffusers_plan import PREDICTIONS, Plan
from ._diffusers_sigmas import FusedSigmas


class FusedHeunDiscreteScheduler(FusedSigmas, HeunDiscreteScheduler):
    """diffusers' `HeunDiscreteScheduler` with a fused step (EDM, arXiv 2206.00364, algorithm 2); the same config.

    A step to a lower sigma is two calls: Euler's step, and its correction. What is between them is kept as diffusers
    keeps it, in `prev_derivative`, `dt` and `sample`; but the kernel leaves x0, not the derivative.
    """

    _hooks = ("state_in_first_order",)
    _first: tuple[int, Tensor] | None = None  # where the kernel did Euler's step, and its x0
    prev_derivative: Any
    dt: Any
    sample: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        num_train_timesteps: int | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None, num_train_timesteps, timesteps)
        self._first = None
        self._started(device)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The previous sample, as diffusers' step, with the same arguments and results, raising what it raises."""
        m, x, at, plan = model_output, sample, self._at(timestep), self._planned()
        row = plan.row(at) if isinstance(m, Tensor) and m.shape == x.shape else None
        if row is not None and self._kernel_takes_half(plan, at, m, x):
            prev, x0 = self._half_by_kernel(plan, at, m, x)
        elif row is not None and self._eager(m, x):
            prev, x0 = self._half(row, m, x)
        else:
            self._slope()
            return super().step(m, timestep, x, return_dict)
        self._step_index = at + 1
        return HeunDiscreteSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _half(self, row: Sequence[Any], m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x', x0) of one call, by diffusers' operations in their order."""
        x0, bound = self._x0(row, m, x), self.config.clip_sample_range
        if self.config.clip_sample:
            x0.clamp_(-bound, bound)
        slope = (x - x0).div_(row[1])
        if self.dt is None:
            self.prev_derivative, self.dt, self.sample = slope, row[2], x
            return (slope * row[2]).add_(x), x0
        prev = slope.add_(self.prev_derivative).div_(2).mul_(self.dt).add_(self.sample)
        self.prev_derivative = self.dt = self.sample = None
        return prev, x0

    def _half_by_kernel(self, plan: Plan, at: int, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x', x0) of one call."""
        kind = self.config.prediction_type
        if self._first is None:
            prev, x0 = self._step_by_kernel(plan, at, m, x)
            self._first, self.dt, self.sample = (at, x0), plan.row(at)[2], x
        else:
            prev, x0 = self._step_by_kernel(plan, len(plan.rows) + at, m, x, [self.sample, self._first[1]])
            self._first = self.dt = self.sample = None
        return as_stock(prev, x0, m, x, kind)

    def _kernel_takes_half(self, plan: Plan, at: int, m: Tensor, x: Tensor) -> bool:
        if self.dt is None:
            self._first = None
            return self._kernel_takes(plan, at, m, x)
        follows = self._first is not None and self._first[0] == at - 1 and self.sample.shape == x.shape
        return follows and self._kernel_takes(plan, len(plan.rows) + at, m, x)

    def _eager(self, m: Tensor, x: Tensor) -> bool:
        kept = () if self.dt is None else (self._slope(), self.sample)
        return super()._eager(m, x) and all(v.dtype == m.dtype and v.shape == m.shape for v in (x, *kept))

    def _slope(self) -> Any:
        """`prev_derivative`, made now where the kernel left x0."""
        if self._first is not None and self.dt is not None:
            at, x0 = self._first
            self.prev_derivative = (self.sample - x0) / self._planned().rows[at][1]
            self._first = None
        return self.prev_derivative

    def _made(self, host: Tensor, *given: Any) -> Plan:
        sigmas, kind = self.sigmas.cpu(), self.config.prediction_type
        if kind not in PREDICTIONS or self._replaced():
            return self._plan_of(host)
        columns = rows.sigma_columns(kind, sigmas[:-1], sigmas[:-1], sigmas[1:])
        return self._plan_of(host, columns, table=partial(self._table, columns))

    def _table(self, columns: Sequence[Tensor]) -> Any:
        """The kernel's table: rows of Euler's steps, and behind them, of their corrections.

        With x the state before the step, h1, and h2 its x0, the correction of x' is
        h1 + dt / 2 ((h1 - h2) / sigma + (x' - x0) / sigma').
        """
        _, sigma, dt, *v = (c.double().numpy() for c in columns)
        x0_x, x0_m = rows.predicted_ve(self.config.prediction_type, sigma, *v)
        before, now = 0.5 * np.roll(dt / sigma, 1), 0.5 * np.roll(dt, 1) / sigma
        none = np.zeros_like(dt)
        return rows.table(
            2 * len(dt),
            x0_x=np.tile(x0_x, 2),
            x0_m=np.tile(x0_m, 2),
            x_x=np.append((sigma + dt) / sigma, now),
            x_x0=np.append(-dt / sigma, -now),
            x_h1=np.append(none, 1 + before),
            x_h2=np.append(none, -before),
            clip=self.config.clip_sample_range if self.config.clip_sample else np.inf,
        )

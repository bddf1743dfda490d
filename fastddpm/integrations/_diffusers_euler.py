"""diffusers' Euler schedulers with a fused step. `fastddpm.integrations.diffusers` is where they are imported from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import (
    EulerAncestralDiscreteScheduler,
    EulerAncestralDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler, EulerDiscreteSchedulerOutput
from diffusers.utils import logging
from fastddpm_kernels import columns as col
from torch import Tensor

from . import _diffusers_rows as rows
from ._diffusers_plan import PREDICTIONS, Plan
from ._diffusers_sigmas import FusedSigmas

NO_CHURN = (0.0, 0.0, math.inf)
logger = logging.get_logger(__name__)


class _FusedEuler(FusedSigmas):
    """What both have in common. The row's columns are those of `rows.sigma_columns`."""

    def _columns(self, sigmas: Tensor, *given: Any) -> list[Tensor]:
        """The columns of the rows, [n] each, from levels [n + 1] on the CPU; empty where diffusers is to be asked."""
        raise NotImplementedError

    def _table(self, columns: Sequence[Tensor]) -> Any:
        """The columns as rows of the kernel's table."""
        _, divisor, dt, *more = (c.double().numpy() for c in columns)
        x0_x, x0_m = rows.predicted_ve(self.config.prediction_type, divisor, *more[-2:])
        return rows.table(len(dt), x0_x=x0_x, x0_m=x0_m, x_x=(divisor + dt) / divisor, x_x0=-dt / divisor)

    def _made(self, host: Tensor, *given: Any) -> Plan:
        columns = self._columns(self.sigmas.cpu(), *given)
        return self._plan_of(host, columns, table=partial(self._table, columns) if columns else None)

    def _row(self, m: Tensor, timestep: Any, x: Tensor, *given: Any) -> tuple[Any, int, Any]:
        """(plan, index, row) of this step; the row is None where diffusers is to be asked, which refuses integers."""
        whole = not timestep.is_floating_point() if isinstance(timestep, Tensor) else isinstance(timestep, int)
        if whole or m.shape != x.shape:
            return None, 0, None
        plan, at = self._planned(*given), self._at(timestep)
        row = plan.row(at)
        if row is not None and not self.is_scale_input_called:
            logger.warning("scale_model_input wasn't called: this scheduler's model takes scaled inputs")
        return plan, at, row

    def _euler(self, row: Sequence[Any], m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x + dt (x - x0) / divisor, x0), by diffusers' operations."""
        x0 = self._x0(row, m, x)
        return (x - x0).div_(row[1]).mul_(row[2]).add_(x), x0

    def _as_stock(self, prev: Tensor, x0: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel's results in the dtypes that diffusers' arithmetic gives them."""
        model_gives_x0 = self.config.prediction_type in ("sample", "original_sample")
        return prev.to(m.dtype), x0.to(m.dtype) if model_gives_x0 else x0


class FusedEulerDiscreteScheduler(_FusedEuler, EulerDiscreteScheduler):
    """diffusers' `EulerDiscreteScheduler` with a fused step (EDM, arXiv 2206.00364, algorithm 2); the same config."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None, timesteps, sigmas)
        self._started(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The previous sample, as diffusers' step, with the same arguments and results.

        Raises `InputError` for a generator where `use_counter_noise` is on; else what diffusers raises.
        """
        self._checked_generator(generator)
        m, x = model_output, sample
        plan, at, row = self._row(m, timestep, x, s_churn, s_tmin, s_tmax)
        by_kernel = row is not None and self._kernel_takes(plan, at, m, x)
        if row is None or not (by_kernel or self._eager(m, x)):
            others = (s_churn, s_tmin, s_tmax, s_noise, generator, return_dict)
            step = partial(self._stock, super().step) if s_churn > 0 else super().step
            return step(m, timestep, x, *others)
        x = x.to(torch.float32)
        if s_churn > 0 and plan.rows[at][4]:  # there is noise
            x = x + self._drawn(m, m.dtype, at, generator).mul_(s_noise).mul_(row[3])
        if by_kernel:
            prev, x0 = self._as_stock(*self._step_by_kernel(plan, at, m, x), m)
        else:
            prev, x0 = self._euler(row, m, x)
        self._step_index = at + 1
        return EulerDiscreteSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _made(self, host: Tensor, *given: Any) -> Plan:
        plan = super()._made(host, *(given or NO_CHURN))
        plan.given = given or NO_CHURN
        return plan

    def _columns(self, sigmas: Tensor, *given: Any) -> list[Tensor]:
        fits = self.config.prediction_type in (*PREDICTIONS, "original_sample")
        return rows.euler_columns(self.config.prediction_type, sigmas, *given) if fits else []


class FusedEulerAncestralDiscreteScheduler(_FusedEuler, EulerAncestralDiscreteScheduler):
    """diffusers' `EulerAncestralDiscreteScheduler` with a fused step (k-diffusion's sampler); the same config."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None)
        self._started(device)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, ...]:
        """The previous sample, as diffusers' step, with the same arguments and results.

        Raises `InputError` for a generator where `use_counter_noise` is on; else what diffusers raises.
        """
        self._checked_generator(generator)
        m, x = model_output, sample
        plan, at, row = self._row(m, timestep, x)
        if row is not None and self._kernel_takes(plan, at, m, x):
            z = self._torchs(m, m.dtype, generator)
            prev, x0 = self._as_stock(*self._step_by_kernel(plan, at, m, x, z=z), m)
        elif row is not None and self._eager(m, x):
            prev, x0 = self._euler(row, m, x.to(torch.float32))
            prev.add_(self._drawn(m, m.dtype, at, generator).mul_(row[3]))
        else:
            return self._stock(super().step, m, timestep, x, generator, return_dict)
        self._step_index = at + 1
        out = EulerAncestralDiscreteSchedulerOutput
        return out(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _columns(self, sigmas: Tensor, *given: Any) -> list[Tensor]:
        kind = self.config.prediction_type
        return rows.ancestral_columns(kind, sigmas) if kind in ("epsilon", "v_prediction") else []

    def _table(self, columns: Sequence[Tensor]) -> Any:
        table = super()._table(columns)
        table[:-1, col.X_Z] = columns[3].numpy()
        return table

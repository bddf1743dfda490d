"""diffusers' multistep DPM-Solver with a fused step. `fastddpm.integrations.diffusers` is where it is imported from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from fastddpm_kernels import columns as col
from numpy.typing import NDArray
from torch import Tensor

from . import _diffusers_rows as rows
from ._diffusers_fused import Counted
from ._diffusers_plan import LEARNED, PREDICTIONS, Plan


class FusedDPMSolverMultistepScheduler(Counted, DPMSolverMultistepScheduler):
    """diffusers' `DPMSolverMultistepScheduler` with a fused step (arXiv 2211.01095, algorithm 2); the same config."""

    _hooks = (
        "convert_model_output",
        "dpm_solver_first_order_update",
        "multistep_dpm_solver_second_order_update",
        "multistep_dpm_solver_third_order_update",
    )
    model_outputs: Any  # these are of diffusers' class
    _threshold_sample: Any

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None, mu, timesteps)
        self._started(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """The previous sample, as diffusers' step, with the same arguments and results.

        Raises `InputError` for a generator where `use_counter_noise` is on; else what diffusers raises.
        """
        self._checked_generator(generator)
        m, x = model_output, sample
        if self.num_inference_steps is None:
            return super().step(m, timestep, x, generator, variance_noise, return_dict)  # raises
        at = self._at(timestep)
        plan, order = self._plan_at(at)
        row = None if plan is None else plan.row(at)
        stochastic = self.config.algorithm_type.startswith("sde")
        stock = partial(self._stock, super().step) if stochastic else super().step
        if plan is None or row is None or m.shape != x.shape:
            return stock(m, timestep, x, generator, variance_noise, return_dict)
        past = self.model_outputs[len(self.model_outputs) - order + 1 :][::-1]  # as it is before this step
        if (variance_noise is None or not stochastic) and self._kernel_takes(plan, at, m, x):
            z = self._torchs(m, torch.float32, generator) if stochastic else None
            prev, converted = self._step_by_kernel(plan, at, m, x, past, z)
            prev = prev.to(
                m.dtype if self.config.prediction_type == "sample" else torch.promote_types(m.dtype, x.dtype)
            )
        elif all(v.dtype == torch.float32 for v in (m, x, *past)):
            noise = variance_noise if variance_noise is None else variance_noise.to(m.device, torch.float32)
            if stochastic and noise is None:
                noise = self._drawn(m, torch.float32, at, generator)
            converted = self._converted(row, m, x)
            prev = _combined(row, x, converted, past, noise if stochastic else None)
        else:
            return stock(m, timestep, x, generator, variance_noise, return_dict)
        self.model_outputs = [*self.model_outputs[1:], converted]
        if self.lower_order_nums < self.config.solver_order:
            self.lower_order_nums += 1
        self._step_index = at + 1
        return SchedulerOutput(prev_sample=prev) if return_dict else (prev,)

    def _plan_at(self, at: int) -> tuple[Plan | None, int]:
        """The plan of a step, and its order; None where diffusers is asked."""
        plans, order = self._planned().orders, self._order(at)
        return plans[order - 1] if 0 < order <= len(plans) else None, order

    def _order(self, at: int) -> int:
        """The order of a step: it rises at the start and falls at the end."""
        config, n = self.config, len(self.timesteps)
        few = config.lower_order_final and n < 15
        order: int = min(config.solver_order, self.lower_order_nums + 1)
        if at == n - 1 and (config.euler_at_final or few or config.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if at == n - 2 and few else order

    def trajectory(self) -> NDArray[np.float64] | None:
        """The steps from the first to the last as a `StepTable`'s rows, [n, columns]; None where diffusers is asked.

        The levels k_x, k_z are 0, and noise is in x_z alone.
        """
        first, made = self._planned(), []
        if not first.has_table:
            return None
        for at in range(len(first.host)):
            self.lower_order_nums = min(at, self.config.solver_order)
            made.append(first.orders[self._order(at) - 1].table[at])
        table = np.stack(made)
        table[:, col.T] = first.host
        return table

    def _converted(self, row: Sequence[float], m: Tensor, x: Tensor) -> Tensor:
        """What the solver extrapolates: x0 for DPM-Solver++, else the noise; a fresh tensor."""
        config, alpha, sigma = self.config, row[0], row[1]
        if config.algorithm_type.endswith("++"):
            if config.prediction_type == "epsilon":
                x0 = (x - m * sigma).div_(alpha)
            else:
                x0 = x * alpha - m * sigma if config.prediction_type == "v_prediction" else m.clone()
            return self._threshold_sample(x0) if config.thresholding else x0
        if config.prediction_type == "v_prediction":
            return m * alpha + x * sigma
        return (x - m * alpha).div_(sigma) if config.prediction_type == "sample" else m.clone()

    def _fits(self) -> bool:
        """Whether there are rows for this config; diffusers does the others."""
        config = self.config
        noise = not config.algorithm_type.endswith("++")
        return (
            not self._replaced()
            and config.prediction_type in PREDICTIONS
            and not config.use_flow_sigmas
            and config.variance_type not in LEARNED
            and config.solver_order in (1, 2, 3)
            and config.solver_type in ("midpoint", "heun")
            and not (noise and config.thresholding)
            and not (config.algorithm_type == "sde-dpmsolver" and config.solver_order == 3)
        )

    def _made(self, host: Tensor, *given: Any) -> Plan:
        config, plans = self.config, []
        if not self._fits() or len(self.sigmas) != len(host) + 1:
            return self._plan_of(host)
        alpha, sigma = self._sigma_to_alpha_sigma_t(self.sigmas.cpu())
        for order in range(1, config.solver_order + 1):
            steps, back = rows.dpm_columns(alpha, sigma, order, config.algorithm_type, config.solver_type == "midpoint")
            columns = [alpha[:-1], sigma[:-1], *steps, *back]
            table = None if config.thresholding else partial(self._table, order, columns)
            plans.append(self._plan_of(host, columns, table=table))
        plans[0].orders = tuple(plans)
        return plans[0]

    def _table(self, order: int, columns: Sequence[Tensor]) -> Any:
        """The kernel's table, whose "x0" is what the solver extrapolates."""
        a, b, x, d0, d1, d2, z, i0, i1, w, u = (c.double().numpy() for c in columns)
        of = rows.predicted if self.config.algorithm_type.endswith("++") else rows.predicted_noise
        with np.errstate(divide="ignore", invalid="ignore"):
            x0_x, x0_m = of(self.config.prediction_type, a, b)
            first, other = d1 * (1 + w) + d2 * u, d1 * w + d2 * u  # of D1_0 and of -D1_1
            past = [first * i0, -first * i0 - other * i1, other * i1]
        given = dict(x0_x=x0_x, x0_m=x0_m, x_x=x, x_x0=d0 + past[0], x_z=z)
        return rows.table(len(a), **given, **{f"x_h{k}": past[k] for k in range(1, order)})


def _combined(row: Sequence[float], x: Tensor, m0: Tensor, past: Sequence[Tensor], noise: Tensor | None) -> Tensor:
    """x' from this step's and the past predictions, by diffusers' operations in their order."""
    _, _, c, d0, d1, d2, z, i0, i1, w, u = row
    made = x * c + m0 * d0
    if len(past) == 1:
        made.add_((m0 - past[0]).mul_(i0).mul_(d1))
    elif len(past) == 2:
        last = (m0 - past[0]).mul_(i0)
        difference = last - (past[0] - past[1]).mul_(i1)
        made.add_((difference * w).add_(last).mul_(d1)).add_((difference * u).mul_(d2))
    return made if noise is None else made.add_(noise * z)

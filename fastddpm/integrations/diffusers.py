"""diffusers' schedulers with a fused step: ``pipe.scheduler = FusedDDIMScheduler.from_config(pipe.scheduler.config)``.

Each is diffusers' own class (config, time steps, `add_noise`, saving and loading are its code) with another `step`. The
coefficients are computed once, by diffusers' float32 arithmetic, when the time steps are set; on CUDA one kernel
applies a row of them, elsewhere a few operations in place. A step doesn't wait for the device where it is given an item
of `scheduler.timesteps`, or an int. Its noise is drawn as diffusers draws it. On the CPU, in float32 and float64, all
results are diffusers' to the last bit; on CUDA they agree to rounding. What has no row here (learned variances, half
precision on the CPU, a mix of dtypes) is done by diffusers' own `step`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler, DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from ..errors import InputError
from . import _diffusers_rows as rows
from ._diffusers_dpm import FusedDPMSolverMultistepScheduler
from ._diffusers_euler import FusedEulerAncestralDiscreteScheduler, FusedEulerDiscreteScheduler
from ._diffusers_fused import as_stock
from ._diffusers_heun import FusedHeunDiscreteScheduler
from ._diffusers_lcm import FusedLCMScheduler
from ._diffusers_plan import LEARNED, PREDICTIONS, Plan
from ._diffusers_unipc import FusedUniPCMultistepScheduler
from ._diffusers_vp import FusedVP

__all__ = [
    "FusedDDIMScheduler",
    "FusedDDPMScheduler",
    "FusedDPMSolverMultistepScheduler",
    "FusedEulerAncestralDiscreteScheduler",
    "FusedEulerDiscreteScheduler",
    "FusedHeunDiscreteScheduler",
    "FusedLCMScheduler",
    "FusedUniPCMultistepScheduler",
    "SchedulerMixin",  # a pipeline's folder is loaded only through a module that has this name
]


class _ByTime(FusedVP):
    """DDPM and DDIM, which know a step by its time step alone."""

    def _found(self, plan: Plan, timestep: Any) -> tuple[int, Any, Any]:
        """(index, time step, row): the row is None where diffusers is to be asked.

        In compiled code nobody knows a tensor's value: there the index is 0, the time step the tensor itself, and the
        row made of tensors.
        """
        if torch.compiler.is_compiling() and isinstance(timestep, Tensor):
            if self._seeds is not None:
                raise InputError("counter-based noise in compiled code needs time steps that are ints, not tensors")
            return 0, timestep, plan.row_of(timestep) if all(plan.rows) else None
        at = plan.locate(timestep)
        return (0, timestep, None) if at is None else (at, plan.host[at], plan.row(at))


class FusedDDPMScheduler(_ByTime, DDPMScheduler):
    """diffusers' `DDPMScheduler` with a fused step (Ho et al. 2020, algorithm 2); the same arguments and config."""

    _hooks = ("_get_variance", "previous_timestep")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: list[int] | None = None,
    ) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None, timesteps)
        self._started(device)

    def previous_timestep(self, timestep: Any) -> Any:
        """The time step behind this one (-1 behind the last), as diffusers has it; an int for an int."""
        if not isinstance(timestep, int) or not (self.custom_timesteps or self.num_inference_steps):
            return super().previous_timestep(timestep)
        plan = self._planned()
        at = plan.locate(timestep)
        return super().previous_timestep(timestep) if at is None else (*plan.host, -1)[at + 1]

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, ...]:
        """x_{t-1} from x_t and the model's output, as diffusers' step, with the same arguments and results.

        Raises `InputError` for a generator where `use_counter_noise` is on; else what diffusers raises.
        """
        self._checked_generator(generator)
        plan, m, x = self._planned(), model_output, sample
        at, t, row = self._found(plan, timestep)
        if row is None or m.shape != x.shape:
            return self._stock(super().step, m, t, x, generator, return_dict)
        if not isinstance(t, Tensor) and self._kernel_takes(plan, at, m, x):
            z = self._torchs(m, m.dtype, generator) if t > 0 else None
            prev, x0 = as_stock(*self._step_by_kernel(plan, at, m, x, z=z), m, x, self.config.prediction_type)
        elif self._eager(m, x):
            x0 = self._x0(row, m, x)
            prev = (x0 * row[2]).add_(x * row[3])
            if isinstance(t, Tensor) or t > 0:  # compiled code doesn't know; there sigma is 0
                prev.add_(self._drawn(m, m.dtype, at, generator).mul_(row[4]))
        else:
            return self._stock(super().step, m, t, x, generator, return_dict)
        return DDPMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _seen(self) -> tuple[Any, ...]:
        return *super()._seen(), self.variance_type, self.custom_timesteps

    def _made(self, host: Tensor, *given: Any) -> Plan:
        config = self.config
        follows = self.custom_timesteps or self.num_inference_steps
        prev = torch.cat([host[1:], host.new_tensor([-1])]) if follows else host - 1
        at = rows.levels(self.alphas_cumprod.cpu(), host, prev, self.one.cpu())
        columns = rows.ddpm_columns(at, config.variance_type, self.variance_type, host <= 0)
        learned = {self.variance_type, config.variance_type} & {*LEARNED}
        fits = not learned and config.prediction_type in PREDICTIONS and not self._replaced()
        plan = self._plan_with_table(host, columns, [fits and there for there in at.exists])
        plan.index_by_time(columns)
        return plan

    def _table(self, columns: Sequence[Tensor]) -> Any:
        a, b, c0, c1, sigma = (c.double().numpy() for c in columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            x0_x, x0_m = rows.predicted(self.config.prediction_type, a, b)
        given = dict(x0_x=x0_x, x0_m=x0_m, x_x=c1, x_x0=c0, x_z=sigma)
        return rows.table(len(a), **given, **self._limits())


class FusedDDIMScheduler(_ByTime, DDIMScheduler):
    """diffusers' `DDIMScheduler` with a fused step (Song et al. 2021, eq. 12); the same arguments and config."""

    _hooks = ("_get_variance",)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None)
        self._started(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """The previous sample, as diffusers' step, with the same arguments and results.

        Raises `InputError` for a generator where `use_counter_noise` is on; else what diffusers raises.
        """
        self._checked_generator(generator)
        m, x, others = model_output, sample, (eta, use_clipped_model_output, generator, variance_noise, return_dict)
        if self.num_inference_steps is None or (eta > 0 and None not in (generator, variance_noise)):
            return super().step(m, timestep, x, *others)  # raises
        plan = self._planned(eta)
        at, t, row = self._found(plan, timestep)
        stock = partial(self._stock, super().step) if eta > 0 else super().step
        if row is None or m.shape != x.shape:
            return stock(m, t, x, *others)
        clipped, given = use_clipped_model_output, variance_noise is not None
        if not (clipped or given or isinstance(t, Tensor)) and self._kernel_takes(plan, at, m, x):
            z = self._torchs(m, m.dtype, generator) if eta > 0 else None
            prev, x0 = as_stock(*self._step_by_kernel(plan, at, m, x, z=z), m, x, self.config.prediction_type)
        elif self._eager(m, x):
            x0 = self._x0(row, m, x)
            prev = (x0 * row[2]).add_(self._noise_term(row, m, x, x0 if clipped else None))
            if eta > 0:
                noise = variance_noise if given else self._drawn(m, m.dtype, at, generator)
                prev = prev + noise * row[4]
        else:
            return stock(m, t, x, *others)
        return DDIMSchedulerOutput(prev_sample=prev, pred_original_sample=x0) if return_dict else (prev, x0)

    def _noise_term(self, row: Sequence[Any], m: Tensor, x: Tensor, clipped: Tensor | None) -> Tensor:
        """direction * eps; with eps from the limited x0 where that is given."""
        a, b, _, direction, _ = row
        kind = self.config.prediction_type
        if clipped is not None or kind == "sample":
            return (x - (m if clipped is None else clipped) * a).div_(b).mul_(direction)
        return m * direction if kind == "epsilon" else (m * a + x * b).mul_(direction)

    def _seen(self) -> tuple[Any, ...]:
        return *super()._seen(), self.final_alpha_cumprod

    def _made(self, host: Tensor, *given: Any) -> Plan:
        config, count, (eta,) = self.config, len(self.alphas_cumprod), given or (0.0,)
        back = config.num_train_timesteps // (self.num_inference_steps or config.num_train_timesteps)
        every = torch.arange(count, device="cpu")  # a step may begin at any
        at = rows.levels(self.alphas_cumprod.cpu(), every, every - back, self.final_alpha_cumprod)
        columns = rows.ddim_columns(at, eta)
        fits = config.prediction_type in PREDICTIONS and not self._replaced()
        exists = [fits and 0 <= t < count and t - back < count for t in host.tolist()]
        places = host.clamp(0, count - 1)
        plan = self._plan_with_table(host, [c[places] for c in columns], exists)
        plan.given = (eta,)
        plan.index_by_time(columns, every)
        return plan

    def _table(self, columns: Sequence[Tensor]) -> Any:
        kind, (a, b, a_prev, direction, sigma) = self.config.prediction_type, (c.double().numpy() for c in columns)
        with np.errstate(divide="ignore", invalid="ignore"):
            (x0_x, x0_m), (eps_x, eps_m) = rows.predicted(kind, a, b), rows.predicted_noise(kind, a, b)
            x_x, x_m = direction * eps_x, direction * eps_m
        given = dict(x0_x=x0_x, x0_m=x0_m, x_x=x_x, x_m=x_m, x_x0=a_prev, x_z=sigma)
        return rows.table(len(a), **given, **self._limits())


for _name in __all__[:-1]:
    globals()[_name].__module__ = __name__  # where a saved pipeline looks for it

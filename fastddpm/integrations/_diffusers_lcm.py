"""diffusers' LCM scheduler with a fused step. `fastddpm.integrations.diffusers` is where it is imported from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler, LCMSchedulerOutput
from torch import Tensor

from . import _diffusers_rows as rows
from ._diffusers_fused import Counted
from ._diffusers_plan import PREDICTIONS, Plan
from ._diffusers_vp import FusedVP


class FusedLCMScheduler(FusedVP, Counted, LCMScheduler):
    """diffusers' `LCMScheduler` with a fused step (arXiv 2310.04378, algorithm 3); the same arguments and config."""

    _compatibles: ClassVar[list[str]] = ["LCMScheduler"]  # diffusers lists only the class itself, by its name
    _hooks = ("get_scalings_for_boundary_condition_discrete",)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        strength: float = 1.0,
    ) -> None:
        """Set the time steps, as diffusers does, and compute their coefficients."""
        super().set_timesteps(num_inference_steps, None, original_inference_steps, timesteps, strength)
        self._started(device)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, ...]:
        """The previous sample and the denoised one, as diffusers' step, with the same arguments and results.

        Raises `InputError` for a generator where `use_counter_noise` is on; else what diffusers raises.
        """
        self._checked_generator(generator)
        if self.num_inference_steps is None:
            return super().step(model_output, timestep, sample, generator, return_dict)  # raises
        m, x, at, plan = model_output, sample, self._at(timestep), self._planned()
        if not self._has_row(plan, at, timestep) or m.shape != x.shape:
            return self._stock(super().step, m, timestep, x, generator, return_dict)
        noisy = at != self.num_inference_steps - 1
        if self._kernel_takes(plan, at, m, x):
            prev, denoised = self._by_kernel(plan, at, m, x, noisy, generator)
        elif self._eager(m, x):
            row = plan.row(at)
            _, _, level, sigma, *scales = row
            skip, out = scales[2:] if isinstance(timestep, int) else scales[:2]
            denoised = self._x0(row, m, x).mul_(out).add_(x * skip)
            prev = denoised
            if noisy:
                prev = (denoised * level).add_(self._drawn(m, m.dtype, at, generator).mul_(sigma))
        else:
            return self._stock(super().step, m, timestep, x, generator, return_dict)
        self._step_index = at + 1
        return LCMSchedulerOutput(prev_sample=prev, denoised=denoised) if return_dict else (prev, denoised)

    def _by_kernel(
        self, plan: Plan, at: int, m: Tensor, x: Tensor, noisy: bool, generator: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(m.dtype, x.dtype)
        prev, denoised = self._step_by_kernel(plan, at, m, x, z=self._torchs(m, dtype, generator) if noisy else None)
        if self.config.clip_sample:  # else the kernel's "x0" is the denoised sample
            skip, out = plan.rows[at][4:6]
            denoised = denoised.mul_(out).add_(x, alpha=skip)
        return prev.to(dtype), denoised.to(dtype)

    def _has_row(self, plan: Plan, at: int, timestep: Any) -> bool:
        """Whether the row of this step is that of the time step. (Compiled code sees no tensor's value: yes.)"""
        if not 0 <= at < len(plan.rows) or plan.rows[at] is None:
            return False
        if not isinstance(timestep, Tensor):
            return isinstance(timestep, int) and timestep == plan.host[at]
        if timestep.ndim or timestep.dtype != self.timesteps.dtype:
            return False
        if torch.compiler.is_compiling():
            return True
        found = plan.locate(timestep)
        return found is not None and plan.host[found] == plan.host[at]

    def _seen(self) -> tuple[Any, ...]:
        return *super()._seen(), self.final_alpha_cumprod

    def _made(self, host: Tensor, *given: Any) -> Plan:
        if self.config.prediction_type not in PREDICTIONS or self._replaced():
            return self._plan_of(host)
        at = rows.levels(self.alphas_cumprod.cpu(), host, torch.cat([host[1:], host[-1:]]), self.final_alpha_cumprod)
        scalings = self.get_scalings_for_boundary_condition_discrete  # of a tensor in float32, of an int in double
        of_ints = torch.tensor([scalings(t) for t in host.tolist()], dtype=torch.float64, device="cpu")
        of_tensors = scalings(host)
        levels = [v.sqrt() for v in (at.now, 1 - at.now, at.prev, 1 - at.prev)]
        columns = [*levels, *of_tensors, *of_ints.view(-1, 2).unbind(1)]
        return self._plan_with_table(host, columns, at.exists)

    def _table(self, columns: Sequence[Tensor]) -> Any:
        """The kernel's table. Without clipping its "x0" is the denoised sample; so one launch gives both."""
        config = self.config
        a, b, level, sigma, skip, out, *_ = (c.double().numpy() for c in columns)
        last = np.arange(len(a)) == self.num_inference_steps - 1
        level, sigma = np.where(last, 1.0, level), np.where(last, 0.0, sigma)
        with np.errstate(divide="ignore", invalid="ignore"):
            x0_x, x0_m = rows.predicted(config.prediction_type, a, b)
        if config.clip_sample:
            given = dict(x0_x=x0_x, x0_m=x0_m, x_x=level * skip, x_x0=level * out)
        else:
            given = dict(x0_x=x0_x * out + skip, x0_m=x0_m * out, x_x0=level)
        return rows.table(len(a), **given, x_z=sigma, **self._limits())

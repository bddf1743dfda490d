"""diffusers' LCM scheduler with a fused step. `fastddpm.integrations.diffusers` is where it is imported from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler, LCMSchedulerOutput
from torch import Tensor

from . import _diffusers_rows as rows
from ._diffusers_plan import EXACT, PREDICTIONS, Fused, Plan


class FusedLCMScheduler(Fused, LCMScheduler):
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
        host = self.timesteps.tolist()
        self.timesteps = self.timesteps.to(device)
        self._plan = self._made(host)

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a time step, as diffusers has it; an `IndexError` where it isn't there."""
        known = schedule_timesteps is None or schedule_timesteps is self.timesteps
        plan = self._planned() if known and self.num_inference_steps is not None else None
        at = None if plan is None else plan.locate(timestep)
        if plan is None or at is None:
            return super().index_for_timestep(timestep, schedule_timesteps)
        return plan.positions[plan.host[at]][:2][-1]

    @torch.compiler.disable
    def _init_step_index(self, timestep: Any) -> None:
        """Where a trajectory starts. (Compiled code stops here, unless `set_begin_index` was called.)"""
        self._step_index = self.index_for_timestep(timestep)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """q(x_t | x_0), as diffusers has it."""
        return self._moving("add_noise", original_samples, noise, timesteps)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) sample, as diffusers has it."""
        return self._moving("get_velocity", sample, noise, timesteps)

    def _moving(self, name: str, *args: Tensor) -> Tensor:
        """Call diffusers' method, which moves `alphas_cumprod` to the samples' device: the plan stays."""
        before = self._seen()
        made: Tensor = getattr(super(), name)(*args)
        if self._plan is not None and self._plan.made_from(*before):
            self._plan.seen = self._seen()
        return made

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
        if self._step_index is None:
            if self._begin_index is None:
                self._init_step_index(timestep)
            else:
                self._step_index = self._begin_index
        plan, at, m, x = self._planned(), self._step_index, model_output, sample
        if not self._has_row(plan, at, timestep) or m.shape != x.shape:
            return self._stock(super().step, m, timestep, x, generator, return_dict)
        noisy = at != self.num_inference_steps - 1
        if self._kernel_takes(plan, at, m, x):
            prev, denoised = self._by_kernel(plan, at, m, x, noisy, generator)
        elif m.dtype == x.dtype and m.dtype in EXACT and m.device == x.device:
            _, _, level, sigma, *scales = plan.rows[at]
            skip, out = scales[2:] if isinstance(timestep, int) else scales[:2]
            denoised = self._x0(plan.rows[at], m, x).mul_(out).add_(x * skip)
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
        dtype, clipped = torch.promote_types(m.dtype, x.dtype), self.config.clip_sample
        past = [self._drawn(m, dtype, at, generator)] if noisy and self._seeds is None else []
        prev, denoised = self._step_by_kernel(plan, at, m, x, past, clipped)
        if clipped:  # else the kernel's "x0" is the denoised sample
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

    def _x0(self, row: Sequence[float], m: Tensor, x: Tensor) -> Tensor:
        """The predicted clean sample, limited, by diffusers' operations in their order; a fresh tensor."""
        config, (a, b, *_) = self.config, row
        if config.prediction_type == "epsilon":
            x0 = (x - m * b).div_(a)  # laid out as x, as there
        else:
            x0 = x * a - m * b if config.prediction_type == "v_prediction" else m.clone()
        if config.thresholding:
            return self._threshold_sample(x0)
        return x0.clamp_(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0

    def _planned(self) -> Plan:
        plan = self._plan
        if plan is None or not plan.made_from(*self._seen()):
            known = plan is not None and plan.knows(self.timesteps)
            plan = self._plan = self._made(plan.host if known and plan else self.timesteps.tolist())
        return plan

    def _seen(self) -> tuple[Any, ...]:
        config = self._internal_dict
        return config, self.timesteps, self.alphas_cumprod, self.final_alpha_cumprod, self.num_inference_steps

    def _made(self, host: list[int]) -> Plan:
        config = self.config
        if config.prediction_type not in PREDICTIONS or self._replaced():
            return Plan(self.timesteps, host, [], [], None, self._seen())
        at = rows.levels(self.alphas_cumprod.cpu(), host, [*host[1:], *host[-1:]], self.final_alpha_cumprod)
        scalings = self.get_scalings_for_boundary_condition_discrete  # of a tensor in float32, of an int in double
        of_ints = torch.tensor([scalings(t) for t in host], dtype=torch.float64, device="cpu")
        of_tensors = scalings(torch.tensor(host, device="cpu"))
        levels = [v.sqrt() for v in (at.now, 1 - at.now, at.prev, 1 - at.prev)]
        columns = [*levels, *of_tensors, *of_ints.view(-1, 2).unbind(1)]
        table = partial(self._table, columns) if any(at.exists) and not config.thresholding else None
        return Plan(self.timesteps, host, columns, at.exists, table, self._seen())

    def _table(self, columns: Sequence[Tensor]) -> Any:
        """The kernel's table. Without clipping its "x0" is the denoised sample; so one launch gives both."""
        config = self.config
        a, b, level, sigma, skip, out, *_ = (c.double().numpy() for c in columns)
        last = np.arange(len(a)) == self.num_inference_steps - 1
        level, sigma = np.where(last, 1.0, level), np.where(last, 0.0, sigma)
        with np.errstate(divide="ignore", invalid="ignore"):
            x0_x, x0_m = rows.predicted(config.prediction_type, a, b)
        given = dict(x0_x=x0_x, x0_m=x0_m, x_x=level * skip, x_x0=level * out, x_h1=sigma, x_z=sigma)
        if config.clip_sample:
            return rows.table(len(a), **given, clip=float(config.clip_sample_range))
        folded = dict(x0_x=x0_x * out + skip, x0_m=x0_m * out, x_x=np.zeros_like(a), x_x0=level)
        return rows.table(len(a), **(given | folded))

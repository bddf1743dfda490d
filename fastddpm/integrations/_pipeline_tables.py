"""What diffusers' schedulers do, as tables for `Sampler`: all steps from t to where the scheduler steps to.

Their oddities (``steps_offset``, DDIM with "linspace") are kept: the levels are those of the scheduler's own steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from diffusers import CMStochasticIterativeScheduler, DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from fastddpm_kernels import columns as col

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from ..solvers import StepTable, step_table
from ..solvers.ddim import ddim_table
from ..solvers.ddpm import posterior_table
from ._diffusers_dpm import FusedDPMSolverMultistepScheduler
from .loops import strides_between

KNOWN = (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, CMStochasticIterativeScheduler)
_STEP = (  # the methods that a step is made of
    "step",
    "previous_timestep",
    "_get_variance",
    "_threshold_sample",
    *FusedDPMSolverMultistepScheduler._hooks,
    "scale_model_input",
    "get_scalings_for_boundary_condition",
)
_VARIANCES = {  # diffusers' name -> ours; its "learned" takes the root of what may be negative, "fixed_large_log" does
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def is_known(scheduler: Any) -> bool:
    """Whether its step is that of a class in `KNOWN`, or of one of our schedulers made from these."""
    cls = type(scheduler)
    libraries = ("diffusers", "fastddpm")
    own = next((c for c in cls.__mro__ if c.__module__.partition(".")[0] in libraries), None)
    if own is None or not (own in KNOWN or (issubclass(own, KNOWN) and own.__module__.startswith("fastddpm."))):
        return False
    return all(name not in vars(scheduler) and getattr(cls, name, 0) is getattr(own, name, 0) for name in _STEP)


def table_of(scheduler: Any, eta: float = 0.0, use_clipped_model_output: bool = False) -> tuple[StepTable, list[bool]]:
    """What the scheduler's `step` does at each of its time steps, and before which of them it draws noise.

    Raises `ConfigError` for a config that has no table.
    """
    if isinstance(scheduler, CMStochasticIterativeScheduler):
        return _consistency(scheduler)
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        return _multistep(scheduler)
    config = scheduler.config
    schedule = NoiseSchedule.from_betas(scheduler.betas.cpu().double().numpy())
    if not np.allclose(scheduler.alphas_cumprod.cpu(), schedule.alphas_cumprod, rtol=2e-3, atol=1e-6):
        raise ConfigError("the scheduler's alphas_cumprod don't belong to its betas; make it anew from its config")
    t = scheduler.timesteps.cpu().numpy()
    common: dict[str, Any] = {
        "prediction_type": config.prediction_type,
        "clip": config.clip_sample_range if config.clip_sample else None,
    }
    if config.thresholding:  # there too it goes before the clip
        common |= {"clip": config.sample_max_value, "ratio": config.dynamic_thresholding_ratio}
    if isinstance(scheduler, DDIMScheduler):
        final = 0.0 if config.set_alpha_to_one else float(schedule.log_alphas_cumprod[0])
        if not np.isclose(float(scheduler.final_alpha_cumprod), np.exp(final), rtol=1e-5):
            raise ConfigError("the scheduler's final_alpha_cumprod isn't its config's; make it anew from its config")
        strides = strides_between(schedule, t, t - config.num_train_timesteps // len(t), final)
        table = ddim_table(strides, eta=eta, use_clipped_model_output=use_clipped_model_output, **common)
        return table, [eta > 0] * len(t)
    variance = _VARIANCES.get(config.variance_type)
    plain = {scheduler.variance_type, config.variance_type} <= {"fixed_small", "fixed_large"}
    if variance is None or not (plain or scheduler.variance_type == config.variance_type):
        raise ConfigError(
            f"the scheduler's variance_type is {scheduler.variance_type!r}, in its config {config.variance_type!r}; "
            f"allowed: the same in both, one of {', '.join(map(repr, _VARIANCES))}"
        )
    strides = strides_between(schedule, t, np.append(t[1:], -1))
    return posterior_table(strides, t > 0, variance=variance, **common), (t > 0).tolist()


def _multistep(scheduler: Any) -> tuple[StepTable, list[bool]]:
    """DPM-Solver from the first time step to the last."""
    config = scheduler.config
    twin = FusedDPMSolverMultistepScheduler.from_config(config)
    twin.timesteps, twin.sigmas = scheduler.timesteps, scheduler.sigmas
    rows = twin.trajectory()
    if rows is None:
        raise ConfigError(
            "this config of DPMSolverMultistepScheduler has no table (thresholding, flow sigmas, deis); without "
            "accelerate there is FusedDPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
        )
    alpha, sigma = (v.double().numpy() for v in twin._sigma_to_alpha_sigma_t(twin.sigmas.cpu()))
    rows[:, [col.K_X, col.K_Z]] = np.stack([alpha[1:], sigma[1:]], axis=1)
    of = "sample" if config.algorithm_type.endswith("++") else "epsilon"
    table = StepTable(rows, (float(alpha[0]), float(sigma[0])), history_of=of)  # type: ignore[arg-type]
    return table, [config.algorithm_type.startswith("sde")] * len(rows)


def _consistency(scheduler: Any) -> tuple[StepTable, list[bool]]:
    """Consistency sampling at the scheduler's own levels (see `solvers.consistency`)."""
    config, sigmas = scheduler.config, scheduler.sigmas.cpu().double().numpy()
    least, data, sigma = config.sigma_min, config.sigma_data, sigmas[:-1]
    after = sigmas[1:].clip(least, config.sigma_max)
    norm = np.hypot(sigma, data)
    table = step_table(
        scheduler.timesteps.cpu().numpy(),
        c_in=1 / norm,
        x0_x=data**2 / ((sigma - least) ** 2 + data**2),
        x0_m=(sigma - least) * data / norm,
        x_x0=1.0,
        x_z=config.s_noise * np.sqrt(np.maximum(after**2 - least**2, 0)) * (len(sigma) > 1),
        k_x=1.0,
        k_z=np.append(sigma[1:], 0.0),
        start=(1.0, float(sigma[0])),
        init_noise_sigma=float(scheduler.init_noise_sigma),
        clip=1.0 if config.clip_denoised else None,
    )
    return table, [len(sigma) > 1] * len(sigma)

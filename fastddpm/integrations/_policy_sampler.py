"""The sampling loop of a diffusion policy; `diffusion_policy` puts it in the place of theirs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from fastddpm_kernels.columns import K_X, K_Z
from numpy.typing import NDArray
from torch import Tensor

from ..buffers import initial_noise
from ..errors import ConfigError, InputError
from ..graphs import RecentlyUsed
from ..pretrained import SchedulerConfig
from ..sampler import Sampler
from ..seeds import sample_seeds
from ..solvers import StepTable

_SOLVERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}


class PolicySampler:
    """The sampling loop of a diffusion policy, to be called again and again.

    Args:
        model: any callable model(x, t, **given), as in `conditional_sample`. Of `engine.compile`'s, the
            observations' part is computed once a call, not once a step.
        scheduler: diffusers' DDPMScheduler or DDIMScheduler; or a `StepTable`, as ``solvers.dpm_solver(schedule, 8)``.
        num_inference_steps: how many steps; None: as many as the model was trained with. The scheduler's
            ``set_timesteps`` is called with it, as their loop does.
        eta, use_clipped_model_output: DDIMScheduler's arguments of `step`.

    Raises:
        ConfigError: for a scheduler of another kind, a setting that is not supported, or time steps with which
            diffusers leaves the papers' formulas (see `table_of`).
    """

    def __init__(
        self,
        model: Any,
        scheduler: Any,
        num_inference_steps: int | None = None,
        *,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> None:
        if isinstance(scheduler, StepTable):
            _check_table(scheduler, num_inference_steps, eta, use_clipped_model_output)
            self.table, self._draws = scheduler, scheduler["x_z"] != 0
        else:
            self.table, self._draws = table_of(
                scheduler, num_inference_steps, eta=eta, use_clipped_model_output=use_clipped_model_output
            )
        rows = self.table.rows.copy()
        rows[:, [K_X, K_Z]] = 1.0, 0.0  # what is known is known without noise
        self._steps = replace(self.table, rows=rows)
        self._sampler = Sampler(model, self._steps)
        self._observing: RecentlyUsed[tuple[Any, Sampler]] = RecentlyUsed()  # of models that know their observations
        self._lock = threading.Lock()  # held while one of those samples

    def sample(
        self,
        shape: Sequence[int],
        *,
        condition_data: Tensor | None = None,
        condition_mask: Tensor | None = None,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        seeds: int | Sequence[int] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Trajectories from pure noise; no gradients.

        Args:
            shape: (B, horizon, dim).
            condition_data, condition_mask: [B, horizon, dim], float and bool: the known part of the trajectories.
            local_cond, global_cond, cond: given to the model by these names, where not None: [B, horizon, n] and [B, n]
                of ConditionalUnet1D, [B, n_obs_steps, n] of TransformerForDiffusion.
            generator: torch's, for the noise, in the order of their loop; None: torch's global one.
            seeds: instead: one integer a trajectory, or one for all, as in `Sampler.sample`.
            noise: start from this, [B, horizon, dim], and draw only the steps' noise.

        Returns:
            [B, horizon, dim] in condition_data's dtype; without it in the model's, or where that is an engine, in
            global_cond's. Torch's noise is drawn in it too; in between the state is float32.

        Raises:
            InputError: for arguments that don't fit each other.
            NonFiniteError: where a trajectory became NaN or infinite. (Their loop would return it.)
        """
        if seeds is not None and generator is not None:
            raise InputError("seeds and generator are both given; give one: each is a source of noise")
        if (condition_data is None) != (condition_mask is None):
            raise InputError("condition_data and condition_mask go together; one is given without the other")
        sampler = self._sampler
        dtype, device = sampler._model_dtype(), sampler._device(noise)
        engine = _is_engine(sampler.model)
        policys = global_cond if condition_data is None and engine else condition_data
        if policys is not None and policys.is_floating_point():
            dtype = policys.dtype  # as in their loops; an engine's may be of less precision
        if condition_mask is not None and not condition_mask.any():
            condition_data = condition_mask = None  # as the policies say that nothing is known
        named = {"local_cond": local_cond, "global_cond": global_cond, "cond": cond}
        draw = partial(_randn, shape, generator, dtype, device)
        x_T = noise
        if x_T is None and seeds is None:
            x_T = self.table.init_noise_sigma * draw()
        elif x_T is None:
            drawn = initial_noise(sample_seeds(seeds or 0, shape[0]).to(device), shape[1:], torch.float32)
            x_T = self.table.init_noise_sigma * drawn
        if condition_data is not None and condition_mask is not None:
            for name, given in (("condition_data", condition_data), ("condition_mask", condition_mask)):
                if tuple(given.shape) != tuple(shape):
                    raise InputError(f"{name} has shape {tuple(given.shape)}, shape is {tuple(shape)}; they must fit")
            x_T = torch.where(condition_mask.to(device), condition_data.to(device, x_T.dtype), x_T.to(device))
        options: dict[str, Any] = dict(
            seeds=0 if seeds is None else seeds,
            x_T=x_T,
            known=condition_data,
            mask=condition_mask,
            noise=None if seeds is not None else lambda row: draw() if self._draws[row] else None,
        )
        kwargs = {name: value for name, value in named.items() if value is not None}
        if set(kwargs) == {"global_cond"} and engine:
            with self._lock:
                return self._observed(kwargs["global_cond"].to(device)).sample(shape, **options).to(dtype)
        return sampler.sample(shape, model_kwargs=kwargs, **options).to(dtype)

    def _observed(self, global_cond: Tensor) -> Sampler:
        """The sampler of the model with these observations: on a GPU its graph stays, and reads the new ones."""
        seen = global_cond.shape in self._observing

        def make() -> tuple[Any, Sampler]:
            engine: Any = self._sampler.model
            model = engine.condition(global_cond)
            return model, Sampler(model, self._steps)

        model, sampler = self._observing.get(global_cond.shape, make)
        if seen:
            model.observe(global_cond)
        return sampler


def _is_engine(model: object) -> bool:
    """Whether it can be told its observations before. (Not `hasattr`: a `condition` of your model is another.)"""
    from ..engine.policy import PolicyEngine

    return isinstance(model, PolicyEngine)


def _randn(shape: Sequence[int], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Torch's noise, drawn where the generator is."""
    place = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=place).to(device)


def table_of(
    scheduler: Any, num_inference_steps: int | None = None, *, eta: float = 0.0, use_clipped_model_output: bool = False
) -> tuple[StepTable, NDArray[np.bool_]]:
    """The step table of a DDPMScheduler or DDIMScheduler, and the rows, bool [rows], at which theirs draws noise.

    alpha_bar_t is the scheduler's own, in float32, to the last bit. (DDPMScheduler draws where t > 0; DDIMScheduler
    everywhere where eta > 0, for the last step too, whose noise is 0.)

    Raises:
        ConfigError: for another scheduler, `SchedulerConfig.from_diffusers`'s reasons, a learned variance, eta or
            use_clipped_model_output with DDPM, and time steps with which diffusers does not step to the next one that
            it visits (DDIM with "linspace", or "trailing" with a number that doesn't divide the training's), or adds
            noise at the last step ("trailing" with "fixed_large").
    """
    kind = next((c.__name__ for c in type(scheduler).__mro__ if c.__name__ in _SOLVERS), None)
    if kind is None:
        raise ConfigError(f"scheduler is a {type(scheduler).__name__}; allowed: {', '.join(_SOLVERS)}, a StepTable")
    config = dict(scheduler.config)
    if str(config.get("variance_type")).startswith("learned"):
        raise ConfigError(f"variance_type is {config['variance_type']!r}; a policy's network has no learned variance")
    bar = scheduler.alphas_cumprod.double().cpu().numpy()
    betas = 1.0 - bar / np.append(1.0, bar[:-1])
    known = {"_class_name": kind, "trained_betas": betas.tolist(), "rescale_betas_zero_snr": False}
    options: dict[str, Any] = {}
    if kind == "DDIMScheduler":
        options = {"eta": eta, "use_clipped_model_output": use_clipped_model_output}
    elif eta or use_clipped_model_output:
        raise ConfigError("eta and use_clipped_model_output are DDIMScheduler's; this is a DDPMScheduler")
    steps = len(bar) if num_inference_steps is None else num_inference_steps
    table = SchedulerConfig.from_diffusers({**config, **known}).table(_SOLVERS[kind], steps, **options)
    scheduler.set_timesteps(steps)
    t = table.timesteps
    same = np.array_equal(t, scheduler.timesteps.cpu().numpy())
    if kind == "DDIMScheduler":
        same = same and bool((t[:-1] - len(bar) // steps == t[1:]).all()) and t[-1] < len(bar) // steps
    elif config.get("variance_type") == "fixed_large":
        same = same and t[-1] == 0
    if not same:
        raise ConfigError(
            f"scheduler config: with timestep_spacing={config.get('timestep_spacing', 'leading')!r} and {steps} of "
            f"{len(bar)} steps a {kind} does not step as its paper; use 'leading', or give a StepTable"
        )
    return table, t > 0 if kind == "DDPMScheduler" else np.full(steps, eta > 0)


def _check_table(table: StepTable, steps: int | None, eta: float, use_clipped_model_output: bool) -> None:
    if steps not in (None, table.num_rows):
        raise ConfigError(f"num_inference_steps is {steps}, the table has {table.num_rows} rows; leave it out")
    if eta or use_clipped_model_output:
        raise ConfigError("eta and use_clipped_model_output are the table's own; give them to the solver")
    if table.learned:
        raise ConfigError("the table has a learned variance; a policy's network has none")
    if table.scaled:
        raise ConfigError('the table scales the model\'s input; use a solver with state="vp"')

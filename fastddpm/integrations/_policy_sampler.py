"""The sampling loop of a diffusion policy; `diffusion_policy` puts it in the place of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from fastddpm_kernels import reference
from fastddpm_kernels.columns import CLIP, K_X, K_Z, X0_M, X0_X, X_M, X_X, X_X0, X_Z
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, InputError
from ..inputs import Inputs
from ..pretrained import SchedulerConfig
from ..sampler import Sampler, _tensor_of
from ..seeds import sample_seeds
from ..solvers import StepTable

_SOLVERS = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim"}


class PolicySampler:
    """The sampling loop of a diffusion policy, to be called again and again.

    Args:
        model: any callable model(x, t, **given), as in `conditional_sample`.
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
        rows[:, X_Z] = 0.0  # the loops here add it
        self._sampler = Sampler(model, replace(self.table, rows=rows))

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
            [B, horizon, dim] in the model's dtype; in between the state is float32.

        Raises:
            InputError: for arguments that don't fit each other.
            NonFiniteError: where a trajectory became NaN or infinite. (Their loop would return it.)
        """
        if seeds is not None and generator is not None:
            raise InputError("seeds and generator are both given; give one: each is a source of noise")
        if (condition_data is None) != (condition_mask is None):
            raise InputError("condition_data and condition_mask go together; one is given without the other")
        if condition_mask is not None and not condition_mask.any():
            condition_data = condition_mask = None  # as the policies say that nothing is known
        named = {"local_cond": local_cond, "global_cond": global_cond, "cond": cond}
        kwargs = {name: value for name, value in named.items() if value is not None}
        sampler, table = self._sampler, self.table
        dtype, device = sampler._model_dtype(), sampler._device(noise)
        with torch.inference_mode(False), torch.no_grad():
            draw = partial(_randn, shape, generator, dtype, device)
            x_T = noise
            if x_T is None:
                x_T = table.init_noise_sigma * (draw() if seeds is None else _noise(seeds, shape, [0], stream=0)[0])
            given = sampler._checked(shape, 0, x_T=x_T, model_kwargs=kwargs, known=condition_data, mask=condition_mask)
            if given.known is not None and given.mask is not None:
                at_start = torch.where(given.mask.to(device), given.known.to(device, dtype), x_T.to(device, dtype))
                given = replace(given, x_T=at_start)
            steps: Sequence[Tensor | None] = [None] * table.num_rows
            if seeds is None:
                steps = [draw() if drawn else None for drawn in self._draws]
            elif table.stochastic:
                steps = _noise(seeds, shape, range(table.num_rows), stream=1).to(device).unbind()
            plain = device.type == "cpu" and not (table.history or table.dynamic)
            return (self._on_cpu if plain else self._stepwise)(given, steps).to(dtype)

    def _stepwise(self, given: Inputs, noise: Sequence[Tensor | None]) -> Tensor:
        """The loop of `Sampler.sample`, its graph too, with noise z for each step."""
        sampler = self._sampler
        part = given.part(torch.arange(given.shape[0]))
        with sampler._lock:
            buffers, step = sampler._prepared(part)
            buffers.start(part, 1.0)
            for z, scale in zip(noise, self.table["x_z"].tolist(), strict=True):
                step()
                if z is not None:
                    z = z if buffers.mask is None else z.masked_fill(buffers.mask, 0.0)
                    buffers.model_input.copy_(buffers.x.add_(z, alpha=scale))
            return sampler._finite(buffers.x.clone(), buffers.nonfinite.clone())

    def _on_cpu(self, given: Inputs, noise: Sequence[Tensor | None]) -> Tensor:
        """The same in a few of torch's ops a step: for one short trajectory the step op's checks are the greater part.

        All trajectories are at the same row, and no row looks back.
        """
        sampler, table, model = self._sampler, self.table, self._sampler.model
        shape, dtype, kwargs = torch.Size(given.shape), sampler._model_dtype(), given.model_kwargs
        x: Tensor = given.x_T.float()  # type: ignore[union-attr]  # `sample` has given one
        known = None if given.known is None else given.known.float()
        t = torch.tensor(table.timesteps, dtype=torch.float32)
        times = (t.long() if bool((t == t.round()).all()) else t)[:, None].expand(-1, shape[0]).contiguous()
        every_x0 = torch.empty((table.num_rows, *shape))
        for row, t, x0, z in zip(table.rows.tolist(), times.unbind(), every_x0.unbind(), noise, strict=True):
            m = _tensor_of(model(x.to(dtype), t, **kwargs), shape, False).float()
            torch.mul(x, row[X0_X], out=x0).add_(m, alpha=row[X0_M])
            x = (x * row[X_X]).add_(x0.clamp(-row[CLIP], row[CLIP]), alpha=row[X_X0])
            if row[X_M]:
                x.add_(m, alpha=row[X_M])
            if z is not None:
                x.add_(z, alpha=row[X_Z])
            if known is not None and given.mask is not None:
                x = torch.where(given.mask, known, x)
        bad = ~every_x0.isfinite().flatten(2).all(dim=2)
        return sampler._finite(x, torch.where(bad.any(dim=0), bad.int().argmax(dim=0) + 1, 0))


def _noise(seeds: int | Sequence[int], shape: Sequence[int], steps: Sequence[int], *, stream: int) -> Tensor:
    """The noise contract's normals of each trajectory, of all steps at once: float32 [steps, B, ...]."""
    each = sample_seeds(seeds, shape[0])
    step = torch.tensor(steps).repeat_interleave(len(each))
    return reference.normal(each.repeat(len(steps)), shape[1:], step=step, stream=stream).view(len(steps), *shape)


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

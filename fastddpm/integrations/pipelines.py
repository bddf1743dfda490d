"""diffusers' pipelines, their loop run by `Sampler`: ``pipe = fastddpm.accelerate(pipe)``.

The tables have the scheduler's own time steps, and step from t to where it steps to, its oddities (``steps_offset``,
DDIM with "linspace") included. What is drawn, and when, is as in diffusers; only rounding differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import ConfigError, InputError
from ..schedule import NoiseSchedule
from ..solvers import StepTable
from ..solvers.ddim import ddim_table
from .loops import Loops, posterior_table, strides_between, with_given_noise

Generators = torch.Generator | list[torch.Generator] | None
Seeds = int | Sequence[int] | None

_SCHEDULERS = (DDPMScheduler, DDIMScheduler)
_VARIANCES = {  # diffusers' name -> ours; its "learned" takes the root of what may be negative, "fixed_large_log" does
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


def accelerate(pipe: Any, *, seeds: Seeds = None) -> Any:
    """Make a pipeline's ``pipe(...)`` run through `Sampler`, and on CUDA through its graph; in place.

    For `DDPMPipeline` with a `DDPMScheduler` or `DDIMScheduler`, `DDIMPipeline` with a `DDIMScheduler`, and subclasses
    with the same ``__call__``; the unet is diffusers' `UNet2DModel`, `fastddpm.UNet`, or alike. The call keeps its
    arguments, what it returns, its progress bar and its generators. It also takes

        seeds: as in `Sampler.sample`, in a generator's place: the kernel makes the noise.
        class_labels: int64 [batch_size], a list, or one number for all, for a unet with classes.

    Differences: the state between steps is float32 whatever the unet's dtype, "np" pictures are float32, and a sample
    that isn't finite is a `NonFiniteError`.

    Args:
        pipe: the pipeline. Its parts may be replaced later, and it may be saved: diffusers reads what it has written.
        seeds: for the calls that are given neither seeds nor a generator. None: torch's noise, as in diffusers.

    Returns:
        `pipe`.

    Raises:
        ConfigError: for another pipeline or scheduler, here or in the call.
        InputError: in the call, for arguments that don't fit each other.
    """
    fronts: dict[Any, type] = {DDPMPipeline.__call__: _DDPMFront, DDIMPipeline.__call__: _DDIMFront}
    if not isinstance(pipe, _Front):
        front = fronts.get(type(pipe).__call__)
        if front is None:
            raise ConfigError(
                f"accelerate can't know the loop of {type(pipe).__name__}; it takes diffusers' DDPMPipeline and "
                "DDIMPipeline. For others: fastddpm.Sampler(unet, table) in your own loop's place"
            )
        _check_parts(pipe)
        cls: Any = type(pipe)
        pipe.__class__ = _fronted(front, cls)
        pipe._fastddpm_loops = Loops()
    pipe._fastddpm_seeds = seeds
    return pipe


@cache
def _fronted(front: type, cls: type) -> type:
    """`cls` with the front's call. It has its name, by which diffusers saves and loads."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (front, cls), names)


class _Front:
    """What stands before a pipeline's class."""

    unet: Any
    scheduler: Any
    progress_bar: Callable[..., Any]
    numpy_to_pil: Callable[..., Any]
    _fastddpm_loops: Loops
    _fastddpm_seeds: Seeds

    def _pictures(
        self,
        batch_size: int,
        generator: Generators,
        num_inference_steps: int,
        output_type: str | None,
        return_dict: bool,
        seeds: Seeds,
        class_labels: Any,
        **options: Any,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """The call of either pipeline; `options` are the scheduler's step's."""
        _check_parts(self)
        if seeds is not None and generator is not None:
            raise InputError("seeds and generator are both given; the noise is made from one of them")
        if isinstance(generator, list) and len(generator) not in (1, batch_size):
            raise InputError(f"{len(generator)} generators were given for {batch_size} pictures; give one a picture")
        if seeds is None and generator is None:
            seeds = self._fastddpm_seeds
        shape = (batch_size, *_sample_shape(self.unet))
        told = _conditions(self.unet, class_labels, batch_size)
        self.scheduler.set_timesteps(num_inference_steps)
        table, draws = _table(self.scheduler, **options)
        with self.progress_bar(total=table.num_rows) as bar:
            x = self._sampled(shape, table, draws, generator, seeds, told, bar)
        image = (x / 2 + 0.5).clamp(0, 1)
        images: Any = image.to(_parameter(self.unet).dtype)
        if output_type != "pt":
            images = image.cpu().permute(0, 2, 3, 1).numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sampled(
        self,
        shape: tuple[int, ...],
        table: StepTable,
        draws: Sequence[bool],
        generator: Generators,
        seeds: Seeds,
        told: dict[str, Tensor],
        bar: Any,
    ) -> Tensor:
        def watch(row: int, x: Tensor) -> None:
            bar.update()

        if seeds is not None:
            return self._fastddpm_loops.get(self.unet, table).run(shape, seeds=seeds, watch=watch, model_kwargs=told)

        loop = self._fastddpm_loops.get(self.unet, with_given_noise(table))
        like = _parameter(self.unet)

        def draw() -> Tensor:
            return randn_tensor(shape, generator=generator, device=like.device, dtype=like.dtype)

        def noise(row: int) -> Tensor | None:
            return draw() if draws[row] else None

        return loop.run(shape, x_T=draw(), noise=noise, watch=watch, model_kwargs=told)


class _DDPMFront(_Front):
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds = None,
        class_labels: Any = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """As in diffusers; seeds and class_labels: see `accelerate`."""
        given = (batch_size, generator, num_inference_steps, output_type, return_dict, seeds, class_labels)
        return self._pictures(*given)


class _DDIMFront(_Front):
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        *,
        seeds: Seeds = None,
        class_labels: Any = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """As in diffusers; seeds and class_labels: see `accelerate`."""
        if not isinstance(self.scheduler, DDIMScheduler):
            raise ConfigError(
                f"the scheduler is a {type(self.scheduler).__name__}, whose step takes no eta; "
                "a DDIMPipeline needs a DDIMScheduler"
            )
        given = (batch_size, generator, num_inference_steps, output_type, return_dict, seeds, class_labels)
        return self._pictures(*given, eta=eta, use_clipped_model_output=bool(use_clipped_model_output))


def _check_parts(pipe: Any) -> None:
    """`ConfigError` for a scheduler whose step isn't known, or a unet that is moved to the device in each call."""
    scheduler = pipe.scheduler
    ours = type(scheduler).__module__.partition(".")[0] == "fastddpm"
    if not any(isinstance(scheduler, k) and (ours or type(scheduler).step is k.step) for k in _SCHEDULERS):
        raise ConfigError(
            f"the scheduler is a {type(scheduler).__name__}; accelerate takes DDPMScheduler and DDIMScheduler. "
            "For another solver: fastddpm.Sampler(pipe.unet, fastddpm.solvers.make(name, schedule, steps))"
        )
    if getattr(pipe.unet, "_hf_hook", None) is not None:
        raise ConfigError("the unet is offloaded to the CPU between calls; call pipe.remove_all_hooks() and pipe.to()")


def _parameter(unet: Any) -> Tensor:
    """Any of its floating-point parameters, for their dtype and device."""
    parameter: Tensor = next(p for p in unet.parameters() if p.is_floating_point())
    return parameter


def _sample_shape(unet: Any) -> tuple[int, ...]:
    size = unet.config.sample_size
    if size is None:
        raise ConfigError("the unet's config has no sample_size, so its pictures' size is not known; write it in")
    return (unet.config.in_channels, *((size, size) if isinstance(size, int) else size))


def _conditions(unet: Any, class_labels: Any, batch_size: int) -> dict[str, Tensor]:
    """The model_kwargs: {} for a unet without classes."""
    classes = getattr(unet.config, "num_class_embeds", None)
    if class_labels is None:
        if classes is not None:
            raise InputError(f"the unet has {classes} classes; give class_labels, one a picture or one for all")
        return {}
    if classes is None:
        raise InputError("class_labels are given, but the unet has no classes (its config's num_class_embeds is null)")
    labels = torch.as_tensor(class_labels)
    if labels.is_floating_point() or labels.ndim > 1 or (labels.ndim == 1 and len(labels) != batch_size):
        raise InputError(f"class_labels are {class_labels!r}; allowed: a whole number, or {batch_size} of them")
    if ((labels < 0) | (labels >= classes)).any():
        raise InputError(f"class_labels are {class_labels!r}; allowed: whole numbers in 0 ... {classes - 1}")
    return {"class_labels": labels.long().expand(batch_size)}


def _table(scheduler: Any, eta: float = 0.0, use_clipped_model_output: bool = False) -> tuple[StepTable, list[bool]]:
    """What the scheduler's `step` does at each of its time steps, and before which of them it draws noise."""
    config = scheduler.config
    schedule = NoiseSchedule.from_betas(scheduler.betas.cpu().double().numpy())
    if not np.allclose(scheduler.alphas_cumprod.cpu(), schedule.alphas_cumprod, rtol=2e-3, atol=1e-6):
        raise ConfigError("the scheduler's alphas_cumprod don't belong to its betas; make it anew from its config")
    t = scheduler.timesteps.cpu().numpy()
    thresholds = config.thresholding
    common: dict[str, Any] = {
        "prediction_type": config.prediction_type,
        "clip": config.clip_sample_range if config.clip_sample else None,
    }
    if thresholds:  # there too it goes before the clip
        common |= {"clip": config.sample_max_value, "ratio": config.dynamic_thresholding_ratio}
    if isinstance(scheduler, DDIMScheduler):
        s = t - config.num_train_timesteps // len(t)
        final = 0.0 if config.set_alpha_to_one else float(schedule.log_alphas_cumprod[0])
        strides = strides_between(schedule, t, s, final)
        table = ddim_table(strides, eta=eta, use_clipped_model_output=use_clipped_model_output, **common)
        return table, [eta > 0] * len(t)
    variance = _VARIANCES.get(config.variance_type)
    if variance is None:
        allowed = ", ".join(map(repr, _VARIANCES))
        raise ConfigError(f"the scheduler's variance_type is {config.variance_type!r}; allowed: {allowed}")
    strides = strides_between(schedule, t, np.append(t[1:], -1))
    return posterior_table(strides, variance=variance, **common), (t > 0).tolist()

"""diffusers' pipelines, their loop run by `Sampler`: ``pipe = fastddpm.accelerate(pipe)``.

What is drawn, and when, is as in diffusers; only rounding differs. `_pipeline_tables` has the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    ImagePipelineOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..errors import ConfigError, InputError
from ..sampler import Callback
from ..solvers import StepTable
from ._pipeline_tables import KNOWN, is_known, table_of
from .loops import Loops

Generators = torch.Generator | list[torch.Generator] | None
Seeds = int | Sequence[int] | None


def accelerate(pipe: Any, *, seeds: Seeds = None) -> Any:
    """Make a pipeline's ``pipe(...)`` run through `Sampler`, and on CUDA through its graph; in place.

    For `DDPMPipeline` with a `DDPMScheduler`, `DDIMScheduler` or `DPMSolverMultistepScheduler`, `DDIMPipeline` with a
    `DDIMScheduler`, `ConsistencyModelPipeline`, and subclasses with the same ``__call__``; the unet is diffusers'
    `UNet2DModel`, `fastddpm.UNet`, or alike. The call keeps its arguments, what it returns, its progress bar, callback
    and generators. It also takes

        seeds: as in `Sampler.sample`, in a generator's place: the kernel makes the noise.
        class_labels: int64 [batch_size], a list, or one number for all, for a unet with classes.

    Differences: the state between steps is float32 where the unet is in half precision, its "np" pictures are float32,
    what a callback gets is a copy, and a sample that isn't finite is a `NonFiniteError`.

    Args:
        pipe: the pipeline. Its parts may be replaced later, and it may be saved: diffusers reads what it has written.
        seeds: for the calls that are given neither seeds nor a generator. None: torch's noise, as in diffusers.

    Returns:
        `pipe`.

    Raises:
        ConfigError: for another pipeline or scheduler, here or in the call.
        InputError: in the call, for arguments that don't fit each other.
    """
    fronts: dict[Any, type] = {
        DDPMPipeline.__call__: _DDPMFront,
        DDIMPipeline.__call__: _DDIMFront,
        ConsistencyModelPipeline.__call__: _ConsistencyFront,
    }
    if not isinstance(pipe, _Front):
        front = fronts.get(type(pipe).__call__)
        if front is None:
            taken = "diffusers' DDPMPipeline, DDIMPipeline and ConsistencyModelPipeline"
            raise ConfigError(
                f"accelerate can't know the loop of {type(pipe).__name__}; it takes {taken}. "
                "For others: fastddpm.Sampler(unet, table) in the loop's place"
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


def _blank(front: type, cls: type) -> Any:
    made: Any = _fronted(front, cls)
    return made.__new__(made)


class _Front:
    """What stands before a pipeline's class."""

    unet: Any
    scheduler: Any
    progress_bar: Callable[..., Any]
    numpy_to_pil: Callable[..., Any]
    _fastddpm_loops: Loops
    _fastddpm_seeds: Seeds

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, type(self).__bases__, vars(self)

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
        """The call of DDPM's and DDIM's pipelines; `options` are the scheduler's step's."""
        seeds = self._checked(batch_size, generator, seeds)
        shape = (batch_size, *_sample_shape(self.unet))
        told = _conditions(self.unet, class_labels, batch_size)
        self.scheduler.set_timesteps(num_inference_steps)
        x = self._sampled(shape, *table_of(self.scheduler, **options), generator, seeds, told)
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            images = images.to(_parameter(self.unet).dtype)
        else:
            images = images.cpu().permute(0, 2, 3, 1).numpy()
            images = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _checked(self, batch_size: int, generator: Generators, seeds: Seeds) -> Seeds:
        """The seeds of a call, or None for torch's noise."""
        _check_parts(self)
        if seeds is not None and generator is not None:
            raise InputError("seeds and generator are both given; the noise is made from one of them")
        if isinstance(generator, list) and len(generator) not in (1, batch_size):
            raise InputError(f"{len(generator)} generators were given for {batch_size} pictures; give one a picture")
        return self._fastddpm_seeds if seeds is None and generator is None else seeds

    def _sampled(
        self,
        shape: tuple[int, ...],
        table: StepTable,
        draws: Sequence[bool],
        generator: Generators,
        seeds: Seeds,
        told: dict[str, Tensor],
        x_T: Tensor | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """The samples, from x_T or from noise; `callback` as in `Sampler.sample`."""
        like = _parameter(self.unet)

        def draw() -> Tensor:
            return randn_tensor(shape, generator=generator, device=like.device, dtype=like.dtype)

        def noise(row: int) -> Tensor | None:
            return draw() if draws[row] else None

        def after(row: int, x: Tensor) -> None:
            bar.update()
            if callback is not None:
                callback(row, x)

        given: dict[str, Any] = {"model_kwargs": told, "callback": after}
        if seeds is not None:
            given |= {"x_T": x_T, "seeds": seeds}
        else:
            given |= {"x_T": draw() if x_T is None else x_T, "seeds": 0, "noise": noise}
        loop = self._fastddpm_loops.get(self.unet, table)
        loop.state_dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        with self.progress_bar(total=table.num_rows) as bar:
            return loop.sample(shape, **given)


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
        _needed(self, DDIMScheduler)
        given = (batch_size, generator, num_inference_steps, output_type, return_dict, seeds, class_labels)
        return self._pictures(*given, eta=eta, use_clipped_model_output=bool(use_clipped_model_output))


class _ConsistencyFront(_Front):
    check_inputs: Callable[..., None]
    prepare_latents: Callable[..., Tensor]
    prepare_class_labels: Callable[..., Tensor | None]
    postprocess_image: Callable[..., Any]

    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Any = None,
        num_inference_steps: int = 1,
        timesteps: list[int] | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        callback: Callable[[int, Any, Tensor], None] | None = None,
        callback_steps: int = 1,
        *,
        seeds: Seeds = None,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """As in diffusers; seeds: see `accelerate`."""
        seeds = self._checked(batch_size, generator, seeds)
        _needed(self, CMStochasticIterativeScheduler)
        shape, like = (batch_size, *_sample_shape(self.unet)), _parameter(self.unet)
        self.check_inputs(num_inference_steps, timesteps, latents, batch_size, shape[-1], callback_steps)
        if seeds is None or latents is not None:
            latents = self.prepare_latents(*shape, like.dtype, like.device, generator, latents)
        labels = self.prepare_class_labels(batch_size, like.device, class_labels=class_labels)
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps)
        else:
            self.scheduler.set_timesteps(timesteps=timesteps, device=like.device)

        def told_of(row: int, x: Tensor) -> None:
            if callback is not None and row % callback_steps == 0:
                callback(row, self.scheduler.timesteps[row], x.to(like.dtype, copy=True))

        told = {} if labels is None else {"class_labels": labels}
        x = self._sampled(shape, *table_of(self.scheduler), generator, seeds, told, latents, told_of)
        images = self.postprocess_image(x.to(like.dtype) if output_type == "pt" else x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _needed(pipe: Any, scheduler: type) -> None:
    if not isinstance(pipe.scheduler, scheduler):
        raise ConfigError(
            f"the scheduler is a {type(pipe.scheduler).__name__}; a {type(pipe).__name__} needs a {scheduler.__name__}"
        )


def _check_parts(pipe: Any) -> None:
    """`ConfigError` for a scheduler whose step isn't known, or a unet that is moved to the device in each call."""
    if not is_known(pipe.scheduler):
        names = ", ".join(k.__name__ for k in KNOWN)
        raise ConfigError(
            f"the scheduler is a {type(pipe.scheduler).__name__}; accelerate takes {names}, with their own steps. "
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

"""`accelerate`: a sampling loop of another library, run by `Sampler`. (The file isn't named as the function is: a
module of that name would take its place in the package.)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

from .errors import ConfigError

T = TypeVar("T")

_FRONTS = {  # the package in which an object's class, or one that it is made from, is defined -> our file for it
    "diffusers": "pipelines",
    "denoising_diffusion_pytorch": "lucidrains",
}


def accelerate(x: T, **options: Any) -> T:
    """Make `x` sample through `fastddpm.Sampler`, in place, and return it; everything else about it stays as it is.

        pipe = fastddpm.accelerate(DDPMPipeline.from_pretrained(folder))  # diffusers
        fastddpm.accelerate(diffusion).sample(16)  # denoising-diffusion-pytorch

    The results are the library's own up to rounding: same conventions, same defaults, the same draws from the same
    generators in the same order. With `seeds` the kernel makes the noise, nothing is drawn on the host, and a sample
    depends on its seed alone.

    Args:
        x: a diffusers pipeline (`integrations.pipelines.accelerate` says which), or a `GaussianDiffusion`
            (`integrations.lucidrains.accelerate`).
        options: seeds=: as in `Sampler.sample`, for the calls that are given neither seeds nor a generator.

    Raises:
        ConfigError: for anything else, or one whose sampling can't be kept as it is; the message says what to do.
    """
    for cls in type(x).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in _FRONTS:
            front: Any = import_module(f".integrations.{_FRONTS[package]}", __package__)
            return front.accelerate(x, **options)
    raise ConfigError(
        f"accelerate was given a {type(x).__name__}; allowed: a diffusers pipeline with a unet and a scheduler, or a "
        "GaussianDiffusion of denoising_diffusion_pytorch. For a model of your own use fastddpm.Sampler(model, table)"
    )

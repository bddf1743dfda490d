"""fastddpm: a fast, trustworthy sampler for diffusion models (DDPM, Ho et al. 2020) on NVIDIA GPUs.

    import fastddpm
    images = fastddpm.sample(model, (16, 3, 32, 32), solver="ddim", steps=50, seed=0)

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import solvers
    from .acceleration import accelerate
    from .edm import EDMSchedule
    from .errors import FastDDPMError
    from .inflight import InflightSampler
    from .sampler import Sampler, sample
    from .schedule import NoiseSchedule
    from .solvers import StepTable
    from .unet import UNet
    from .unet_config import UNetConfig

__version__ = "0.1.0"

_HOMES = {
    "EDMSchedule": "edm",
    "FastDDPMError": "errors",
    "InflightSampler": "inflight",
    "NoiseSchedule": "schedule",
    "Sampler": "sampler",
    "StepTable": "solvers",
    "UNet": "unet",
    "UNetConfig": "unet_config",
    "accelerate": "acceleration",
    "sample": "sampler",
}
__all__ = [
    "EDMSchedule",
    "FastDDPMError",
    "InflightSampler",
    "NoiseSchedule",
    "Sampler",
    "StepTable",
    "UNet",
    "UNetConfig",
    "accelerate",
    "sample",
    "solvers",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name == "solvers":
        return import_module(".solvers", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

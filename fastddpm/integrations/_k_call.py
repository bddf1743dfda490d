"""What k-diffusion's samplers are called with, and whether it is ComfyUI that calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Seeds = int | Sequence[int] | None


@dataclass(frozen=True)
class Call:
    """What every sampler is called with: see the docstring of `k_diffusion`."""

    model: Model
    x: Tensor
    sigmas: Tensor
    extra_args: Mapping[str, Any] | None
    callback: Callback | None
    disable: bool | None
    seeds: Seeds = None


def comfy_sampling(model: Any) -> Any:
    """The ``model_sampling`` behind a model as ComfyUI wraps it for its samplers; None for any other model."""
    return getattr(getattr(getattr(model, "inner_model", None), "inner_model", None), "model_sampling", None)


def comfy_seed(call: Call) -> int | None:
    """What ComfyUI seeds a sampler's noise with; None of other models."""
    return None if comfy_sampling(call.model) is None else (call.extra_args or {}).get("seed")


def check_exploding(model: Any) -> None:
    """`InputError` where a ComfyUI model's state isn't x_0 + sigma eps, as a rectified flow's: its noise is another."""
    sampling = comfy_sampling(model)
    flow = any(kind.__name__ == "CONST" for kind in type(sampling).__mro__)
    if flow or getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise InputError(
            "the model is a rectified flow (CONST, or with a noise_scale), for which ComfyUI's sampler adds another "
            "noise; use a sampler without noise, such as sample_euler or sample_dpmpp_2m, or ComfyUI's own"
        )

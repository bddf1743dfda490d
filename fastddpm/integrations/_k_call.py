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
    """What every sampler is called with.

    Attributes:
        model: model(x, sigma, **extra_args) -> x_0, shaped as x; sigma is [B] in x's dtype. Anything callable.
        x: where to start, [B, ...], of noise level sigmas[0]; never written to.
        sigmas: [n + 1] noise levels, above 0 but for the last one, on any device; fewer than two: x is returned.
        extra_args: passed on to the model, as they are.
        callback: called once a step, behind the model's first evaluation, with a dict of x (the state at sigma_hat), i,
            sigma, sigma_hat (above sigma by the churn) and denoised (the model's own output).
        disable: hide the progress bar; None: where stderr is no terminal.
        seeds: draw the noise from these, one integer or one a sample, instead of torch's global random numbers.
    """

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

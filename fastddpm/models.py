"""What a model wants of its input, as far as can be seen from outside, and what it may return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import graphs
from .errors import InputError, NonFiniteError


def parameters_of(model: object) -> Iterator[Tensor]:
    """Those of the model, or of the modules that a function around them runs."""
    return (p for module in graphs.modules_of(model) for p in module.parameters())


def dtype_of(model: object, asked: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """The dtype of the model's input, as it is now: the one asked for, that of the parameters, or `default`.

    Raises `InputError` for one that is no float dtype, or not that of a module's parameters.
    """
    own = next((p.dtype for p in parameters_of(model) if p.is_floating_point()), None)
    if asked is None:
        return own or default
    if not isinstance(asked, torch.dtype) or not asked.is_floating_point:
        raise InputError(f"dtype is {asked}; needed: a floating-point dtype")
    if isinstance(model, nn.Module) and own is not None and own != asked:
        raise InputError(f"the model's parameters are {own}, dtype is {asked}; convert it first: model.to({asked})")
    return asked


def memory_format_of(model: object, shape: Sequence[int]) -> torch.memory_format:
    """channels_last where a convolution's weights are, so that the model's first layer needs no copy."""
    last = torch.channels_last
    wants = any(
        p.ndim == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in parameters_of(model)
    )
    return last if wants and len(shape) == 4 else torch.contiguous_format


def device_of(model: object) -> torch.device | None:
    """Where its parameters are; None where it has none."""
    return next((p.device for p in parameters_of(model)), None)


def tensor_of(output: Any, shape: torch.Size, learned: bool) -> Tensor:
    """The prediction in what a model returned for an input of `shape`: a tensor, or an object's `.sample`.

    A second half of channels, a learned variance, is left out unless the solver reads it. Raises `InputError` for
    anything else.
    """
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise InputError(f"the model returned a {type(output).__name__}; needed: a tensor, or an object with .sample")
    with_variance = (shape[0], 2 * shape[1], *shape[2:])
    if not learned and len(shape) > 2 and output.shape == with_variance:
        return output[:, : shape[1]]  # the solver has a variance of its own
    if output.shape != (expected := with_variance if learned else tuple(shape)):
        why = ", for a solver with a learned variance" if learned else ""
        raise InputError(
            f"the model returned shape {tuple(output.shape)} for an input of {tuple(shape)}; needed: {expected}{why}"
        )
    return output


def finite_samples(samples: Tensor, flags: Tensor, timesteps: Sequence[float]) -> Tensor:
    """`samples` [B, ...], or `NonFiniteError` where one is not finite or flagged; waits for the device.

    Args:
        flags: int32 [B], 1 + the first step at which the model's prediction was not finite, or 0.
        timesteps: of the steps that were done.
    """
    bad = (flags != 0) | ~torch.isfinite(samples).flatten(1).all(dim=1)
    if not bad.any():
        return samples
    first = int(bad.nonzero()[0])
    step = int(flags[first]) - 1 if flags[first] else len(timesteps) - 1
    others = f" ({int(bad.sum())} of {len(samples)} samples)" if int(bad.sum()) > 1 else ""
    raise NonFiniteError(
        f"sample {first} is not finite from step {step} (t = {timesteps[step]:g}) on{others}: "
        "the model's output there is NaN, infinite or too large",
        samples=samples,
        bad=bad,
    )

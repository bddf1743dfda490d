"""The operations in fastddpm's own kernels, on NHWC activations that lie where the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..unet import UNet
from .on_torch import attended
from .operations import Attention, Conv, Linear, Norm, Operation

# Of out, sources, time rows, residual, and sources of the shortcut.
Run = Callable[[Tensor, list[Tensor], Tensor, Tensor | None, list[Tensor]], None]


def _norm(operation: Norm, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.group_norm import launch_group_norm

    module: Any = unet.get_submodule(operation.name)
    weight, bias = _float(module.weight), _float(module.bias)
    options = dict(groups=operation.groups, eps=module.eps, silu=operation.silu)

    def run(out: Tensor, sources: list[Tensor], rows: Tensor, residual: Tensor | None, past: list[Tensor]) -> None:
        scale = shift = None
        if operation.time is not None:
            scale, shift = rows[:, operation.time].chunk(2, dim=1)
        x, second = _two(sources)
        launch_group_norm(x, second, out, weight, bias, scale=scale, shift=shift, **options)

    return run


def _conv(operation: Conv, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.conv import launch_conv
    from fastddpm_kernels.conv_reference import pack_weight, phase_weights

    module: Any = unet.get_submodule(operation.name)
    bias = _float(module.bias)
    options: dict[str, Any] = dict(stride=operation.stride, padding=operation.padding, scale=operation.scale)
    weight = (phase_weights if operation.up else pack_weight)(module.weight.detach(), dtype)
    packed = None
    if operation.shortcut:
        shortcut: Any = unet.get_submodule(operation.shortcut_name)
        packed, bias = pack_weight(shortcut.weight.detach(), dtype), bias + _float(shortcut.bias)

    def run(out: Tensor, sources: list[Tensor], rows: Tensor, residual: Tensor | None, past: list[Tensor]) -> None:
        (x,) = sources
        first, then = _two(past) if past else (None, None)
        launch_conv(
            x,
            weight,
            bias,
            out,
            row=None if operation.time is None else rows[:, operation.time],
            residual=residual,
            shortcut_x=first,
            shortcut_second=then,
            shortcut_weight=packed,
            **options,
        )

    return run


def _linear(operation: Linear, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.linear import launch_linear

    modules: list[Any] = [unet.get_submodule(name) for name in operation.names]
    weight = torch.cat([module.weight for module in modules]).detach().to(dtype).T.contiguous()
    bias = _float(torch.cat([module.bias for module in modules]))

    def run(out: Tensor, sources: list[Tensor], rows: Tensor, residual: Tensor | None, past: list[Tensor]) -> None:
        launch_linear(sources[0], weight, bias, out, residual=residual, factor=operation.scale)

    return run


def _attention(operation: Attention, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.attention import attention_tiles, launch_attention

    value, fits = operation.out, True
    try:
        attention_tiles(value.height * value.width, value.channels // operation.heads, dtype.itemsize)
    except ValueError:  # a head too wide for the kernel, such as 512 in float32
        fits = False

    def run(out: Tensor, sources: list[Tensor], rows: Tensor, residual: Tensor | None, past: list[Tensor]) -> None:
        if fits:
            launch_attention(sources[0], out, heads=operation.heads)
        else:
            out.copy_(attended(sources[0], operation.heads))

    return run


def _two(sources: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    return sources[0], sources[1] if len(sources) > 1 else None


def _float(parameter: Tensor) -> Tensor:
    """A copy in float32, contiguous."""
    return parameter.detach().float().clone()


# As `on_torch.MAKERS`.
MAKERS: dict[type[Operation], Callable[..., Run]] = {
    Norm: _norm,
    Conv: _conv,
    Linear: _linear,
    Attention: _attention,
}

"""The operations in fastddpm's own kernels, on NHWC activations that lie where the plan says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..unet import UNet
from . import on_torch
from .on_torch import Inputs, attended
from .operations import Attention, Conv, Linear, Norm, Operation, Product
from .plan import Plan

if TYPE_CHECKING:
    from fastddpm_kernels.conv_choice import ConvShape


class Memory(NamedTuple):
    """What an operation's programs exchange among themselves: nothing of it outlives the operation."""

    workspace: Tensor  # float32
    counters: Tensor  # int32, zeros; of no other operation


Run = Callable[[list[Tensor], Inputs, Memory], None]  # of what is written first


def memories(sizes: Sequence[tuple[int, int]], device: torch.device) -> list[Memory]:
    """Each operation's: one workspace for all, since they run one after another, and counters of its own."""
    workspace = torch.empty(max(floats for floats, _ in sizes), dtype=torch.float32, device=device)
    counters = torch.zeros(sum(counters for _, counters in sizes), dtype=torch.int32, device=device)
    return [Memory(workspace, own) for own in counters.split([counters for _, counters in sizes])]


def scratch_of(plan: Plan) -> list[tuple[int, int]]:
    """How many float32 numbers and counters each operation needs; these begin at 16 bytes, as Triton compiles for."""
    from fastddpm_kernels.conv_norm import conv_scratch

    sizes = []
    for operation in plan.lowered.operations:
        floats = counters = 0
        if isinstance(operation, Product):
            out, up = operation.out, isinstance(operation, Conv) and operation.up
            groups = [norm.channels_in // norm.groups for norm in operation.norms]
            floats, counters = conv_scratch(plan.batch, out.height * out.width, out.channels, groups, up=up)
        sizes.append((floats, -(-counters // 4) * 4))
    return sizes


def _norm(operation: Norm, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.group_norm import launch_group_norm

    weight, bias, eps = _affine(operation, unet)
    options: dict[str, Any] = dict(groups=operation.groups, eps=eps, silu=operation.silu)

    def run(outs: list[Tensor], given: Inputs, memory: Memory) -> None:
        scale, shift = _modulation(operation, given.rows)
        x, second = _two(given.sources)
        launch_group_norm(x, second, outs[0], weight, bias, scale=scale, shift=shift, **options)

    return run


def _affine(norm: Norm, unet: UNet) -> tuple[Tensor, Tensor, float]:
    """Weight, bias and epsilon of a norm, of its own channels."""
    module: Any = unet.get_submodule(norm.name)
    own = slice(norm.first, norm.first + norm.channels_in)
    return _float(module.weight[own]), _float(module.bias[own]), module.eps


def _modulation(norm: Norm, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Scale and shift, where the time rows have them."""
    if norm.time is None:
        return None, None
    scale, shift = rows[:, norm.time].chunk(2, dim=1)
    return scale, shift


def _product(operation: Product, unet: UNet, weight: Tensor, bias: Tensor, **options: Any) -> Run:
    """The product with a packed matrix, and what follows it: all in one launch."""
    from fastddpm_kernels.conv import launch_conv
    from fastddpm_kernels.conv_norm import NormOut

    affines = [_affine(norm, unet) for norm in operation.norms]
    time = operation.time if isinstance(operation, Conv) else None

    def run(outs: list[Tensor], given: Inputs, memory: Memory) -> None:
        rows, (x, second) = given.rows, _two(given.sources)
        first, then = _two(given.past) if given.past else (None, None)
        norms = [
            NormOut(out, *affine[:2], norm.channels_in // norm.groups, affine[2], norm.silu, *_modulation(norm, rows))
            for norm, affine, out in zip(operation.norms, affines, outs[operation.raw :], strict=True)
        ]
        launch_conv(
            x,
            weight,
            bias,
            outs[0] if operation.raw else None,
            second=second,
            row=None if time is None else rows[:, time],
            residual=given.residual,
            shortcut_x=first,
            shortcut_second=then,
            scale=operation.scale,
            norms=norms,
            workspace=memory.workspace,
            counters=memory.counters,
            **options,
        )

    return run


def shape_of(operation: Product, dtype: torch.dtype) -> ConvShape:
    """What the kernel is given for an operation: where in the tuned tables it is."""
    from fastddpm_kernels.conv_choice import ConvShape

    conv = operation if isinstance(operation, Conv) else Conv("", operation.sources, operation.out, kernel=1)
    c0, c1 = ([value.channels for value in operation.sources] + [0])[:2]
    s0, s1 = ([value.channels for value in conv.shortcut] + [0, 0])[:2]
    return ConvShape(
        dtype=str(dtype).removeprefix("torch."),
        height=operation.out.height,
        width=operation.out.width,
        c0=c0,
        c1=c1,
        cout=operation.out.channels,
        kernel=conv.kernel,
        stride=conv.stride,
        padding=conv.padding,
        up=conv.up,
        row=conv.time is not None,
        s0=s0,
        s1=s1,
        residual=operation.residual is not None,
        norms=tuple(norm.channels_in // norm.groups for norm in operation.norms),
        raw=operation.raw,
    )


def _cudnn_is_faster(operation: Conv, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a table says so that was measured on this GPU: of a shape, at every batch: so bits don't change."""
    from fastddpm_kernels.conv_choice import choice, gpu_of

    found = choice(gpu_of(device).name, shape_of(operation, dtype), batch=1)
    return found is not None and not found.own


def _by_cudnn(operation: Conv, unet: UNet, dtype: torch.dtype) -> Run:
    """PyTorch's convolution and what follows it, and our norms."""
    from fastddpm_kernels.group_norm import launch_group_norm

    plain = on_torch.MAKERS[Conv](replace(operation, norms=(), raw=True), unet, dtype)
    affines = [_affine(norm, unet) for norm in operation.norms]

    def run(outs: list[Tensor], given: Inputs, memory: Memory) -> None:
        residual = None if given.residual is None else _nchw(given.residual)
        seen = Inputs([_nchw(x) for x in given.sources], given.rows, residual, [_nchw(x) for x in given.past])
        y = plain(seen)[0].permute(0, 2, 3, 1).contiguous()
        if operation.raw:
            outs[0].copy_(y)
        for norm, (weight, bias, eps), out in zip(operation.norms, affines, outs[operation.raw :], strict=True):
            scale, shift = _modulation(norm, given.rows)
            options: dict[str, Any] = dict(groups=norm.groups, eps=eps, silu=norm.silu)
            launch_group_norm(y, None, out, weight, bias, scale=scale, shift=shift, **options)

    return run


def _nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _conv(operation: Conv, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.conv_reference import pack_weight, phase_weights

    module: Any = unet.get_submodule(operation.name)
    if _cudnn_is_faster(operation, module.weight.device, dtype):
        return _by_cudnn(operation, unet, dtype)
    bias, packed = _float(module.bias), None
    if operation.shortcut:
        shortcut: Any = unet.get_submodule(operation.shortcut_name)
        packed, bias = pack_weight(shortcut.weight.detach(), dtype), bias + _float(shortcut.bias)
    weight = (phase_weights if operation.up else pack_weight)(module.weight.detach(), dtype)
    options = dict(shortcut_weight=packed, stride=operation.stride, padding=operation.padding)
    return _product(operation, unet, weight, bias, **options)


def _linear(operation: Linear, unet: UNet, dtype: torch.dtype) -> Run:
    """A product with nothing behind it but a residual; else a 1x1 convolution, whose program is twice as long."""
    from fastddpm_kernels.conv_reference import pack_weight
    from fastddpm_kernels.linear import launch_linear

    modules: list[Any] = [unet.get_submodule(name) for name in operation.names]
    whole = torch.cat([module.weight for module in modules]).detach()
    bias = _float(torch.cat([module.bias for module in modules]))
    if operation.norms:
        return _product(operation, unet, pack_weight(whole[:, :, None, None], dtype), bias)
    weight = whole.to(dtype).T.contiguous()

    def run(outs: list[Tensor], given: Inputs, memory: Memory) -> None:
        launch_linear(given.sources[0], weight, bias, outs[0], residual=given.residual, factor=operation.scale)

    return run


def _attention(operation: Attention, unet: UNet, dtype: torch.dtype) -> Run:
    from fastddpm_kernels.attention import attention_tiles, launch_attention

    value, fits = operation.out, True
    try:
        attention_tiles(value.height * value.width, value.channels // operation.heads, dtype.itemsize)
    except ValueError:  # a head too wide for the kernel, such as 512 in float32
        fits = False

    def run(outs: list[Tensor], given: Inputs, memory: Memory) -> None:
        if fits:
            launch_attention(given.sources[0], outs[0], heads=operation.heads)
        else:
            outs[0].copy_(attended(given.sources[0], operation.heads))

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

"""The operations in PyTorch's own kernels, on activations in channels_last: what runs where Triton's don't.

On a CPU the convolutions are oneDNN's, with the weights laid out for it once: `torch.conv2d` does that in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..unet import UNet
from .operations import Attention, Conv, Linear, Norm, Operation, Product


class Inputs(NamedTuple):
    """What an operation reads."""

    sources: list[Tensor]
    rows: Tensor  # of time
    residual: Tensor | None
    past: list[Tensor]  # the shortcut's sources

    def sample(self) -> Tensor:
        """The sources as one tensor, NCHW."""
        return self.sources[0] if len(self.sources) == 1 else torch.cat(self.sources, dim=1)


Run = Callable[[Inputs], list[Tensor]]  # returns what the operation writes


def _norm(operation: Norm, unet: UNet, dtype: torch.dtype) -> Run:
    normed = _normed(operation, unet, dtype)

    def run(given: Inputs) -> list[Tensor]:
        return [normed(given.sample(), given.rows)]

    return run


def _normed(norm: Norm, unet: UNet, dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """The norm as a function of what is normalised, and of the time rows."""
    module: Any = unet.get_submodule(norm.name)
    own = slice(norm.first, norm.first + norm.channels_in)  # of the module's channels
    weight, bias = (p.detach()[own].to(dtype, copy=True) for p in (module.weight, module.bias))

    def run(x: Tensor, rows: Tensor) -> Tensor:
        y = F.group_norm(x, norm.groups, weight, bias, module.eps)
        if norm.time is not None:
            scale, shift = rows[:, norm.time, None, None].to(dtype).chunk(2, dim=1)
            y = torch.addcmul(shift, y, 1 + scale)
        return F.silu(y, inplace=True) if norm.silu else y

    return run


def _finished(operation: Product, unet: UNet, dtype: torch.dtype) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """What the operation writes, as a function of its product's sum (overwritten), and of the time rows."""
    norms = [_normed(norm, unet, dtype) for norm in operation.norms]

    def run(y: Tensor, rows: Tensor) -> list[Tensor]:
        y = y if operation.scale == 1.0 else y.mul_(operation.scale)
        return ([y] if operation.raw else []) + [norm(y, rows) for norm in norms]

    return run


def _conv(operation: Conv, unet: UNet, dtype: torch.dtype) -> Run:
    pad, stride = operation.padding, operation.stride
    module: Any = unet.get_submodule(operation.name)
    convolve = convolution(module.weight, module.bias, dtype, (stride, stride), (pad, pad))
    finished = _finished(operation, unet, dtype)
    shortcuts: list[Callable[[Tensor], Tensor]] = []
    if operation.shortcut:
        whole: Any = unet.get_submodule(operation.shortcut_name)
        parts = whole.weight.split([source.channels for source in operation.shortcut], dim=1)
        shortcuts = [convolution(part, None if i else whole.bias, dtype) for i, part in enumerate(parts)]

    def run(given: Inputs) -> list[Tensor]:
        x = given.sample()
        if operation.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif stride == 2 and pad == 0:
            x = F.pad(x, (0, 1, 0, 1))
        y = convolve(x)
        if operation.time is not None:
            y += given.rows[:, operation.time, None, None].to(dtype)
        if given.residual is not None:
            y += given.residual
        for shortcut, source in zip(shortcuts, given.past, strict=True):
            y += shortcut(source)
        return finished(y, given.rows)

    return run


def convolution(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
) -> Callable[[Tensor], Tensor]:
    """The convolution with these weights, [c_out, c_in, h, w]: copies of them, laid out for oneDNN where that is it."""
    weight = weight.detach().to(dtype, copy=True, memory_format=torch.channels_last)
    bias = None if bias is None else bias.detach().to(dtype, copy=True)
    if packs(weight):
        return _Packed(weight, bias, stride, padding)
    return partial(F.conv2d, weight=weight, bias=bias, stride=stride, padding=padding)


class _Packed:
    """oneDNN's convolution, its weight laid out for images of the size that came last.

    The layout depends on the size, not on the batch. A wrong one is put right in each call, one number after another:
    for 256 to 96 channels at 8x8 that takes 17 ms, and the convolution 0.3 (bfloat16, one thread of an AMD EPYC).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> None:
        self._plain, self._bias = weight.contiguous().to_mkldnn(), bias
        self._where = list(padding), list(stride), [1, 1], 1
        self._packed: tuple[torch.Size, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        packed = self._packed
        if packed is None or packed[0] != x.shape[2:]:
            packed = self._packed = x.shape[2:], self._laid_out(list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, packed[1], self._bias, *self._where, "none", [], "")

    def _laid_out(self, size: list[int]) -> Tensor:
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        return reorder(self._plain, *self._where, size)


def packs(weight: Tensor) -> bool:
    """Whether oneDNN does its convolutions, and takes a weight that was laid out before."""
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and has_onednn()


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def _linear(operation: Linear, unet: UNet, dtype: torch.dtype) -> Run:
    modules: list[Any] = [unet.get_submodule(name) for name in operation.names]
    weight, bias = (torch.cat([getattr(m, part) for m in modules]).detach().to(dtype) for part in ("weight", "bias"))
    finished = _finished(operation, unet, dtype)

    def run(given: Inputs) -> list[Tensor]:
        y = F.linear(given.sources[0].permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
        if given.residual is not None:
            y += given.residual
        return finished(y, given.rows)

    return run


def _attention(operation: Attention, unet: UNet, dtype: torch.dtype) -> Run:
    def run(given: Inputs) -> list[Tensor]:
        return [attended(given.sources[0].permute(0, 2, 3, 1), operation.heads).permute(0, 3, 1, 2)]

    return run


def attended(packed: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of q, k and v packed along the channels: [B, H, W, 3 C] -> [B, H, W, C]."""
    batch, height, width, channels = packed.shape
    tokens = packed.reshape(batch, height * width, 3, heads, channels // (3 * heads))
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    made = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # [B, T, heads, d]
    return made.reshape(batch, height, width, channels // 3)


# Each makes the function that does its operation, of (operation, unet, dtype), with the weights in it.
MAKERS: dict[type[Operation], Callable[..., Run]] = {
    Norm: _norm,
    Conv: _conv,
    Linear: _linear,
    Attention: _attention,
}

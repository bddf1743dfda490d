"""The operations in PyTorch's own kernels, on [B, C, 1, L] activations in channels_last.

On a CPU the convolutions are oneDNN's, as images of height 1, with the weights laid out for it once: `nn.Conv1d` does
that in each call, which at batch 1 takes longer than the convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels.conv1d_reference import transposed_phases
from torch import Tensor, nn

from ..on_torch import convolution, packs
from .lowering import Conv1d

PART = 256  # channels
# Of sources, FiLM rows and residual.
Run = Callable[[list[Tensor], Tensor, Tensor | None], Tensor]


def maker(operation: Conv1d, module: nn.Module, dtype: torch.dtype) -> Run:
    """The function that does an operation, with its weights, in `dtype`, in it."""
    layer: Any = module.get_submodule(operation.name)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if operation.up:
        weight, bias = torch.cat(transposed_phases(weight)[::-1]), torch.cat([bias, bias])
    padding = 1 if operation.up else operation.kernel // 2
    convolve = _in_parts(weight[:, :, None].to(dtype), bias, dtype, operation.stride, padding)
    finish = _finished(operation, module, dtype)

    def run(sources: list[Tensor], rows: Tensor, residual: Tensor | None) -> Tensor:
        y = convolve(sources[0] if len(sources) == 1 else torch.cat(sources, dim=1))
        if operation.up:
            y = _interleaved(y)
        return finish(y, rows, residual)

    return run


def _interleaved(y: Tensor) -> Tensor:
    """[B, 2 C, 1, L + 1] -> [B, C, 1, 2 L], for channels (odd phase, even phase).

    Column m of y has the positions 2 m - 1 and 2 m: in memory they lie in order, and the first and the last are not.
    """
    batch, both, _, more = y.shape
    lines = y.permute(0, 2, 3, 1).reshape(batch, 1, 2 * more, both // 2)
    return lines[:, :, 1:-1].permute(0, 3, 1, 2)


def _finished(operation: Conv1d, module: nn.Module, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What follows the convolution."""
    if not operation.norm:
        return lambda y, rows, residual: y
    norm: Any = module.get_submodule(operation.norm)
    weight, bias = (p.detach().to(dtype, copy=True) for p in (norm.weight, norm.bias))

    def finish(y: Tensor, rows: Tensor, residual: Tensor | None) -> Tensor:
        y = F.mish(F.group_norm(y, operation.groups, weight, bias, norm.eps), inplace=True)
        if operation.film is not None:
            film = rows[:, operation.film, None, None].to(dtype)
            if operation.modulates:
                scale, shift = film.chunk(2, dim=1)
                return torch.addcmul(shift, scale, y)
            y += film
        if residual is not None:
            y += residual
        return y

    return finish


def _in_parts(
    weight: Tensor, bias: Tensor, dtype: torch.dtype, stride: int, padding: int
) -> Callable[[Tensor], Tensor]:
    """A convolution; oneDNN's in float32 as the sum of some, of PART channels each.

    It adds all products one after another: of 2048 channels x 5 taps with four times the error of `nn.Conv1d` at batch
    8, in parts twice. (In bfloat16 each part would be rounded.)
    """
    where = (1, stride), (0, padding)
    if not (packs(weight) and dtype == torch.float32 and weight.shape[1] > PART):
        return convolution(weight, bias, dtype, *where)
    first, *others = weight.split(PART, dim=1)
    begin = convolution(first, bias, dtype, *where)
    more = [convolution(part, None, dtype, *where) for part in others]

    def convolve(x: Tensor) -> Tensor:
        given, *rest = x.split(PART, dim=1)
        y = begin(given)
        for part, values in zip(more, rest, strict=True):
            y += part(values)
        return y

    return convolve

"""The operations in fastddpm's own kernel, `conv1d`, on [B, 1, L, C] activations that lie where the plan says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastddpm_kernels import conv1d_tiles
from fastddpm_kernels.conv1d_reference import pack_conv1d
from torch import Tensor, nn

from ..plan import Plan
from .lowering import Conv1d, operations_of

# Of out, sources, FiLM rows, residual, and the scratch memory: partial sums, and counters that are zero.
Run = Callable[[Tensor, list[Tensor], Tensor, Tensor | None, Tensor, Tensor], None]


def fits(operation: Conv1d) -> bool:
    """Whether the kernel takes it: trajectories, and a norm's groups, may be too long for one tile."""
    return conv1d_tiles.fits(operation.out.width // (2 if operation.up else 1), _group(operation))


def maker(operation: Conv1d, module: nn.Module, dtype: torch.dtype) -> Run:
    """The function that does an operation, with its weights, in `dtype`, in it."""
    from fastddpm_kernels.conv1d import launch_conv1d

    layer: Any = module.get_submodule(operation.name)
    sources = tuple(value.channels for value in operation.sources)
    weight = pack_conv1d(layer.weight.detach(), sources, group=_group(operation), up=operation.up, dtype=dtype)
    bias = _float(layer.bias)
    options: dict[str, Any] = dict(stride=operation.stride)
    if operation.norm:
        norm: Any = module.get_submodule(operation.norm)
        options |= dict(norm=(_float(norm.weight), _float(norm.bias)), groups=operation.groups, eps=norm.eps)

    def run(
        out: Tensor, sources: list[Tensor], rows: Tensor, residual: Tensor | None, partial: Tensor, counters: Tensor
    ) -> None:
        launch_conv1d(
            sources[0][:, 0],
            weight,
            bias,
            out[:, 0],
            second=sources[1][:, 0] if len(sources) > 1 else None,
            film=None if operation.film is None else rows[:, operation.film],
            residual=None if residual is None else residual[:, 0],
            partial=partial,
            counters=counters,
            **options,
        )

    return run


def scratch_of(plan: Plan, dtype: torch.dtype) -> tuple[int, list[slice]]:
    """For each operation its counters; and the partial sums' elements, which they use one after another."""
    from fastddpm_kernels import conv1d

    partial = 0
    counters: list[slice] = []
    for operation in operations_of(plan.lowered):
        needed, count = conv1d.scratch_of(
            plan.batch,
            operation.out.width,
            tuple(value.channels for value in operation.sources),
            operation.out.channels,
            2 if operation.up else operation.kernel,
            group=_group(operation),
            up=operation.up,
            dtype=dtype,
        )
        partial, start = max(partial, needed), counters[-1].stop if counters else 0
        counters.append(slice(start, start + count))
    return partial, counters


def _group(operation: Conv1d) -> int:
    return operation.out.channels // operation.groups if operation.norm else 0


def _float(parameter: Tensor) -> Tensor:
    """A copy in float32, contiguous."""
    return parameter.detach().float().clone()

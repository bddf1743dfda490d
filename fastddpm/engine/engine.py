"""`Engine`: a UNet lowered to fused operations, as a model to sample with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..graphs import RecentlyUsed
from ..unet import UNet
from . import on_torch, on_triton
from .lowering import uses
from .operations import Conv, Linear, Operation
from .plan import Plan
from .time_path import TimePath


class Engine(nn.Module):
    """A UNet that runs fast: ``Sampler(engine.compile(unet, batch=16), table)``. ``print(engine)`` shows its plan.

    The weights are copies: `compile` again after changing those of the UNet. No gradients.

    Args:
        unet: our `UNet`; read a checkpoint of diffusers' UNet2DModel with `UNet.from_pretrained`.
        batch: images a call, for the plan; calls with others are allowed.
        size: (H, W) of the images, for the plan; None: the config's `sample_size`. Others are allowed in a call.
        dtype: of weights and activations; with float64, and on a CPU, the operations are PyTorch's, else the kernels'.
            Sums are float32.
        steps: how many time steps the model was trained with: the time path is computed for these now.
        kernels: whether to use fastddpm's kernels; None: where they run.

    Raises:
        InputError: for a model that is no `UNet`, another dtype, or a size that the network doesn't take.
    """

    def __init__(
        self,
        unet: UNet,
        *,
        batch: int = 1,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        steps: int = 1000,
        kernels: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(unet, UNet):
            raise InputError(f"the model is a {type(unet).__name__}; needed: a fastddpm.UNet (UNet.from_pretrained)")
        if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise InputError(f"dtype is {dtype}; allowed: torch.bfloat16, torch.float16, torch.float32, torch.float64")
        for name, number in (("batch", batch), ("steps", steps)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is {number!r}; allowed: an integer of at least 1")
        height, width = size or (unet.config.sample_size or 0,) * 2
        unet.check_shape((unet.config.in_channels, height, width))
        self.config = unet.config
        self.check_shape = unet.check_shape
        self.plan = Plan.of(unet.config, batch, height, width, dtype.itemsize)
        lowered = self.plan.lowered
        self.time_path = TimePath(unet, lowered, steps)
        self.dtype_ = nn.Parameter(torch.empty(0, dtype=dtype, device=unet.conv_in.weight.device), requires_grad=False)
        self._own = self.dtype_.device.type != "cpu" and dtype != torch.float64 if kernels is None else kernels
        backend = on_triton if self._own else on_torch
        self._runs: list[Any] = [backend.prepared(operation, unet, dtype) for operation in lowered.operations]
        self._dies = {value.index: last for value, _, last in uses(lowered)}
        self._memory: RecentlyUsed[dict[int, Tensor]] = RecentlyUsed()

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.dtype_.dtype

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """What the UNet predicts, as it does: x [B, C, H, W], t a number or [B]; returns [B, out_channels, H, W].

        Raises what the UNet raises.
        """
        if x.ndim != 4:
            raise InputError(f"x has shape {tuple(x.shape)}; the UNet takes [batch, channels, height, width]")
        self.check_shape(x.shape[1:])
        rows = self.time_path(x.shape[0], t, class_labels)
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if not self._own:
            return self._by_torch(x, rows)
        memory = self._memory.get((tuple(x.shape), x.device), lambda: self._allocated(x))
        return self._by_kernels(x.permute(0, 2, 3, 1), rows.float(), dict(memory)).permute(0, 3, 1, 2)

    def _by_torch(self, x: Tensor, rows: Tensor) -> Tensor:
        lowered = self.plan.lowered
        values: dict[int, Tensor] = {lowered.given.index: x}
        for at, (operation, run) in enumerate(zip(lowered.operations, self._runs, strict=True)):
            values[operation.out.index] = run(*_read(operation, values, rows))
            for value in operation.reads:
                if self._dies.get(value.index) == at:
                    del values[value.index]
        return values[lowered.out.index]

    def _by_kernels(self, x: Tensor, rows: Tensor, values: dict[int, Tensor]) -> Tensor:
        lowered = self.plan.lowered
        values |= {lowered.given.index: x, lowered.out.index: torch.empty_like(values[lowered.out.index])}
        for operation, run in zip(lowered.operations, self._runs, strict=True):
            run(values[operation.out.index], *_read(operation, values, rows))
        return values[lowered.out.index]

    def _allocated(self, x: Tensor) -> dict[int, Tensor]:
        """One block of memory, and in it each value, [B, H, W, C], by its index."""
        batch, _, height, width = x.shape
        plan = Plan.of(self.config, batch, height, width, self.dtype.itemsize)
        block = torch.empty(plan.memory, dtype=torch.uint8, device=x.device)
        made = {}
        for operation in plan.lowered.operations:
            out, start = operation.out, plan.offsets[operation.out.index]
            shape = (batch, out.height, out.width, out.channels)
            part = block[start : start + math.prod(shape) * plan.width]
            made[out.index] = part.view(self.dtype).view(shape)
        return made

    def __repr__(self) -> str:
        return str(self.plan)


def _read(
    operation: Operation, values: dict[int, Tensor], rows: Tensor
) -> tuple[list[Tensor], Tensor, Tensor | None, list[Tensor]]:
    """What an operation's function is given: sources, time rows, residual, sources of the shortcut."""
    residual = operation.residual if isinstance(operation, Conv | Linear) else None
    shortcut = operation.shortcut if isinstance(operation, Conv) else ()
    return (
        [values[value.index] for value in operation.sources],
        rows,
        None if residual is None else values[residual.index],
        [values[value.index] for value in shortcut],
    )

"""`Engine`: a UNet lowered to fused operations, as a model to sample with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..unet import UNet
from . import on_torch
from .lowering import uses
from .operations import Conv, Linear, Operation, Value
from .plan import Plan
from .time_path import TimePath


class Engine(nn.Module):
    """A UNet that runs fast: ``Sampler(engine.compile(unet, batch=16), table)``. ``print(engine)`` shows its plan.

    The weights are copies: `compile` again after changing those of the UNet. No gradients.

    Args:
        unet: our `UNet`; read a checkpoint of diffusers' UNet2DModel with `UNet.from_pretrained`.
        batch: images a call, for the plan; calls with others are allowed.
        size: (H, W) of the images, for the plan; None: the config's `sample_size`. Others are allowed in a call.
        dtype: of weights and activations. Sums in them are float32.
        steps: how many time steps the model was trained with: the time path is computed for these now.

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
        self._runs = [on_torch.prepared(operation, unet, dtype) for operation in lowered.operations]
        self._dies = {value.index: last for value, _, last in uses(lowered)}

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
        x = x.to(self.dtype, memory_format=torch.channels_last)
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        values: dict[int, Tensor] = {self.plan.lowered.given.index: x}
        for at, (operation, run) in enumerate(zip(self.plan.lowered.operations, self._runs, strict=True)):
            residual, shortcut = _past(operation)
            values[operation.out.index] = run(
                [values[value.index] for value in operation.sources],
                rows,
                None if residual is None else values[residual.index],
                [values[value.index] for value in shortcut],
            )
            for value in operation.reads:
                if self._dies.get(value.index) == at:
                    del values[value.index]
        return values[self.plan.lowered.out.index]

    def __repr__(self) -> str:
        return str(self.plan)


def _past(operation: Operation) -> tuple[Value | None, tuple[Value, ...]]:
    residual = operation.residual if isinstance(operation, Conv | Linear) else None
    return residual, operation.shortcut if isinstance(operation, Conv) else ()

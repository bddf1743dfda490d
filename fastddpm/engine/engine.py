"""`Engine`: a UNet lowered to fused operations, as a model to sample with."""

from __future__ import annotations

from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from fastddpm_kernels.conv_tiles import TOGETHER
from torch import Tensor

from ..errors import InputError
from ..unet import UNet
from ..unet_config import UNetConfig
from . import on_torch, on_triton
from .base import Compiled, check_kernels_can_run, kernels_run
from .lowering import uses
from .on_torch import Inputs
from .operations import Conv, Operation, Product
from .plan import Plan
from .time_path import TimePath


class Engine(Compiled):
    """A UNet that runs fast: ``Sampler(engine.compile(unet, batch=16), table)``. ``print(engine)`` shows its plan.

    The weights are copies: `compile` again after changing or moving those of the UNet. It computes what the UNet does
    in eval mode, without dropout, gradients or autocast.

    Args:
        unet: our `UNet`; read a checkpoint of diffusers' UNet2DModel with `UNet.from_pretrained`.
        batch: images a call, for the plan; calls with others are allowed.
        size: (H, W) of the images; None: the config's `sample_size`. PyTorch's kernels take others too in a call.
        dtype: of weights and activations. Sums are float32 (float64 in float64).
        steps: how many time steps the model was trained with: the time path is computed for these now.
        kernels: whether to use fastddpm's kernels, else PyTorch's; None: on CUDA with Triton, but for float64 and for
            GPUs of fewer than 32 multiprocessors.

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
        if not isinstance(unet, UNet):
            raise InputError(
                f"the model is a {type(unet).__name__}; needed: a fastddpm.UNet "
                "(UNet.from_pretrained), or a policy's ConditionalUnet1D"
            )
        super().__init__(dtype, batch=batch, steps=steps)
        if size is None and unet.config.sample_size is None:
            raise InputError("the UNet's config has no sample_size: give size=(height, width) of the images")
        if size is not None and (not isinstance(size, tuple) or len(size) != 2):
            raise InputError(f"size is {size!r}; allowed: (height, width) of the images, or None")
        height, width = size or (unet.config.sample_size or 0,) * 2
        unet.check_shape((unet.config.in_channels, height, width))
        self.config = unet.config
        self.plan = Plan.of(unet.config, batch, height, width, dtype.itemsize)
        lowered = self.plan.lowered
        self.time_path = TimePath(unet, lowered, steps)
        self.check_shape = self.time_path.unet.check_shape
        self.place(unet.conv_in.weight.device, dtype)
        if kernels and dtype == torch.float64:
            raise InputError("the kernels take no torch.float64: leave kernels out, or give another dtype")
        self._own = self._uses_kernels(kernels)
        makers: Any = on_triton.MAKERS if self._own else on_torch.MAKERS
        with torch.no_grad():
            self._runs = [makers[type(operation)](operation, unet, dtype) for operation in lowered.operations]
        self._dies = {value.index: last for value, _, last in uses(lowered)}

    def _uses_kernels(self, asked: bool | None) -> bool:
        """Programs of an image wait for each other, so a GPU must run as many at once: a slice of one may not."""
        device, room = self.dtype_.device, TOGETHER
        if asked:
            check_kernels_can_run(device)
        if device.type == "cuda":
            room = torch.cuda.get_device_properties(device).multi_processor_count
        if asked and room < TOGETHER:
            raise InputError(f"the kernels need {TOGETHER} multiprocessors, {device} has {room}: leave kernels out")
        return kernels_run(device, self.dtype) and room >= TOGETHER if asked is None else asked

    @property
    def known_timesteps(self) -> int | None:
        """How many rows the table of time steps has; None for a network with classes, which has none."""
        return None if self.time_path.table is None else len(self.time_path.table)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """What the UNet predicts, as it does: x [B, C, H, W], t a number or [B]; returns [B, out_channels, H, W].

        Raises what the UNet raises.
        """
        if x.ndim != 4:
            raise InputError(f"x has shape {tuple(x.shape)}; the UNet takes [batch, channels, height, width]")
        self.check_shape(x.shape[1:])
        if self._own:
            self._check_size(*x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):  # the dtypes are the plan's
            rows = self.time_path(x.shape[0], t, class_labels)
            if self.config.center_input_sample:
                x = 2 * x - 1.0
            # not `to(memory_format=)`: it leaves a slice of a channels_last tensor as it is, with gaps
            x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
            if not self._own:
                return self._by_torch(x, rows)
            return self._by_kernels(x.permute(0, 2, 3, 1), rows.float()).permute(0, 3, 1, 2)

    def _check_size(self, height: int, width: int) -> None:
        """Which norms are made where, and what memory programs exchange, is the size's that was compiled for."""
        given = self.plan.lowered.given
        if (height, width) != (given.height, given.width):
            raise InputError(
                f"the images are {height} x {width}; this engine's kernels are for {given.height} x {given.width}: "
                f"engine.compile(unet, size=({height}, {width}))"
            )

    def _by_torch(self, x: Tensor, rows: Tensor) -> Tensor:
        lowered = self.plan.lowered
        values: dict[int, Tensor] = {lowered.given.index: x}
        for at, (operation, run) in enumerate(zip(lowered.operations, self._runs, strict=True)):
            made = run(_read(operation, values, rows))
            values.update((value.index, y) for value, y in zip(operation.writes, made, strict=True))
            for value in operation.reads:
                if self._dies.get(value.index) == at:
                    del values[value.index]
        return values[lowered.out.index]

    def _by_kernels(self, x: Tensor, rows: Tensor) -> Tensor:
        lowered, values = self.plan.lowered, self._allocated(x)
        values[lowered.given.index] = x
        memories = on_triton.memories(_scratch(self.config, *x.shape[:3], self.dtype.itemsize), x.device)
        for operation, run, memory in zip(lowered.operations, self._runs, memories, strict=True):
            run([values[value.index] for value in operation.writes], _read(operation, values, rows), memory)
        return values[lowered.out.index]

    def _allocated(self, x: Tensor) -> dict[int, Tensor]:
        """Memory for each value, [B, H, W, C], by its index: all in one block, but for the prediction.

        New in each call, from torch's allocator: a block that were kept would be written by two streams or threads at
        once, and one that is let go while a captured graph still writes to it would be another tensor's by then.
        """
        batch, height, width, _ = x.shape
        plan = _plan(self.config, batch, height, width, self.dtype.itemsize)
        block = torch.empty(plan.memory // plan.width, dtype=self.dtype, device=x.device)
        made = {}
        for out in chain.from_iterable(operation.writes for operation in plan.lowered.operations):
            shape = (batch, out.height, out.width, out.channels)
            strides = (out.elements, out.width * out.channels, out.channels, 1)
            made[out.index] = block.as_strided(shape, strides, plan.offsets[out.index] // plan.width)
        last = plan.lowered.out.index
        made[last] = torch.empty_like(made[last], memory_format=torch.contiguous_format)
        return made


_plan = lru_cache(maxsize=16)(Plan.of)  # by size and batch; for all engines and threads


@lru_cache(maxsize=16)
def _scratch(config: UNetConfig, batch: int, height: int, width: int, itemsize: int) -> list[tuple[int, int]]:
    return on_triton.scratch_of(_plan(config, batch, height, width, itemsize))


def _read(operation: Operation, values: dict[int, Tensor], rows: Tensor) -> Inputs:
    residual = operation.residual if isinstance(operation, Product) else None
    shortcut = operation.shortcut if isinstance(operation, Conv) else ()
    return Inputs(
        [values[value.index] for value in operation.sources],
        rows,
        None if residual is None else values[residual.index],
        [values[value.index] for value in shortcut],
    )

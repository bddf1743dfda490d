"""A convolution of a UNet's plan, with random numbers: ours, cuDNN's with what must stand beside it, and float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fastddpm_kernels import conv_reference
from fastddpm_kernels.conv_choice import ConvShape, gpu_of, rule, segments
from fastddpm_kernels.conv_tiles import Tile
from torch import Tensor

from benchmarks.cases import generator
from fastddpm.engine.on_triton import shape_of

SEEN = 2  # samples that are compared with float64
EPS = 1e-6  # of the norms


def shapes_of(operations: Iterable[Any], dtype: torch.dtype) -> list[ConvShape]:
    """The distinct convolutions of a plan (`Plan.lowered.operations`), in order; its projections are 1x1 ones."""
    found = [shape_of(operation, dtype) for operation in operations if operation.kind in ("conv", "linear")]
    return list(dict.fromkeys(found))


def flops(shape: ConvShape) -> int:
    """Of a sample, as the network has it: the doubled image's convolution with nine taps, not four."""
    sums = shape.kernel**2 * (shape.c0 + shape.c1) + shape.s0 + shape.s1
    return 2 * sums * shape.height * shape.width * shape.cout


@dataclass(frozen=True)
class Given:
    """One set of inputs, all NHWC."""

    x: Tensor
    second: Tensor | None
    row: Tensor | None
    residual: Tensor | None
    shortcut_x: Tensor | None
    shortcut_second: Tensor | None


class Problem:
    """A shape at a batch, on a device: sets of inputs, and the ways to make the output.

    Args:
        sets: of inputs; a call takes one after the other, as in a network whose activations aren't always the same.
        calls: a way's index goes up to here; each has counters of its own.
    """

    def __init__(self, shape: ConvShape, batch: int, device: torch.device, *, sets: int = 3, calls: int = 1) -> None:
        self.shape, self.batch, self.device = shape, batch, device
        self.dtype: torch.dtype = getattr(torch, shape.dtype)
        self._random = generator(device, 0)
        inputs = shape.c0 + shape.c1
        deviation = (shape.kernel**2 * inputs) ** -0.5
        self.weight = (self._normal(shape.cout, inputs, shape.kernel, shape.kernel) * deviation).to(self.dtype)
        self.bias = 0.1 * self._normal(shape.cout)
        self.shortcut: Tensor | None = None
        if shape.s0:
            past = shape.s0 + shape.s1
            self.shortcut = (self._normal(shape.cout, past, 1, 1) * past**-0.5).to(self.dtype)
        self.norm = (1 + 0.1 * self._normal(shape.cout), 0.1 * self._normal(shape.cout))
        self.given = [self._set() for _ in range(sets)]
        pack = conv_reference.phase_weights if shape.up else conv_reference.pack_weight
        self.packed = pack(self.weight)
        self.packed_shortcut = None if self.shortcut is None else conv_reference.pack_weight(self.shortcut)
        self._wide = self.weight.contiguous(memory_format=torch.channels_last)
        self._row_bias, self._bias = self.bias.to(self.dtype), None if shape.row else self.bias.to(self.dtype)
        image = (batch, shape.height, shape.width, shape.cout)
        self.out = torch.zeros(image, dtype=self.dtype, device=device) if shape.raw else None
        self.normed = [torch.zeros(image, dtype=self.dtype, device=device) for _ in shape.norms]
        self._scratch(calls)

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, generator=self._random)

    def _image(self, height: int, width: int, channels: int) -> Tensor | None:
        return self._normal(self.batch, height, width, channels).to(self.dtype) if channels else None

    def _set(self) -> Given:
        s = self.shape
        grow, shrink = (s.stride, 1) if not s.up else (1, 2)
        height, width = s.height * grow // shrink, s.width * grow // shrink
        x = self._image(height, width, s.c0)
        if x is None:
            raise ValueError(f"{s.key}: a convolution needs a source")
        return Given(
            x,
            self._image(height, width, s.c1),
            self._normal(self.batch, s.cout) if s.row else None,
            self._image(s.height, s.width, s.cout if s.residual else 0),
            self._image(s.height, s.width, s.s0),
            self._image(s.height, s.width, s.s1),
        )

    def _scratch(self, calls: int) -> None:
        from fastddpm_kernels.conv_norm import conv_scratch

        s = self.shape
        need = conv_scratch(self.batch, s.height * s.width, s.cout, s.norms, up=s.up)
        self.workspace = torch.empty(need.floats, device=self.device) if need.floats else None
        self.counters = torch.zeros(calls, need.counters, dtype=torch.int32, device=self.device)

    @property
    def rule(self) -> Tile:
        """The rule's tile, whatever the GPU's table says."""
        return rule(gpu_of(self.device), self.shape, self.batch, segments(self.shape))

    def own(self, at: int = 0, tile: Tile | None = None, split: bool | None = None) -> list[Tensor]:
        """Our convolution, of set `at`: returns its outputs, which the next call overwrites."""
        from fastddpm_kernels.conv import launch_conv
        from fastddpm_kernels.conv_norm import NormOut

        if at == 0:
            self.counters.zero_()
        s, g = self.shape, self.given[at % len(self.given)]
        launch_conv(
            g.x,
            self.packed,
            self.bias,
            self.out,
            second=g.second,
            row=g.row,
            residual=g.residual,
            shortcut_x=g.shortcut_x,
            shortcut_second=g.shortcut_second,
            shortcut_weight=self.packed_shortcut,
            stride=s.stride,
            padding=s.padding,
            norms=[NormOut(to, *self.norm, group, EPS) for to, group in zip(self.normed, s.norms, strict=True)],
            workspace=self.workspace,
            counters=self.counters[at] if self.counters.shape[1] else None,
            tile=tile,
            split=split,
        )
        return [*([] if self.out is None else [self.out]), *self.normed]

    def cudnn(self, at: int = 0) -> list[Tensor]:
        """PyTorch's convolution in channels_last, and one kernel for each thing more; the norms are our kernel's.

        On a CPU it is oneDNN's, and the norms are PyTorch's.
        """
        s, g = self.shape, self.given[at % len(self.given)]
        x = _joined(g.x, g.second)
        if s.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        pad = s.kernel // 2
        if s.stride == 2:
            x, pad = (x, 1) if s.padding else (F.pad(x, (0, 1, 0, 1)), 0)
        y = F.conv2d(x, self._wide, self._bias, stride=s.stride, padding=pad)
        if g.row is not None:
            y += (g.row.to(self.dtype) + self._row_bias)[:, :, None, None]
        if g.residual is not None:
            y += g.residual.permute(0, 3, 1, 2)
        if self.shortcut is not None and g.shortcut_x is not None:
            y += F.conv2d(_joined(g.shortcut_x, g.shortcut_second), self.shortcut)
        y = y.permute(0, 2, 3, 1)
        normed = [self._normed(y, to, group) for to, group in zip(self.normed, s.norms, strict=True)]
        return [*([y] if s.raw else []), *normed]

    def _normed(self, y: Tensor, to: Tensor, group: int) -> Tensor:
        weight, bias = self.norm
        if self.device.type == "cpu":
            return _silu_norm(y, weight.to(y.dtype), bias.to(y.dtype), group)
        from fastddpm_kernels.group_norm import launch_group_norm

        launch_group_norm(y, None, to, weight, bias, groups=self.shape.cout // group, eps=EPS)
        return to

    def exact(self) -> list[Tensor]:
        """Of the first set's first samples, float64."""
        g, few = self.given[0], slice(SEEN)

        def head(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[few]

        y = conv_reference.conv(
            g.x[few],
            conv_reference.pack_weight(self.weight) if not self.shape.up else _phases64(self.weight),
            self.bias,
            second=head(g.second),
            row=head(g.row),
            residual=head(g.residual),
            shortcut_x=head(g.shortcut_x),
            shortcut_second=head(g.shortcut_second),
            shortcut_weight=self.packed_shortcut,
            stride=self.shape.stride,
            padding=self.shape.padding,
        )
        weight, bias = (v.double() for v in self.norm)
        return [*([y] if self.shape.raw else []), *(_silu_norm(y, weight, bias, group) for group in self.shape.norms)]

    def error(self, made: list[Tensor], exact: list[Tensor]) -> float:
        """Root mean square over the first samples, as a part of the output's: of the worst output. NaN is infinite."""
        worst = 0.0
        for got, expected in zip(made, exact, strict=True):
            off = (got[:SEEN].double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
            worst = max(worst, float(off) if bool(off.isfinite()) else float("inf"))
        return worst

    @property
    def bound(self) -> float:
        """What `error` may be: a few roundings to the dtype, each half an ulp at most."""
        return max(torch.finfo(self.dtype).eps, 2e-6)


def _joined(x: Tensor, second: Tensor | None) -> Tensor:
    """[B, C, H, W] in channels_last."""
    return (x if second is None else torch.cat([x, second], dim=3)).permute(0, 3, 1, 2)


def _silu_norm(y: Tensor, weight: Tensor, bias: Tensor, group: int) -> Tensor:
    x = y.permute(0, 3, 1, 2)
    return F.silu(F.group_norm(x, x.shape[1] // group, weight, bias, EPS)).permute(0, 2, 3, 1)


def _phases64(weight: Tensor) -> Tensor:
    """The oracle's, without the rounding of the sums of weights."""
    return conv_reference.phase_weights(weight, torch.float64)

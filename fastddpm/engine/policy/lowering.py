"""From a policy's UNet to a flat list of operations: a value is [1, L, C] of a trajectory, channels adjacent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ...errors import InputError
from ..lowering import Lowered
from ..operations import Operation, Value
from .network import Block, Level, Network, Residual


@dataclass(frozen=True)
class Conv1d(Operation):
    """A convolution along the trajectory, + bias; then GroupNorm and Mish; then FiLM, or + residual."""

    kernel: int = 5
    stride: int = 1
    up: bool = False  # the transposed one, of 4 taps, that doubles the length: 2 taps for each position
    norm: str = ""  # the GroupNorm's path; "": neither norm nor Mish
    groups: int = 1
    film: slice | None = None  # of the condition's rows: scale and shift, or shift alone, of each channel
    modulates: bool = False  # there is a scale
    residual: Value | None = None

    kind = "conv1d"

    @property
    def reads(self) -> tuple[Value, ...]:
        past = self.residual
        return self.sources if past is None or past in self.sources else (*self.sources, past)

    @property
    def weights(self) -> int:
        return ((4 if self.up else self.kernel) * self.channels_in + (3 if self.norm else 1)) * self.out.channels

    @property
    def flops(self) -> int:
        taps = 2 if self.up else self.kernel
        return (2 * taps * self.channels_in + (10 if self.norm else 0)) * self.out.elements

    def details(self) -> str:
        words = ["4, transposed" if self.up else f"{self.kernel}/2" if self.stride == 2 else f"{self.kernel}"]
        words += [f"{self.groups} groups, Mish"] if self.norm else []
        words += ["scale, shift" if self.modulates else "shift"] if self.film else []
        words += ["+ residual"] if self.residual else []
        return ", ".join(words)


def at_horizon(lowered: Lowered, horizon: int) -> Lowered:
    """The same operations for trajectories of another length, which the network must take."""

    def there(value: Value) -> Value:
        return replace(value, width=value.width * horizon // lowered.given.width)

    made = Lowered(there(lowered.given), [], lowered.time_names)
    for operation in operations_of(lowered):
        sources = tuple(there(value) for value in operation.sources)
        residual = None if operation.residual is None else there(operation.residual)
        made.operations.append(replace(operation, sources=sources, out=there(operation.out), residual=residual))
    return made


def operations_of(lowered: Lowered) -> list[Conv1d]:
    """The operations, which are all convolutions."""
    return [operation for operation in lowered.operations if isinstance(operation, Conv1d)]


def lower(network: Network, module: nn.Module, horizon: int) -> Lowered:
    """The operations for trajectories of `horizon` moments; `Lowered.time_names` has the FiLM layers' columns."""
    return _Walk(network, module, horizon).lowered()


class _Walk:
    def __init__(self, network: Network, module: nn.Module, horizon: int) -> None:
        self.network, self.module = network, module
        first: Any = module.get_submodule(network.downs[0].first.first.conv)
        self.made = Lowered(Value(0, 1, horizon, first.in_channels))

    def lowered(self) -> Lowered:
        x, skips = self.made.given, []
        for level in self.network.downs:
            x = self.level((x,), level)
            skips.append(x)
            x = self.conv(level.resample, (x,), stride=2) if level.resample else x
        for block in self.network.middle:
            x = self.residual((x,), block)
        for level in self.network.ups:
            x = self.level((x, skips.pop()), level)
            x = self.conv(level.resample, (x,), up=True) if level.resample else x
        x = self.block(self.network.last, (x,))
        self.conv(self.network.out, (x,))
        return self.made

    def level(self, sources: tuple[Value, ...], level: Level) -> Value:
        return self.residual((self.residual(sources, level.first),), level.second)

    def residual(self, sources: tuple[Value, ...], block: Residual) -> Value:
        film: Any = self.module.get_submodule(block.film)
        start = self.made.time_columns
        columns = self.made.time_names[block.film] = slice(start, start + film.out_features)
        if len(sources) > 1 and not block.shortcut:  # where a level is half as wide as the one above it
            path = block.film.removesuffix(".cond_encoder.1")
            raise InputError(f"two inputs pass {path} as they are, without a 1x1 convolution; keep the module itself")
        h = self.block(block.first, sources, film=columns)
        past = self.conv(block.shortcut, sources) if block.shortcut else sources[0]
        return self.block(block.second, (h,), residual=past)

    def block(self, block: Block, sources: tuple[Value, ...], film: slice | None = None, **options: Any) -> Value:
        norm: Any = self.module.get_submodule(block.norm)
        modulates = film is not None and film.stop - film.start == 2 * norm.num_channels
        options |= dict(norm=block.norm, groups=norm.num_groups, film=film, modulates=modulates)
        return self.conv(block.conv, sources, **options)

    def conv(
        self, name: str, sources: tuple[Value, ...], *, stride: int = 1, up: bool = False, **options: Any
    ) -> Value:
        layer: Any = self.module.get_submodule(name)
        length = 2 * sources[0].width if up else (sources[0].width - 1) // stride + 1
        out = Value(len(self.made.operations) + 1, 1, length, layer.out_channels)
        options |= dict(kernel=layer.kernel_size[0], stride=stride, up=up)
        self.made.operations.append(Conv1d(name, sources, out, **options))
        return out

"""From a `UNetConfig` to a flat list of operations: the walk of `UNet.forward`, with names instead of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..unet_config import UNetConfig
from .operations import Attention, Conv, Linear, Norm, Operation, Value


@dataclass
class Lowered:
    """A network for one image size.

    Attributes:
        operations: in the order of the computation; the first reads `given`.
        given: the image.
        time_names: the modules, Linear, whose outputs are the time rows, with the rows' columns of each.
    """

    given: Value
    operations: list[Operation] = field(default_factory=list)
    time_names: dict[str, slice] = field(default_factory=dict)

    @property
    def out(self) -> Value:
        """The prediction."""
        return self.operations[-1].out

    @property
    def time_columns(self) -> int:
        """Columns of the time rows."""
        return max((columns.stop for columns in self.time_names.values()), default=0)


def lower(config: UNetConfig, height: int, width: int) -> Lowered:
    """The operations of ``UNet(config)`` for images of this size (which `UNet.check_shape` allows)."""
    return _Walk(config, height, width).network()


class _Walk:
    def __init__(self, config: UNetConfig, height: int, width: int) -> None:
        self.config = config
        self.made = Lowered(Value(0, height, width, config.in_channels))
        self.values = 1

    def network(self) -> Lowered:
        config, widths = self.config, self.config.block_out_channels
        last = len(widths) - 1
        x = self.add(Conv, "conv_in", (self.made.given,), channels=widths[0])
        skips = [x]
        for i, channels in enumerate(widths):
            level, attends = f"down_blocks.{i}", config.down_block_types[i] == "AttnDownBlock2D"
            for j in range(config.layers_per_block):
                x = self.block(level, j, (x,), channels, attends)
                skips.append(x)
            if i < last:
                options = dict(stride=2, padding=config.downsample_padding)
                x = self.add(Conv, f"{level}.downsamplers.0.conv", (x,), channels=channels, shrink=2, **options)
                skips.append(x)
        x = self.middle(x, widths[-1])
        for i, channels in enumerate(reversed(widths)):
            level, attends = f"up_blocks.{i}", config.up_block_types[i] == "AttnUpBlock2D"
            for j in range(config.layers_per_block + 1):
                x = self.block(level, j, (x, skips.pop()), channels, attends)
            if i < last:
                x = self.add(Conv, f"{level}.upsamplers.0.conv", (x,), channels=channels, grow=2, up=True)
        x = self.add(Norm, "conv_norm_out", (x,), groups=config.norm_num_groups)
        self.add(Conv, "conv_out", (x,), channels=config.out_channels)
        return self.made

    def middle(self, x: Value, channels: int) -> Value:
        config = self.config
        scale = 1.0 / config.mid_block_scale_factor
        x = self.resnet("mid_block.resnets.0", (x,), channels, scale)
        if config.add_attention:
            x = self.attention("mid_block.attentions.0", x, config.mid_attention_groups, scale)
        return self.resnet("mid_block.resnets.1", (x,), channels, scale)

    def block(self, level: str, j: int, sources: tuple[Value, ...], channels: int, attends: bool) -> Value:
        x = self.resnet(f"{level}.resnets.{j}", sources, channels)
        return self.attention(f"{level}.attentions.{j}", x, self.config.norm_num_groups) if attends else x

    def resnet(self, name: str, sources: tuple[Value, ...], channels: int, scale: float = 1.0) -> Value:
        groups = self.config.norm_num_groups
        modulates = self.config.resnet_time_scale_shift == "scale_shift"
        time = self.time(f"{name}.time_emb_proj", 2 * channels if modulates else channels)
        h = self.add(Norm, f"{name}.norm1", sources, groups=groups)
        h = self.add(Conv, f"{name}.conv1", (h,), channels=channels, time=None if modulates else time)
        h = self.add(Norm, f"{name}.norm2", (h,), groups=groups, time=time if modulates else None)
        same = sum(source.channels for source in sources) == channels
        shortcut: dict[str, Any] = dict(shortcut=sources, shortcut_name=f"{name}.conv_shortcut")
        past = dict(residual=sources[0]) if same else shortcut
        return self.add(Conv, f"{name}.conv2", (h,), channels=channels, scale=scale, **past)

    def attention(self, name: str, x: Value, groups: int | None, scale: float = 1.0) -> Value:
        tokens = self.add(Norm, f"{name}.group_norm", (x,), groups=groups, silu=False) if groups else x
        parts = tuple(f"{name}.to_{part}" for part in "qkv")
        qkv = self.add(Linear, f"{name}.qkv", (tokens,), channels=3 * x.channels, names=parts)
        heads = x.channels // (self.config.attention_head_dim or x.channels)
        made = self.add(Attention, f"{name}.attention", (qkv,), channels=x.channels, heads=heads)
        names = (f"{name}.to_out.0",)
        return self.add(Linear, f"{name}.to_out", (made,), channels=x.channels, names=names, residual=x, scale=scale)

    def time(self, name: str, columns: int) -> slice:
        start = self.made.time_columns
        self.made.time_names[name] = slice(start, start + columns)
        return self.made.time_names[name]

    def add(
        self,
        kind: type[Operation],
        name: str,
        sources: tuple[Value, ...],
        *,
        channels: int | None = None,
        shrink: int = 1,
        grow: int = 1,
        **options: Any,
    ) -> Value:
        """Append an operation; returns its value."""
        first = sources[0]
        if channels is None:
            channels = sum(source.channels for source in sources)
        out = Value(self.values, first.height * grow // shrink, first.width * grow // shrink, channels)
        self.values += 1
        self.made.operations.append(kind(name, sources, out, **options))
        return out


def uses(lowered: Lowered) -> Iterator[tuple[Value, int, int]]:
    """(value, the operation that makes it, the last that reads it), by value; the prediction is read behind the end."""
    last = {lowered.out: len(lowered.operations)}
    for at, operation in enumerate(lowered.operations):
        for value in operation.reads:
            last[value] = max(last.get(value, 0), at)
    for at, operation in enumerate(lowered.operations):
        for value in operation.writes:
            yield value, at, last[value]

"""The architecture of a `UNet` as data: every field has a type and a range, and the size is known before it is built.

Plain Python: needs no torch.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from .errors import ConfigError

MAX_PARAMETERS = 2_000_000_000  # an untrusted config may not make us build more than this

_INT_RANGES = {
    "in_channels": (1, 1024),
    "out_channels": (1, 2048),
    "freq_shift": (0, 1),
    "layers_per_block": (1, 16),
    "downsample_padding": (0, 1),
    "norm_num_groups": (1, 1024),
}
_OPTIONAL_INTS = ("sample_size", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds")
_BOOLS = ("center_input_sample", "flip_sin_to_cos", "add_attention")
_FLOAT_RANGES = {"dropout": (0.0, 0.99), "norm_eps": (0.0, 1.0), "mid_block_scale_factor": (1e-3, 1e3)}
_LISTS = ("down_block_types", "up_block_types", "block_out_channels")

# Fields of UNet2DModel for which this UNet has one value; the first is what is written.
_FIXED_IN_DIFFUSERS: dict[str, tuple[Any, ...]] = {
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
    "num_train_timesteps": (None,),
}


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a `UNet`: the fields of diffusers' ``UNet2DModel`` that matter, with its defaults.

    Raises `ConfigError` where a field has a wrong type, is out of range, or contradicts another, and where the
    network would have more than 2e9 parameters.
    """

    sample_size: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    dropout: float = 0.0
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    num_class_embeds: int | None = None

    @property
    def time_embed_dim(self) -> int:
        """Width of the time embedding: four times the first level's."""
        return 4 * self.block_out_channels[0]

    @property
    def mid_attention_groups(self) -> int | None:
        """Groups of the GroupNorm before the lowest resolution's attention; None: it has no norm.

        With scale_shift, diffusers leaves this attention unnormalised unless attn_norm_num_groups is given.
        """
        if self.attn_norm_num_groups is None and self.resnet_time_scale_shift == "default":
            return self.norm_num_groups
        return self.attn_norm_num_groups

    @property
    def num_parameters(self) -> int:
        """How many parameters the network has, by arithmetic alone."""
        return _count_parameters(self)

    def __post_init__(self) -> None:
        for name in _LISTS:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (low, high) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        for name in _OPTIONAL_INTS:
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1, 65536, " or null")
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")
        for name, (least, most) in _FLOAT_RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                _refuse(name, value, f"a number in {least:g} ... {most:g}")
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            _refuse("resnet_time_scale_shift", self.resnet_time_scale_shift, "'default' or 'scale_shift'")
        self._check_levels()
        if self.num_parameters > MAX_PARAMETERS:
            raise ConfigError(
                f"UNet config: the network would have {self.num_parameters:.3g} parameters; "
                f"at most {MAX_PARAMETERS:.0e}: take fewer or smaller block_out_channels"
            )

    def _check_levels(self) -> None:
        widths = self.block_out_channels
        if not isinstance(widths, tuple) or not 1 <= len(widths) <= 8:
            _refuse("block_out_channels", widths, "a list of 1 to 8 widths")
        for name, allowed in (
            ("down_block_types", ("DownBlock2D", "AttnDownBlock2D")),
            ("up_block_types", ("UpBlock2D", "AttnUpBlock2D")),
        ):
            types = getattr(self, name)
            if not isinstance(types, tuple) or len(types) != len(widths) or any(t not in allowed for t in types):
                _refuse(name, types, f"{len(widths)} of {allowed}, one for each of block_out_channels")
        for width in widths:
            _check_int("block_out_channels", width, 4, 8192)
            if width % self.norm_num_groups:
                _refuse("norm_num_groups", self.norm_num_groups, f"a divisor of every width in {widths}")
        for width in sorted(self._attended_widths()):
            if self.attention_head_dim is not None and width % self.attention_head_dim:
                _refuse("attention_head_dim", self.attention_head_dim, f"null or a divisor of {width}")
        if self.attn_norm_num_groups is not None and widths[-1] % self.attn_norm_num_groups:
            _refuse("attn_norm_num_groups", self.attn_norm_num_groups, f"a divisor of the last width, {widths[-1]}")

    def _attended_widths(self) -> set[int]:
        """The widths of the levels that have self-attention."""
        widths = self.block_out_channels
        pairs = [*zip(self.down_block_types, widths, strict=True)]
        pairs += zip(self.up_block_types, reversed(widths), strict=True)
        return {width for kind, width in pairs if kind.startswith("Attn")} | (
            {widths[-1]} if self.add_attention else set()
        )

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> UNetConfig:
        """A config from a mapping; a field that isn't known is refused by name. Raises `ConfigError`."""
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(f"UNet config has no field {shown(name)}; it has {', '.join(known)}")
        return cls(**given)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """A config from diffusers' own JSON; what this UNet can't be is a `ConfigError` with its name and value."""
        values = {k: v for k, v in config.items() if not k.startswith("_")}
        for name, allowed in _FIXED_IN_DIFFUSERS.items():
            value = values.pop(name, allowed[0])
            if value not in allowed:
                _refuse(name, value, " or ".join("null" if a is None else repr(a) for a in allowed))
        embed_dim = values.pop("time_embedding_dim", None)
        size = values.get("sample_size")
        if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
            values["sample_size"] = size[0]
        made = cls.from_fields(values)
        if embed_dim not in (None, made.time_embed_dim):
            _refuse("time_embedding_dim", embed_dim, f"null or {made.time_embed_dim}")
        return made

    def to_diffusers(self) -> dict[str, Any]:
        """The JSON object that diffusers' ``UNet2DModel.from_config`` takes."""
        return {"_class_name": "UNet2DModel", **{k: v[0] for k, v in _FIXED_IN_DIFFUSERS.items()}, **asdict(self)}


def _count_parameters(config: UNetConfig) -> int:
    """The sum over the network's parts, in the order in which `UNet` builds them."""
    widths, layers, emb = config.block_out_channels, config.layers_per_block, config.time_embed_dim
    per_time = 2 if config.resnet_time_scale_shift == "scale_shift" else 1

    def conv(c_in: int, c_out: int, size: int = 3) -> int:
        return c_in * c_out * size * size + c_out

    def resnet(c_in: int, c_out: int) -> int:
        shortcut = conv(c_in, c_out, 1) if c_in != c_out else 0
        time = conv(emb, c_out * per_time, 1)
        return 2 * c_in + conv(c_in, c_out) + time + 2 * c_out + conv(c_out, c_out) + shortcut

    def attention(width: int, normed: bool = True) -> int:
        return 4 * conv(width, width, 1) + (2 * width if normed else 0)

    last = len(widths) - 1
    total = conv(config.in_channels, widths[0]) + conv(widths[0], emb, 1) + conv(emb, emb, 1)
    total += (config.num_class_embeds or 0) * emb
    for i, width in enumerate(widths):
        below, above = widths[max(i - 1, 0)], widths[min(i + 1, last)]
        total += resnet(below, width) + (layers - 1) * resnet(width, width)
        total += resnet(above + width, width) + (layers - 1) * resnet(2 * width, width) + resnet(width + below, width)
        total += attention(width) * layers * (config.down_block_types[i] == "AttnDownBlock2D")
        total += attention(width) * (layers + 1) * (config.up_block_types[last - i] == "AttnUpBlock2D")
        total += conv(width, width) * ((i < last) + (i > 0))
    total += 2 * resnet(widths[-1], widths[-1])
    total += attention(widths[-1], config.mid_attention_groups is not None) * config.add_attention
    return total + 2 * widths[0] + conv(widths[0], config.out_channels)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def shown(value: object) -> str:
    """A value of unknown origin as one short line, for an error's message."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # an int of more digits than Python prints
        text = f"some {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise ConfigError(f"UNet config: {name} is {shown(value)}; allowed: {allowed}")


def _check_int(name: str, value: object, low: int, high: int, more: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, value, f"an integer in {low} ... {high}{more}")

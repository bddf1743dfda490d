"""Weights folders in diffusers' layout: a config that is checked field by field, and safetensors.

Nothing in a folder is trusted: the config is strict JSON whose every field has a type and a range,
the weights' header is compared with the architecture before any tensor is read, and no code is run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .errors import CheckpointError, ConfigError, OutputError

if TYPE_CHECKING:
    from .unet import UNet

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
MAX_JSON_BYTES = 1 << 20  # a config has about 1 kB; a larger file is none
MAX_PARAMETERS = 2_000_000_000  # an untrusted config may not make us build more than this

# Attention had other names until diffusers 0.15; the published DDPM checkpoints still have those.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a `UNet`: the fields of diffusers' ``UNet2DModel`` that matter, with its defaults.

    Raises `ConfigError` where a field has a wrong type, is out of range, or contradicts another.
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

    def __post_init__(self) -> None:
        for name, (low, high) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        for name in ("sample_size", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1, 65536)
        for name in ("center_input_sample", "flip_sin_to_cos", "add_attention"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")
        for name, low, high in (("dropout", 0.0, 0.99), ("norm_eps", 0.0, 1.0), ("mid_block_scale_factor", 1e-3, 1e3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                _refuse(name, value, f"a number in {low:g} ... {high:g}")
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            _refuse("resnet_time_scale_shift", self.resnet_time_scale_shift, "'default' or 'scale_shift'")
        self._check_levels()

    def _check_levels(self) -> None:
        widths, down, up = self.block_out_channels, self.down_block_types, self.up_block_types
        if not isinstance(widths, tuple) or not 1 <= len(widths) <= 8:
            _refuse("block_out_channels", widths, "a list of 1 to 8 widths")
        for name, types, allowed in (
            ("down_block_types", down, ("DownBlock2D", "AttnDownBlock2D")),
            ("up_block_types", up, ("UpBlock2D", "AttnUpBlock2D")),
        ):
            if not isinstance(types, tuple) or len(types) != len(widths) or any(t not in allowed for t in types):
                _refuse(name, types, f"{len(widths)} of {allowed}, one for each of block_out_channels")
        for width in widths:
            _check_int("block_out_channels", width, 4, 8192)
            if width % self.norm_num_groups:
                _refuse("norm_num_groups", self.norm_num_groups, f"a divisor of every width in {widths}")
            if self.attention_head_dim is not None and width % self.attention_head_dim:
                _refuse("attention_head_dim", self.attention_head_dim, f"null or a divisor of every width in {widths}")
        if self.attn_norm_num_groups is not None and widths[-1] % self.attn_norm_num_groups:
            _refuse("attn_norm_num_groups", self.attn_norm_num_groups, f"a divisor of the last width, {widths[-1]}")

    @classmethod
    def from_fields(cls, given: Mapping[str, Any]) -> UNetConfig:
        """A config from a mapping: lists become tuples; a field that isn't known is refused by name."""
        known = {f.name for f in fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        for name in values.keys() - known:
            raise ConfigError(f"UNet config has no field {name!r}; it has {', '.join(sorted(known))}")
        return cls(**values)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> UNetConfig:
        """A config from diffusers' own JSON; what this UNet can't be is refused with its name and value."""
        values = {k: v for k, v in config.items() if not k.startswith("_")}
        for name, allowed in _FIXED_IN_DIFFUSERS.items():
            value = values.pop(name, allowed[0])
            if value not in allowed:
                _refuse(name, value, " or ".join(repr(a) for a in allowed))
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


_INT_RANGES = {
    "in_channels": (1, 1024),
    "out_channels": (1, 2048),
    "freq_shift": (0, 1),
    "layers_per_block": (1, 16),
    "downsample_padding": (0, 1),
    "norm_num_groups": (1, 1024),
}

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


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise ConfigError(f"UNet config: {name} is {shown}; allowed: {allowed}")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        _refuse(name, value, f"an integer in {low} ... {high}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Strict: no NaN, no duplicate keys. Raises `CheckpointError`."""

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key stands twice")
        return made

    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes().decode(), parse_constant=no_constant, object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON ({_reason(error)})") from error
    return value


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it: temporary file, fsync, rename. Raises `OutputError`."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"can't write {path}: {_reason(error)}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, with a newline at its end."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


_Net = TypeVar("_Net", bound="UNet")


def load_unet(cls: type[_Net], folder: Path) -> _Net:
    """Build `cls` from a folder in diffusers' layout; see `UNet.from_pretrained`."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not (folder / CONFIG_NAME).is_file() and (folder / "unet" / CONFIG_NAME).is_file():
        folder = folder / "unet"
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} holds no UNet: {name} is missing (expected {CONFIG_NAME} and {WEIGHTS_NAME})"
            )
    config = read_json(folder / CONFIG_NAME)
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise CheckpointError(f"{folder} holds a {config['_class_name']}, not a UNet2DModel")
    with torch.device("meta"):
        model = cls(UNetConfig.from_diffusers(config))
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    count = sum(p.numel() for p in model.parameters())
    if count > MAX_PARAMETERS:
        raise CheckpointError(f"{folder}: the config asks for {count:.3g} parameters; at most {MAX_PARAMETERS:.0e}")
    try:
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
            names = {_current_name(key): key for key in file.keys()}  # noqa: SIM118 (a handle, not a dict)
            shapes = {name: tuple(file.get_slice(key).get_shape()) for name, key in names.items()}
            _check_names(folder, expected, shapes)
            state = {name: file.get_tensor(key) for name, key in names.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: not a safetensors file ({_reason(error)})") from error
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) != 1 or not next(iter(dtypes)).is_floating_point:
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: weights are {sorted(map(str, dtypes))}; one float dtype only")
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _current_name(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new) if ".attentions." in key else key
    return key


def _check_names(folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    if expected == found:
        return
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{folder}: the weights are not this config's: {name} is "
                f"{found.get(name, 'missing')} in the file, {expected.get(name, 'absent')} in the network"
            )


def save_unet(model: UNet, folder: Path) -> None:
    """Write `model` to a folder in diffusers' layout; see `UNet.save_pretrained`."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
    write_json(folder / CONFIG_NAME, model.config.to_diffusers())

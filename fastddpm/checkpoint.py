"""Weights folders in diffusers' layout: a config that is checked field by field, and safetensors.

Nothing in a folder is trusted: the config is strict JSON whose every field has a type and a range,
the weights' header is compared with the architecture before any tensor is read, and no code is run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from .errors import CheckpointError, InputError, OutputError
from .unet_config import UNetConfig, shown

if TYPE_CHECKING:
    import torch

    from .unet import UNet

__all__ = ["UNetConfig", "load_unet", "read_json", "save_unet", "write_atomically", "write_json"]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PICKLED_NAMES = tuple(f"diffusion_pytorch_model{end}" for end in (".bin", ".pt", ".pth", ".ckpt"))
MAX_JSON_BYTES = 1 << 20  # a config has about 1 kB; a larger file is none
MAX_HEADER_BYTES = 4 << 20  # of a safetensors file; the largest network that a config allows needs 0.9 MB

# Attention had other names until diffusers 0.15; the published DDPM checkpoints still have those.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
FLOAT_NAMES = ("F16", "BF16", "F32", "F64")  # safetensors' names of the dtypes that weights may have


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file. Strict: no NaN, no key twice, at most 1 MiB. Raises `CheckpointError`."""

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            raise ValueError("a key stands twice")
        return made

    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(data.decode(), parse_constant=no_constant, object_pairs_hook=unique)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: can't be read as JSON ({_reason(error)})") from error
    return value


def _reason(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.splitlines()[0] if text else type(error).__name__


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that no reader ever sees a part of it: temporary file, fsync, rename. Raises `OutputError`.

    Makes the folders above it. A file that is there is replaced, or, where anything fails, left as it was.
    """
    write_all_atomically({path: data})


def write_all_atomically(files: Mapping[Path, bytes]) -> None:
    """`write_atomically` for several files: all data is on disk before the first of them gets its name."""
    staged: dict[Path, Path] = {}
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    path = Path()
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:64]}.", delete=False) as file:
                staged[path] = Path(file.name)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            staged[path].chmod(0o666 & ~mask)
        for path, temporary in staged.items():
            temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise OutputError(f"can't write {path}: {_reason(error)}") from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically, with a newline at its end. NaN and infinity are a ValueError."""
    write_atomically(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


_Net = TypeVar("_Net", bound="UNet")


def load_unet(cls: type[_Net], folder: Path, dtype: torch.dtype | None) -> _Net:
    """Build `cls` from a folder in diffusers' layout; see `UNet.from_pretrained`."""
    import torch
    from safetensors import SafetensorError

    if dtype is not None and dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise InputError(f"dtype is {dtype}; allowed: float16, bfloat16, float32, float64, or None for the file's own")
    folder = _find_folder(folder)
    config = read_json(folder / CONFIG_NAME)
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise CheckpointError(f"{folder} holds a {shown(kind)}; this reads a 'UNet2DModel'")
    checked = UNetConfig.from_diffusers(config)
    with torch.device("meta"):
        model = cls(checked)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    try:
        state = _read_tensors(folder / WEIGHTS_NAME, expected, dtype)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_NAME}: not a sound safetensors file ({_reason(error)})") from error
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _find_folder(folder: Path) -> Path:
    """The folder that has both files: `folder`, or its ``unet``. Raises `CheckpointError` where there is none."""
    if not os.path.isfile(folder / CONFIG_NAME) and os.path.isfile(folder / "unet" / CONFIG_NAME):
        folder = folder / "unet"
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder}: no such folder; a UNet is a folder with {CONFIG_NAME} and {WEIGHTS_NAME}")
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if os.path.isfile(folder / name):
            continue
        pickled = next((p for p in PICKLED_NAMES if os.path.isfile(folder / p)), None)
        if name == WEIGHTS_NAME and pickled:
            raise CheckpointError(
                f"{folder} has its weights in {pickled}, a pickle, which can run code; only safetensors are read: "
                "if you trust it, load it in diffusers and save_pretrained it again"
            )
        raise CheckpointError(f"{folder} holds no UNet: {name} is missing (expected {CONFIG_NAME} and {WEIGHTS_NAME})")
    return folder


def _read_tensors(
    path: Path, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file under their current names, once its header has been checked."""
    from safetensors import safe_open

    with path.open("rb") as raw:
        size = int.from_bytes(raw.read(8), "little")
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: its header has {size} bytes; at most {MAX_HEADER_BYTES}: no weights of a UNet")
    with safe_open(path, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (a handle, not a dict)
        names = {_current_name(key): key for key in slices}
        _check_shapes(path, expected, {name: tuple(slices[key].get_shape()) for name, key in names.items()})
        if len(names) != len(slices):
            raise CheckpointError(f"{path}: a tensor is there twice, under its old and its new name")
        kinds = sorted({piece.get_dtype() for piece in slices.values()})
        if len(kinds) != 1 or kinds[0] not in FLOAT_NAMES:
            raise CheckpointError(
                f"{path}: the tensors are {', '.join(kinds)}; allowed: one of {', '.join(FLOAT_NAMES)}"
            )
        # copy: the file's own pages may change under us
        state = {name: file.get_tensor(key).to(dtype=dtype, copy=True) for name, key in names.items()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"{path}: {name} has values that are not finite (as {tensor.dtype})")
    return state


def _current_name(key: str) -> str:
    for old, new in RENAMED.items():
        key = key.replace(old, new) if ".attentions." in key else key
    return key


def _check_shapes(path: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: the weights are not this config's: {shown(name)} is "
                f"{found.get(name, 'missing')} in the file, {expected.get(name, 'absent')} in the network"
            )


def save_unet(model: UNet, folder: Path) -> None:
    """Write `model` to a folder in diffusers' layout; see `UNet.save_pretrained`."""
    from safetensors.torch import save

    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_NAME, save(state, metadata={"format": "pt"}))
    write_json(folder / CONFIG_NAME, model.config.to_diffusers())

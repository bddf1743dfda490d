"""Where and how a model runs when the user leaves it to us: device, dtype, and a line that says which path that is."""

from __future__ import annotations

import importlib.util

import torch

from .errors import DeviceError, InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str = "auto") -> torch.device:
    """The device called "cpu" or "cuda"; "auto": the GPU where there is one. Raises `DeviceError` where there isn't."""
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"device is {name!r}; allowed: 'auto', 'cpu', 'cuda'")
    triton = importlib.util.find_spec("triton") is not None  # it is on Linux alone
    there = torch.cuda.is_available() and triton
    if name == "cuda" and not there:
        lacking = "torch finds no NVIDIA GPU" if triton else "triton is not installed"
        raise DeviceError(f"the device is cuda, but {lacking}; use the device cpu or auto")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called "float32" or "bfloat16"; "auto": bfloat16 where the device multiplies it in hardware.

    (On a CPU without such instructions bfloat16 is emulated, and slower than float32.)
    """
    if name == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}; allowed: 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[name]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    # torch has no public question for this; where the private ones are gone, float32 is right if not the fastest
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def describe(device: torch.device, dtype: torch.dtype, *, graph: bool = True) -> str:
    """The path that `Sampler` takes there, in words. `graph`: whether a CUDA graph could be captured."""
    model = f"{str(dtype).removeprefix('torch.')} channels_last"
    if device.type == "cpu":
        return f"cpu, reference kernels, {model}"
    loop = "CUDA graph" if graph else "eager loop"
    return f"{torch.cuda.get_device_name(device)}, Triton kernels, {loop}, {model}"

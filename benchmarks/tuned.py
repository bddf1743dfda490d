"""Tables of measured convolutions, `fastddpm_kernels.conv_choice`'s: written, and added to."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fastddpm_kernels import conv_choice

from benchmarks import results
from fastddpm.checkpoint import write_atomically
from fastddpm.errors import InputError

FOLDER = conv_choice.FOLDER
CLEARLY = 0.95  # cuDNN takes a shape over where it needs less than this part of our time


def gpu_name() -> str:
    """Torch's name of the GPU."""
    return torch.cuda.get_device_name()


def file_name() -> str:
    """Of this GPU's table."""
    return f"{conv_choice.slug(gpu_name())}.json"


def own(batches: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a shape is ours: cuDNN is not clearly faster in the geometric mean of the batches.

    One for all batches: another for each would make a sample's bits depend on its batch.
    """
    logs = [math.log(part["cudnn_us"] / part["us"]) for part in batches.values()]
    return sum(logs) / len(logs) >= math.log(CLEARLY)


def merged(table: Mapping[str, Any] | None, gpu: str, shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The table with batches of these shapes added, or measured again; `shapes`: {key: {batch: measurement}}.

    Raises `InputError` for another GPU's table.
    """
    if table is not None and table["gpu"] != gpu:
        raise InputError(f"the table is of {table['gpu']!r}, and this GPU is {gpu!r}: give another --out")
    made = {} if table is None else dict(table["shapes"])
    for key, batches in shapes.items():
        together = {**made.get(key, {}).get("batches", {}), **batches}
        ordered = dict(sorted(together.items(), key=lambda item: int(item[0])))
        made[key] = {"own": own(ordered), "batches": ordered}
    commit, dirty = results.commit()
    return {
        "format": conv_choice.FORMAT,
        "gpu": gpu,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "versions": {name: version(name) for name in ("torch", "triton")},
        "shapes": made,
    }


def add(path: Path, gpu: str, shapes: Mapping[str, Mapping[str, Any]]) -> None:
    """Add measurements to the file, which need not be there yet; written whole or not at all.

    Raises:
        InputError: what is there is no such table, or another GPU's; or what is added would make it none.
        OutputError: the file can't be written.
    """
    try:
        table = merged(conv_choice.read(path) if path.exists() else None, gpu, shapes)
        text = json.dumps(table, indent=1, allow_nan=False)
    except ValueError as error:
        raise InputError(str(error)) from error
    wrong = conv_choice.fault(table)
    if wrong is not None:
        raise InputError(f"the measurement is no table: {wrong}")
    write_atomically(path, text.encode() + b"\n")

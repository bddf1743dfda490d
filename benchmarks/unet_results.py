"""Files of figures of a GPU, `benchmarks/results/<gpu>/<kind>-<commit>.json`: written again as they grow."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from fastddpm_kernels.conv_choice import slug

from benchmarks import results
from benchmarks.measure import machine
from fastddpm.checkpoint import write_atomically
from fastddpm.errors import InputError

FORMAT = 1


def header(kind: str) -> dict[str, Any]:
    """What every file says of where its figures come from."""
    commit, dirty = results.commit()
    return {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "machine": machine(),
    }


def folder() -> Path:
    """``OUT``, or that of this device among the results."""
    given = os.environ.get("OUT")
    if given:
        return Path(given)
    return results.FOLDER / (slug(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu")


def write(record: dict[str, Any]) -> Path:
    """Write the record, whole or not at all; returns the file. Raises `InputError` for NaN, `OutputError`."""
    words = [record["kind"], (record["commit"] or "no commit")[:7], *(["dirty"] if record["dirty"] else [])]
    path = folder() / f"{slug(' '.join(words))}.json"
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError as error:
        raise InputError(f"a figure is NaN or infinite, and JSON has neither: nothing was written ({error})") from error
    write_atomically(path, text.encode() + b"\n")
    return path

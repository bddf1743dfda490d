"""Files of figures: strict JSON, one a machine and commit, written whole or not at all."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from fastddpm.checkpoint import write_atomically
from fastddpm.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks" / "results"
FORMAT = 2  # of the file; a change that old readers don't understand is the next


def commit(root: Path = ROOT) -> tuple[str | None, bool]:
    """(commit, whether files differ from it) of the tree at `root`; (None, False) where it is no git checkout.

    What the benchmarks themselves write (results, docs) doesn't count as a difference.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != root:
        return None, False
    changed = _git(root, "status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return _git(root, "rev-parse", "HEAD"), bool(changed)


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def file_name(record: dict[str, Any]) -> str:
    """Device, commit, and what else tells one run from another: ``cpu-amd-epyc-95acbf5.json``."""
    machine, made_of = record["machine"], record["commit"]
    device = f"cuda-{machine['gpu']}" if record["device"] == "cuda" else f"cpu-{machine['cpu']}"
    words = [device, made_of[:7] if made_of else "no-commit", *("dirty" for _ in range(record["dirty"]))]
    words += ["short" for _ in range(record["short"])]
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-") + ".json"


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Write a run into `folder`; returns the file.

    Raises:
        InputError: a figure is NaN or infinite: JSON has neither.
        OutputError: the file can't be written.
    """
    try:
        text = json.dumps(record, indent=1, allow_nan=False)
    except ValueError as error:
        raise InputError(f"a figure is NaN or infinite, and JSON has neither: nothing was written ({error})") from error
    path = folder / file_name(record)
    write_atomically(path, text.encode() + b"\n")
    return path


def read(path: Path) -> dict[str, Any]:
    """A run that `write` wrote; `InputError` for anything else."""

    def refuse(word: str) -> float:
        raise ValueError(f"{word} is no JSON")

    try:
        record = json.loads(path.read_bytes(), parse_constant=refuse)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} can't be read as a run of benchmarks/run.py: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("kind") != "kernels":
        raise InputError(f"{path} is no run of benchmarks/run.py (format {FORMAT}); write one with that")
    return record

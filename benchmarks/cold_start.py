"""How long from a process's beginning to its first samples, where nothing was compiled before.

    python -m benchmarks.cold_start ours --batch 1      # in this process, with whatever is in the caches

`timed` runs that in a process of its own, with empty folders for the caches of Triton, Inductor and CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")


def timed(name: str, batch: int, limit: float, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """{"seconds": of the process, "import_s": of that until torch was there}, or {"failed": why}."""
    # What compilers leave running may still write there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        return run(name, batch, limit, more, {cache: str(Path(empty) / cache) for cache in CACHES})


def run(
    name: str, batch: int, limit: float, more: tuple[str, ...] = (), sets: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """As `timed`, with the caches as they are, but for what `sets` says of the environment."""
    environment = {**os.environ, **(sets or {}), "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    words = [sys.executable, "-m", "benchmarks.cold_start", name, "--batch", str(batch), *more]
    # Files, not pipes: those would be open until the last of the compiler's own processes is gone.
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as wrong:
        begin = time.monotonic()
        try:
            done = subprocess.run(words, cwd=ROOT, env=environment, stdout=said, stderr=wrong, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {limit:.0f} s"}
        seconds = time.monotonic() - begin
        said.seek(0)
        wrong.seek(0)
        found = [line for line in said.read().splitlines() if line.startswith('{"import_s"')]
        errors = wrong.read().strip().splitlines()
    if done.returncode or not found:
        return {"failed": f"exit code {done.returncode}: {(errors or ['no message'])[-1][:300]}"}
    return {"seconds": seconds, **json.loads(found[-1])}


def main(words: list[str]) -> None:
    """Import, compile, sample once; says in JSON when torch was there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=("ours", "C1", "C2"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--small", action="store_true")  # for the test
    given, begin = parser.parse_args(words), time.monotonic()
    import torch

    imported = time.monotonic() - begin
    from benchmarks.unet_contenders import Contender, Documented, Ours, Whole
    from benchmarks.unet_networks import CIFAR, SMALL
    from benchmarks.unet_race import setting_of

    makers = {"ours": Ours, "C1": Documented, "C2": lambda setting: Whole(setting, "max-autotune")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        setting = setting_of(SMALL if given.small else CIFAR, given.batch, device, steps=10)
        contender: Contender = makers[given.name](setting)
        contender.prepare()
        float(contender.run().float().sum())  # waits
    print(json.dumps({"import_s": imported}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR")


def timed(name: str, batch: int, limit: float, more: tuple[str, ...] = ()) -> dict[str, Any]:
    """{"seconds": of the process, "import_s": of that until torch was there}, or {"failed": why}."""
    with tempfile.TemporaryDirectory() as empty:
        environment = os.environ | {cache: str(Path(empty) / cache) for cache in CACHES}
        environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
        words = [sys.executable, "-m", "benchmarks.cold_start", name, "--batch", str(batch), *more]
        begin = time.monotonic()
        try:
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done in {limit:.0f} s"}
        seconds = time.monotonic() - begin
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return {"seconds": seconds, **json.loads(done.stdout.strip().splitlines()[-1])}


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
    print(json.dumps({"import_s": imported}))


if __name__ == "__main__":
    main(sys.argv[1:])

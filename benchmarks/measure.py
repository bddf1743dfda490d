"""How every benchmark here measures: all contenders in one run, in rotated order; and on what machine that was."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


@dataclass
class Times:
    """Seconds of each call: by the clock (or a GPU's), and of processor time over all threads of this process."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median time of a call by the clock, in seconds."""
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        """Median processor time of a call, in seconds: it counts less of what other processes do to the clock."""
        return statistics.median(self.cpu)

    def decile(self, tenths: int) -> float:
        """The value that `tenths` tenths of the calls by the clock are at or below, in seconds; 1 ... 9."""
        if len(self.wall) == 1:
            return self.wall[0]
        return statistics.quantiles(self.wall, n=10, method="inclusive")[tenths - 1]


Timer = Callable[[Callable[[], object], Times], None]


def by_the_clock(call: Callable[[], object], times: Times) -> None:
    """Call once and add how long it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    times.cpu.append(time.process_time() - cpu)
    times.wall.append(time.perf_counter() - wall)


class Interleaved:
    """Contenders that are called in turn, each round beginning with another: slow spells fall on all of them alike."""

    def __init__(self, contenders: Mapping[str, Callable[[], object]], timer: Timer = by_the_clock) -> None:
        self.contenders = dict(contenders)
        self.times = {name: Times() for name in contenders}
        self.timer = timer
        self.rounds = 0

    def __call__(self) -> None:
        """One round."""
        names = list(self.contenders)
        first = self.rounds % max(1, len(names))
        self.rounds += 1
        for name in names[first:] + names[:first]:
            self.timer(self.contenders[name], self.times[name])


def keep_heap() -> bool:
    """Let glibc keep memory that was freed, where the C library is glibc: then True.

    Else a large temporary costs its page faults or doesn't, by what was freed before it: one eager step of 38 MB took
    20 ms kept, and 23 to 30 otherwise; another 8, and once 29.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    mmap_threshold, trim_threshold = -3, -1  # malloc.h; 32 MB is the greatest that the first one can be
    return bool(mallopt(mmap_threshold, 32 << 20) and mallopt(trim_threshold, 2**31 - 1))


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, threads, other load, GPU and driver, versions."""
    names = ("torch", "triton", "numpy", "diffusers")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "load_average": load_average(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "driver": _driver() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names if find_spec(name)},
    }


def load_average() -> float | None:
    """Processes that wanted a core, averaged over the last minute; this one counts too."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def cpu_model() -> str:
    """The CPU's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    """The NVIDIA driver's version, as nvidia-smi says it; None where there is no nvidia-smi."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    words = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=False, timeout=20).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said[0] if said else None


def table(title: str, rows: Mapping[str, Mapping[str, str]]) -> str:
    """A text table: a line for each row, a column for each key."""
    columns = list(next(iter(rows.values())))
    cells = [["", *columns], *([name, *(row[c] for c in columns)] for name, row in rows.items())]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
             for line in cells]  # fmt: skip
    return "\n".join(["", title, *lines])

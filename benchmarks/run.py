# ruff: noqa: E402 (the environment and the path are set before the imports)
"""Time the kernels against their peers, correct first, and write the figures as JSON.

    python benchmarks/run.py                      # full: minutes on a CPU
    python benchmarks/run.py --short --out /tmp   # what CI runs

Everything of one file was measured in one process, in rotated order. Draw it with ``python benchmarks/report.py``.
On the CPU the contender of this package is its reference in plain PyTorch: no figure of it says anything of Triton.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before torch's import: CPU threads that wait without spinning, else 2 cores measure each other's spinning
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]  # this tree, whose commit the file names, and no installed one

import click
import torch

from benchmarks import command, results, suite
from benchmarks.cases import shapes
from benchmarks.measure import keep_heap, load_average, machine, table
from fastddpm.errors import InputError


def choose_device(name: str) -> torch.device:
    """The device of that name; auto: an NVIDIA GPU where there is one. Raises `InputError`."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}; allowed: auto, cpu, cuda, cuda:0, cuda:1 ...")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {name!r}, but torch finds {torch.cuda.device_count()} NVIDIA GPUs; use cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """What the timing of a GPU depends on beside its name."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def error(contender: dict[str, Any]) -> str:
    """Its greatest difference from float64."""
    value = contender["gate"]["error"]
    return "-" if value is None else f"{value:.1e}"


def rows(record: dict[str, Any]) -> dict[str, dict[str, str]]:
    """A case at a size as a text table; what failed has no figures."""
    made = {}
    for name, c in record["contenders"].items():
        cells = dict.fromkeys(("us", "p10 ... p90", "GB/s", "of copy", "x best", "x eager", "error"), "-")
        if c["gate"]["passed"]:
            us = c["us"]
            cells |= {"us": f"{us['median']:.1f}", "p10 ... p90": f"{us['p10']:.1f} ... {us['p90']:.1f}"}
            cells |= {"GB/s": f"{c['gb_per_s']:.2f}", "error": error(c)}
            ratios = {"of copy": "of_copy", "x best": "x_best", "x eager": "x_eager"}
            cells |= {title: f"{c[key]:.2f}" for title, key in ratios.items() if c[key] is not None}
        else:
            cells["error"] = f"FAILED: {c['gate']['reasons'][0]}"
        made[name] = cells
    return made


def run(
    names: list[str], plan: suite.Plan, *, short: bool, keep: Callable[[dict[str, Any]], object] = lambda record: None
) -> dict[str, Any]:
    """Measure the cases, print each as it is done, return the whole record; `keep` is given it after each size."""
    start, before, (commit, dirty) = datetime.now(UTC), machine(), results.commit()
    measured, left_out = [], {} if plan.no_compile is None else {"torch.compile": plan.no_compile}

    def made() -> dict[str, Any]:
        return {
            "format": results.FORMAT,
            "kind": "kernels",
            "date": start.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(UTC) - start).total_seconds(), 1),
            "commit": commit,
            "dirty": dirty,
            "short": short,
            "device": plan.device.type,
            "machine": before | gpu_facts(plan.device) | {"load_average_after": load_average()},
            "rounds": plan.rounds,
            "left_out": left_out,
            "cases": measured,
        }

    whole = made()
    for name in names:
        case = suite.make(name, plan)
        for shape in shapes(plan.device, short):
            record = suite.measure(case, shape, plan)
            left_out |= record["left_out"]
            measured.append(record)
            click.echo(table(f"{case.title}, {'x'.join(map(str, shape))}", rows(record)))
            keep(whole := made())
    return whole


@click.command()
@click.option("--short", is_flag=True, help="Two small sizes, 7 rounds, no torch.compile: seconds, for CI.")
@click.option("--out", type=click.Path(path_type=Path), default=results.FOLDER, help="Folder.  [benchmarks/results]")
@click.option(
    "--cases", "names", default=",".join(suite.CASES), show_default=True, metavar="NAMES", help="With commas between."
)
@click.option("--device", "device_name", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda ...")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads; recorded.")
def main(short: bool, out: Path, names: str, device_name: str, threads: int) -> None:
    """Time the kernels against their peers, correct first, and write the figures as JSON."""
    chosen = [name.strip() for name in names.split(",")]
    for name in chosen:
        if name not in suite.CASES:
            raise InputError(f"there is no case {name!r}; allowed: {', '.join(suite.CASES)}")
    device = choose_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(threads)  # one by default: on a machine that others use, the only figures that repeat
    kept = keep_heap()

    def keep(record: dict[str, Any]) -> Path:
        record["machine"]["heap_kept"] = kept
        return results.write(out, record)

    record = run(chosen, suite.Plan.of(device, short=short), short=short, keep=keep)
    for name, reason in record["left_out"].items():
        click.echo(f"\nleft out: {name}: {reason}")
    click.echo(f"\nwrote {keep(record)}")


if __name__ == "__main__":
    raise SystemExit(command.run(main))

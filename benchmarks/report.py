# ruff: noqa: E402 (the path is set before the imports)
"""Draw the figures of benchmarks/run.py: tables (Markdown) and plots (PNG), one set a file.

    python benchmarks/report.py                                    # all of benchmarks/results, into docs/benchmarks
    python benchmarks/report.py run.json --out /tmp/report

Nothing is computed here but the choice of what to show: every figure is the file's own, with its machine beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]

import click

from benchmarks import command, results
from fastddpm.checkpoint import write_atomically
from fastddpm.errors import InputError

NONE = "-"


def main_size(records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The record whose figures are shown in full: the greatest size."""
    return max(records, key=lambda r: r["elements"])


def by_case(run: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each case, smallest first."""
    made: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(run["cases"], key=lambda r: (r["elements"], r["shape"][0])):
        made.setdefault(record["case"], []).append(record)
    return made


def machine_line(run: Mapping[str, Any]) -> str:
    """On what, when, and of which commit."""
    m = run["machine"]
    threads = f"{m['threads']} thread{'s' if m['threads'] > 1 else ''}"
    device = m["gpu"] if run["device"] == "cuda" else f"{m['cpu']} ({threads} of {m['cores']} cores)"
    commit = (run["commit"] or "no commit")[:7] + (" with changes" if run["dirty"] else "")
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if name != "numpy")
    driver = f", driver {m['driver']}" if m.get("driver") else ""
    return f"{device}{driver}; {versions}; commit {commit}, {run['date'][:10]}"


def ours_line(run: Mapping[str, Any]) -> str:
    """What the name of our contender means there."""
    if run["device"] == "cuda":
        return (
            "`us` is a GPU's own time from a cold L2, waiting for the host included; `host us`, a call's time to "
            "enqueue; `burst us`, a call in a row of many."
        )
    return (
        "`fastddpm reference` is what the ops run on a CPU, plain PyTorch in float32, written to be read. It is no "
        "Triton kernel: no figure here says anything of one. Caches are warm, so the copy is no strict roof: it is a "
        "cache's up to some 10 MB, and who touches less memory than its source and target can pass it."
    )


def number(value: float | None, form: str = ".3g") -> str:
    """A figure with three digits, and no exponent."""
    if value is None:
        return NONE
    return f"{value:.0f}" if form == ".3g" and abs(value) >= 100 else f"{value:{form}}"


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left."""
    made = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*made, *("| " + " | ".join(line) + " |" for line in lines)])


def size_name(record: Mapping[str, Any]) -> str:
    """16x3x32x32."""
    return "x".join(map(str, record["shape"]))


def full_table(record: Mapping[str, Any], host: Mapping[str, float | None], *, cuda: bool) -> str:
    """All figures of one size; host time is that of the smallest."""
    head = ["", "us", "p10 ... p90", "ns/element", "GB/s", "of the copy"]
    head += ["launches" if cuda else "ops", "host reads", "host us", "x best baseline", "x eager", "error"]
    lines = []
    for name, c in record["contenders"].items():
        if not c["gate"]["passed"]:
            lines.append([name, f"failed: {c['gate']['reasons'][0]}", *[NONE] * (len(head) - 2)])
            continue
        us = c["us"]
        lines.append(
            [
                name,
                number(us["median"]),
                f"{number(us['p10'])} ... {number(us['p90'])}",
                number(c["ns_per_element"]),
                number(c["gb_per_s"]),
                NONE if c["of_copy"] is None else f"{100 * c['of_copy']:.0f} %",
                number(c["launches"] if cuda else c["ops"], "d"),
                number(c["reads"], "d"),
                number(host.get(name)),
                number(c["x_best"], ".2f"),
                number(c["x_eager"], ".2f"),
                number(c["gate"]["error"], ".1e"),
            ]
        )
    return markdown_table(head, lines)


def host_times(records: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Host microseconds of a call at the smallest size that has them."""
    first = next((r for r in records if any("host_us" in c for c in r["contenders"].values())), None)
    return {} if first is None else {n: c.get("host_us") for n, c in first["contenders"].items()}


def sizes_table(records: Sequence[Mapping[str, Any]], key: str) -> str:
    """Median microseconds of each contender at every size."""
    names = list(dict.fromkeys(name for r in records for name in r["contenders"]))
    lines = []
    for name in names:
        given = [r["contenders"].get(name, {}) for r in records]
        values = [c.get("us", {}).get("median") if key == "us" else c.get(key) for c in given]
        failed = [bool(c) and not c["gate"]["passed"] for c in given]
        lines.append([name, *("failed" if bad else number(v) for bad, v in zip(failed, values, strict=True))])
    return markdown_table(["", *map(size_name, records)], lines)


def markdown(run: Mapping[str, Any], stem: str) -> str:
    """The page of one run."""
    cuda = run["device"] == "cuda"
    parts = [f"# Kernels on {run['machine']['gpu'] if cuda else run['machine']['cpu'] + ' (CPU)'}"]
    parts += [f"{machine_line(run)}.", ours_line(run)]
    load = f"{run['machine']['load_average']} before, {run['machine']['load_average_after']} after"
    parts.append(
        f"Medians of {run['rounds']} rounds, contenders in rotated order in one process; load average {load}. Every "
        "contender was compared with float64 first: one that failed has no figures. Ops are those that the dispatcher "
        "sees; one that runs others inside counts once. Host reads are values that the host waits for on a GPU."
    )
    parts += [f"Left out: {name}: {reason}." for name, reason in run["left_out"].items()]
    parts.append(f"![Bandwidth against size]({stem}-bandwidth.png)\n\n![Host time a call]({stem}-host.png)")
    for records in by_case(run).values():
        at = main_size(records)
        least = f"{at['bytes_per_element']} bytes an element: {at['traffic']}."
        parts.append(f"## {at['title']}\n\n{least} At {size_name(at)}:")
        parts += [full_table(at, host_times(records), cuda=cuda), "Microseconds at every size:"]
        parts.append(sizes_table(records, "us"))
        if any("burst_us" in c for r in records for c in r["contenders"].values()):
            parts += ["Microseconds of a call in a row of many, warm caches:", sizes_table(records, "burst_us")]
    return "\n\n".join(parts) + "\n"


def draw(path: Path, out: Path) -> list[Path]:
    """The page and the plots of one file; returns what was written. Raises `InputError`, `OutputError`."""
    run = results.read(path)
    try:
        from benchmarks import plots
    except ImportError as error:
        raise InputError(f"matplotlib is missing ({error}): pip install -c constraints.txt '.[plot]'") from error
    page = out / f"{path.stem}.md"
    files = {
        page: markdown(run, path.stem).encode(),
        out / f"{path.stem}-bandwidth.png": plots.bandwidth(run),
        out / f"{path.stem}-host.png": plots.host(run),
    }
    for file, data in files.items():
        write_atomically(file, data)
    return list(files)


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=_ROOT / "docs" / "benchmarks", help="[docs/benchmarks]")
def main(files: tuple[Path, ...], out: Path) -> None:
    """Draw tables and plots of the FILES of benchmarks/run.py; none given: all of benchmarks/results."""
    chosen = files or tuple(sorted(results.FOLDER.glob("*.json")))
    if not chosen:
        raise InputError(f"{results.FOLDER} holds no runs: make one with python benchmarks/run.py")
    for path in chosen:
        for written in draw(path, out):
            click.echo(f"wrote {written}")


if __name__ == "__main__":
    raise SystemExit(command.run(main))

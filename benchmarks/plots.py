"""The plots of a run: bandwidth against size with the roof, and what a call costs the host. PNG, as bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.report import by_case, host_times, machine_line

# Okabe and Ito's colours, told apart by the colour-blind; marker and line say the same in grey
STYLES: dict[str, dict[str, Any]] = {
    "roof": dict(color="#000000", marker="", linestyle="--", linewidth=1.5),
    "ours": dict(color="#D55E00", marker="o", linestyle="-", linewidth=2.4),
    "variant": dict(color="#E69F00", marker="s", linestyle=":", linewidth=1.8),
    "eager": dict(color="#0072B2", marker="^", linestyle="-", linewidth=1.5),
    "peer": dict(color="#56B4E9", marker="v", linestyle="-.", linewidth=1.5),
    "peer 2": dict(color="#56B4E9", marker="x", linestyle=":", linewidth=1.5),
    "compile": dict(color="#009E73", marker="D", linestyle="-", linewidth=1.5),
    "compile 2": dict(color="#CC79A7", marker="P", linestyle="-.", linewidth=1.5),
}


def styles(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A style for each contender that has figures, by its role; a second one of a role looks otherwise."""
    made: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    for name, c in record["contenders"].items():
        seen[c["role"]] = count = seen.get(c["role"], 0) + 1
        if c["gate"]["passed"]:
            made[name] = STYLES.get(c["role"] if count == 1 else f"{c['role']} {count}", STYLES[c["role"]])
    return made


def bandwidth(run: Mapping[str, Any]) -> bytes:
    """GB/s of the ideal traffic against that traffic, both logarithmic; a panel a case."""
    cases = by_case(run)
    columns = min(2, len(cases))
    lines = math.ceil(len(cases) / columns)
    figure = Figure(figsize=(6.4 * columns, 4.4 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flat
    for axis, records in zip(axes, cases.values(), strict=False):
        _bandwidth_panel(axis, records)
    for axis in list(axes)[len(cases) :]:
        axis.set_visible(False)
    figure.suptitle(f"Bandwidth: the least traffic that a call needs, over its time\n{_wrapped(run)}", fontsize=10)
    return _png(figure)


def _bandwidth_panel(axis: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    """Lines through the sizes of one sample's shape; other shapes as hollow markers."""
    known = {name: style for record in records for name, style in styles(record).items()}
    sample = records[0]["shape"][1:]
    for name, style in known.items():
        have = [r for r in records if "gb_per_s" in r["contenders"].get(name, {})]
        line = [_point(r, name) for r in have if r["shape"][1:] == sample]
        others = [_point(r, name) for r in have if r["shape"][1:] != sample]
        label = "copy of the same bytes (roof)" if name == "copy" else name
        axis.plot([x for x, _ in line], [y for _, y in line], label=label, markersize=6, **style)
        hollow = dict(color=style["color"], marker=style["marker"] or "_", linestyle="", markerfacecolor="none")
        axis.plot([x for x, _ in others], [y for _, y in others], markersize=9, **hollow)
    other = next(("x".join(map(str, r["shape"][1:])) for r in records if r["shape"][1:] != sample), None)
    what = "bytes read and written" + (f" (hollow: samples of {other})" if other else "")
    axis.set(xscale="log", yscale="log", xlabel=what, ylabel="GB/s")
    axis.xaxis.set_major_formatter(FuncFormatter(_bytes))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"{records[0]['title']}, {records[0]['bytes_per_element']} B an element", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def _point(record: Mapping[str, Any], name: str) -> tuple[float, float]:
    return record["elements"] * record["bytes_per_element"], record["contenders"][name]["gb_per_s"]


def host(run: Mapping[str, Any]) -> bytes:
    """Microseconds of the host a call at the smallest size: a panel a case."""
    cases = {name: records for name, records in by_case(run).items() if any(host_times(records).values())}
    counts = [max(1, sum(t is not None for t in host_times(r).values())) for r in cases.values()] or [1]
    figure = Figure(figsize=(8.4, 0.36 * sum(counts) + 0.9 * len(counts) + 0.9), layout="constrained")
    panels = figure.subplots(len(counts), 1, squeeze=False, height_ratios=[c + 1 for c in counts], sharex=True).flat
    longest = max((t for r in cases.values() for t in host_times(r).values() if t), default=1.0)
    for axis, records in zip(panels, cases.values(), strict=False):
        times = {name: t for name, t in host_times(records).items() if t is not None}
        colours = [styles(records[0])[name]["color"] for name in times]
        axis.scatter(list(times.values()), list(times), c=colours, s=60)  # no bars: on a logarithm they have no length
        for name, t in times.items():
            axis.annotate(f"{t:.1f}", (t, name), (8, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_ylim(len(times) - 0.5, -0.5)
        axis.grid(alpha=0.3)
        axis.set_xscale("log")
        axis.set_xlim(0.5, longest * 3)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(f"{records[0]['title']}, {'x'.join(map(str, records[0]['shape']))}", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    what = "to enqueue a call" if run["device"] == "cuda" else "of a call on few elements"
    axis.set_xlabel("microseconds (logarithmic)")
    figure.suptitle(f"Host time {what}\n{_wrapped(run)}", fontsize=10)
    return _png(figure)


def _bytes(value: float, _: object = None) -> str:
    """10 kB, 1 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g} B"


def _wrapped(run: Mapping[str, Any]) -> str:
    """The machine in two lines."""
    device, rest = machine_line(run).split("; ", 1)
    return f"{device}\n{rest}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})  # the same figures, the same bytes
    return buffer.getvalue()

# ruff: noqa: E402 (the environment and the path are set before the imports)
"""Every peer's own sampling loop against ours in its place, in one run: the table of docs/integrations.md.

    PYTHONPATH=/folder/with/peers GUIDED_DIFFUSION=/a/checkout python benchmarks/integrations.py
    python benchmarks/integrations.py --short --out /tmp     # seconds, to see that it runs

Both draw the same random numbers, and are compared before they are timed: who differs has no time. Then whole
trajectories are timed in turn, each round beginning with another: on CUDA by the clock, from an idle device to an idle
device; on one thread of a CPU by the processor's time, which other processes disturb less. A time is the median, with
the deciles; a ratio is the median of the rounds' own. Each loop is timed around a network that costs next to nothing
(so that the loop is what is timed) and around a small real one. "Sampler" is the same solver by `fastddpm.Sampler`, its
noise that of seeds; on CUDA it replays a graph a step, and what the fronts do without their graphs is timed too. A peer
that isn't there is a row that says so.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

# Before torch's import, as in run.py; and no progress bars: some loops can't be told otherwise
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TQDM_DISABLE", "1")
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]

import click
import torch
from torch import Tensor

from benchmarks import command, results
from benchmarks.gate import Gate
from benchmarks.integration_cases import CASES, Race, Setup
from benchmarks.measure import Interleaved, Timer, Times, by_the_clock, load_average, machine
from benchmarks.peers import Missing, guided_commit
from benchmarks.run import choose_device
from fastddpm.errors import InputError
from fastddpm.sampler import Sampler

PEERS = ("diffusers", "denoising-diffusion-pytorch", "k-diffusion")
FOLDER = results.FOLDER / "integrations"


def whole(device: torch.device) -> Timer:
    """Times a call from an idle device until the device is idle again."""
    if device.type != "cuda":
        return by_the_clock

    def timed(call: Callable[[], object], times: Times) -> None:
        torch.cuda.synchronize(device)
        by_the_clock(lambda: (call(), torch.cuda.synchronize(device)), times)

    return timed


@contextmanager
def no_graphs() -> Iterator[None]:
    """`Sampler`s capture none and replay none."""
    with mock.patch.object(Sampler, "_wants_graph", return_value=False):
        yield


def contenders(race: Race, device: torch.device) -> dict[str, Callable[[], object]]:
    """By name, the peer first."""

    def eager(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return no_graphs()(call)  # a context manager is a decorator too

    made: dict[str, Callable[[], object]] = {"peer": race.peer, "fastddpm": race.ours}
    if race.sampler is not None:
        made["Sampler"] = race.sampler
    if device.type == "cuda":
        made |= {f"{name}, no graph": eager(call) for name, call in made.items() if name != "peer"}  # type: ignore[arg-type]
    return {**made, "network": race.network}


def checked(race: Race, calls: dict[str, Callable[[], Any]]) -> tuple[Gate, dict[str, float]]:
    """The gate, and the greatest difference from the peer of each that must be equal to it.

    In units of the peer's greatest value, where that is above 1: without a real network samples may grow.
    """
    gate, errors = Gate(), {}
    expected = race.peer().double()
    unit = max(1.0, float(expected.abs().max()))
    expected /= unit
    for name, call in calls.items():
        if name in ("peer", "network"):
            continue
        made = call().double() / unit
        if name.startswith("Sampler") and not race.same:  # other noise: all that can be said here
            if made.shape != expected.shape or not bool(made.isfinite().all()):
                gate.fail(f"{name}'s samples are not finite, or have another shape")
            continue
        gate.near(name, made, expected, race.atol)
        errors[name] = float((made - expected).abs().max()) if made.shape == expected.shape else None
    return gate, errors


def figures(seconds: list[float], evaluations: int) -> dict[str, Any]:
    """Of whole trajectories, and a step (an evaluation of the network) of them."""
    times = Times(seconds)
    ms = {
        "median": times.median * 1e3,
        "least": min(seconds) * 1e3,
        "p10": times.decile(1) * 1e3,
        "p90": times.decile(9) * 1e3,
    }
    return {"ms": ms, "us_a_step": {name: value * 1e3 / evaluations for name, value in ms.items()}}


def measured(race: Race, device: torch.device, rounds: int, limit: float) -> dict[str, Any]:
    """Compare, then time at least so many rounds, and at most 20 times as many where `limit` seconds allow them."""
    calls = contenders(race, device)
    gate, errors = checked(race, calls)
    record: dict[str, Any] = {"loop": race.loop, "evaluations": race.evaluations, "tolerance": race.atol}
    record |= {"error": errors, "reasons": gate.reasons}
    if not gate.passed:
        return record
    race_ = Interleaved(calls, whole(device))
    race_()  # warms up; says how many rounds there is time for
    one = sum(times.wall[0] for times in race_.times.values())
    race_.times = {name: Times() for name in calls}
    rounds = max(rounds, min(20 * rounds, int(limit / one)))
    for _ in range(rounds):
        race_()
    clock = clock_of(device)
    taken = {name: times.cpu if clock == "processor" else times.wall for name, times in race_.times.items()}
    made = {name: figures(seconds, race.evaluations) for name, seconds in taken.items()}
    for name, seconds in taken.items():  # by rounds: a slow spell is mostly longer than one
        made[name]["x_peer"] = statistics.median(a / b for a, b in zip(taken["peer"], seconds, strict=True))
        made[name]["wall_ms"] = race_.times[name].median * 1e3
    return record | {"rounds": rounds, "clock": clock, "contenders": made}


def clock_of(device: torch.device) -> str:
    """What is timed: processor time where there is one thread on a CPU, so that other processes count for less."""
    return "processor" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


def run_case(name: str, setup: Setup, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Its records; or one that says why there is none."""
    about = {"peer": name, "network": "none" if setup.free else "small"}
    try:
        for race in CASES[name](setup):
            with torch.no_grad():
                yield about | measured(race, setup.device, rounds, seconds)
    except Missing as error:
        yield about | {"skipped": " ".join(str(error).split())}


def peer_versions() -> dict[str, str | None]:
    """Versions of what is timed against; None: not installed."""

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {**{name: of(name) for name in PEERS}, "guided-diffusion": guided_commit()}


# --- the table --------------------------------------------------------------------------------------------------------


def spread(figure: dict[str, float], digits: int) -> str:
    """Median and deciles."""
    return f"{figure['median']:.{digits}f} ({figure['p10']:.{digits}f} to {figure['p90']:.{digits}f})"


def ratio(record: dict[str, Any], name: str) -> str:
    """How many times faster than the peer."""
    return f"{record['contenders'][name]['x_peer']:.2f}"


def cells(free: dict[str, Any], small: dict[str, Any]) -> list[str]:
    """A row behind the names: the loop without a network, then with one."""
    for record in (free, small):
        if "skipped" in record:
            return [f"skipped: {record['skipped']}"] + [""] * 6
        if record["reasons"]:
            return [f"FAILED: {'; '.join(record['reasons'])}"] + [""] * 6
    alone = free["contenders"]
    own = {name: spread(of["us_a_step"], 0) for name, of in alone.items()}
    around = [f"{small['contenders'][name]['ms']['median']:.1f}" for name in ("peer", "fastddpm")]
    error = max(free["error"]["fastddpm"], small["error"]["fastddpm"])
    return [
        own["peer"],
        f"{own['fastddpm']}, {ratio(free, 'fastddpm')}",
        f"{own['Sampler']}, {ratio(free, 'Sampler')}" if "Sampler" in own else "-",
        *around,
        ratio(small, "fastddpm"),
        f"{error:.0e}",
    ]


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: a line a loop."""
    title = ["peer", "loop", "us a step, no network: peer", "fastddpm, ratio", "Sampler, ratio"]
    title += ["ms, small network: peer", "fastddpm", "ratio", "difference"]
    pairs: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        pairs.setdefault((record["peer"], record.get("loop", "")), {})[record["network"]] = record
    lines = [title, ["---"] * len(title)]
    lines += [[*names, *cells(pair["none"], pair["small"])] for names, pair in pairs.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@click.command()
@click.option("--short", is_flag=True, help="4 steps, 8x8 pictures, 2 rounds: to see that it runs.")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="[benchmarks/results/integrations]")
@click.option("--peers", default=",".join(CASES), show_default=True, metavar="NAMES", help="With semicolons between.")
@click.option("--device", "device_name", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda ...")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="CPU threads; recorded.")
@click.option("--rounds", type=click.IntRange(7), default=11, show_default=True, help="The least number of them.")
@click.option("--seconds", type=click.FloatRange(0), default=2.0, show_default=True, help="For more rounds, a loop.")
@click.option("--steps", type=click.IntRange(2), default=20, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures at once.")
@click.option("--size", type=click.IntRange(8), default=32, show_default=True, help="Of the pictures.")
def main(short: bool, out: Path, peers: str, device_name: str, threads: int, **numbers: Any) -> None:
    """Time each peer's loop against ours, correct first; print the Markdown table, and write the figures as JSON."""
    names = [name.strip() for name in peers.split(";")] if peers != ",".join(CASES) else list(CASES)
    for name in names:
        if name not in CASES:
            raise InputError(f"there is no peer {name!r}; allowed: {'; '.join(CASES)}")
    if short:
        numbers |= dict(rounds=2, seconds=0.0, steps=4, size=8)
    device = choose_device(device_name)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # its rounding would be amplified to more than the gate allows
    start, before = datetime.now(UTC), machine()
    rounds, seconds = numbers.pop("rounds"), numbers.pop("seconds")
    records = []
    for free in (True, False):
        setup = Setup(device, free=free, **numbers)
        for name in names:
            for record in run_case(name, setup, rounds, seconds):
                records.append(record)
                click.echo(f"{name}, {record.get('loop')}, network {record['network']}: {said(record)}", err=True)
    commit, dirty = results.commit()
    record = {
        "format": results.FORMAT,
        "kind": "integrations",
        "date": start.isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "short": short,
        "device": device.type,
        "machine": before | {"load_average_after": load_average()},
        "peers": peer_versions(),
        **numbers,
        "loops": records,
    }
    click.echo(f"{about(record)}\n\n{table(records)}")
    click.echo(f"\nwrote {results.write(out, record)}", err=True)


def said(record: dict[str, Any]) -> str:
    """A record in a line."""
    if "skipped" in record:
        return f"skipped: {record['skipped']}"
    if record["reasons"]:
        return f"FAILED: {'; '.join(record['reasons'])}"
    medians = [f"{name} {of['us_a_step']['median']:.1f}" for name, of in record["contenders"].items()]
    return f"us a step: {', '.join(medians)}; off by {record['error']['fastddpm']:.1e}; {record['rounds']} rounds"


def about(record: dict[str, Any]) -> str:
    """What the figures depend on, in a line."""
    of, peers = record["machine"], record["peers"]
    clock = next((loop["clock"] for loop in record["loops"] if "clock" in loop), None)
    versions = {"torch": of["versions"]["torch"], **{name: made for name, made in peers.items() if made}}
    return (
        f"{of['gpu'] if record['device'] == 'cuda' else of['cpu']}, {of['threads']} CPU threads, load "
        f"{of['load_average']} to {of['load_average_after']}, {record['batch']} x 3 x {record['size']} x "
        f"{record['size']}, {record['steps']} steps, {clock} time; "
        + ", ".join(f"{name} {v[:12]}" for name, v in versions.items())
    )


if __name__ == "__main__":
    raise SystemExit(command.run(main))

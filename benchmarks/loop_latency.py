"""Latency of a step by how many steps a launch holds: none, one, ten, fifty, or the whole loop in a WHILE node.

    python benchmarks/loop_latency.py [--steps 1000] [--rounds 5] [--batch 1 --batch 8 --batch 64] [--short] [--out DIR]

Needs a GPU. The shipped UNet, bfloat16, channels_last, DDPM. Two times of a loop, each over its steps: the host's,
until it has enqueued all, and the clock's, until the GPU is done. (An eager loop's host waits where the GPU's queue is
full.) Setting up the buffers counts too, since every sample pays for it; capturing doesn't. The samples of all are
compared bit for bit with the eager ones before a figure is taken. All are in one process, in turns; medians.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks import command, results  # noqa: E402
from benchmarks.inflight_servers import SHAPE  # noqa: E402
from benchmarks.measure import Interleaved, Times, machine  # noqa: E402
from fastddpm import NoiseSchedule, Sampler, UNet, sampler, solvers  # noqa: E402
from fastddpm.errors import DeviceError  # noqa: E402
from fastddpm.pretrained import DEFAULT  # noqa: E402
from fastddpm.solvers import StepTable  # noqa: E402

FOLDER = results.FOLDER / "loop"
LOOPS: dict[str, tuple[Any, int]] = {  # `Sampler`'s graph, and its steps a graph
    "eager": (False, 1),
    "a graph a step": (True, 1),
    "graphs of 10": (True, 10),
    "graphs of 50": (True, 50),
    "WHILE of 2": ("while", 2),
    "WHILE of 10": ("while", 10),
    "WHILE of 50": ("while", 50),
}
Row = dict[str, Any]


def prepared(model: Any, table: StepTable, shape: tuple[int, ...], loop: str) -> tuple[Callable[[], object] | str, Any]:
    """The loop as a function that only enqueues, or why it can't be had; and a sample of it."""
    graph, steps = LOOPS[loop]
    made = Sampler(model, table, graph=graph)
    with mock.patch.object(sampler, "UNROLLED", steps), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        labels = {"class_labels": torch.zeros(shape[0], dtype=torch.int64)}
        try:
            sample = made.sample(shape, seeds=0, model_kwargs=labels)  # captures
        except Exception as error:  # a driver's, of one loop: the others are measured
            if loop == "eager":  # what they are compared with
                raise
            return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}", None
    refused = [str(w.message) for w in caught if str(w.message).startswith(("no CUDA graph", "no WHILE node"))]
    if refused:  # what else is warned of, as torch's own deprecations, is no reason
        return refused[0], None
    part = made._checked(shape, 0, model_kwargs=labels).part(torch.arange(shape[0]))
    bar = made._bar(False, shape[0], shape[0])

    @torch.inference_mode(False)
    @torch.no_grad()
    def run() -> None:
        made._run(part, None, None, bar)

    return run, sample


def timed(synchronize: Callable[[], None], call: Callable[[], object], times: Times) -> None:
    """A timer for `Interleaved`: `wall` until the GPU is done; in `cpu`, the clock's time until all was enqueued."""
    synchronize()
    start = time.perf_counter()
    call()
    times.cpu.append(time.perf_counter() - start)
    synchronize()
    times.wall.append(time.perf_counter() - start)


def measured(model: Any, table: StepTable, shape: tuple[int, ...], rounds: int, synchronize: Any) -> Iterable[Row]:
    """A row for each of `LOOPS`; one that isn't there, or whose samples differ, has a reason in place of figures."""
    made = {loop: prepared(model, table, shape, loop) for loop in LOOPS}
    expected = made["eager"][1]
    reasons = {}
    for loop, (run, sample) in made.items():
        if isinstance(run, str):
            reasons[loop] = run
        elif not torch.equal(sample, expected):
            reasons[loop] = f"its samples differ from the eager ones by {(sample - expected).abs().max():.2g}"
    race = Interleaved({n: run for n, (run, _) in made.items() if n not in reasons}, partial(timed, synchronize))
    race()
    race.times = {loop: Times() for loop in race.times}  # that was a warm-up
    for _ in range(rounds):
        race()
    for loop in LOOPS:
        row: Row = {"batch": shape[0], "loop": loop, "reason": reasons.get(loop)}
        if loop in race.times:
            times = race.times[loop]
            row |= {
                name: statistics.median(of) / table.num_rows * 1e6
                for name, of in (("host_us_a_step", times.cpu), ("wall_us_a_step", times.wall))
            }
        yield row


def line(row: Row, eager: Row) -> str:
    """A row of the table, in Markdown."""
    if row["reason"]:
        return f"| {row['batch']} | {row['loop']} | none: {row['reason']} | | |"
    host, wall = row["host_us_a_step"], row["wall_us_a_step"]
    return f"| {row['batch']} | {row['loop']} | {host:.2f} | {wall:.2f} | {eager['wall_us_a_step'] / wall:.2f}x |"


@click.command(help=__doc__.splitlines()[0])
@click.option("--steps", type=click.IntRange(min=100), default=1000, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, default=(1, 8, 64), show_default=True)
@click.option("--short", is_flag=True, help="100 steps, one round: to see that it runs")
@click.option("--out", type=click.Path(path_type=Path), default=FOLDER, help="[benchmarks/results/loop]")
def main(steps: int, rounds: int, batches: tuple[int, ...], short: bool, out: Path) -> None:
    if not torch.cuda.is_available():
        raise DeviceError(
            "loop_latency.py needs a GPU, and torch finds none; host_cost.py measures the host without one"
        )
    device = torch.device("cuda")
    model = UNet.from_pretrained(DEFAULT).to(device, torch.bfloat16, memory_format=torch.channels_last)
    model = model.eval().requires_grad_(False)
    steps, rounds = (100, 1) if short else (steps, rounds)
    table = solvers.ddpm(NoiseSchedule.linear(), steps, clip=1.0)
    commit, dirty = results.commit()
    about = {"machine": machine(), "commit": commit, "dirty": dirty, "short": short, "device": "cuda"}
    rows: list[Row] = []
    print("| batch | loop | host, us a step | wall, us a step | against eager |\n|---|---|---|---|---|")
    for batch in batches:
        of_batch = list(measured(model, table, (batch, *SHAPE), rounds, torch.cuda.synchronize))
        for row in of_batch:
            print(line(row, of_batch[0]), flush=True)
        rows += of_batch
        record = {"format": results.FORMAT, "kind": "loop", **about, "steps": steps, "rounds": rounds, "rows": rows}
        path = results.write(out, record)  # after each batch: the next may be stopped
    click.echo(f"\nwrote {path}", err=True)


if __name__ == "__main__":
    sys.exit(command.run(main))

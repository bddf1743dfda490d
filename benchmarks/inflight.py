"""Continuous against static batching: requests of mixed solvers and steps, through the shipped UNet, in one run.

    python benchmarks/inflight.py [--short] [--rounds 3] [--device cuda]

All share the kernels, the weights and 8 slots; what differs is who is computed together:

- in-flight: `InflightSampler`; a request that is done is replaced at the next step.
- static: 8 at a time in the order of arrival, whatever their solver (which needs a cursor a sample, as ours), until
  the longest of them is done.
- static, shortest first: the same, of those that wait the 8 with the fewest steps.
- grouped: the oldest, and those with the very same solver and steps: what a server does whose sampler has one time step
  a batch. `Sampler` with `batch_size=8`, padded, so that as with the others a seed's bits depend on nobody else.
- grouped, not padded: the same without that promise: `Sampler` in a batch of just so many.

Two loads: all requests at once, and a Poisson process at 60 % of the in-flight throughput that was just measured. On
the CPU time is this process's processor time on one thread, and nobody's arrival is waited for: idle time is skipped;
so other processes count less. On CUDA it is the clock's. All samples are compared before a figure is printed: bit for
bit with each other (but for the last contender: within 1e-3), and some of them with `Sampler`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.inflight_servers import (  # noqa: E402
    SHAPE,
    SLOTS,
    Ask,
    Clock,
    Grouped,
    Slotted,
    first,
    mix,
    shortest,
    table_of,
)
from benchmarks.measure import machine  # noqa: E402
from fastddpm import Sampler, UNet  # noqa: E402
from fastddpm.pretrained import DEFAULT  # noqa: E402

REQUESTS = 48
Server = Slotted | Grouped


def contenders(model: Any, device: torch.device) -> dict[str, Server]:
    """By the name of their row."""
    return {
        "static": Slotted(model, device, first),
        "static, shortest first": Slotted(model, device, shortest),
        "grouped": Grouped(model, device, SLOTS),
        "grouped, not padded": Grouped(model, device, None),
        "in-flight": Slotted(model, device, None),
    }


@dataclass
class Run:
    """What a contender did with a load."""

    per_second: float
    mean: float  # latency, seconds
    p99: float
    utilisation: float


def serve(server: Server, asks: list[Ask], device: torch.device) -> Run:
    """Serve requests as they arrive, until all are done."""
    clock, coming, waiting = Clock(device), deque(sorted(asks, key=lambda ask: ask.arrives)), deque[Ask]()
    occupied, slots = server.used()
    while coming or waiting or server.busy:
        while coming and coming[0].arrives <= clock():
            waiting.append(coming.popleft())
        if waiting or server.busy:
            server(waiting, clock)
        else:
            clock.skip(coming[0].arrives)
    now, all_slots = server.used()
    waits = torch.tensor([ask.done - ask.arrives for ask in asks], dtype=torch.float64)
    end = max(ask.done for ask in asks)
    share = (now - occupied) / (all_slots - slots)
    return Run(len(asks) / end, waits.mean().item(), waits.quantile(0.99).item(), share)


def wrong(made: dict[str, list[Tensor]], asks: list[Ask], model: Any) -> str | None:
    """What of the samples is not as it should be."""
    for name, samples in made.items():
        exact = name != "grouped, not padded"  # another batch size has other bits
        for one, other in zip(samples, made["in-flight"], strict=True):
            if not (torch.equal(one, other) if exact else (one - other).abs().max() <= 1e-3):
                return f"{name} differs from in-flight by {(one - other).abs().max():.2g}"
    for ask, sample in list(zip(asks, made["in-flight"], strict=True))[:: max(1, len(asks) // 8)]:
        labels = torch.full((SLOTS,), ask.label, device=sample.device)
        plain = Sampler(model, table_of(*ask.kind), batch_size=SLOTS, device=sample.device).sample(
            (SLOTS, *SHAPE), seeds=[ask.seed] * SLOTS, model_kwargs={"class_labels": labels}
        )
        if not torch.equal(plain[0], sample):
            return f"in-flight differs from Sampler by {(plain[0] - sample).abs().max():.2g}"
    return None


def race(servers: dict[str, Server], asks: list[Ask], rounds: int, device: torch.device, model: Any) -> Any:
    """Runs by contender, in turn; ends the program where a sample is wrong."""
    runs: dict[str, list[Run]] = {name: [] for name in servers}
    for turn in range(rounds):
        names, made = list(servers), {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(serve(servers[name], asks, device))
            made[name] = [ask.sample for ask in asks]
        if turn == 0 and (why := wrong(made, asks, model)):
            sys.exit(f"no figures: {why}")
    return {
        name: Run(*(statistics.median(getattr(run, key) for run in of) for key in Run.__dataclass_fields__))
        for name, of in runs.items()
    }


def main(words: list[str] | None = None) -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few requests of few steps: to see that it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(words)
    device = torch.device(given.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    model = UNet.from_pretrained(DEFAULT).to(device).eval().requires_grad_(False)
    asks = mix(12, 10, (2, 3, 5)) if given.short else mix(REQUESTS, 10)
    rounds = 1 if given.short else given.rounds
    about = machine()
    print(f"{about['gpu'] if device.type == 'cuda' else about['cpu']}, {about['threads']} threads, {about['versions']}")
    print(f"load {about['load_average']}; {len(asks)} requests, {SLOTS} slots, rounds: {rounds}, their median\n")
    servers = contenders(model, device)
    for server in servers.values():  # tables, first calls
        serve(server, mix(8, 10, (2,)), device)
    print("| load | batching | requests/s | | mean latency, s | p99, s | slots in use |\n|---|---|---|---|---|---|---|")
    rate = 0.0
    for load in ("all at once", "Poisson"):
        if rate:
            draw, at = random.Random(1), 0.0
            for ask in asks:
                at += draw.expovariate(rate)
                ask.arrives = at
            load = f"Poisson, {rate:.2f}/s"
        runs = race(servers, asks, rounds, device, model)
        for name, run in runs.items():
            faster = f"{run.per_second / runs['static'].per_second:.2f}x"
            cells = (load, name, f"{run.per_second:.2f}", faster, f"{run.mean:.2f}", f"{run.p99:.2f}")
            print("|", " | ".join((*cells, f"{run.utilisation:.0%}")), "|", flush=True)
        rate = 0.6 * runs["in-flight"].per_second


if __name__ == "__main__":
    main()

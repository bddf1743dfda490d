"""What the host does in a step, without the launches: `Sampler`'s loop beside the loop around diffusers' scheduler.

    PYTHONPATH=.:kernels python benchmarks/host_cost.py [--rounds 30] [--steps 1000] [--out FILE]

Needs no GPU: what would be launched is replaced by a function that does nothing (a replay of a graph), or is so small
that it costs next to nothing (diffusers' operations, on one sample of 8 numbers). The model is left out of both, and
x_T is given to both. So these are the least microseconds of Python, of dispatch and of allocation that a step costs.
What a launch costs the driver is left out: of ours there is one a step, or one in ten; of diffusers' there would be 10.

Medians over the rounds, which take turns, of the process's CPU time a step.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from fastddpm_kernels import step_loop

from benchmarks.measure import cpu_model
from fastddpm import NoiseSchedule, Sampler, graphs, sampler, solvers

SHAPE = (1, 1, 8)


def nothing(*given: Any, **options: Any) -> None:
    """In a launch's place."""


def always(value: Any) -> Callable[..., Any]:
    """A function that returns it. (A Mock costs more than what is measured.)"""
    return lambda *given: value


def no_capture(
    run: object, device: object, lengths: Sequence[int] = (1,), pool: object = None, *, loop: bool = False
) -> dict[int, Any]:
    """In the place of `graphs.capture`."""
    return dict.fromkeys(lengths, nothing)


def ours(steps: int, *, graph: bool, chunk: int = 1) -> Callable[[], object]:
    """A trajectory of `Sampler`: replaying graphs of `chunk` steps, or launching each kernel."""
    out, x_T = torch.zeros(SHAPE), torch.zeros(SHAPE)
    made = Sampler(lambda x, t: out, solvers.ddpm(NoiseSchedule.linear(), steps), graph="auto" if graph else False)

    def run() -> object:
        with (
            mock.patch.object(step_loop, "inplace_step", always(nothing)),
            mock.patch.object(graphs, "capture", no_capture),
            mock.patch.object(sampler, "UNROLLED", chunk),
            mock.patch.object(Sampler, "_wants_graph", always(graph)),
            mock.patch.object(Sampler, "_makes_noise_ahead", always(False)),  # the kernel makes it
        ):
            return made.sample(SHAPE, seeds=0, x_T=x_T)

    return run


def theirs(steps: int) -> Callable[[], object]:
    """The loop of diffusers' DDPMPipeline around its scheduler, without the model."""
    from diffusers import DDPMScheduler

    scheduler, m, x_T = DDPMScheduler(), torch.zeros(SHAPE), torch.zeros(SHAPE)

    def run() -> object:
        x, generator = x_T, torch.Generator().manual_seed(0)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(m, t, x, generator=generator).prev_sample
        return x

    return run


def contenders(steps: int) -> dict[str, Callable[[], object]]:
    """By name, diffusers first."""
    return {
        "diffusers DDPMScheduler": theirs(steps),
        "Sampler, a kernel a step": ours(steps, graph=False),
        "Sampler, a graph a step": ours(steps, graph=True),
        f"Sampler, a graph of {sampler.UNROLLED} steps": ours(steps, graph=True, chunk=sampler.UNROLLED),
    }


def measured(steps: int, rounds: int) -> dict[str, list[float]]:
    """CPU microseconds a step, by round."""
    runs = contenders(steps)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            runs[name]()
            times[name].append((time.process_time() - start) / steps * 1e6)
    return times


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    with torch.no_grad():
        times = measured(given.steps, given.rounds)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    base = medians["diffusers DDPMScheduler"]
    record = {
        "machine": cpu_model(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "steps": given.steps,
        "rounds": given.rounds,
        "us_a_step": medians,
        "deciles": {name: np.quantile(values, [0.1, 0.9]).tolist() for name, values in times.items()},
    }
    print(f"{record['machine']}, 1 thread, torch {torch.__version__}, {given.steps} steps, {given.rounds} rounds\n")
    print("| the host's part of a step | us | of diffusers' |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {100 * median / base:.2f} % |")
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

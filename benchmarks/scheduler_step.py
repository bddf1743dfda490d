"""Time of a step, scheduler alone: diffusers' classes and ours, on the CPU, as a Markdown table.

    PYTHONPATH=.:kernels python benchmarks/scheduler_step.py [--rounds 60] [--steps 20]

Before anything is timed, both give the same samples to the last bit, or it stops. Then they take turns, the first one
changing from round to round; a time is the median over the rounds of a trajectory's mean step, and the spread is that
of the rounds' quartiles. A step is `scale_model_input` and `step`. Setting the time steps is timed apart.
"""

from __future__ import annotations

import argparse
import platform
import time

import diffusers
import numpy as np
import torch

from fastddpm.integrations import diffusers as ours

NAMES = (
    "DDPMScheduler",
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
)
SHAPES = ((1, 16, 7), (1, 3, 32, 32), (16, 3, 32, 32), (16, 3, 64, 64))


def trajectory(scheduler, m, x, steps):
    """(microseconds a step, microseconds of set_timesteps, the last sample)."""
    t0 = time.perf_counter()
    scheduler.set_timesteps(steps)
    t1 = time.perf_counter()
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)  # as every pipeline does; the model's output is given
        x = scheduler.step(m, t, x, return_dict=False)[0]
    t2 = time.perf_counter()
    return (t2 - t1) / len(scheduler.timesteps) * 1e6, (t1 - t0) * 1e6, x


def compared(name, shape, rounds, steps):
    """Times [2 schedulers, rounds, (step, set_timesteps)], after the gate."""
    pair = getattr(diffusers, name)(), getattr(ours, f"Fused{name}")()
    torch.manual_seed(0)
    m, x = torch.randn(shape), torch.randn(shape)
    made = []
    for scheduler in pair:
        torch.manual_seed(1)
        made.append(trajectory(scheduler, m, x, steps)[2])
    if not torch.equal(*made):
        raise SystemExit(f"{name} {shape}: the samples differ; nothing is timed")
    times = np.zeros((2, rounds, 2))
    for i in range(rounds):
        for k in (0, 1) if i % 2 else (1, 0):
            times[k, i] = trajectory(pair[k], m, x, steps)[:2]
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    print(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}", end=", ")
    print(f"diffusers {diffusers.__version__}, float32, {given.steps} steps, {given.rounds} rounds\n")
    print("| scheduler | shape | diffusers, us a step | ours | ratio | set_timesteps, us: diffusers | ours |")
    print("|---|---|---|---|---|---|---|")
    for name in NAMES:
        for shape in SHAPES:
            low, middle, high = np.quantile(compared(name, shape, given.rounds, given.steps), [0.25, 0.5, 0.75], axis=1)
            step = [f"{middle[k, 0]:.1f} ({low[k, 0]:.1f} to {high[k, 0]:.1f})" for k in (0, 1)]
            ratio = middle[0, 0] / middle[1, 0]
            print(f"| {name} | {shape} | {step[0]} | {step[1]} | {ratio:.2f} |", end="")
            print(f" {middle[0, 1]:.0f} | {middle[1, 1]:.0f} |")


if __name__ == "__main__":
    main()

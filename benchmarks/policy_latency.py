"""Latency of a diffusion policy on the CPU: one trajectory, from noise to actions, diffusers' loop against ours.

    python benchmarks/policy_latency.py [--short]

Batch 1, horizon 16, 2 actions, 20 numbers of observation; random weights (they don't change the time). Both loops draw
the same noise, and are compared before they are timed; then all run in one process, in turns. "no network" is what a
loop costs beside its network: diffusers' scheduler, and ours. The p99 of few calls is the slowest of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "examples")]

from diffusion_policy import ConditionalUnet1D, Policy  # noqa: E402  (of examples/)

from benchmarks.gate import Gate  # noqa: E402
from benchmarks.measure import Interleaved, Times, machine  # noqa: E402
from fastddpm.integrations.diffusion_policy import PolicySampler  # noqa: E402

SHAPE, OBSERVED = (1, 16, 2), 20
SECONDS = 20  # of each comparison
LOOPS = {
    "DDPM, 100 steps": (DDPMScheduler, 100),
    "DDIM, 16 steps": (DDIMScheduler, 16),
    "DDIM, 10 steps": (DDIMScheduler, 10),
}
WIDTHS = {"256, 512, 1024": (256, 512, 1024), "64, 128": (64, 128)}


class NoNetwork(torch.nn.Module):
    """As little as a model can do."""

    def forward(self, x: Tensor, t: Tensor, local_cond: Any = None, global_cond: Any = None) -> Tensor:
        return 0.1 * x


def networks() -> dict[str, torch.nn.Module]:
    """By the name of its row."""
    torch.manual_seed(0)
    made = {name: ConditionalUnet1D(SHAPE[2], OBSERVED, widths).eval() for name, widths in WIDTHS.items()}
    return {**made, "no network": NoNetwork()}


def contenders(network: torch.nn.Module, kind: Any, steps: int) -> dict[str, Callable[[], Tensor]]:
    """The two loops, each from the same noise, as `predict_action` calls them."""
    scheduler = kind(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    policy, sampler = Policy(network, scheduler, steps), PolicySampler(network, scheduler, steps)
    nothing, features = torch.zeros(SHAPE), torch.linspace(-1, 1, OBSERVED)[None]
    noise = torch.Generator()

    @torch.no_grad()
    def theirs() -> Tensor:
        return policy.conditional_sample(
            nothing.clone(), nothing.bool(), global_cond=features, generator=noise.manual_seed(0)
        )

    def ours() -> Tensor:
        return sampler.sample(
            SHAPE,
            condition_data=nothing,
            condition_mask=nothing.bool(),
            global_cond=features,
            generator=noise.manual_seed(0),
        )

    return {
        "diffusers": theirs,
        "fastddpm": ours,
        "fastddpm, seeds": partial(sampler.sample, SHAPE, seeds=0, global_cond=features),
    }


def quantile(times: Times, q: float) -> float:
    """Milliseconds."""
    return 1000 * float(torch.tensor(times.wall, dtype=torch.float64).quantile(q))


def main() -> None:
    """Print the table, in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="a few rounds: to see that it runs")
    short = parser.parse_args().short
    about = machine()
    print(f"{about['cpu']}, {about['threads']} threads, load {about['load_average']}, {about['versions']}\n")
    print("| network | loop | | p50, ms | p99, ms | p50 against diffusers | calls |\n|---|---|---|---|---|---|---|")
    for name, network in networks().items():
        for loop, (kind, steps) in LOOPS.items():
            made, gate = contenders(network, kind, steps), Gate()
            gate.near("the trajectory", made["fastddpm"](), made["diffusers"]().double(), 1e-5)
            if not gate.passed:
                sys.exit(f"{name}, {loop}: {'; '.join(gate.reasons)}")
            race = Interleaved(made)
            race()  # its time is not kept: it says how many rounds there is time for
            one = sum(times.wall[0] for times in race.times.values())
            race.times = {contender: Times() for contender in made}
            rounds = 3 if short else min(200, max(5, round(SECONDS / one)))
            for _ in range(rounds):
                race()
            stock = quantile(race.times["diffusers"], 0.5)
            for contender, times in race.times.items():
                p50, p99 = quantile(times, 0.5), quantile(times, 0.99)
                print(
                    f"| {name} | {loop} | {contender} | {p50:.2f} | {p99:.2f} | {stock / p50:.2f}x | {rounds} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()

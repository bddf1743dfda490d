"""How fast each solver's error falls with its steps, on data whose perfect model is known in closed form.

    python benchmarks/convergence.py      # prints the slopes, writes docs/convergence.png

The deterministic solvers follow one ordinary differential equation (Song et al. 2020, arXiv 2011.13456, eq. 13), here
from lambda = log(alpha / sigma) = -3 to 3, which a mixture of Gaussians makes neither stiff nor trivial. The error is
the distance of a sample's end from where 1,000 steps of Runge and Kutta's classical method take it. Float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastddpm import Sampler, solvers
from fastddpm.analytic import GaussianMixture
from fastddpm.schedule import NoiseSchedule

MIXTURE = GaussianMixture([[-1.0, 0.0], [1.0, 0.5], [0.2, -0.8]], stds=[0.3, 0.4, 0.25], weights=[0.3, 0.4, 0.3])
SAMPLES, LAMBDA, FINE = 64, 3.0, 1000
SCHEDULE_STEPS = 1000
STEPS = (10, 20, 40, 80, 160)
OUT = Path(__file__).resolve().parent.parent / "docs" / "convergence.png"


@dataclass(frozen=True, eq=False)
class Case:
    """A solver, the order at which its error falls, and the model evaluations of a step."""

    solver: str
    order: int
    options: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 1

    @property
    def title(self) -> str:
        return " ".join([self.solver, *(f"{name}={value}" for name, value in self.options.items())])


CASES = (
    Case("euler", 1),
    Case("dpm_solver", 1, {"order": 1}),
    Case("dpm_solver", 2, {"order": 2}),
    Case("dpm_solver", 2, {"order": 3}),
    Case("dpm_solver", 3, {"order": 3, "solver_type": "exact"}),
    Case("dpm_solver", 2, {"order": 2, "algorithm": "dpmsolver"}),
    Case("dpm_solver_singlestep", 2, {"order": 2}),
    Case("dpm_solver_singlestep", 3, {"order": 3}),
    Case("unipc", 2, {"order": 1}),
    Case("unipc", 3, {"order": 2}),
    Case("deis", 2, {"order": 2}),
    Case("deis", 3, {"order": 3}),
    Case("heun", 2, evaluations=2),
)


@cache
def schedule() -> NoiseSchedule:
    """A schedule whose lambda falls evenly from 3 to -3."""
    bar = 1 / (1 + np.exp(np.linspace(-2 * LAMBDA, 2 * LAMBDA, SCHEDULE_STEPS)))
    return NoiseSchedule.from_betas(1 - bar / np.append(1.0, bar[:-1]))


@cache
def start_and_end() -> tuple[Tensor, Tensor]:
    """x / alpha at lambda = -3, and where the ODE takes it until lambda = 3: float64 [SAMPLES, 2]."""

    def velocity(x: Tensor, lam: float) -> Tensor:  # d(x / alpha) / d lambda = x_0 - x / alpha
        sigma = torch.tensor(math.exp(-lam), dtype=torch.float64)
        return MIXTURE.predicted_x0(x, torch.tensor(1.0), sigma) - x

    noise = torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = start = MIXTURE.sample(SAMPLES) + math.exp(LAMBDA) * noise
    h = 2 * LAMBDA / FINE
    for lam in np.arange(FINE) * h - LAMBDA:
        k1 = velocity(x, lam)
        k2 = velocity(x + h / 2 * k1, lam + h / 2)
        k3 = velocity(x + h / 2 * k2, lam + h / 2)
        k4 = velocity(x + h * k3, lam + h)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return start, x


def error(case: Case, steps: int) -> float:
    """The root mean square distance from the ODE's end after `steps` steps.

    The table has a level more, from which its last row goes to lambda = infinity: the state before that is compared.
    """
    table = solvers.make(case.solver, schedule(), steps + 1, spacing="log_snr", quantize=False, **case.options)
    start, end = start_and_end()
    sampler = Sampler(MIXTURE.model(schedule()), table, state_dtype=torch.float64)
    x_T = start * table.start[0]  # the state is alpha x_0 + sigma eps
    states = [state.x for state in sampler.trace((SAMPLES, 2), seeds=0, x_T=x_T)]
    return (states[-2] / float(table["k_x"][-2]) - end).square().sum(1).mean().sqrt().item()


def errors(case: Case, counts: tuple[int, ...] = STEPS) -> list[float]:
    """`error` for several numbers of steps."""
    return [error(case, steps) for steps in counts]


def slope(steps: tuple[int, ...], found: list[float]) -> float:
    """The order that errors show between the last two numbers of steps: -d log error / d log steps."""
    return math.log(found[-2] / found[-1]) / math.log(steps[-1] / steps[-2])


def plot(found: dict[Case, list[float]]) -> Figure:
    """The errors against model evaluations, both logarithmic, with triangles of slope 1, 2 and 3."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axis = figure.subplots()
    for order, colour in ((1, "#0072B2"), (2, "#009E73"), (3, "#D55E00")):
        markers = iter("osD^vP*X")
        for case in (case for case in found if case.order == order):
            evaluations = [steps * case.evaluations for steps in STEPS]
            label = f"{case.title}: {slope(STEPS, found[case]):.2f}"
            axis.loglog(evaluations, found[case], color=colour, marker=next(markers), label=label, linewidth=1.2)
        axis.loglog(STEPS, [0.3 * (10 / n) ** order for n in STEPS], color=colour, linestyle=":", linewidth=1)
    axis.set(xlabel="model evaluations", ylabel="distance from the exact end (rms)")
    axis.set_title("Error against model evaluations; the numbers are slopes at the end, dotted: 1, 2, 3", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def main() -> None:
    """Print the slopes and draw the plot."""
    found = {case: errors(case) for case in CASES}
    for case, errs in found.items():
        print(f"{case.title:60} " + " ".join(f"{e:.2e}" for e in errs) + f"  slope {slope(STEPS, errs):.2f}")
    OUT.parent.mkdir(exist_ok=True)
    plot(found).savefig(OUT, dpi=110)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

"""The same noise through every solver: a row a solver, a column a number of model evaluations.

python benchmarks/solver_pictures.py      # writes docs/solvers.png (about 10 minutes on two cores)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastddpm import Sampler, UNet
from fastddpm.pretrained import DEFAULT, SchedulerConfig

OUT = Path(__file__).resolve().parent.parent / "docs" / "solvers.png"
EVALUATIONS = (5, 10, 20, 50)
CLASSES, SEED = (1, 4, 8, 9), 3  # trousers, coat, bag, boot
ROWS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ddpm", {}),
    ("ddim", {}),
    ("dpm_solver", {}),
    ("dpm_solver", {"order": 3, "solver_type": "exact"}),
    ("dpm_solver", {"algorithm": "sde-dpmsolver++"}),
    ("dpm_solver_singlestep", {}),
    ("unipc", {}),
    ("deis", {}),
    ("plms", {}),
    ("euler", {}),
    ("euler_ancestral", {}),
    ("heun", {}),
    ("predictor_corrector", {}),
)
TWICE = ("heun", "dpm2", "predictor_corrector")  # two evaluations a step


def pictures(sampler: Sampler) -> np.ndarray[Any, Any]:
    """The classes beside one another, [H, classes * W] in -1 ... 1."""
    size = sampler.model.config.sample_size  # type: ignore[union-attr]
    made = sampler.sample(
        (len(CLASSES), 1, size, size), seeds=SEED, model_kwargs={"class_labels": torch.tensor(CLASSES)}
    )
    return np.concatenate(list(made[:, 0].numpy()), axis=1)


def main() -> None:
    """Sample and draw."""
    scheduler = SchedulerConfig.from_folder(DEFAULT)
    unet = UNet.from_pretrained(DEFAULT)
    figure = Figure(figsize=(3.1 * len(EVALUATIONS) + 1.6, 0.82 * len(ROWS) + 0.4))
    axes = figure.subplots(len(ROWS), len(EVALUATIONS))
    for line, (solver, options) in zip(axes, ROWS, strict=True):
        for axis, evaluations in zip(line, EVALUATIONS, strict=True):
            steps = (evaluations + 1) // 2 if solver in TWICE else evaluations
            table = scheduler.table(solver, steps, **options)
            axis.imshow(pictures(Sampler(unet, table)), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            print(solver, options, evaluations, table, flush=True)
        name = " ".join([solver, *(str(value) for value in options.values())])
        line[0].set_ylabel(name.replace(" ", "\n"), rotation=0, ha="right", va="center", fontsize=9)
    for axis, evaluations in zip(axes[0], EVALUATIONS, strict=True):
        axis.set_title(f"{evaluations} evaluations", fontsize=10)
    figure.subplots_adjust(left=0.14, right=0.995, top=0.96, bottom=0.005, wspace=0.03, hspace=0.05)
    figure.savefig(OUT, dpi=72)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

"""What the tests of `InflightSampler` share: a small model, and a request asked of it and of `Sampler`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastddpm import InflightSampler, NoiseSchedule, Sampler, StepTable, solvers

SHAPE, SLOTS = (2, 4, 8), 4  # 64 elements: none of a sample is in the tail of a vector loop
SCHEDULE = NoiseSchedule.linear(100)
NONE = 5  # the class that stands for "no class"


class Net(nn.Module):
    """Of x, t and a label; nothing of the rest of the batch."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4 if learned else 2, 3, padding=1)
        self.label = nn.Embedding(NONE + 1, 8)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        condition = 0.01 * t[:, None].to(x.dtype)
        if class_labels is not None:
            condition = condition + self.label(class_labels)
        return self.last(torch.relu(self.first(x) + condition[:, :, None, None]))


@dataclass
class Asked:
    """A request."""

    seed: int
    solver: str = "ddim"
    steps: int = 5
    options: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None
    label: int | None = None
    x_T: Tensor | None = None

    @property
    def table(self) -> StepTable:
        return solvers.make(self.solver, SCHEDULE, self.steps, **self.options)

    def submit(self, sampler: InflightSampler, **given: Any) -> Any:
        kwargs = None if self.label is None else {"class_labels": self.label}
        return sampler.submit(
            seed=self.seed,
            solver=self.solver,
            steps=self.steps,
            guidance_scale=self.weight,
            model_kwargs=kwargs,
            x_T=self.x_T,
            **self.options,
            **given,
        )

    def plain(self, model: Any, slots: int = SLOTS, *, guided: bool = False) -> Tensor:
        """The same of `Sampler`, in a batch of copies."""
        given: dict[str, Any] = {}
        if self.label is not None:
            given["model_kwargs"] = {"class_labels": torch.full((slots,), self.label)}
        if guided:
            weight = 1.0 if self.weight is None else self.weight
            given |= dict(guidance_scale=[weight] * slots, unconditional_kwargs={"class_labels": NONE})
        if self.x_T is not None:
            given["x_T"] = self.x_T.expand(slots, *SHAPE)
        sampler = Sampler(model, self.table, batch_size=slots)
        made = sampler.sample((slots, *SHAPE), seeds=[self.seed] * slots, **given)
        assert all(torch.equal(made[0], other) for other in made)
        return made[0]


KINDS = [
    ("ddpm", {"clip": 1.0}),
    ("ddim", {}),
    ("ddim", {"eta": 1.0, "clip": 1.0, "use_clipped_model_output": True}),
    ("dpm_solver", {}),
    ("dpm_solver", {"algorithm": "sde-dpmsolver++"}),
    ("unipc", {"order": 3}),
    ("plms", {}),
    ("euler", {"state": "ve"}),
    ("heun", {"state": "ve"}),
    ("euler_ancestral", {"state": "ve"}),
    ("ddpm", {"clip": 1.5, "dynamic_thresholding_ratio": 0.9}),
]


def drained(sampler: InflightSampler, *asked: Asked) -> list[Tensor]:
    """Their samples, of a sampler without a thread."""
    futures = [one.submit(sampler) for one in asked]
    while sampler.step():
        pass
    return [future.result(timeout=0) for future in futures]

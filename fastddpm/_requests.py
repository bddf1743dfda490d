"""What `InflightSampler` knows of a request, and of all of them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from ._slots import Start
from .errors import NonFiniteError

Progress = Callable[[int, int], object]


@dataclass
class Counts:
    """What an `InflightSampler` has done so far; `pending` and `running` are now."""

    submitted: int = 0
    pending: int = 0
    running: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0  # of the whole batch: calls of the model
    occupied: int = 0  # slots with a sample in them, over all steps
    uploads: int = 0  # step tables that were copied to the device


@dataclass(eq=False)
class Request:
    """A sample that is asked for. Its future stays "pending" while it runs, so that it can be cancelled then too."""

    future: Future[Tensor]
    start: Start
    seed: int
    progress: Progress | None
    rows: int
    done: int = 0


def not_finite(request: Request, step: int, sample: Tensor) -> NonFiniteError:
    """The error of a request whose sample is not finite since `step`."""
    t = request.start.program.table.timesteps[step]
    return NonFiniteError(
        f"the sample of seed {request.seed} is not finite from step {step} (t = {t:g}) on: the model's output there is "
        "NaN, infinite or too large",
        samples=sample[None],
        bad=torch.ones(1, dtype=torch.bool),
    )

"""The contenders of `benchmarks/inflight.py`: who computes which requests together; and the requests."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastddpm import InflightSampler, NoiseSchedule, Sampler, StepTable, solvers

SHAPE, SLOTS = (1, 32, 32), 8
SCHEDULE = NoiseSchedule.linear()
STEPS = (10, 20, 30, 50, 100)
OPTIONS = {"prediction_type": "v_prediction", "clip": 1.0}
SOLVERS: dict[str, dict[str, Any]] = {
    "ddpm": OPTIONS,
    "ddim": {**OPTIONS, "use_clipped_model_output": True},
    "dpm_solver": OPTIONS,
    "unipc": OPTIONS,
}


@dataclass
class Ask:
    """A request: what it is, when it came and when it was done, in seconds, and what became of it."""

    seed: int
    label: int
    solver: str
    steps: int
    arrives: float = 0.0
    done: float = 0.0
    sample: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def kind(self) -> tuple[str, int]:
        """Those of one kind have one table."""
        return self.solver, self.steps


def mix(n: int, labels: int, steps: tuple[int, ...] = STEPS) -> list[Ask]:
    """The same each time."""
    draw = random.Random(0)
    return [Ask(i, draw.randrange(labels), draw.choice(list(SOLVERS)), draw.choice(steps)) for i in range(n)]


def table_of(solver: str, steps: int) -> StepTable:
    """That of a kind of request."""
    return solvers.make(solver, SCHEDULE, steps, **SOLVERS[solver])


class Clock:
    """Seconds since its start; `skip` jumps to a time at which something happens."""

    def __init__(self, device: torch.device) -> None:
        self._now = time.process_time if device.type == "cpu" else time.perf_counter
        self._start, self._sleeps = self._now(), device.type != "cpu"

    def __call__(self) -> float:
        return self._now() - self._start

    def skip(self, until: float) -> None:
        """Be there: at once on the CPU, where the processor time of waiting is none."""
        ahead = until - self()
        if ahead > 0 and self._sleeps:
            time.sleep(ahead)
        elif ahead > 0:
            self._start -= ahead


class Slotted:
    """An `InflightSampler` that is given requests by a policy."""

    def __init__(self, model: Any, device: torch.device, pick: Callable[[deque[Ask]], list[Ask]] | None) -> None:
        self._pick, self._busy = pick, 0
        self._sampler = InflightSampler(
            model,
            SHAPE,
            slots=SLOTS,
            schedule=SCHEDULE,
            model_kwargs={"class_labels": 0},
            max_pending=10**6,
            device=device,
            background=False,
        )

    def __call__(self, waiting: deque[Ask], clock: Clock) -> None:
        """Do some work for those who wait, and a step."""
        if self._pick is None:
            taken = [waiting.popleft() for _ in range(len(waiting))]
        else:
            taken = [] if self._busy else self._pick(waiting)
        for ask in taken:
            self._busy += 1
            kwargs = {"class_labels": ask.label}
            future = self._sampler.submit(
                seed=ask.seed, solver=ask.solver, steps=ask.steps, model_kwargs=kwargs, **SOLVERS[ask.solver]
            )
            future.add_done_callback(lambda future, ask=ask: self._finish(ask, future.result(), clock))  # type: ignore[misc]
        self._sampler.step()

    def _finish(self, ask: Ask, sample: Tensor, clock: Clock) -> None:
        self._busy -= 1
        ask.sample, ask.done = sample, clock()

    @property
    def busy(self) -> bool:
        """Whether some are under way."""
        return self._busy > 0

    def used(self) -> tuple[int, int]:
        """(slots with a sample in them, slots) over all steps."""
        counts = self._sampler.counts
        return counts.occupied, counts.steps * SLOTS


class Grouped:
    """`Sampler`, for the oldest and those like it."""

    busy = False

    def __init__(self, model: Any, device: torch.device, batch_size: int | None) -> None:
        self._model, self._device, self._batch_size = model, device, batch_size
        self._rows, self._slots = 0, 0
        self._samplers: dict[tuple[str, int], Sampler] = {}

    def __call__(self, waiting: deque[Ask], clock: Clock) -> None:
        """A batch, from its beginning to its end."""
        kind = waiting[0].kind
        batch = [ask for ask in waiting if ask.kind == kind][:SLOTS]
        for ask in batch:
            waiting.remove(ask)
        if kind not in self._samplers:
            table = table_of(*kind)
            self._samplers[kind] = Sampler(self._model, table, device=self._device, batch_size=self._batch_size)
        labels = torch.tensor([ask.label for ask in batch])
        samples = self._samplers[kind].sample(
            (len(batch), *SHAPE), seeds=[ask.seed for ask in batch], model_kwargs={"class_labels": labels}
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        rows = self._samplers[kind].table.num_rows
        self._rows += rows * len(batch)
        self._slots += rows * (self._batch_size or len(batch))
        for ask, sample in zip(batch, samples, strict=True):
            ask.sample, ask.done = sample, clock()

    def used(self) -> tuple[int, int]:
        """As `Slotted.used`."""
        return self._rows, self._slots


def first(waiting: deque[Ask]) -> list[Ask]:
    """A static batch in the order of arrival."""
    return [waiting.popleft() for _ in range(min(SLOTS, len(waiting)))]


def shortest(waiting: deque[Ask]) -> list[Ask]:
    """A static batch of those with the fewest steps."""
    batch = sorted(waiting, key=lambda ask: ask.steps)[:SLOTS]
    for ask in batch:
        waiting.remove(ask)
    return batch

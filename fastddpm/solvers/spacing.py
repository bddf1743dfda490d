"""Which time steps of the training schedule a sampler of fewer steps visits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

SPACINGS = ("leading", "linspace", "trailing")


def timesteps(num_train_steps: int, steps: int | None, spacing: str) -> NDArray[np.int64]:
    """The time steps to visit, int64 [steps], falling (Lin et al. 2023, arXiv 2305.08891, table 2).

    They are those of diffusers' ``timestep_spacing`` with ``steps_offset=0``, oddities and all: ``leading`` does not
    start at the last training step unless it visits all, and with a single step ``leading`` and ``linspace`` visit
    t = 0. (Where a rounding error gives diffusers' ``trailing`` one step too many, at t = -1, it is left out here.)

    Args:
        num_train_steps: T, the length of the training schedule.
        steps: how many to visit; None: all T.
        spacing: "leading", "linspace" or "trailing".

    Raises:
        ConfigError: for a `steps` that is no integer in 1 ... T, or an unknown `spacing`.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f"spacing is {spacing!r}; allowed: {', '.join(map(repr, SPACINGS))}")
    if steps is None:
        steps = num_train_steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= num_train_steps:
        raise ConfigError(f"steps is {steps!r}; allowed: an integer in 1 ... {num_train_steps}, the schedule's length")
    if spacing == "leading":
        return np.arange(steps, dtype=np.int64)[::-1] * (num_train_steps // steps)
    if spacing == "linspace":
        return np.linspace(0, num_train_steps - 1, steps).round()[::-1].astype(np.int64)
    stops = np.arange(num_train_steps, 0, -num_train_steps / steps)[:steps]
    return stops.round().astype(np.int64) - 1

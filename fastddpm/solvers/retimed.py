"""A sampling schedule other than the one that the model was trained with."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from fastddpm_kernels.columns import T

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .levels import times_of
from .table import StepTable


def retimed(table: StepTable, schedule: NoiseSchedule, trained: NoiseSchedule, *, quantize: bool = False) -> StepTable:
    """The sampler `table`, made for `schedule`, for a model that was trained with the schedule `trained`.

    A variance preserving state of a certain log-SNR is the same thing whatever schedule led to it (Kingma et al. 2021,
    arXiv 2107.00630), so only what the model is told changes: each row's time input becomes the
    (fractional) time step of `trained` with that log-SNR. The cosine schedule's levels for a model of the linear one::

        linear, cosine = NoiseSchedule.linear(), NoiseSchedule.cosine()
        table = retimed(solvers.ddim(cosine, 50), cosine, trained=linear)

    Levels beyond the ends of `trained` get its first or last time step, which is an approximation.

    Args:
        table: of any solver, made with `schedule` (and, where there is the option, ``quantize=False``, or else the time
            steps that it had been rounded to are the ones that are kept).
        schedule: the schedule that says which noise levels are visited.
        trained: the schedule that the model was trained with.
        quantize: round the time inputs to whole time steps, as a model with a table of time embeddings needs.

    Raises:
        ConfigError: for a table whose time inputs aren't time steps of `schedule`.
    """
    last = schedule.num_steps - 1
    t = table.timesteps
    if t.min() < 0 or t.max() > last:
        raise ConfigError(
            f"the table's time inputs are {t.min():g} ... {t.max():g}; `schedule` has the time steps 0 ... {last}: "
            "it must be the one that the table was made with"
        )
    levels = np.interp(t, np.arange(schedule.num_steps), -0.5 * schedule.log_snr)
    told = times_of(trained, levels)
    whole = told.round()
    # a time step that only rounding errors keep from being whole stays one, and the model gets integers
    told = np.where(quantize | (np.abs(told - whole) < 1e-6), whole, told)
    rows = table.rows.copy()
    rows[:, T] = told
    return replace(table, rows=rows)

"""What the fronts of other libraries' sampling loops share: strides between any two time steps, and kept samplers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..buffers import Buffers
from ..graphs import RecentlyUsed
from ..inputs import Inputs
from ..sampler import Sampler
from ..schedule import NoiseSchedule
from ..solvers import StepTable
from ..solvers.strides import Strides

Floats = NDArray[np.float64]

SELF_CONDITION = "x_self_cond"


def strides_between(schedule: NoiseSchedule, t: ArrayLike, s: ArrayLike, final_log: float = 0.0) -> Strides:
    """Strides from the time steps t to s, int [rows]; below 0, s is the data, with log alpha_bar = `final_log`.

    A negative t counts from the end, as in the tables of peers.
    """
    t, s = np.asarray(t, dtype=np.int64), np.asarray(s, dtype=np.int64)
    log_t = schedule.log_alphas_cumprod[t]
    log_s = np.where(s >= 0, schedule.log_alphas_cumprod[np.maximum(s, 0)], final_log)
    return Strides(
        t=t,
        alpha=np.exp(log_t - log_s),
        beta=-np.expm1(log_t - log_s),
        log_bar=log_t,
        bar_next=np.exp(log_s),
        noise=-np.expm1(log_t),
        noise_next=-np.expm1(log_s) + 0.0,
    )


class Loop(Sampler):
    """A `Sampler` that tells a model its last x_0: a model_kwargs["x_self_cond"], float32 [B, ...].

    What is given is for the first row; at the others it is the x_0 of the row before.
    """

    def _allocate(self, part: Inputs) -> Buffers:
        buffers = super()._allocate(part)
        if SELF_CONDITION in buffers.model_kwargs:
            buffers.x0 = buffers.model_kwargs[SELF_CONDITION]  # the kernel writes what the model reads next
        return buffers


class Loops:
    """The loops of one model, kept from call to call with their CUDA graphs; a copy or a pickle begins without any."""

    def __init__(self) -> None:
        self._model: object = None
        self._loops: RecentlyUsed[Loop] = RecentlyUsed()

    def get(self, model: object, table: StepTable, call: Callable[..., Any] | None = None) -> Loop:
        """The loop of a model and a table, made now if there is none.

        `call`: what to call in the model's place, always the same for one model; None: the model itself.
        """
        if model is not self._model:
            self._loops.clear()
            self._model = model
        called: Any = model if call is None else call
        return self._loops.get(table.rows.tobytes(), lambda: Loop(called, table))

    def __reduce__(self) -> tuple[type[Loops], tuple[()]]:
        return Loops, ()

"""What the fronts of other libraries' sampling loops share: their tables, and a sampler that is given its noise.

A peer's loop may step from a time step to another than the one that it visits next, or leave noise at its end. So the
tables here are for any pairs (t, s), computed from log alpha_bar in float64; `fastddpm.solvers` has the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..buffers import Buffers
from ..errors import ConfigError
from ..graphs import RecentlyUsed
from ..inputs import Inputs
from ..sampler import Sampler
from ..schedule import NoiseSchedule
from ..solvers import StepTable, step_table
from ..solvers.strides import Strides
from ..solvers.table import check_ratio

Floats = NDArray[np.float64]

LEAST_VARIANCE = 1e-20  # where a peer takes the logarithm of a posterior variance of 0
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


def posterior_table(
    strides: Strides,
    *,
    variance: str = "fixed_small",
    prediction_type: str = "epsilon",
    clip: float | None = None,
    ratio: float | None = None,
) -> StepTable:
    """DDPM between any time steps (Ho et al. 2020, eq. 7), with noise wherever t is not 0.

    Args:
        variance: "fixed_small", "fixed_large" or "learned_range" (see `solvers.ddpm`).
        prediction_type, clip: as in `solvers.ddpm`; ratio: its `dynamic_thresholding_ratio`.

    Raises:
        ConfigError: for a value that is not among these.
    """
    keep = strides.noise_next / strides.noise
    small = np.sqrt(strides.beta * keep)
    noisy = strides.t != 0
    s_0, s_v = np.zeros(len(small)), np.zeros(len(small))
    if variance == "learned_range":
        large = np.log2(strides.beta) / 2
        least = np.log2(np.maximum(strides.beta * keep, LEAST_VARIANCE)) / 2
        s_0, s_v = noisy * (large + least) / 2, noisy * (large - least) / 2
        sigma = np.ones(len(small))
    elif variance in ("fixed_small", "fixed_large"):
        sigma = small if variance == "fixed_small" else np.sqrt(strides.beta)
    else:
        raise ConfigError(f"variance is {variance!r}; allowed: 'fixed_small', 'fixed_large', 'learned_range'")
    x0_x, x0_m = strides.predicted_x0(prediction_type)
    return step_table(
        strides.t,
        x0_x=x0_x,
        x0_m=x0_m,
        x_x0=np.sqrt(strides.bar_next) * strides.beta / strides.noise,
        x_x=np.sqrt(strides.alpha) * keep,
        x_z=noisy * sigma,
        s_0=s_0,
        s_v=s_v,
        k_x=np.sqrt(strides.bar_next),
        k_z=np.sqrt(strides.noise_next),
        start=strides.start,
        clip=clip,
        ratio=check_ratio(ratio, clip),
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

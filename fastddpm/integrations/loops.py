"""What the fronts of other libraries' sampling loops share: their tables, and a sampler that is given its noise.

A peer's loop may step from a time step to another than the one that it visits next, or leave noise at its end. So the
tables here are for any pairs (t, s), computed from log alpha_bar in float64; `fastddpm.solvers` has the usual ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastddpm_kernels.columns import X_H1, X_Z
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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
Noise = Callable[[int], Tensor | None]
Watch = Callable[[int, Tensor], None]

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


def with_given_noise(table: StepTable) -> StepTable:
    """The same solver with noise that the caller puts into the history's first buffer before each row.

    `x_z` moves to `x_h1`. Raises `ConfigError` for a solver that looks back, or whose noise the model scales.
    """
    if table.history or table.learned:
        what = "looks back at earlier predictions" if table.history else "has a learned variance"
        raise ConfigError(
            f"this solver {what}, so it can't take torch's noise; give seeds, from which the kernel draws its own"
        )
    rows = table.rows.copy()
    rows[:, X_H1], rows[:, X_Z] = table.rows[:, X_Z], 0.0
    return replace(table, rows=rows)


class Loop(Sampler):
    """A `Sampler` that can be given each row's noise, can be watched, and tells a model its last x_0."""

    _noise: Noise | None = None
    _watch: Watch | None = None

    def __init__(self, model: Callable[..., Any], table: StepTable) -> None:
        super().__init__(model, table)
        self._running = threading.Lock()

    def run(
        self,
        shape: Sequence[int],
        *,
        seeds: int | Sequence[int] = 0,
        x_T: Tensor | None = None,
        noise: Noise | None = None,
        watch: Watch | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """`sample`, with the table of `with_given_noise` where there is `noise`.

        Args:
            shape, seeds, x_T, model_kwargs: as in `Sampler.sample`. A model_kwargs["x_self_cond"], float32 [B, ...],
                is what the model is told of x_0 at the first row; at the others it is the x_0 of the row before.
            noise: noise(row) is called before each row, for its z [B, ...] or None.
            watch: watch(row, x) is called after each row; x is the state's buffer: to be copied, not kept.

        Returns:
            [B, ...] float32. Raises what `Sampler.sample` raises.
        """
        with self._running:
            self._noise, self._watch = noise, watch
            try:
                return self.sample(shape, seeds=seeds, x_T=x_T, model_kwargs=model_kwargs)
            finally:
                self._noise = self._watch = None

    def _allocate(self, part: Inputs) -> Buffers:
        buffers = super()._allocate(part)
        if SELF_CONDITION in buffers.model_kwargs:
            buffers.x0 = buffers.model_kwargs[SELF_CONDITION]  # the kernel writes what the model reads next
        return buffers

    def _prepared(self, part: Inputs) -> tuple[Buffers, Callable[[], None]]:
        buffers, step = super()._prepared(part)
        noise, watch, rows = self._noise, self._watch, iter(range(self.table.num_rows))

        def one() -> None:
            row = next(rows)
            z = None if noise is None else noise(row)
            if z is not None and buffers.h1 is not None:
                buffers.h1.copy_(z)
            step()
            if watch is not None:
                watch(row, buffers.x)

        return buffers, one


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

"""Models that are told more than x and t: by a classifier's gradient, or by a picture beside their input.

Each function here takes a model and returns one, for `Sampler`. (Classifier-free guidance is an argument of
`Sampler.sample`, since the step kernel does it.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from fastddpm_kernels.columns import C_IN, S_0, S_V, X0_M, X_M, X_X0, X_Z
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from .errors import ConfigError, InputError
from .schedule import NoiseSchedule
from .solvers import StepTable
from .solvers.strides import PREDICTION_TYPES

Model = Callable[..., Any]
LogProb = Callable[..., Tensor]


def classifier_guided(
    model: Model, log_prob: LogProb, schedule: NoiseSchedule, scale: float = 1.0, *, prediction_type: str = "epsilon"
) -> Model:
    """A model that predicts eps' = eps - sqrt(1 - alpha_bar_t) s grad_x log p(y | x_t), for any solver.

    Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 2 and eq. 14, where it is DDIM's. For a model of v or x_0 the
    same guidance in what it predicts: v' = v - sigma / alpha s g, x_0' = x_0 + sigma^2 / alpha s g.

        def log_prob(x, t, y):
            return classifier(x, t).log_softmax(1).gather(1, y[:, None])[:, 0]

        guided = classifier_guided(unet, log_prob, schedule, scale=2.0)
        Sampler(guided, table).sample((16, 3, 32, 32), seeds=0, model_kwargs={"y": labels})

    Args:
        model: any model(x, t, **kwargs), also one that learns a variance, which stays as it is.
        log_prob: log_prob(x, t, y) -> [B], log p(y | x_t) of a classifier that knows noised samples; x and t are the
            model's. Without a `y` in model_kwargs it is called as log_prob(x, t). The model is not given `y`.
        schedule: what the model was trained with; t may lie between its time steps.
        scale: s.
        prediction_type: what the model predicts: "epsilon", "v_prediction" or "sample".

    Returns:
        guided(x, t, y=None, **kwargs), with what the model returns, its dtype float32 at least.

    Raises:
        ConfigError: for another prediction type, a scale that is not finite, or a schedule that is no `NoiseSchedule`
            or ends at a terminal SNR of zero (where x_t says nothing, and the step would be infinite).
        InputError: when it is called, where `log_prob` returns no [B].
    """
    _check_guide(model, log_prob, scale)
    if prediction_type not in PREDICTION_TYPES:
        allowed = ", ".join(map(repr, PREDICTION_TYPES))
        raise ConfigError(f"prediction_type is {prediction_type!r}; allowed: {allowed}")
    if not isinstance(schedule, NoiseSchedule) or not np.isfinite(schedule.log_snr).all():
        raise ConfigError(f"schedule is {schedule!r}; needed: a NoiseSchedule whose last alpha_bar is above 0")
    by_time = _ByTime(np.column_stack([-0.5 * schedule.log_snr]))
    return partial(_guided, model, log_prob, partial(_epsilon_shift, by_time, float(scale), prediction_type))


def classifier_guided_mean(model: Model, log_prob: LogProb, table: StepTable, scale: float = 1.0) -> Model:
    """A model with which each row of `table` draws from N(mean + s Sigma grad_x log p(y | x_t), Sigma).

    Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 1: Sigma is the variance that the row adds, x_z^2, or with a
    learned variance what the model says. The mean is linear in the model's output, so a shift of the one is a shift of
    the other; but only as long as no x_0 is clipped and none is looked back at. The last row adds no noise and has no
    shift.

    Args:
        model, log_prob, scale: as in `classifier_guided`.
        table: the one that the model is sampled with: ddpm, or ddim with an eta above 0, without a clip.

    Raises:
        ConfigError: for a table in which that isn't exact, or that has no noise.
    """
    _check_guide(model, log_prob, scale)
    t = table.timesteps
    for wrong, why in (
        (table.limited or table.dynamic, "clips x_0, after which the mean isn't linear in the model's output"),
        (table.history > 0, "looks back at earlier predictions, which the shift would change too"),
        (not table.stochastic, "adds no noise, so there is no variance to shift its mean by"),
        ((t != t.round()).any() or (t < 0).any() or len(set(t)) < len(t), "has no whole time step of its own a row"),
    ):
        if wrong:
            raise ConfigError(f"guidance of the mean is not for this table: it {why}; use classifier_guided")
    rows = table.rows
    gain = rows[:, X_X0] * rows[:, X0_M] + rows[:, X_M]
    shift = np.divide(scale * rows[:, X_Z] ** 2 * rows[:, C_IN], gain, where=rows[:, X_Z] != 0, out=0 * gain)
    if not np.isfinite(shift).all():
        raise ConfigError("guidance of the mean is not for this table: a row's mean has no part of the model's output")
    by_time = np.zeros((int(t.max()) + 1, 3))
    by_time[t.astype(np.int64)] = np.column_stack([shift, rows[:, S_0], rows[:, S_V]])
    return partial(_guided, model, log_prob, partial(_mean_shift, _ByTime(by_time), table.learned))


def concatenated(model: Model, mode: str = "bilinear") -> Model:
    """A model that sees a picture beside x, in more channels: super-resolution, colouring, depth to image.

    Saharia et al. 2021, arXiv 2104.07636; the model's input is cat[x, low_res] over the channels.

        Sampler(concatenated(unet), table).sample((4, 3, 256, 256), seeds=0, model_kwargs={"low_res": small})

    Args:
        model: any model whose input has the channels of both; its output has those of x.
        mode: how a `low_res` of another height and width is enlarged to that of x, as in
            `torch.nn.functional.interpolate`.

    Returns:
        a model(x, t, low_res=..., **kwargs), with x and low_res of [B, channels, ...].
    """
    return partial(_concatenated, model, mode)


# These are partials of plain functions, in which the sampler finds the modules and their weights.


def _guided(
    model: Model,
    log_prob: LogProb,
    shift: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    t: Tensor,
    y: Any = None,
    **kwargs: Any,
) -> Tensor:
    """The model's output, its prediction moved by `shift` times the gradient; a learned variance stays."""
    output: Any = model(x, t, **kwargs)
    output = getattr(output, "sample", output)
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        log_p = log_prob(at, t) if y is None else log_prob(at, t, y)
        if not isinstance(log_p, Tensor) or log_p.shape != t.shape:
            given = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
            raise InputError(f"log_prob returned {given}; needed: a tensor ({len(x)},), log p(y | x_t) of each sample")
        if not log_p.requires_grad:
            raise InputError("log_prob returned a tensor without a gradient; is x detached in it, or no_grad set?")
        (gradient,) = torch.autograd.grad(log_p.sum(), at)
    channels = x.shape[1]
    prediction, variance = output[:, :channels], output[:, channels:]
    moved = prediction + shift(t, variance, x) * gradient
    return torch.cat([moved, variance.to(moved.dtype)], dim=1) if variance.shape[1] else moved


def _epsilon_shift(
    by_time: _ByTime, scale: float, prediction_type: str, t: Tensor, variance: Tensor, x: Tensor
) -> Tensor:
    (log_sigma,) = by_time(t, x)  # of sigma / alpha
    sigma = torch.sigmoid(2 * log_sigma).sqrt()  # of the variance preserving state
    if prediction_type == "epsilon":
        return -scale * sigma
    return scale * log_sigma.exp() * (-1.0 if prediction_type == "v_prediction" else sigma)


def _mean_shift(by_time: _ByTime, learned: bool, t: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    shift, s_0, s_v = by_time(t, x)
    return shift * torch.exp2(2 * (s_0 + s_v * variance)) if learned else shift


def _concatenated(model: Model, mode: str, x: Tensor, t: Tensor, *, low_res: Tensor, **kwargs: Any) -> Any:
    low_res = low_res.to(x.dtype)
    if low_res.shape[2:] != x.shape[2:]:
        low_res = interpolate(low_res, x.shape[2:], mode=mode)
    return model(torch.cat([x, low_res], dim=1), t, **kwargs)


class _ByTime:
    """Columns [T, n] that are looked up at times t: between two whole ones linearly."""

    def __init__(self, columns: NDArray[np.float64]) -> None:
        self._columns = torch.from_numpy(columns)
        self._there: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, t: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """The columns at t [B], each [B, 1, ...] to be multiplied with `like`, in its dtype but float32 at least."""
        kind = (like.device, torch.promote_types(like.dtype, torch.float32))
        if kind not in self._there:  # once: a copy from the host can't be part of a CUDA graph
            self._there[kind] = self._columns.to(*kind)
        columns = self._there[kind]
        low = t.long()
        values = columns[low]
        if t.is_floating_point():
            high = (low + 1).clamp(max=len(columns) - 1)
            values = torch.lerp(values, columns[high], (t - low).to(values.dtype)[:, None])
        return tuple(v.reshape(-1, *[1] * (like.ndim - 1)) for v in values.unbind(1))


def _check_guide(model: object, log_prob: object, scale: object) -> None:
    for name, given in (("model", model), ("log_prob", log_prob)):
        if not callable(given):
            raise ConfigError(f"{name} is a {type(given).__name__}; needed: a callable")
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise ConfigError(f"scale is {scale!r}; allowed: a finite number (1.0: the classifier as it is)")

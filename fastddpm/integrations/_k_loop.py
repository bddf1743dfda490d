"""The loop behind k-diffusion's samplers: a table applied row by row, and a callback for each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..solvers import StepTable
from ..solvers.churn import Churned
from ..solvers.levels import Floats
from . import sigmas as sigma_tables
from ._k_call import Call, NoiseSampler, check_exploding, comfy_sampling
from ._k_noise import fresh
from .given import Rows

Noise = Callable[[int, bool], Tensor | None]
Between = Callable[[int, bool], tuple[Tensor, Tensor]]


@torch.no_grad()
def run(
    call: Call,
    rows: Rows,
    evaluations: int | Sequence[int] = 1,
    noise: Noise | None = None,
    lifted: Sequence[float] | None = None,
) -> Tensor:
    """All steps of so many evaluations each, but for the last, which may have fewer.

    Args:
        rows: the state and its table.
        evaluations: of each step, or of all.
        noise: called behind each row, as noise(step, whether the row ends it), for what is added there.
        lifted: sigma_hat / sigma of each step; None: all 1.

    Returns:
        x at sigmas[-1], in the dtype of x: a tensor of its own.
    """
    from tqdm.auto import trange

    x, steps = call.x, len(call.sigmas) - 1
    counts = [evaluations] * steps if isinstance(evaluations, int) else evaluations
    told, times, begin = {} if call.extra_args is None else call.extra_args, rows.times(x.dtype), 0
    for i in trange(steps, disable=call.disable):
        end = min(begin + counts[i], rows.table.num_rows)
        for row in range(begin, end):
            state = rows.x.to(x.dtype)
            denoised = call.model(state, times[row], **told)
            if call.callback is not None and row == begin:
                hat = call.sigmas[i] if lifted is None or lifted[i] == 1 else call.sigmas[i] * lifted[i]
                call.callback({"x": state, "i": i, "sigma": call.sigmas[i], "sigma_hat": hat, "denoised": denoised})
            rows.step(row, denoised, None if noise is None else _behind(noise, i, row == end - 1))
        begin = end
    return rows.finished().to(x.dtype)


def _behind(noise: Noise, step: int, ends: bool) -> Callable[[], Tensor | None]:
    return lambda: noise(step, ends)


def plain(call: Call, table: Callable[[Floats], StepTable]) -> Tensor:
    """A sampler without noise, one evaluation a step."""
    return call.x.clone() if len(call.sigmas) < 2 else run(call, Rows(table(host(call.sigmas)), call.x.clone()))


def noised(
    call: Call,
    table: Callable[[Floats], StepTable],
    noise_sampler: NoiseSampler | None,
    evaluations: int | Sequence[int] = 1,
    *,
    default: Callable[[Call], NoiseSampler | None] = fresh,
    between: Between | None = None,
    silent: bool = False,
    any_model: bool = False,
) -> Tensor:
    """A sampler with noise behind each step that doesn't end at 0.

    Args:
        table: makes the table of the sigmas.
        noise_sampler: the caller's.
        evaluations: as in `run`.
        default: makes the noise_sampler where there is none, and no seeds.
        between: of which sigmas the noise behind a row is; None: those of the step, behind its last row alone.
        silent: noise is never drawn, whoever gives it.
        any_model: also for ComfyUI's rectified flows, of which this sampler makes no exception.
    """
    if not any_model:
        check_exploding(call.model)
    if call.seeds is not None and noise_sampler is not None:
        raise InputError("seeds and noise_sampler are both given; the noise is of one of them")
    if len(call.sigmas) < 2:
        return call.x.clone()
    made, sigmas = table(host(call.sigmas)), call.sigmas
    free = len(sigmas) - 2 if made.levels[-1, 1] == 0 else None
    if noise_sampler is None and call.seeds is None:
        noise_sampler = default(call)

    def noise(i: int, ends: bool) -> Tensor | None:
        if noise_sampler is None or silent or i == free or not (ends or between):
            return None
        return noise_sampler(*(between(i, ends) if between else (sigmas[i], sigmas[i + 1])))

    return run(call, Rows(made, call.x.clone(), call.seeds), evaluations, noise)


def with_churn(
    call: Call,
    table: Callable[[Churned, Floats], StepTable],
    churn: tuple[float, float, float, float],
    evaluations: int | Sequence[int] = 1,
    always: bool = False,
) -> Tensor:
    """A sampler with EDM's churn, (s_churn, s_tmin, s_tmax, s_noise).

    k-diffusion draws noise before each step, also where there is no churn; ComfyUI only where there is, but `always`
    for one sampler. A table adds it behind the step before.
    """
    if len(call.sigmas) < 2:
        return call.x.clone()
    levels, x, last = host(call.sigmas), call.x, len(call.sigmas) - 2
    given = sigma_tables.churned(levels, **_options(call.sigmas, churn))
    lifted = np.exp(given.log_sigma[:-1]) / levels[:-1]
    lifted[given.log_kept[:-1] == 0] = 1.0
    drawn = (lifted != 1) | always | (comfy_sampling(call.model) is None)

    def noise(i: int, ends: bool) -> Tensor | None:
        return torch.randn_like(x) if ends and i < last and drawn[i + 1] else None

    rows = Rows(table(given, levels), x.clone(), call.seeds)
    z = rows.noise_of_seeds() if call.seeds is not None else torch.randn_like(x) if drawn[0] else None
    scale = sigma_tables.first_lift(given)
    if scale and z is not None:
        rows.x = rows.x + scale * z.to(rows.x.dtype)
    return run(call, rows, evaluations, noise, lifted.tolist())


def _options(sigmas: Tensor, churn: tuple[float, float, float, float]) -> dict[str, Any]:
    options = dict(zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), churn, strict=True))
    sigma_tables.check(**options)
    if isinstance(sigmas, Tensor):  # as torch compares a float with them
        options |= {name: float(torch.tensor(options[name], dtype=sigmas.dtype)) for name in ("s_tmin", "s_tmax")}
    return options


def host(sigmas: Tensor | Sequence[float]) -> Floats:
    """`sigmas` on the host, float64 [n + 1]; `ConfigError` where they are no noise levels."""
    return sigma_tables.levels(sigmas.detach().cpu().double().numpy() if isinstance(sigmas, Tensor) else sigmas)

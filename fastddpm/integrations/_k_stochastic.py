"""k-diffusion's samplers with noise in each step, ancestral or the SDE's. See `k_diffusion` for what they share."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..solvers import StepTable
from ..solvers.dpm2 import dpm2_table
from ..solvers.euler import euler_table
from ..solvers.levels import Floats
from . import _k_tables as tables
from . import sigmas as sigma_tables
from ._k_call import Call, Callback, Model, NoiseSampler, Seeds
from ._k_loop import noised
from ._k_noise import brownian


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Euler's method down to sigma_down, then noise up to the next sigma: `solvers.euler_ancestral`.

    Args:
        eta: how much noise, 0 ... 1.
        s_noise: scale of the noise.
        noise_sampler: called as noise_sampler(sigma, sigma_next) for the noise of a step, shaped as x; None:
            torch.randn_like(x).

    The sigmas don't rise, unless eta is 0. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)

    def made(levels: Floats) -> StepTable:
        return euler_table(sigma_tables.churned(levels, eta=eta, s_noise=s_noise))

    return noised(call, made, noise_sampler)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """`sample_dpm_2` down to sigma_down, then noise up to the next sigma. See `sample_euler_ancestral`."""
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)

    def made(levels: Floats) -> StepTable:
        return dpm2_table(sigma_tables.churned(levels, eta=eta, s_noise=s_noise))

    return noised(call, made, noise_sampler, 2)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1) down to sigma_down, then noise.

    Two evaluations a step. See `sample_euler_ancestral`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)

    def made(levels: Floats) -> StepTable:
        return tables.dpmpp_2s(sigma_tables.churned(levels, eta=eta, s_noise=s_noise))

    return noised(call, made, noise_sampler, 2)


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """k-diffusion's DPM-Solver++ (stochastic): two evaluations a step, and noise behind each.

    Args:
        r: where between the two sigmas, in their logarithm, the second evaluation is: above 0, up to 1.
        eta, s_noise, noise_sampler: as in `sample_dpmpp_2m_sde`; eta is 1 at most.

    The sigmas fall. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    t = torch.as_tensor(sigmas).log().neg()  # and back, as k-diffusion does: a Brownian path tells the difference

    def between(i: int, ends: bool) -> tuple[Tensor, Tensor]:
        following = t[i + 1] if ends else t[i] + (t[i + 1] - t[i]) * r
        return t[i].neg().exp(), following.neg().exp()

    made = partial(tables.dpmpp_sde, eta=eta, s_noise=s_noise, r=r)
    return noised(call, made, noise_sampler, 2, default=brownian, between=between)


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver++(2M) for the reverse-time SDE (arXiv 2211.01095, SDE-DPM-Solver++): `solvers.dpm_solver`.

    Args:
        eta: how much noise; 0: the ODE, and then this is `sample_dpmpp_2m` (which at the end is the same, too).
        s_noise: scale of the noise.
        noise_sampler: called as noise_sampler(sigma, sigma_next) for the noise of a step, standard normal and shaped as
            x; None: a `BrownianTreeNoiseSampler`, as in k-diffusion, which needs torchsde (else a `ConfigError`).
        solver_type: "midpoint" or "heun".

    The sigmas fall. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    made = partial(sigma_tables.multistep, order=2, eta=eta, s_noise=s_noise, solver_type=solver_type)
    return noised(call, made, noise_sampler, default=partial(brownian, eta=eta), silent=not eta)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """`sample_dpmpp_2m_sde` of order 3, as k-diffusion has it.

    Its quadratic term has half the weight of the polynomial's integral: see solver_type in `solvers.dpm_solver`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    made = partial(sigma_tables.multistep, order=3, eta=eta, s_noise=s_noise, solver_type="heun")
    return noised(call, made, noise_sampler, default=partial(brownian, eta=eta), silent=not eta)

"""The samplers that ComfyUI has beyond k-diffusion's, with its signatures. See `k_diffusion` for what they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..errors import ConfigError, InputError
from ..solvers import StepTable
from ..solvers.euler import euler_table
from ..solvers.levels import Floats
from . import _k_tables as tables
from . import sigmas as sigma_tables
from ._k_call import Call, Callback, Model, NoiseSampler, Seeds
from ._k_loop import host, noised, plain, with_churn
from ._k_noise import fresh


def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """Ho et al. 2020 (arXiv 2006.11239, algorithm 2, sigma_t^2 = beta_tilde_t): `sample_euler_ancestral` with eta = 1.

    noise_sampler: as there. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)

    def made(levels: Floats) -> StepTable:
        return euler_table(sigma_tables.churned(levels, eta=1.0))

    return noised(call, made, noise_sampler, any_model=True)


def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: NoiseSampler | None = None,
    s_noise: float = 1.0,
    s_noise_end: float | None = None,
    noise_clip_std: float = 0.0,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """x_0 and new noise of the next level: multistep consistency sampling (arXiv 2303.01469, algorithm 1).

    Args:
        noise_sampler: as in `sample_euler_ancestral`.
        s_noise, s_noise_end: scale of the noise at the first and at the last step, evenly between; None: the first one.
        noise_clip_std: the noise is kept within so many of its standard deviations; 0: not. Not with seeds.

    The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    sigma_tables.check(noise_clip_std=noise_clip_std)
    if noise_clip_std and seeds is not None:
        raise InputError("noise_clip_std is for noise of torch; with seeds use noise_clip_std=0")

    def clip(noise: NoiseSampler) -> NoiseSampler:
        def clipped(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            z = noise(sigma, sigma_next)
            bound = noise_clip_std * z.std()
            return z.clamp(-bound, bound)

        return clipped

    made = partial(tables.lcm, s_noise=s_noise, s_noise_end=s_noise_end)
    return noised(call, made, clip(noise_sampler or fresh(call)) if noise_clip_std else noise_sampler)


def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """A second order exponential multistep method in x_0 (Zhang et al. 2023, arXiv 2308.02157).

    `sample_dpmpp_2m_sde` with eta = 0 and "heun". Its noise is drawn, as in ComfyUI, and has no weight.
    s_noise, noise_sampler: without effect. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    return noised(call, partial(tables.res_multistep, s_noise=s_noise), noise_sampler, any_model=True)


def sample_res_multistep_ancestral(
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
    """`sample_res_multistep` down to sigma_down, then noise up to the next sigma.

    eta, s_noise, noise_sampler: as in `sample_euler_ancestral`. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    return noised(call, partial(tables.res_multistep, eta=eta, s_noise=s_noise), noise_sampler, any_model=True)


def sample_heunpp2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """A mean of up to three slopes, two Euler steps ahead, weighted by their sigmas; with churn.

    Three evaluations a step. s_churn, s_tmin, s_tmax, s_noise: as in `sample_euler`.
    The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    evaluations = tables.heunpp2_evaluations(host(sigmas)) if len(sigmas) > 1 else 1
    return with_churn(call, tables.heunpp2, (s_churn, s_tmin, s_tmax, s_noise), evaluations, always=True)


def sample_ipndm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
) -> Tensor:
    """iPNDM (Zhang & Chen 2022, arXiv 2204.13902): Adams-Bashforth with the weights of equal steps.

    max_order: 1 ... 4. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable)
    return plain(call, partial(tables.ipndm, max_order=max_order))


def sample_deis(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
    deis_mode: str = "tab",
) -> Tensor:
    """tAB-DEIS (Zhang & Chen 2022, arXiv 2204.13902): a polynomial in time through the last slopes.

    max_order: 1 ... 4. deis_mode: "tab". The sigmas go one way. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable)
    return plain(call, partial(tables.deis, max_order=max_order, deis_mode=deis_mode))


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
    cfg_pp: bool = False,
) -> Tensor:
    """Euler's method along ge_gamma d_i + (1 - ge_gamma) d_{i-1} (Permenter & Yuan 2023, arXiv 2306.04848).

    cfg_pp: False; CFG++ needs ComfyUI's own model. The rest: see the docstring of `k_diffusion`.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable)
    if cfg_pp:
        raise ConfigError("cfg_pp is True; allowed: False; take ComfyUI's own sampler, whose model it reaches into")
    return plain(call, partial(tables.gradient_estimation, ge_gamma=ge_gamma))

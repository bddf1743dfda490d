"""k-diffusion's samplers, with its signatures, as tables: ``from fastddpm import k_sampling as sampling``.

A model is called as model(x, sigma, **extra_args), with x = x_0 + sigma eps, and returns x_0. The sigmas are the
caller's. What is returned is what k-diffusion 0.1.1 returns, but for rounding: same defaults, and torch's global
random numbers drawn in the same order. Nothing in a step waits for the GPU; the sigmas are read once, at the start.

ComfyUI's own samplers (`_k_comfy`) are as there. And with a model that ComfyUI wraps the others follow ComfyUI where it
differs: noise is of ``extra_args["seed"]``, churn is drawn where there is some, lms ends with x_0, and a rectified flow
is an error where its noise is another.

Arguments that all have in common:
    model: model(x, sigma, **extra_args) -> x_0, shaped as x; sigma is [B] in x's dtype. Anything callable.
    x: where to start, [B, ...], of noise level sigmas[0]; never written to.
    sigmas: [n + 1] noise levels, above 0 but for the last one, on any device. With fewer than two x is returned.
    extra_args: passed on to the model.
    callback: called once a step, behind the model's first evaluation, with a dict of x (the state at sigma_hat: what is
        written into it counts, unless x has half precision), i, sigma, sigma_hat and denoised (the model's output).
    disable: hide the progress bar; None: where stderr is no terminal.
    seeds: beyond k-diffusion: draw the noise from these, one integer or one a sample, instead of torch's random
        numbers. Then it is the kernel's own, and a sample doesn't depend on what it is sampled with.

All return x at sigmas[-1], in the dtype of x, a tensor of its own; and raise
    ConfigError: for sigmas or numbers that aren't allowed.
    InputError: for an x that is no [B, ...], wrong seeds, or a noise that isn't that of the model.
    NonFiniteError: where a sample became NaN or infinite.

`table` returns the table itself, for `fastddpm.Sampler`, which on a GPU makes one graph of a step. Computed in float32
(float64 on the CPU) whatever x is; what the model is given and what is returned has x's dtype.
(k-diffusion turns an x of half precision into float32 in the samplers that divide by a sigma.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..solvers import StepTable
from ..solvers.churn import Churned
from ..solvers.dpm2 import dpm2_table
from ..solvers.euler import euler_table
from ..solvers.heun import heun_table
from ..solvers.levels import Floats
from . import _k_tables as tables
from . import sigmas as sigma_tables
from ._k_call import Call, Callback, Model, NoiseSampler, Seeds, comfy_sampling
from ._k_comfy import (
    sample_ddpm,
    sample_deis,
    sample_gradient_estimation,
    sample_heunpp2,
    sample_ipndm,
    sample_lcm,
    sample_res_multistep,
    sample_res_multistep_ancestral,
)
from ._k_loop import host, noised, plain, with_churn
from ._k_noise import BrownianTreeNoiseSampler
from ._k_sigmas import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)
from ._k_stochastic import (
    sample_dpm_2_ancestral,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
    sample_euler_ancestral,
)

__all__ = [
    "BrownianTreeNoiseSampler",
    "append_zero",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "sample_ddpm",
    "sample_deis",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_gradient_estimation",
    "sample_heun",
    "sample_heunpp2",
    "sample_ipndm",
    "sample_lcm",
    "sample_lms",
    "sample_res_multistep",
    "sample_res_multistep_ancestral",
    "table",
    "to_d",
]


def table(name: str, sigmas: Tensor | Sequence[float], **options: Any) -> StepTable:
    """The table of the sampler ``sample_<name>``, for `fastddpm.Sampler`: ``table("dpmpp_2m", sigmas)``.

    Args:
        name: of any sampler here but "dpm_fast".
        sigmas: [n + 1] noise levels, above 0 but for the last one.
        options: the sampler's own, with its defaults, such as s_churn, s_noise, eta, solver_type, order.

    The x_0 that a trace of "dpmpp_sde" shows is NaN for the first of a step's two rows, which doesn't keep it.

    Raises:
        ConfigError: for a name, an option or sigmas that are not among these.
    """
    if name not in _TABLES:
        raise ConfigError(f"there is no sampler {name!r}; allowed: {', '.join(map(repr, _TABLES))}")
    of, allowed = _TABLES[name]
    for option in options:
        if option not in allowed:
            raise ConfigError(f"sampler {name} has no option {option!r}; allowed: {', '.join(allowed) or 'none'}")
    return of(host(sigmas), **options)


def sample_euler(
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
    """Euler's method with churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2 without its lines 7 and 8).

    s_churn, s_tmin, s_tmax, s_noise: as in `solvers.euler`. The rest: see the module's docstring.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    return with_churn(call, lambda given, _: euler_table(given), (s_churn, s_tmin, s_tmax, s_noise))


def sample_heun(
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
    """Heun's method with churn (Karras et al. 2022, algorithm 2): two evaluations a step. See `sample_euler`."""
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    return with_churn(call, lambda given, _: heun_table(given), (s_churn, s_tmin, s_tmax, s_noise), 2)


def sample_dpm_2(
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
    """DPM-Solver-2 as `solvers.dpm2` has it, with churn: two evaluations a step. See `sample_euler`."""
    call = Call(model, x, sigmas, extra_args, callback, disable, seeds)
    return with_churn(call, lambda given, _: dpm2_table(given), (s_churn, s_tmin, s_tmax, s_noise), 2)


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep in sigma (Adams-Bashforth): a polynomial through the last `order` slopes, 1 ... 4.

    The sigmas go one way. With a model of ComfyUI the last step to 0 has order 1, as there. The rest: see the module's
    docstring.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable)
    denoise = comfy_sampling(model) is not None
    return plain(call, partial(sigma_tables.linear_multistep, order=order, denoise=denoise))


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): `solvers.dpm_solver`.

    The sigmas go one way. The rest: see the module's docstring.
    """
    call = Call(model, x, sigmas, extra_args, callback, disable)
    return plain(call, partial(sigma_tables.multistep, order=2))


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: float | Tensor,
    sigma_max: float | Tensor,
    n: int,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    seeds: Seeds = None,
) -> Tensor:
    """DPM-Solver-fast (Lu et al. 2022, arXiv 2206.00927, section 3.4): n evaluations, up to three a step.

    Args:
        sigma_min, sigma_max: the last and the first noise level, above 0.
        n: how often the model is evaluated.
        eta, s_noise, noise_sampler: as in `sample_euler_ancestral`.

    The callback's dict has t and t_up, too: -log(sigma). The rest: see the module's docstring.
    """
    orders = tables.fast_orders(n)
    ends = [float(sigma_max), float(sigma_min)]
    made = tables.dpm_fast(ends[1], ends[0], n, eta=eta, s_noise=s_noise)
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    t = torch.linspace(-math.log(ends[0]), -math.log(ends[1]), len(orders) + 1, dtype=exact, device=x.device)

    def told(step: dict[str, Any]) -> object:
        return callback and callback({**step, "t": t[step["i"]], "t_up": t[step["i"]]})

    call = Call(model, x, t.neg().exp(), extra_args, told if callback else None, disable, seeds)
    return noised(call, lambda sigmas: made, noise_sampler, orders, any_model=not eta)


def _churned(of: Callable[[Churned], StepTable], sigmas: Floats, **options: Any) -> StepTable:
    return of(sigma_tables.churned(sigmas, **options))


def _heunpp2(sigmas: Floats, **options: Any) -> StepTable:
    return tables.heunpp2(sigma_tables.churned(sigmas, **options), sigmas)


_CHURN, _ANCESTRAL = ("s_churn", "s_tmin", "s_tmax", "s_noise"), ("eta", "s_noise")
_TABLES: dict[str, tuple[Callable[..., StepTable], tuple[str, ...]]] = {
    "euler": (partial(_churned, euler_table), _CHURN),
    "heun": (partial(_churned, heun_table), _CHURN),
    "dpm_2": (partial(_churned, dpm2_table), _CHURN),
    "euler_ancestral": (partial(_churned, euler_table, eta=1.0), _ANCESTRAL),
    "dpm_2_ancestral": (partial(_churned, dpm2_table, eta=1.0), _ANCESTRAL),
    "lms": (partial(sigma_tables.linear_multistep, order=4), ("order",)),
    "dpmpp_2s_ancestral": (partial(_churned, tables.dpmpp_2s, eta=1.0), _ANCESTRAL),
    "dpmpp_sde": (tables.dpmpp_sde, (*_ANCESTRAL, "r")),
    "dpmpp_2m": (partial(sigma_tables.multistep, order=2), ()),
    "dpmpp_2m_sde": (partial(sigma_tables.multistep, order=2, eta=1.0), (*_ANCESTRAL, "solver_type")),
    "dpmpp_3m_sde": (partial(sigma_tables.multistep, order=3, eta=1.0, solver_type="heun"), _ANCESTRAL),
    "ddpm": (partial(_churned, euler_table, eta=1.0), ()),
    "lcm": (tables.lcm, ("s_noise", "s_noise_end")),
    "heunpp2": (_heunpp2, _CHURN),
    "ipndm": (tables.ipndm, ("max_order",)),
    "deis": (tables.deis, ("max_order", "deis_mode")),
    "res_multistep": (tables.res_multistep, ("s_noise",)),
    "res_multistep_ancestral": (partial(tables.res_multistep, eta=1.0), _ANCESTRAL),
    "gradient_estimation": (tables.gradient_estimation, ("ge_gamma",)),
}

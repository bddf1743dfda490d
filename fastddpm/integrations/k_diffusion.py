"""k-diffusion's samplers, with its signatures, as tables: ``from fastddpm import k_sampling as sampling``.

A model is called as model(x, sigma, **extra_args), with x = x_0 + sigma eps, and returns x_0. The sigmas are the
caller's. What is returned is what k-diffusion 0.1.1 returns, but for rounding: same defaults, and torch's global
random numbers drawn in the same order. Nothing in a step waits for the GPU; the sigmas are read once, at the start.

Beyond k-diffusion's arguments each sampler that adds noise takes ``seeds``, one integer or one a sample: then the noise
is the kernel's own, and a sample doesn't depend on what it is sampled with. ``table`` returns the table itself, for
`fastddpm.Sampler`, which on a GPU makes one graph of a step.

Implemented in float32 (float64 on the CPU) whatever x is; what the model is given and what is returned has x's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..solvers import StepTable
from ..solvers.churn import Churned
from ..solvers.dpm2 import dpm2_table
from ..solvers.euler import euler_table
from ..solvers.heun import heun_table
from ..solvers.levels import Floats
from . import sigmas as sigma_tables
from .given import Rows

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]
NoiseSampler = Callable[[Tensor, Tensor], Tensor]
Seeds = int | Sequence[int] | None

__all__ = [
    "BrownianTreeNoiseSampler",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_3m_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "table",
]


def table(name: str, sigmas: Tensor | Sequence[float], **options: Any) -> StepTable:
    """The table of the sampler ``sample_<name>``, for `fastddpm.Sampler`: ``table("dpmpp_2m", sigmas)``.

    Args:
        name: "euler", "heun", "dpm_2", "euler_ancestral", "dpm_2_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde",
            "dpmpp_3m_sde".
        sigmas: [n + 1] noise levels, above 0 but for the last one.
        options: the sampler's own, with its defaults: s_churn, s_tmin, s_tmax, s_noise; eta, s_noise; solver_type;
            order.

    Raises:
        ConfigError: for a name, an option or sigmas that are not among these.
    """
    if name not in _TABLES:
        raise ConfigError(f"there is no sampler {name!r}; allowed: {', '.join(map(repr, _TABLES))}")
    of, allowed = _TABLES[name]
    for option in options:
        if option not in allowed:
            raise ConfigError(f"sampler {name} has no option {option!r}; allowed: {', '.join(allowed) or 'none'}")
    return of(_host(sigmas), **options)


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

    Args:
        model: model(x, sigma, **extra_args) -> x_0, shaped as x; sigma is [B] in x's dtype.
        x: where to start, [B, ...], of noise level sigmas[0]; never written to.
        sigmas: [n + 1] noise levels, above 0 but for the last.
        extra_args: passed on to the model.
        callback: called once a step, before it, with a dict of x (at sigma_hat), i, sigma, sigma_hat, denoised.
        disable: hide the progress bar; None: where stderr is no terminal.
        s_churn, s_tmin, s_tmax, s_noise: as in `solvers.euler`.
        seeds: draw the churn's noise from these instead of torch's global random numbers.

    Returns:
        x at sigmas[-1], in the dtype of x.

    Raises:
        ConfigError: for sigmas or numbers that aren't allowed.
        InputError: for an x that is no [B, ...], or wrong seeds.
        NonFiniteError: where a sample became NaN or infinite.
    """
    churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _with_churn(euler_table, 1, model, x, sigmas, extra_args, callback, disable, seeds, churn)


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
    churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _with_churn(heun_table, 2, model, x, sigmas, extra_args, callback, disable, seeds, churn)


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
    churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    return _with_churn(dpm2_table, 2, model, x, sigmas, extra_args, callback, disable, seeds, churn)


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
        model, x, sigmas, extra_args, callback, disable, seeds: as in `sample_euler`. The sigmas fall, unless eta is 0.

    Returns and raises as `sample_euler` does.
    """
    made = table("euler_ancestral", sigmas, eta=eta, s_noise=s_noise)
    noise = noise_sampler or _randn_like(x, seeds)
    return _noised(made, 1, model, x, sigmas, extra_args, callback, disable, seeds, noise)


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
    made = table("dpm_2_ancestral", sigmas, eta=eta, s_noise=s_noise)
    noise = noise_sampler or _randn_like(x, seeds)
    return _noised(made, 2, model, x, sigmas, extra_args, callback, disable, seeds, noise)


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

    The other arguments, what is returned and raised are those of `sample_euler`; the sigmas go one way.
    """
    made = table("lms", sigmas, order=order)
    return _loop(Rows(made, x), 1, model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): `solvers.dpm_solver`.

    The arguments, what is returned and raised are those of `sample_euler`; the sigmas go one way.
    """
    return _loop(Rows(table("dpmpp_2m", sigmas), x), 1, model, x, sigmas, extra_args, callback, disable)


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
            x; None: a `BrownianTreeNoiseSampler`, as in k-diffusion, which needs torchsde.
        solver_type: "midpoint" or "heun".
        model, x, sigmas, extra_args, callback, disable, seeds: as in `sample_euler`. The sigmas fall.

    Returns and raises as `sample_euler` does; and raises `ConfigError` where there is no torchsde.
    """
    made = table("dpmpp_2m_sde", sigmas, eta=eta, s_noise=s_noise, solver_type=solver_type)
    noise = noise_sampler or _brownian(x, sigmas, seeds, eta)
    noise = noise if eta else None
    return _noised(made, 1, model, x, sigmas, extra_args, callback, disable, seeds, noise)


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
    """DPM-Solver++(3M) for the SDE, as k-diffusion has it: ``solvers.dpm_solver(order=3, solver_type="heun")``.

    The arguments, what is returned and raised are those of `sample_dpmpp_2m_sde`.
    """
    made = table("dpmpp_3m_sde", sigmas, eta=eta, s_noise=s_noise)
    noise = noise_sampler or _brownian(x, sigmas, seeds, eta)
    noise = noise if eta else None
    return _noised(made, 1, model, x, sigmas, extra_args, callback, disable, seeds, noise)


class BrownianTreeNoiseSampler:
    """Noise of a Brownian path (torchsde): the same path whatever the steps through it, for one seed.

    Args:
        x: whose shape, dtype and device the noise has.
        sigma_min, sigma_max: ends of the path.
        seed: an integer; a list of one a sample; None: drawn from torch's global random numbers.
        transform: from sigma to the path's time.

    Raises:
        ConfigError: where torchsde isn't installed.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: sigma,
    ) -> None:
        try:
            from torchsde import BrownianTree
        except ImportError as error:
            raise ConfigError(
                "the noise of this sampler is by default a Brownian path of torchsde, as in k-diffusion, and torchsde "
                "isn't installed; give noise_sampler=lambda sigma, sigma_next: torch.randn_like(x), or seeds=0, or "
                "install it"
            ) from error
        self.transform = transform
        first, last = self._time(sigma_min), self._time(sigma_max)
        self._batched, self._sign = isinstance(seed, Sequence), -1.0 if first > last else 1.0
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        start = torch.zeros_like(x[0] if self._batched else x)
        self._trees = [
            BrownianTree(min(first, last), start, max(first, last), entropy=s)
            for s in (seed if isinstance(seed, Sequence) else [seed])
        ]

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Standard normal noise, shaped as x: the path's increment between the two, over its deviation."""
        start, end = self._time(sigma), self._time(sigma_next)
        path = torch.stack([tree(min(start, end), max(start, end)) for tree in self._trees])
        increment = path if self._batched else path[0]
        return increment * (self._sign if start < end else -self._sign) / (end - start).abs().sqrt()

    def _time(self, sigma: float | Tensor) -> Tensor:
        return self.transform(torch.as_tensor(sigma))


def _with_churn(
    of: Callable[[Churned], StepTable],
    evaluations: int,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    seeds: Seeds,
    churn: dict[str, Any],
) -> Tensor:
    """k-diffusion draws noise before each step, also where there is no churn; a table adds it behind the one before."""
    sigma_tables.check(**churn)
    if isinstance(sigmas, Tensor):  # as torch compares a float with them
        churn |= {name: float(torch.tensor(churn[name], dtype=sigmas.dtype)) for name in ("s_tmin", "s_tmax")}
    given = sigma_tables.churned(_host(sigmas), **churn)
    last = len(sigmas) - 2

    def noise(i: int) -> Tensor | None:
        return torch.randn_like(x) if i < last else None

    rows = Rows(of(given), x, seeds)
    z, scale = torch.randn_like(x) if seeds is None else rows.noise_of_seeds(), sigma_tables.first_lift(given)
    if scale:
        rows.x = rows.x + scale * z.to(rows.x.dtype)
    return _loop(rows, evaluations, model, x, sigmas, extra_args, callback, disable, noise)


def _noised(
    made: StepTable,
    evaluations: int,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    seeds: Seeds,
    noise_sampler: NoiseSampler | None,
) -> Tensor:
    """Noise behind each step that doesn't end at 0."""
    if seeds is not None and noise_sampler is not None:
        raise InputError("seeds and noise_sampler are both given; the noise is of one of them")
    rows, last = Rows(made, x, seeds), len(sigmas) - 2
    to_zero = made.levels[-1, 1] == 0

    def noise(i: int) -> Tensor | None:
        return None if noise_sampler is None or (i == last and to_zero) else noise_sampler(sigmas[i], sigmas[i + 1])

    return _loop(rows, evaluations, model, x, sigmas, extra_args, callback, disable, noise)


@torch.no_grad()
def _loop(
    rows: Rows,
    evaluations: int,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise: Callable[[int], Tensor | None] | None = None,
) -> Tensor:
    """All steps, of so many evaluations each but for the last; `noise` is drawn behind a step's last one."""
    from tqdm.auto import trange

    told, times, last = extra_args or {}, rows.times(x.dtype), rows.table.num_rows - 1
    for i in trange(len(sigmas) - 1, disable=disable):
        for row in range(evaluations * i, min(evaluations * (i + 1), last + 1)):
            state = rows.x.to(x.dtype)
            denoised = model(state, times[row], **told)
            if callback is not None and row == evaluations * i:
                hat = times[row, 0]
                callback({"x": state, "i": i, "sigma": sigmas[i], "sigma_hat": hat, "denoised": denoised})
            ends = row in (evaluations * (i + 1) - 1, last)
            rows.step(row, denoised, partial(noise, i) if noise is not None and ends else None)
    return rows.finished().to(x.dtype)


def _host(sigmas: Tensor | Sequence[float]) -> Floats:
    return sigma_tables.levels(sigmas.detach().cpu().double().numpy() if isinstance(sigmas, Tensor) else sigmas)


def _randn_like(x: Tensor, seeds: Seeds) -> NoiseSampler | None:
    return None if seeds is not None else lambda sigma, sigma_next: torch.randn_like(x)


def _brownian(x: Tensor, sigmas: Tensor, seeds: Seeds, eta: float) -> NoiseSampler | None:
    if seeds is not None:
        return None
    seed = int(torch.randint(0, 2**63 - 1, []).item())  # drawn where it isn't needed, too, as k-diffusion does
    return BrownianTreeNoiseSampler(x, sigmas[sigmas > 0].min(), sigmas.max(), seed) if eta else None


def _churn_table(of: Callable[[Churned], StepTable], sigmas: Floats, **options: Any) -> StepTable:
    return of(sigma_tables.churned(sigmas, **options))


_CHURN, _ANCESTRAL = ("s_churn", "s_tmin", "s_tmax", "s_noise"), ("eta", "s_noise")
_TABLES: dict[str, tuple[Callable[..., StepTable], tuple[str, ...]]] = {
    "euler": (partial(_churn_table, euler_table), _CHURN),
    "heun": (partial(_churn_table, heun_table), _CHURN),
    "dpm_2": (partial(_churn_table, dpm2_table), _CHURN),
    "euler_ancestral": (partial(_churn_table, euler_table, eta=1.0), _ANCESTRAL),
    "dpm_2_ancestral": (partial(_churn_table, dpm2_table, eta=1.0), _ANCESTRAL),
    "lms": (partial(sigma_tables.linear_multistep, order=4), ("order",)),
    "dpmpp_2m": (partial(sigma_tables.multistep, order=2), ()),
    "dpmpp_2m_sde": (partial(sigma_tables.multistep, order=2, eta=1.0), (*_ANCESTRAL, "solver_type")),
    "dpmpp_3m_sde": (partial(sigma_tables.multistep, order=3, eta=1.0, solver_type="heun"), _ANCESTRAL),
}

"""EDM's networks, D(x; sigma), sampled by algorithm 2 of Karras et al. 2022 (arXiv 2206.00364) as a table.

    images = edm.edm_sampler(net, latents, class_labels, num_steps=18)  # net: EDM's, or one with its attributes

Written from the paper. `solvers.heun` with an `EDMSchedule` is the same for any model; here the network's own limits
(`sigma_min`, `sigma_max`, `round_sigma`) are kept to, and the noise may be the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..buffers import initial_noise
from ..errors import ConfigError, InputError
from ..sampler import Sampler
from ..seeds import sample_seeds
from ..solvers.churn import Churned
from ..solvers.heun import heun_table
from ..solvers.levels import Floats
from . import sigmas as sigma_tables
from .given import Rows


def edm_sampler(
    net: Callable[..., Tensor],
    latents: Tensor | None,
    class_labels: Tensor | None = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    *,
    seeds: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Tensor:
    """Samples by algorithm 2: Heun's method with churn, 2 num_steps - 1 evaluations.

    Args:
        net: net(x, sigma, class_labels) -> D, shaped as x; sigma is [B]. Its `sigma_min` and `sigma_max`, where it has
            them, bound the levels, and its `round_sigma` says which ones it knows.
        latents: standard normal, [B, C, H, W]; never written to. None, with `seeds` a sequence: drawn from them, in the
            shape of the network's `img_channels` and `img_resolution`.
        class_labels: what the network takes, [B, classes] or None.
        randn_like: draws line 5's noise, once before each step, like a float64 tensor of the latents' shape.
        num_steps: N.
        sigma_min, sigma_max, rho: the levels of eq. 5.
        S_churn, S_min, S_max, S_noise: how much noise is added, between which levels, and its scale (line 2 and 5).
        seeds: one integer or one a sample: line 5's noise is the kernel's own, a function of each sample's seed, and
            the loop, in float32, a `Sampler`'s: on a GPU one graph a step. `randn_like` is not called.
        dtype: of the state and the result; None: torch.float64 on the CPU, torch.float32 on a GPU, the only one there.
            The network is given x in it.
        progress: show a bar on stderr.

    Returns:
        [B, C, H, W] in `dtype`.

    Raises:
        ConfigError: for a number that isn't allowed.
        InputError: for latents, seeds or a dtype that don't fit.
        NonFiniteError: where a sample became NaN or infinite.
    """
    device = _device(net, latents)
    dtype = dtype or (torch.float64 if device.type == "cpu" else torch.float32)
    if dtype not in (torch.float32, torch.float64) or (dtype == torch.float64 and device.type != "cpu"):
        raise InputError(f"dtype is {dtype} on {device}; allowed: torch.float32, or torch.float64 on the CPU")
    given = _churned(net, num_steps, sigma_min, sigma_max, rho, (S_churn, S_min, S_max, S_noise))
    table, sigma = heun_table(given), math.exp(given.log_sigma[0] + given.log_kept[0])
    if latents is None:
        shape = _shape(net, seeds)
        latents = initial_noise(sample_seeds(seeds or 0, shape[0]).to(device), shape[1:], dtype)
    rows = Rows(table, latents.to(device, dtype) * sigma, seeds)
    # drawn as theirs draws it whatever the dtype here: in float64, in the memory format of the latents
    blank = torch.empty_like(latents, dtype=torch.float64, device=device)

    def draw() -> Tensor:
        return randn_like(blank).to(dtype).contiguous()

    z = draw() if seeds is None else rows.noise_of_seeds()
    rows.x = rows.x + sigma_tables.first_lift(given) * z
    model, told = partial(_network, net), {"class_labels": class_labels}
    if seeds is None or dtype == torch.float64:  # a Sampler tells its model sigma in float32
        return _loop(rows, partial(model, **told), num_steps, draw, progress)
    sampler = Sampler(model, table, device=device, dtype=dtype)
    return sampler.sample(tuple(rows.x.shape), seeds=seeds, x_T=rows.x, model_kwargs=told, progress=progress)


@torch.no_grad()
def _loop(rows: Rows, model: Callable[..., Tensor], steps: int, draw: Callable[[], Tensor], progress: bool) -> Tensor:
    """Each step's noise is added behind the step before, where the table has it: drawn in the paper's order."""
    from tqdm import tqdm

    times = rows.times(rows.x.dtype)
    for row in tqdm(range(2 * steps - 1), disable=not progress):
        ends = row % 2 == 1
        rows.step(row, model(rows.x, times[row]), draw if ends else None)
    return rows.finished()


def _network(net: Callable[..., Tensor], x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
    return net(x, sigma.to(x.dtype), class_labels)


def _churned(
    net: Any,
    steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    churn: tuple[float, float, float, float],
) -> Churned:
    """Eq. 5's levels that the network knows, with churn."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= 1_000_000:
        raise ConfigError(f"num_steps is {steps!r}; allowed: an integer of at least 1")
    sigma_tables.check(sigma_min=sigma_min, rho=rho)
    low, high = max(sigma_min, float(getattr(net, "sigma_min", 0.0))), float(getattr(net, "sigma_max", math.inf))
    high = min(sigma_max, high)
    if not 0 < low < high < math.inf or rho == 0:
        raise ConfigError(
            f"sigma_min, sigma_max and rho are {low}, {high} and {rho} (within what the network knows); needed: "
            "0 < sigma_min < sigma_max, and rho above 0"
        )
    rounded = partial(_rounded, getattr(net, "round_sigma", None))
    ramp = np.linspace(0.0, 1.0, int(steps))
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    levels = sigma_tables.levels(np.append(rounded(sigmas), 0.0))
    s_churn, s_tmin, s_tmax, s_noise = churn
    return sigma_tables.churned(levels, s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise, rounded=rounded)


def _rounded(round_sigma: Callable[[Tensor], Any] | None, sigma: Floats) -> Floats:
    if round_sigma is None:
        return sigma
    return torch.as_tensor(round_sigma(torch.from_numpy(sigma))).detach().cpu().double().numpy()


def _device(net: Any, latents: Tensor | None) -> torch.device:
    own = next(net.parameters(), None) if isinstance(net, nn.Module) else None
    if own is not None:
        return own.device
    return torch.device("cpu") if latents is None else latents.device


def _shape(net: Any, seeds: int | Sequence[int] | None) -> tuple[int, ...]:
    channels, size = getattr(net, "img_channels", None), getattr(net, "img_resolution", None)
    if not isinstance(seeds, Sequence) or channels is None or size is None:
        raise InputError(
            "latents are None; give standard normal ones, [B, C, H, W], or a seed a sample (seeds=range(16)) for a "
            "network with img_channels and img_resolution"
        )
    return len(seeds), channels, size, size

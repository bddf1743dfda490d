"""k-diffusion's noise levels and its small functions of them, on tensors: same names, arguments and results."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Device = torch.device | str | int


def append_zero(x: Tensor) -> Tensor:
    """`x`, [n], with a zero behind it, [n + 1], in its dtype and on its device."""
    return torch.cat([x, x.new_zeros(1)])


def get_sigmas_karras(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: Device = "cpu") -> Tensor:
    """n levels from sigma_max to sigma_min, evenly in sigma^(1 / rho), and 0 (2206.00364, eq. 5): float [n + 1]."""
    most, least = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return append_zero((most + torch.linspace(0, 1, n) * (least - most)) ** rho).to(device)


def get_sigmas_exponential(n: int, sigma_min: float, sigma_max: float, device: Device = "cpu") -> Tensor:
    """n levels from sigma_max to sigma_min, evenly in log sigma, and 0: float [n + 1]."""
    return append_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), n, device=device).exp())


def get_sigmas_polyexponential(
    n: int, sigma_min: float, sigma_max: float, rho: float = 1.0, device: Device = "cpu"
) -> Tensor:
    """n levels from sigma_max to sigma_min whose log falls as (1 - i / (n - 1))^rho, and 0: float [n + 1]."""
    most, least = math.log(sigma_max), math.log(sigma_min)
    return append_zero((torch.linspace(1, 0, n, device=device) ** rho * (most - least) + least).exp())


def get_sigmas_vp(
    n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3, device: Device = "cpu"
) -> Tensor:
    """n levels of the variance preserving SDE from t = 1 to eps_s (arXiv 2206.00364, table 1), and 0: float [n + 1]."""
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero((torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1).sqrt())


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The slope dx / dsigma = (x - denoised) / sigma, shaped as x; sigma is a number, or [B]."""
    if isinstance(sigma, Tensor):
        sigma = sigma.reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))
    return (x - denoised) / sigma


def get_ancestral_step(
    sigma_from: Tensor | float, sigma_to: Tensor | float, eta: float = 1.0
) -> tuple[Tensor | float, Tensor | float]:
    """(sigma_down, sigma_up): where a step to `sigma_to` goes first, and how much noise then leads up to it."""
    if not eta:
        return sigma_to, 0.0
    up = min(sigma_to, eta * (sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2) ** 0.5)
    return (sigma_to**2 - up**2) ** 0.5, up

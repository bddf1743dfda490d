"""The noise schedule of EDM: Karras et al. 2022, "Elucidating the design space of diffusion models" (2206.00364)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .errors import ConfigError


@dataclass(frozen=True)
class EDMSchedule:
    """Noise levels without time steps: x = x_0 + sigma eps (arXiv 2206.00364, table 1, last column).

    For a network that is called with c_in x and c_noise = ln(sigma) / 4 (``prediction_type="edm"``), or one with the
    preconditioning inside, D(x; sigma) (``prediction_type="sample"``).

    Attributes:
        sigma_min, sigma_max: the least and the greatest noise level to sample at.
        sigma_data: the data's standard deviation, as in training.

    Raises:
        ConfigError: unless 0 < sigma_min < sigma_max and sigma_data > 0, all finite.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for name in ("sigma_min", "sigma_max", "sigma_data"):
            value = getattr(self, name)
            number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value!r}; allowed: a number above 0")
        if self.sigma_min >= self.sigma_max:
            raise ConfigError(f"sigma_min is {self.sigma_min:g}; allowed: below sigma_max, which is {self.sigma_max:g}")

    @property
    def log_sigmas(self) -> tuple[float, float]:
        """(ln sigma_min, ln sigma_max)."""
        return math.log(self.sigma_min), math.log(self.sigma_max)

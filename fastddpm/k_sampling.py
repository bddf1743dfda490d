"""k-diffusion's samplers by their own names: ``from fastddpm import k_sampling as sampling``."""

from .integrations.k_diffusion import *  # noqa: F403
from .integrations.k_diffusion import __all__ as __all__

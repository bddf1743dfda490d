"""k-diffusion's samplers by their own names: ``from fastddpm import k_sampling as sampling``."""

from .integrations.k_diffusion import *  # noqa: F403
from .integrations.k_diffusion import __all__ as __all__


def __getattr__(name: str) -> object:
    if name == "sample_dpm_adaptive":
        raise AttributeError(
            "sample_dpm_adaptive chooses its steps on the host; take k-diffusion's, or sample_dpm_fast"
        )
    raise AttributeError(f"there is no {name}; there are {', '.join(__all__)}")

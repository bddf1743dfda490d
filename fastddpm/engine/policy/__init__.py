"""Diffusion Policy's 1-D UNet in the engine: ``PolicyEngine(unet)`` does what the module does, in less time.

For ConditionalUnet1D of Diffusion Policy (Chi et al. 2023, arXiv 2303.04137) and LeRobot's DiffusionConditionalUnet1d,
which have the same layers under other names. Both are recognised by their layers; neither package is imported.
"""

from .engine import ConditionedPolicy, PolicyEngine
from .network import is_policy_unet

__all__ = ["ConditionedPolicy", "PolicyEngine", "is_policy_unet"]

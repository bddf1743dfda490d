"""The UNet engine: ``engine.compile(unet, batch=16)`` is a model that does what the UNet does, in less time."""

from __future__ import annotations

from typing import Any, overload

from torch import nn

from ..unet import UNet
from .engine import Engine
from .plan import Plan
from .policy import PolicyEngine, is_policy_unet

__all__ = ["Engine", "Plan", "PolicyEngine", "compile"]


@overload
def compile(unet: UNet, **options: Any) -> Engine: ...


@overload
def compile(unet: nn.Module, **options: Any) -> Engine | PolicyEngine: ...


def compile(unet: Any, **options: Any) -> Engine | PolicyEngine:
    """The engine of a UNet: ``compile(unet, batch=16, dtype=torch.bfloat16)``.

    `Engine` of our `UNet`; `PolicyEngine` of the 1-D UNet of Diffusion Policy or LeRobot. Arguments and errors are
    theirs; `InputError` for another module.
    """
    return PolicyEngine(unet, **options) if is_policy_unet(unet) else Engine(unet, **options)

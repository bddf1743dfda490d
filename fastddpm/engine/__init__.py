"""The UNet engine: ``engine.compile(unet, batch=16)`` is a model that does what the UNet does, in less time."""

from __future__ import annotations

from typing import Any

from .engine import Engine
from .plan import Plan

__all__ = ["Engine", "Plan", "compile"]


def compile(unet: Any, **options: Any) -> Engine:
    """`Engine` of a UNet: ``compile(unet, batch=16, dtype=torch.bfloat16)``. Arguments and errors are `Engine`'s."""
    return Engine(unet, **options)

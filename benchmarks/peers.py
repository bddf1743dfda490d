"""The peers of `integration_cases.py`: packages that may not be there, and two loops that no package has.

Those two are written out, from the papers: Diffusion Policy's, which is in no package of a registry, and EDM's, whose
licence is not ours.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import results

CHECKOUT = "GUIDED_DIFFUSION"  # environment variable: where guided-diffusion's checkout is


class Missing(Exception):
    """A peer that isn't there; the message says which and how to get it."""


def imported(name: str, empty: Sequence[str], how: str, bare: bool = False) -> ModuleType:
    """Module `name`, with empty modules for those of `empty` that don't import; `bare`: without its package's init."""
    if name in sys.modules:
        return sys.modules[name]
    package = name.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise Missing(f"{package} isn't installed: {how}")
    made: list[str] = []
    for part in empty:
        try:
            importlib.import_module(part)
        except Exception:  # torchvision's own build fails with a RuntimeError where it is for another torch
            names = [v for v in dict.fromkeys((part.partition(".")[0], part)) if v not in sys.modules]
            sys.modules.update({v: mock.MagicMock() for v in names})
            made += names
    if bare:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = list(spec.submodule_search_locations or ())
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Missing(f"{name} doesn't import ({type(error).__name__}: {error})") from error
    finally:
        for part in made:
            del sys.modules[part]


def guided_commit() -> str | None:
    """Where guided-diffusion's checkout is at, where it says so."""
    where = os.environ.get(CHECKOUT)
    return results.commit(Path(where).resolve())[0] if where else None


def conditional_sample(model: Any, scheduler: Any, steps: int, known: Tensor, mask: Tensor, **told: Any) -> Tensor:
    """The loop of Diffusion Policy and LeRobot (arXiv 2303.04137), with diffusers' scheduler."""
    x = torch.randn(known.shape, dtype=known.dtype, device=known.device)
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x[mask] = known[mask]
        output = model(x, t, local_cond=None, **told)
        x = scheduler.step(output, t, x).prev_sample
    x[mask] = known[mask]
    return x


def algorithm_2(net: Any, latents: Tensor, steps: int, churn: float) -> Tensor:
    """Karras et al. 2022 (arXiv 2206.00364), algorithm 2 with eq. 5's levels."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64, device=latents.device)
    low, high = 0.002 ** (1 / 7), 80.0 ** (1 / 7)
    sigmas = torch.cat([(high + ramp * (low - high)) ** 7, ramp.new_zeros(1)])
    x, gamma = latents.double() * sigmas[0], min(churn / steps, 2**0.5 - 1)
    for i in range(steps):
        hat = sigmas[i] + gamma * sigmas[i]
        x = x + (hat**2 - sigmas[i] ** 2).sqrt() * torch.randn_like(x)
        slope = (x - net(x, hat.expand(len(x))).double()) / hat
        there = x + (sigmas[i + 1] - hat) * slope
        if i + 1 < steps:
            second = (there - net(there, sigmas[i + 1].expand(len(x))).double()) / sigmas[i + 1]
            there = x + (sigmas[i + 1] - hat) * (slope + second) / 2
        x = there
    return x

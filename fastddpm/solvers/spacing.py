"""Which time steps of the training schedule a sampler of fewer steps visits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

SPACINGS = ("leading", "linspace", "trailing")

Spacing = str | Sequence[int] | NDArray[np.integer]


def timesteps(num_train_steps: int, steps: int | None, spacing: Spacing) -> NDArray[np.int64]:
    """The time steps to visit, int64 [steps], falling (Lin et al. 2023, arXiv 2305.08891, table 2).

    "leading", "linspace" and "trailing" are diffusers' ``timestep_spacing`` with ``steps_offset=0``, oddities and all:
    ``leading`` does not start at the last training step unless it visits all, and with a single step ``leading`` and
    ``linspace`` visit t = 0. (Where a rounding error gives diffusers' ``trailing`` one step too many, at t = -1, it is
    left out here.) Every fourth of 1000 time steps is ``steps=250, spacing="leading"``.

    The other forms are the respacing of Nichol and Dhariwal 2021 (arXiv 2102.09672, section 4), as improved-diffusion
    and guided-diffusion write it:

    - "10,10,20" or [10, 10, 20]: the schedule is cut into as many equal sections, the least noisy one first, and so
      many time steps of each are visited, evenly from its first to its last; "250" is one section.
    - "ddim50": every k-th time step from 0 on, with the k that gives 50 of them.

    Args:
        num_train_steps: T, the length of the training schedule.
        steps: how many to visit; None: all T, or as many as the sections or "ddimN" say (no other number is allowed).
        spacing: "leading", "linspace", "trailing", "ddimN", or sections.

    Raises:
        ConfigError: for a `steps` that is no integer in 1 ... T, or a `spacing` that is unknown or doesn't fit T.
    """
    if not isinstance(spacing, str) or spacing not in SPACINGS:
        return _respaced(num_train_steps, steps, spacing)
    if steps is None:
        steps = num_train_steps
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or not 1 <= steps <= num_train_steps:
        raise ConfigError(f"steps is {steps!r}; allowed: an integer in 1 ... {num_train_steps}, the schedule's length")
    if spacing == "leading":
        return np.arange(steps, dtype=np.int64)[::-1] * (num_train_steps // steps)
    if spacing == "linspace":
        return np.linspace(0, num_train_steps - 1, steps).round()[::-1].astype(np.int64)
    stops = np.arange(num_train_steps, 0, -num_train_steps / steps)[:steps]
    return stops.round().astype(np.int64) - 1


def check_start(start: object, levels: int) -> int:
    """`start` as an int; `ConfigError` unless it leaves at least one of so many levels."""
    if isinstance(start, bool) or not isinstance(start, int | np.integer) or not 0 <= start < levels:
        raise ConfigError(f"start is {start!r}; allowed: an integer in 0 ... {levels - 1}")
    return int(start)


def _respaced(num_train_steps: int, steps: int | None, spacing: Spacing) -> NDArray[np.int64]:
    """The respaced forms; `ConfigError` where `steps` says another number."""
    if isinstance(spacing, str) and spacing[:4] == "ddim" and spacing[4:].isdecimal():
        t = _every_kth(num_train_steps, int(spacing[4:]))
    else:
        t = _sections(num_train_steps, _counts(spacing))
    if steps is not None and steps != len(t):
        raise ConfigError(f"steps is {steps!r}, but spacing={spacing!r} visits {len(t)}; leave steps out")
    return t[::-1]


def _every_kth(num_train_steps: int, count: int) -> NDArray[np.int64]:
    """Every k-th time step, rising, with the least k that gives at most `count`; it must give exactly so many."""
    k = -(-num_train_steps // max(count, 1))
    t = np.arange(0, num_train_steps, k, dtype=np.int64)
    if len(t) != count or k >= num_train_steps:  # guided-diffusion has no stride of T either: no "ddim1"
        raise ConfigError(
            f"spacing is 'ddim{count}'; no stride through {num_train_steps} time steps gives exactly {count}; "
            f"use spacing='{count}' or another number"
        )
    return t


def _counts(spacing: Spacing) -> list[int]:
    """The sections' numbers of time steps, each at least 0."""
    try:
        parts = [int(part) for part in spacing.split(",")] if isinstance(spacing, str) else list(spacing)
    except (TypeError, ValueError):
        parts = []
    good = all(isinstance(n, int | np.integer) and not isinstance(n, bool) and n >= 0 for n in parts)
    if not good or not any(parts):
        allowed = ", ".join(map(repr, SPACINGS))
        raise ConfigError(f"spacing is {spacing!r}; allowed: {allowed}, 'ddim50', or sections, '10,10,20'")
    return [int(n) for n in parts]


def _sections(num_train_steps: int, counts: list[int]) -> NDArray[np.int64]:
    first, visited = 0, []
    for i, count in enumerate(counts):
        size = (num_train_steps + len(counts) - 1 - i) // len(counts)  # the remainder goes to the first sections
        if count > size:
            raise ConfigError(
                f"spacing: section {i} of {len(counts)} has {size} of the {num_train_steps} time steps; "
                f"{count} can't be visited"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # added up rather than multiplied: guided-diffusion's rounding errors decide between neighbours
        visited.append(first + np.cumsum([0.0] + [stride] * (count - 1))[:count].round().astype(np.int64))
        first += size
    return np.unique(np.concatenate(visited))

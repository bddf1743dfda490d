"""What a sampler is good for beside making pictures from noise: each use is a few lines around `Sampler`.

All take the keyword arguments of `Sampler.sample` too, guidance among them. Pictures are [B, C, H, W] in [-1, 1], and
any other samples [B, ...] do as well. Where sampling starts from a picture, the table says at which noise level: leave
out its first steps, ``solvers.ddim(schedule, 50, start=skipped(50, strength=0.6))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from .buffers import initial_noise
from .errors import InputError
from .inputs import Conditions, Guidance
from .sampler import Sampler, TraceStep
from .seeds import sample_seeds
from .solvers import StepTable


def skipped(steps: int, strength: float) -> int:
    """The `start` of a solver with `steps` steps that keeps the last `strength` of them, one at least.

    A strength of 1 keeps all, and little of the picture; at 0.5 its layout stays, at 0.2 all but the details.

    Raises:
        InputError: for a strength that is not above 0 and up to 1, or steps below 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise InputError(f"strength is {strength!r}; allowed: a number above 0 and up to 1")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps is {steps!r}; allowed: an integer of at least 1")
    return steps - max(1, round(strength * steps))


def noised(image: Tensor, table: StepTable, seeds: int | Sequence[int]) -> Tensor:
    """x_T for sampling from a picture: alpha x_0 + sigma z at the table's first noise level (Ho et al. 2020, eq. 4).

    Args:
        image: [B, ...], float32 or float64.
        table: where to start: its `start` is (alpha, sigma).
        seeds: as in `Sampler.sample`; z is their initial noise.

    Returns:
        [B, ...] in the image's dtype and on its device.

    Raises:
        InputError: for another dtype, or wrong seeds.
    """
    if not isinstance(image, Tensor) or image.dtype not in (torch.float32, torch.float64) or image.ndim < 2:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"the image is a {what}; needed: a float32 tensor [B, ...], as [B, C, H, W] in [-1, 1]")
    alpha, sigma = table.start
    bits = sample_seeds(seeds, len(image)).to(image.device)
    return alpha * image + sigma * initial_noise(bits, image.shape[1:], image.dtype)


def image_to_image(
    sampler: Sampler,
    image: Tensor,
    *,
    seeds: int | Sequence[int],
    mask: Tensor | None = None,
    **guidance: Unpack[Guidance],
) -> Tensor:
    """SDEdit: the picture is noised up to where the sampler's table starts, and denoised from there.

    Meng et al. 2021, arXiv 2108.01073. What the noise hides is made anew, as the model would have it; the
    rest stays.

        table = solvers.ddim(schedule, 50, start=skipped(50, strength=0.6))
        image_to_image(Sampler(model, table), image, seeds=0)

    Args:
        sampler: its table has left out its first steps, by the option `start`.
        image: [B, ...], float32, on any device; for several versions of one, ``image.expand(8, -1, -1, -1)``.
        seeds, guidance: as in `Sampler.sample`.
        mask: bool, True where the picture is to stay as it is; None: nowhere.

    Returns:
        [B, ...] as of `Sampler.sample`. Raises what that and `noised` raise.
    """
    x_T, known = noised(image, sampler.table, seeds), None if mask is None else image
    return sampler.sample(image.shape, seeds=seeds, x_T=x_T, known=known, mask=mask, **guidance)


def interpolate(
    sampler: Sampler,
    first: Tensor,
    second: Tensor,
    *,
    seeds: int | Sequence[int],
    weights: int | Sequence[float] = 9,
    **guidance: Unpack[Guidance],
) -> Tensor:
    """Pictures between two: both are noised, mixed as (1 - w) x_t + w x'_t, and denoised (Ho et al. 2020, figure 8).

    Both get the same noise, whose scale no mixture changes, so that every mixture is at a noise level that the model
    knows; and all weights of a pair the same seed. The higher the level at which the sampler's table starts, the less
    of the two is left, and the more the model makes of them: a blend of pixels at strength 0.1, a new picture at 1.

    Args:
        sampler: its table starts at the level of the mixture (see `image_to_image`).
        first, second: [B, ...], float32.
        weights: w, the share of the second; or how many, evenly from 0 to 1.
        seeds, guidance: as in `Sampler.sample`, of the B pairs.

    Returns:
        [len(weights), B, ...]; ``made.flatten(0, 1)`` is `pictures.grid`'s (columns=B).

    Raises:
        InputError: for pictures that differ in shape, dtype or device, or no weights; and what `Sampler.sample` and
            `noised` raise.
    """
    _check_pictures(first, second)
    for name in ("shape", "dtype", "device"):
        one, other = (getattr(image, name) for image in (first, second))
        if one != other:
            raise InputError(f"the pictures differ in {name}: {one} and {other}; needed: the same")
    shares = _shares(weights)
    a, b = (noised(image, sampler.table, seeds) for image in (first, second))
    mixed = (torch.lerp(a, b, w) for w in shares)
    return torch.stack([sampler.sample(a.shape, seeds=seeds, x_T=x_T, **guidance) for x_T in mixed])


def _check_pictures(*images: object) -> None:
    for image in images:
        if not isinstance(image, Tensor):
            raise InputError(f"the picture is a {type(image).__name__}; needed: a float32 tensor [B, ...]")


def _shares(weights: int | Sequence[float]) -> list[float]:
    """The weights of `interpolate`, each a finite number."""
    if isinstance(weights, int):
        weights = np.linspace(0.0, 1.0, weights).tolist() if weights > 1 else []
    try:
        shares = [float(w) for w in weights]
    except (TypeError, ValueError):
        shares = []
    if not shares or not np.isfinite(shares).all():
        raise InputError(f"weights: needed at least 2, or a list of numbers, as [0, 0.5, 1]; given: {weights!r}")
    return shares


def inpaint(
    sampler: Sampler, image: Tensor, mask: Tensor, *, seeds: int | Sequence[int], **guidance: Unpack[Guidance]
) -> Tensor:
    """Keep the picture where the mask is True and paint the rest, to fit.

    With `solvers.repaint` that is RePaint (Lugmayr et al. 2022, arXiv 2201.09865); with any other solver what is
    painted fits less well, and is there sooner.

    Args:
        sampler: its table starts from noise; to start from the picture: `image_to_image` with a mask.
        image: [B, ...], float32; what it is where the mask is False has no effect.
        mask: bool, [B, ...] or broadcast to it, as [H, W]: True is kept.
        seeds, guidance: as in `Sampler.sample`.

    Returns:
        [B, ...] as of `Sampler.sample`, the picture itself where the mask is True (with ``final_sigma="sigma_min"``:
        with that much noise). Raises what that raises, and `InputError` for an image that is no tensor.
    """
    _check_pictures(image)
    return sampler.sample(image.shape, seeds=seeds, known=image, mask=mask, **guidance)


def progressive_decoding(
    sampler: Sampler,
    shape: Sequence[int],
    *,
    seeds: int | Sequence[int],
    moments: int = 10,
    **conditions: Unpack[Conditions],
) -> list[TraceStep]:
    """What the model takes the sample for while it comes about: x_0 predicted at each step (Ho et al. 2020, figure 6).

        steps = progressive_decoding(sampler, (4, 3, 32, 32), seeds=0)
        pictures.filmstrip([s.x0 for s in steps], captions=[f"t = {s.t:g}" for s in steps])

    Args:
        sampler, shape, seeds, conditions: as in `Sampler.trace`.
        moments: how many steps to keep, evenly, the first and the last among them; all where there are fewer.

    Returns:
        the steps; their `x0` is what this is about. Raises what `Sampler.trace` raises.
    """
    if isinstance(moments, bool) or not isinstance(moments, int) or moments < 1:
        raise InputError(f"moments is {moments!r}; allowed: an integer of at least 1")
    rows = sampler.table.num_rows
    kept = set(np.linspace(rows - 1, 0, min(moments, rows)).round().astype(int).tolist())
    return [step for step in sampler.trace(shape, seeds=seeds, **conditions) if step.step in kept]

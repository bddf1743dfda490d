"""What a diffusion model may predict, and how one prediction becomes another.

At a noise level the state is x = alpha x_0 + sigma eps. A model that predicts x_0, the noise eps, the velocity
v = alpha eps - sigma x_0 or the score, the gradient of log p(x), predicts them all: each follows from x and another.
"""

from __future__ import annotations

from typing import Any

from .errors import ConfigError

KINDS = ("epsilon", "score", "sample", "v_prediction")


def convert(prediction: Any, x: Any, alpha: Any, sigma: Any, *, given: str, wanted: str) -> Any:
    """The prediction `wanted` that belongs to a `prediction` of the kind `given`.

    eps = -sigma score (Song et al. 2020, arXiv 2011.13456, section 3.3), x_0 = (x - sigma eps) / alpha (Ho et al. 2020,
    eq. 15), v = alpha eps - sigma x_0 (Salimans and Ho 2022, arXiv 2202.00512, appendix D). Operators alone: NumPy
    arrays, torch tensors (differentiably) and numbers stay what they are, dtype and device too.

    Args:
        prediction: the model's output, [B, ...].
        x: the state that it was evaluated at, [B, ...].
        alpha: the scale of x_0 in x, a number or what broadcasts with x: [B, 1, ...]. In variance preserving
            diffusions sqrt(alpha_bar), in variance exploding ones 1.
        sigma: the scale of the noise in x, likewise.
        given, wanted: "epsilon", "score", "sample" (x_0) or "v_prediction".

    Returns:
        [B, ...]. Where the state is pure noise (alpha = 0) x_0 and v don't follow from eps or the score, nor do eps and
        the score from x_0 where there is none (sigma = 0): a division by zero, infinite or NaN.

    Raises:
        ConfigError: for an unknown kind.
    """
    for name, kind in (("given", given), ("wanted", wanted)):
        if kind not in KINDS:
            raise ConfigError(f"{name} is {kind!r}; allowed: {', '.join(map(repr, KINDS))}")
    if given == wanted:
        return prediction
    if wanted == "sample":
        return _sample(prediction, x, alpha, sigma, given)
    eps = _epsilon(prediction, x, alpha, sigma, given)
    if wanted == "epsilon":
        return eps
    if wanted == "score":
        return -eps / sigma
    return alpha * eps - sigma * _sample(prediction, x, alpha, sigma, given)


def _sample(m: Any, x: Any, alpha: Any, sigma: Any, kind: str) -> Any:
    if kind == "sample":
        return m
    if kind == "v_prediction":  # over alpha^2 + sigma^2, which is 1 in a variance preserving diffusion
        return (alpha * x - sigma * m) / (alpha**2 + sigma**2)
    return (x - sigma * m) / alpha if kind == "epsilon" else (x + sigma**2 * m) / alpha


def _epsilon(m: Any, x: Any, alpha: Any, sigma: Any, kind: str) -> Any:
    if kind == "epsilon":
        return m
    if kind == "v_prediction":
        return (sigma * x + alpha * m) / (alpha**2 + sigma**2)
    return -sigma * m if kind == "score" else (x - alpha * m) / sigma

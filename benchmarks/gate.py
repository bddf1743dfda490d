"""The gate: what a contender makes is compared with float64 before it is timed. Who fails has no speed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

SIGMAS = 5.0  # of a statistic's own deviation: 6 in 10 million honest draws fail
PART = 1 << 22  # elements compared at once: 34 MB a float64 tensor, of which the formula has several


class Gate:
    """The outcome: the greatest error of what was compared, and what was wrong.

    Attributes:
        error: greatest absolute difference from float64.
        tolerance: the bound that it was held to (the largest, where there were several).
        reasons: what failed; empty where all is right.
        raised: the contender raised an exception.
    """

    def __init__(self) -> None:
        self.error, self.tolerance, self.raised = 0.0, 0.0, False
        self.reasons: list[str] = []

    @property
    def passed(self) -> bool:
        """Whether the contender may be timed."""
        return not self.reasons

    def near(self, what: str, got: Tensor, expected: Tensor, atol: float, rtol: float = 0.0) -> None:
        """|got - expected| <= atol + rtol |expected|, everywhere; NaN is wrong."""
        if got.shape != expected.shape:
            self.fail(f"{what} has shape {tuple(got.shape)}, not {tuple(expected.shape)}")
            return
        difference = (got.double() - expected).abs()
        worst = difference.max().item()
        self.tolerance = max(self.tolerance, atol)
        if rtol == 0.0:  # else it is the error of the store's dtype
            self.error = max(self.error, worst if math.isfinite(worst) else math.inf)
        if not bool((difference <= atol + rtol * expected.abs()).all()):
            self.fail(f"{what} is off by {worst:.3g}; allowed: {atol:g}" + (f" + {rtol:g} |value|" if rtol else ""))

    def standard_normal(self, what: str, z: Tensor) -> None:
        """Mean, variance and fourth moment of N(0, 1), each within 5 of its own standard deviations."""
        z = z.double()
        n = z.numel()
        for name, value, of_normal, variance in (
            ("mean", z.mean(), 0.0, 1.0),
            ("variance", z.square().mean(), 1.0, 2.0),
            ("fourth moment", z.pow(4).mean(), 3.0, 96.0),
        ):
            if not abs(value.item() - of_normal) <= SIGMAS * math.sqrt(variance / n):
                self.fail(f"{what}: {name} is {value.item():.4g}, a standard normal's is {of_normal:g}")

    def independent(self, what: str, a: Tensor, b: Tensor) -> None:
        """The correlation of two draws is that of independent ones: a frozen seed makes it 1."""
        value = (a.double() * b.double()).mean().item()
        if not abs(value) <= SIGMAS / math.sqrt(a.numel()):
            self.fail(f"{what}: two calls correlate by {value:.3g}; independent ones wouldn't")

    def fail(self, reason: str) -> None:
        """Note what is wrong."""
        self.reasons.append(reason)


def passes(check: Callable[[Gate, tuple[int, ...]], None], shape: tuple[int, ...]) -> Gate:
    """The gate after `check` at that shape; a contender that raises has failed."""
    gate = Gate()
    try:
        check(gate, shape)
    except Exception as error:  # a peer or a compiler may raise anything
        gate.raised = True
        gate.fail(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}")
    return gate


def parts(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the batch of about `PART` elements."""
    step = max(1, PART // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


def bytes_equal(gate: Gate, a: Tensor, b: Tensor) -> None:
    """For the copy."""
    if not torch.equal(a, b):
        gate.fail("the copy differs from its source")

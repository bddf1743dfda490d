"""From what the user gives as a seed to one 64-bit seed for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def check_seed(seed: object) -> int:
    """`seed` as an int in 0 ... 2^64 - 1. Raises `InputError` for anything else; bool, float and str included."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise InputError(f"seed is {seed!r}, a {type(seed).__name__}; needed: an integer in 0 ... 2^64 - 1")
    if not 0 <= int(seed) < 2**64:
        raise InputError(f"seed is {seed}; needed: an integer in 0 ... 2^64 - 1")
    return int(seed)


def sample_seeds(seed: int | Sequence[int], n: int) -> Tensor:
    """One 64-bit seed for each of n samples, as their bits: int64 [n], on the CPU.

    A sequence of n integers is taken as it is. From a single integer, sample i gets output i of a SplitMix64 generator
    (Steele et al. 2014, "Fast splittable pseudorandom number generators") that starts at the mixed integer:
    mix(mix(seed) + (i + 1) g), g = 0x9E3779B97F4A7C15. So the first samples of a seed don't depend on n, and
    neighbouring seeds share no sample.

    Raises:
        InputError: a seed that isn't an integer in 0 ... 2^64 - 1, or not n of them.
    """
    import torch

    if isinstance(seed, int | np.integer) or not isinstance(seed, Sequence) or isinstance(seed, str):
        start = _mix(np.uint64(check_seed(seed)))
        with np.errstate(over="ignore"):
            bits = _mix(start + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * _GOLDEN)
    else:
        bits = np.array([check_seed(s) for s in seed], dtype=np.uint64)
        if len(bits) != n:
            raise InputError(f"{len(bits)} seeds were given for {n} samples; give one integer, or one a sample")
    return torch.from_numpy(np.atleast_1d(bits).view(np.int64))


def _mix(z: Any) -> Any:
    """SplitMix64's finaliser, a bijection of 64-bit words: of an np.uint64 or an array of them."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

"""Seeds mean what they say."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastddpm.errors import InputError
from fastddpm.seeds import sample_seeds

MASK = 2**64 - 1


def splitmix64(state: int) -> int:
    """The published generator's output for a state (Steele et al. 2014), in Python's integers."""
    z = state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def unsigned(bits: torch.Tensor) -> list[int]:
    return [int(b) & MASK for b in bits]


def test_splitmix64_is_the_published_one():
    """The first outputs from state 0, as in the reference implementation's test."""
    golden = 0x9E3779B97F4A7C15
    assert [splitmix64(((i + 1) * golden) & MASK) for i in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(seed=st.integers(0, MASK), n=st.integers(1, 50))
def test_one_integer_is_mixed_by_the_documented_rule(seed, n):
    expected = [splitmix64((splitmix64(seed) + (i + 1) * 0x9E3779B97F4A7C15) & MASK) for i in range(n)]
    made = sample_seeds(seed, n)
    assert made.dtype == torch.int64
    assert unsigned(made) == expected
    assert torch.equal(sample_seeds(seed, n + 7)[:n], made)


def test_neighbouring_integers_share_no_seed():
    seeds = torch.cat(
        [sample_seeds(s, 64) for s in (*range(500), *range(2**32, 2**32 + 500), *range(2**64 - 500, 2**64))]
    )
    assert len(set(seeds.tolist())) == len(seeds)


@given(st.lists(st.integers(0, MASK), min_size=1, max_size=8))
def test_a_list_is_taken_as_it_is(seeds):
    assert unsigned(sample_seeds(seeds, len(seeds))) == seeds
    assert unsigned(sample_seeds(tuple(np.uint64(s) for s in seeds), len(seeds))) == seeds


@pytest.mark.parametrize("bad", [True, 1.0, "1", -1, 2**64, None, [1, True], [1, -1], [1, 2**64], [0.5, 1]])
def test_what_is_not_a_seed(bad):
    with pytest.raises(InputError, match=r"0 \.\.\. 2\^64 - 1"):
        sample_seeds(bad, 2)


def test_the_wrong_number_of_seeds():
    with pytest.raises(InputError, match="3 seeds were given for 2 samples"):
        sample_seeds([1, 2, 3], 2)

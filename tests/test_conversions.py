"""Conversions between predictions: against data whose score, noise, velocity and mean are known."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm import solvers
from fastddpm.conversions import KINDS, convert
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule

MEAN, VARIANCE = 0.4, 0.25
SCALES = {"variance preserving": (0.8, 0.6), "variance exploding": (1.0, 3.0), "neither": (0.3, 0.5)}


def perfect(x, alpha, sigma):
    """All predictions for data from N(MEAN, VARIANCE), each from its definition (v from those of x_0 and eps)."""
    total = alpha**2 * VARIANCE + sigma**2
    score = -(x - alpha * MEAN) / total  # of N(alpha MEAN, total)
    x0 = MEAN + alpha * VARIANCE / total * (x - alpha * MEAN)  # E[x_0 | x]
    eps = sigma / total * (x - alpha * MEAN)  # E[eps | x]
    return {"epsilon": eps, "score": score, "sample": x0, "v_prediction": alpha * eps - sigma * x0}


@pytest.mark.parametrize("pair", list(itertools.product(KINDS, KINDS)), ids=" to ".join)
@pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)
def test_each_prediction_gives_each_other(scales, pair):
    x = np.random.default_rng(0).standard_normal((3, 2, 5))
    known = perfect(x, *scales)
    out = convert(known[pair[0]], x, *scales, given=pair[0], wanted=pair[1])
    np.testing.assert_allclose(out, known[pair[1]], rtol=1e-13, atol=1e-14)
    assert (out is known[pair[0]]) == (pair[0] == pair[1])


@pytest.mark.parametrize("pair", list(itertools.permutations(KINDS, 2)), ids=" to ".join)
def test_tensors_stay_tensors_and_scales_may_differ_in_a_batch(pair):
    alpha, sigma = (torch.tensor(values)[:, None] for values in ([0.8, 0.6], [0.6, 0.8]))
    x = torch.tensor([[0.3, -1.2, 2.0], [0.1, 0.7, -0.4]])
    m = perfect(x, alpha, sigma)[pair[0]].requires_grad_()
    out = convert(m, x, alpha, sigma, given=pair[0], wanted=pair[1])
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, perfect(x, alpha, sigma)[pair[1]], rtol=1e-5, atol=1e-5)
    out.sum().backward()
    assert torch.isfinite(m.grad).all()
    for row in range(2):  # numbers as scales, and half precision stays
        one = convert(m[row].half(), x[row].half(), alpha[row].item(), sigma[row].item(), given=pair[0], wanted=pair[1])
        assert one.dtype == torch.float16
        torch.testing.assert_close(one.float(), out[row], rtol=1e-2, atol=1e-2)


@settings(deadline=None)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.floats(0.01, 1),
    st.floats(0.01, 100),
    st.floats(-3, 3),
    st.floats(-3, 3),
)
def test_there_and_back_is_where_it_was(a, b, alpha, sigma, x, m):
    there = convert(m, x, alpha, sigma, given=a, wanted=b)
    back = convert(there, x, alpha, sigma, given=b, wanted=a)
    assert isinstance(there, float)
    assert back == pytest.approx(m, rel=1e-6, abs=1e-6)


def test_a_velocity_gives_x0_from_pure_noise_and_nothing_is_divided():
    x, v = np.array([0.5]), np.array([0.2])
    with np.errstate(all="raise"):
        assert convert(v, x, 0.0, 1.0, given="v_prediction", wanted="sample") == -v
        assert convert(v, x, 0.0, 1.0, given="v_prediction", wanted="epsilon") == x
        assert convert(v, x, 1.0, 0.0, given="v_prediction", wanted="sample") == x
        assert convert(v, x, 1.0, 0.0, given="epsilon", wanted="sample") == x


def test_solvers_have_the_same_conversions():
    schedule = NoiseSchedule.linear()
    alpha, sigma = schedule.sqrt_alphas_cumprod[600], schedule.sqrt_one_minus_alphas_cumprod[600]
    for kind in ("epsilon", "v_prediction", "sample"):
        table = solvers.ddpm(schedule, 5, prediction_type=kind)
        row = table.timesteps.tolist().index(600)
        x0 = table["x0_x"][row] * 0.3 + table["x0_m"][row] * 0.7
        assert convert(0.7, 0.3, alpha, sigma, given=kind, wanted="sample") == pytest.approx(x0, rel=1e-13)


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match="given is 'eps'; allowed: 'epsilon', 'score', 'sample', 'v_prediction'"):
        convert(1.0, 1.0, 1.0, 1.0, given="eps", wanted="score")
    with pytest.raises(ConfigError, match="wanted is 'x0'; allowed"):
        convert(1.0, 1.0, 1.0, 1.0, given="epsilon", wanted="x0")


def test_neither_numpy_nor_torch_is_imported():
    code = "import sys, fastddpm.conversions; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Annealed Langevin dynamics: the paper's loop, and what becomes of Gaussians and of a mixture's weights."""

import math

import numpy as np
import pytest
import torch
from fastddpm_kernels import reference
from fastddpm_kernels.columns import COLUMNS
from fastddpm_kernels.constants import STREAM_STEP
from trajectories import awkward_model, run

from fastddpm import Sampler
from fastddpm.conversions import convert
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.langevin import annealed_langevin

LINEAR = NoiseSchedule.linear()
NCSN = EDMSchedule(sigma_min=0.01, sigma_max=1.0)
SIGMAS = np.geomspace(1.0, 0.01, 10)


@pytest.fixture
def start():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 5)), rng.standard_normal((1001, 2, 5))


# ---- the paper's loop ------------------------------------------------------------------------------------------------


def test_it_is_algorithm_1_with_the_papers_numbers(start):
    """epsilon = 2e-5, T = 100, L = 10 geometric levels from 1 to 0.01: Song and Ermon's choice for CIFAR-10."""
    x, noise = start
    table = annealed_langevin(NCSN, prediction_type="score", denoise=False)
    assert table.num_rows == 1000
    states = run(table, awkward_model, x, noise[:1000])
    draws = iter(noise)
    for i, sigma in enumerate(SIGMAS):
        a = 2e-5 * sigma**2 / SIGMAS[-1] ** 2
        for _ in range(100):
            x = x + a / 2 * awkward_model(x, sigma) + math.sqrt(a) * next(draws)
        np.testing.assert_allclose(states[100 * i + 99], x, rtol=1e-9)
    assert table["x_z"][-1] > 0
    assert (table.start, table.init_noise_sigma) == ((1.0, 1.0), 1.0)


def test_the_last_row_denoises(start):
    x, noise = start[0], start[1][:31]
    table = annealed_langevin(NCSN, 10, each=3, prediction_type="score")
    noisy = annealed_langevin(NCSN, 10, each=3, prediction_type="score", denoise=False)
    assert (table.num_rows, noisy.num_rows) == (31, 30)
    np.testing.assert_array_equal(table.rows[:-1], noisy.rows)
    states = run(table, awkward_model, x, noise)
    before = states[-2]
    np.testing.assert_allclose(states[-1], before + 0.01**2 * awkward_model(before, 0.01), rtol=1e-12)
    np.testing.assert_allclose(table["k_z"], np.append(np.repeat(SIGMAS, 3), 0.0), rtol=1e-12)
    assert (table["k_x"] == 1.0).all()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "score"])
def test_a_model_of_a_variance_preserving_schedule_is_asked_at_its_own_scale(start, kind, clip):
    """The state is x_0 + sigma eps; the model sees x / sqrt(1 + sigma^2), and its score is of that."""
    x, noise = start[0], start[1][:41]
    table = annealed_langevin(LINEAR, 8, each=5, step_size=0.3, spacing="trailing", prediction_type=kind, clip=clip)
    states = run(table, awkward_model, x, noise)
    draws = iter(noise)
    for i, t in enumerate(table.timesteps[:-1:5]):
        a, s = LINEAR.sqrt_alphas_cumprod[int(t)], LINEAR.sqrt_one_minus_alphas_cumprod[int(t)]
        for _ in range(5):
            m = awkward_model(a * x, t)
            score = convert(m, a * x, a, s, given=kind, wanted="score")
            if clip is not None:
                x0 = np.clip(convert(m, a * x, a, s, given=kind, wanted="sample"), -clip, clip)
                score = convert(x0, a * x, a, s, given="sample", wanted="score")
            # the gradient in x is a times that in a x
            x = x + 0.15 * (s / a) ** 2 * a * score + math.sqrt(0.3) * s / a * next(draws)
        np.testing.assert_allclose(states[5 * i + 4], x, rtol=1e-9, atol=1e-9)


def test_an_epsilon_model_of_sigma_is_a_score_model(start):
    x, noise = start[0], start[1][:31]
    expected = run(annealed_langevin(NCSN, each=3, prediction_type="score"), awkward_model, x, noise)
    table = annealed_langevin(NCSN, each=3, prediction_type="epsilon")
    np.testing.assert_allclose(run(table, lambda x, t: -t * awkward_model(x, t), x, noise), expected, rtol=1e-10)
    table = annealed_langevin(NCSN, each=3, prediction_type="sample")
    np.testing.assert_allclose(run(table, lambda x, t: x + t**2 * awkward_model(x, t), x, noise), expected, rtol=1e-10)


# ---- what becomes of known data --------------------------------------------------------------------------------------


def moments(table, model, mean, variance):
    """Mean and variance of the state after each row, for a model that is affine in x."""
    out = []
    for row in table.rows:
        c = dict(zip(COLUMNS, row, strict=True))

        def after(x, c=c):
            return c["x_x"] * x + c["x_x0"] * (c["x0_x"] * x + c["x0_m"] * model(c["c_in"] * x, c["t"]))

        gain = after(1.0) - after(0.0)
        mean, variance = after(0.0) + gain * mean, gain**2 * variance + c["x_z"] ** 2
        out.append((mean, variance))
    return np.array(out)


def test_a_gaussian_is_sampled_but_for_the_bias_of_finite_steps():
    """At a level a Langevin step contracts by 1 - q, q = step / 2 sigma^2 / (s^2 + sigma^2), towards N(mu, total)
    with total = (s^2 + sigma^2) / (1 - q / 2)."""
    mu, s = 0.4, 0.1
    table = annealed_langevin(NCSN, each=400, step_size=0.1, prediction_type="score")
    out = moments(table, lambda x, sigma: -(x - mu) / (s**2 + sigma**2), 0.0, 1.0)
    for i, sigma in enumerate(SIGMAS[:6]):  # later ones are too fine to forget their start
        q = 0.05 * sigma**2 / (s**2 + sigma**2)
        mean, variance = out[400 * i + 399]
        assert mean == pytest.approx(mu, abs=1e-3)
        assert variance == pytest.approx((s**2 + sigma**2) / (1 - q / 2), rel=0.01)
    assert out[-1][0] == pytest.approx(mu, abs=1e-3)
    assert out[-1][1] == pytest.approx(s**2, rel=0.02)


def test_the_weights_of_a_mixture_are_found():
    """Langevin dynamics at one small noise level can't (Song and Ermon, section 3.2.2); annealed it does."""
    mu, s, w = np.array([-0.6, 0.5]), np.array([0.05, 0.1]), np.array([0.3, 0.7])

    def score(x, sigma):
        total = s**2 + sigma**2
        off = x[:, None] - mu
        p = w * np.exp(-0.5 * off**2 / total) / np.sqrt(total)
        return -(p * off / total).sum(1) / p.sum(1)

    n = 3000
    rng = np.random.default_rng(0)
    table = annealed_langevin(NCSN, prediction_type="score")
    x = run(table, score, rng.standard_normal(n), (rng.standard_normal(n) for _ in range(table.num_rows)))[-1]
    right = x > 0
    assert right.mean() == pytest.approx(0.7, abs=0.03)  # the standard error is 0.008
    for found, mean, deviation in ((x[~right], -0.6, 0.05), (x[right], 0.5, 0.1)):
        assert found.mean() == pytest.approx(mean, abs=0.01)
        assert found.std() == pytest.approx(deviation, rel=0.1)
    cold = annealed_langevin(NCSN, each=200, prediction_type="score", start=9)
    stuck = run(cold, score, 0.05 * rng.standard_normal(n) - 0.6, (rng.standard_normal(n) for _ in range(201)))[-1]
    assert (stuck > 0).mean() == 0


# ---- options ---------------------------------------------------------------------------------------------------------


def test_start_leaves_out_levels():
    whole, rest = annealed_langevin(NCSN, each=4), annealed_langevin(NCSN, each=4, start=3)
    np.testing.assert_array_equal(rest["x_z"], whole["x_z"][12:])
    assert rest.start == (1.0, pytest.approx(SIGMAS[3]))
    assert rest.init_noise_sigma == pytest.approx(SIGMAS[3])


def test_time_inputs_are_whole_unless_told_otherwise():
    whole, exact = (annealed_langevin(LINEAR, 10, each=1, quantize=q).timesteps for q in (True, False))
    assert (exact != whole).any()
    np.testing.assert_array_equal(exact.round(), whole)


BAD = {
    "each 0": ({"each": 0}, r"each is 0; allowed: an integer in 1 \.\.\. 100000"),
    "each a float": ({"each": 2.0}, r"each is 2\.0"),
    "each a bool": ({"each": True}, "each is True"),
    "too many rows": ({"each": 100_001}, "each is 100001"),
    "no step": ({"step_size": 0.0}, r"step_size is 0\.0; allowed: a number above 0 and below 4"),
    "a step that diverges": ({"step_size": 4}, "step_size is 4"),
    "a step of NaN": ({"step_size": math.nan}, "step_size is nan"),
    "a step that is a bool": ({"step_size": True}, "step_size is True"),
    "denoise": ({"denoise": 1}, "denoise is 1; allowed: True or False"),
    "steps": ({"steps": 0}, "steps is 0"),
    "start": ({"start": 10}, r"start is 10; allowed: an integer in 0 \.\.\. 9"),
    "prediction_type": ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'; allowed: 'edm'"),
    "clip": ({"clip": 0.0}, r"clip is 0\.0"),
    "ratio": ({"dynamic_thresholding_ratio": 2.0, "clip": 1.0}, r"dynamic_thresholding_ratio is 2\.0"),
    "spacing": ({"spacing": "leading"}, "spacing is 'leading'; allowed with an EDMSchedule"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_option_is_refused_in_one_line(name):
    options, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        annealed_langevin(NCSN, **options)
    assert "\n" not in str(caught.value)


def test_infinite_noise_is_refused():
    endless = LINEAR.rescale_zero_terminal_snr()
    for kind in ("v_prediction", "sample"):
        with pytest.raises(ConfigError, match="the noise at a terminal SNR of zero is infinite"):
            annealed_langevin(endless, 5, spacing="trailing", prediction_type=kind)
    annealed_langevin(endless, 5, spacing="leading", prediction_type="v_prediction")


@pytest.mark.parametrize("size", [0.2, 2.0, 3.9])
def test_steps_up_to_the_bound_are_stable(size):
    """Towards a point, where the pull is strongest: the variance settles at sigma^2 / (1 - step_size / 4)."""
    table = annealed_langevin(NCSN, 1, each=1000, step_size=size, prediction_type="score", denoise=False)
    variance = moments(table, lambda x, sigma: -x / sigma**2, 0.0, 1.0)[-1][1]
    assert variance == pytest.approx(1 / (1 - size / 4), rel=1e-6)


def test_the_sampler_does_what_the_rows_say(start):
    table = annealed_langevin(LINEAR, 3, each=2, spacing="trailing", prediction_type="score", clip=1.0)
    x, seeds = start[0], torch.tensor([5, 6])

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.double().numpy()[:, None]))

    noise = [reference.normal(seeds, (5,), step=i, stream=STREAM_STEP, dtype=torch.float64).numpy() for i in range(7)]
    sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64)
    out = sampler.sample(x.shape, seeds=seeds.tolist(), x_T=torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(out, run(table, awkward_model, x, noise)[-1], rtol=0, atol=1e-12)

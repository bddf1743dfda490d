"""Consistency models, latent and not: against diffusers and the papers' formulas."""

import math
import time

import numpy as np
import pytest
from doubled import assert_same_walk, scheduler, walk
from trajectories import awkward_model, run

from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.lcm import consistency, lcm

LATENT = NoiseSchedule.scaled_linear(1000, 0.00085, 0.012)
SCHEDULES = [LATENT, NoiseSchedule.linear(), NoiseSchedule.cosine(1000)]
EDM = EDMSchedule()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    return rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((50, 2, 3, 4, 4))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "steps, original, scaling", [(1, 50, 10), (4, 50, 10), (7, 50, 0.002), (8, 30, 1), (50, 50, 10)]
)
@pytest.mark.parametrize("schedule, clip", [(s, None) for s in SCHEDULES] + [(LATENT, 0.8)], ids=str)
def test_lcm_walks_as_diffusers_does(data, schedule, clip, steps, original, scaling, prediction, monkeypatch):
    config = {"original_inference_steps": original, "timestep_scaling": scaling, "prediction_type": prediction}
    config |= {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    stock = scheduler(monkeypatch, "LCMScheduler", schedule, **config)
    options = {"original_inference_steps": original, "timestep_scaling": scaling, "prediction_type": prediction}
    table = lcm(schedule, steps, clip=clip, **options)
    noise = data[1][:steps]
    assert_same_walk(
        run(table, awkward_model, data[0], noise), walk(monkeypatch, stock, steps, awkward_model, data[0], noise)
    )
    assert table["t"].tolist() == stock.timesteps.tolist()
    assert table.stochastic == (steps > 1)
    assert table.init_noise_sigma == stock.init_noise_sigma


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps, scales", [(1, 40), (2, 40), (4, 40), (7, 18), (40, 40)])
def test_consistency_walks_as_diffusers_does(data, steps, scales, clip, monkeypatch):
    stock = scheduler(
        monkeypatch, "CMStochasticIterativeScheduler", num_train_timesteps=scales, s_noise=1.01, clip_denoised=clip == 1
    )
    table = consistency(EDM, steps, num_scales=scales, clip=clip, s_noise=1.01)
    x, noise = 80.0 * data[0], data[1][:steps]
    assert_same_walk(run(table, awkward_model, x, noise), walk(monkeypatch, stock, steps, awkward_model, x, noise))
    np.testing.assert_allclose(table["t"], stock.timesteps.numpy(), rtol=1e-9)
    assert table.stochastic == (steps > 1)
    assert table.init_noise_sigma == pytest.approx(80.0, rel=1e-12)


def test_another_sigma_data_is_that_of_the_formula():
    """2303.01469, appendix C."""
    table = lcm(LATENT, 3, timestep_scaling=0.01, sigma_data=2.0)
    bar = np.append(LATENT.alphas_cumprod[table["t"].astype(int)[1:]], 1.0)
    u = 0.01 * table["t"]
    np.testing.assert_allclose(table["x_x"], np.sqrt(bar) * 4 / (u**2 + 4), rtol=1e-12)
    np.testing.assert_allclose(table["x_x0"], np.sqrt(bar) * u / np.sqrt(u**2 + 4), rtol=1e-12)
    schedule = EDMSchedule(sigma_min=0.1, sigma_max=20.0, sigma_data=2.0)
    table = consistency(schedule, 3, num_scales=10)
    sigma = np.append(20.0, table["k_z"][:-1])
    np.testing.assert_allclose(table["x0_x"], 4 / ((sigma - 0.1) ** 2 + 4), rtol=1e-12)
    np.testing.assert_allclose(table["x0_m"], 2 * (sigma - 0.1) / np.sqrt(sigma**2 + 4), rtol=1e-12)
    np.testing.assert_allclose(table["c_in"], 1 / np.sqrt(sigma**2 + 4), rtol=1e-12)
    np.testing.assert_allclose(table["x_z"][:-1], np.sqrt(sigma[1:] ** 2 - 0.01), rtol=1e-12)


def test_a_perfect_consistency_function_keeps_the_marginals():
    """Data that are a point c: f = c at any noise, and the state behind each row is alpha' c + sigma' z."""
    table = lcm(LATENT, 4, prediction_type="sample", timestep_scaling=1e6)
    noise = np.arange(1.0, 5.0)[:, None]
    states = run(table, lambda x, t: np.full_like(x, 0.3), np.ones(1), noise)[:, 0]
    np.testing.assert_allclose(states, table["k_x"] * 0.3 + table["k_z"] * noise[:, 0], rtol=1e-9)


def test_the_last_row_adds_no_noise_and_four_or_one_are_the_steps_if_none_are_given():
    for table, rows in (
        (lcm(LATENT), 4),
        (consistency(EDM), 1),
        (lcm(NoiseSchedule.linear(3), original_inference_steps=2), 2),
    ):
        assert table.num_rows == rows
        assert [table[c][-1] for c in ("x_z", "k_x", "k_z")] == [0.0, 1.0, 0.0]


def test_a_start_further_on_is_the_rest_of_the_walk():
    for build, schedule in ((lcm, LATENT), (consistency, EDM)):
        whole, rest = build(schedule, 8), build(schedule, 8, start=3)
        np.testing.assert_array_equal(np.delete(whole.rows[3:], -2, 1), np.delete(rest.rows, -2, 1))  # but for "step"
        assert rest.start == pytest.approx((whole["k_x"][2], whole["k_z"][2]), rel=1e-15)


@pytest.mark.parametrize(
    "build, options, message",
    [
        (lcm, {"steps": 51}, "steps is 51; allowed: an integer in 1 ... 50"),
        (
            lcm,
            {"original_inference_steps": 1001},
            "original_inference_steps is 1001; allowed: an integer in 1 ... 1000",
        ),
        (lcm, {"start": 4}, "start is 4; allowed: an integer in 0 ... 3"),
        (lcm, {"start": True}, "start is True"),
        (lcm, {"timestep_scaling": 0}, "timestep_scaling is 0; allowed: a number above 0"),
        (lcm, {"sigma_data": math.nan}, "sigma_data is nan"),
        (lcm, {"clip": -1}, "clip is -1"),
        (lcm, {"prediction_type": "edm"}, "prediction_type is 'edm'"),
        (lcm, {"schedule": EDM}, "lcm needs a NoiseSchedule"),
        (consistency, {"schedule": LATENT}, "consistency needs an EDMSchedule"),
        (consistency, {"steps": 41}, "steps is 41; allowed: an integer in 1 ... 40"),
        (consistency, {"num_scales": 1}, "num_scales is 1; allowed: an integer in 2"),
        (consistency, {"s_noise": 0}, "s_noise is 0; allowed: a number above 0"),
        (consistency, {"start": 1}, "start is 1; allowed: an integer in 0 ... 0"),
    ],
)
def test_options_are_refused_in_one_line(build, options, message):
    options = {"schedule": LATENT if build is lcm else EDM} | options
    with pytest.raises(ConfigError) as caught:
        build(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_building_a_table_takes_less_than_10_ms():
    begun = time.process_time()
    for _ in range(5):
        lcm(LATENT, 1000, original_inference_steps=1000)
        consistency(EDM, 1000, num_scales=1000)
    assert (time.process_time() - begun) / 10 < 0.01

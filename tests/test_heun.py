"""Heun's method and DPM-Solver-2 against diffusers, EDM's algorithm 2 and the exact solution for a Gaussian."""

import math
import time

import numpy as np
import pytest
from algorithm_2 import algorithm_2, denoiser, drawn, edm_denoiser
from doubled import assert_same_walk, scheduler, walk
from test_euler import CHURNS, EDM, LINEAR, PEER_SPACINGS, SCHEDULES, data  # noqa: F401
from trajectories import awkward_model, run

from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.dpm2 import dpm2
from fastddpm.solvers.euler import euler
from fastddpm.solvers.heun import heun

# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", PEER_SPACINGS)
@pytest.mark.parametrize("schedule, clip", [(s, None) for s in SCHEDULES] + [(LINEAR, 0.8)], ids=str)
def test_heun_walks_as_diffusers_does(data, schedule, clip, spacing, prediction, monkeypatch):  # noqa: F811
    steps, config = PEER_SPACINGS[spacing]
    config = config | {"prediction_type": prediction, "clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    stock = scheduler(monkeypatch, "HeunDiscreteScheduler", schedule, **config)
    table = heun(schedule, steps, spacing=spacing, prediction_type=prediction, clip=clip, quantize=False)
    x = data[0] * table.init_noise_sigma
    states = run(table, awkward_model, x, data[1][0, : 2 * steps - 1])
    assert_same_walk(states, walk(monkeypatch, stock, steps, awkward_model, x, []))
    np.testing.assert_allclose(table["t"], stock.timesteps.numpy(), atol=1e-8)
    assert not table.stochastic


@pytest.mark.parametrize("name, eta", [("KDPM2DiscreteScheduler", 0.0), ("KDPM2AncestralDiscreteScheduler", 1.0)])
# They have no "sample". Their "karras" rounds the time input where a step begins, but not at its midpoint; with the
# cosine schedule the first two begin at one time step then, which is looked up as the second, and the end is NaN.
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "log_snr"])
@pytest.mark.parametrize("schedule, prediction", [(SCHEDULES[1], "epsilon"), (SCHEDULES[2], "v_prediction")], ids=str)
def test_dpm2_walks_as_diffusers_does(data, schedule, spacing, prediction, name, eta, monkeypatch):  # noqa: F811
    steps, config = PEER_SPACINGS[spacing]
    stock = scheduler(monkeypatch, name, schedule, prediction_type=prediction, **config)
    table = dpm2(schedule, steps, eta=eta, spacing=spacing, prediction_type=prediction, quantize=False)
    x, noise = data[0] * table.init_noise_sigma, data[1][0, : 2 * steps - 1]
    expected = walk(monkeypatch, stock, steps, awkward_model, x, noise[1::2])  # drawn in the second of its two calls
    assert_same_walk(run(table, awkward_model, x, noise), expected)


# ---- EDM's algorithm 2, and k-diffusion's dpm_2 and dpm_2_ancestral --------------------------------------------------


@pytest.mark.parametrize(
    "spacing, final_sigma",
    [(s, "zero") for s in ("karras", "log_snr", "trailing", "EDM")] + [("trailing", "sigma_min")],
)
@pytest.mark.parametrize("churn", CHURNS, ids=str)
@pytest.mark.parametrize("method, eta", [("heun", 0.0), ("midpoint", 0.0), ("midpoint", 1.0), ("midpoint", 0.4)])
def test_each_is_algorithm_2_with_its_steps(data, method, eta, churn, spacing, final_sigma):  # noqa: F811
    schedule, options = (EDM, {"prediction_type": "edm"}) if spacing == "EDM" else (LINEAR, {"spacing": spacing})
    denoise = edm_denoiser(awkward_model) if spacing == "EDM" else denoiser(LINEAR, awkward_model)
    options["final_sigma"] = final_sigma
    plain = euler(schedule, 11, **options)
    sigmas = np.append(plain.start[1], plain["k_z"])
    expected, added = algorithm_2(denoise, sigmas[0] * data[0], sigmas, data[1], method, eta=eta, **churn)
    table = dpm2(schedule, 11, eta=eta, **churn, **options) if method == "midpoint" else None
    table = table or heun(schedule, 11, **churn, **options)
    noise, ends = drawn(table, added, 2)
    assert_same_walk(run(table, awkward_model, expected[0], noise)[ends], expected[1:])
    assert table.num_rows == 2 * 11 - (final_sigma == "zero")
    assert table.stochastic == bool(eta or churn)
    # the noise's scale: from what the step leaves to where the next one starts
    hat = np.append(table.start[1], table["k_z"][ends])
    up = eta * sigmas[1:] * np.sqrt(1 - (sigmas[1:] / hat[:-1]) ** 2)
    scale = churn.get("s_noise", 1.0) * np.sqrt(hat[1:] ** 2 - sigmas[1:] ** 2 + up**2)
    np.testing.assert_allclose(table["x_z"][ends], scale, rtol=1e-9, atol=1e-12)
    assert not np.delete(table["x_z"], ends).any()
    at_once = euler(schedule, 11, **churn, **options)
    assert table.init_noise_sigma == at_once.init_noise_sigma
    np.testing.assert_allclose(hat, np.append(at_once.start[1], at_once["k_z"]), rtol=1e-12)


@pytest.mark.parametrize("build", [heun, dpm2])
@pytest.mark.parametrize("churn", CHURNS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_both_states_are_the_same_process(data, build, churn, clip):  # noqa: F811
    preserving, exploding = (build(LINEAR, 8, state=state, clip=clip, **churn) for state in ("vp", "ve"))
    x, noise = data[0], data[1][0, :15]
    states = run(preserving, awkward_model, preserving.start[0] * x, noise)
    scale = preserving["k_x"][:, None, None, None, None]
    assert_same_walk(run(exploding, awkward_model, x, noise), states / scale)


@pytest.mark.parametrize("build, order", [(euler, 1), (heun, 2), (dpm2, 2)])
@pytest.mark.parametrize("state", ["vp", "ve"])
def test_the_error_falls_as_the_order_says(build, order, state):
    """N(0, 1/4) data have x(sigma) = x(sigma_0) sqrt((1/4 + sigma^2) / (1/4 + sigma_0^2)); EDM, eq. 1 and 3."""
    if state == "vp":
        schedule, prediction = NoiseSchedule.linear(), "sample"
    else:
        schedule, prediction = EDM, "sample"
    errors = []
    for steps in (40, 80, 160):
        # the last step, to no noise at all, is left out
        table = build(schedule, steps, spacing="log_snr", prediction_type=prediction, state=state, quantize=False)
        rows = (steps - 1) * (1 if build is euler else 2)
        alpha, sigma = np.append(table.start[0], table["k_x"]), np.append(table.start[1], table["k_z"])
        level = iter(zip(alpha, sigma, strict=True))

        def denoised(x, _, level=level):
            a, s = next(level)
            return a * 0.25 / (a**2 * 0.25 + s**2) * x

        x = run(table, denoised, np.ones(1), np.zeros((table.num_rows, 1)))[rows - 1]
        exact = math.sqrt((alpha[rows] ** 2 * 0.25 + sigma[rows] ** 2) / (alpha[0] ** 2 * 0.25 + sigma[0] ** 2))
        errors.append(abs(x[0] / exact - 1))
    slopes = np.diff(np.log2(errors))
    np.testing.assert_allclose(slopes, -order, atol=0.15)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [heun, dpm2])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_last_row_returns_x0_and_adds_no_noise(build, steps):
    table = build(LINEAR, steps, s_churn=5.0)
    assert table.num_rows == 2 * steps - 1
    assert [table[c][-1] for c in ("x_x", "x_x0", "x_h1", "x_z", "k_x", "k_z")] == [0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert table.history == (steps > 1)


@pytest.mark.parametrize("build", [heun, dpm2])
@pytest.mark.parametrize("state", ["vp", "ve"])
def test_pure_noise_is_no_start_for_slopes(build, state):
    schedule = LINEAR.rescale_zero_terminal_snr()
    options = {"spacing": "trailing", "prediction_type": "v_prediction", "state": state}
    with pytest.raises(ConfigError, match=r"terminal SNR of zero.* infinite.*use .*start=1"):
        build(schedule, 10, **options)
    assert build(schedule, 10, start=1, **options).num_rows == 17


@pytest.mark.parametrize("build", [heun, dpm2])
def test_a_start_further_on_is_the_rest_of_the_walk(build):
    whole, rest = build(LINEAR, 12, s_churn=3.0), build(LINEAR, 12, s_churn=3.0, start=5)
    np.testing.assert_array_equal(np.delete(whole.rows[10:], -2, 1), np.delete(rest.rows, -2, 1))  # but for "step"
    assert rest.start == (whole["k_x"][9], whole["k_z"][9])


@pytest.mark.parametrize("build", [heun, dpm2])
def test_options_are_refused_in_one_line(build):
    for options in (
        {"s_churn": -1},
        {"s_noise": "1"},
        {"quantize": None},
        {"state": "v"},
        {"dynamic_thresholding_ratio": 2},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} is .*; allowed: .*") as caught:
            build(LINEAR, 10, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="'edm', 'sample'"):
        build(EDM, 10)


@pytest.mark.parametrize("build", [heun, dpm2])
def test_building_a_table_of_1999_rows_takes_less_than_10_ms(build):
    build(LINEAR)
    begun = time.process_time()
    for _ in range(5):
        build(LINEAR)
    assert (time.process_time() - begun) / 5 < 0.01

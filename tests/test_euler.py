"""Euler's method and ancestral sampling against diffusers, EDM's algorithm 2, DDIM and closed forms."""

import math
import time
import warnings

import numpy as np
import pytest
import torch
from algorithm_2 import algorithm_2, denoiser, drawn, edm_denoiser
from doubled import assert_same_walk, scheduler, walk
from fastddpm_kernels import reference
from fastddpm_kernels.constants import STREAM_STEP
from trajectories import awkward_model, run

from fastddpm import Sampler
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.ddim import ddim
from fastddpm.solvers.ddpm import ddpm
from fastddpm.solvers.euler import euler, euler_ancestral

LINEAR = NoiseSchedule.linear()
SCHEDULES = [LINEAR, NoiseSchedule.scaled_linear(1000, 0.00085, 0.012), NoiseSchedule.cosine(1000)]
# for each spacing a number of steps at which diffusers' time steps are whole, and its options
PEER_SPACINGS = {
    "leading": (20, {"timestep_spacing": "leading"}),
    "trailing": (20, {"timestep_spacing": "trailing"}),
    "linspace": (28, {"timestep_spacing": "linspace"}),
    "karras": (13, {"use_karras_sigmas": True}),
    "log_snr": (13, {"use_exponential_sigmas": True}),
}
CHURNS = [
    {},
    {"s_churn": 4.0, "s_noise": 1.02},  # from the first level on
    {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.007},  # gamma at its bound, and 0 at both ends
]
EDM = EDMSchedule()


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(4)
    return rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((2, 100, 2, 3, 4, 4))


# ---- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", PEER_SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_euler_walks_as_diffusers_does(data, schedule, spacing, prediction, monkeypatch):
    steps, config = PEER_SPACINGS[spacing]
    stock = scheduler(monkeypatch, "EulerDiscreteScheduler", schedule, prediction_type=prediction, **config)
    table = euler(schedule, steps, spacing=spacing, prediction_type=prediction, quantize=False)
    x = data[0] * table.init_noise_sigma
    expected = walk(monkeypatch, stock, steps, awkward_model, x, [])
    assert_same_walk(run(table, awkward_model, x, data[1][0, :steps]), expected)
    np.testing.assert_allclose(table["t"], stock.timesteps.numpy(), atol=1e-8)
    assert not table.stochastic


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])  # it has no "sample"
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])  # nor any other spacing
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_euler_ancestral_walks_as_diffusers_does(data, schedule, spacing, prediction, monkeypatch):
    steps, config = PEER_SPACINGS[spacing]
    stock = scheduler(monkeypatch, "EulerAncestralDiscreteScheduler", schedule, prediction_type=prediction, **config)
    table = euler_ancestral(schedule, steps, spacing=spacing, prediction_type=prediction)
    x, noise = data[0] * table.init_noise_sigma, data[1][0, :steps]
    assert_same_walk(run(table, awkward_model, x, noise), walk(monkeypatch, stock, steps, awkward_model, x, noise))
    assert table.stochastic


@pytest.mark.parametrize("final_sigma", ["zero", "sigma_min"])
def test_euler_ends_where_diffusers_does(data, final_sigma, monkeypatch):
    config = {"timestep_spacing": "trailing", "final_sigmas_type": final_sigma}
    stock = scheduler(monkeypatch, "EulerDiscreteScheduler", LINEAR, **config)
    table = euler(LINEAR, 10, spacing="trailing", final_sigma=final_sigma)
    x = data[0] * table.init_noise_sigma
    assert_same_walk(run(table, awkward_model, x, data[1][0, :10]), walk(monkeypatch, stock, 10, awkward_model, x, []))


@pytest.mark.parametrize("spacing, name", [("karras", "karras"), ("log_snr", "exponential")])
def test_euler_of_an_edm_model_walks_as_diffusers_does(data, spacing, name, monkeypatch):
    stock = scheduler(monkeypatch, "EDMEulerScheduler", sigma_schedule=name)
    table = euler(EDM, spacing=spacing, prediction_type="edm")
    x = data[0] * table.init_noise_sigma
    expected = walk(monkeypatch, stock, 18, awkward_model, x, [])
    assert_same_walk(run(table, awkward_model, x, data[1][0, :18]), expected)


def test_diffusers_evaluates_the_model_before_it_churns_and_algorithm_2_after(data, monkeypatch):
    """Its `step` is given the model's output at x and sigma, and adds noise then. Given that at x_hat, it is right."""
    x, noise = 157.0 * data[0], data[1][0, :20]
    table = euler(LINEAR, 20, spacing="trailing", s_churn=4.0)
    level = np.append(table.start[1], table["k_z"][:-1])
    lifts = (np.sqrt(1 - 1 / 1.2**2) * level)[:, None, None, None, None] * noise
    behind = np.append(lifts[1:], np.zeros_like(lifts[:1]), axis=0)
    ours = run(table, awkward_model, x + lifts[0], np.append(noise[1:], noise[:1], axis=0)) - behind

    def scheduler_with(model):
        stock = scheduler(monkeypatch, "EulerDiscreteScheduler", LINEAR, timestep_spacing="trailing")
        return walk(monkeypatch, stock, 20, model, x, noise, s_churn=4.0)

    wrong = scheduler_with(awkward_model)
    assert np.abs(wrong[-1] - ours[-1]).max() > 1e-2 * np.abs(ours[-1]).max()
    rows = iter(range(20))

    def lifted_model(scaled, _):
        i = next(rows)
        return awkward_model(table["c_in"][i] * (scaled * math.hypot(1, level[i] / 1.2) + lifts[i]), table["t"][i])

    assert_same_walk(ours, scheduler_with(lifted_model))


# ---- EDM's algorithm 2, and k-diffusion ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spacing, final_sigma",
    [(s, "zero") for s in ("karras", "log_snr", "trailing", "EDM")] + [("trailing", "sigma_min")],
)
@pytest.mark.parametrize("churn", CHURNS, ids=str)
def test_euler_is_algorithm_2_with_euler_steps(data, final_sigma, churn, spacing):
    if spacing == "EDM":
        table = euler(EDM, 15, prediction_type="edm", final_sigma=final_sigma, **churn)
        plain, denoise = euler(EDM, 15, prediction_type="edm", final_sigma=final_sigma), edm_denoiser(awkward_model)
    else:
        table = euler(LINEAR, 15, spacing=spacing, final_sigma=final_sigma, **churn)
        plain = euler(LINEAR, 15, spacing=spacing, final_sigma=final_sigma)
        denoise = denoiser(LINEAR, awkward_model)
    sigmas = np.append(plain.start[1], plain["k_z"])
    expected, added = algorithm_2(denoise, sigmas[0] * data[0], sigmas, data[1], "euler", **churn)
    noise, _ = drawn(table, added, 1)
    assert_same_walk(run(table, awkward_model, expected[0], noise), expected[1:])


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("s_noise", [1.0, 1.01])
@pytest.mark.parametrize("edm", [False, True])
def test_euler_ancestral_is_that_of_k_diffusion(data, eta, s_noise, edm):
    schedule, prediction = (EDM, "edm") if edm else (LINEAR, "epsilon")
    denoise = edm_denoiser(awkward_model) if edm else denoiser(LINEAR, awkward_model)
    table = euler_ancestral(schedule, 15, eta=eta, s_noise=s_noise, prediction_type=prediction)
    sigmas = np.append(table.start[1], table["k_z"])
    x = sigmas[0] * data[0]
    expected, _ = algorithm_2(denoise, x, sigmas, data[1], "euler", eta=eta, s_noise=s_noise)
    assert_same_walk(run(table, awkward_model, x, data[1][1, :15]), expected[1:])
    assert table.init_noise_sigma == sigmas[0]
    assert table.stochastic == (eta > 0)


@pytest.mark.parametrize("state", ["ve", "vp"])
@pytest.mark.parametrize("churn", CHURNS, ids=str)
def test_the_noise_of_churn_is_that_which_algorithm_2_adds(churn, state):
    """What the rows draw, and what the initial noise has, in variances: sigma_hat^2 - sigma^2 of each step."""
    plain, table = euler(LINEAR, 15), euler(LINEAR, 15, state=state, **churn)
    sigma = np.append(plain.start[1], plain["k_z"])[:15]
    s_noise, gamma = churn.get("s_noise", 1.0), min(churn.get("s_churn", 0.0) / 15, math.sqrt(2) - 1)
    gamma = np.where((sigma >= churn.get("s_tmin", 0)) & (sigma <= churn.get("s_tmax", math.inf)), gamma, 0)
    hat = sigma * (1 + gamma)
    alpha = np.ones(15) if state == "ve" else 1 / np.sqrt(1 + hat**2)
    np.testing.assert_allclose(np.append(table.start[1], table["k_z"][:-1]), alpha * hat, rtol=1e-12)
    np.testing.assert_allclose(np.append(table.start[0], table["k_x"][:-1]), alpha, rtol=1e-12)
    added = s_noise**2 * (hat**2 - sigma**2)
    np.testing.assert_allclose(table["x_z"][:-1], alpha[1:] * np.sqrt(added[1:]), rtol=1e-12)
    first = sigma[0] ** 2 + (1.0 if state == "vp" else 0.0)  # the variance preserving state starts from variance 1
    np.testing.assert_allclose(table.init_noise_sigma, alpha[0] * math.sqrt(first + added[0]), rtol=1e-12)


def test_churn_has_the_bounds_of_s_tmin_and_s_tmax_in_it():
    sigma = np.append(80.0, euler(EDM, 5, prediction_type="edm")["k_z"])
    within = {
        "s_tmin": float(np.nextafter(sigma[3], np.inf)),
        "s_tmax": float(np.nextafter(80.0, 0.0)),
    }  # but for rounding
    table = euler(EDM, 5, prediction_type="edm", s_churn=1, **within)
    lifted = np.append(table.start[1], table["k_z"])[:5] / sigma[:5]
    np.testing.assert_allclose(lifted, [1.2, 1.2, 1.2, 1.2, 1.0], rtol=1e-12)


# ---- the same sampler by other names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_in_the_variance_preserving_state_it_is_ddim(data, spacing, prediction, eta):
    x, noise = data[0], data[1][0, :20]
    options = {"spacing": spacing, "prediction_type": prediction}
    expected = run(ddim(LINEAR, 20, eta=eta, **options), awkward_model, x, noise)
    tables = [euler_ancestral(LINEAR, 20, eta=eta, state="vp", **options)]
    if eta == 0:
        tables.append(euler(LINEAR, 20, state="vp", **options))
    for table in tables:
        assert_same_walk(run(table, awkward_model, x, noise), expected)
        np.testing.assert_allclose(table["k_x"], ddim(LINEAR, 20, **options)["k_x"], rtol=1e-12)
        assert table.start == pytest.approx(ddim(LINEAR, 20, **options).start, rel=1e-12)
        assert table.init_noise_sigma == 1.0


@pytest.mark.parametrize("churn", CHURNS, ids=str)
@pytest.mark.parametrize("clip", [None, 0.7])
def test_both_states_are_the_same_process(data, churn, clip):
    preserving, exploding = (euler(LINEAR, 15, state=state, clip=clip, **churn) for state in ("vp", "ve"))
    x, noise = data[0], data[1][0, :15]
    states = run(preserving, awkward_model, preserving.start[0] * x, noise)
    scale = preserving["k_x"][:, None, None, None, None]
    assert_same_walk(run(exploding, awkward_model, x, noise), states / scale)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_euler_ancestral_is_ddpm(data, clip):
    x, noise = data[0], data[1][0, :30]
    expected = run(ddpm(LINEAR, 30, clip=clip), awkward_model, x, noise)
    table = euler_ancestral(LINEAR, 30, spacing="leading", state="vp", clip=clip)
    assert_same_walk(run(table, awkward_model, x, noise), expected)


def test_a_start_further_on_is_the_rest_of_the_walk(data):
    for build in (euler, euler_ancestral):
        options = {"s_churn": 3.0} if build is euler else {}
        whole, rest = build(LINEAR, 12, **options), build(LINEAR, 12, start=5, **options)
        np.testing.assert_array_equal(np.delete(whole.rows[5:], -2, 1), np.delete(rest.rows, -2, 1))  # but for "step"
        assert rest.start == (whole["k_x"][4], whole["k_z"][4])


def test_the_sampler_walks_the_same_way(data):
    table = euler(LINEAR, 6, s_churn=3.0, clip=0.9)
    x = torch.from_numpy(table.init_noise_sigma * data[0])

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.numpy().reshape(-1, 1, 1, 1)))

    sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64, device="cpu")
    ours = sampler.sample(x.shape, seeds=[3, 8], x_T=x)
    seeds = torch.tensor([3, 8])
    noise = [
        reference.normal(seeds, x.shape[1:], step=row, stream=STREAM_STEP, dtype=torch.float64).numpy()
        for row in range(6)
    ]
    np.testing.assert_allclose(ours.numpy(), run(table, awkward_model, x.numpy(), noise)[-1], rtol=0, atol=1e-12)


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 1000])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_last_row_returns_x0_and_adds_no_noise(steps, prediction):
    for table in (
        euler(LINEAR, steps, s_churn=5.0, prediction_type=prediction),
        euler_ancestral(LINEAR, steps, prediction_type=prediction),
    ):
        assert [table[c][-1] for c in ("x_x", "x_x0", "x_z", "k_x", "k_z")] == [0.0, 1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_a_terminal_snr_of_zero_needs_the_variance_preserving_state(data, prediction):
    schedule = LINEAR.rescale_zero_terminal_snr()
    options = {"spacing": "trailing", "prediction_type": prediction}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = run(ddim(schedule, 20, **options), awkward_model, data[0], data[1][0, :20])
        table = euler(schedule, 20, state="vp", **options)
        assert_same_walk(run(table, awkward_model, data[0], data[1][0, :20]), expected)
        for table in (
            euler(schedule, 20, state="vp", s_churn=5.0, s_noise=1.1, **options),
            euler_ancestral(schedule, 20, state="vp", **options),
        ):
            assert table.init_noise_sigma == pytest.approx(1.0 if table["x_z"][0] == 0 else table.init_noise_sigma)
            assert np.isfinite(run(table, awkward_model, data[0], data[1][0, :20])).all()
        for build in (euler, euler_ancestral):
            with pytest.raises(ConfigError, match=r'infinite.*state="vp"'):
                build(schedule, 20, **options)


def test_the_time_input_of_a_lifted_level_is_that_of_its_noise():
    table = euler(LINEAR, 12, s_churn=5.0, spacing="trailing")
    plain = euler(LINEAR, 12, spacing="trailing")
    assert (table["t"] >= plain["t"]).all()
    assert (table["t"][1:] > plain["t"][1:]).all()
    assert table["t"][0] == 999  # there is none for more noise
    assert (table["t"] == table["t"].round()).all()
    fractions = euler(LINEAR, 12, s_churn=5.0, spacing="trailing", quantize=False)["t"]
    np.testing.assert_array_equal(fractions.round(), table["t"])
    assert (fractions != table["t"]).any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"s_churn": -1}, "s_churn is -1; allowed: a number in 0"),
        ({"s_churn": True}, "s_churn is True"),
        ({"s_tmin": "0"}, "s_tmin is '0'"),
        ({"s_tmax": math.nan}, "s_tmax is nan"),
        ({"s_noise": math.inf}, "s_noise is inf"),
        ({"quantize": 1}, "quantize is 1; allowed: True"),
        ({"state": "vx"}, "state is 'vx'"),
        ({"spacing": "even"}, "spacing is 'even'"),
        ({"start": 10}, "start is 10; allowed: an integer in 0 ... 9"),
        ({"clip": 0}, "clip is 0"),
        ({"final_sigma": "none"}, "final_sigma is 'none'"),
    ],
)
def test_options_are_refused_in_one_line(options, message):
    with pytest.raises(ConfigError) as caught:
        euler(LINEAR, 10, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, "1", True])
def test_eta_is_a_number_in_0_to_1(eta):
    with pytest.raises(ConfigError, match=r"eta is .*; allowed: a number in 0 \.\.\. 1"):
        euler_ancestral(LINEAR, 10, eta=eta)


def test_building_a_table_of_1000_rows_takes_less_than_10_ms():
    for build in (euler, euler_ancestral):
        build(LINEAR)
        begun = time.process_time()
        for _ in range(5):
            build(LINEAR)
        assert (time.process_time() - begun) / 5 < 0.01

"""Step tables against the papers' formulas in long double, diffusers' trajectories, and closed forms."""

import contextlib
import itertools
import math
import re
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from exact import Exact, needs_long_double, products, relative_error
from fastddpm_kernels import reference
from fastddpm_kernels.columns import CLIP, COLUMNS
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import awkward_model, run

from fastddpm import EDMSchedule, solvers
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.levels import Levels
from fastddpm.solvers.spacing import timesteps

LINEAR = NoiseSchedule.linear()
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
OF_A_SCHEDULE = [name for name in solvers.names() if name != "consistency"]  # which is of EDM's schedule alone


# ---- coefficients against long double -------------------------------------------------------------------------------


def exact_strides(betas, t):
    """For each visited t: alpha_bar_t, 1 - alpha_bar_t, the same of the next, and the stride's alpha and beta."""
    bar, noise = products(betas)
    following = [*t[1:], -1]
    out = []
    for now, then in zip(t, following, strict=True):
        stride = products(betas[then + 1 : now + 1])
        before = (bar[then], noise[then]) if then >= 0 else (Exact(1), Exact(0))
        out.append((bar[now], noise[now], *before, stride[0][-1], stride[1][-1]))
    return (np.array(part, dtype=Exact) for part in zip(*out, strict=True))


def exact_x0_and_eps(prediction, bar, noise):
    """Coefficients of (x, m) in x_0 and in eps."""
    zero, one = np.zeros_like(bar), np.ones_like(bar)
    if prediction == "epsilon":
        return (1 / np.sqrt(bar), -np.sqrt(noise) / np.sqrt(bar)), (zero, one)
    if prediction == "v_prediction":
        return (np.sqrt(bar), -np.sqrt(noise)), (np.sqrt(noise), np.sqrt(bar))
    return (zero, one), (1 / np.sqrt(noise), -np.sqrt(bar) / np.sqrt(noise))


@needs_long_double
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 50, None])
@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(1000), NoiseSchedule.scaled_linear(4000)], ids=str)
def test_coefficients_are_the_papers_to_1e_13(schedule, steps, spacing, prediction):
    t = timesteps(schedule.num_steps, steps, spacing)
    bar, noise, bar_s, noise_s, alpha, beta = exact_strides(schedule.betas, t)
    (x0_x, x0_m), (eps_x, eps_m) = exact_x0_and_eps(prediction, bar, noise)
    small, last = noise_s / noise * beta, np.arange(len(t)) == len(t) - 1
    known = {"k_x": np.sqrt(bar_s), "k_z": np.sqrt(noise_s)}  # q(x_s | x_0)
    for variance, square in (("fixed_small", small), ("fixed_large", beta)):
        table = solvers.ddpm(schedule, steps, variance=variance, prediction_type=prediction, spacing=spacing)
        expected = {
            "t": t,
            "c_in": np.ones(len(t)),
            "x0_x": x0_x,
            "x0_m": x0_m,
            "x_x0": np.sqrt(bar_s) * beta / noise,
            "x_x": np.sqrt(alpha) * noise_s / noise,
            "x_z": np.where(last, 0, np.sqrt(square)),
            **known,
        }
        check_columns(table, expected)
    for eta in (0.0, 0.3, 1.0):
        table = solvers.ddim(schedule, steps, eta=eta, prediction_type=prediction, spacing=spacing)
        square = Exact(eta) ** 2 * small
        # noise_s - square cancels at eta = 1; there it is alpha noise_s^2 / noise
        direction = np.sqrt(noise_s - square) if eta < 1 else noise_s * np.sqrt(alpha / noise)
        clipped = solvers.ddim(
            schedule, steps, eta=eta, prediction_type=prediction, spacing=spacing, use_clipped_model_output=True
        )
        expected = {
            "t": t,
            "c_in": np.ones(len(t)),
            "x0_x": x0_x,
            "x0_m": x0_m,
            "x_x0": np.sqrt(bar_s),
            "x_x": direction * eps_x,
            "x_m": direction * eps_m,
            "x_z": np.sqrt(square),
            **known,
        }
        check_columns(table, expected)
        # eps from x and x_0: put (x - sqrt(bar) x_0) / sqrt(noise) for eps. x_x0 cancels in the oracle, where it has
        # 64 bits: 1e-19 of 1, relative to at least 1e-6
        x_x0 = np.sqrt(bar_s) - direction * np.sqrt(bar / noise)
        expected |= {"x_x0": x_x0, "x_x": direction / np.sqrt(noise), "x_m": np.zeros(len(t))}
        check_columns(clipped, expected)


def check_columns(table, expected):
    for name in set(COLUMNS) - {"clip", "step", "advance"}:
        exact = expected.get(name, np.zeros(table.num_rows))
        assert relative_error(table[name], exact) <= 1e-13, name
        assert relative_error(table[name].astype(np.float32), exact) <= 6e-8, name


# ---- time steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_time_steps_are_those_of_diffusers(scheduler, spacing):
    left_out = 0
    for num_steps in (1, 2, 3, 10, 15, 100, 1000):
        theirs = scheduler(num_train_timesteps=num_steps, timestep_spacing=spacing)
        for steps in {1, 2, 3, 7, 10, 13, 20, 50, 81, 100, 250, 333, 999, 1000}:
            if steps > num_steps:
                continue
            theirs.set_timesteps(steps)
            stock = theirs.timesteps.tolist()
            if len(stock) == steps + 1:  # a stock rounding error, at "trailing" only
                assert (spacing, stock[-1]) == ("trailing", -1)
                stock, left_out = stock[:-1], left_out + 1
            ours = timesteps(num_steps, steps, spacing)
            assert ours.tolist() == stock
            assert ours.dtype == np.int64
    assert left_out == (1 if spacing == "trailing" else 0)


@settings(deadline=None, max_examples=200)
@given(st.data(), st.integers(1, 5000), st.sampled_from(SPACINGS))
def test_time_steps_fall_strictly_and_stay_in_range(data, num_steps, spacing):
    steps = data.draw(st.integers(1, num_steps))
    t = timesteps(num_steps, steps, spacing)
    assert len(t) == steps
    assert (np.diff(t) < 0).all()
    assert t[-1] >= 0
    assert t[0] < num_steps
    assert timesteps(num_steps, None, spacing).tolist() == list(range(num_steps))[::-1]


# ---- whole trajectories against diffusers ----------------------------------------------------------------------------


def diffusers_states(scheduler, x, noise, steps, monkeypatch, **step_options):
    scheduler.set_timesteps(steps)
    draws, states = iter(noise), []
    if isinstance(scheduler, DDPMScheduler):
        module = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
        monkeypatch.setattr(module, lambda *_, **__: torch.from_numpy(next(draws)))
    for t in scheduler.timesteps:
        if isinstance(scheduler, DDIMScheduler):
            step_options["variance_noise"] = torch.from_numpy(next(draws))
        m = torch.from_numpy(awkward_model(x, t.item()))
        x = scheduler.step(m, t, torch.from_numpy(x), **step_options).prev_sample.numpy()
        states.append(x)
    assert x.dtype == np.float64
    return np.array(states)


def in_float64(scheduler, schedule):
    """The stock scheduler with our float64 alpha_bar: what is left is its arithmetic, in float64."""
    scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


@pytest.fixture
def start():
    rng = np.random.default_rng(1)
    return rng.standard_normal((2, 3, 4, 4)), rng.standard_normal((1000, 2, 3, 4, 4))


@pytest.mark.parametrize("stock", [True, False], ids=["float32 coefficients", "float64 coefficients"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.7])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing, steps", [("leading", 30), ("linspace", 30), ("trailing", 30)])
def test_ddpm_walks_as_diffusers_does(start, spacing, steps, variance, prediction, clip, stock, monkeypatch):
    x, noise = start[0], start[1][:steps]
    theirs = DDPMScheduler(
        prediction_type=prediction,
        variance_type=variance,
        timestep_spacing=spacing,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
    )
    if not stock:
        in_float64(theirs, LINEAR)
    expected = diffusers_states(theirs, x, noise, steps, monkeypatch)
    table = solvers.ddpm(LINEAR, steps, variance=variance, prediction_type=prediction, clip=clip, spacing=spacing)
    states = run(table, awkward_model, x, noise)
    if spacing == "trailing":
        # Stock diffusers adds noise in the last step unless its t is 0, which "trailing" doesn't reach. Ours doesn't.
        t = int(table["t"][-1])
        sigma = math.sqrt(1 - LINEAR.alphas_cumprod[t]) if variance == "fixed_large" else 1e-10  # its clamp of 1e-20
        expected[-1] -= sigma * noise[-1]
    assert_close(states, expected, stock)


@pytest.mark.parametrize("stock", [True, False], ids=["float32 coefficients", "float64 coefficients"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing, steps", [("leading", 50), ("trailing", 50)])
@pytest.mark.parametrize("clipped", [False, True], ids=["the model's eps", "eps of the clipped x0"])
def test_ddim_walks_as_diffusers_does(start, clipped, spacing, steps, eta, prediction, clip, stock, monkeypatch):
    x, noise = start[0], start[1][:steps]
    theirs = DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing, clip_sample=clip is not None)
    if not stock:
        in_float64(theirs, LINEAR)
    options = {"eta": eta, "use_clipped_model_output": clipped}
    expected = diffusers_states(theirs, x, noise, steps, monkeypatch, **options)
    table = solvers.ddim(LINEAR, steps, prediction_type=prediction, clip=clip, spacing=spacing, **options)
    assert_close(run(table, awkward_model, x, noise), expected, stock)


def assert_close(states, expected, stock):
    scale = np.abs(expected).max()
    # diffusers' float32 1 - alpha_bar is off by 6e-8 of 1e-4 at t = 0, hence by 3e-4 in its root
    np.testing.assert_allclose(states, expected, rtol=0, atol=(1e-3 if stock else 1e-9) * scale)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_all_of_the_1000_steps_are_diffusers_steps(start, clip, monkeypatch):
    x, noise = start
    clips = clip is not None
    for variance in ("fixed_small", "fixed_large"):
        theirs = in_float64(DDPMScheduler(variance_type=variance, clip_sample=clips), LINEAR)
        expected = diffusers_states(theirs, x, noise, 1000, monkeypatch)
        table = solvers.ddpm(LINEAR, variance=variance, clip=clip)
        assert_close(run(table, awkward_model, x, noise), expected, stock=False)
    theirs = in_float64(DDIMScheduler(clip_sample=clips), LINEAR)
    expected = diffusers_states(theirs, x, noise, 1000, monkeypatch, eta=0.5)
    table = solvers.ddim(LINEAR, eta=0.5, clip=clip)
    assert_close(run(table, awkward_model, x, noise), expected, stock=False)


class Stride(int):
    """In place of stock DDIM's number of steps: 1000 // Stride(n) is n."""

    def __rfloordiv__(self, _):
        return int(self)


def test_ddim_linspace_goes_on_from_where_it_is_and_stock_diffusers_does_not(start, monkeypatch):
    """Stock DDIM takes t - T // steps for the next time step; with "linspace" that is not the next in its own list."""
    x, noise, steps = start[0], start[1][:30], 30
    theirs = in_float64(DDIMScheduler(timestep_spacing="linspace", clip_sample=False), LINEAR)
    stock = diffusers_states(theirs, x, noise, steps, monkeypatch)
    states = run(solvers.ddim(LINEAR, steps, spacing="linspace"), awkward_model, x, noise)
    assert np.abs(states - stock).max() > 1e-3
    # The right answer: each step of stock DDIM, told how far away the next time step really is.
    visited = [*timesteps(1000, steps, "linspace").tolist(), -1]
    for i, (now, then) in enumerate(itertools.pairwise(visited)):
        theirs.num_inference_steps = Stride(now - then)
        m = torch.from_numpy(awkward_model(x, now))
        x = theirs.step(m, now, torch.from_numpy(x)).prev_sample.numpy()
        np.testing.assert_allclose(states[i], x, rtol=0, atol=1e-9)


# ---- closed forms ----------------------------------------------------------------------------------------------------


def gaussian_model(schedule, mean, variance, prediction="epsilon"):
    """What a perfect model says when the data are N(mean, variance)."""

    def model(x, t):
        bar = schedule.alphas_cumprod[int(t)]
        root, noise = math.sqrt(bar), schedule.sqrt_one_minus_alphas_cumprod[int(t)]
        eps = noise * (x - root * mean) / (bar * variance + noise**2)
        x0 = mean + root * variance * (x - root * mean) / (bar * variance + noise**2)
        return {"epsilon": eps, "sample": x0, "v_prediction": root * eps - noise * x0}[prediction]

    return model


def moments(table, model, mean, variance):
    """Mean and variance of the state after each row, for a model that is affine in x: two runs and a sum of squares."""
    one, zero = run(table, model, np.array([1.0, 0.0]), np.zeros((table.num_rows, 2))).T
    out_mean = zero + (one - zero) * mean
    gain = np.diff(np.concatenate(([0.0], np.log(np.maximum(one - zero, 1e-300)))))
    out = []
    for g, sigma in zip(np.exp(gain), table["x_z"], strict=True):
        variance = g**2 * variance + sigma**2
        out.append(variance)
    return out_mean, np.array(out)


SOLVERS = st.one_of(
    st.builds(lambda v: ("ddpm", {"variance": v}), st.just("fixed_small")),
    st.builds(lambda e: ("ddim", {"eta": e}), st.floats(0, 1)),
)


@settings(deadline=None, max_examples=60)
@given(SOLVERS, st.sampled_from(PREDICTIONS), st.sampled_from(SPACINGS), st.integers(2, 60), st.floats(-2, 2))
def test_data_that_are_a_point_have_the_forward_marginals_at_every_step(solver, prediction, spacing, steps, mean):
    """DDIM's theorem: for any eta, and for DDPM's posterior, x_s ~ N(sqrt(alpha_bar_s) x_0, 1 - alpha_bar_s)."""
    name, options = solver
    schedule = NoiseSchedule.linear(60, 1e-3, 0.2)
    table = solvers.make(name, schedule, steps, prediction_type=prediction, spacing=spacing, **options)
    model = gaussian_model(schedule, mean, 0.0, prediction)
    t = table["t"].astype(int)
    bar = np.append(schedule.alphas_cumprod[t], 1.0)
    x = np.sqrt(bar[0]) * mean + math.sqrt(1 - bar[0])  # one standard deviation up
    for i, row in enumerate(table.rows):
        step = solvers.StepTable(np.where(np.arange(len(row)) == COLUMNS.index("step"), 0, row)[None])
        low, high = run(step, model, np.array([np.sqrt(bar[i]) * mean, x]), np.zeros((1, 2)))[0]
        np.testing.assert_allclose(low, np.sqrt(bar[i + 1]) * mean, atol=1e-9)  # mean to mean
        square = (high - low) ** 2 + row[COLUMNS.index("x_z")] ** 2
        np.testing.assert_allclose(square, 1 - bar[i + 1], atol=1e-9)  # variance to variance
        x = np.sqrt(bar[i + 1]) * mean + math.sqrt(1 - bar[i + 1])


def test_unit_gaussian_data_keep_variance_one_under_fixed_large():
    table = solvers.ddpm(LINEAR, variance="fixed_large")
    mean, variance = moments(table, gaussian_model(LINEAR, 0.0, 1.0), 0.0, 1.0)
    np.testing.assert_allclose(mean, 0.0, atol=1e-12)
    np.testing.assert_allclose(variance[:-1], 1.0, rtol=1e-12)
    np.testing.assert_allclose(variance[-1], 1.0 - LINEAR.betas[0], rtol=1e-12)  # the last row adds no noise


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_thousand_steps_of_a_gaussian_follow_the_recursion_of_ho_et_al(variance):
    """Eq. 11 by hand: x' = (x - beta / sqrt(1 - bar) eps) / sqrt(alpha) + sigma z, for N(0.4, 0.25) data."""
    mean, var = 0.0, 1.0
    means, variances = [], []
    for t in reversed(range(1000)):
        bar, beta = LINEAR.alphas_cumprod[t], LINEAR.betas[t]
        slope = 1 / (bar * 0.25 + 1 - bar)  # eps / sqrt(1 - bar) = slope (x - sqrt(bar) 0.4)
        mean = (mean - beta * slope * (mean - math.sqrt(bar) * 0.4)) / math.sqrt(1 - beta)
        before = LINEAR.alphas_cumprod[t - 1] if t else 1.0
        noise = beta * ((1 - before) / (1 - bar) if variance == "fixed_small" else 1.0) * (t > 0)
        var = ((1 - beta * slope) ** 2 / (1 - beta)) * var + noise
        means.append(mean)
        variances.append(var)
    table = solvers.ddpm(LINEAR, variance=variance)
    ours = moments(table, gaussian_model(LINEAR, 0.4, 0.25), 0.0, 1.0)
    np.testing.assert_allclose(ours[0], means, rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours[1], variances, rtol=1e-9)
    assert abs(ours[0][-1] - 0.4) < 0.01
    assert abs(ours[1][-1] - 0.25) < 0.01


def test_ddim_takes_a_gaussian_to_its_own_spread():
    """Deterministic DDIM integrates the probability-flow ODE: N(0, 1) noise ends with the data's deviation."""
    table = solvers.ddim(LINEAR, 1000)
    assert not table.stochastic
    _, variance = moments(table, gaussian_model(LINEAR, 0.4, 0.25), 0.0, 1.0)
    assert abs(math.sqrt(variance[-1]) - 0.5) < 0.005


@pytest.mark.parametrize("name", OF_A_SCHEDULE)
def test_the_prediction_types_are_the_same_sampler(name, start):
    usual = {"spacing": "trailing", "clip": 0.6, "quantize": False, "each": 2}
    options = {option: value for option, value in usual.items() if option in solvers.options(name)}
    ends = []
    for prediction in PREDICTIONS:
        table = solvers.make(name, LINEAR, 40, prediction_type=prediction, **options)
        noise = list(itertools.islice(itertools.cycle(start[1]), table.num_rows))
        ends.append(run(table, continuous_gaussian_model(0.4, 0.25, prediction), start[0], noise))
    scale = np.abs(ends[0]).max()
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(ends[2], ends[0], rtol=0, atol=1e-9 * scale)


def continuous_gaussian_model(mean, variance, prediction):
    """`gaussian_model` of LINEAR with time steps in between, as dpm2 and the inversion have them."""

    def model(x, t):
        log_snr = np.interp(t, np.arange(1000), LINEAR.log_snr)
        bar = 1 / (1 + np.exp(-log_snr))
        noise = 1 / (1 + np.exp(log_snr))
        eps = np.sqrt(noise) * (x - np.sqrt(bar) * mean) / (bar * variance + noise)
        x0 = (x - np.sqrt(noise) * eps) / np.sqrt(bar)
        return {"epsilon": eps, "sample": x0, "v_prediction": np.sqrt(bar) * eps - np.sqrt(noise) * x0}[prediction]

    return model


def test_ddim_with_eta_1_is_ddpm_where_nothing_is_clipped(start):
    x, noise = start[0], start[1][:40]
    a = run(solvers.ddim(LINEAR, 40, eta=1.0), awkward_model, x, noise)
    b = run(solvers.ddpm(LINEAR, 40), awkward_model, x, noise)
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-10 * np.abs(b).max())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_with_eta_1_and_the_clipped_eps_is_ddpm_whatever_is_clipped(prediction):
    options = {"prediction_type": prediction, "clip": 0.5}
    ddim = solvers.ddim(LINEAR, 40, eta=1.0, use_clipped_model_output=True, **options)
    np.testing.assert_allclose(ddim.rows, solvers.ddpm(LINEAR, 40, **options).rows, rtol=1e-13)


# ---- rows at the edges -----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.data(), st.sampled_from(PREDICTIONS), st.sampled_from(SPACINGS), st.sampled_from([1, 2, 10, 1000]))
def test_the_last_row_returns_x0_and_adds_no_noise(data, prediction, spacing, num_steps):
    schedule = NoiseSchedule.cosine(num_steps)
    steps = data.draw(st.integers(1, num_steps))
    options = {"prediction_type": prediction, "spacing": spacing}
    for table in (
        solvers.ddpm(schedule, steps, variance="fixed_small", **options),
        solvers.ddpm(schedule, steps, variance="fixed_large", **options),
        solvers.ddim(schedule, steps, eta=data.draw(st.floats(0, 1)), **options),
        solvers.ddim(schedule, steps, eta=data.draw(st.floats(0, 1)), use_clipped_model_output=True, **options),
    ):
        last = {name: table[name][-1] for name in ("x_x", "x_x0", "x_m", "x_z")}
        assert last == {"x_x": 0.0, "x_x0": 1.0, "x_m": 0.0, "x_z": 0.0}
        assert table.stochastic == bool(table["x_z"][:-1].any())


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr_can_be_sampled_but_not_with_epsilon(prediction, start):
    schedule = LINEAR.rescale_zero_terminal_snr()
    for name in ("ddpm", "ddim", "dpm_solver", "unipc"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = solvers.make(name, schedule, 50, prediction_type=prediction, spacing="trailing")
        assert table["t"][0] == 999
        states = run(table, gaussian_model(schedule, 0.4, 0.25, prediction), start[0], start[1][:50])
        assert np.isfinite(states).all()
        with pytest.raises(ConfigError, match="terminal SNR of zero"):
            solvers.make(name, schedule, 50, spacing="trailing")
        solvers.make(name, schedule, 50, spacing="leading")  # does not visit the last time step


@pytest.mark.parametrize("name", OF_A_SCHEDULE)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_at_a_terminal_snr_of_zero_a_solver_is_finite_or_says_that_it_is_not_for_it(name, prediction, start):
    schedule = LINEAR.rescale_zero_terminal_snr()
    for state in ("vp", "ve") if "state" in solvers.options(name) else (None,):
        options = {"prediction_type": prediction, **({"state": state} if state else {})}
        options |= {"spacing": "trailing"} if "spacing" in solvers.options(name) else {}
        table = None
        with warnings.catch_warnings(), contextlib.suppress(ConfigError):
            warnings.simplefilter("error")
            table = solvers.make(name, schedule, 20, **options)
        if table is None:
            with pytest.raises(ConfigError, match="SNR"):
                solvers.make(name, schedule, 20, **options)
            continue
        assert prediction != "epsilon" or table["t"][0] != 999  # lcm and the inversion don't begin there
        noise = itertools.repeat(start[1][0], table.num_rows)
        assert np.isfinite(run(table, gaussian_model(schedule, 0.4, 0.25, prediction), start[0], list(noise))).all()


@pytest.mark.parametrize("name", OF_A_SCHEDULE)
def test_building_a_table_of_1000_rows_takes_less_than_10_ms(name):
    options = {"each": 1} if name == "annealed_langevin" else {}
    times = []
    for _ in range(5):
        start = time.process_time()
        solvers.make(name, NoiseSchedule.linear(), 50 if name == "lcm" else 990, **options)
        times.append(time.process_time() - start)
    assert min(times) < 0.010


# ---- the table itself ------------------------------------------------------------------------------------------------


def test_a_table_says_what_it_is():
    table = solvers.ddpm(LINEAR, 10, clip=1.0)
    assert table.rows.shape == (10, len(COLUMNS))
    assert table.rows.dtype == np.float64
    assert (table.num_rows, table.history, table.stochastic, table.limited) == (10, 0, True, True)
    assert table.timesteps.tolist() == list(range(900, -1, -100))
    assert repr(table) == "StepTable(10 rows, stochastic, history=0)"
    plain = solvers.ddim(LINEAR, 10)
    assert (plain.stochastic, plain.limited) == (False, False)
    assert solvers.step_table([2, 1], x_h1=[0, 0.5]).history == 1
    assert solvers.step_table([2, 1], x_h2=[0, 0.5]).history == 2
    assert solvers.step_table([2, 1], x_h1=[0, 0.5], x_h3=[0, 0.5]).history == 3
    with pytest.raises(ValueError, match="read-only"):
        table["x_z"][0] = 1.0
    with pytest.raises(ConfigError, match="no column 'z'"):
        table["z"]


def test_the_identity_row_leaves_a_sample_as_it_is():
    table = solvers.ddim(LINEAR, 3)
    rows = table.with_identity()
    assert rows.shape == (4, len(COLUMNS))
    np.testing.assert_array_equal(rows[:-1], table.rows)
    last = dict(zip(COLUMNS, rows[-1], strict=True))
    stays = {"t": 0.0, "c_in": 1.0, "x_x": 1.0, "clip": math.inf, "step": 3.0}
    assert last == {name: stays.get(name, 0.0) for name in COLUMNS}


def broken(column, row, value):
    rows = solvers.ddim(LINEAR, 4).rows.copy()
    rows[row, COLUMNS.index(column)] = value
    return rows


BAD_TABLES = {
    "NaN": (lambda: solvers.StepTable(broken("x_m", 2, math.nan)), "x_m of row 2 is nan"),
    "infinite": (lambda: solvers.StepTable(broken("x_z", 1, math.inf)), "x_z of row 1 is inf"),
    "clip 0": (lambda: solvers.StepTable(broken("clip", 0, 0.0)), "clip of row 0 is 0; allowed: above 0"),
    "clip NaN": (lambda: solvers.StepTable(broken("clip", 3, math.nan)), "clip of row 3 is nan"),
    "step": (lambda: solvers.StepTable(broken("step", 3, 2)), "step of row 3 is 2"),
    "advance": (lambda: solvers.StepTable(broken("advance", 0, 0)), "advance of row 0 is 0"),
    "no rows": (lambda: solvers.StepTable(np.zeros((0, len(COLUMNS)))), "a row at least"),
    "columns missing": (lambda: solvers.StepTable(np.zeros((3, 4))), r"given: \(3, 4\)"),
    "unknown column": (lambda: solvers.step_table([1, 0], x_q=1.0), "no column 'x_q'"),
    "fixed column": (lambda: solvers.step_table([1, 0], advance=0.0), "no column 'advance'"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_wrong_table_is_refused(name):
    call, message = BAD_TABLES[name]
    with pytest.raises(ConfigError, match=message):
        call()


BAD_OPTIONS = {
    "steps = 0": ({"steps": 0}, r"steps is 0; allowed: an integer in 1 \.\.\. (1000|999|50)"),
    "steps > T": ({"steps": 1001}, "steps is 1001"),
    "steps < 0": ({"steps": -1}, "steps is -1"),
    "steps a bool": ({"steps": True}, "steps is True"),
    "steps a float": ({"steps": 10.0}, r"steps is 10\.0"),
    "spacing": ({"spacing": "even"}, "spacing is 'even'; allowed: 'leading'"),
    "quantize": ({"quantize": "yes"}, r"quantize is 'yes'; allowed: True \(whole time steps\) or False"),
    "prediction_type": ({"prediction_type": "eps"}, "prediction_type is 'eps'; allowed: 'epsilon'"),
    "clip = 0": ({"clip": 0}, "clip is 0"),
    "clip < 0": ({"clip": -1.0}, r"clip is -1\.0"),
    "clip NaN": ({"clip": math.nan}, "clip is nan"),
    "clip infinite": ({"clip": math.inf}, "clip is inf"),
    "clip a bool": ({"clip": True}, "clip is True"),
    "clip a word": ({"clip": "1"}, "clip is '1'"),
}


@pytest.mark.parametrize(
    "solver, name",
    [
        (solver, name)
        for solver in OF_A_SCHEDULE
        for name, (given, _) in BAD_OPTIONS.items()
        if given.keys() <= {"steps", *solvers.options(solver)}
    ],
)
def test_a_wrong_option_is_refused_in_one_line(name, solver):
    given, message = BAD_OPTIONS[name]
    usual = {"steps": 10, **({"spacing": "trailing"} if "spacing" in solvers.options(solver) else {})}
    given = {**usual, **given}
    with pytest.raises(ConfigError, match=message) as caught:
        solvers.make(solver, LINEAR, **given)
    assert "\n" not in str(caught.value)


BY_LEVEL = [name for name in solvers.names() if "quantize" in solvers.options(name)]


@pytest.mark.parametrize("name", BY_LEVEL)
def test_a_misspelt_spacing_is_told_of_those_by_level(name):
    for spacing in ("log-snr", "karras7", "ddim_50"):
        with pytest.raises(ConfigError, match=f"spacing is '{spacing}'; allowed: 'leading', .*'karras', 'log_snr'"):
            solvers.make(name, LINEAR, 10, spacing=spacing)
    with pytest.raises(ConfigError, match="allowed with an EDMSchedule: 'karras', 'log_snr'"):
        solvers.make(name, EDMSchedule(), 20, spacing=np.array([10, 10]))


@pytest.mark.parametrize("name", BY_LEVEL)
def test_edms_network_is_sampled_as_the_denoiser_that_its_preconditioning_makes_of_it(name, start):
    """2206.00364, eq. 7 and table 1: F from D, which is that of N(0.4, 0.25) data."""

    def denoiser(x, sigma):
        return (0.25 * x + 0.4 * sigma**2) / (0.25 + sigma**2)

    def network(scaled, c_noise):
        sigma = np.exp(4 * c_noise)
        norm = np.sqrt(sigma**2 + 0.36)
        x = scaled * norm
        return (denoiser(x, sigma) - 0.36 / norm**2 * x) * norm / (0.6 * sigma)

    schedule, ends = EDMSchedule(0.01, 20.0, sigma_data=0.6), []
    options = {"spacing": "karras", **({"each": 2} if name == "annealed_langevin" else {})}
    for prediction, model in (("sample", denoiser), ("edm", network)):
        table = solvers.make(name, schedule, 12, prediction_type=prediction, **options)
        assert (table.start[0], table.start[1], table.init_noise_sigma) == pytest.approx((1.0, 20.0, 20.0), rel=1e-12)
        noise = list(itertools.islice(itertools.cycle(start[1]), table.num_rows))
        ends.append(run(table, model, 20.0 * start[0], noise)[-1])
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-9)
    if name != "annealed_langevin":  # whose 24 rows of small steps lead nowhere
        assert abs(ends[0].mean() - 0.4) < 0.4
        assert abs(ends[0].std() - 0.5) < 0.4


@pytest.mark.parametrize("name", [name for name in solvers.names() if name not in (*BY_LEVEL, "lcm", "consistency")])
def test_an_edm_schedule_is_refused_where_there_have_to_be_time_steps(name):
    with pytest.raises(ConfigError, match="schedule is of type EDMSchedule; this solver needs a NoiseSchedule"):
        solvers.make(name, EDMSchedule(), 20)


@pytest.mark.parametrize("name", BY_LEVEL)
def test_what_is_no_schedule_is_refused(name):
    with pytest.raises(ConfigError, match="schedule is of type dict; this solver needs a NoiseSchedule"):
        solvers.make(name, {}, 20)


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_levels_end_at_the_schedules_own_to_the_last_bit(spacing):
    """Else a last step to "sigma_min", from there to there, is refused or is one of a rounding error, as it happens."""
    for least in np.linspace(1e-4, 4e-4, 30):
        for steps in (2, 7, 20):
            schedule = NoiseSchedule.linear(1000, least)
            levels = Levels.of(schedule, steps, spacing=spacing, prediction_type="epsilon")
            assert levels.lam[[0, -2]].tolist() == [schedule.log_snr[-1] / 2, schedule.log_snr[0] / 2]
            with pytest.raises(ConfigError, match="is the last level itself"):
                Levels.of(schedule, steps, spacing=spacing, prediction_type="epsilon", final_sigma="sigma_min")
    one = Levels.of(LINEAR, 1, spacing=spacing, prediction_type="epsilon", final_sigma="sigma_min")
    assert one.lam.tolist() == [LINEAR.log_snr[-1] / 2, LINEAR.log_snr[0] / 2]


def test_options_of_one_solver_alone_are_refused_too():
    for eta in (-0.1, 1.1, math.nan, True, "0"):
        with pytest.raises(ConfigError, match=r"eta is .*; allowed: a number in 0 \.\.\. 1"):
            solvers.ddim(LINEAR, 10, eta=eta)
    with pytest.raises(ConfigError, match="use_clipped_model_output is 1; allowed: True or False"):
        solvers.ddim(LINEAR, 10, use_clipped_model_output=1)
    with pytest.raises(ConfigError, match="variance is 'small'; allowed: 'fixed_small', 'fixed_large', 'learned'"):
        solvers.ddpm(LINEAR, 10, variance="small")


def test_unknown_names_get_the_nearest():
    assert solvers.names()[:2] == ("ddpm", "ddim")
    assert "eta" in solvers.options("ddim")
    with pytest.raises(ConfigError, match="no solver 'DDMI'; did you mean 'ddpm'\\? Allowed: 'ddpm', 'ddim', "):
        solvers.make("DDMI", LINEAR)
    with pytest.raises(ConfigError, match="no solver 'xyzzy'; Allowed"):
        solvers.make("xyzzy", LINEAR)
    with pytest.raises(ConfigError, match="solver ddim has no option 'etta'; did you mean 'eta'"):
        solvers.make("ddim", LINEAR, 10, etta=0.5)
    with pytest.raises(ConfigError, match="solver ddpm has no option 'eta'"):
        solvers.make("ddpm", LINEAR, 10, eta=0.5)


def test_the_documents_table_is_right_about_rows_and_history():
    """At 10 steps, with the options by default; the history over the orders where a solver has any."""
    text = (Path(__file__).parents[1] / "docs" / "solvers.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| `")]
    described = {name: row for row in cells for name in re.findall(r"`(\w+)`", row[1])}
    assert sorted(described) == sorted(solvers.names())
    for name, (_, _, _, rows, history, *_) in described.items():
        schedule = EDMSchedule() if name == "consistency" else LINEAR
        orders = [{"order": p} for p in (1, 2, 3)] if "order" in solvers.options(name) else [{}]
        orders[0] |= {"jump_length": 5} if name == "repaint" else {}
        tables = [solvers.make(name, schedule, 10, **order) for order in orders]
        least, _, most = history.partition(" to ")
        assert [t.history for t in tables] == list(range(int(least), int(most or least) + 1)), name
        if name != "repaint":
            assert {t.num_rows for t in tables} == {eval(re.sub(r"(\d+) steps", r"\1 * steps", rows), {"steps": 10})}, (
                name
            )


def test_make_is_the_function_of_that_name():
    made = solvers.make("ddim", LINEAR, 20, eta=0.5, clip=1.0)
    np.testing.assert_array_equal(made.rows, solvers.ddim(LINEAR, 20, eta=0.5, clip=1.0).rows)
    assert (made.rows[:, CLIP] == 1.0).all()


# ---- learned variances and dynamic thresholding ----------------------------------------------------------------------


@needs_long_double
@pytest.mark.parametrize("steps", [1, 7, 50, None])
def test_a_learned_range_lies_between_the_two_fixed_variances(steps):
    """v = -1 is the small one, v = 1 the large one, and between them the logarithm is linear; no noise at the end."""
    table, small, large = (
        solvers.ddpm(LINEAR, steps, variance=v) for v in ("learned_range", "fixed_small", "fixed_large")
    )
    assert table.learned
    assert not small.learned
    assert table["x_z"].tolist() == [1.0] * (table.num_rows - 1) + [0.0]
    for v, other in ((-1.0, small["x_z"]), (1.0, large["x_z"]), (0.0, np.sqrt(small["x_z"] * large["x_z"]))):
        sigma = table["x_z"] * np.exp2(table["s_0"] + v * table["s_v"])
        assert sigma == pytest.approx(other, rel=1e-12)
    learned = solvers.ddpm(LINEAR, steps, variance="learned")
    assert learned.learned
    if steps == 1:
        return
    assert learned["x_z"][0] * np.exp2(learned["s_0"] + 3.0 * learned["s_v"])[0] == pytest.approx(math.exp(1.5))


def stepped(table, row, x, m, z):
    """One row of a table by the kernels' reference, in float64."""
    rows = torch.tensor(table.with_identity())
    cursor = torch.full((len(x),), row, dtype=torch.int32)
    flags = dict(limited=table.limited, dynamic=table.dynamic, learned=table.learned)
    return reference.reverse_step(x, m, rows, cursor, z, **flags)


class Drawn:
    """Stands for diffusers' `randn_tensor`: always these values."""

    def __init__(self, z):
        self.z = z

    def __call__(self, *args, **kwargs):
        return self.z


def test_a_learned_range_is_that_of_diffusers(monkeypatch):
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=True)
    scheduler.set_timesteps(50)
    table = solvers.ddpm(LINEAR, 50, variance="learned_range", clip=1.0)
    x, z = (torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(k)).double() for k in (0, 1))
    m = torch.randn(2, 6, 5, 7, generator=torch.Generator().manual_seed(2)).double()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", Drawn(z))
    for row in (0, 10, 48, 49):
        theirs = scheduler.step(m, scheduler.timesteps[row], x).prev_sample
        ours = stepped(table, row, x, m, z).x
        # Their coefficients are float32, in which 1 - alpha_bar cancels at small t: 2.8e-5 at worst.
        assert (ours - theirs).abs().max() <= 4e-5 * theirs.abs().max()


@pytest.mark.parametrize("solver, scheduler", [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_dynamic_thresholding_is_that_of_diffusers(solver, scheduler, prediction, monkeypatch):
    config = dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0, prediction_type=prediction)
    stock = scheduler(**config)
    stock.set_timesteps(20)
    options = dict(clip=3.0, dynamic_thresholding_ratio=0.9, prediction_type=prediction)
    table = solvers.make(solver, LINEAR, 20, **options)
    assert table.dynamic
    x, z, m = (torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(k)).double() for k in range(3))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", Drawn(z))
    for row in (0, 10, 19):
        theirs = stock.step(m, stock.timesteps[row], x)
        made = stepped(table, row, x, m, z)
        assert (made.x0 - theirs.pred_original_sample).abs().max() <= 5e-6
        assert (made.x - theirs.prev_sample).abs().max() <= 5e-6 * (1 + theirs.prev_sample.abs().max())


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dynamic_thresholding_ratio=1.5, clip=2.0), "ratio is 1.5; allowed: None, or a number above 0"),
        (dict(dynamic_thresholding_ratio=True, clip=2.0), "ratio is True"),
        (dict(dynamic_thresholding_ratio=0.9), "clip is None; with dynamic thresholding it bounds"),
        (dict(dynamic_thresholding_ratio=0.9, clip=0.5), "clip is 0.5; with dynamic"),
    ],
)
def test_bad_thresholds(options, words):
    with pytest.raises(ConfigError, match=words):
        solvers.ddpm(LINEAR, 10, **options)
    with pytest.raises(ConfigError, match=words):
        solvers.ddim(LINEAR, 10, **options)


def test_a_table_knows_what_its_rows_need():
    plain = solvers.ddpm(LINEAR, 10)
    assert (plain.dynamic, plain.learned, plain.direct, plain.scaled) == (False,) * 4
    assert solvers.ddim(LINEAR, 10).direct
    assert solvers.step_table([1, 0], c_in=[0.5, 1.0], x_x=1.0).scaled
    with pytest.raises(ConfigError, match=r"ratio of row 1 is 2; allowed: 0 ... 1"):
        solvers.step_table([1, 0], ratio=[0.5, 2.0], clip=2.0)

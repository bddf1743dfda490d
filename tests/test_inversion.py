"""DDIM inversion: diffusers' DDIMInverseScheduler, the way back, and a Gaussian's closed form."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.inversion import ddim_inversion

LINEAR = NoiseSchedule.linear()
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
KINDS = ("epsilon", "v_prediction", "sample")


def pictures(shape=(2, 3, 4, 4)):
    return np.random.default_rng(1).uniform(-1, 1, shape)


def scalars(n):
    """Draws from the data of `mixture_model`."""
    rng = np.random.default_rng(2)
    return np.where(rng.random(n) < 0.4, -1 + 0.1 * rng.standard_normal(n), 0.6 + 0.3 * rng.standard_normal(n))


def calm(table):
    return np.zeros((table.num_rows, 1))


def mixture_model(schedule, kind="epsilon"):
    """A perfect model of scalars from 0.4 N(-1, 0.1^2) + 0.6 N(0.6, 0.3^2)."""
    mu, s, w = np.array([-1.0, 0.6]), np.array([0.1, 0.3]), np.array([0.4, 0.6])

    def model(x, t):
        a, g = schedule.sqrt_alphas_cumprod[int(t)], schedule.sqrt_one_minus_alphas_cumprod[int(t)]
        total, off = (a * s) ** 2 + g**2, x[..., None] - a * mu
        log_p = np.log(w) - 0.5 * off**2 / total - 0.5 * np.log(total)
        p = np.exp(log_p - log_p.max(-1, keepdims=True))
        x0 = (p * (mu + a * s**2 / total * off)).sum(-1) / p.sum(-1)
        eps = (x - a * x0) / g
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - g * x0}[kind]

    return model


# ---- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_states(x, schedule, name, model, steps, stock=False, **config):
    scheduler = DDIMInverseScheduler(beta_schedule=name, **config)
    if not stock:
        scheduler.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod.copy())
        scheduler.initial_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    states = []
    for t in scheduler.timesteps:
        x = scheduler.step(torch.from_numpy(model(x, t.item())), t, torch.from_numpy(x)).prev_sample.numpy()
        states.append(x)
    return np.array(states), scheduler.timesteps.tolist()


@pytest.mark.parametrize("stock", [True, False], ids=["float32 coefficients", "float64 coefficients"])
@pytest.mark.parametrize("clip", [None, 1.0, 0.5])
@pytest.mark.parametrize("spacing, steps", [("leading", 30), ("leading", 100), ("trailing", 50)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_it_walks_as_diffusers_does(name, spacing, steps, clip, stock):
    x, schedule = pictures(), SCHEDULES[name]
    clips = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    expected, times = diffusers_states(
        x, schedule, name, awkward_model, steps, stock, timestep_spacing=spacing, **betas, **clips
    )
    table = ddim_inversion(schedule, steps, spacing=spacing, clip=clip)
    assert table.timesteps.tolist() == times
    states = run(table, awkward_model, x, calm(table))
    np.testing.assert_allclose(states, expected, rtol=0, atol=(1e-3 if stock else 1e-9) * np.abs(expected).max())


def test_one_model_gives_one_noise_whatever_it_predicts_and_diffusers_gives_three():
    """Our eps is the model's at the time step that it was told. diffusers converts v and x_0 with the alpha of another
    time step, the state's: then what ddim makes of its noise is further from the start, or nothing at all."""
    x, steps = scalars(400), 50
    noises, errors = [], []
    for kind in KINDS:
        model = mixture_model(LINEAR, kind)
        back = solvers.ddim(LINEAR, steps, prediction_type=kind)
        there = run(ddim_inversion(LINEAR, steps, prediction_type=kind), model, x, np.zeros((steps, 1)))[-1]
        with np.errstate(invalid="ignore"):
            stock, _ = diffusers_states(x, LINEAR, "linear", model, steps, prediction_type=kind, clip_sample=False)
        noises.append(there)
        ends = [run(back, model, noise, np.zeros((steps, 1)))[-1] for noise in (there, stock[-1])]
        errors.append([np.sqrt(np.mean((end - x) ** 2)) for end in ends])
    np.testing.assert_allclose(noises[1], noises[0], rtol=0, atol=1e-9)
    np.testing.assert_allclose(noises[2], noises[0], rtol=0, atol=1e-9)
    (eps, eps_stock), (v, v_stock), (x0, x0_stock) = errors
    assert eps_stock == pytest.approx(eps, rel=1e-6)
    assert (v, x0) == (pytest.approx(eps, rel=1e-6), pytest.approx(eps, rel=1e-6))
    assert v_stock > 1.3 * v
    assert math.isnan(x0_stock)  # its first step divides by 1 - alpha = 0


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_finds_the_start_again_the_better_the_more_steps(spacing):
    x, model, errors = scalars(100), mixture_model(LINEAR), []
    for steps in (20, 50, 200, 1000):
        table, back = ddim_inversion(LINEAR, steps, spacing=spacing), solvers.ddim(LINEAR, steps, spacing=spacing)
        again = run(back, model, run(table, model, x, calm(table))[-1], calm(back))[-1]
        errors.append(np.sqrt(np.mean((again - x) ** 2)))
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < errors[0] / 10
    assert errors[-1] < 0.01


def test_pictures_of_the_data_become_standard_noise():
    """The probability flow of N(mu, s^2) data is known: x_T = sqrt(alpha_bar) mu + (x - mu) / s sqrt(...)."""
    mu, s = 0.4, 0.5

    def model(x, t):
        a, g = LINEAR.sqrt_alphas_cumprod[int(t)], LINEAR.sqrt_one_minus_alphas_cumprod[int(t)]
        return g * (x - a * mu) / ((a * s) ** 2 + g**2)

    x, errors = pictures((50,)), []
    for steps in (100, 200, 1000):
        table = ddim_inversion(LINEAR, steps, spacing="trailing")
        a, g = table["k_x"][-1], table["k_z"][-1]
        exact = a * mu + (x - mu) / s * math.sqrt((a * s) ** 2 + g**2)
        errors.append(np.abs(run(table, model, x, calm(table))[-1] - exact).max())
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.2)  # a method of first order
    assert errors[0] / errors[2] == pytest.approx(10.0, rel=0.3)


@pytest.mark.parametrize("start", [0, 1, 9, 19])
def test_it_ends_where_ddim_of_the_same_start_begins(start):
    there, back = ddim_inversion(LINEAR, 20, start=start), solvers.ddim(LINEAR, 20, start=start)
    assert there.start == (1.0, 0.0)
    assert (there["k_x"][-1], there["k_z"][-1]) == pytest.approx(back.start, rel=1e-14)
    assert there.timesteps.tolist() == back.timesteps.tolist()[::-1]
    whole = ddim_inversion(LINEAR, 20)
    np.testing.assert_array_equal(there.rows, whole.rows[: 20 - start])


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_row_finds_the_data_and_the_last_pure_noise(kind):
    table = ddim_inversion(LINEAR, 10, prediction_type=kind)
    assert (table["x0_x"][0], table["x0_m"][0]) == (1.0, 0.0)
    assert not table.stochastic
    assert table.history == 0
    if kind != "epsilon":
        endless = LINEAR.rescale_zero_terminal_snr()
        table = ddim_inversion(endless, 10, spacing="trailing", prediction_type=kind)
        assert (table["k_x"][-1], table["k_z"][-1]) == (0.0, 1.0)
        assert np.isfinite(run(table, mixture_model(endless, kind), pictures((5,)), calm(table))).all()


def test_the_sampler_goes_there_and_back():
    x, perfect = pictures((3, 7)), mixture_model(LINEAR)

    def model(x, t):
        return torch.from_numpy(perfect(x.numpy(), t[0].item()))

    options = {"steps": 40, "spacing": "trailing"}
    there, back = ddim_inversion(LINEAR, **options), solvers.ddim(LINEAR, **options)
    state = torch.from_numpy(x)
    for table in (there, back):
        sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64)
        state = sampler.sample(x.shape, seeds=0, x_T=state)
    expected = run(back, perfect, run(there, perfect, x, calm(there))[-1], calm(back))[-1]
    np.testing.assert_allclose(state.numpy(), expected, rtol=0, atol=1e-12)


BAD = {
    "steps": ({"steps": 1001}, "steps is 1001"),
    "spacing": ({"spacing": "even"}, "spacing is 'even'; allowed"),
    "prediction_type": ({"prediction_type": "score"}, "prediction_type is 'score'; allowed: 'epsilon'"),
    "clip": ({"clip": -1.0}, r"clip is -1\.0"),
    "ratio": ({"dynamic_thresholding_ratio": 0.9}, "clip is None; with dynamic thresholding"),
    "start": ({"start": 20}, r"start is 20; allowed: an integer in 0 \.\.\. 19"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_option_is_refused_in_one_line(name):
    options, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        ddim_inversion(LINEAR, **{"steps": 20, **options})
    assert "\n" not in str(caught.value)

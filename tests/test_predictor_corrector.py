"""Predictor-corrector samplers: diffusers' predictors, the paper's loops, and Gaussians in closed form."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler
from fastddpm_kernels import reference
from fastddpm_kernels.columns import COLUMNS
from fastddpm_kernels.constants import STREAM_STEP
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.conversions import convert
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.predictor_corrector import predictor_corrector

LINEAR = NoiseSchedule.linear()
VE = EDMSchedule(sigma_min=0.01, sigma_max=50.0)


def draws(shape, seed=1):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape)


# ---- diffusers -------------------------------------------------------------------------------------------------------


def patched(monkeypatch, module, noise):
    feed = iter(noise)
    monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: torch.from_numpy(next(feed)))


@pytest.mark.parametrize("stock", [True, False], ids=["float32 coefficients", "float64 coefficients"])
@pytest.mark.parametrize("steps", [2, 40, 1000])
def test_the_ve_predictor_walks_as_diffusers_does(steps, stock, monkeypatch):
    x, noise = 50 * draws((2, 3, 4)), draws((steps, 2, 3, 4), 2)
    theirs = ScoreSdeVeScheduler(num_train_timesteps=steps, sigma_min=0.01, sigma_max=50.0)
    theirs.set_timesteps(steps)
    theirs.set_sigmas(steps)
    table = predictor_corrector(VE, steps, corrector_steps=0, spacing="log_snr", prediction_type="score")
    if not stock:
        theirs.discrete_sigmas = torch.from_numpy(table.timesteps[::-1].copy())
    patched(monkeypatch, "scheduling_sde_ve", noise)
    expected, start = [], x
    for t, sigma in zip(theirs.timesteps, table.timesteps, strict=True):
        score = torch.from_numpy(awkward_model(x, sigma) / sigma)
        out = theirs.step_pred(score, t, torch.from_numpy(x))
        x = out.prev_sample.numpy()
        expected.append(x)
    expected[-1] = out.prev_sample_mean.numpy()  # what its pipeline returns
    states = run(table, lambda x, sigma: awkward_model(x, sigma) / sigma, start, noise)
    tolerance = (1e-4 if stock else 1e-9) * np.abs(expected).max()
    np.testing.assert_allclose(states, expected, rtol=0, atol=tolerance)


def test_the_vp_predictor_is_diffusers_euler_step_as_the_steps_get_finer(monkeypatch):
    """diffusers' VP predictor is Euler-Maruyama's step of the SDE, which the paper's agrees with to first order in the
    step: the difference at t = 0.2 halves as the steps double."""
    differences = []
    for n in (500, 1000, 2000):
        schedule = NoiseSchedule.linear(n, 0.1 / n, 20 / n)
        x, noise = draws((400,)), draws((n, 400), 2)
        table = predictor_corrector(schedule, corrector_steps=0)
        states = run(table, lambda x, t, n=n: np.tanh(x + t / n), x, noise)[n - n // 5 - 1]
        theirs = ScoreSdeVpScheduler(num_train_timesteps=n)
        theirs.set_timesteps(n)
        patched(monkeypatch, "deprecated.scheduling_sde_vp", noise)
        for i in range(n // 5, n)[::-1]:
            t = torch.tensor((i + 1) / n, dtype=torch.float64)
            eps = torch.from_numpy(np.tanh(x + i / n))
            x = theirs.step_pred(eps, torch.from_numpy(x), t)[0].numpy()
        differences.append(np.sqrt(np.mean((states - x) ** 2) / np.mean(x**2)))
    assert differences[2] < 0.02
    assert differences[1] / differences[0] == pytest.approx(0.5, abs=0.1)
    assert differences[2] / differences[1] == pytest.approx(0.5, abs=0.1)


def test_the_correctors_step_is_the_papers_where_the_score_is_that_of_noise(monkeypatch):
    """diffusers' corrector takes its step from norms: for one picture's own noise they are |z| and |z| / sigma."""
    sigma, x0, z = 0.3, draws((3, 3, 64, 64)), draws((3, 3, 64, 64), 2)
    x, noise = x0 + sigma * z, draws((1, 3, 3, 64, 64), 3)
    theirs = ScoreSdeVeScheduler(snr=0.16)
    theirs.set_timesteps(10)
    patched(monkeypatch, "scheduling_sde_ve", noise)
    expected = theirs.step_correct(torch.from_numpy(-z / sigma), torch.from_numpy(x)).prev_sample.numpy()
    table = predictor_corrector(EDMSchedule(sigma, 1.0), 2, spacing="log_snr", prediction_type="score")
    assert table.timesteps.tolist() == pytest.approx([1.0, sigma, sigma])
    row = table.rows[1:2].copy()
    row[0, COLUMNS.index("step")] = 0
    ours = run(solvers.StepTable(row), lambda x, t: -z / sigma, x, noise)[0]
    moved = np.abs(expected - x).max()
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.02 * moved)


# ---- the paper's loops -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrections", [0, 1, 3])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_the_ve_sampler_is_algorithm_2(predictor, corrections):
    sigmas = np.geomspace(50.0, 0.01, 12)
    x, noise = 50 * draws((2, 4)), draws((12 + 11 * corrections, 2, 4), 2)
    table = predictor_corrector(
        VE, 12, predictor=predictor, corrector_steps=corrections, snr=0.2, spacing="log_snr", prediction_type="score"
    )

    def score(x, sigma):
        return awkward_model(x, sigma) / sigma**2

    states = run(table, score, x, noise)
    feed = iter(noise)
    for sigma, then in itertools.pairwise(sigmas):
        spread = math.sqrt(sigma**2 - then**2) * (then / sigma if predictor == "ancestral" else 1.0)  # eq. 47
        x = x + (sigma**2 - then**2) * score(x, sigma) + spread * next(feed)
        for _ in range(corrections):
            e = 2 * (0.2 * then) ** 2
            x = x + e * score(x, then) + math.sqrt(2 * e) * next(feed)
    np.testing.assert_allclose(states[-2], x, rtol=1e-9)
    np.testing.assert_allclose(states[-1], x + 0.01**2 * score(x, 0.01), rtol=1e-9)
    np.testing.assert_allclose(table["k_z"], [*np.repeat(sigmas[1:], corrections + 1), 0.0], rtol=1e-12)
    assert (table["k_x"] == 1.0).all()
    assert (table.start, table.init_noise_sigma) == ((1.0, pytest.approx(50.0)), pytest.approx(50.0))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "score"])
@pytest.mark.parametrize("corrections", [0, 2])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_the_vp_sampler_is_algorithm_3(predictor, corrections, kind):
    """All 50 steps of a schedule, so that beta_i is the schedule's own."""
    schedule = NoiseSchedule.linear(50, 1e-3, 0.2)
    x, noise = draws((2, 4)), draws((50 + 49 * corrections, 2, 4), 2)
    table = predictor_corrector(
        schedule, predictor=predictor, corrector_steps=corrections, snr=0.2, prediction_type=kind
    )
    states = run(table, awkward_model, x, noise)
    feed = iter(noise)

    def score(x, t):
        a, s = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
        return convert(awkward_model(x, t), x, a, s, given=kind, wanted="score")

    for t in range(1, 50)[::-1]:
        beta = schedule.betas[t]
        if predictor == "ancestral":
            x = (x + beta * score(x, t)) / math.sqrt(1 - beta)  # eq. 4
        else:
            x = (2 - math.sqrt(1 - beta)) * x + beta * score(x, t)
        x = x + math.sqrt(beta) * next(feed)
        for _ in range(corrections):
            e = 2 * 0.2**2 * schedule.sqrt_one_minus_alphas_cumprod[t - 1] ** 2
            x = x + e * score(x, t - 1) + math.sqrt(2 * e) * next(feed)
    np.testing.assert_allclose(states[-2], x, rtol=1e-8)
    t = int(table.timesteps[-1])
    a, s = schedule.sqrt_alphas_cumprod[t], schedule.sqrt_one_minus_alphas_cumprod[t]
    x0 = convert(awkward_model(x, t), x, a, s, given=kind, wanted="sample")
    np.testing.assert_allclose(states[-1], x0, rtol=1e-8)
    assert table["x_z"][-1] == 0


@pytest.mark.parametrize("options", [{}, {"clip": 0.5}, {"spacing": "trailing"}])
def test_the_ancestral_vp_predictor_is_ddpm_with_the_large_variance(options):
    ours = predictor_corrector(LINEAR, 40, predictor="ancestral", corrector_steps=0, **options)
    ddpm = solvers.ddpm(LINEAR, 40, variance="fixed_large", **options)
    np.testing.assert_allclose(ours.rows, ddpm.rows, rtol=1e-9, atol=1e-12)
    assert ours.start == pytest.approx(ddpm.start, rel=1e-12)


def test_the_corrector_is_the_same_in_both_states():
    """x of "ve" is x of "vp" over alpha, and so is what a corrector makes of it."""
    vp, ve = (predictor_corrector(LINEAR, 5, spacing="trailing", state=state) for state in ("vp", "ve"))
    rows = np.arange(1, vp.num_rows, 2)
    np.testing.assert_allclose(vp["x_x"][rows], ve["x_x"][rows], rtol=1e-12)
    np.testing.assert_allclose(vp["x_x0"][rows] / vp["k_x"][rows], ve["x_x0"][rows], rtol=1e-12)
    np.testing.assert_allclose(vp["x_z"][rows] / vp["k_x"][rows], ve["x_z"][rows], rtol=1e-12)


# ---- known data ------------------------------------------------------------------------------------------------------


def moments(table, model, mean, variance):
    """Mean and variance of the state after the last row, for a model that is affine in x."""
    for row in table.rows:
        c = dict(zip(COLUMNS, row, strict=True))

        def after(x, c=c):
            return c["x_x"] * x + c["x_x0"] * (c["x0_x"] * x + c["x0_m"] * model(c["c_in"] * x, c["t"]))

        gain = after(1.0) - after(0.0)
        mean, variance = after(0.0) + gain * mean, gain**2 * variance + c["x_z"] ** 2
    return mean, variance


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
@pytest.mark.parametrize("state", ["vp", "ve"])
def test_a_gaussian_is_sampled_and_correctors_help(state, predictor):
    mu, s = 0.4, 0.5

    def model(x, t):
        a, g = LINEAR.sqrt_alphas_cumprod[int(t)], LINEAR.sqrt_one_minus_alphas_cumprod[int(t)]
        return g * (x - a * mu) / ((a * s) ** 2 + g**2)

    errors = []
    for corrections in (0, 1, 4):
        table = predictor_corrector(
            LINEAR, 100, predictor=predictor, state=state, corrector_steps=corrections, spacing="trailing"
        )
        mean, variance = moments(table, model, 0.0, table.init_noise_sigma**2)
        assert mean == pytest.approx(mu, abs=0.003)
        errors.append(abs(math.sqrt(variance) - s))
    assert (np.diff(errors) < 0).all()
    assert errors[0] < 0.04


# ---- rows and options ------------------------------------------------------------------------------------------------


def test_rows_are_predictions_between_corrections():
    table = predictor_corrector(LINEAR, 4, corrector_steps=2)
    assert table.timesteps.tolist() == [750, 500, 500, 500, 250, 250, 250, 0, 0, 0]
    levels = [LINEAR.alphas_cumprod[t] for t in (500, 500, 500, 250, 250, 250, 0, 0, 0)]
    np.testing.assert_allclose(table["k_x"] ** 2, [*levels, 1.0], rtol=1e-12)
    np.testing.assert_allclose(table["k_z"] ** 2, [*(1 - np.array(levels)), 0.0], rtol=1e-9)
    rest = predictor_corrector(LINEAR, 4, corrector_steps=2, start=2)
    assert rest.timesteps.tolist() == [250, 0, 0, 0]
    np.testing.assert_array_equal(rest["x_z"], table["x_z"][6:])
    assert rest.start == pytest.approx((math.sqrt(levels[3]), math.sqrt(1 - levels[3])))
    assert predictor_corrector(LINEAR, 1).num_rows == 1


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral"])
def test_a_terminal_snr_of_zero_can_be_sampled(predictor):
    endless = LINEAR.rescale_zero_terminal_snr()
    options = {"spacing": "trailing", "prediction_type": "v_prediction", "predictor": predictor}
    table = predictor_corrector(endless, 20, **options)
    assert np.isfinite(run(table, awkward_model, draws((2, 3)), draws((39, 2, 3)))).all()
    with pytest.raises(ConfigError, match="the noise at a terminal SNR of zero is infinite"):
        predictor_corrector(endless, 20, state="ve", **options)


def test_time_inputs_are_whole_unless_told_otherwise():
    whole, exact = (predictor_corrector(LINEAR, 10, spacing="log_snr", quantize=q).timesteps for q in (True, False))
    assert (exact != whole).any()
    np.testing.assert_array_equal(exact.round(), whole)


BAD = {
    "predictor": ({"predictor": "euler"}, "predictor is 'euler'; allowed: 'reverse_diffusion', 'ancestral'"),
    "corrector_steps": ({"corrector_steps": -1}, r"corrector_steps is -1; allowed: an integer in 0 \.\.\. 50000"),
    "corrector_steps a float": ({"corrector_steps": 1.0}, r"corrector_steps is 1\.0"),
    "snr 0": ({"snr": 0}, "snr is 0; allowed: a number above 0 and below 1"),
    "snr 1": ({"snr": 1.0}, r"snr is 1\.0"),
    "snr a word": ({"snr": "0.1"}, "snr is '0.1'"),
    "state": ({"state": "sub-vp"}, "state is 'sub-vp'; allowed: 'vp', 've'"),
    "steps": ({"steps": 1001}, "steps is 1001"),
    "start": ({"start": 20}, r"start is 20; allowed: an integer in 0 \.\.\. 19"),
    "prediction_type": ({"prediction_type": "edm"}, "prediction_type is 'edm'; allowed: 'epsilon'"),
    "clip": ({"clip": -1.0}, r"clip is -1\.0"),
    "spacing": ({"spacing": "even"}, "spacing is 'even'; allowed"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_option_is_refused_in_one_line(name):
    options, message = BAD[name]
    with pytest.raises(ConfigError, match=message) as caught:
        predictor_corrector(LINEAR, **{"steps": 20, **options})
    assert "\n" not in str(caught.value)


def test_the_sampler_does_what_the_rows_say():
    table = predictor_corrector(LINEAR, 10, spacing="trailing", state="ve", clip=1.0)
    x, seeds = 100 * draws((2, 5)), torch.tensor([5, 6])

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.double().numpy()[:, None]))

    rows = range(table.num_rows)
    noise = [reference.normal(seeds, (5,), step=i, stream=STREAM_STEP, dtype=torch.float64).numpy() for i in rows]
    sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64)
    out = sampler.sample(x.shape, seeds=seeds.tolist(), x_T=torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(out, run(table, awkward_model, x, noise)[-1], rtol=0, atol=1e-12)

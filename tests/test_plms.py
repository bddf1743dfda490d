"""PLMS: against diffusers' PNDM, a walk with all noises kept, and a perfect model."""

import time

import numpy as np
import pytest
import torch
from diffusers import PNDMScheduler
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.levels import Levels

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
LINEAR = SCHEDULES["linear"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing", "karras", "log_snr")
X = np.random.default_rng(4).standard_normal((2, 3, 4, 4))


def silent(table):
    """Noise for a solver that adds none: were it to add any, it would be seen."""
    return [1e9] * table.num_rows


def assert_close(states, expected, atol=1e-10):
    for state, same in zip(states, expected, strict=True):
        np.testing.assert_allclose(state, same, rtol=0, atol=atol * np.abs(same).max())


# ---- diffusers -------------------------------------------------------------------------------------------------------


class Stride(int):
    """In place of diffusers' number of steps: 1000 // Stride(n) is n."""

    def __rfloordiv__(self, _):
        return int(self)


def stock(name, spacing, steps, **options):
    options |= dict(beta_schedule=name, timestep_spacing=spacing, skip_prk_steps=True, set_alpha_to_one=True)
    theirs = PNDMScheduler(**options)
    theirs.alphas_cumprod = torch.from_numpy(SCHEDULES[name].alphas_cumprod.copy())
    theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    theirs.set_timesteps(steps)
    return theirs


def walk(theirs, model, told=True):
    """Its states; `told`: it is told how far away the next time step is, which it doesn't look up in its own list."""
    visited = sorted(set(theirs.timesteps.tolist()), reverse=True)
    x, states = torch.from_numpy(X), []
    for i, t in enumerate(theirs.timesteps.tolist()):
        step = max(0, i - 1)  # the second row takes the first step again
        if told:
            theirs.num_inference_steps = Stride(visited[step] - [*visited, -1][step + 1])
        x = theirs.step(torch.from_numpy(model(x.numpy(), t)), t, x).prev_sample
        states.append(x.numpy())
    assert x.dtype == torch.float64
    return np.array(states)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_walks_as_diffusers_does(schedule, spacing, steps):
    theirs = stock(schedule, spacing, steps)
    table = solvers.plms(SCHEDULES[schedule], steps, spacing=spacing)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    assert table.num_rows == steps + (steps > 1)
    assert (table.history_of, table.stochastic) == ("epsilon", False)
    assert_close(run(table, awkward_model, X, silent(table)), walk(theirs, awkward_model))


def test_stock_diffusers_goes_on_from_elsewhere_with_uneven_time_steps():
    """It takes t - T // steps for the next time step; with "linspace" that is not the next in its own list."""
    for spacing, right in (("leading", True), ("linspace", False)):
        table = solvers.plms(LINEAR, 20, spacing=spacing)
        off = run(table, awkward_model, X, silent(table)) - walk(
            stock("linear", spacing, 20), awkward_model, told=False
        )
        assert (np.abs(off).max() < 1e-9) == right


def as_predicted(schedule, prediction):
    """The same model, speaking of v or x_0 instead of the noise."""

    def model(x, t):
        alpha, sigma = schedule.sqrt_alphas_cumprod[int(t)], schedule.sqrt_one_minus_alphas_cumprod[int(t)]
        eps = awkward_model(x, t)
        x0 = (x - sigma * eps) / alpha
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[prediction]

    return model


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_the_noise_is_what_is_extrapolated_whatever_the_model_says(steps, prediction):
    expected = walk(stock("linear", "leading", steps), awkward_model)
    table = solvers.plms(LINEAR, steps, prediction_type=prediction)
    assert_close(run(table, as_predicted(LINEAR, prediction), X, silent(table)), expected)


def test_stock_diffusers_extrapolates_v_itself():
    """It adds up v of several time steps and makes noise of that at the latest (huggingface/diffusers issue 14816).

    With a perfect model of N(0, 1/4) the way to x_0 is known: x_T / 2 where x_T is all noise. From noise predictions
    stock diffusers gets there, from the same model's v not; ours does from both.
    """
    variance = 0.25

    def model(kind):
        def perfect(x, t):
            alpha, sigma = LINEAR.sqrt_alphas_cumprod[int(t)], LINEAR.sqrt_one_minus_alphas_cumprod[int(t)]
            eps = sigma * x / (alpha**2 * variance + sigma**2)
            x0 = alpha * variance * x / (alpha**2 * variance + sigma**2)
            return eps if kind == "epsilon" else alpha * eps - sigma * x0

        return perfect

    alpha, sigma = LINEAR.sqrt_alphas_cumprod[980], LINEAR.sqrt_one_minus_alphas_cumprod[980]
    exact = X * np.sqrt(variance / (alpha**2 * variance + sigma**2))
    error = {}
    for kind in ("epsilon", "v_prediction"):
        table = solvers.plms(LINEAR, 50, prediction_type=kind)
        ours = run(table, model(kind), X, silent(table))[-1]
        theirs = walk(stock("linear", "leading", 50, prediction_type=kind), model(kind))[-1]
        error[kind] = [np.abs(end - exact).max() / np.abs(exact).max() for end in (ours, theirs)]
    assert error["epsilon"][0] == pytest.approx(error["epsilon"][1], rel=1e-6)
    assert error["v_prediction"][0] == pytest.approx(error["epsilon"][0], rel=1e-6)
    assert error["v_prediction"][1] > 10 * error["epsilon"][1]


# ---- the paper's formulas, with every noise kept ---------------------------------------------------------------------


def plain(levels, model, x):
    """PLMS on x / alpha, in which a step adds (rho' - rho) eps: eq. 11 and 12, all noises kept in a list."""
    rho = levels.sigma / levels.alpha

    def noise(x, i):
        m = model(levels.c_in[i] * x * levels.alpha[i], levels.t[i])
        return levels.eps_x[i] * x * levels.alpha[i] + levels.eps_m[i] * m

    x, states, es = x / levels.alpha[0], [], []
    for i, step in enumerate(np.diff(rho)):
        es.append(noise(x, i))
        if i == 0:
            once = x + step * es[0]
            states.append(once * levels.alpha[1])
            if len(rho) == 2:
                break
            mean = (es[0] + noise(once, 1)) / 2
        elif i == 1:
            mean = (3 * es[-1] - es[-2]) / 2
        elif i == 2:
            mean = (23 * es[-1] - 16 * es[-2] + 5 * es[-3]) / 12
        else:
            mean = (55 * es[-1] - 59 * es[-2] + 37 * es[-3] - 9 * es[-4]) / 24
        x = x + step * mean
        states.append(x * levels.alpha[i + 1])
    return np.array(states)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("state", ["vp", "ve"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_is_the_papers_formula_with_all_noises_kept(spacing, state, prediction):
    for steps, start in ((1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (30, 0), (30, 3), (30, 25), (30, 26), (30, 29)):
        options = dict(spacing=spacing, state=state, prediction_type=prediction, start=start)
        levels, table = Levels.of(LINEAR, steps, **options), solvers.plms(LINEAR, steps, **options)
        x = X * table.init_noise_sigma
        assert_close(run(table, awkward_model, x, silent(table)), plain(levels, awkward_model, x))
        at = [0, 1, 1, *range(2, steps - start)][: table.num_rows]
        np.testing.assert_array_equal(table.timesteps, levels.t[at])
        to = [1, 1, *range(2, steps - start + 1)]
        np.testing.assert_array_equal(table["k_x"], levels.alpha[to[-table.num_rows :]])
        np.testing.assert_array_equal(table["k_z"], levels.sigma[to[-table.num_rows :]])


def test_ends_at_the_schedules_least_noise():
    options = dict(spacing="trailing", final_sigma="sigma_min", prediction_type="epsilon")
    table = solvers.plms(LINEAR, 10, **options)
    assert_close(run(table, awkward_model, X, silent(table)), plain(Levels.of(LINEAR, 10, **options), awkward_model, X))
    assert table["k_z"][-1] == pytest.approx(LINEAR.sqrt_one_minus_alphas_cumprod[0], rel=1e-12)


@pytest.mark.parametrize("prediction", ["edm", "sample"])
def test_an_edm_schedule(prediction):
    edm, options = EDMSchedule(), dict(spacing="karras", prediction_type=prediction)
    table = solvers.plms(edm, **options)
    assert (table.num_rows, table.init_noise_sigma) == (19, pytest.approx(80.0))
    expected = plain(Levels.of(edm, None, **options), awkward_model, 80 * X)
    assert_close(run(table, awkward_model, 80 * X, silent(table)), expected)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [4, 10, 1000])
def test_to_solve_for_the_first_noise_loses_no_digits(steps, spacing):
    """Row 4 finds it as a difference of states divided by steps; with float32 states that must not cost precision.

    The state's coefficient, beyond what it would be, is what the state's rounding errors are multiplied with.
    """
    for schedule in SCHEDULES.values():
        table = solvers.plms(schedule, steps, spacing=spacing)
        levels = Levels.of(schedule, steps, spacing=spacing, prediction_type="epsilon")
        assert abs(table["x_x"][4] / (levels.alpha[4] / levels.alpha[3]) - 1) < 2


def test_through_the_sampler():
    table = solvers.make("plms", LINEAR, 10)
    assert table.history == 3

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.numpy()[0]))

    made = Sampler(model, table, state_dtype=torch.float64).sample(X.shape, seeds=0, x_T=torch.from_numpy(X))
    assert_close([made.numpy()], run(table, awkward_model, X, silent(table))[-1:], atol=1e-13)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(order=2), "solver plms has no option 'order'"),
        (dict(clip=1.0), "solver plms has no option 'clip'"),
        (dict(spacing="even"), "spacing is 'even'"),
        (dict(start=10), "start is 10; allowed: an integer in 0 ... 9"),
        (dict(final_sigma="sigma_min"), "the last level itself"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        solvers.make("plms", LINEAR, 10, **options)


def test_a_terminal_snr_of_zero_is_refused():
    zero = NoiseSchedule.from_betas([*LINEAR.betas[:-1], 1.0])
    with pytest.raises(ConfigError, match="looks back at predicted noise"):
        solvers.plms(zero, 10, prediction_type="v_prediction", spacing="trailing")


def test_the_table_is_built_in_10_ms():
    def seconds():
        begin = time.process_time()
        solvers.plms(LINEAR)
        return time.process_time() - begin

    assert min(seconds() for _ in range(5)) < 0.01

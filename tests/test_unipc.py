"""UniPC: against diffusers, its definition with B(h) put in, order conditions, and the order of convergence."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.exponential import adams
from fastddpm.solvers.levels import Levels

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
LINEAR = SCHEDULES["linear"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BY_LEVEL = {"karras": "use_karras_sigmas", "log_snr": "use_exponential_sigmas"}  # diffusers' flag of each
SPACINGS = ("leading", "linspace", "trailing", *BY_LEVEL)
METHODS = [(bh, x0) for bh in ("bh1", "bh2") for x0 in (True, False)]
X = np.random.default_rng(4).standard_normal((2, 3, 4, 4))

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers'


def silent(rows):
    """Noise for a solver that adds none: were it to add any, it would be seen."""
    return [1e9] * rows


def assert_close(states, expected, atol=1e-10):
    for state, same in zip(states, expected, strict=True):
        np.testing.assert_allclose(state, same, rtol=0, atol=atol * np.abs(same).max())


# ---- diffusers -------------------------------------------------------------------------------------------------------


def stock_states(schedule, table, order, spacing, start=0, **options):
    """The states of diffusers' scheduler at our float64 noise levels, once they are seen to be its own."""
    options |= {BY_LEVEL[spacing]: True} if spacing in BY_LEVEL else {"timestep_spacing": spacing}
    theirs = UniPCMultistepScheduler(beta_schedule=schedule, solver_order=order, **options)
    theirs.set_timesteps(start + table.num_rows)
    theirs.set_begin_index(start)  # else, where two levels round to one time step, it begins at the second
    levels = np.append(table.start[1] / table.start[0], table["k_z"] / table["k_x"])
    np.testing.assert_allclose(theirs.sigmas[start:-1], levels[:-1], rtol=1e-3)  # their 1 - alpha_bar is float32
    cut = spacing == "log_snr"  # there diffusers' cast to integers cuts the times off; ours are rounded
    assert np.abs(theirs.timesteps[start:].numpy() - table["t"]).max() <= cut
    theirs.sigmas = torch.from_numpy(np.append(np.full(start, np.nan), levels))
    x, states = torch.from_numpy(X), []
    for t, now in zip(theirs.timesteps[start:], table["t"], strict=True):
        x = theirs.step(torch.from_numpy(awkward_model(x.numpy(), now)), t, x).prev_sample
        states.append(x.numpy())
    assert x.dtype == torch.float64
    return np.array(states)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_walks_as_diffusers_does(schedule, spacing, order):
    cases = [(1, "epsilon"), (2, "epsilon"), (3, "sample"), (5, "epsilon"), *((20, p) for p in PREDICTIONS)]
    for steps, prediction in cases:
        table = solvers.unipc(SCHEDULES[schedule], steps, order=order, prediction_type=prediction, spacing=spacing)
        assert (table.history_of, table.stochastic) == ("sample", False)
        expected = stock_states(schedule, table, order, spacing, prediction_type=prediction)
        assert_close(run(table, awkward_model, X, silent(steps)), expected)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type, predict_x0", METHODS)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_all_methods_walk_as_diffusers_does(spacing, solver_type, predict_x0, order):
    options = dict(solver_type=solver_type, predict_x0=predict_x0)
    for prediction, lower in itertools.product(PREDICTIONS, (True, False)):
        options |= dict(prediction_type=prediction, lower_order_final=lower)
        table = solvers.unipc(LINEAR, 12, order=order, final_sigma="sigma_min", spacing=spacing, **options)
        assert table.history_of == ("sample" if predict_x0 else "epsilon")
        expected = stock_states("linear", table, order, spacing, final_sigmas_type="sigma_min", **options)
        assert_close(run(table, awkward_model, X, silent(12)), expected)


@pytest.mark.parametrize("solver_type, predict_x0", [m for m in METHODS if m != ("bh2", True)])
def test_stock_diffusers_ends_in_nan_at_zero_noise(solver_type, predict_x0):
    """There h is infinite, and it has 0 times infinity: of B(h) = h ("bh1"), or of sigma and e^h (noise)."""
    options = dict(solver_type=solver_type, predict_x0=predict_x0)
    table = solvers.unipc(LINEAR, 12, **options)
    expected, states = stock_states("linear", table, 2, "linspace", **options), run(table, awkward_model, X, silent(12))
    assert np.isnan(expected[-1]).all()
    assert_close(states[:-1], expected[:-1])
    assert np.isfinite(states).all()


def test_stock_diffusers_ends_in_infinity_at_zero_noise_and_full_order():
    """No polynomial leads to an infinite lambda: our last step has order 1, whatever `lower_order_final` says."""
    table = solvers.unipc(LINEAR, 12, lower_order_final=False)
    expected = stock_states("linear", table, 2, "linspace", lower_order_final=False)
    assert np.isinf(expected[-1]).all()
    states = run(table, awkward_model, X, silent(12))
    assert_close(states[:-1], expected[:-1])
    # ... and leaves what the state before it, corrected, is predicted to be
    lowered = run(solvers.unipc(LINEAR, 12), awkward_model, X, silent(12))
    assert_close(states[-1:], lowered[-1:], atol=1e-12)


@pytest.mark.parametrize("off", [[0], [1, 5], [2, 3, 4], range(12)])
def test_steps_without_a_corrector_are_those_of_diffusers(off):
    for order, predict_x0 in itertools.product((1, 2, 3), (True, False)):
        options = dict(predict_x0=predict_x0, disable_corrector=off)
        table = solvers.unipc(LINEAR, 12, order=order, final_sigma="sigma_min", **options)
        expected = stock_states("linear", table, order, "linspace", final_sigmas_type="sigma_min", **options)
        assert_close(run(table, awkward_model, X, silent(12)), expected)


def test_start_is_diffusers_begin_index():
    for order in (1, 2, 3):
        table = solvers.unipc(LINEAR, 20, order=order, start=7)
        assert table.num_rows == 13
        expected = stock_states("linear", table, order, "linspace", start=7)
        assert_close(run(table, awkward_model, X, silent(13)), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dynamic_thresholding_and_clip_are_those_of_diffusers(prediction):
    for order in (1, 2, 3):
        table = solvers.unipc(LINEAR, 12, order=order, clip=1.0, prediction_type=prediction)
        # with a ratio of anything and a greatest threshold of 1, what diffusers calls thresholding is a clip
        limits = dict(thresholding=True, sample_max_value=1.0, prediction_type=prediction)
        expected = stock_states("linear", table, order, "linspace", **limits)
        assert_close(run(table, awkward_model, X, silent(12)), expected)
    table = solvers.unipc(LINEAR, 12, clip=3.0, dynamic_thresholding_ratio=0.9)
    assert (table["ratio"] == 0.9).all()
    assert (table["clip"] == 3.0).all()


# ---- the weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implicit", [False, True])
@pytest.mark.parametrize("kind", ["sample", "epsilon"])
def test_weights_integrate_polynomials_exactly(kind, implicit):
    """integral_0^h e^-u u^k du = k! (1 - e^-h sum_{j <= k} h^j / j!) = k! e^-h sum_{j > k} h^j / j!."""
    rng = np.random.default_rng(3)
    for scale in (1e-3, 0.1, 1.0, 8.0):
        lam = np.cumsum(scale * rng.uniform(0.2, 1.0, 9)) - 3
        for order in (1, 2, 3):
            row, degree = 5, order - 1 + implicit
            weights = adams(lam, np.full(8, order) * (np.arange(8) > 2), kind, implicit=implicit)
            assert not weights[:3].any()
            h, nodes = lam[row + 1] - lam[row], lam[row + 1 - np.arange(4)]
            u = lam[row + 1] - nodes if kind == "sample" else nodes - lam[row]
            for k in range(degree + 1):
                exact = (
                    math.exp(-h) * math.factorial(k) * math.fsum(h**j / math.factorial(j) for j in range(k + 1, 100))
                )
                terms = weights[row] * u**k
                assert abs(terms.sum() - exact) <= 1e-13 * np.abs(terms).sum()


def test_weights_of_an_infinite_step():
    for lam in ([-2.0, np.inf], [-np.inf, 1.0]):
        assert adams(np.array(lam), np.array([1]), "sample").tolist() == [[0, 1, 0, 0]]


# ---- the ends --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_last_row_returns_its_x0(order, spacing):
    for (solver_type, predict_x0), steps in itertools.product(METHODS, (1, 2, 15)):
        options = dict(solver_type=solver_type, predict_x0=predict_x0, lower_order_final=False)
        table = solvers.unipc(LINEAR, steps, order=order, spacing=spacing, **options)
        assert (table["k_x"][-1], table["k_z"][-1]) == (1.0, 0.0)
        assert np.isfinite(run(table, awkward_model, X, silent(steps))).all()
        if predict_x0:
            assert (table["x_x"][-1], table["x_x0"][-1]) == (0, 1)
            assert not table.rows[-1, [solvers.table.COLUMNS.index(h) for h in ("x_h1", "x_h2", "x_h3")]].any()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_starts_at_pure_noise(solver_type, order):
    """At a terminal SNR of zero lambda is -infinity: the first two steps are DDIM's, the first uncorrected."""
    zero = NoiseSchedule.from_betas([*LINEAR.betas[:-1], 1.0])
    options = dict(order=order, solver_type=solver_type, prediction_type="v_prediction", spacing="trailing")
    table = solvers.unipc(zero, 20, **options)
    states = run(table, awkward_model, X, silent(20))
    assert np.isfinite(states).all()
    assert table["x_h1"][:2].tolist() == [0, 0]
    assert table["x_h1"][2] != 0
    ddim = solvers.ddim(zero, 20, prediction_type="v_prediction", spacing="trailing")
    assert_close(states[:2], run(ddim, awkward_model, X, silent(20))[:2], atol=1e-12)
    with pytest.raises(ConfigError, match="looks back at predicted noise"):
        solvers.unipc(zero, 20, **options, predict_x0=False)


def test_an_exploding_state_is_the_same_process():
    """x / alpha is the exploding state; its model is given the preserving one."""
    for order, (solver_type, predict_x0) in itertools.product((1, 2, 3), METHODS):
        options = dict(order=order, solver_type=solver_type, predict_x0=predict_x0)
        preserving, exploding = (solvers.unipc(LINEAR, 12, state=state, **options) for state in ("vp", "ve"))
        alpha = np.array([preserving.start[0], *preserving["k_x"]])[:, None, None, None, None]
        states = run(exploding, awkward_model, X / alpha[0], silent(12))
        assert_close(states, run(preserving, awkward_model, X, silent(12)) / alpha[1:], atol=1e-11)
        assert exploding.init_noise_sigma == pytest.approx(exploding.start[1])


def test_an_edm_schedule_is_the_same_process():
    table = solvers.unipc(EDMSchedule(), 18, order=3, spacing="karras", prediction_type="edm")
    assert table.init_noise_sigma == pytest.approx(80.0)
    levels = Levels.of(EDMSchedule(), 18, spacing="karras", prediction_type="edm")

    def as_x0(x, t):  # EDM's preconditioned model as one that predicts x_0 from the state itself
        i = int(np.argmin(np.abs(levels.sigma[:-1] - t)))
        return levels.x0_x[i] * x + levels.x0_m[i] * awkward_model(levels.c_in[i] * x, levels.t[i])

    same = solvers.unipc(EDMSchedule(), 18, order=3, spacing="karras", prediction_type="sample")
    states = run(table, awkward_model, 80 * X, silent(18))
    assert_close(states, run(same, as_x0, 80 * X, silent(18)), atol=1e-12)


# ---- the order of convergence ----------------------------------------------------------------------------------------


def error_at_the_end(steps, **options):
    """Of a perfect model of N(0, 1/4), from a known state and history on, where the last level has noise.

    The steps are even in lambda, from -1 to 1. (From scratch the first steps, of order 1, limit the order.)
    """
    edm = EDMSchedule(sigma_min=math.exp(-1), sigma_max=math.exp(1))
    options |= dict(lower_order_final=False, prediction_type="sample", spacing="log_snr")
    table = solvers.unipc(edm, steps, **options)
    sigma = np.append(table.start[1], table["k_z"])
    exact = np.sqrt(0.25 + sigma**2)
    x0 = 0.25 / exact
    x, h1, h2, h3 = exact[3], *(x0 if table.history_of == "sample" else (exact - x0) / sigma.clip(1e-9))[[2, 1, 0]]
    for row in range(3, steps - 1):
        c = {name: table[name][row] for name in solvers.table.COLUMNS}
        now = c["x0_x"] * x + c["x0_m"] * 0.25 * x / (0.25 + sigma[row] ** 2)
        x = c["x_x"] * x + c["x_x0"] * now + c["x_h1"] * h1 + c["x_h2"] * h2 + c["x_h3"] * h3
        h1, h2, h3 = now, h1, h2
    return abs(x - exact[-2])


@pytest.mark.parametrize("solver_type, predict_x0", METHODS)
@pytest.mark.parametrize(
    "order, corrected, slope", [(1, False, 1), (1, True, 2), (2, False, 2), (2, True, 3), (3, False, 3), (3, True, 4)]
)
def test_the_order_of_convergence(order, corrected, slope, solver_type, predict_x0):
    """UniP-p has order p (corollary 3.2), UniPC-p has p + 1 (theorem 3.1)."""
    errors = []
    for steps in (40, 80):
        off = () if corrected else range(steps)
        options = dict(order=order, solver_type=solver_type, predict_x0=predict_x0)
        errors.append(error_at_the_end(steps, disable_corrector=off, **options))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(slope, abs=0.3)


# ---- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3])
def test_through_the_sampler(order):
    table = solvers.make("unipc", LINEAR, 10, order=order)
    assert table.history == order

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.numpy()[0]))

    made = Sampler(model, table, state_dtype=torch.float64).sample(X.shape, seeds=0, x_T=torch.from_numpy(X))
    assert_close([made.numpy()], run(table, awkward_model, X, silent(10))[-1:], atol=1e-13)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(order=0), "order is 0; allowed: 1, 2 or 3"),
        (dict(order=4), "order is 4"),
        (dict(solver_type="bh3"), "solver_type is 'bh3'; allowed: 'bh1', 'bh2'"),
        (dict(predict_x0=1), "predict_x0 is 1; allowed: True or False"),
        (dict(lower_order_final=None), "lower_order_final is None; allowed: True or False"),
        (dict(disable_corrector=3), r"disable_corrector is 3; allowed: a list of steps, such as \[0\]"),
        (dict(disable_corrector=[10]), "disable_corrector has 10; allowed: a list of integers in 0 ... 9"),
        (dict(disable_corrector=[-1]), "disable_corrector has -1"),
        (dict(disable_corrector=[True]), "disable_corrector has True"),
        (dict(disable_corrector=["0"]), "disable_corrector has '0'"),
        (dict(predict_x0=False, clip=1.0), "noise, which can't be clipped; use clip=None"),
        (dict(dynamic_thresholding_ratio=0.9), "clip is None; with dynamic thresholding it bounds"),
        (dict(spacing="karras", final_sigma="sigma_min"), "the last level itself"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        solvers.make("unipc", LINEAR, 10, **options)


def test_the_table_is_built_in_10_ms():
    def seconds():
        begin = time.process_time()
        solvers.unipc(LINEAR, order=3)
        return time.process_time() - begin

    assert min(seconds() for _ in range(5)) < 0.01

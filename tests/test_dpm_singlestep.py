"""DPM-Solver, singlestep: against diffusers, a group's step written out, and a perfect model."""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import torch
from diffusers import DPMSolverSinglestepScheduler
from diffusers.schedulers import scheduling_dpmsolver_singlestep
from scipy.integrate import quad
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.analytic import GaussianMixture
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers import dpm_solver, dpm_solver_singlestep
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
ALGORITHMS = ("dpmsolver++", "dpmsolver")
RNG = np.random.default_rng(5)
X, NOTHING = RNG.standard_normal((2, 3, 4, 4)), np.zeros((40, 1, 1, 1, 1))

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


# ---- diffusers -------------------------------------------------------------------------------------------------------


class InFloat64:
    """Stands for diffusers' `torch`: it computes its betas in "float32"."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(scheduling_dpmsolver_singlestep, "torch", InFloat64())


def stock(levels, schedule, *, order, algorithm, spacing, **options):
    """diffusers' scheduler at our noise levels, once they are seen to be its own."""
    if spacing in BY_LEVEL:
        options[BY_LEVEL[spacing]] = True
    config = dict(beta_schedule=schedule, solver_order=order, algorithm_type=algorithm)
    theirs = DPMSolverSinglestepScheduler(**config, **options)
    theirs.set_timesteps(len(levels.t))
    ours = np.exp(-levels.lam)
    if spacing not in ("leading", "trailing"):  # which it doesn't have, so there it is only told the levels
        np.testing.assert_allclose(theirs.sigmas[:-1], ours[:-1], rtol=1e-6)  # diffusers rounds them to float32
        # The times of "exponential" sigmas are not rounded, and then cut off in a cast.
        assert np.abs(theirs.timesteps.numpy() - levels.t).max() <= (spacing == "log_snr")
    theirs.sigmas, theirs.timesteps = torch.from_numpy(ours), torch.from_numpy(levels.t).long()
    return theirs


def walk(theirs, x, begin=0):
    theirs.set_begin_index(begin)  # else, where two levels round to one time step, it begins at the second
    x, states = torch.from_numpy(x), []
    for t in theirs.timesteps[begin:]:
        x = theirs.step(torch.from_numpy(awkward_model(x.numpy(), t.item())), t, x).prev_sample
        states.append(x.numpy())
    assert x.dtype == torch.float64
    return np.array(states)


def close(states, expected, tolerance=1e-9):
    np.testing.assert_allclose(states, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def compare(steps, schedule="linear", *, prediction="epsilon", spacing="linspace", final="zero", start=0, **options):
    """Our states against diffusers'."""
    levels_of = dict(prediction_type=prediction, spacing=spacing)
    table = dpm_solver_singlestep(
        SCHEDULES[schedule], steps, **levels_of, final_sigma=final, start=start, **{"lower_order_final": True} | options
    )
    states = run(table, awkward_model, X, NOTHING[: steps - start])
    levels = Levels.of(SCHEDULES[schedule], steps, **levels_of, final_sigma=final, skip_last=True)
    if final == "zero" and options["algorithm"] == "dpmsolver":
        final = "sigma_min"  # diffusers refuses "zero" here, where we end with a step of order 1
        options["lower_order_final"] = True
    theirs = stock(levels, schedule, **options, spacing=spacing, prediction_type=prediction, final_sigmas_type=final)
    if levels.sigma[-1] == 0:
        theirs.order_list[-1], states = 1, states if options["algorithm"] == "dpmsolver++" else states[:-1]
    close(states, walk(theirs, X, start)[: len(states)])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_walk_is_that_of_diffusers(spacing, algorithm):
    for order, solver_type, prediction in itertools.product((1, 2, 3), ("midpoint", "heun"), PREDICTIONS):
        options = dict(order=order, algorithm=algorithm, solver_type=solver_type)
        compare(7, prediction=prediction, spacing=spacing, **options)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 12])
def test_the_orders_are_those_of_diffusers(steps, order):
    for algorithm in ALGORITHMS:
        if steps > 1 or algorithm == "dpmsolver++":
            compare(steps, order=order, algorithm=algorithm)
        compare(steps, final="sigma_min", order=order, algorithm=algorithm, lower_order_final=True)
        if steps % order == 0:
            compare(steps, final="sigma_min", order=order, algorithm=algorithm, lower_order_final=False)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("start", [0, 1, 2, 3, 14])
def test_schedules_and_starts_are_those_of_diffusers(start, schedule):
    """A start within a group: the first row has order 1, the second at most 2."""
    for spacing, algorithm, order in itertools.product(("linspace", "karras"), ALGORITHMS, (2, 3)):
        options = dict(spacing=spacing, prediction="v_prediction", solver_type="heun")
        compare(16, schedule, order=order, algorithm=algorithm, start=start, **options)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dynamic_thresholding_is_that_of_diffusers_by_way_of_the_sampler(prediction):
    threshold = dict(dynamic_thresholding_ratio=0.9)
    table = dpm_solver_singlestep(LINEAR, 10, order=3, prediction_type=prediction, clip=3.0, **threshold)
    levels = Levels.of(LINEAR, 10, spacing="linspace", prediction_type=prediction, skip_last=True)
    options = dict(order=3, algorithm="dpmsolver++", spacing="linspace", prediction_type=prediction)
    theirs = stock(levels, "linear", **options, thresholding=True, sample_max_value=3.0, **threshold)
    expected = walk(theirs, X)[-1]

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), float(t[0])))

    sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64)
    close(sampler.sample(X.shape, seeds=0, x_T=torch.from_numpy(X)).numpy(), expected)


# ---- a group written out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("state", ["vp", "ve"])
def test_heun_is_the_integral_of_the_polynomial_from_the_groups_start(state, algorithm):
    """The saved state of a group's start, and integrals by quadrature of Lagrange polynomials in lambda."""
    options = dict(spacing="karras", prediction_type="v_prediction", state=state)
    table = dpm_solver_singlestep(LINEAR, 7, order=3, algorithm=algorithm, solver_type="heun", **options)
    levels = Levels.of(LINEAR, 7, **options)
    lam, alpha, sigma, of_x0 = levels.lam, levels.alpha, levels.sigma, algorithm == "dpmsolver++"
    x_m = (levels.x0_x, levels.x0_m) if of_x0 else (levels.eps_x, levels.eps_m)
    assert (table.init_noise_sigma, table.start) == (levels.init_noise_sigma, levels.start)
    begin = X * levels.init_noise_sigma
    x, states = begin, run(table, awkward_model, begin, NOTHING[:7])
    for i in range(6):
        if i % 3 == 0:
            begin, said, nodes = x, [], []
        said.append(x_m[0][i] * x + x_m[1][i] * awkward_model(levels.c_in[i] * x, levels.t[i]))
        nodes.append(lam[i])
        scale = sigma if of_x0 else alpha
        x = scale[i + 1] / scale[i - i % 3] * begin
        for k, m in enumerate(said):

            def integrand(v, k=k, nodes=tuple(nodes)):
                basis = math.prod((v - u) / (nodes[k] - u) for j, u in enumerate(nodes) if j != k)
                return basis * (math.exp(v) if of_x0 else -math.exp(-v))

            x = x + scale[i + 1] * quad(integrand, nodes[0], lam[i + 1])[0] * m
        close(states[i], x)
    assert table.history == 2


EDM = EDMSchedule(0.1, 80.0)
PERFECT = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.5]], stds=[0.4, 0.5], weights=[0.4, 0.6]).model(EDM)


@functools.cache
def at_sigma_min(steps, solver=dpm_solver_singlestep, **options):
    """The state at the least noise level, from a perfect model of two Gaussians."""

    def model(x, t):
        return PERFECT(torch.from_numpy(x), torch.full((len(x),), t, dtype=torch.float64)).numpy()

    table = solver(EDM, steps + 1, spacing="log_snr", prediction_type="sample", **options)
    return run(table, model, 80 * X.reshape(-1, 2), np.zeros((steps + 1, 1, 1)))[-2]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "order, solver_type", [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"), (3, "heun")]
)
def test_the_error_falls_with_the_order(order, solver_type, algorithm):
    exact = at_sigma_min(1000, dpm_solver, order=3, solver_type="exact")
    options = dict(order=order, solver_type=solver_type, algorithm=algorithm)
    errors = [np.sqrt(np.mean((at_sigma_min(n, **options) - exact) ** 2)) for n in (60, 120, 240)]
    assert -np.diff(np.log2(errors)) == pytest.approx(order, abs=0.2)


# ---- ends, options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_last_row_returns_its_x0(spacing, algorithm):
    table = dpm_solver_singlestep(LINEAR, 20, order=3, algorithm=algorithm, spacing=spacing)
    assert not table.stochastic
    assert (table["k_x"][-1], table["k_z"][-1]) == (1, 0)
    levels = Levels.of(LINEAR, 20, spacing=spacing, prediction_type="epsilon", skip_last=spacing in SPACINGS[:3])
    assert table.start == levels.start
    assert (table["k_x"][:-1] == levels.alpha[1:-1]).all()
    assert (table["k_z"][:-1] == levels.sigma[1:-1]).all()
    states = run(table, awkward_model, X, NOTHING[:20])
    x, t = states[-2], table["t"][-1]
    close(states[-1], levels.x0_x[-1] * x + levels.x0_m[-1] * awkward_model(x, t), 1e-12)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_two_states_are_one_process(algorithm):
    options = dict(order=3, algorithm=algorithm, prediction_type="v_prediction", spacing="karras")
    vp, ve = (dpm_solver_singlestep(LINEAR, 20, state=state, **options) for state in ("vp", "ve"))
    states = run(vp, awkward_model, X, NOTHING[:20])
    close(run(ve, awkward_model, X / vp.start[0], NOTHING[:20]), states / vp["k_x"][:, None, None, None, None])


def test_order_1_is_the_multistep_solvers():
    for algorithm in ALGORITHMS:
        one, other = (f(LINEAR, 9, order=1, algorithm=algorithm).rows for f in (dpm_solver, dpm_solver_singlestep))
        np.testing.assert_allclose(one, other, rtol=1e-14)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(order=0), "order is 0; allowed: 1, 2 or 3"),
        (
            dict(algorithm="sde-dpmsolver++"),
            "algorithm is 'sde-dpmsolver\\+\\+'; allowed: 'dpmsolver\\+\\+', 'dpmsolver'",
        ),
        (dict(solver_type="exact"), "solver_type is 'exact'; allowed: 'midpoint', 'heun'"),
        (dict(lower_order_final=0), "lower_order_final is 0; allowed: True or False"),
        (
            dict(lower_order_final=False),
            "lower_order_final is False with 10 steps of order 2; allowed where final_sigma",
        ),
        (
            dict(lower_order_final=False, final_sigma="sigma_min", order=3),
            "lower_order_final is False with 10 steps of",
        ),
        (dict(algorithm="dpmsolver", clip=1.0), "algorithm='dpmsolver' extrapolates noise, which can't be clipped"),
        (dict(dynamic_thresholding_ratio=0.9), "clip is None; with dynamic thresholding"),
        (dict(start=10), "start is 10; allowed: an integer in 0 ... 9"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        dpm_solver_singlestep(LINEAR, 10, **options)


def test_at_a_terminal_snr_of_zero_only_order_1():
    schedule, common = LINEAR.rescale_zero_terminal_snr(), dict(prediction_type="v_prediction", spacing="trailing")
    assert np.isfinite(dpm_solver_singlestep(schedule, 6, order=1, **common).rows[:, :10]).all()
    with pytest.raises(ConfigError, match="order is 2; allowed at a terminal SNR of zero: 1"):
        dpm_solver_singlestep(schedule, 6, **common)
    with pytest.raises(ConfigError, match="algorithm='dpmsolver' can't start at a terminal SNR of zero"):
        dpm_solver_singlestep(schedule, 6, order=1, algorithm="dpmsolver", **common)


def test_it_is_a_solver_by_name_and_builds_fast():
    table = solvers.make("dpm_solver_singlestep", LINEAR, 20, order=3)
    assert (table.rows == dpm_solver_singlestep(LINEAR, 20, order=3).rows).all()
    assert dpm_solver_singlestep(LINEAR, 20, algorithm="dpmsolver").history_of == "epsilon"
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        assert dpm_solver_singlestep(LINEAR, order=3, solver_type="heun").num_rows == 999
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.01

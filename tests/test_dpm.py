"""DPM-Solver, multistep: against diffusers, k-diffusion's formulas, integrals by quadrature, and a perfect model."""

import functools
import itertools
import math
import time

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers import scheduling_dpmsolver_multistep
from scipy.integrate import quad
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.analytic import GaussianMixture
from fastddpm.edm import EDMSchedule
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers import dpm_solver
from fastddpm.solvers.levels import Levels

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
LINEAR = SCHEDULES["linear"]
PREDICTIONS = ("epsilon", "v_prediction", "sample")
BY_LEVEL = {"karras": "use_karras_sigmas", "log_snr": "use_lu_lambdas"}  # diffusers' flag of each
SPACINGS = ("leading", "linspace", "trailing", *BY_LEVEL)
ALGORITHMS = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver")
RNG = np.random.default_rng(4)
X, NOISE = RNG.standard_normal((2, 3, 4, 4)), RNG.standard_normal((40, 2, 3, 4, 4))

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")


# ---- diffusers -------------------------------------------------------------------------------------------------------


class InFloat64:
    """Stands for diffusers' `torch`: it computes its betas, and each step, in "float32"."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", InFloat64())


def stock(levels, schedule, *, order, algorithm, spacing, **options):
    """diffusers' scheduler at our noise levels, once they are seen to be its own."""
    options |= {BY_LEVEL[spacing]: True} if spacing in BY_LEVEL else {"timestep_spacing": spacing}
    config = dict(beta_schedule=schedule, solver_order=order, algorithm_type=algorithm)
    theirs = DPMSolverMultistepScheduler(**config, **options)
    theirs.set_timesteps(len(levels.t))
    ours = np.exp(-levels.lam)
    np.testing.assert_allclose(theirs.sigmas[:-1], ours[:-1], rtol=1e-6)  # diffusers rounds them to float32
    # For the cosine schedule diffusers doesn't round the times of "karras" and "log_snr"; then a cast cuts them off.
    cut = schedule == "squaredcos_cap_v2" and spacing in BY_LEVEL
    assert np.abs(theirs.timesteps.numpy() - levels.t).max() <= cut
    theirs.sigmas, theirs.timesteps = torch.from_numpy(ours), torch.from_numpy(levels.t).long()
    return theirs


def walk(theirs, x, noise, begin=0):
    theirs.set_begin_index(begin)  # else, where two levels round to one time step, it begins at the second
    x, states = torch.from_numpy(x), []
    for t, z in zip(theirs.timesteps[begin:], noise, strict=True):
        m = torch.from_numpy(awkward_model(x.numpy(), t.item()))
        x = theirs.step(m, t, x, variance_noise=torch.from_numpy(z)).prev_sample
        states.append(x.numpy())
    assert x.dtype == torch.float64
    return np.array(states)


def close(states, expected, tolerance=1e-9):
    np.testing.assert_allclose(states, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def compare(steps, schedule="linear", *, prediction="epsilon", spacing="linspace", final="zero", start=0, **options):
    """Our states against diffusers'."""
    levels_of = dict(prediction_type=prediction, spacing=spacing)
    table = dpm_solver(SCHEDULES[schedule], steps, **levels_of, final_sigma=final, start=start, **options)
    noise = NOISE[: steps - start]
    states = run(table, awkward_model, X, noise)
    levels = Levels.of(SCHEDULES[schedule], steps, **levels_of, final_sigma=final, skip_last=True)
    if final == "zero" and not options["algorithm"].endswith("++"):
        final, states = "sigma_min", states[:-1]  # diffusers refuses "zero" here. The rows before the last are the same
    theirs = stock(levels, schedule, **options, spacing=spacing, prediction_type=prediction, final_sigmas_type=final)
    close(states, walk(theirs, X, noise, start)[: len(states)])


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_walk_is_that_of_diffusers(spacing, algorithm):
    stochastic = algorithm.startswith("sde")
    for order, solver_type, prediction in itertools.product((1, 2, 3), ("midpoint", "heun"), PREDICTIONS):
        if order < 3 or not stochastic:  # see below for those of order 3
            options = dict(order=order, algorithm=algorithm, solver_type=solver_type)
            compare(6, prediction=prediction, spacing=spacing, **options)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15])
def test_the_last_steps_are_those_of_diffusers(steps, order):
    for algorithm, final in (("dpmsolver++", "zero"), ("dpmsolver++", "sigma_min"), ("dpmsolver", "sigma_min")):
        for lower, euler in itertools.product((False, True), repeat=2):
            options = dict(order=order, algorithm=algorithm, lower_order_final=lower, euler_at_final=euler)
            compare(steps, final=final, **options)
    if order == 2:
        for algorithm in ALGORITHMS[2:]:
            compare(steps, final="sigma_min", order=2, algorithm=algorithm)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_schedules_and_starts_are_those_of_diffusers(spacing, schedule):
    for start in (0, 2, 13):
        compare(16, schedule, spacing=spacing, prediction="v_prediction", order=3, algorithm="dpmsolver++", start=start)
        compare(16, schedule, spacing=spacing, prediction="v_prediction", order=2, algorithm="dpmsolver", start=start)


def test_stock_diffusers_is_as_far_off_as_float32_is():
    """Nothing of it replaced: its float32 noise levels and its cast of the state to float32."""
    for order, algorithm in itertools.product((1, 2, 3), ("dpmsolver++", "dpmsolver")):
        theirs = DPMSolverMultistepScheduler(
            solver_order=order, algorithm_type=algorithm, final_sigmas_type="sigma_min"
        )
        theirs.set_timesteps(20)
        states = run(
            dpm_solver(LINEAR, 20, order=order, algorithm=algorithm, final_sigma="sigma_min"),
            awkward_model,
            X,
            NOISE[:20],
        )
        close(states, walk(theirs, X, NOISE[:20]), 1e-5)


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dynamic_thresholding_is_that_of_diffusers_by_way_of_the_sampler(prediction):
    threshold = dict(dynamic_thresholding_ratio=0.9)
    table = dpm_solver(LINEAR, 10, order=3, prediction_type=prediction, spacing="trailing", clip=3.0, **threshold)
    levels = Levels.of(LINEAR, 10, spacing="trailing", prediction_type=prediction)
    options = dict(order=3, algorithm="dpmsolver++", spacing="trailing", prediction_type=prediction)
    theirs = stock(levels, "linear", **options, thresholding=True, sample_max_value=3.0, **threshold)
    expected = walk(theirs, X, NOISE[:10])[-1]

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), float(t[0])))

    sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64)
    close(sampler.sample(X.shape, seeds=0, x_T=torch.from_numpy(X)).numpy(), expected)


# ---- where the peer is wrong -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("in_float64")
def test_diffusers_sde_of_order_3_has_a_wrong_sign():
    """The weight of the second difference must vanish with the step; in diffusers it goes to -1, in k-diffusion to 0.

    For m(lambda) = ((lambda - lambda_0) / h)^2 at three levels h apart the second difference D2 is 1 and D1 is 0. What
    is left is that weight. Its exact value, 2 (1/2 - w_1 / H), is h 2 / 3 + O(h^2); k-diffusion's is the half of it.
    """
    for steps, levels_apart in ((200, 0.05), (2000, 0.005)):
        levels = Levels.of(
            EDMSchedule(1e-2, 1e-2 * math.exp(levels_apart * steps)),
            steps + 1,
            spacing="log_snr",
            prediction_type="sample",
        )
        theirs = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver++")
        theirs.sigmas, theirs._step_index = torch.from_numpy(np.exp(-levels.lam)), steps - 1
        parabola = [torch.tensor(float(u * u), dtype=torch.float64) for u in (2, 1, 0)]
        none = torch.tensor(0.0, dtype=torch.float64)
        alpha = 1 / math.hypot(1, math.exp(-levels.lam[steps]))
        weight = theirs.multistep_dpm_solver_third_order_update(parabola, sample=none, noise=none).item() / alpha
        assert weight == pytest.approx(-1 + levels_apart / 3, abs=levels_apart**2)
        for solver_type, right in (("heun", 1 / 3), ("midpoint", 1 / 3), ("exact", 2 / 3)):
            table = dpm_solver(
                EDMSchedule(1e-2, 1e-2 * math.exp(levels_apart * steps)),
                steps + 1,
                order=3,
                algorithm="sde-dpmsolver++",
                solver_type=solver_type,
                spacing="log_snr",
                prediction_type="sample",
            )
            ours = (4 * table["x_h2"] + table["x_h1"])[steps - 1]
            assert ours == pytest.approx(right * levels_apart, abs=levels_apart**2)


def test_diffusers_has_no_other_sde_of_order_3():
    theirs = DPMSolverMultistepScheduler(solver_order=3, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min")
    theirs.set_timesteps(20)
    with pytest.raises(UnboundLocalError):
        walk(theirs, X, NOISE[:20])


# ---- k-diffusion's formulas ------------------------------------------------------------------------------------------


def k_diffusion(denoised, sigmas, x, noise, *, order, eta, heun):
    """sample_dpmpp_2m (eta = 0), sample_dpmpp_2m_sde and, at order 3, sample_dpmpp_3m_sde: (x0, state) of each step."""
    past, states = [], []
    for i, (now, then) in enumerate(itertools.pairwise(sigmas)):
        d = denoised(x, now)
        if then == 0:
            states.append(d)
            break
        h = math.log(now / then)
        big = h * (1 + eta)
        x = math.exp(-big) * x + (1 - math.exp(-big)) * d
        phi_2 = 1 - (1 - math.exp(-big)) / big
        phi_3 = phi_2 / big - 0.5
        if len(past) == 1 or (past and order == 2):
            r = math.log(sigmas[i - 1] / now) / h
            x = x + (phi_2 if heun else (1 - math.exp(-big)) / 2) * (d - past[-1]) / r
        elif past:
            r0, r1 = math.log(sigmas[i - 1] / now) / h, math.log(sigmas[i - 2] / sigmas[i - 1]) / h
            d0, d1 = (d - past[-1]) / r0, (past[-1] - past[-2]) / r1
            x = x + phi_2 * (d0 + (d0 - d1) * r0 / (r0 + r1)) - phi_3 * (d0 - d1) / (r0 + r1)
        x = x + noise[i] * then * math.sqrt(1 - math.exp(-2 * h * eta))
        past.append(d)
        states.append(x)
    return np.array(states)


@pytest.mark.parametrize("steps", [2, 7, 20])
def test_in_the_ve_state_it_is_k_diffusions(steps):
    edm = EDMSchedule()
    sigmas = np.append(np.exp(-Levels.of(edm, steps, spacing="karras", prediction_type="sample").lam[:-1]), 0.0)
    cases = [
        (2, 0.0, False),
        (2, 0.0, True),
        (2, 1.0, False),
        (2, 1.0, True),
        (2, 0.4, True),
        (3, 1.0, True),
        (3, 0.4, True),
        (3, 0.0, True),
    ]
    for order, eta, heun in cases:
        expected = k_diffusion(awkward_model, sigmas, 80 * X, NOISE, order=order, eta=eta, heun=heun)
        common = dict(
            order=order, eta=eta, solver_type="heun" if heun else "midpoint", lower_order_final=False, spacing="karras"
        )
        table = dpm_solver(edm, steps, algorithm="sde-dpmsolver++", prediction_type="sample", **common)
        assert table.stochastic == (eta > 0)
        assert table.init_noise_sigma == pytest.approx(80)
        close(run(table, awkward_model, 80 * X, NOISE[:steps]), expected)
        if eta == 0:
            table = dpm_solver(edm, steps, prediction_type="sample", **common | {"eta": 1.0})
            close(run(table, awkward_model, 80 * X, NOISE[:steps]), expected)


def test_an_edm_network_is_called_with_its_preconditioning():
    edm = EDMSchedule(sigma_data=0.7)

    def denoised(x, sigma):  # EDM, table 1
        norm = math.hypot(sigma, 0.7)
        f = awkward_model(x / norm, math.log(sigma) / 4)
        return (0.7 / norm) ** 2 * x + sigma * 0.7 / norm * f

    sigmas = np.append(np.exp(-Levels.of(edm, 12, spacing="karras", prediction_type="edm").lam[:-1]), 0.0)
    expected = k_diffusion(denoised, sigmas, 80 * X, NOISE, order=2, eta=0, heun=False)
    table = dpm_solver(edm, 12, prediction_type="edm", spacing="karras", lower_order_final=False)
    close(run(table, awkward_model, 80 * X, NOISE[:12]), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_two_states_are_one_process(algorithm):
    options = dict(order=3, algorithm=algorithm, prediction_type="v_prediction", spacing="karras")
    vp, ve = (dpm_solver(LINEAR, 20, state=state, **options) for state in ("vp", "ve"))
    assert ve.start[0] == 1
    states = run(vp, awkward_model, X, NOISE[:20])
    close(run(ve, awkward_model, X / vp.start[0], NOISE[:20]), states / vp["k_x"][:, None, None, None, None])


# ---- the integrals ---------------------------------------------------------------------------------------------------


def lagrange(nodes, k, at):
    return math.prod((at - node) / (nodes[k] - node) for j, node in enumerate(nodes) if j != k)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("state", ["vp", "ve"])
def test_exact_is_the_integral_of_the_polynomial(state, algorithm, order):
    """Each coefficient is the integral of a kernel times a Lagrange polynomial in lambda, by quadrature.

    With d = d lambda: d(x / sigma) = (1 + eta) e^lambda x_0 d - eta x / sigma d, or in eps d(x / alpha) = -(1 + eta)
    e^-lambda eps d; and noise whose variance in x / alpha is 2 eta e^(-2 lambda) d.
    """
    of_x0, eta = algorithm.endswith("++"), 0.6 if algorithm.startswith("sde") else 0.0
    options = dict(spacing="karras", prediction_type="v_prediction", state=state)
    common = dict(order=order, algorithm=algorithm, eta=0.6, lower_order_final=False)
    table = dpm_solver(LINEAR, 9, solver_type="exact", **common, **options)
    levels = Levels.of(LINEAR, 9, **options)
    lam, alpha, sigma = levels.lam, levels.alpha, levels.sigma
    decay = (1 + eta) if of_x0 else 0.0  # of what has been added to x / alpha
    for i in range(8):
        now, then = lam[i], lam[i + 1]
        nodes = lam[max(0, i - order + 1) : i + 1][::-1]
        for k, name in enumerate(("x_x0", "x_h1", "x_h2")[: len(nodes)]):

            def kernel(v, k=k, nodes=nodes, then=then):
                source = 1.0 if of_x0 else -math.exp(-v)
                return (1 + eta) * source * math.exp(decay * (v - then)) * lagrange(nodes, k, v)

            expected = alpha[i + 1] * quad(kernel, now, then)[0]
            assert table[name][i] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        spread = quad(lambda v, then=then: 2 * eta * math.exp(-2 * v + 2 * decay * (v - then)), now, then)[0]
        assert table["x_z"][i] == pytest.approx(alpha[i + 1] * math.sqrt(spread), rel=1e-9)
        expected = sigma[i + 1] / sigma[i] * math.exp(-eta * (then - now)) if of_x0 else alpha[i + 1] / alpha[i]
        assert table["x_x"][i] == pytest.approx(expected, rel=1e-12)


EDM = EDMSchedule(0.1, 80.0)
PERFECT = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.5]], stds=[0.4, 0.5], weights=[0.4, 0.6]).model(EDM)


@functools.cache
def at_sigma_min(steps, order, solver_type, algorithm):
    """The state at the least noise level, from a perfect model of two Gaussians."""

    def model(x, t):
        return PERFECT(torch.from_numpy(x), torch.full((len(x),), t, dtype=torch.float64)).numpy()

    options = dict(spacing="log_snr", prediction_type="sample", lower_order_final=False)
    table = dpm_solver(EDM, steps + 1, order=order, solver_type=solver_type, algorithm=algorithm, **options)
    return run(table, model, 80 * X.reshape(-1, 2), np.zeros((steps + 1, 1, 1)))[-2]


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(
    "order, solver_type, slope",
    [
        (1, "midpoint", 1),
        (2, "midpoint", 2),
        (2, "heun", 2),
        (3, "heun", 2),
        (3, "exact", 3),
    ],  # 3, "heun": as published
)
def test_the_error_falls_with_the_order(order, solver_type, slope, algorithm):
    exact = at_sigma_min(1000, 3, "exact", "dpmsolver++")
    errors = [np.sqrt(np.mean((at_sigma_min(n, order, solver_type, algorithm) - exact) ** 2)) for n in (40, 80, 160)]
    assert -np.diff(np.log2(errors)) == pytest.approx(slope, abs=0.2)


# ---- ends, options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_last_row_returns_its_x0(spacing, algorithm):
    table = dpm_solver(LINEAR, 20, order=3, algorithm=algorithm, spacing=spacing)
    assert table.stochastic == algorithm.startswith("sde")
    assert table["x_z"][-1] == 0
    assert (table["k_x"][-1], table["k_z"][-1]) == (1, 0)
    levels = Levels.of(LINEAR, 20, spacing=spacing, prediction_type="epsilon", skip_last=spacing in SPACINGS[:3])
    assert table.start == levels.start
    states = run(table, awkward_model, X, NOISE[:20])
    x, t = states[-2], table["t"][-1]
    close(states[-1], levels.x0_x[-1] * x + levels.x0_m[-1] * awkward_model(x, t), 1e-12)


def test_at_a_terminal_snr_of_zero_there_is_no_slope_from_pure_noise():
    schedule = LINEAR.rescale_zero_terminal_snr()
    for order, algorithm in itertools.product((1, 2, 3), ALGORITHMS[::2]):
        common = dict(prediction_type="v_prediction", spacing="trailing", solver_type="exact", algorithm=algorithm)
        table = dpm_solver(schedule, 6, order=order, **common)
        assert np.isfinite(table.rows[:, :10]).all()
        assert table["x_h1"][1] == 0  # h / inf
        assert order == 1 or table["x_h1"][2] != 0
        assert table["x_h2"][2] == 0
    with pytest.raises(ConfigError, match="algorithm='dpmsolver' can't start at a terminal SNR of zero"):
        dpm_solver(schedule, 6, prediction_type="v_prediction", spacing="trailing", algorithm="dpmsolver")


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(order=4), "order is 4; allowed: 1, 2 or 3"),
        (dict(order=True), "order is True"),
        (dict(order=2.0), "order is 2.0"),
        (dict(algorithm="ddim"), "algorithm is 'ddim'; allowed: 'dpmsolver\\+\\+', 'dpmsolver', "),
        (dict(solver_type="euler"), "solver_type is 'euler'; allowed: 'midpoint', 'heun', 'exact'"),
        (dict(eta=-0.1), "eta is -0.1; allowed: a number in 0 ... 1"),
        (dict(eta=math.nan), "eta is nan"),
        (dict(eta=True), "eta is True"),
        (dict(lower_order_final=1), "lower_order_final is 1; allowed: True or False"),
        (dict(euler_at_final=None), "euler_at_final is None; allowed: True or False"),
        (dict(algorithm="dpmsolver", clip=1.0), "algorithm='dpmsolver' extrapolates noise, which can't be clipped"),
        (dict(algorithm="sde-dpmsolver", dynamic_thresholding_ratio=0.9), "algorithm='sde-dpmsolver' extrapolates"),
        (dict(dynamic_thresholding_ratio=0.9), "clip is None; with dynamic thresholding"),
        (dict(final_sigma="none"), "final_sigma is 'none'"),
        (dict(spacing="karras", final_sigma="sigma_min"), "is the last level itself"),
        (dict(state="edm"), "state is 'edm'"),
        (dict(start=10), "start is 10; allowed: an integer in 0 ... 9"),
    ],
)
def test_what_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        dpm_solver(LINEAR, 10, **options)


def test_it_is_a_solver_by_name_and_builds_fast():
    table = solvers.make("dpm_solver", LINEAR, 20, order=3)
    assert (table.rows == dpm_solver(LINEAR, 20, order=3).rows).all()
    assert (table.history, table.history_of) == (2, "sample")
    assert dpm_solver(LINEAR, 20, algorithm="dpmsolver").history_of == "epsilon"
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        assert dpm_solver(LINEAR, order=3, algorithm="sde-dpmsolver").num_rows == 999
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.01

"""Samplers on data whose perfect model is known: the order of convergence, and the distribution of what they draw."""

import math

import pytest
import torch

from benchmarks import convergence
from fastddpm import EDMSchedule, Sampler, solvers
from fastddpm.analytic import GaussianMixture
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule

MIXTURE = GaussianMixture([[-1.0, 0.0], [1.0, 0.5], [0.2, -0.8]], stds=[0.3, 0.4, 0.25], weights=[3, 4, 3])
LINEAR = NoiseSchedule.linear()


# ---- the perfect model ----------------------------------------------------------------------------------------------


def test_the_prediction_is_the_mean_of_the_clean_samples_that_could_be_behind():
    """E[x_0 | x_t] over a million draws, each weighted by how likely x_t is from it."""
    draws = MIXTURE.sample(1_000_000)
    alpha, sigma = torch.tensor([[0.8]]), torch.tensor([[0.6]])
    for x in ([0.0, 0.0], [0.5, -0.7], [-1.2, 0.3]):
        x = torch.tensor([x], dtype=torch.float64)
        likely = torch.exp(-0.5 * ((x - alpha * draws) / sigma).square().sum(1))
        expected = (likely[:, None] * draws).sum(0) / likely.sum()
        found = MIXTURE.predicted_x0(x, alpha, sigma)[0]
        assert (found - expected).abs().max() < 4e-3


def test_the_moments_are_those_of_the_draws():
    draws = MIXTURE.sample(1_000_000)
    assert (draws.mean(0) - MIXTURE.mean()).abs().max() < 4e-3
    assert (draws.T.cov() - MIXTURE.covariance()).abs().max() < 6e-3


def test_the_prediction_types_say_the_same():
    x, t = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.0, 3.5, 400.0, 998.5, 999.0])
    eps, v, x0 = (MIXTURE.model(LINEAR, kind)(x, t) for kind in ("epsilon", "v_prediction", "sample"))
    for i, at in enumerate(t.tolist()):
        log_snr = torch.from_numpy(LINEAR.log_snr.copy())
        between = log_snr[math.floor(at)].lerp(log_snr[math.ceil(at)], at % 1)
        alpha, sigma = torch.sigmoid(between).sqrt(), torch.sigmoid(-between).sqrt()
        assert torch.allclose(alpha * x0[i] + sigma * eps[i], x[i], rtol=0, atol=1e-12)
        assert torch.allclose(alpha * eps[i] - sigma * x0[i], v[i], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([[0.0]], [1.0, 2.0], [1.0]), r"means \[K, D\]"),
        (([[0.0]], [0.0], [1.0]), "above 0"),
        (([[0.0]], [1.0], [-1.0]), "above 0"),
    ],
)
def test_bad_mixtures(arguments, words):
    with pytest.raises(ConfigError, match=words):
        GaussianMixture(*arguments)


def test_bad_prediction_types():
    with pytest.raises(ConfigError, match="'epsilon', 'v_prediction', 'sample'"):
        MIXTURE.model(LINEAR, "score")
    with pytest.raises(ConfigError, match="allowed here: 'sample'"):
        MIXTURE.model(EDMSchedule(), "epsilon")


# ---- order of convergence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", convergence.CASES, ids=lambda case: case.title)
def test_the_error_falls_with_the_order_of_the_solver(case):
    """Twice the steps: a half, a quarter or an eighth of the error. Plotted in docs/convergence.png."""
    counts = (40, 80)
    found = convergence.errors(case, counts)
    assert abs(convergence.slope(counts, found) - case.order) < 0.4


# ---- distribution ---------------------------------------------------------------------------------------------------


def sliced_wasserstein(a, b, directions=32):
    """The mean distance of sorted projections: 0 for the same samples."""
    angle = torch.arange(directions, dtype=torch.float64) * (math.pi / directions)
    onto = torch.stack([angle.cos(), angle.sin()])
    return ((a @ onto).sort(dim=0).values - (b @ onto).sort(dim=0).values).abs().mean().item()


LOG_SNR = {"spacing": "log_snr", "quantize": False}


@pytest.mark.parametrize(
    "solver, steps, options, n",
    [
        ("ddpm", None, {}, 1000),
        ("ddim", 250, {"spacing": "trailing"}, 2000),
        ("dpm_solver", 20, {"order": 3, "solver_type": "exact", **LOG_SNR}, 4000),
        ("unipc", 20, LOG_SNR, 4000),
        ("heun", 20, LOG_SNR, 4000),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samples_are_draws_of_the_data(solver, steps, options, n):
    table = solvers.make(solver, LINEAR, steps, **options)
    x = Sampler(MIXTURE.model(LINEAR), table).sample((n, 2), seeds=1).double()
    cov, spread = MIXTURE.covariance(), MIXTURE.covariance().diag()
    assert ((x.mean(0) - MIXTURE.mean()).abs() < 4 * (spread / n).sqrt()).all()
    assert ((x.T.cov() - cov).abs() < 4 * ((spread[:, None] * spread + cov**2) / n).sqrt()).all()
    share = torch.bincount(MIXTURE.component(x), minlength=3) / n
    real = [MIXTURE.sample(n, seed) for seed in range(1, 9)]
    expected = torch.stack([torch.bincount(MIXTURE.component(r), minlength=3) / n for r in real]).mean(0)
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt() * math.sqrt(1 + 1 / 8)).all()
    apart = max(sliced_wasserstein(a, b) for i, a in enumerate(real) for b in real[:i])
    assert sliced_wasserstein(x, real[0]) < apart


def test_a_distribution_that_is_off_is_seen():
    """The negative of the test above: ten steps of DDIM leave the covariance 4 sigma off."""
    n = 4000
    x = Sampler(MIXTURE.model(LINEAR), solvers.ddim(LINEAR, 10)).sample((n, 2), seeds=1).double()
    cov, spread = MIXTURE.covariance(), MIXTURE.covariance().diag()
    assert not ((x.T.cov() - cov).abs() < 4 * ((spread[:, None] * spread + cov**2) / n).sqrt()).all()
    real = [MIXTURE.sample(n, seed) for seed in range(1, 9)]
    apart = max(sliced_wasserstein(a, b) for i, a in enumerate(real) for b in real[:i])
    assert sliced_wasserstein(x, real[0]) > apart


@pytest.mark.parametrize(
    "solver", [name for name in solvers.names() if name not in ("ddim_inversion", "consistency", "annealed_langevin")]
)
def test_a_trace_shows_what_the_perfect_model_says_of_each_state(solver):
    """x0 of a trace is the prediction at the state and level that the step found, whatever the table calls x0."""
    takes = solvers.options(solver)
    options = {"quantize": False} if "quantize" in takes else {}
    options |= {"lcm": {"timestep_scaling": 1e4}, "repaint": {"jump_length": 3}}.get(
        solver, {}
    )  # c_skip of lcm is 0 then
    table = solvers.make(solver, LINEAR, 8, **options)
    x = torch.randn(5, 2, dtype=torch.float64) * table.init_noise_sigma
    sampler = Sampler(MIXTURE.model(LINEAR), table, state_dtype=torch.float64)
    for step, state in enumerate(sampler.trace((5, 2), seeds=0, x_T=x)):
        alpha, sigma = (torch.tensor([[v]]) for v in table.levels[step])
        expected = MIXTURE.predicted_x0(x, alpha, sigma)
        assert (state.x0 - expected).abs().max() < 1e-6, step
        x = state.x

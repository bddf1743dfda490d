"""DEIS: against diffusers, its integrals in closed form with 60 digits, and DDIM."""

import decimal
import time
from decimal import Decimal

import numpy as np
import pytest
import torch
from diffusers import DEISMultistepScheduler
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
BY_LEVEL = {"karras": "use_karras_sigmas", "log_snr": "use_exponential_sigmas"}  # diffusers' flag of each
SPACINGS = ("leading", "linspace", "trailing", *BY_LEVEL)
pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers': np.log of tensors

X = np.random.default_rng(4).standard_normal((2, 3, 4, 4))


def silent(rows):
    """Noise for a solver that adds none: were it to add any, it would be seen."""
    return [1e9] * rows


def stock_states(schedule, steps, spacing, prediction, order, table, **options):
    """The states of diffusers' scheduler at our float64 noise levels, once they are seen to be its own."""
    options |= {BY_LEVEL[spacing]: True} if spacing in BY_LEVEL else {"timestep_spacing": spacing}
    theirs = DEISMultistepScheduler(beta_schedule=schedule, solver_order=order, prediction_type=prediction, **options)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)  # else, where two levels round to one time step, it begins at the second
    ours = table["k_z"] / table["k_x"]
    levels = np.concatenate([[table.start[1] / table.start[0]], ours])
    np.testing.assert_allclose(theirs.sigmas[:-1], levels[:-1], rtol=1e-3)  # diffusers' 1 - alpha_bar is float32
    cut = spacing == "log_snr"  # there diffusers' cast to integers cuts the times off; ours are rounded
    assert np.abs(theirs.timesteps.numpy() - table["t"]).max() <= cut
    if spacing in BY_LEVEL:
        levels[-1] = levels[-2]  # as diffusers has it: its last step then leaves the state as it is
    theirs.sigmas = torch.from_numpy(levels)
    x, states = torch.from_numpy(X), []
    for t, now in zip(theirs.timesteps, table["t"], strict=True):
        x = theirs.step(torch.from_numpy(awkward_model(x.numpy(), now)), t, x).prev_sample
        states.append(x.numpy())
    assert x.dtype == torch.float64
    return np.array(states)


def assert_close(states, expected, atol=1e-10):
    for state, same in zip(states, expected, strict=True):
        np.testing.assert_allclose(state, same, rtol=0, atol=atol * np.abs(same).max())


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_walks_as_diffusers_does(schedule, spacing, order):
    by_level = spacing in BY_LEVEL
    cases = [(steps, "epsilon") for steps in (1, 2, 3, 14, 15)] + [(20, other) for other in PREDICTIONS[1:]]
    for steps, prediction in cases:
        table = solvers.deis(
            SCHEDULES[schedule],
            steps,
            order=order,
            prediction_type=prediction,
            spacing=spacing,
            final_sigma="zero" if by_level else "sigma_min",
        )
        assert table.history_of == "epsilon"
        assert not table.stochastic
        expected = stock_states(schedule, steps, spacing, prediction, order, table)
        states = run(table, awkward_model, X, silent(steps))
        assert_close(states[:-1] if by_level else states, expected[:-1] if by_level else expected)


def test_lower_order_final_is_that_of_diffusers():
    for lower in (True, False):
        for steps in (3, 14, 15):
            table = solvers.deis(LINEAR, steps, order=3, lower_order_final=lower, final_sigma="sigma_min")
            expected = stock_states("linear", steps, "linspace", "epsilon", 3, table, lower_order_final=lower)
            assert_close(run(table, awkward_model, X, silent(steps)), expected)
            assert (table["x_h2"][-1] != 0) == (not lower or steps == 15)


def integral(powers, rho):
    """The antiderivative of sum_k powers[k] log(rho)^k at rho: by parts, L_k = rho log^k - k L_{k-1}."""
    if rho == 0:
        return Decimal(0)
    total, last = Decimal(0), Decimal(0)
    for k, c in enumerate(powers):
        last = rho * rho.ln() ** k - k * last
        total += c * last
    return total


def lagrange(nodes, j):
    """The coefficients, lowest first, of the polynomial that is 1 at nodes[j] and 0 at the others."""
    powers = [Decimal(1)]
    for other in nodes[:j] + nodes[j + 1 :]:
        rising = [Decimal(0), *powers]
        powers = [a - other * b for a, b in zip(rising, [*powers, Decimal(0)], strict=True)]
        powers = [c / (nodes[j] - other) for c in powers]
    return powers


@pytest.mark.parametrize("steps, start", [(12, 0), (999, 0), (999, 980)])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_coefficients_are_the_integrals_over_rho(order, steps, start):
    """x / alpha grows by the integral over rho = sigma / alpha of the polynomial in log rho: here with 60 digits."""
    options = dict(order=order, start=start, lower_order_final=False, final_sigma="sigma_min")
    table = solvers.deis(LINEAR, steps, **options)
    levels = Levels.of(
        LINEAR,
        steps,
        spacing="linspace",
        prediction_type="epsilon",
        skip_last=True,
        final_sigma="sigma_min",
        start=start,
    )
    log_rho = [-Decimal(v) for v in levels.lam.tolist()]
    with decimal.localcontext(prec=60):
        for row in {0, 1, 2, 3, table.num_rows // 2, table.num_rows - 1}:
            nodes = log_rho[row::-1][:order]
            ends = log_rho[row + 1].exp(), log_rho[row].exp()
            weights = []
            for j in range(len(nodes)):
                powers = lagrange(nodes, j)
                weights.append(float(integral(powers, ends[0]) - integral(powers, ends[1])))
            found = [table[name][row] / levels.alpha[row + 1] for name in ("x_x0", "x_h1", "x_h2")]
            assert found == pytest.approx([*weights, 0.0, 0.0][:3], rel=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_order_1_is_ddim(prediction):
    options = dict(prediction_type=prediction, spacing="trailing")
    ours = run(solvers.deis(LINEAR, 20, order=1, **options), awkward_model, X, silent(20))
    assert_close(ours, run(solvers.ddim(LINEAR, 20, **options), awkward_model, X, silent(20)), atol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_last_row_returns_its_x0(order, spacing):
    for steps in (1, 2, 20):
        table = solvers.deis(LINEAR, steps, order=order, spacing=spacing, lower_order_final=False)
        *_, before, last = [X, *run(table, awkward_model, X, silent(steps))]
        levels = Levels.of(LINEAR, steps, spacing=spacing, prediction_type="epsilon", skip_last=True)
        x0 = levels.x0_x[-1] * before + levels.x0_m[-1] * awkward_model(before, table["t"][-1])
        np.testing.assert_allclose(last, x0, rtol=0, atol=1e-12 * np.abs(x0).max())
        assert (table["k_x"][-1], table["k_z"][-1]) == (1.0, 0.0)


def test_an_exploding_state_is_the_same_process():
    """x / alpha is the exploding state; its model is given the preserving one."""
    for order in (1, 2, 3):
        preserving = solvers.deis(LINEAR, 20, order=order)
        exploding = solvers.deis(LINEAR, 20, order=order, state="ve")
        alpha = np.array([preserving.start[0], *preserving["k_x"]])[:, None, None, None, None]
        states = run(exploding, awkward_model, X / alpha[0], silent(20))
        assert_close(states, run(preserving, awkward_model, X, silent(20)) / alpha[1:], atol=1e-12)
        assert exploding.init_noise_sigma == pytest.approx(exploding.start[1])


def test_an_edm_schedule_is_the_same_process():
    edm = EDMSchedule(sigma_min=0.01, sigma_max=20.0)
    table = solvers.deis(edm, 12, order=3, spacing="karras", prediction_type="sample")
    level = np.array([table.start[1], *table["k_z"]])
    theirs = DEISMultistepScheduler(solver_order=3, prediction_type="sample")
    theirs.set_timesteps(12)
    theirs.sigmas = torch.from_numpy(level)
    alpha = 1 / np.hypot(1, level)  # diffusers' state is the preserving one
    x, states = torch.from_numpy(X), []
    for i, t in enumerate(theirs.timesteps[:-1]):
        m = torch.from_numpy(awkward_model(x.numpy() / alpha[i], table["t"][i]))
        x = theirs.step(m, t, x).prev_sample
        states.append(x.numpy() / alpha[i + 1])
    assert_close(run(table, awkward_model, X / alpha[0], silent(12))[:-1], states)


def test_start_leaves_out_the_first_levels():
    whole, part = solvers.deis(LINEAR, 20, order=3), solvers.deis(LINEAR, 20, order=3, start=7)
    assert part.timesteps.tolist() == whole.timesteps[7:].tolist()
    assert part.start == (whole["k_x"][6], whole["k_z"][6])
    np.testing.assert_array_equal(part.rows[2:, :-2], whole.rows[9:, :-2])  # but for the row's number
    assert not part["x_h1"][0]
    assert not part["x_h2"][:2].any()


def test_through_the_sampler():
    table = solvers.make("deis", LINEAR, 10, order=3)

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.numpy()[0]))

    made = Sampler(model, table, state_dtype=torch.float64).sample(X.shape, seeds=0, x_T=torch.from_numpy(X))
    assert_close([made.numpy()], run(table, awkward_model, X, silent(10))[-1:], atol=1e-13)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(order=4), "order is 4; allowed: 1, 2 or 3"),
        (dict(order=True), "order is True"),
        (dict(order=2.0), "order is 2.0"),
        (dict(lower_order_final=1), "lower_order_final is 1; allowed: True or False"),
        (dict(spacing="karras", final_sigma="sigma_min"), "the last level itself"),
        (dict(prediction_type="eps"), "prediction_type is 'eps'"),
        (dict(clip=1.0), "solver deis has no option 'clip'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ConfigError, match=words):
        solvers.make("deis", LINEAR, 10, **options)


def test_a_terminal_snr_of_zero_is_refused():
    zero = NoiseSchedule.from_betas([*LINEAR.betas[:-1], 1.0])
    with pytest.raises(ConfigError, match=r'looks back at predicted noise, .* terminal SNR of zero; use .* "unipc"'):
        solvers.deis(zero, 10, prediction_type="v_prediction", spacing="trailing")
    assert solvers.deis(zero, 10, prediction_type="v_prediction", spacing="trailing", start=1).num_rows == 9


def test_the_table_is_built_in_10_ms():
    def seconds():
        begin = time.process_time()
        solvers.deis(LINEAR, order=3)
        return time.process_time() - begin

    assert min(seconds() for _ in range(5)) < 0.01

"""RePaint: its rows against diffusers' scheduler fed with the same noise, its order, what is drawn, what is refused."""

import math
import time

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from fastddpm_kernels import reference
from trajectories import awkward_model

from fastddpm import NoiseSchedule, Sampler, solvers
from fastddpm.errors import ConfigError
from fastddpm.solvers.repaint import repaint

SCHEDULES = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "squaredcos_cap_v2": NoiseSchedule.cosine(),
}
LINEAR = SCHEDULES["linear"]


def walk(n, length, times):
    """The levels visited, from n - 1 to -1 (the data): down to ... 2 j, j, 0, and from each up j levels and down."""
    levels = [n - 1]
    for level in reversed(range(0, n - length, length)):
        levels += range(levels[-1] - 1, level - 1, -1)
        levels += [*range(level + 1, level + length + 1), *range(level + length - 1, level - 1, -1)] * (times - 1)
    return [*levels, -1]


def walked(n, length, times):
    """(from, to, top) of each step down in that walk: `top` is where the jump behind it ends, or `to`."""
    levels = walk(n, length, times)
    for i in range(len(levels) - 1):
        if levels[i + 1] < levels[i]:
            top = i + 1
            while top + 1 < len(levels) and levels[top + 1] > levels[top]:
                top += 1
            yield levels[i], levels[i + 1], levels[top]


def test_the_order_of_a_small_one():
    assert walk(6, 2, 2) == [5, 4, 3, 2, 3, 4, 3, 2, 1, 0, 1, 2, 1, 0, -1]
    table = repaint(NoiseSchedule.linear(6), jump_length=2, jump_n_sample=2)
    assert table.timesteps.tolist() == [5, 4, 3, 4, 3, 2, 1, 2, 1, 0]


@pytest.mark.parametrize("n, length, times", [(12, 4, 3), (13, 4, 2), (10, 1, 2), (50, 10, 10), (7, 6, 4), (9, 3, 1)])
def test_the_order_is_the_papers(n, length, times):
    schedule = NoiseSchedule.linear(n)
    table = repaint(schedule, jump_length=length, jump_n_sample=times)
    evaluated, _, tops = (list(v) for v in zip(*walked(n, length, times), strict=True))
    assert table.timesteps.tolist() == evaluated
    bar = np.append(schedule.alphas_cumprod, 1.0)[tops]  # the last top is -1
    assert table["k_x"].tolist() == pytest.approx(np.sqrt(bar).tolist(), rel=1e-12)
    assert table["k_z"].tolist() == pytest.approx(np.sqrt(1 - bar).tolist(), rel=1e-11)


def test_the_papers_setting_has_so_many_evaluations():
    """T = 250, j = 10, r = 10: 250 + 24 * 9 * 10. And it is built fast."""
    start = time.perf_counter()
    table = repaint(LINEAR, 250)
    assert time.perf_counter() - start < 0.05  # 10 ms, on a machine that does something else too
    assert table.num_rows == 2410


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_parity_with_diffusers_scheduler(name, clip, eta, monkeypatch):
    """Its step and its undo_step, in the paper's order, in float64; our rows are given their noises, added up."""
    schedule = SCHEDULES[name]
    n, length, times, shape = 20, 6, 3, (2, 5)
    betas = schedule.betas[:: 1000 // n].copy()
    schedule = NoiseSchedule.from_betas(betas)
    peer = RePaintScheduler(num_train_timesteps=n, trained_betas=betas, eta=eta, clip_sample=clip is not None)
    peer.alphas_cumprod = torch.tensor(schedule.alphas_cumprod)
    peer.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    peer.set_timesteps(n, length, times)
    drawn = np.random.default_rng(0)
    latest = []

    def draw(shape, **_):
        latest.append(torch.tensor(drawn.standard_normal(shape)))
        return latest[-1]

    monkeypatch.setattr("diffusers.schedulers.scheduling_repaint.randn_tensor", draw)
    table = repaint(
        schedule, jump_length=length, jump_n_sample=times, eta=eta, clip=clip, use_clipped_model_output=False
    )
    rows = torch.tensor(table.with_identity())
    known, mask = (
        torch.tensor(drawn.standard_normal(shape)).clamp(-1, 1),
        torch.tensor([[True, False, True, False, False]]),
    )
    theirs = mine = torch.tensor(drawn.standard_normal(shape))
    for i, (t, _, top) in enumerate(walked(n, length, times)):
        m = torch.tensor(awkward_model(theirs.numpy(), t))
        theirs = peer.step(m, t, theirs, known, mask.double(), return_dict=False)[0]
        z, merged = latest[-1], torch.zeros(shape, dtype=torch.float64)
        scale = 1.0
        for level in range(t, top + 1):  # from t - 1 up to top: as undo_step counts
            theirs = peer.undo_step(theirs, level)
            beta = schedule.betas[level]
            merged = math.sqrt(1 - beta) * merged + math.sqrt(beta) * latest[-1]
            scale *= math.sqrt(1 - beta)
        base = peer._get_variance(t).item() ** 0.5 * eta
        share = schedule.alphas_cumprod[t - 1] if t else 1.0
        step_noise = (scale * base * z + merged) / table["x_z"][i] if table["x_z"][i] else torch.zeros(shape)
        known_noise = (scale * math.sqrt(1 - share) * z + merged) / table["k_z"][i] if table["k_z"][i] else 0 * z
        cursor = torch.full((2,), i)
        m = torch.tensor(awkward_model(mine.numpy(), t))
        mine = reference.reverse_step(
            mine, m, rows, cursor, step_noise, known=known, mask=mask.expand(shape), known_noise=known_noise
        ).x
        assert (mine - theirs).abs().max() <= 1e-9 * max(1.0, theirs.abs().max().item())
    assert i == table.num_rows - 1
    assert torch.equal(mine[:, 0], known[:, 0])


def test_diffusers_jumps_one_level_earlier():
    """Its pipeline jumps after the evaluation at t = 0, j ..., the authors' code once level 0, j ... is reached.

    So it jumps from x_0 itself, where algorithm 1, line 9, asks for t > 1.
    """
    peer = RePaintScheduler(num_train_timesteps=12)
    peer.set_timesteps(12, 4, 2)
    times = peer.timesteps.tolist()
    assert times == [11, 10, 9, 8, 7, 6, 5, 4, 5, 6, 7, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 3, 2, 1, 0]
    state, before, evaluated = 11, 12, []
    for t in times:  # RePaintPipeline.__call__
        if t < before:
            assert state == t  # the level is right
            evaluated.append(t)
            state = t - 1
        else:
            state += 1
        before = t
    assert evaluated.count(0) == 2  # it jumps from the data
    assert repaint(NoiseSchedule.linear(12), jump_length=4, jump_n_sample=2).timesteps.tolist().count(0) == 1


def test_a_merged_row_draws_what_the_two_would():
    """Mean and variance of a row with a jump, against ddim's row and the forward process step by step."""
    n, length = 12, 4
    schedule = NoiseSchedule.cosine(n)
    base = solvers.ddim(schedule, eta=0.7, clip=1.0)
    table = repaint(schedule, jump_length=length, jump_n_sample=2, eta=0.7, clip=1.0, use_clipped_model_output=False)
    i = int(np.flatnonzero(np.diff(table.timesteps) > 0)[0])
    t = int(table.timesteps[i])
    row = base.rows[n - 1 - t]
    factor, variance = 1.0, base["x_z"][n - 1 - t] ** 2
    for level in range(t, t + length):  # from level t - 1, by eq. 1
        factor *= math.sqrt(1 - schedule.betas[level])
        variance = (1 - schedule.betas[level]) * variance + schedule.betas[level]
    for name in ("x_x", "x_x0", "x_m"):
        column = solvers.table.COLUMNS.index(name)
        assert table[name][i] == pytest.approx(factor * row[column], rel=1e-12)
    assert table["x_z"][i] == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert (table["k_x"][i], table["k_z"][i]) == pytest.approx(
        (schedule.sqrt_alphas_cumprod[t + length - 1], schedule.sqrt_one_minus_alphas_cumprod[t + length - 1]),
        rel=1e-12,
    )


def test_the_last_row_and_tables_without_jumps():
    table = repaint(LINEAR, 30, clip=1.0)
    assert (table["x_z"][-1], table["k_x"][-1], table["k_z"][-1]) == (0.0, 1.0, 0.0)
    assert table.stochastic
    assert repaint(LINEAR, 30, eta=0.0).stochastic  # the jumps draw
    plain = repaint(LINEAR, 30, jump_n_sample=1, eta=0.3, use_clipped_model_output=False)
    base = solvers.ddim(LINEAR, 30, eta=0.3)
    assert np.array_equal(plain.rows, base.rows)
    assert plain.start == base.start
    ancestral = repaint(LINEAR, 30, jump_n_sample=1, clip=1.0)  # the defaults are DDPM
    assert np.allclose(ancestral.rows, solvers.ddpm(LINEAR, 30, clip=1.0).rows, rtol=1e-10, atol=1e-14)


def test_start_leaves_out_levels():
    table = repaint(LINEAR, 30, jump_length=5, jump_n_sample=2, start=12)
    assert table.timesteps[0] == solvers.ddim(LINEAR, 30).timesteps[12]
    assert table.start == solvers.ddim(LINEAR, 30, start=12).start
    assert table.timesteps.max() == table.timesteps[0]


def test_in_the_sampler_what_is_known_comes_out_and_the_rest_fits():
    """x_0 is a random walk, of which the first half is known: what is painted behind must go on from there."""
    n = 16
    schedule = LINEAR
    covariance = torch.tensor(np.minimum.outer(np.arange(1.0, n + 1), np.arange(1.0, n + 1)) / n)

    def perfect(x, t):  # of N(0, covariance): eps = sigma (a^2 C + s^2)^-1 x
        bar = float(schedule.alphas_cumprod[int(t[0])])
        return math.sqrt(1 - bar) * torch.linalg.solve(bar * covariance + (1 - bar) * torch.eye(n), x.double().T).T.to(
            x
        )

    walk = torch.linalg.cholesky(covariance) @ torch.randn(n, 400, generator=torch.Generator().manual_seed(0)).double()
    known, mask = walk.T.float(), torch.arange(n) < n // 2
    gap = {}
    for times in (1, 5):
        table = repaint(schedule, 50, jump_length=5, jump_n_sample=times)
        made = Sampler(perfect, table).sample((400, n), seeds=0, known=known, mask=mask)
        assert torch.equal(made[:, mask], known[:, mask])
        gap[times] = (made[:, n // 2] - made[:, n // 2 - 1]).square().mean().item() * n  # 1, were it drawn exactly
    assert gap[1] > 2.5
    assert gap[5] == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(steps=5), "jump_length is 10; allowed: an integer in 1 ... 4, since there are 5 steps"),
        (dict(steps=1), "repaint needs at least 2 steps"),
        (dict(steps=50, jump_length=0), "jump_length is 0"),
        (dict(steps=50, jump_length=2.5), "jump_length is 2.5"),
        (dict(steps=50, jump_length=True), "jump_length is True"),
        (dict(steps=50, jump_n_sample=0), "jump_n_sample is 0; allowed: an integer in 1 ... 1000"),
        (dict(steps=50, eta=2), "eta is 2"),
        (dict(steps=50, clip=-1), "clip is -1"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        repaint(LINEAR, **options)

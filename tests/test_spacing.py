"""Respaced time steps against guided-diffusion's, `start`, and a sampling schedule that isn't the training one."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trajectories import awkward_model, run

from fastddpm import Sampler, solvers
from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.spacing import timesteps

LINEAR = NoiseSchedule.linear()

# What guided-diffusion's `space_timesteps(T, spacing)` returned, sorted.
SECTIONS_300 = (
    "0 11 22 33 44 55 66 77 88 99 "
    "100 107 114 121 128 135 142 149 157 164 171 178 185 192 199 "
    "200 205 210 216 221 226 231 236 242 247 252 257 263 268 273 278 283 289 294 299"
)
SECTIONS_1000 = (
    "0 37 74 111 148 185 222 259 296 333 334 371 408 445 482 518 555 592 629 666 "
    "667 684 702 719 737 754 772 789 807 824 842 859 877 894 912 929 947 964 982 999"
)


@pytest.mark.parametrize(
    "num_steps, spacing, expected",
    [(300, [10, 15, 20], SECTIONS_300), (1000, "10,10,20", SECTIONS_1000), (10, [2, 0, 1], "0 3 7")],
)
def test_sections_are_those_of_guided_diffusion(num_steps, spacing, expected):
    t = [int(word) for word in expected.split()][::-1]
    counts = [int(n) for n in spacing.split(",")] if isinstance(spacing, str) else spacing
    for same in (spacing, ",".join(map(str, counts)), counts, tuple(counts), np.array(counts)):
        assert timesteps(num_steps, None, same).tolist() == t
        assert timesteps(num_steps, len(t), same).tolist() == t


def test_ddim_strides_are_those_of_guided_diffusion():
    assert timesteps(1000, None, "ddim50").tolist() == list(range(0, 1000, 20))[::-1]
    assert timesteps(4000, 250, "ddim250").tolist() == list(range(0, 4000, 16))[::-1]
    assert timesteps(1000, None, "ddim1000").tolist() == list(range(1000))[::-1]
    assert timesteps(1000, None, "ddim7").tolist() == [858, 715, 572, 429, 286, 143, 0]
    for num_steps in (2, 7, 100):
        there = {len(range(0, num_steps, k)) for k in range(1, num_steps)}
        for count in range(num_steps + 2):
            if count in there:
                assert len(timesteps(num_steps, None, f"ddim{count}")) == count
            else:
                with pytest.raises(ConfigError, match=f"gives exactly {count}"):
                    timesteps(num_steps, None, f"ddim{count}")


def test_every_fourth_step_is_leading():
    assert solvers.ddpm(LINEAR, 250, spacing="leading").timesteps.tolist() == list(range(0, 1000, 4))[::-1]
    assert solvers.ddpm(LINEAR, spacing="ddim250").timesteps.tolist() == list(range(0, 1000, 4))[::-1]


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 3000), st.lists(st.integers(0, 400), min_size=1, max_size=6))
def test_sections_are_evenly_visited_from_end_to_end(num_steps, counts):
    sizes = [len(part) for part in np.array_split(np.arange(num_steps), len(counts))]
    if any(n > size for n, size in zip(counts, sizes, strict=True)) or not any(counts):
        with pytest.raises(ConfigError):
            timesteps(num_steps, None, counts)
        return
    t = timesteps(num_steps, None, counts)
    assert t.dtype == np.int64
    assert len(t) == sum(counts)
    parts = np.array_split(np.arange(num_steps), len(counts))
    for part, n in zip(parts, counts, strict=True):
        mine = t[(t >= part[0]) & (t <= part[-1])] if len(part) else t[:0]
        assert len(mine) == n
        if n > 1:
            assert (mine[-1], mine[0]) == (part[0], part[-1])
            assert np.ptp(np.diff(mine)) <= 1
        elif n:
            assert mine[0] == part[0]


BAD = {
    "a word": ("even", "spacing is 'even'; allowed: 'leading', 'linspace', 'trailing', 'ddim50', or sections"),
    "ddim alone": ("ddim", "spacing is 'ddim'; allowed"),
    "ddim of none": ("ddim0", "no stride through 1000 time steps gives exactly 0"),
    "an empty string": ("", "spacing is ''; allowed"),
    "a comma too many": ("10,", "spacing is '10,'; allowed"),
    "a negative section": ([5, -1], r"spacing is \[5, -1\]; allowed"),
    "fractions": ([5.0], r"spacing is \[5.0\]; allowed"),
    "bools": ([True], r"spacing is \[True\]; allowed"),
    "no section": ([], r"spacing is \[\]; allowed"),
    "no step": ([0, 0], r"spacing is \[0, 0\]; allowed"),
    "two dimensions": ([[5]], r"spacing is \[\[5\]\]; allowed"),
    "nothing": (None, "spacing is None; allowed"),
    "too many in a section": ("10,600", "section 1 of 2 has 500 of the 1000 time steps; 600 can't be visited"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_spacing_is_refused_in_one_line(name):
    spacing, message = BAD[name]
    for build in (solvers.ddpm, solvers.ddim):
        with pytest.raises(ConfigError, match=message) as caught:
            build(LINEAR, spacing=spacing)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("steps", [30, 0, True, "50", 50.5])
def test_another_number_of_steps_than_the_spacing_says_is_refused(steps):
    with pytest.raises(ConfigError, match="but spacing='ddim50' visits 50; leave steps out"):
        timesteps(1000, steps, "ddim50")


# ---- a respaced diffusion is a diffusion of its own ------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["ddim25", "5,10,3", [40]])
def test_respaced_ddpm_is_a_ddpm_of_the_new_betas_with_time_steps_mapped(spacing, variance):
    """SpacedDiffusion: betas from the alpha_bars that are kept, and the model is told the old time steps."""
    kept = timesteps(1000, None, spacing)[::-1]
    bars = LINEAR.alphas_cumprod[kept]
    betas = 1.0 - bars / np.append(1.0, bars[:-1])
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((3, 4)), rng.standard_normal((len(kept), 3, 4))
    table = solvers.ddpm(LINEAR, spacing=spacing, variance=variance, clip=1.0)
    states = run(table, awkward_model, x, noise)
    for i, state in zip(range(len(kept))[::-1], states, strict=True):
        bar, before = bars[i], bars[i - 1] if i else 1.0
        x0 = np.clip((x - math.sqrt(1 - bar) * awkward_model(x, kept[i])) / math.sqrt(bar), -1, 1)
        x = (math.sqrt(before) * betas[i] * x0 + math.sqrt(1 - betas[i]) * (1 - before) * x) / (1 - bar)
        if i:
            small = betas[i] * (1 - before) / (1 - bar)
            x = x + math.sqrt(small if variance == "fixed_small" else betas[i]) * noise[len(kept) - 1 - i]
        np.testing.assert_allclose(state, x, rtol=0, atol=1e-10)
    assert table.timesteps.tolist() == kept[::-1].tolist()


# ---- start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [solvers.ddpm, solvers.ddim])
@pytest.mark.parametrize("start", [0, 1, 7, 19])
def test_start_leaves_out_the_first_rows(build, start):
    whole, rest = build(LINEAR, 20, clip=1.0), build(LINEAR, 20, clip=1.0, start=start)
    for column in ("t", "x0_x", "x0_m", "x_x", "x_x0", "x_m", "x_z", "k_x", "k_z", "clip"):
        np.testing.assert_array_equal(rest[column], whole[column][start:])
    assert rest["step"].tolist() == list(range(20 - start))
    bar = LINEAR.alphas_cumprod[int(whole.timesteps[start])]
    assert rest.start == pytest.approx((math.sqrt(bar), math.sqrt(1 - bar)), rel=1e-14)


@pytest.mark.parametrize("start", [-1, 20, True, 1.0, "1", None])
def test_a_wrong_start_is_refused(start):
    for build in (solvers.ddpm, solvers.ddim):
        with pytest.raises(ConfigError, match=r"start is .*; allowed: an integer in 0 \.\.\. 19"):
            build(LINEAR, 20, start=start)


def test_a_noised_picture_is_sampled_on_from_its_level():
    """SDEdit through `Sampler`, in float64: what `run` does."""
    table = solvers.ddim(LINEAR, 20, start=12)
    alpha, sigma = table.start
    rng = np.random.default_rng(0)
    x = alpha * rng.uniform(-1, 1, (2, 1, 4, 4)) + sigma * rng.standard_normal((2, 1, 4, 4))

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t.double().numpy()[:, None, None, None]))

    sampler = Sampler(model, table, dtype=torch.float64, state_dtype=torch.float64)
    ours = sampler.sample(x.shape, seeds=0, x_T=torch.from_numpy(x)).numpy()
    expected = run(table, awkward_model, x, np.zeros((table.num_rows, *x.shape)))[-1]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


# ---- a sampling schedule that isn't the training one -----------------------------------------------------------------


def perfect_model(schedule, prediction="epsilon"):
    """A model trained with `schedule` on N(0.4, 0.25) data, at any time between its time steps."""

    def model(x, t):
        log_sigma = np.interp(t, np.arange(schedule.num_steps), -0.5 * schedule.log_snr)
        alpha, sigma = 1 / np.sqrt(1 + np.exp(2 * log_sigma)), 1 / np.sqrt(1 + np.exp(-2 * log_sigma))
        off = (x - 0.4 * alpha) / (0.25 * alpha**2 + sigma**2)
        eps, x0 = sigma * off, 0.4 + 0.25 * alpha * off
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[prediction]

    return model


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_model_of_one_schedule_is_sampled_with_the_levels_of_another(name, prediction):
    """With a perfect model it makes no difference which schedule the model knows, where it reaches the same levels."""
    trained, schedule = NoiseSchedule.linear(1000, 1e-5, 0.03), NoiseSchedule.scaled_linear(400, 1e-3, 0.02)
    rng = np.random.default_rng(0)
    x, noise = rng.standard_normal((2, 5)), rng.standard_normal((40, 2, 5))
    table = solvers.make(name, schedule, 40, prediction_type=prediction)
    told = solvers.retimed(table, schedule, trained)
    assert (told.timesteps != table.timesteps).all()
    expected = run(table, perfect_model(schedule, prediction), x, noise)
    np.testing.assert_allclose(run(told, perfect_model(trained, prediction), x, noise), expected, rtol=0, atol=1e-9)
    wrong = run(table, perfect_model(trained, prediction), x, noise)
    assert np.abs(wrong - expected).max() > 0.01
    for field in ("start", "init_noise_sigma", "history_of"):
        assert getattr(told, field) == getattr(table, field)


def test_the_training_schedule_itself_changes_nothing_and_the_ends_are_kept():
    for schedule in (LINEAR, NoiseSchedule.cosine(), LINEAR.rescale_zero_terminal_snr()):
        table = solvers.ddim(schedule, 50, spacing="trailing", prediction_type="v_prediction")
        np.testing.assert_array_equal(solvers.retimed(table, schedule, schedule).rows, table.rows)
    kept = timesteps(1000, None, "ddim250")  # as a schedule of its own, whose levels differ in their last bits
    bars = LINEAR.alphas_cumprod[kept[::-1]]
    short = NoiseSchedule.from_betas(1.0 - bars / np.append(1.0, bars[:-1]))
    np.testing.assert_array_equal(solvers.retimed(solvers.ddpm(short), short, LINEAR).timesteps, kept)
    cosine = NoiseSchedule.cosine()
    beyond = solvers.retimed(solvers.ddpm(cosine), cosine, LINEAR).timesteps
    assert beyond[0] == 999  # the cosine schedule ends with less signal than any that the model has seen
    assert (np.diff(beyond) <= 0).all()
    rounded = solvers.retimed(solvers.ddpm(cosine), cosine, LINEAR, quantize=True).timesteps
    np.testing.assert_array_equal(rounded, beyond.round())
    assert (rounded != beyond).any()
    with pytest.raises(ConfigError, match=r"time inputs are 0 \.\.\. 999; `schedule` has the time steps 0 \.\.\. 99"):
        solvers.retimed(solvers.ddpm(LINEAR), NoiseSchedule.linear(100), LINEAR)

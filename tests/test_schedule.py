"""NoiseSchedule against long double, diffusers, and bad input."""

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from exact import Exact, needs_long_double, products, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from fastddpm.errors import ConfigError
from fastddpm.schedule import NoiseSchedule

LENGTHS = (1, 2, 10, 1000, 4000)
PI = Exact("3.14159265358979323846264338327950288")


def exact_linspace(start, end, n):
    return start + (end - start) * np.arange(n, dtype=Exact) / max(n - 1, 1)


def exact_cosine(n, s=0.008):
    s = Exact(s)
    bar = np.cos((np.arange(n + 1) / Exact(n) + s) / (1 + s) * PI / 2) ** 2
    with np.errstate(divide="ignore"):
        return np.minimum(1 - bar[1:] / bar[:-1], Exact(0.999))


START, END = Exact(1e-4), Exact(0.02)
FORMULAS = {
    "linear": lambda n: exact_linspace(START, END, n),
    "scaled_linear": lambda n: exact_linspace(np.sqrt(START), np.sqrt(END), n) ** 2,
    "cosine": exact_cosine,
    "sigmoid": lambda n: START + (END - START) / (1 + np.exp(-exact_linspace(Exact(-6), Exact(6), n))),
}


def custom_betas(n):
    """Awkward on purpose: from 1e-12 to 0.5, in no order."""
    return 10.0 ** np.random.default_rng(0).uniform(-12, -0.3, n)


def make(name, n):
    return NoiseSchedule.from_betas(custom_betas(n)) if name == "custom" else getattr(NoiseSchedule, name)(n)


@needs_long_double
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", FORMULAS)
def test_betas_are_the_formula(name, n):
    # The long double's own cancellation in cosine's 1 - ratio leaves it 1e-16 / beta, so still 1e-13 of room.
    assert relative_error(make(name, n).betas, FORMULAS[name](n)) <= 1e-13


@needs_long_double
@pytest.mark.parametrize("s", [0.0, 1e-4, 0.5])
def test_cosine_of_another_s(s):
    for n in LENGTHS[1:]:
        exact = exact_cosine(n, s)
        # 1 - ratio cancels in the oracle: 1e-19 of alpha_bar, relative to a beta
        room = 1e-13 + float(4 * np.finfo(Exact).eps / exact.min())
        assert relative_error(NoiseSchedule.cosine(n, s=s).betas, exact) <= room


@needs_long_double
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", [*FORMULAS, "custom", "rescaled"])
def test_what_follows_from_the_betas_has_full_precision(name, n):
    if name == "rescaled":
        n = max(n, 2)
        schedule = NoiseSchedule.scaled_linear(n).rescale_zero_terminal_snr()
    else:
        schedule = make(name, n)
    bar, noise = products(schedule.betas)
    for value, exact in (
        (schedule.alphas, 1 - schedule.betas.astype(Exact)),
        (schedule.alphas_cumprod, bar),
        (schedule.sqrt_alphas_cumprod, np.sqrt(bar)),
        (schedule.sqrt_one_minus_alphas_cumprod, np.sqrt(noise)),
    ):
        assert value.dtype == np.float64
        assert value.shape == (n,)
        live = exact > 1e-300  # smaller ones are float64's subnormals
        assert relative_error(value[live], exact[live]) <= 1e-13
        assert relative_error(value.astype(np.float32)[live & (exact > 1e-37)], exact[live & (exact > 1e-37)]) <= 6e-8
    with np.errstate(divide="ignore"):
        snr = np.log(bar / noise)
    finite = np.isfinite(snr) & (bar > 1e-300)
    assert np.abs(schedule.log_snr[finite] - snr[finite]).max() <= 1e-13 * np.abs(snr[finite]).max()
    if name == "rescaled":
        assert schedule.log_snr[-1] == -np.inf


@needs_long_double
@pytest.mark.parametrize("name, n", [*itertools.product(FORMULAS, [2, 10, 1000, 4000]), ("custom", 10)])
def test_zero_terminal_snr_is_algorithm_1(name, n):
    schedule = make(name, n)
    rescaled = schedule.rescale_zero_terminal_snr()
    root = np.sqrt(products(schedule.betas)[0])
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    ratio = (root[1:] / root[:-1]) ** 2
    assert rescaled.betas[-1] == 1.0
    assert rescaled.betas[0] == schedule.betas[0]
    assert rescaled.alphas_cumprod[-1] == 0.0
    # long double's own 1 - ratio cancels: absolute error at 1e-12 is what this oracle can see
    assert np.abs(rescaled.betas[1:] - (1 - ratio)).max() <= 1e-12
    again = rescaled.rescale_zero_terminal_snr()
    assert relative_error(again.betas, rescaled.betas) <= 1e-14


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("n", [2, 10, 1000, 4000])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_the_same_betas_as_diffusers(name, n, rescale):
    config = {
        "beta_schedule": name,
        "num_train_timesteps": n,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "rescale_betas_zero_snr": rescale,
    }
    theirs = DDPMScheduler(**config)
    ours = NoiseSchedule.from_diffusers(config)
    # float32 betas from float32 alpha_bars: 1 - ratio keeps some 3e-7 of absolute error near the start, and the
    # rescaling divides by what is left of sqrt(alpha_bar)
    np.testing.assert_allclose(
        ours.betas, theirs.betas.double(), rtol=0 if rescale else 1e-5, atol=1e-6 + 1e-3 * rescale
    )
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=0, atol=5e-6)
    # and diffusers reads what we write
    written = ours.to_diffusers()
    assert {k: v for k, v in written.items() if k in config}.items() <= config.items()
    np.testing.assert_array_equal(DDPMScheduler(**written).betas, theirs.betas)
    np.testing.assert_array_equal(NoiseSchedule.from_diffusers(written).betas, ours.betas)


def test_defaults_are_those_of_ho_et_al_and_of_diffusers():
    ours = NoiseSchedule.linear()
    assert (ours.num_steps, ours.betas[0], ours.betas[-1]) == (1000, 1e-4, 0.02)
    np.testing.assert_array_equal(NoiseSchedule.from_diffusers({}).betas, ours.betas)
    full_config = dict(DDPMScheduler().config)  # with the solver's fields, which are not the schedule's business
    np.testing.assert_array_equal(NoiseSchedule.from_diffusers(full_config).betas, ours.betas)
    assert repr(ours) == "NoiseSchedule(linear, num_steps=1000, alpha_bar_T=4.04e-05)"


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.from_betas([0.1, 0.2, 1.0]),
        NoiseSchedule.cosine(7, s=0.02),
        NoiseSchedule.cosine(7, max_beta=0.9).rescale_zero_terminal_snr(),
        NoiseSchedule.linear(5).rescale_zero_terminal_snr(),
    ],
)
def test_to_diffusers_and_back_is_exact(schedule):
    back = NoiseSchedule.from_diffusers(schedule.to_diffusers())
    np.testing.assert_array_equal(back.betas, schedule.betas)
    theirs = DDPMScheduler(**schedule.to_diffusers())
    np.testing.assert_allclose(theirs.alphas_cumprod.double(), schedule.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_arrays_are_read_only_and_the_callers_betas_are_copied():
    mine = np.array([0.1, 0.2])
    schedule = NoiseSchedule.from_betas(mine)
    mine[0] = 0.5
    assert schedule.betas[0] == 0.1
    names = [name for name in vars(schedule) if isinstance(getattr(schedule, name), np.ndarray)]
    assert len(names) == 8
    for name in names:
        with pytest.raises(ValueError, match="read-only"):
            getattr(schedule, name)[0] = 0.0
    with pytest.raises(AttributeError):
        schedule.betas = mine


def test_betas_may_be_a_list_float32_or_a_tensor():
    for betas in ([0.25, 0.5], np.array([0.25, 0.5], dtype=np.float32), torch.tensor([0.25, 0.5])):
        np.testing.assert_array_equal(NoiseSchedule.from_betas(betas).alphas_cumprod, [0.75, 0.375])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(1e-12, 1 - 1e-12), min_size=1, max_size=50))
def test_any_betas_make_a_schedule_without_warnings(betas):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedule = NoiseSchedule.from_betas(betas)
    assert (np.diff(schedule.log_snr) < 0).all() or len(betas) == 1 or (np.diff(schedule.log_snr) == 0).any()
    np.testing.assert_allclose(schedule.alphas_cumprod + schedule.sqrt_one_minus_alphas_cumprod**2, 1.0, rtol=1e-14)


BAD = {
    "a NaN": (lambda: NoiseSchedule.from_betas([0.1, math.nan]), r"betas\[1\] is nan"),
    "infinite": (lambda: NoiseSchedule.from_betas([math.inf, 0.1]), r"betas\[0\] is inf"),
    "negative": (lambda: NoiseSchedule.from_betas([0.1, 0.2, -0.1, 0.3]), r"betas\[2\] is -0.1"),
    "zero": (lambda: NoiseSchedule.from_betas([0.0, 0.2]), r"betas\[0\] is 0"),
    "1 before the end": (lambda: NoiseSchedule.from_betas([0.1, 1.0, 0.2]), r"betas\[1\] is 1"),
    "above 1 at the end": (lambda: NoiseSchedule.from_betas([0.1, 1.5]), r"betas\[1\] is 1.5"),
    "empty": (lambda: NoiseSchedule.from_betas([]), r"shape \(0,\)"),
    "a scalar": (lambda: NoiseSchedule.from_betas(0.1), r"shape \(\)"),
    "2-d": (lambda: NoiseSchedule.from_betas([[0.1, 0.2]]), r"shape \(1, 2\)"),
    "ragged": (lambda: NoiseSchedule.from_betas([[0.1], [0.1, 0.2]]), "no array"),
    "strings": (lambda: NoiseSchedule.from_betas(["0.1"]), "real numbers"),
    "booleans": (lambda: NoiseSchedule.from_betas([True]), "real numbers"),
    "complex": (lambda: NoiseSchedule.from_betas([0.1 + 0j]), "real numbers"),
    "T = 0": (lambda: NoiseSchedule.linear(0), "num_steps is 0"),
    "T < 0": (lambda: NoiseSchedule.cosine(-1), "num_steps is -1"),
    "T is a float": (lambda: NoiseSchedule.sigmoid(10.0), r"num_steps is 10\.0"),
    "T is a bool": (lambda: NoiseSchedule.scaled_linear(True), "num_steps is True"),
    "T is huge": (lambda: NoiseSchedule.linear(10**9), "num_steps is 1000000000"),
    "beta_start = 0": (lambda: NoiseSchedule.linear(10, 0.0), "beta_start is 0"),
    "beta_end = 1": (lambda: NoiseSchedule.sigmoid(10, 0.1, 1.0), r"beta_end is 1\.0"),
    "beta_end NaN": (lambda: NoiseSchedule.scaled_linear(10, 0.1, math.nan), "beta_end is nan"),
    "beta_end a word": (lambda: NoiseSchedule.linear(10, 0.1, "0.2"), "beta_end is '0.2'"),
    "max_beta": (lambda: NoiseSchedule.cosine(10, max_beta=1.0), r"max_beta is 1\.0"),
    "s": (lambda: NoiseSchedule.cosine(10, s=-0.1), r"s is -0\.1"),
    "one step to rescale": (lambda: NoiseSchedule.linear(1).rescale_zero_terminal_snr(), "at least 2"),
    "laplace": (lambda: NoiseSchedule.from_diffusers({"beta_schedule": "laplace"}), "'laplace'; allowed: 'linear'"),
    "unhashable name": (lambda: NoiseSchedule.from_diffusers({"beta_schedule": ["linear"]}), "beta_schedule is"),
    "config's T": (lambda: NoiseSchedule.from_diffusers({"num_train_timesteps": "10"}), "num_train_timesteps is '10'"),
    "config's count": (lambda: NoiseSchedule.from_diffusers({"trained_betas": [0.1]}), "there are 1 trained_betas"),
    "config's betas": (lambda: NoiseSchedule.from_diffusers({"trained_betas": "x"}), "betas"),
    "config's flag": (
        lambda: NoiseSchedule.from_diffusers({"rescale_betas_zero_snr": 1}),
        "rescale_betas_zero_snr is 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_clear_line(name):
    call, message = BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match=message) as caught:
            call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_schedule_and_solvers_import_neither_torch_nor_triton():
    code = (
        "import sys, fastddpm.schedule, fastddpm.solvers; "
        "bad = {'torch', 'triton', 'diffusers'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr

"""k-diffusion's samplers against the algorithms as published, in float64, and what a caller sees of a run.

The package itself beside ours, where it is installed: tests/test_k_diffusion_own.py.
"""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from algorithm_2 import algorithm_2

import fastddpm
from fastddpm import k_sampling as sampling
from fastddpm.errors import ConfigError, InputError, NonFiniteError
from fastddpm.integrations import k_diffusion

SHAPE = (2, 3, 4, 4)
SIGMAS = torch.tensor([14.0, 7.5, 3.0, 1.1, 0.4, 0.1, 0.03, 0.0], dtype=torch.float64)
METHODS = {"euler": "euler", "heun": "heun", "dpm_2": "midpoint"}
ODES = ["euler", "heun", "dpm_2", "lms", "dpmpp_2m"]
NOISY = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde"]


def model(x, sigma, gain=1.0):
    assert sigma.shape == (len(x),)
    assert sigma.dtype == x.dtype
    return gain * torch.tanh(1.3 * x / torch.sqrt(1 + sigma**2)[:, None, None, None])


def denoise(x, sigma):
    """The same for NumPy."""
    return np.tanh(1.3 * x / np.sqrt(1 + sigma**2))


def start(sigmas=SIGMAS):
    return torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * sigmas[0]


def normals(n, seed=1):
    """What torch.randn_like gives n times."""
    torch.manual_seed(seed)
    return torch.stack([torch.randn(SHAPE, dtype=torch.float64) for _ in range(n)]).numpy()


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to zero", "to 0.03"])
@pytest.mark.parametrize("churn", [{}, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 7.5, "s_noise": 1.01}])
@pytest.mark.parametrize("name", METHODS)
def test_churn_is_algorithm_2_with_torchs_noise_in_order(name, churn, sigmas):
    z = normals(len(sigmas) - 1)
    after = torch.rand(1)
    states, _ = algorithm_2(denoise, start().numpy(), sigmas.tolist(), [z, 0 * z], METHODS[name], **churn)
    torch.manual_seed(1)
    seen = []
    x = getattr(sampling, f"sample_{name}")(model, start(), sigmas, callback=seen.append, disable=True, **churn)
    assert torch.equal(after, torch.rand(1)), "as many random numbers are drawn as there"
    np.testing.assert_allclose(x, states[-1], atol=1e-12)
    for i, (step, state) in enumerate(zip(seen, states, strict=False)):
        assert (step["i"], float(step["sigma"])) == (i, float(sigmas[i]))
        np.testing.assert_allclose(step["x"], state, atol=1e-12)  # where the model is evaluated: churn is in it
        np.testing.assert_allclose(step["denoised"], denoise(state, float(step["sigma_hat"])), atol=1e-12)
        assert (float(step["sigma_hat"]) > 1.001 * float(sigmas[i])) == (bool(churn) and 0.1 <= float(sigmas[i]) <= 7.5)
    assert len(seen) == len(sigmas) - 1


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to zero", "to 0.03"])
@pytest.mark.parametrize("eta, s_noise", [(1.0, 1.0), (0.6, 0.9), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["euler_ancestral", "dpm_2_ancestral"])
def test_ancestral_noise(name, eta, s_noise, sigmas):
    n = len(sigmas) - 1 - int(sigmas[-1] == 0)
    z = np.concatenate([normals(n), np.zeros((len(sigmas) - 1 - n, *SHAPE))])
    method = METHODS[name.removesuffix("_ancestral")]
    states, _ = algorithm_2(denoise, start().numpy(), sigmas.tolist(), [0 * z, z], method, eta=eta, s_noise=s_noise)
    sampler = getattr(sampling, f"sample_{name}")
    torch.manual_seed(1)
    x = sampler(model, start(), sigmas, disable=True, eta=eta, s_noise=s_noise)
    np.testing.assert_allclose(x, states[-1], atol=1e-12)
    asked, drawn = [], iter(torch.from_numpy(z))

    def noise_sampler(sigma, sigma_next):
        asked.append((float(sigma), float(sigma_next)))
        return next(drawn)

    again = sampler(model, start(), sigmas, disable=True, eta=eta, s_noise=s_noise, noise_sampler=noise_sampler)
    assert torch.equal(again, x)
    assert asked == list(zip(sigmas[:n].tolist(), sigmas[1 : n + 1].tolist(), strict=True))


def plus_plus(x, sigmas, order, eta, s_noise, heun, noise):
    """SDE-DPM-Solver++ (arXiv 2211.01095) of orders 1 to 3 with phi functions; with eta = 0 the ODE's."""
    steps, known = [], []
    for sigma, following in itertools.pairwise(sigmas):
        known = [denoise(x, sigma), *known][:order]
        if following == 0:
            return known[0]
        h = math.log(sigma / following)
        big = (1 + eta) * h
        phi_1, phi_2 = -math.expm1(-big), 1 + math.expm1(-big) / big
        slope, bend = 0.0, 0.0
        if len(known) > 1:
            slope = (known[0] - known[1]) * h / steps[0]
        if len(known) > 2:
            before = (known[1] - known[2]) * h / steps[1]
            bend = (slope - before) * h / (steps[0] + steps[1])
            slope = slope + bend * steps[0] / h
        x = following / sigma * math.exp(-eta * h) * x + phi_1 * known[0]
        x = x + (phi_2 if heun else phi_1 / 2) * slope - (phi_2 / big - 0.5) * bend
        if eta:
            x = x + s_noise * following * math.sqrt(-math.expm1(-2 * eta * h)) * next(noise)
        steps = [h, *steps]
    return x


@pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to zero", "to 0.03"])
@pytest.mark.parametrize(
    "name, options",
    [
        ("dpmpp_2m", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_2m_sde", {"eta": 0.5, "s_noise": 0.9, "solver_type": "heun"}),
        ("dpmpp_2m_sde", {"eta": 0.0}),
        ("dpmpp_3m_sde", {}),
        ("dpmpp_3m_sde", {"eta": 0.4, "s_noise": 1.1}),
        ("dpmpp_3m_sde", {"eta": 0.0}),
    ],
)
def test_dpm_solver_plus_plus(name, options, sigmas):
    z = normals(8)
    order = 3 if "3m" in name else 2
    heun = order == 3 or options.get("solver_type") == "heun"
    eta = options.get("eta", 0.0 if name == "dpmpp_2m" else 1.0)
    expected = plus_plus(start().numpy(), sigmas.tolist(), order, eta, options.get("s_noise", 1.0), heun, iter(z))
    drawn = iter(torch.from_numpy(z))
    given = {} if name == "dpmpp_2m" else {"noise_sampler": lambda sigma, sigma_next: next(drawn)}
    x = getattr(sampling, f"sample_{name}")(model, start(), sigmas, disable=True, **given, **options)
    np.testing.assert_allclose(x, expected, atol=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_linear_multistep_integrates_a_polynomial(order):
    x, sigmas, slopes = start().numpy(), SIGMAS.numpy(), []
    for i in range(len(sigmas) - 1):
        slopes = [(x - denoise(x, sigmas[i])) / sigmas[i], *slopes][:order]
        nodes = sigmas[i - len(slopes) + 1 : i + 1][::-1]
        fit = np.linalg.solve(np.vander(nodes), np.stack(slopes).reshape(len(slopes), -1))  # highest power first
        powers = np.arange(len(slopes), 0, -1)
        x = x + ((sigmas[i + 1] ** powers - sigmas[i] ** powers) / powers @ fit).reshape(SHAPE)
    got = sampling.sample_lms(model, start(), SIGMAS, disable=True, order=order)
    np.testing.assert_allclose(got, x, atol=1e-9)


@pytest.mark.parametrize("name", ODES)
def test_the_sigmas_may_rise(name):
    up = torch.tensor([0.1, 0.5, 2.0, 6.0], dtype=torch.float64)
    calls = []

    def still(x, sigma):
        calls.append(float(sigma[0]))
        return torch.zeros_like(x)

    x = getattr(sampling, f"sample_{name}")(still, start(up), up, disable=True)
    torch.testing.assert_close(x, start(up) * 60)  # x / sigma stays where x_0 is 0
    assert calls[0] == pytest.approx(0.1)


@pytest.mark.parametrize("name", [*ODES, *NOISY])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_is_the_callers(name, dtype):
    x = start().to(dtype)
    before = x.clone()
    options = {"seeds": 3} if name in NOISY else {}
    got = getattr(sampling, f"sample_{name}")(model, x, SIGMAS.float(), disable=True, **options)
    exact = getattr(sampling, f"sample_{name}")(model, start(), SIGMAS, disable=True, **options)
    assert got.dtype == dtype
    assert torch.equal(x, before)
    tolerance = {torch.float32: 5e-5, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype]
    torch.testing.assert_close(got.double(), exact, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["euler", "heun", *NOISY])
def test_the_noise_of_seeds_does_not_depend_on_the_batch(name):
    sampler = getattr(sampling, f"sample_{name}")
    options = {"s_churn": 9.0} if name in ("euler", "heun") else {}
    x = start().float()
    state = torch.get_rng_state()
    both = sampler(model, x, SIGMAS, disable=True, seeds=[5, 6], **options)
    assert torch.equal(state, torch.get_rng_state()), "torch's random numbers are not touched"
    assert torch.equal(both[1:], sampler(model, x[1:], SIGMAS, disable=True, seeds=[6], **options))
    assert not torch.equal(both, sampler(model, x, SIGMAS, disable=True, seeds=[6, 5], **options))


@pytest.mark.parametrize("name", NOISY)
def test_a_table_samples_the_same_in_a_sampler(name):
    x = start().float()
    table = k_diffusion.table(name, SIGMAS)
    by_sampler = fastddpm.Sampler(model, table).sample(SHAPE, seeds=4, x_T=x, model_kwargs={"gain": 0.9})
    x = getattr(sampling, f"sample_{name}")(model, x, SIGMAS, {"gain": 0.9}, disable=True, seeds=4)
    assert torch.equal(x, by_sampler)


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_the_brownian_path_is_torchsdes_or_an_error_says_what_to_do(name):
    sampler = getattr(sampling, f"sample_{name}")
    try:
        import torchsde  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="torchsde isn't installed; give noise_sampler="):
            sampler(model, start(), SIGMAS, disable=True)
    else:
        assert torch.isfinite(sampler(model, start(), SIGMAS, disable=True)).all()
    assert torch.isfinite(sampler(model, start(), SIGMAS, disable=True, eta=0.0)).all()


@pytest.mark.parametrize(
    "name, given, says",
    [
        ("euler", {"sigmas": torch.zeros(2, 2)}, "sigmas are no noise levels"),
        ("euler", {"sigmas": torch.tensor([1.0, 0.0, 0.0])}, "sigmas are no noise levels"),
        ("euler", {"sigmas": torch.tensor([math.nan, 0.0])}, "sigmas are no noise levels"),
        ("euler_ancestral", {"sigmas": torch.tensor([1.0, 2.0])}, "sigmas rise.* or eta=0"),
        ("dpmpp_2m", {"sigmas": torch.tensor([1.0, 2.0, 1.0])}, "sigmas don't all fall or all rise"),
        ("euler", {"s_churn": -1.0}, "s_churn is -1.0"),
        ("euler", {"s_tmin": "low"}, "s_tmin is 'low'"),
        ("euler_ancestral", {"eta": 1.5}, "eta is 1.5"),
        ("dpmpp_2m_sde", {"solver_type": "euler"}, "solver_type is 'euler'"),
        ("lms", {"order": 5}, "order is 5"),
        ("euler", {"x": torch.zeros(3, dtype=torch.int64)}, "x is no float tensor"),
        ("dpmpp_2m_sde", {"seeds": 0, "noise_sampler": lambda a, b: 0}, "seeds and noise_sampler"),
    ],
)
def test_bad_input_is_one_line(name, given, says):
    given = {"x": start(), "sigmas": SIGMAS, **given}
    with pytest.raises((ConfigError, InputError), match=says) as caught:
        getattr(sampling, f"sample_{name}")(model, disable=True, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, options, says", [("eular", {}, "no sampler 'eular'"), ("dpmpp_2m", {"eta": 1.0}, "no option 'eta'")]
)
def test_a_table_of_another_name_or_option(name, options, says):
    with pytest.raises(ConfigError, match=says):
        k_diffusion.table(name, SIGMAS, **options)


def test_a_nan_is_an_error():
    with pytest.raises(NonFiniteError, match="sample 0 is not finite from step 0"):
        sampling.sample_euler(lambda x, sigma: x / 0, start(), SIGMAS, disable=True)


def test_a_nan_names_its_first_sample_and_step():
    x, calls = start(), []

    def model(x, sigma):
        calls.append(sigma)
        bad = torch.zeros_like(x)
        bad[-1] = torch.nan if len(calls) == 3 else 0.0
        return 0.5 * x + bad

    with pytest.raises(NonFiniteError, match=f"sample {len(x) - 1} is not finite from step 2 ") as caught:
        sampling.sample_euler(model, x, SIGMAS, disable=True)
    assert caught.value.bad.tolist() == [False] * (len(x) - 1) + [True]


def test_the_signatures_are_k_diffusions():
    common = ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    churn, ancestral = ["s_churn", "s_tmin", "s_tmax", "s_noise"], ["eta", "s_noise", "noise_sampler"]
    expected = dict.fromkeys(METHODS, churn) | dict.fromkeys(NOISY, ancestral)
    expected |= {"dpmpp_2m": [], "lms": ["order"], "dpmpp_2m_sde": [*ancestral, "solver_type"]}
    for name, own in expected.items():
        parameters = inspect.signature(getattr(sampling, f"sample_{name}")).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == common + own
        assert f"sample_{name}" in sampling.__all__

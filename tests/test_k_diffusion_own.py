"""k-diffusion's own samplers beside ours, where k-diffusion is installed (0.1.1.post1 when this was written).

Only its ``sampling.py`` is loaded: the package itself imports torchvision, clean-fid and wandb. To run them:
``pip install --no-deps --target DIR k-diffusion torchsde trampoline torchdiffeq; PYTHONPATH=DIR pytest ...``.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from fastddpm import k_sampling as sampling
from fastddpm.errors import ConfigError

for needed in ("scipy", "torchsde", "torchdiffeq"):
    pytest.importorskip(needed, reason=f"k-diffusion imports {needed}, which isn't installed")

SHAPE = (2, 3, 4, 4)
SIGMAS = torch.tensor([14.0, 7.5, 3.0, 1.1, 0.4, 0.1, 0.03, 0.0], dtype=torch.float64)
ENDS = pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to zero", "to 0.03"])
CHURN = [{}, {"s_churn": 3.0}, {"s_churn": 9.0, "s_tmin": 0.1, "s_tmax": 7.5, "s_noise": 1.01}]
ANCESTRAL = [{}, {"eta": 0.6, "s_noise": 0.9}, {"eta": 0.0}]
CASES = [
    *((name, options) for name in ("euler", "heun", "dpm_2") for options in CHURN),
    *((f"{name}_ancestral", options) for name in ("euler", "dpm_2", "dpmpp_2s") for options in ANCESTRAL),
    *(("lms", {"order": order}) for order in (1, 2, 3, 4)),
    ("dpmpp_2m", {}),
    *(("dpmpp_sde", options) for options in [*ANCESTRAL, {"r": 0.3}, {"r": 1.0, "eta": 0.4}]),
    *(("dpmpp_2m_sde", options) for options in [*ANCESTRAL, {"solver_type": "heun"}]),
    *(("dpmpp_3m_sde", options) for options in ANCESTRAL),
]


pytestmark = pytest.mark.filterwarnings("ignore:Should have t[ab]")  # torchsde, of an ulp beyond the path's end


@pytest.fixture(scope="module")
def own():
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion isn't installed: it would bring torchvision, clean-fid and wandb to the tests")
    package, utils = types.ModuleType("_k_diffusion"), types.ModuleType("_k_diffusion.utils")
    package.utils, package.__path__ = utils, []
    utils.append_dims = lambda x, ndim: x[(..., *[None] * (ndim - x.ndim))]
    sys.modules |= {package.__name__: package, utils.__name__: utils}
    path = Path(spec.submodule_search_locations[0]) / "sampling.py"
    spec = importlib.util.spec_from_file_location("_k_diffusion.sampling", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[package.__name__], sys.modules[utils.__name__]


def model(x, sigma, gain=1.0):
    return gain * torch.tanh(1.3 * x / torch.sqrt(1 + sigma**2)[:, None, None, None])


def start(dtype=torch.float64):
    return (torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 14).to(dtype)


def both(own, name, *given, **options):
    """What theirs and ours return, their callbacks, and the random number that follows."""
    told = []
    for module in (own, sampling):
        torch.manual_seed(1)
        seen = []
        callback = lambda step, seen=seen: seen.append(dict(step))  # noqa: E731
        x = getattr(module, f"sample_{name}")(model, *given, {"gain": 0.9}, callback, True, **options)
        told.append((x, seen, torch.rand(1)))
    return told


@ENDS
@pytest.mark.parametrize("name, options", CASES)
def test_the_result_the_callbacks_and_the_random_numbers(own, name, options, sigmas):
    (theirs, told, after), (ours, seen, then) = both(own, name, start(), sigmas, **options)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    assert torch.equal(after, then)
    assert len(seen) == len(told)
    for step, expected in zip(seen, told, strict=True):
        assert list(step) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(step[key], value, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"eta": 1.0}, {"eta": 0.4, "s_noise": 0.9}])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 11])
def test_dpm_fast(own, n, options):
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # theirs makes its levels in this
    try:
        (theirs, told, after), (ours, seen, then) = both(own, "dpm_fast", start(), 0.03, 14.0, n, **options)
    finally:
        torch.set_default_dtype(default)
    np.testing.assert_allclose(ours, theirs, atol=1e-11)
    assert torch.equal(after, then)
    for step, expected in zip(seen, told, strict=True):
        assert set(step) == set(expected)
        for key, value in expected.items():
            torch.testing.assert_close(step[key], value, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("name, options", CASES)
def test_in_float32(own, name, options):
    (theirs, told, after), (ours, seen, then) = both(own, name, start(torch.float32), SIGMAS.float(), **options)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert torch.equal(after, then)
    for step, expected in zip(seen, told, strict=True):
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            kinds = [(value.dtype, value.shape, value.device) for value in (step[key], expected[key])]
            assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", ["euler", "dpm_2_ancestral", "dpmpp_2m"])
def test_in_bfloat16(own, name):
    """Theirs turns x into float32 where it divides by the sigmas (not in 2m); ours keeps the caller's dtype."""
    (theirs, told, after), (ours, seen, then) = both(own, name, start(torch.bfloat16), SIGMAS.float())
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.float(), theirs.float(), atol=0.1, rtol=0)
    assert torch.equal(after, then)
    for step, expected in zip(seen, told, strict=True):
        assert step["x"].dtype == step["denoised"].dtype == torch.bfloat16
        assert torch.equal(step["sigma_hat"], expected["sigma_hat"])
        assert step["sigma_hat"].dtype == torch.float32


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "dpm_2_ancestral"])
def test_what_a_callback_writes_into_x_counts(own, name):
    found = []
    for module in (own, sampling):
        torch.manual_seed(1)
        x = start()
        got = getattr(module, f"sample_{name}")(
            model, x, SIGMAS, callback=lambda step: step["x"][:, :, 0].fill_(0.3), disable=True
        )
        found.append(got)
        assert module is own or torch.equal(x, start()), "not into the caller's"
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)


def test_levels_and_small_functions_are_theirs(own):
    for n in (1, 2, 10):
        for name, given in (
            ("karras", (0.03, 14.6)),
            ("karras", (0.03, 14.6, 3.0)),
            ("exponential", (0.03, 14.6)),
            ("polyexponential", (0.03, 14.6)),
            ("polyexponential", (0.03, 14.6, 2.0)),
            ("vp", ()),
            ("vp", (12.0, 0.2, 1e-2)),
        ):
            made = [getattr(module, f"get_sigmas_{name}")(n, *given, device="cpu") for module in (own, sampling)]
            assert torch.equal(*made)
            assert made[0].dtype == made[1].dtype
    x, d, sigma = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.tensor([2.0, 3.0])
    for level in (sigma, sigma[0]):
        assert torch.equal(own.to_d(x, level, d), sampling.to_d(x, level, d))
    assert torch.equal(own.append_zero(sigma), sampling.append_zero(sigma))
    for eta in (0.0, 0.4, 1.0, 30.0):
        for pair in ((3.0, 2.0), (sigma[1], sigma[0]), (sigma[1], torch.tensor(0.0))):
            assert own.get_ancestral_step(*pair, eta) == sampling.get_ancestral_step(*pair, eta)


@pytest.mark.parametrize("seed", [None, 7, [3, 4]])
def test_the_brownian_path_is_theirs(own, seed):
    x, (high, middle, low) = torch.zeros(SHAPE), SIGMAS[:3].float()
    noise = []
    for module in (own, sampling):
        torch.manual_seed(2)
        made = module.BrownianTreeNoiseSampler(x, low, high, seed)
        noise.append(torch.stack([made(high, middle), made(middle, low), made(low, high)]))
    assert torch.equal(*noise)


def test_seeds_of_a_brownian_path_are_one_a_sample():
    with pytest.raises(ConfigError, match="seed has 3 integers for 2 samples"):
        sampling.BrownianTreeNoiseSampler(torch.zeros(SHAPE), 0.1, 1.0, [1, 2, 3])


def test_a_brownian_path_on_the_cpu_is_the_same_path():
    paths = [sampling.BrownianTreeNoiseSampler(torch.zeros(SHAPE), 0.1, 2.0, 5, cpu=cpu)(2.0, 1.0) for cpu in (0, 1)]
    assert torch.equal(*paths)

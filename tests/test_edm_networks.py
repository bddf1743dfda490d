"""`edm_sampler` against algorithm 2 of arXiv 2206.00364 as it stands there, line by line, in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm.errors import ConfigError, InputError, NonFiniteError
from fastddpm.integrations.edm import edm_sampler

SHAPE = (3, 2, 4, 4)


class Net(nn.Module):
    """The exact D(x; sigma) of two points, with labels that choose between them, and EDM's attributes."""

    sigma_min, sigma_max, img_channels, img_resolution = 0.0, math.inf, 2, 4

    def __init__(self, levels=None):
        super().__init__()
        self.levels, self.seen = levels, []

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        if self.levels is None:
            return sigma
        return self.levels[(sigma.reshape(-1, 1).float() - self.levels).abs().argmin(dim=1)].reshape(sigma.shape)

    def forward(self, x, sigma, class_labels=None):
        assert sigma.shape == (len(x),)
        self.seen.append(float(sigma[0]))
        shift = 0 if class_labels is None else class_labels.to(x.dtype)[:, :1, None, None]
        return torch.tanh((x - shift) / (sigma.to(x.dtype) ** 2)[:, None, None, None] * 0.5) * 0.5 + shift


def algorithm_2(
    net, latents, labels, draw, n=18, low=0.002, high=80.0, rho=7.0, churn=0.0, least=0.0, most=math.inf, noise=1.0
):
    """The paper's own lines."""
    t = [(high ** (1 / rho) + i / max(n - 1, 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in range(n)]
    t = [float(net.round_sigma(v)) for v in t] + [0.0]
    told = lambda sigma: torch.full((len(latents),), sigma, dtype=torch.float64)  # noqa: E731
    x = latents.double() * t[0]
    for i in range(n):
        gamma = min(churn / n, math.sqrt(2) - 1) if least <= t[i] <= most else 0.0
        eps = draw(x) * noise
        hat = float(net.round_sigma(t[i] + gamma * t[i])) if gamma else t[i]
        x_hat = x + math.sqrt(hat**2 - t[i] ** 2) * eps
        d = (x_hat - net(x_hat, told(hat), labels)) / hat
        x = x_hat + (t[i + 1] - hat) * d
        if t[i + 1] != 0:
            d2 = (x - net(x, told(t[i + 1]), labels)) / t[i + 1]
            x = x_hat + (t[i + 1] - hat) * (d + d2) / 2
    return x


LEVELS = torch.exp(torch.linspace(math.log(0.002), math.log(80.0), 400, dtype=torch.float64))
CHURN = {"S_churn": 8.0, "S_min": 0.05, "S_max": 30.0, "S_noise": 1.007}


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("churn", [{}, CHURN])
@pytest.mark.parametrize("levels", [None, LEVELS])
def test_it_is_algorithm_2(steps, churn, levels):
    latents, labels = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.eye(3)
    net, other = Net(levels), Net(levels)
    torch.manual_seed(1)
    got = edm_sampler(net, latents, labels, num_steps=steps, **churn)
    after = torch.rand(1)
    torch.manual_seed(1)
    names = {"S_churn": "churn", "S_min": "least", "S_max": "most", "S_noise": "noise"}
    expected = algorithm_2(other, latents, labels, torch.randn_like, steps, **{names[k]: v for k, v in churn.items()})
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(net.seen, other.seen, rtol=1e-12)
    assert torch.equal(after, torch.rand(1)), "the random numbers go on as theirs do"


def test_float32_is_near_float64():
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    single = edm_sampler(Net(), latents, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), edm_sampler(Net(), latents), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
def test_the_callers_noise_is_drawn_as_theirs_in_any_dtype(last):
    """In float64, in the order of the latents' memory: the random numbers are the same whatever the state's dtype."""
    latents = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    latents = latents.contiguous(memory_format=torch.channels_last) if last else latents
    names = {"S_churn": "churn", "S_min": "least", "S_max": "most", "S_noise": "noise"}
    torch.manual_seed(1)
    expected = algorithm_2(Net(), latents, None, torch.randn_like, 9, **{names[k]: v for k, v in CHURN.items()})
    after = torch.rand(1)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        torch.manual_seed(1)
        got = edm_sampler(Net(), latents, num_steps=9, dtype=dtype, **CHURN)
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(after, torch.rand(1))


def test_the_networks_limits_bound_the_levels():
    net = Net()
    net.sigma_min, net.sigma_max = 0.1, 10.0
    edm_sampler(net, torch.zeros(SHAPE), num_steps=5)
    assert net.seen[0] == pytest.approx(10.0)
    assert min(net.seen) == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_noise_of_seeds_does_not_depend_on_the_batch(dtype):
    options = {"num_steps": 6, "dtype": dtype, **CHURN}
    both = edm_sampler(Net(), None, seeds=[5, 6], **options)
    assert both.shape == (2, 2, 4, 4)
    assert torch.equal(both[1:], edm_sampler(Net(), None, seeds=range(6, 7), **options))
    assert not torch.equal(both[0], both[1])
    latents = torch.randn(SHAPE)
    before = latents.clone()
    first, again = (edm_sampler(Net(), latents, seeds=3, **options) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(latents, before)


def test_the_noise_of_seeds_has_the_scale_of_the_callers():
    """The state after one step from x_T = 0 to noise: by the table's own noise, and by the first lift's."""
    options = {"num_steps": 2, "S_churn": 1.0, "sigma_min": 1.0, "sigma_max": 2.0, "S_noise": 1.0}
    zero = lambda x, sigma, labels: x  # noqa: E731  # a network that changes nothing: all that is there is noise
    for dtype in (torch.float32, torch.float64):
        x = edm_sampler(zero, torch.zeros(8, 4, 32, 32), seeds=1, dtype=dtype, **options)
        assert float(x.var()) == pytest.approx((1 + math.sqrt(2) - 1) ** 2 * 5 - 5, rel=0.03)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_steps": 2.5}, "num_steps is 2.5"),
        ({"sigma_min": 90.0}, "sigma_min, sigma_max"),
        ({"rho": 0}, "rho"),
        ({"sigma_min": "a"}, "sigma_min is 'a'"),
        ({"S_churn": -1.0}, "s_churn is -1"),
        ({"dtype": torch.float16}, "dtype is torch.float16"),
        ({"latents": None}, "latents are None"),
        ({"latents": None, "seeds": 3}, "latents are None"),
    ],
)
def test_bad_input_is_one_line(wrong, says):
    given = {"latents": torch.zeros(SHAPE), **wrong}
    with pytest.raises((ConfigError, InputError), match=says) as caught:
        edm_sampler(Net(), given.pop("latents"), **given)
    assert "\n" not in str(caught.value)


def test_a_nan_is_an_error():
    with pytest.raises(NonFiniteError, match="sample 0 is not finite from step 0"):
        edm_sampler(lambda x, sigma, labels: x / 0, torch.ones(SHAPE), num_steps=3)

"""ComfyUI's samplers against their formulas in float64, and how its wrapped models, seeds and callbacks are taken.

ComfyUI is no package that a test could install. Its comfy/k_diffusion/sampling.py was read at 02159d8; of deis and
res_multistep, the longest, a transcript was run beside ours once: 7e-15 in float64, 3e-6 in float32.
"""

import itertools
import math
import types

import numpy as np
import pytest
import torch
from scipy import integrate
from torch.utils._python_dispatch import TorchDispatchMode

import fastddpm
from fastddpm import k_sampling as sampling
from fastddpm.errors import ConfigError, InputError

SHAPE = (2, 3, 4, 4)
SIGMAS = torch.tensor([14.0, 7.5, 3.0, 1.1, 0.4, 0.1, 0.03, 0.0], dtype=torch.float64)
ENDS = pytest.mark.parametrize("sigmas", [SIGMAS, SIGMAS[:-1]], ids=["to zero", "to 0.03"])
NOISY = ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"]
OTHERS = ["euler", "heun", "dpm_2", "lms", "dpmpp_2m", "ddpm", "heunpp2", "ipndm", "deis", "gradient_estimation"]
ALL = [*NOISY, *OTHERS, "res_multistep", "res_multistep_ancestral"]


def model(x, sigma, **told):
    return torch.tanh(1.3 * x / torch.sqrt(1 + sigma**2)[:, None, None, None])


def denoise(x, sigma):
    return np.tanh(1.3 * x / np.sqrt(1 + sigma**2))


def start(dtype=torch.float64):
    return (torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 14).to(dtype)


def normals(n=8, seed=1):
    torch.manual_seed(seed)
    return iter(torch.stack([torch.randn(SHAPE, dtype=torch.float64) for _ in range(n)]).numpy())


def sampler(name):
    return getattr(sampling, f"sample_{name}")


def sampled(name, sigmas, **options):
    torch.manual_seed(1)
    return sampler(name)(model, start(), sigmas, disable=True, **options)


def pairs(sigmas):
    return list(itertools.pairwise(sigmas.tolist()))


# --- formulas ---------------------------------------------------------------------------------------------------------


@ENDS
def test_ddpm_is_the_posterior_of_the_variance_preserving_state(sigmas):
    x, noise = start().numpy(), normals()
    for sigma, following in pairs(sigmas):
        bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
        x_0, beta, y = denoise(x, sigma), 1 - bar / bar_next, x * math.sqrt(bar)
        mean = (math.sqrt(bar_next) * beta * x_0 + math.sqrt(1 - beta) * (1 - bar_next) * y) / (1 - bar)  # eq. 7
        if following:
            mean = mean + math.sqrt((1 - bar_next) / (1 - bar) * beta) * next(noise)
        x = mean / math.sqrt(bar_next)
    np.testing.assert_allclose(sampled("ddpm", sigmas), x, atol=1e-12)


@ENDS
@pytest.mark.parametrize("options", [{}, {"s_noise": 0.9, "s_noise_end": 0.5}, {"noise_clip_std": 1.5}])
def test_lcm(options, sigmas):
    x, noise, n = start().numpy(), normals(), len(sigmas) - 1
    first = options.get("s_noise", 1.0)
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        x = denoise(x, sigma)
        if following:
            z = next(noise)
            bound = options.get("noise_clip_std", math.inf) * z.std(ddof=1)
            scale = first + (options.get("s_noise_end", first) - first) * i / (n - 1)
            x = x + following * scale * z.clip(-bound, bound)
    np.testing.assert_allclose(sampled("lcm", sigmas, **options), x, atol=1e-12)


@ENDS
@pytest.mark.parametrize("eta, s_noise", [(0.0, 1.0), (1.0, 1.0), (0.6, 0.9)])
def test_res_multistep_integrates_a_line_through_two_predictions(eta, s_noise, sigmas):
    x, noise, old, reach = start().numpy(), normals(), None, None
    points, shares = np.polynomial.legendre.leggauss(40)
    for sigma, following in pairs(sigmas):
        x_0 = denoise(x, sigma)
        up = eta * following * math.sqrt(1 - (following / sigma) ** 2)
        down = math.sqrt(following**2 - up**2)
        z = next(noise) if following else 0.0
        if not down or old is None:
            x = x_0 + down / sigma * (x - x_0)
        else:
            h = math.log(sigma / down)
            u = (points + 1) * h / 2
            at = u[:, None] / reach  # where on the line from x_0 (0) to the one before (1)
            line = x_0.ravel() + at * (old - x_0).ravel()
            x = down / sigma * x + (h / 2 * shares * np.exp(u - h) @ line).reshape(SHAPE)
        x = x + s_noise * up * z
        old, reach = x_0, -math.log(sigma / down) if down else None
    if eta:
        np.testing.assert_allclose(sampled("res_multistep_ancestral", sigmas, eta=eta, s_noise=s_noise), x, atol=1e-11)
    else:
        np.testing.assert_allclose(sampled("res_multistep", sigmas), x, atol=1e-11)
        like = sampled("dpmpp_2m_sde", sigmas, eta=0.0, solver_type="heun")
        np.testing.assert_allclose(like, x, atol=1e-11)


@ENDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm(order, sigmas):
    weights = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    x, slopes = start().numpy(), []
    for sigma, following in pairs(sigmas):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes][: order if following else 1]
        x = x + (following - sigma) * sum(w * d for w, d in zip(weights[len(slopes) - 1], slopes, strict=True))
    np.testing.assert_allclose(sampled("ipndm", sigmas, max_order=order), x, atol=1e-12)


@ENDS
@pytest.mark.parametrize("gamma", [1.0, 2.0, 1.4])
def test_gradient_estimation(gamma, sigmas):
    x, before = start().numpy(), None
    for sigma, following in pairs(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        estimate = slope if before is None or not following else gamma * slope + (1 - gamma) * before
        x, before = x + (following - sigma) * estimate, slope
    np.testing.assert_allclose(sampled("gradient_estimation", sigmas, ge_gamma=gamma), x, atol=1e-12)


@ENDS
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_integrates_a_polynomial_in_time(order, sigmas):
    least, most = math.log(1 + 0.002**2), math.log(1 + 80**2)
    slope, begin = np.linalg.solve([[1e-6 / 2, 1e-3], [1 / 2, 1]], [least, most])  # log(1 + sigma^2) of a linear beta
    sigma_of = lambda t: math.sqrt(math.expm1(slope * t**2 / 2 + begin * t))  # noqa: E731
    time_of = lambda s: (math.sqrt(begin**2 + 2 * slope * math.log1p(s**2)) - begin) / slope  # noqa: E731
    x, known = start().numpy(), []
    for sigma, following in pairs(sigmas):
        known = [(time_of(sigma), (x - denoise(x, sigma)) / sigma), *known][:order]
        if not following:
            known = known[:1]

        def basis(sigma, j, known=known):
            others = [t for k, (t, _) in enumerate(known) if k != j]
            return np.prod([(time_of(sigma) - t) / (known[j][0] - t) for t in others])

        weights = [integrate.quad(basis, sigma, following, args=(j,), epsrel=1e-9)[0] for j in range(len(known))]
        x = x + sum(w * d for w, (_, d) in zip(weights, known, strict=True))
    assert sigma_of(1.0) == pytest.approx(80)
    # the sampler's integrals are sums over 10,000 points, as ComfyUI's
    np.testing.assert_allclose(sampled("deis", sigmas, max_order=order), x, atol=1e-12 if order == 1 else 3e-4)


@ENDS
@pytest.mark.parametrize("churn", [{}, {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 7.5, "s_noise": 1.01}])
def test_heunpp2(churn, sigmas):
    levels, noise, x = sigmas.tolist(), normals(), start().numpy()
    for i, (sigma, following) in enumerate(pairs(sigmas)):
        z = next(noise)  # also where there is no churn
        inside = churn.get("s_tmin", 0) <= sigma <= churn.get("s_tmax", math.inf)
        hat = sigma * (1 + (min(churn.get("s_churn", 0.0) / (len(levels) - 1), math.sqrt(2) - 1) if inside else 0))
        x = x + churn.get("s_noise", 1.0) * math.sqrt(hat**2 - sigma**2) * z
        ahead = [hat, *levels[i + 1 : -1][:2]]
        there, slopes = x, []
        for stage, level in enumerate(ahead):
            slopes.append((there - denoise(there, level)) / level)
            if stage + 1 < len(ahead):
                there = there + (ahead[stage + 1] - level) * slopes[-1]
        weights = np.array(ahead) / (len(ahead) * levels[0])
        weights[0] = 1 - weights[1:].sum()
        x = x + (following - hat) * sum(w * d for w, d in zip(weights, slopes, strict=True))
    np.testing.assert_allclose(sampled("heunpp2", sigmas, **churn), x, atol=1e-11)


@ENDS
@pytest.mark.parametrize("eta, s_noise", [(0.0, 1.0), (1.0, 1.0), (0.6, 0.9)])
@pytest.mark.parametrize("name, r", [("dpmpp_2s_ancestral", 0.5), ("dpmpp_sde", 0.5), ("dpmpp_sde", 0.3)])
def test_dpm_solver_plus_plus_of_two_stages(name, r, eta, s_noise, sigmas):
    """arXiv 2211.01095, algorithm 1; from the step's beginning, without the noise of its first stage."""
    x, noise, sde = start().numpy(), normals(16), name == "dpmpp_sde"

    def step(x, x_0, sigma, to):
        up = eta * to * math.sqrt(1 - (to / sigma) ** 2)
        down = math.sqrt(to**2 - up**2)
        return x_0 + down / sigma * (x - x_0), s_noise * up, down

    for sigma, following in pairs(sigmas):
        x_0 = denoise(x, sigma)
        if not following:
            x = x_0
            continue
        _, up, down = step(x, x_0, sigma, following)
        if sde:
            middle = sigma ** (1 - r) * following**r
            there, lift, _ = step(x, x_0, sigma, middle)
            there = there + lift * next(noise)
        else:
            middle = math.sqrt(sigma * down)
            there = x_0 + middle / sigma * (x - x_0)
        second = denoise(there, middle)
        mixed = x_0 + (second - x_0) / (2 * r) if sde else second
        x = mixed + down / sigma * (x - mixed) + up * next(noise)
    drawn, told = normals(16), []

    def noise_sampler(sigma, sigma_next):
        told.append((float(sigma), float(sigma_next)))
        return torch.from_numpy(next(drawn))

    options = {"noise_sampler": noise_sampler, "eta": eta, "s_noise": s_noise} | ({"r": r} if sde else {})
    np.testing.assert_allclose(sampled(name, sigmas, **options), x, atol=1e-12)
    expected = []
    for sigma, following in pairs(sigmas):
        expected += [(sigma, sigma ** (1 - r) * following**r)] * bool(sde and following) + [(sigma, following)]
    np.testing.assert_allclose(told, [pair for pair in expected if pair[1]], rtol=1e-12)


def exact_solution(x, sigma, to):
    """Where dx / dsigma = x sigma / (1 + sigma^2) leads: the model is x / (1 + sigma^2), normal data."""
    return x * math.sqrt((1 + to**2) / (1 + sigma**2))


def test_dpm_fast_is_of_order_three():
    def normal(x, sigma):
        return x / (1 + sigma**2)[:, None, None, None]

    exact, errors, calls = exact_solution(start(), 14.0, 0.05), [], []
    for n in (31, 61, 121):  # 10, 20 and 40 steps of order 3, and one of order 1
        x = sampling.sample_dpm_fast(
            lambda x, sigma: calls.append(sigma) or normal(x, sigma), start(), 0.05, 14.0, n, disable=True
        )
        assert len(calls) == n
        calls.clear()
        errors.append(float((x - exact).abs().max()))
    only_three = sampling.sample_dpm_fast(normal, start(), 0.05, 14.0, 32, disable=True)
    assert errors[0] > 3 * errors[1] > 9 * errors[2]  # the step of order 1 at the end has an error of order 2
    assert float((only_three - exact).abs().max()) < 0.01


@pytest.mark.parametrize("n, orders", [(1, [1]), (2, [2]), (3, [2, 1]), (4, [3, 1]), (6, [3, 2, 1]), (8, [3, 3, 2])])
def test_dpm_fast_has_these_steps(n, orders):
    levels, told = [], []
    sampling.sample_dpm_fast(
        lambda x, sigma: levels.append(float(sigma[0])) or model(x, sigma),
        start(), torch.tensor(0.1), torch.tensor(14.0), n, None, told.append, True,
    )  # fmt: skip
    t = np.linspace(-math.log(14), -math.log(0.1), len(orders) + 1)
    expected = [
        a + k / order * (b - a) for order, a, b in zip(orders, t[:-1], t[1:], strict=True) for k in range(order)
    ]
    np.testing.assert_allclose(levels, np.exp(np.negative(expected)), rtol=1e-6)
    np.testing.assert_allclose([step["sigma"] for step in told], np.exp(-t[:-1]), rtol=1e-6)
    assert set(told[0]) == {"x", "i", "t", "t_up", "denoised", "sigma", "sigma_hat"}


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("dpmpp_2m_sde", "dpmpp_3m_sde")])
def test_a_table_samples_the_same_in_a_sampler(name):
    x, noisy = start(torch.float32), name in NOISY or name in ("ddpm", "res_multistep_ancestral")
    table = sampling.table(name, SIGMAS)
    by_sampler = fastddpm.Sampler(model, table).sample(SHAPE, seeds=4, x_T=x)
    got = sampler(name)(model, x, SIGMAS, disable=True, **({"seeds": 4} if noisy else {}))
    assert torch.equal(got, by_sampler)
    assert table.stochastic == noisy


@pytest.mark.parametrize("r", [0.5, 0.4])
def test_a_trace_of_dpmpp_sde_says_what_it_knows(r):
    seen = []

    def noted(x, sigma):
        seen.append(model(x, sigma))
        return seen[-1]

    traced = fastddpm.Sampler(noted, sampling.table("dpmpp_sde", SIGMAS, r=r)).trace(SHAPE, seeds=1)
    for i, step in enumerate(traced):
        if r == 0.5 and i % 2 == 0 and i < 12:
            assert step.x0.isnan().all()
        else:
            torch.testing.assert_close(step.x0, seen[i], atol=2e-4, rtol=1e-4)


# --- ComfyUI's model --------------------------------------------------------------------------------------------------


class EPS:
    """A state x_0 + sigma eps."""


class CONST:
    """ComfyUI's name of a rectified flow's state."""


class Flow(CONST, EPS):
    """As ComfyUI mixes them."""


class Wrapped:
    """As ComfyUI's KSamplerX0Inpaint: the guider in inner_model, the network's wrapper in its inner_model."""

    def __init__(self, kind=EPS):
        self.inner_model = types.SimpleNamespace(inner_model=types.SimpleNamespace(model_sampling=kind()))
        self.told = []

    def __call__(self, x, sigma, denoise_mask=None, model_options=None, seed=None):
        self.told.append((denoise_mask, model_options, seed))
        return model(x, sigma)


@pytest.mark.parametrize("name", ALL)
def test_a_wrapped_model_is_called_as_it_is(name, monkeypatch):
    pytest.importorskip("torchsde", reason="the default noise of the SDE's samplers") if "sde" in name else None
    wrapped, options = Wrapped(), {"cond_scale": 3.0}
    before = dict(vars(wrapped))
    told = {"denoise_mask": None, "model_options": options, "seed": 5}
    seen = []
    sampler(name)(wrapped, start(torch.float32), SIGMAS.float(), extra_args=told, callback=seen.append, disable=True)
    assert vars(wrapped) == before
    assert all(given[1] is options and given[2] == 5 for given in wrapped.told)
    assert [step["i"] for step in seen] == list(range(len(SIGMAS) - 1))
    assert all(step["denoised"].shape == step["x"].shape == SHAPE for step in seen)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "lcm", "ddpm"])
def test_comfyuis_seed_is_its_generators(name):
    """On the CPU the seed is one more: the latent's noise was drawn from the seed itself."""
    state = torch.get_rng_state()
    got = sampler(name)(Wrapped(), start(), SIGMAS, {"seed": 5}, disable=True)
    assert torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(6)
    drawn = lambda sigma, sigma_next: torch.randn(SHAPE, dtype=torch.float64, generator=generator)  # noqa: E731
    assert torch.equal(got, sampler(name)(model, start(), SIGMAS, disable=True, noise_sampler=drawn))
    torch.manual_seed(6)
    assert torch.equal(got, sampler(name)(model, start(), SIGMAS, {"seed": 5}, disable=True)), (
        "others' seed says nothing"
    )


def test_comfyui_draws_churn_where_there_is_some_and_ends_lms_with_x_0():
    for name in ("euler", "heun", "dpm_2"):
        torch.manual_seed(0)
        sampler(name)(Wrapped(), start(), SIGMAS, disable=True, s_churn=5.0, s_tmin=0.3, s_tmax=4.0)
        after = torch.rand(1)
        torch.manual_seed(0)
        for _ in range(3):  # at 3.0, 1.1 and 0.4
            torch.randn(SHAPE, dtype=torch.float64)
        assert torch.equal(after, torch.rand(1))
    last = []
    x = sampling.sample_lms(Wrapped(), start(), SIGMAS, callback=last.append, disable=True)
    torch.testing.assert_close(x, last[-1]["denoised"], atol=1e-14, rtol=0)


@pytest.mark.parametrize("name", NOISY)
def test_a_rectified_flow_is_an_error_where_its_noise_is_another(name):
    with pytest.raises(InputError, match="rectified flow") as caught:
        sampler(name)(Wrapped(Flow), start(), SIGMAS, disable=True)
    assert "\n" not in str(caught.value)
    for name in ("euler", "heun", "dpmpp_2m", "ipndm", "res_multistep"):
        assert torch.equal(
            sampler(name)(Wrapped(Flow), start(), SIGMAS, disable=True),
            sampler(name)(Wrapped(), start(), SIGMAS, disable=True),
        )


# --- what a caller may do ---------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes what makes a GPU's host wait: reading a value, nonzero, a copy of a number."""

    names: tuple[str, ...] = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        read = name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        if read or (name in ("_to_copy", "copy_") and any(isinstance(a, torch.Tensor) and not a.ndim for a in args)):
            self.names = (*self.names, name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*ALL, "dpm_fast"])
def test_no_step_waits_for_the_device(name):
    options = {"noise_sampler": lambda a, b: torch.randn(SHAPE)} if name in NOISY else {}
    options |= {"s_churn": 5.0} if name in ("euler", "heun", "dpm_2", "heunpp2") else {}
    given = (0.1, 14.0, 11) if name == "dpm_fast" else (SIGMAS.float(),)
    counts, told = [], []
    with Waits() as waits:

        def noted(x, sigma):
            counts.append(len(waits.names))
            return model(x, sigma)

        sampler(name)(noted, start(torch.float32), *given, callback=told.append, disable=True, **options)
    assert counts[-1] == counts[0]
    assert len(waits.names) > counts[-1], "the end waits, once: it asks whether all is finite"


@pytest.mark.parametrize("name", ALL)
def test_nothing_that_is_given_or_returned_is_shared(name):
    options = {"noise_sampler": lambda a, b: z} if name in NOISY else {}
    z, buffer, seen = torch.ones(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64), []

    def reused(x, sigma):
        return buffer.copy_(model(x, sigma))  # a compiled model's output, which its next call overwrites

    x, sigmas = start(), SIGMAS.clone()
    torch.manual_seed(1)
    got = sampler(name)(reused, x, sigmas, callback=lambda step: seen.append(step["x"]), disable=True, **options)
    torch.manual_seed(1)
    assert torch.equal(got, sampler(name)(model, x, sigmas, disable=True, **options))
    assert torch.equal(x, start())
    assert torch.equal(sigmas, SIGMAS)
    assert torch.equal(z, torch.ones_like(z))
    pointers = {t.data_ptr() for t in (x, z, buffer, *seen)}
    assert got.data_ptr() not in pointers
    assert len({t.data_ptr() for t in seen}) == len(seen)


@pytest.mark.parametrize("name", ALL)
def test_the_model_is_told_the_sigmas_themselves(name):
    """To the bit, in float32: who looks for the step in the sigmas, as many of ComfyUI's nodes do, finds it."""
    options = {"noise_sampler": lambda a, b: torch.zeros(SHAPE)} if name in NOISY else {}
    sigmas, told, seen = sampling.get_sigmas_karras(20, 0.0292, 14.6146), [], []

    def noted(x, sigma):
        told.append(sigma)
        return model(x, sigma)

    def callback(step):
        assert torch.equal(step["sigma"], sigmas[step["i"]])
        assert torch.equal(step["sigma_hat"], sigmas[step["i"]])
        seen.append(told[-1])

    sampler(name)(noted, start(torch.float32), sigmas, callback=callback, disable=True, **options)
    assert torch.equal(torch.stack(seen), sigmas[:-1, None].expand(-1, 2))


def test_extra_args_are_the_callers_own():
    told, gains = {}, []

    def noted(x, sigma, gain=1.0):
        gains.append(gain)
        return model(x, sigma)

    sampling.sample_euler(noted, start(), SIGMAS, told, lambda step: told.update(gain=step["i"]), True)
    assert gains == [1.0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral", "heunpp2"])
def test_a_model_that_writes_into_x_does_not_reach_the_callers(name):
    x = start()
    sampler(name)(lambda x, sigma: model(x.mul_(0.99), sigma), x, SIGMAS, disable=True)
    assert torch.equal(x, start())


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "euler_ancestral", "res_multistep"])
def test_inference_mode_layouts_and_other_output_types(name):
    def run(x, act=model):
        torch.manual_seed(1)
        return sampler(name)(act, x, SIGMAS.float(), disable=True)

    x = start(torch.float32)
    expected = run(x)
    with torch.inference_mode():
        assert torch.equal(run(x.clone()), expected)
    spread = lambda x, sigma: model(x, sigma).contiguous(memory_format=torch.channels_last)  # noqa: E731
    assert torch.equal(run(x, spread), expected)
    assert torch.equal(run(x.requires_grad_()), expected)
    low = run(x.detach(), lambda x, sigma: model(x, sigma).bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sigmas", [torch.tensor([1.0]), torch.tensor([])])
def test_no_step_returns_x(name, sigmas):
    x = start()
    got = sampler(name)(None, x, sigmas)
    assert torch.equal(got, x)
    assert got.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("name", ALL)
def test_one_step_to_zero_is_the_models_x_0(name):
    options = {"noise_sampler": lambda sigma, sigma_next: None} if name in NOISY else {}
    x = sampler(name)(model, start(), SIGMAS[[0, -1]], disable=True, **options)
    torch.testing.assert_close(x, model(start(), SIGMAS[:1]), atol=1e-13, rtol=0)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2s_ancestral", "ddpm", "lcm", "euler", "ipndm"])
def test_a_level_may_follow_itself(name):
    twice = torch.tensor([14.0, 3.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.isfinite(sampler(name)(model, start(), twice, disable=True)).all()


@pytest.mark.parametrize(
    "name, given, says",
    [
        ("ipndm", {"max_order": 5}, "max_order is 5"),
        ("deis", {"max_order": 0}, "max_order is 0"),
        ("deis", {"deis_mode": "rhoab"}, "deis_mode is 'rhoab'.* sample_lms"),
        ("deis", {"sigmas": torch.tensor([1.0, 2.0, 1.0])}, "sigmas don't all fall or all rise"),
        ("gradient_estimation", {"cfg_pp": True}, "cfg_pp is True"),
        ("gradient_estimation", {"ge_gamma": None}, "ge_gamma is None"),
        ("lcm", {"noise_clip_std": 1.0, "seeds": 1}, "noise_clip_std is for noise of torch"),
        ("lcm", {"s_noise_end": -1}, "s_noise_end is -1"),
        ("dpmpp_sde", {"r": 0.0}, "r is 0.0; .* not 0"),
        ("dpmpp_sde", {"eta": 2.0}, "eta is 2.0"),
        ("res_multistep_ancestral", {"eta": 2.0}, "eta is 2.0"),
        ("heunpp2", {"s_churn": -1.0}, "s_churn is -1.0"),
    ],
)
def test_bad_input_is_one_line(name, given, says):
    given = {"sigmas": SIGMAS, "seeds": 3, **given}
    if name in ("ipndm", "deis", "gradient_estimation"):
        del given["seeds"]
    with pytest.raises((ConfigError, InputError), match=says) as caught:
        sampler(name)(model, start(), disable=True, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given, says",
    [
        ((0.1, 14.0, 0), "n is 0"),
        ((0.0, 14.0, 5), "sigma_min is 0.0"),
        ((14.0, 14.0, 5), "sigma_min is 14.0"),
        ((14.0, 0.1, 5, None, None, True, 1.0), "eta 1.0"),
    ],
)
def test_dpm_fasts_bad_input(given, says):
    with pytest.raises(ConfigError, match=says):
        sampling.sample_dpm_fast(model, start(), *given)


def test_what_is_not_here_says_so():
    with pytest.raises(AttributeError, match=r"sample_dpm_adaptive .* on the host"):
        sampling.sample_dpm_adaptive  # noqa: B018
    with pytest.raises(AttributeError, match=r"there is no sample_uni_pc; there are .*sample_dpmpp_2m"):
        sampling.sample_uni_pc  # noqa: B018
    assert not hasattr(sampling, "sample_er_sde")

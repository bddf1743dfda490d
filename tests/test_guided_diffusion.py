"""`GaussianDiffusion` against the algorithms that guided-diffusion publishes, written anew in float64.

tests/test_guided_diffusion_own.py compares the package itself, where it is installed. DiT has the same loops.
"""

import copy
import inspect
import itertools
import pickle
from enum import Enum, auto
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fastddpm.errors import ConfigError, InputError, NonFiniteError
from fastddpm.integrations.gaussian import MEANS, VARIANCES
from fastddpm.integrations.guided_diffusion import GaussianDiffusion

SHAPE, STEPS = (2, 3, 4, 4), 30
BETAS = np.linspace(1e-3, 0.3, STEPS)
RESPACED = {"7": [0, 5, 10, 14, 19, 24, 29], "ddim10": list(range(0, 30, 3)), "2,3": [0, 14, 15, 22, 29]}


class Model(nn.Module):
    """Something that depends on all that it is given, with as many channels as asked for."""

    def __init__(self, learned=False):
        super().__init__()
        self.weight, self.learned, self.seen = nn.Parameter(torch.ones(1)), learned, []

    def forward(self, x, t, y=0.0):
        assert t.shape == (len(x),)
        self.seen.append((float(t[0]), t.dtype))
        out = torch.tanh(1.2 * x + y + t.to(x.dtype)[:, None, None, None] / 60) + 0.1 * x.roll(1, -1)
        return torch.cat([out, torch.tanh(2 * x) - 1], dim=1) if self.learned else out


def gradient(x, t, y=0.0):
    return 0.3 * torch.cos(x + y + t.to(x.dtype)[:, None, None, None] / 50)


def shrunk(x):
    return 0.8 * x + 0.01


def loop(
    kind, x, mean, variance, steps, *, eta=0.0, scale=None, clip=True, denoised_fn=None, cond_fn=None, y=0.0, made=Model
):
    """x and x_0 after each step; bar, beta and the posterior by hand from the visited steps' alpha_bar."""
    bar = np.cumprod(1 - BETAS)[steps]
    before = np.append(1.0, bar[:-1])
    beta = 1 - bar / before
    model = made(variance.startswith("learned"))
    small = beta * (1 - before) / (1 - bar)
    c_0, c_t = beta * np.sqrt(before) / (1 - bar), (1 - before) * np.sqrt(bar / before) / (1 - bar)
    for i in reversed(range(len(steps))):
        t = torch.full((len(x),), steps[i])
        t = t if scale is None else t.float() * scale
        out = model(x, t, y)
        m, v = out[:, :3], out[:, 3:]
        kept = np.log(small[max(i, 1)])
        var, logvar = {
            "fixed_small": (small[i], kept),
            "fixed_large": 2 * (beta[i] if i else small[1],),
            "learned": (v.exp(), v),
            "learned_range": 2 * ((1 + v) / 2 * np.log(beta[i]) + (1 - v) / 2 * kept,),
        }[variance]
        if variance == "fixed_large":
            logvar = np.log(var)
        if variance == "learned_range":
            var = torch.exp(logvar)
        x_0 = {
            "epsilon": (x - np.sqrt(1 - bar[i]) * m) / np.sqrt(bar[i]),
            "start_x": m,
            "previous_x": (m - c_t[i] * x) / c_0[i],
        }[mean]
        x_0 = x_0 if denoised_fn is None else denoised_fn(x_0)
        x_0 = x_0.clamp(-1, 1) if clip else x_0
        if kind == "p":
            z = torch.randn_like(x)
            centre = m if mean == "previous_x" else c_0[i] * x_0 + c_t[i] * x
            centre = centre if cond_fn is None else centre + var * cond_fn(x, t, y)
            x = centre + (i > 0) * torch.exp(torch.as_tensor(0.5 * logvar)) * z
        else:
            eps = (x - np.sqrt(bar[i]) * x_0) / np.sqrt(1 - bar[i])
            if cond_fn is not None:
                eps = eps - np.sqrt(1 - bar[i]) * cond_fn(x, t, y)
                x_0 = (x - np.sqrt(1 - bar[i]) * eps) / np.sqrt(bar[i])
            sigma = eta * np.sqrt((1 - before[i]) / (1 - bar[i]) * beta[i])
            z = torch.randn_like(x)
            x = np.sqrt(before[i]) * x_0 + np.sqrt(1 - before[i] - sigma**2) * eps + sigma * z
        yield x, x_0


def start(dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def assert_same_loop(kind, mean, variance, respacing=None, scale=None, **options):
    steps = RESPACED.get(respacing, list(range(STEPS)))
    eta = {"eta": options.pop("eta", 0.0)} if kind == "ddim" else {}
    torch.manual_seed(2)
    expected = list(loop(kind, start(), mean, variance, steps, scale=scale, y=0.3, **eta, **options))
    after = torch.rand(1)
    diffusion = GaussianDiffusion(BETAS, mean, variance, None, scale is not None, respacing)
    assert (diffusion.num_timesteps, diffusion.timestep_map) == (len(steps), steps)
    model = Model(variance.startswith("learned"))
    names = {"clip": "clip_denoised"}
    given = {names.get(name, name): value for name, value in options.items()} | eta | {"model_kwargs": {"y": 0.3}}
    torch.manual_seed(2)
    name = "p_sample_loop" if kind == "p" else "ddim_sample_loop"
    seen = list(getattr(diffusion, f"{name}_progressive")(model, SHAPE, start(), **given))
    assert torch.equal(after, torch.rand(1)), "the random numbers go on as theirs do"
    for out, (x, x_0) in zip(seen, expected, strict=True):
        torch.testing.assert_close(out["sample"], x, rtol=1e-9, atol=1e-9)
        if not (kind == "p" and mean == "previous_x"):
            torch.testing.assert_close(out["pred_xstart"], x_0, rtol=1e-9, atol=1e-9)
    told = [t if scale is None else float(torch.tensor(t).float() * scale) for t in reversed(steps)]
    assert [t for t, _ in model.seen] == told
    assert {dtype for _, dtype in model.seen} == {torch.int64 if scale is None else torch.float32}
    torch.manual_seed(2)
    final = getattr(diffusion, name)(model, SHAPE, start(), **given)
    assert torch.equal(final, seen[-1]["sample"])


@pytest.mark.parametrize("clip, cond_fn", [*itertools.product([True, False], [None, gradient])])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_ancestral_sampling(mean, variance, clip, cond_fn):
    assert_same_loop("p", mean, variance, clip=clip, cond_fn=cond_fn)


@pytest.mark.parametrize("clip, cond_fn", [*itertools.product([True, False], [None, gradient])])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("mean", MEANS)
def test_ddim(mean, eta, clip, cond_fn):
    assert_same_loop("ddim", mean, "fixed_small", eta=eta, clip=clip, cond_fn=cond_fn)


@pytest.mark.parametrize("kind, mean", [("p", "epsilon"), ("p", "start_x"), *(("ddim", mean) for mean in MEANS)])
@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
@pytest.mark.parametrize("clip, cond_fn", [(True, None), (False, gradient)])
def test_denoised_fn(kind, mean, variance, clip, cond_fn):
    assert_same_loop(kind, mean, variance, clip=clip, cond_fn=cond_fn, denoised_fn=shrunk)


def test_no_respacing_is_all_time_steps():
    assert GaussianDiffusion(BETAS, use_timesteps="").timestep_map == list(range(STEPS))  # their scripts' default


@pytest.mark.parametrize("kind", ["p", "ddim"])
@pytest.mark.parametrize("scale", [None, 1000 / STEPS])
@pytest.mark.parametrize("respacing", RESPACED)
def test_respacing_and_rescaled_time_steps(kind, respacing, scale):
    assert_same_loop(kind, "epsilon", "learned_range", respacing, scale, cond_fn=gradient)


def test_theirs_is_read_by_its_attributes():
    class ModelMeanType(Enum):
        EPSILON = auto()

    class ModelVarType(Enum):
        LEARNED_RANGE = auto()

    steps = RESPACED["7"]
    bar = np.cumprod(1 - BETAS)[steps]
    spaced = SimpleNamespace(
        betas=1 - bar / np.append(1.0, bar[:-1]),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        rescale_timesteps=True,
        timestep_map=steps,
        original_num_steps=STEPS,
    )
    mine = GaussianDiffusion(BETAS, "epsilon", "learned_range", rescale_timesteps=True, use_timesteps=set(steps))
    model = Model(learned=True)
    one, other = (d.p_sample_loop(model, SHAPE, seeds=1) for d in (mine, GaussianDiffusion.of(spaced)))
    torch.testing.assert_close(one, other)
    with pytest.raises(ConfigError, match="SimpleNamespace is no GaussianDiffusion"):
        GaussianDiffusion.of(SimpleNamespace(betas=BETAS))


def theirs(name="SpacedDiffusion", **methods):
    """A diffusion as DiT has it: without rescale_timesteps, with what the front has not."""
    attributes = dict(betas=BETAS, model_mean_type="epsilon", model_var_type="fixed_small", training_losses="losses")
    return type(name, (), {**attributes, **methods})()


def test_what_the_front_has_not_is_theirs():
    front = GaussianDiffusion.of(theirs())
    assert front.training_losses == "losses"
    assert not front.rescale_timesteps
    with pytest.raises(AttributeError, match="calc_bpd_loop"):
        front.calc_bpd_loop  # noqa: B018
    with pytest.raises(AttributeError, match=r"no training_losses: it samples; GaussianDiffusion\.of"):
        GaussianDiffusion(BETAS).training_losses  # noqa: B018


def test_a_diffusion_that_samples_otherwise_is_refused():
    with pytest.raises(ConfigError, match=r"a Mine samples otherwise .* \(its p_mean_variance is another\)"):
        GaussianDiffusion.of(theirs("Mine", p_mean_variance=lambda self: None))
    other = lambda self, model, shape, dump_steps=None: None  # noqa: E731  # the arguments of motion diffusion's
    with pytest.raises(ConfigError, match="its p_sample_loop is another"):
        GaussianDiffusion.of(theirs(p_sample_loop=other))
    GaussianDiffusion.of(theirs(p_sample_loop=lambda self, model, shape, noise=None: None))


def test_the_start_is_torchs_noise():
    diffusion, model = GaussianDiffusion(BETAS), Model()
    torch.manual_seed(4)
    drawn = diffusion.ddim_sample_loop(model, SHAPE)
    torch.manual_seed(4)
    given = diffusion.ddim_sample_loop(model, SHAPE, noise=torch.randn(*SHAPE))
    assert torch.equal(drawn, given)
    assert drawn.dtype == torch.float32


@pytest.mark.parametrize("kind", ["p_sample_loop", "ddim_sample_loop"])
def test_the_noise_of_seeds_does_not_depend_on_the_batch(kind):
    diffusion, model = GaussianDiffusion(BETAS, model_var_type="learned"), Model(learned=True)
    sample = getattr(diffusion, kind)
    options = {"eta": 0.6} if kind.startswith("ddim") else {}
    state = torch.get_rng_state()
    both = sample(model, SHAPE, seeds=[5, 6], **options)
    torch.testing.assert_close(both[1:], sample(model, (1, *SHAPE[1:]), seeds=[6], **options))
    assert not torch.equal(both[0], both[1])
    by_steps = [
        out["sample"] for out in getattr(diffusion, f"{kind}_progressive")(model, SHAPE, seeds=[5, 6], **options)
    ]
    assert torch.equal(both, by_steps[-1]), "a Sampler's loop and the progressive one"
    assert torch.equal(sample(model, SHAPE, seeds=[5, 6], cond_fn=lambda x, t: 0 * x, **options), both)
    assert torch.equal(state, torch.get_rng_state()), "torch's random numbers are not touched"


def test_a_sampler_is_kept_for_the_next_call_of_the_same_kind():
    diffusion, model = GaussianDiffusion(BETAS), Model()
    for called in (model, model.forward):  # a bound method is another object at each access
        diffusion.p_sample_loop(called, SHAPE, seeds=0)
        kept = diffusion._last
        diffusion.p_sample_loop(model.forward if called is not model else model, SHAPE, seeds=1)
        assert diffusion._last is kept
        diffusion.ddim_sample_loop(called, SHAPE, seeds=1)
        assert diffusion._last is not kept


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))], ids=["copy", "pickle"])
def test_a_copy_of_a_used_one(copied):
    diffusion, model = GaussianDiffusion.of(GaussianDiffusion(BETAS, use_timesteps="7")), Model()
    expected = diffusion.p_sample_loop(model, SHAPE, seeds=0)
    assert torch.equal(copied(diffusion).p_sample_loop(model, SHAPE, seeds=0), expected)


class Last(Model):
    """A model whose output lies in memory as [B, H, W, C], as that of convolutions in channels_last does."""

    def forward(self, x, t, y=0.0):
        return super().forward(x, t, y).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=["rows", "last"])
@pytest.mark.parametrize("kind", ["p", "ddim"])
@pytest.mark.parametrize("mean", MEANS)
def test_the_noise_is_theirs_in_any_memory_format(mean, kind, given):
    """randn_like draws in the order of memory, which in their loop becomes the model's output's."""
    x, options = start().contiguous(memory_format=given), {"eta": 1.0} if kind == "ddim" else {}
    steps = list(range(STEPS))
    torch.manual_seed(2)
    expected = list(loop(kind, x, mean, "fixed_small", steps, made=Last, **options))[-1][0]
    torch.manual_seed(2)
    name = "p_sample_loop" if kind == "p" else "ddim_sample_loop"
    got = getattr(GaussianDiffusion(BETAS, mean), name)(Last(), SHAPE, x, **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_sample_that_is_put_there_is_gone_on_from():
    diffusion, model = GaussianDiffusion(BETAS), Model()
    torch.manual_seed(0)
    for out in diffusion.ddim_sample_loop_progressive(model, SHAPE):
        out["sample"] = torch.zeros(SHAPE)
    torch.manual_seed(0)
    expected = diffusion.ddim_sample_loop(lambda x, t: model(torch.zeros_like(x), t), SHAPE, noise=torch.zeros(SHAPE))
    assert out["pred_xstart"].abs().max() <= 1
    assert expected.shape == out["sample"].shape


def test_q_sample():
    diffusion, x, t = GaussianDiffusion(BETAS, use_timesteps="7"), start(torch.float32), torch.tensor([0, 6])
    noise = torch.randn(SHAPE)
    bar = torch.tensor(np.cumprod(1 - BETAS)[[0, 29]]).float()[:, None, None, None]
    torch.testing.assert_close(diffusion.q_sample(x, t, noise), bar.sqrt() * x + (1 - bar).sqrt() * noise)
    torch.manual_seed(0)
    drawn = diffusion.q_sample(x, t)
    torch.manual_seed(0)
    assert torch.equal(drawn, diffusion.q_sample(x, t, torch.randn_like(x)))
    low = diffusion.q_sample(x.bfloat16(), t, noise.bfloat16())
    torch.testing.assert_close(low, diffusion.q_sample(x.bfloat16().float(), t, noise.bfloat16().float()))  # float32


@pytest.mark.parametrize(
    "given, says",
    [
        ({"model_mean_type": "v"}, "model_mean_type is 'v'"),
        ({"model_var_type": None}, "model_var_type is None"),
        ({"betas": [2.0]}, "beta"),
        ({"use_timesteps": [0, STEPS]}, "use_timesteps"),
        ({"use_timesteps": []}, "use_timesteps"),
        ({"use_timesteps": "50"}, "section 0 of 1 has 30"),
        ({"use_timesteps": 25}, "use_timesteps are not all"),
        ({"use_timesteps": ["a", 1]}, "use_timesteps are not all"),
    ],
)
def test_a_wrong_diffusion_is_one_line(given, says):
    with pytest.raises(ConfigError, match=says) as caught:
        GaussianDiffusion(**{"betas": BETAS, **given})
    assert "\n" not in str(caught.value)


def test_a_wrong_call_is_one_line():
    diffusion = GaussianDiffusion(BETAS, "previous_x")
    with pytest.raises(ConfigError, match="denoised_fn changes no sample"):
        diffusion.p_sample_loop(Model(), SHAPE, denoised_fn=shrunk)
    with pytest.raises(InputError, match="noise has shape"):
        diffusion.p_sample_loop(Model(), SHAPE, noise=torch.zeros(1, 3, 4, 4))
    for wrong, says in (
        ({"noise": np.zeros(SHAPE)}, "noise is a ndarray"),
        ({"shape": 4}, "shape is 4; needed"),
        ({"shape": (0, 3, 4, 4)}, r"shape is \(0, 3, 4, 4\)"),
        ({"model": None}, "model is a NoneType"),
        ({"model": lambda x, t: (x, x)}, "the model returned a tuple"),
        (
            {"model": lambda x, t: torch.cat([x, x], dim=1)},
            r"needed: \(2, 3, 4, 4\), as model_var_type is 'fixed_small'",
        ),
        ({"device": "foo"}, "device is 'foo'"),
        ({"cond_fn": lambda x, t: None}, "cond_fn returned a NoneType"),
        ({"denoised_fn": lambda x: None}, "denoised_fn returned NoneType"),
        ({"denoised_fn": lambda x: x[:1]}, r"denoised_fn returned \(1, 3, 4, 4\)"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            diffusion.ddim_sample_loop(**{"model": Model(), "shape": SHAPE, **wrong})
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="eta is 2"):
        diffusion.ddim_sample_loop(Model(), SHAPE, eta=2.0)
    with pytest.raises(NonFiniteError, match="sample 0 is not finite from step 0"):
        diffusion.p_sample_loop(lambda x, t: x / 0 * 0, SHAPE)


def test_the_signatures_are_guided_diffusions():
    common = ["self", "model", "shape", "noise", "clip_denoised", "denoised_fn", "cond_fn", "model_kwargs", "device"]
    for name, own in (("p_sample_loop", ["progress"]), ("ddim_sample_loop", ["progress", "eta"])):
        for suffix in ("", "_progressive"):
            parameters = inspect.signature(getattr(GaussianDiffusion, name + suffix)).parameters.values()
            assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == common + own

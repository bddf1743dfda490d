"""The real guided-diffusion's loops against the front: float64, and float32 with its own tables.

The package is guided-diffusion-sdk 1.0.0, OpenAI's code with more arguments in its loops; or a checkout of
openai/guided-diffusion (22e0df8) on PYTHONPATH, whose diffusions `GaussianDiffusion.of` takes as they are.
"""

import inspect
import itertools
import warnings

import pytest
import torch
from torch import nn

from fastddpm.errors import ConfigError
from fastddpm.integrations.guided_diffusion import GaussianDiffusion

WHERE = "pip install --no-deps guided-diffusion-sdk, or a checkout of openai/guided-diffusion on PYTHONPATH"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, for torch.cuda.amp
    pytest.importorskip("guided_diffusion", reason=WHERE)
    theirs = pytest.importorskip("guided_diffusion.gaussian_diffusion", reason=WHERE)
    respace = pytest.importorskip("guided_diffusion.respace", reason=WHERE)

SHAPE = (2, 3, 8, 8)
TAKEN = set(inspect.signature(theirs.GaussianDiffusion.p_sample_loop).parameters) <= set(
    inspect.signature(GaussianDiffusion.p_sample_loop).parameters
)


class Model(nn.Module):
    def __init__(self, learned):
        super().__init__()
        self.weight, self.learned, self.seen = nn.Parameter(torch.ones(1)), learned, []

    def forward(self, x, t, y):
        self.seen.append(t.tolist())
        per_sample = (0.1 * y + t / 600).to(x.dtype)[:, None, None, None]
        out = torch.tanh(1.2 * x + per_sample) + 0.1 * x.roll(1, -1)
        return torch.cat([out, torch.tanh(2 * x)], dim=1) if self.learned else out


def gradient(x, t, y):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return 0.3 * torch.autograd.grad(torch.sin(x + y[:, None, None, None]).sum(), x)[0]


def exact(values, t, shape):
    """Theirs rounds its tables to float32."""
    return torch.from_numpy(values)[t].reshape(-1, *[1] * (len(shape) - 1)).expand(shape)


def assert_same(kind, dtype, mean, variance, respacing, *, steps=100, rescale=False, schedule="linear", **given):
    betas = theirs.get_named_beta_schedule(schedule, steps)
    types = dict(
        model_mean_type=mean, model_var_type=variance, loss_type=theirs.LossType.MSE, rescale_timesteps=rescale
    )
    own = respace.SpacedDiffusion(respace.space_timesteps(steps, respacing), betas=betas, **types)
    fronts = [GaussianDiffusion(betas, **types, use_timesteps=respacing)]
    fronts += [GaussianDiffusion.of(own)] if TAKEN else []
    model = Model(variance.name.startswith("LEARNED"))
    given |= {"model_kwargs": {"y": torch.tensor([1, 3])}, "noise": torch.randn(SHAPE).to(dtype)}
    runs = []
    for diffusion in (own, *fronts):
        model.seen.clear()
        torch.manual_seed(1)
        outs = list(getattr(diffusion, f"{kind}_sample_loop_progressive")(model, SHAPE, **given))
        kept = ["sample", "pred_xstart"]
        if not TAKEN and kind == "ddim" and "cond_fn" in given:
            kept.pop()  # the package's is the x_0 before cond_fn; OpenAI's, and the front's, the one behind it
        runs.append(([[out[name] for name in kept] for out in outs], list(model.seen), torch.rand(1)))
    (expected, told, after), *others = runs
    # theirs rounds cond_fn's gradient to float32
    close = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 and "cond_fn" not in given else dict(rtol=0, atol=3e-4)
    for got, seen, then in others:
        assert seen == told
        assert torch.equal(then, after)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("variance", theirs.ModelVarType, ids=lambda v: v.name)
@pytest.mark.parametrize("mean", theirs.ModelMeanType, ids=lambda v: v.name)
def test_the_loops_are_its_own(mean, variance, dtype, monkeypatch):
    if dtype == torch.float64:
        monkeypatch.setattr(theirs, "_extract_into_tensor", exact)
    functions = [{}, {"cond_fn": gradient}, {"denoised_fn": lambda x: 0.9 * x}]
    for given, clip in itertools.product(functions, [True, False]):
        for kind, eta in (("p", {}), ("ddim", {"eta": 0.0}), ("ddim", {"eta": 0.7})):
            if kind == "p" and mean.name == "PREVIOUS_X" and "denoised_fn" in given:
                continue  # refused: it changes nothing
            assert_same(kind, dtype, mean, variance, "7", clip_denoised=clip, **given, **eta)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps, respacing", [(100, "ddim25"), (300, "10,15,20"), (1000, "25"), (50, "50")])
def test_respacing_is_its_own(steps, respacing, schedule, rescale, monkeypatch):
    monkeypatch.setattr(theirs, "_extract_into_tensor", exact)
    types = theirs.ModelMeanType.EPSILON, theirs.ModelVarType.LEARNED_RANGE
    for kind in ("p", "ddim"):
        assert_same(kind, torch.float64, *types, respacing, steps=steps, schedule=schedule, rescale=rescale)


def test_what_it_alone_has():
    types = dict(
        model_mean_type=theirs.ModelMeanType.EPSILON,
        model_var_type=theirs.ModelVarType.LEARNED_RANGE,
        loss_type=theirs.LossType.RESCALED_MSE,
    )
    own = respace.SpacedDiffusion({0, 5, 9}, betas=theirs.get_named_beta_schedule("cosine", 10), **types)
    if not TAKEN:
        with pytest.raises(ConfigError, match="its p_sample_loop is another"):
            GaussianDiffusion.of(own)
        return
    front, model = GaussianDiffusion.of(own), Model(True)
    x, t, given = torch.randn(SHAPE), torch.tensor([0, 2]), {"model_kwargs": {"y": torch.tensor([1, 3])}}
    torch.testing.assert_close(front.q_sample(x, t, x), own.q_sample(x, t, x))
    for name, arguments in (("training_losses", (x, t)), ("calc_bpd_loop", (x,)), ("ddim_reverse_sample", (x, t))):
        made = []
        for diffusion in (own, front):
            torch.manual_seed(0)
            made.append(getattr(diffusion, name)(model, *arguments, **given))
        assert made[0].keys() == made[1].keys()
        assert all(torch.equal(made[0][k], made[1][k]) for k in made[0])

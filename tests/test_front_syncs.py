"""No step of the peers' fronts waits for the device: 30 steps read no more values than 10: those of the last check."""

import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastddpm.integrations.edm import edm_sampler
from fastddpm.integrations.guided_diffusion import GaussianDiffusion

SHAPE, T = (2, 3, 4, 4), 60
READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "repeat_interleave")
MASKED = ("index", "index_put", "index_put_")


class Waits(TorchDispatchMode):
    """Counts what makes a GPU's host wait: values read, sizes that depend on values, tensors made of Python's numbers.

    A tensor of Python's numbers (lift_fresh) is a blocking copy to the device, a boolean mask as an index a nonzero.
    What the kernels' CPU implementation reads isn't counted: a GPU runs another one.
    """

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masked = name in MASKED and any(t is not None and t.dtype == torch.bool for t in args[1])
        if (masked or name in READS or name == "lift_fresh") and not on_the_cpu_alone():
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def on_the_cpu_alone():
    frame = sys._getframe()
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module == "fastddpm_kernels.reference" or (module.startswith("fastddpm_kernels.") and name.endswith("_cpu")):
            return True
        frame = frame.f_back
    return False


def waits(run, steps):
    run(steps)  # what is made once, is made
    with Waits() as mode:
        run(steps)
    return mode.seen


class Model(nn.Module):
    def __init__(self, learned=False):
        super().__init__()
        self.layer, self.learned = nn.Conv2d(3, 6 if learned else 3, 3, padding=1), learned

    def forward(self, x, t, y=0.0):
        return self.layer(x) + y


def gradient(x, t, y=0.0):
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        return torch.autograd.grad(x.sin().sum(), x)[0]


def guided(name, **given):
    learned = given.pop("learned", False)
    model, variance = Model(learned), "learned_range" if learned else "fixed_small"

    def run(steps):
        diffusion = GaussianDiffusion(np.linspace(1e-3, 0.1, T), "epsilon", variance, use_timesteps=str(steps))
        return getattr(diffusion, name)(model, SHAPE, model_kwargs={"y": 0.1}, **given)

    return run


def edm(**given):
    layer, latents = nn.Conv2d(3, 3, 3, padding=1), torch.randn(SHAPE)
    net = lambda x, sigma, labels: layer(x.float()) / (1 + sigma[:, None, None, None])  # noqa: E731
    return lambda steps: edm_sampler(net, latents, num_steps=steps, S_churn=5.0, **given)


def policy(kind, known, **given):
    schedulers = pytest.importorskip("diffusers", reason="diffusers has the policies' schedulers")
    from fastddpm.integrations.diffusion_policy import PolicySampler

    layer, mask = nn.Linear(4, 4), torch.zeros(3, 8, 4, dtype=torch.bool)
    mask[:, :2] = known
    condition = {"condition_data": torch.zeros(3, 8, 4), "condition_mask": mask}
    kept = {
        n: PolicySampler(lambda x, t: layer(x), getattr(schedulers, kind)(num_train_timesteps=T), n, **given)
        for n in (10, 30)
    }
    return lambda steps: kept[steps].sample((3, 8, 4), **condition)


def lucidrains(seeds=None, **options):
    from test_lucidrains import ddp  # skips, with its reason, where the package isn't installed

    import fastddpm

    def run(steps):
        model = kept.setdefault(steps, ddp.Unet(8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, **options).eval())
        diffusion = ddp.GaussianDiffusion(model, image_size=8, timesteps=T, sampling_timesteps=steps)
        return fastddpm.accelerate(diffusion).sample(2, seeds=seeds)

    kept = {}
    return run


FRONTS = {
    "guided p": lambda: guided("p_sample_loop"),
    "guided p, learned": lambda: guided("p_sample_loop", learned=True),
    "guided p, cond_fn, denoised_fn": lambda: guided(
        "p_sample_loop", learned=True, cond_fn=gradient, denoised_fn=torch.tanh
    ),
    "guided p, seeds": lambda: guided("p_sample_loop", seeds=1),
    "guided p, seeds, cond_fn": lambda: guided("p_sample_loop", seeds=1, cond_fn=gradient),
    "guided ddim": lambda: guided("ddim_sample_loop", eta=0.5),
    "guided ddim, cond_fn": lambda: guided("ddim_sample_loop", cond_fn=gradient),
    "edm": edm,
    "edm, float32": lambda: edm(dtype=torch.float32),
    "edm, seeds": lambda: edm(dtype=torch.float32, seeds=1),
    "policy DDPM": lambda: policy("DDPMScheduler", False),
    "policy DDPM, known": lambda: policy("DDPMScheduler", True),
    "policy DDIM": lambda: policy("DDIMScheduler", True, eta=0.5),
    "lucidrains": lucidrains,
    "lucidrains, self-conditioning": lambda: lucidrains(self_condition=True),
    "lucidrains, seeds": lambda: lucidrains(seeds=1),
}


@pytest.mark.parametrize("name", FRONTS)
def test_no_step_waits_for_the_device(name):
    run = FRONTS[name]()
    short, long = waits(run, 10), waits(run, 30)
    assert short == long, f"more in 30 steps than in 10: {long - short}"


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: torch.tensor([1.0])])
def test_it_would_be_seen(read):
    def model(x, t):
        read(x)
        return x

    run = lambda steps: GaussianDiffusion(np.full(T, 0.1), use_timesteps=str(steps)).p_sample_loop(model, SHAPE)  # noqa: E731
    more = waits(run, 30) - waits(run, 10)
    assert sum(more.values()) >= 20

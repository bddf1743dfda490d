"""What `integrations.py` times: each peer's own loop, and ours in its place, from the same random numbers.

A case is a function of `Setup` that yields `Race`s; it raises `Missing` where its peer isn't there. The peer's code is
the real one, but for two loops in `peers`.
"""

from __future__ import annotations

import copy
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

import fastddpm
from benchmarks import results
from benchmarks.peers import CHECKOUT, Missing, algorithm_2, conditional_sample, imported
from fastddpm import Sampler, k_sampling
from fastddpm.integrations import diffusers as fused
from fastddpm.integrations.diffusion_policy import PolicySampler
from fastddpm.integrations.edm import edm_sampler
from fastddpm.integrations.guided_diffusion import GaussianDiffusion

OBSERVED, ACTIONS = 20, (16, 2)
LUCIDRAINS = ("torchvision", "accelerate", "ema_pytorch", "pytorch_fid.fid_score", "pytorch_fid.inception")
K_DIFFUSION = ("torchvision.transforms", "torchdiffeq", "torchsde")  # no sampler that is timed calls these


@dataclass(frozen=True)
class Race:
    """One loop of a peer.

    Attributes:
        loop: its name and what is peculiar about it.
        evaluations: of the network, in a trajectory.
        peer, ours: run a trajectory, the random numbers of both from torch's global generator at seed 0.
        network: the network alone, as often.
        sampler: the same solver by `Sampler` (on CUDA a graph a step), with noise of seeds; None: it has no such way.
        atol: how far ours may be from the peer's.
        same: whether the sampler's result is the peer's too (it starts from the same x_T, and nothing else is drawn).
    """

    loop: str
    evaluations: int
    peer: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    network: Callable[[], object]
    sampler: Callable[[], Tensor] | None = None
    atol: float = 1e-4
    same: bool = False


class Free(diffusers.UNet2DModel):
    """As little as a network can do."""

    def forward(self, sample: Tensor, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=0.1 * sample)


class FreePolicy(nn.Module):
    """`Free`, for trajectories."""

    def forward(self, x: Tensor, t: Tensor, local_cond: Any = None, global_cond: Any = None) -> Tensor:
        return 0.1 * x


class Plain(nn.Module):
    """A unet that returns a tensor, with what lucidrains' library asks of a network; `twice`: a learned variance."""

    channels = out_dim = 3
    self_condition = False

    def __init__(self, unet: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.unet, self.twice = unet, twice

    def forward(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        m = self.unet(x, t).sample
        return torch.cat([m, m], dim=1) if self.twice else m


class Denoiser(nn.Module):
    """D(x; sigma) of arXiv 2206.00364, eq. 7 and table 1, float32 inside; of `Free` its output as it is."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, sigma: Tensor, class_labels: None = None) -> Tensor:
        if isinstance(self.unet, Free):
            return 0.1 * x
        s, x = sigma.float()[:, None, None, None], x.float()
        norm = torch.sqrt(s**2 + 0.25)
        return 0.25 / norm**2 * x + 0.5 * s / norm * self.unet(x / norm, sigma.float().log() / 4).sample


@dataclass(frozen=True)
class Setup:
    """Sizes, and where; `free`: the networks cost nothing."""

    device: torch.device
    steps: int
    batch: int
    size: int
    free: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pictures."""
        return self.batch, 3, self.size, self.size

    @cached_property
    def unet(self) -> diffusers.UNet2DModel:
        """A small real one, its last layer's weights small so that it doesn't enlarge rounding; or `Free`."""
        torch.manual_seed(0)
        made = (Free if self.free else diffusers.UNet2DModel)(
            sample_size=self.size,
            layers_per_block=1,
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        made.conv_out.weight.data.mul_(0.1)
        return made.eval().to(self.device)

    def repeated(self, network: Callable[..., object], evaluations: int) -> Callable[[], None]:
        """Network(x, t) so many times."""
        x, t = torch.randn(self.shape, device=self.device), torch.full((self.batch,), 5, device=self.device)

        def alone() -> None:
            for _ in range(evaluations):
                network(x, t)

        return alone


def seeded(call: Callable[..., Tensor], *args: Any, **words: Any) -> Callable[[], Tensor]:
    """`call` with these arguments behind torch.manual_seed(0)."""

    def run() -> Tensor:
        torch.manual_seed(0)
        return call(*args, **words)

    return run


def pipelines(s: Setup) -> Iterator[Race]:
    """diffusers' pipelines, accelerated."""
    for name in ("DDPM", "DDIM"):
        calls = []
        for _ in ("theirs", "ours"):
            pipe = getattr(diffusers, f"{name}Pipeline")(s.unet, getattr(diffusers, f"{name}Scheduler")())
            pipe.set_progress_bar_config(disable=True)
            calls.append(partial(pictures, pipe, s.batch, s.steps))
        fastddpm.accelerate(pipe)
        network = s.repeated(s.unet, s.steps)
        yield Race(f"{name}Pipeline", s.steps, *map(seeded, calls), network, partial(calls[1], seeds=0))


def pictures(pipe: Any, batch: int, steps: int, **more: Any) -> Tensor:
    """A pipeline's call."""
    return pipe(batch, num_inference_steps=steps, output_type="pt", return_dict=False, **more)[0]


def schedulers(s: Setup) -> Iterator[Race]:
    """The loop of diffusers' pipelines with each scheduler that there is a fused one of."""
    for name in (name for name in fused.__all__ if name.startswith("Fused")):
        pair = getattr(diffusers, name.removeprefix("Fused"))(), getattr(fused, name)()
        calls = [seeded(scheduled, s, scheduler) for scheduler in pair]
        pair[0].set_timesteps(s.steps)
        n = len(pair[0].timesteps)
        yield Race(name.removeprefix("Fused"), n, *calls, s.repeated(s.unet, n), atol=1e-5)


def scheduled(s: Setup, scheduler: Any) -> Tensor:
    """diffusers' loop, as its pipelines have it."""
    scheduler.set_timesteps(s.steps, device=s.device)
    x = torch.randn(s.shape, device=s.device) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = s.unet(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def policy(s: Setup) -> Iterator[Race]:
    """Diffusion Policy's `conditional_sample`."""
    torch.manual_seed(0)
    unet = runpy.run_path(str(results.ROOT / "examples" / "diffusion_policy.py"))["ConditionalUnet1D"]
    network = (FreePolicy() if s.free else unet(ACTIONS[1], OBSERVED, (64, 128))).eval().to(s.device)
    nothing = torch.zeros(1, *ACTIONS, device=s.device)
    told = {"global_cond": torch.linspace(-1, 1, OBSERVED, device=s.device)[None]}
    given = {"condition_data": nothing, "condition_mask": nothing.bool(), **told}
    t = torch.tensor([5], device=s.device)

    def alone() -> None:
        for _ in range(s.steps):
            network(nothing, t, **told)

    for name in ("DDPM", "DDIM"):
        scheduler = getattr(diffusers, f"{name}Scheduler")(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
        made = PolicySampler(network, scheduler, s.steps)
        theirs = seeded(conditional_sample, network, scheduler, s.steps, nothing, nothing.bool(), **told)
        ours = seeded(made.sample, nothing.shape, **given)
        yield Race(name, s.steps, theirs, ours, alone, partial(made.sample, nothing.shape, seeds=0, **told), atol=1e-5)


def lucidrains(s: Setup) -> Iterator[Race]:
    """denoising-diffusion-pytorch's `GaussianDiffusion.sample`."""
    how = "pip install --no-deps --target FOLDER denoising-diffusion-pytorch einops, and PYTHONPATH=FOLDER"
    kind = imported("denoising_diffusion_pytorch", LUCIDRAINS, how).GaussianDiffusion
    options: dict[str, dict[str, Any]] = {
        "sample, DDPM": dict(timesteps=s.steps),
        "sample, DDIM": dict(timesteps=1000, sampling_timesteps=s.steps),
    }
    for loop, words in options.items():
        theirs = kind(Plain(s.unet), image_size=s.size, **words).eval().to(s.device)
        ours = fastddpm.accelerate(copy.deepcopy(theirs))
        calls = seeded(theirs.sample, s.batch), seeded(ours.sample, s.batch), s.repeated(theirs.model, s.steps)
        yield Race(loop, s.steps, *calls, partial(ours.sample, s.batch, seeds=0))


def guided_diffusion(s: Setup) -> Iterator[Race]:
    """openai's guided-diffusion: its loops with a learned sigma, as its models have."""
    where = os.environ.get(CHECKOUT)
    if not where:
        raise Missing(f"no checkout: git clone https://github.com/openai/guided-diffusion, and {CHECKOUT}=its path")
    if where not in sys.path:
        sys.path.insert(0, where)
    theirs = imported("guided_diffusion.gaussian_diffusion", (), f"{CHECKOUT}={where} has none")
    respace = importlib.import_module("guided_diffusion.respace")
    spaced = respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, str(s.steps)),
        betas=theirs.get_named_beta_schedule("linear", 1000),
        model_mean_type=theirs.ModelMeanType.EPSILON,
        model_var_type=theirs.ModelVarType.LEARNED_RANGE,
        loss_type=theirs.LossType.MSE,
    )
    ours, model = GaussianDiffusion.of(spaced), Plain(s.unet, twice=True)
    for loop in ("p_sample_loop", "ddim_sample_loop"):
        calls = [seeded(getattr(d, loop), model, s.shape) for d in (spaced, ours)]
        sampler = partial(getattr(ours, loop), model, s.shape, seeds=0)
        yield Race(loop, s.steps, *calls, s.repeated(model, s.steps), sampler)


def k_diffusion(s: Setup) -> Iterator[Race]:
    """k-diffusion's samplers through Karras' noise levels."""
    theirs = imported("k_diffusion.sampling", K_DIFFUSION, "pip install --no-deps --target FOLDER k-diffusion", True)
    sigmas = theirs.get_sigmas_karras(s.steps, 0.01, 80.0, device=s.device)
    model = Denoiser(s.unet)
    x = 80.0 * torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(s.device)
    twos, noisy = ("heun",), ("euler_ancestral", "dpmpp_2m_sde")
    for name in ("euler", "heun", "euler_ancestral", "lms", "dpmpp_2m", "dpmpp_2m_sde"):
        n = 2 * s.steps - 1 if name in twos else s.steps
        more = {"noise_sampler": lambda *_: torch.randn_like(x)} if name == "dpmpp_2m_sde" else {}
        calls = [
            seeded(getattr(module, f"sample_{name}"), model, x, sigmas, disable=True, **more)
            for module in (theirs, k_sampling)
        ]
        whole = partial(Sampler(model, k_sampling.table(name, sigmas)).sample, s.shape, seeds=0, x_T=x)
        yield Race(f"sample_{name}", n, *calls, s.repeated(model, n), whole, 2e-4, name not in noisy)


def edm(s: Setup) -> Iterator[Race]:
    """EDM's sampler, the state in float64 (on CUDA ours is float32)."""
    net, n = Denoiser(s.unet), 2 * s.steps - 1
    latents = torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(s.device)
    for loop, churn in (("algorithm 2", 0.0), ("algorithm 2, S_churn 40", 40.0)):
        theirs = seeded(algorithm_2, net, latents, s.steps, churn)
        ours, sampler = (
            seeded(edm_sampler, net, latents, num_steps=s.steps, S_churn=churn, **more)
            for more in ({}, {"seeds": 0, "dtype": torch.float32})
        )
        yield Race(loop, n, theirs, ours, s.repeated(net, n), sampler, 2e-4, churn == 0)


CASES: dict[str, Callable[[Setup], Iterator[Race]]] = {
    "diffusers, accelerate": pipelines,
    "diffusers, scheduler": schedulers,
    "Diffusion Policy": policy,
    "lucidrains": lucidrains,
    "guided-diffusion": guided_diffusion,
    "k-diffusion": k_diffusion,
    "EDM": edm,
}

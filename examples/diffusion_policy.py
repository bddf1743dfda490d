"""Diffusion Policy and LeRobot: two lines make the sampling loop fastddpm's. Random weights; needs diffusers.

`Policy` stands in for diffusion_policy.policy.DiffusionUnetLowdimPolicy, whose loop it has; the network is one like its
ConditionalUnet1D. With the real package, or lerobot, the two lines are the same.
"""

import sys
import time

import torch
from torch import Tensor, nn

try:
    from diffusers import DDIMScheduler
except ImportError:
    sys.exit(print("diffusers isn't installed", file=sys.stderr) or 77)


def block(ins: int, outs: int) -> nn.Sequential:
    """Conv1d, GroupNorm, Mish."""
    return nn.Sequential(nn.Conv1d(ins, outs, 3, padding=1), nn.GroupNorm(8, outs), nn.Mish())


class Residual(nn.Module):
    """Two blocks with FiLM between them: a scale and a shift from the condition (arXiv 1709.07871)."""

    def __init__(self, ins: int, outs: int, cond: int) -> None:
        super().__init__()
        self.first, self.second = block(ins, outs), block(outs, outs)
        self.film = nn.Sequential(nn.Mish(), nn.Linear(cond, 2 * outs))
        self.skip = nn.Conv1d(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond)[..., None].chunk(2, dim=1)
        return self.second(scale * self.first(x) + shift) + self.skip(x)


class ConditionalUnet1D(nn.Module):
    """eps(x, t, global_cond) of trajectories [B, horizon, dim]; the horizon is halved once for each width but one."""

    def __init__(self, dim: int, cond: int = 0, widths: tuple[int, ...] = (32, 64), local_cond: int = 0) -> None:
        super().__init__()
        self.embedding = 64
        self.time = nn.Sequential(nn.Linear(64, 256), nn.Mish(), nn.Linear(256, 64))
        cond += 64
        ends = list(zip((dim, *widths[:-1]), widths, strict=True))
        self.local = Residual(local_cond, widths[0], cond) if local_cond else None
        self.downs = nn.ModuleList([Residual(a, b, cond) for a, b in ends])
        self.downs_too = nn.ModuleList([Residual(b, b, cond) for _, b in ends])
        self.shrink = nn.ModuleList([nn.Conv1d(b, b, 3, stride=2, padding=1) for b in widths[:-1]])
        self.middle = nn.ModuleList([Residual(widths[-1], widths[-1], cond) for _ in range(2)])
        self.ups = nn.ModuleList([Residual(2 * b, a, cond) for a, b in ends[:0:-1]])
        self.ups_too = nn.ModuleList([Residual(a, a, cond) for a, _ in ends[:0:-1]])
        self.grow = nn.ModuleList([nn.ConvTranspose1d(a, a, 4, stride=2, padding=1) for a, _ in ends[:0:-1]])
        self.last = nn.Sequential(block(widths[0], widths[0]), nn.Conv1d(widths[0], dim, 1))

    def forward(
        self, x: Tensor, t: Tensor, local_cond: Tensor | None = None, global_cond: Tensor | None = None
    ) -> Tensor:
        half = self.embedding // 2
        rates = torch.exp(torch.arange(half, device=x.device) * (-9.21 / (half - 1)))
        angles = t.expand(len(x))[:, None] * rates
        cond = self.time(torch.cat([angles.sin(), angles.cos()], dim=1).to(x.dtype))
        if global_cond is not None:
            cond = torch.cat([cond, global_cond], dim=1)
        h, kept = x.transpose(1, 2), []
        for i, (first, second) in enumerate(zip(self.downs, self.downs_too, strict=True)):
            h = first(h, cond)
            if i == 0 and self.local is not None and local_cond is not None:
                h = h + self.local(local_cond.transpose(1, 2), cond)
            h = second(h, cond)
            kept.append(h)
            h = self.shrink[i](h) if i < len(self.shrink) else h
        for layer in self.middle:
            h = layer(h, cond)
        for first, second, grow in zip(self.ups, self.ups_too, self.grow, strict=True):
            h = grow(second(first(torch.cat([h, kept.pop()], dim=1), cond), cond))
        return self.last(h).transpose(1, 2)


class Policy(nn.Module):
    """The part of a DiffusionUnetLowdimPolicy that samples: eight actions from the last two observations."""

    def __init__(self, model: nn.Module, noise_scheduler: object, num_inference_steps: int) -> None:
        super().__init__()
        self.model, self.noise_scheduler, self.num_inference_steps = model, noise_scheduler, num_inference_steps

    def conditional_sample(
        self, condition_data, condition_mask, local_cond=None, global_cond=None, generator=None, **kwargs
    ):
        trajectory = torch.randn(condition_data.shape, dtype=condition_data.dtype, generator=generator)
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            trajectory[condition_mask] = condition_data[condition_mask]
            output = self.model(trajectory, t, local_cond=local_cond, global_cond=global_cond)
            trajectory = self.noise_scheduler.step(output, t, trajectory, generator=generator, **kwargs).prev_sample
        trajectory[condition_mask] = condition_data[condition_mask]
        return trajectory

    @torch.no_grad()
    def predict_action(self, obs: Tensor) -> Tensor:
        nothing = torch.zeros(len(obs), 16, 2)
        drawn = self.conditional_sample(nothing, nothing.bool(), global_cond=obs.flatten(1))
        return drawn[:, 1:9]


def main() -> None:
    torch.manual_seed(0)
    network = ConditionalUnet1D(dim=2, cond=2 * 5).eval()
    scheduler = DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    policy, obs = Policy(network, scheduler, num_inference_steps=16), torch.randn(1, 2, 5)

    def actions() -> Tensor:
        torch.manual_seed(1)
        began = time.perf_counter()
        made = policy.predict_action(obs)
        print(f"{1000 * (time.perf_counter() - began):.1f} ms")
        return made

    theirs = actions()

    from fastddpm.integrations.diffusion_policy import accelerate_policy

    policy = accelerate_policy(policy)

    ours = actions()
    print(f"actions {list(ours.shape)}, largest difference {float((ours - theirs).abs().max()):.1e}")


if __name__ == "__main__":
    main()

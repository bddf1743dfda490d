"""The 1-D UNets of Diffusion Policy (real-stanford/diffusion_policy) and LeRobot, as plain modules for the tests.

Written from the description of the networks; layers and parameters have the names of both packages' checkpoints. What
neither does: the time embedding is made float64 or bfloat16 with the weights, so that the networks run in these.
"""

import math

import torch
from torch import nn

SMALL = dict(widths=(16, 24), embedding=16, observed=6, kernel=5, groups=4)


class Position(nn.Module):
    """Sines and cosines of the time step; float32, whatever the weights are."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t):
        half = self.dim // 2
        rates = torch.exp(torch.arange(half, device=t.device) * -(math.log(10000) / (half - 1)))
        angles = t[:, None] * rates[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class View(nn.Module):
    """What einops' Rearrange("batch t -> batch t 1") does."""

    def forward(self, x):
        return x[..., None]


class Wrapped(nn.Module):
    """A layer of this name in a module of its own, as Downsample1d has its convolution."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.add_module(name, layer)

    def forward(self, x):
        return next(self.children())(x)


def block(ins: int, outs: int, kernel: int, groups: int) -> nn.Module:
    layers = nn.Conv1d(ins, outs, kernel, padding=kernel // 2), nn.GroupNorm(groups, outs), nn.Mish()
    return Wrapped("block", nn.Sequential(*layers))


class Residual(nn.Module):
    def __init__(self, ins, outs, cond, *, kernel, groups, scale, lerobot) -> None:
        super().__init__()
        first, second = block(ins, outs, kernel, groups), block(outs, outs, kernel, groups)
        film = [nn.Mish(), nn.Linear(cond, 2 * outs if scale else outs)]
        if lerobot:
            self.conv1, self.conv2 = first, second
        else:
            self.blocks = nn.ModuleList([first, second])
            film.append(View())
        self.outs, self.scale = outs, scale
        self.cond_encoder = nn.Sequential(*film)
        self.residual_conv = nn.Conv1d(ins, outs, 1) if ins != outs else nn.Identity()

    def forward(self, x, cond):
        first, second = self.blocks if hasattr(self, "blocks") else (self.conv1, self.conv2)
        film = self.cond_encoder(cond).reshape(len(x), -1, 1)
        out = first(x)
        out = film[:, : self.outs] * out + film[:, self.outs :] if self.scale else out + film
        return second(out) + self.residual_conv(x)


class PolicyUnet(nn.Module):
    """eps(x, t, global_cond) of trajectories [B, horizon, dim]."""

    def __init__(
        self, dim=2, *, widths=(256, 512, 1024), embedding=256, observed=20, kernel=5, groups=8, scale=True,
        lerobot=False,
    ) -> None:  # fmt: skip
        super().__init__()
        cond = embedding + (observed or 0)
        options = dict(cond=cond, kernel=kernel, groups=groups, scale=scale, lerobot=lerobot)
        hidden = nn.Linear(embedding, 4 * embedding), nn.Mish(), nn.Linear(4 * embedding, embedding)
        self.diffusion_step_encoder = nn.Sequential(Position(embedding), *hidden)
        if not lerobot:
            self.local_cond_encoder = None
        ends = list(zip((dim, *widths[:-1]), widths, strict=True))
        keep = (lambda layer: layer) if lerobot else (lambda layer: Wrapped("conv", layer))
        self.down_modules = nn.ModuleList()
        for i, (ins, outs) in enumerate(ends):
            shrink = keep(nn.Conv1d(outs, outs, 3, 2, 1)) if i < len(ends) - 1 else nn.Identity()
            blocks = Residual(ins, outs, **options), Residual(outs, outs, **options)
            self.down_modules.append(nn.ModuleList([*blocks, shrink]))
        self.mid_modules = nn.ModuleList([Residual(widths[-1], widths[-1], **options) for _ in range(2)])
        self.up_modules = nn.ModuleList()
        for ins, outs in ends[:0:-1]:
            blocks = Residual(2 * outs, ins, **options), Residual(ins, ins, **options)
            self.up_modules.append(nn.ModuleList([*blocks, keep(nn.ConvTranspose1d(ins, ins, 4, 2, 1))]))
        last = block(widths[0], widths[0], kernel, groups)
        self.final_conv = nn.Sequential(last, nn.Conv1d(widths[0], dim, 1))

    def forward(self, x, t, local_cond=None, global_cond=None):
        t = torch.as_tensor(t, device=x.device).expand(len(x))
        position, *hidden = self.diffusion_step_encoder
        cond = nn.Sequential(*hidden)(position(t).to(self.final_conv[1].weight.dtype))
        if global_cond is not None:
            cond = torch.cat([cond, global_cond], dim=-1)
        h, kept = x.transpose(1, 2), []
        for first, second, shrink in self.down_modules:
            h = second(first(h, cond), cond)
            kept.append(h)
            h = shrink(h)
        for layer in self.mid_modules:
            h = layer(h, cond)
        for first, second, grow in self.up_modules:
            h = grow(second(first(torch.cat([h, kept.pop()], dim=1), cond), cond))
        return self.final_conv(h).transpose(1, 2)


def made(seed: int = 0, **options) -> PolicyUnet:
    """A network whose norms have weights of their own, so that each part counts."""
    torch.manual_seed(seed)
    net = PolicyUnet(**options).eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.weight.copy_(1 + 0.3 * torch.randn_like(layer.weight))
            layer.bias.copy_(0.3 * torch.randn_like(layer.bias))
    return net


def given(net: PolicyUnet, batch: int = 3, horizon: int = 8, seed: int = 1):
    """(x, t, global_cond) for it."""
    generator = torch.Generator().manual_seed(seed)
    observed = net.down_modules[0][0].cond_encoder[1].in_features - net.diffusion_step_encoder[3].out_features
    x = torch.randn(batch, horizon, net.final_conv[1].out_channels, generator=generator)
    t = torch.randint(0, 100, (batch,), generator=generator)
    return x, t, torch.randn(batch, observed, generator=generator) if observed else None

"""The compact UNet of DDPM (Ho et al. 2020, arXiv 2006.11239, appendix B), with the parameter
names of diffusers' ``UNet2DModel``: a checkpoint of either loads in the other.

Read it from the bottom up: `UNet` is the network; `Level` is one resolution of it, on the way
down or up; `ResBlock`, `SelfAttention` and `TimeEmbedding` are the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import load_unet, save_unet
from .errors import ConfigError, InputError
from .unet_config import UNetConfig


def timestep_embedding(t: Tensor, dim: int, *, cos_first: bool, freq_shift: float) -> Tensor:
    """Sinusoidal position embedding of the time step: [B] -> [B, dim] (Vaswani et al. 2017, section 3.5).

    Frequencies are 10000^(-i / (dim/2 - freq_shift)). Ho et al. use sin first and freq_shift 1.
    The result is float32, or float64 where `t` is float64.
    """
    half = dim // 2
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    exponent = -math.log(10000.0) * torch.arange(half, dtype=dtype, device=t.device)  # diffusers' order of operations
    frequencies = torch.exp(exponent / (half - freq_shift))
    angle = t.to(dtype)[:, None] * frequencies
    parts = [angle.cos(), angle.sin()] if cos_first else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """Two linear layers with SiLU between them: [B, dim] -> [B, embed_dim]."""

    def __init__(self, dim: int, embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, embed_dim)
        self.linear_2 = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResBlock(nn.Module):
    """GroupNorm-SiLU-conv twice, the time embedding between, and a shortcut: [B, c_in, H, W] -> [B, c_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, *, rescale: float = 1.0) -> None:
        super().__init__()
        groups, eps = config.norm_num_groups, config.norm_eps
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.rescale = rescale
        self.norm1 = nn.GroupNorm(groups, c_in, eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(config.time_embed_dim, c_out * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(groups, c_out, eps)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, silu_emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time_emb_proj(silu_emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        h = shortcut + h
        return h if self.rescale == 1.0 else h / self.rescale


class SelfAttention(nn.Module):
    """Multi-head self-attention over the H*W positions, with a residual: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, config: UNetConfig, *, groups: int | None, rescale: float = 1.0) -> None:
        super().__init__()
        self.heads = channels // (config.attention_head_dim or channels)
        self.rescale = rescale
        self.group_norm = nn.GroupNorm(groups, channels, config.norm_eps) if groups else nn.Identity()
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        q, k, v = (
            proj(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for proj in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[0](out).transpose(1, 2).reshape(b, c, height, width)
        out = x + out
        return out if self.rescale == 1.0 else out / self.rescale


class Resample(nn.Module):
    """Halve (strided convolution) or double (nearest neighbour, then convolution) the resolution."""

    def __init__(self, channels: int, *, up: bool, padding: int = 1) -> None:
        super().__init__()
        self.up = up
        self.pad_right_bottom = not up and padding == 0
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else padding)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        elif self.pad_right_bottom:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)


class Level(nn.Module):
    """One resolution, on the way down (keeps its outputs as skips) or up (concatenates them)."""

    def __init__(self, widths: Sequence[tuple[int, int]], config: UNetConfig, *, attention: bool) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(ResBlock(c_in, c_out, config) for c_in, c_out in widths)
        if attention:
            self.attentions = nn.ModuleList(SelfAttention(c_out, config, groups=groups) for _, c_out in widths)
        self.attention = attention

    def block(self, i: int, x: Tensor, silu_emb: Tensor) -> Tensor:
        x = self.resnets[i](x, silu_emb)
        return self.attentions[i](x) if self.attention else x


class DownLevel(Level):
    """`layers_per_block` residual blocks, then (not at the last level) a downsampler."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig, *, attention: bool, resample: bool) -> None:
        widths = [(c_in if i == 0 else c_out, c_out) for i in range(config.layers_per_block)]
        super().__init__(widths, config, attention=attention)
        if resample:
            self.downsamplers = nn.ModuleList([Resample(c_out, up=False, padding=config.downsample_padding)])
        self.resample = resample

    def forward(self, x: Tensor, silu_emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.block(i, x, silu_emb)
            skips.append(x)
        if self.resample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x


class UpLevel(Level):
    """One residual block for each skip of the mirrored level, then (not at the last) an upsampler."""

    def __init__(
        self, c_in: int, c_out: int, c_skip_last: int, config: UNetConfig, *, attention: bool, resample: bool
    ) -> None:
        n = config.layers_per_block + 1
        widths = [((c_in if i == 0 else c_out) + (c_skip_last if i == n - 1 else c_out), c_out) for i in range(n)]
        super().__init__(widths, config, attention=attention)
        if resample:
            self.upsamplers = nn.ModuleList([Resample(c_out, up=True)])
        self.resample = resample

    def forward(self, x: Tensor, silu_emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i in range(len(self.resnets)):
            x = self.block(i, torch.cat([x, skips.pop()], dim=1), silu_emb)
        return self.upsamplers[0](x) if self.resample else x


class MiddleLevel(nn.Module):
    """ResBlock, self-attention (optional), ResBlock at the lowest resolution."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        rescale = config.mid_block_scale_factor
        groups = config.mid_attention_groups
        self.resnets = nn.ModuleList(ResBlock(channels, channels, config, rescale=rescale) for _ in range(2))
        attention = [SelfAttention(channels, config, groups=groups, rescale=rescale)] if config.add_attention else []
        self.attentions = nn.ModuleList(attention)

    def forward(self, x: Tensor, silu_emb: Tensor) -> Tensor:
        x = self.resnets[0](x, silu_emb)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x, silu_emb)


class UNet(nn.Module):
    """The model of DDPM: ``model(x, t, class_labels=None)`` predicts the noise in x, or v or x_0 if it was so trained.

    Takes a `UNetConfig` or its fields as keywords; they have the names and the defaults of
    diffusers' ``UNet2DModel``. Raises `ConfigError` for a value that it does not allow.

    The default architecture of a fresh `UNet()` is diffusers' (113.7M parameters). The one of Ho et al. for CIFAR-10
    has ``block_out_channels=(128, 256, 256, 256)``, attention at 16x16, ``attention_head_dim=None``,
    ``downsample_padding=0``, ``flip_sin_to_cos=False``, ``freq_shift=1``, ``norm_eps=1e-6``.
    """

    def __init__(self, config: UNetConfig | None = None, **fields: object) -> None:
        super().__init__()
        if config is not None and fields:
            raise ConfigError(f"UNet takes a UNetConfig or its fields, not both: leave out {', '.join(fields)}")
        self.config = config = UNetConfig.from_fields(fields) if config is None else config
        widths = config.block_out_channels
        last = len(widths) - 1

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], config.time_embed_dim)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, config.time_embed_dim)

        self.down_blocks = nn.ModuleList(
            DownLevel(
                widths[max(i - 1, 0)],
                widths[i],
                config,
                attention=config.down_block_types[i] == "AttnDownBlock2D",
                resample=i < last,
            )
            for i in range(len(widths))
        )
        self.mid_block = MiddleLevel(widths[-1], config)
        self.up_blocks = nn.ModuleList(
            UpLevel(
                widths[min(i + 1, last)],
                widths[i],
                widths[max(i - 1, 0)],
                config,
                attention=config.up_block_types[last - i] == "AttnUpBlock2D",
                resample=i > 0,
            )
            for i in reversed(range(len(widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, dtype: torch.dtype | None = torch.float32) -> Self:
        """Read a ``UNet2DModel`` folder: config.json and diffusion_pytorch_model.safetensors. No code is run from it.

        Args:
            folder: has the two files; or a pipeline's folder that has them in ``unet/``.
            dtype: of the weights once read, float32 by default, whatever the file's; None keeps the file's.

        Returns:
            The network on the CPU, in eval mode, with parameters that need no gradient
            (``.train().requires_grad_()`` to go on training).

        Raises:
            CheckpointError: a folder that is missing, damaged or foreign, or weights that are not finite.
            ConfigError: an architecture that this UNet can't be.
            InputError: a dtype that is no float.
        """
        return load_unet(cls, Path(folder), dtype)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and diffusion_pytorch_model.safetensors; diffusers' ``from_pretrained`` reads them.

        Each file is written whole or not at all, in the weights' dtype; the same weights give the same bytes.
        Raises `OutputError` where the folder can't be written.
        """
        save_unet(self, Path(folder))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are in."""
        return self.conv_in.weight.dtype

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise `InputError` unless samples of this shape (C, H, W) can go through the network."""
        config = self.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if len(shape) != 3 or shape[0] != config.in_channels or any(s < 1 or s % factor for s in shape[1:]):
            raise InputError(
                f"shape {tuple(shape)} does not fit this UNet; it takes ({config.in_channels}, H, W) "
                f"with H and W multiples of {factor}"
            )

    def embedding(self, t: Tensor | float, batch: int, class_labels: Tensor | None = None) -> Tensor:
        """All that depends on time step and class alone: SiLU of their embedding, [batch, time_embed_dim]."""
        config = self.config
        device = self.conv_in.weight.device
        t = torch.as_tensor(t, device=device)
        if t.shape not in ((), (1,), (batch,)):
            raise InputError(
                f"t has shape {tuple(t.shape)}; the UNet takes a number, or a tensor of shape [] or [{batch}]"
            )
        t = t.expand(batch)
        if self.dtype == torch.float64:
            t = t.double()
        emb = timestep_embedding(
            t, config.block_out_channels[0], cos_first=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        emb = self.time_embedding(emb.to(self.dtype))
        if config.num_class_embeds is None:
            if class_labels is not None:
                raise InputError("class_labels were given, but this UNet is not class-conditional: leave them out")
        elif class_labels is None:
            raise InputError("this UNet is class-conditional: give class_labels, an int64 tensor of shape [batch]")
        elif class_labels.shape != (batch,) or class_labels.dtype not in (torch.int64, torch.int32):
            given = f"{class_labels.dtype} {list(class_labels.shape)}"
            raise InputError(f"class_labels are {given}; the UNet takes an int64 tensor of shape [{batch}]")
        else:
            emb = emb + self.class_embedding(class_labels)
        return F.silu(emb)

    def forward(self, x: Tensor, t: Tensor | float, class_labels: Tensor | None = None) -> Tensor:
        """Predict the noise in `x` (or v, or x_0: what it was trained for).

        Args:
            x: noisy samples [B, C, H, W], in the dtype of the weights.
            t: time step, 0-based: a number, or a tensor of shape [] or [B].
            class_labels: int64 [B], for a class-conditional network.

        Returns:
            [B, out_channels, H, W] in the dtype of the weights.
        """
        if x.ndim != 4:
            raise InputError(f"x has shape {tuple(x.shape)}; the UNet takes [batch, channels, height, width]")
        self.check_shape(x.shape[1:])
        silu_emb = self.embedding(t, x.shape[0], class_labels)
        if self.config.center_input_sample:
            x = 2 * x - 1.0
        x = self.conv_in(x)
        skips = [x]
        for level in self.down_blocks:
            x = level(x, silu_emb, skips)
        x = self.mid_block(x, silu_emb)
        for level in self.up_blocks:
            x = level(x, silu_emb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

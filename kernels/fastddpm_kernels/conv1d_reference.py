"""What `conv1d` computes, in plain PyTorch, and the weights as it wants them. Read this first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conv1d_tiles import channels_of, step_of


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    second: Tensor | None = None,
    stride: int = 1,
    up: bool = False,
    norm: tuple[Tensor, Tensor] | None = None,
    groups: int = 1,
    eps: float = 1e-5,
    film: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What `launch_conv1d` writes, [B, L', c_out], in `dtype`, float64 by default: then the oracle of the tests.

    Args:
        x, second: [B, L, c0] and [B, L, c1] or None; the channels are x's, then second's.
        weight: [c_out, c0 + c1, taps], taps odd and the padding half of them; `up`: ConvTranspose1d's
            [c0 + c1, c_out, 4], with stride 2 and padding 1.
        norm: weight and bias of a GroupNorm with `groups` and `eps`, and Mish behind it; None: neither.
        film: [B, c_out], added; or [B, 2 c_out]: multiplied by the first half, and the second added.
        residual: [B, L', c_out], added at the end.
    """
    both = (x if second is None else torch.cat([x, second], dim=2)).to(dtype).transpose(1, 2)
    taps, shift = weight.to(dtype), bias.to(dtype)
    if up:
        y = F.conv_transpose1d(both, taps, shift, stride=2, padding=1)
    else:
        y = F.conv1d(both, taps, shift, stride=stride, padding=weight.shape[2] // 2)
    if norm is not None:
        y = F.mish(_group_norm(y, groups, norm[0].to(dtype), norm[1].to(dtype), eps))
    if film is not None:
        film = film.to(dtype)[:, :, None]
        scale, shift = film.chunk(2, dim=1) if film.shape[1] == 2 * y.shape[1] else (1.0, film)
        y = scale * y + shift
    y = y.transpose(1, 2)
    return (y if residual is None else y + residual.to(dtype)).contiguous()


def pack_conv1d(
    weight: Tensor, sources: tuple[int, ...], *, group: int = 0, up: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """A weight as the kernel streams it: [phases, tiles, steps, block_c, block_k], contiguous, in `dtype`.

    Args:
        weight: as `conv1d`'s.
        sources: channels of each, which add up to c_in.
        group: channels of a norm's group, or 0: a group is padded to a power of two, so that tiles have whole ones.
        up: of a transposed convolution: its two `transposed_phases`.
        dtype: default: the weight's.

    A step is `block_k` channels of one source at one tap, taps first; what is padded is zero.
    """
    dtype = weight.dtype if dtype is None else dtype
    c_out = weight.shape[1] if up else weight.shape[0]
    phases = transposed_phases(weight) if up else [weight]
    by = channels_of(c_out, group)
    k = step_of(sources, dtype)
    made = []
    for phase in phases:
        parts = [F.pad(part, (0, 0, 0, -part.shape[1] % k)) for part in phase.split(list(sources), dim=1)]
        rows = torch.cat(parts, dim=1).transpose(1, 2).flatten(1)  # [c_out, taps, channels] -> [c_out, steps k]
        grouped = rows.reshape(c_out // group, group, -1) if group else rows[:, None]
        grouped = F.pad(grouped, (0, 0, 0, by.padded - group if group else 0)).flatten(0, 1)
        grouped = F.pad(grouped, (0, 0, 0, by.tiles * by.block - len(grouped)))
        made.append(grouped.reshape(by.tiles, by.block, -1, k).transpose(1, 2))
    return torch.stack(made).to(dtype).contiguous()


def transposed_phases(weight: Tensor) -> list[Tensor]:
    """The weight of ConvTranspose1d(4, stride 2, padding 1), [c_in, c_out, 4], as two of 2 taps, [c_out, c_in, 2].

    The first makes positions 2 j, of j - 1 and j; the second positions 2 j + 1, of j and j + 1.
    """
    return [weight.transpose(0, 1)[..., taps] for taps in ([3, 1], [2, 0])]


def _group_norm(y: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm, which refuses a group of one number."""
    batch, channels, length = y.shape
    values = y.reshape(batch, groups, -1)
    mean = values.mean(2, keepdim=True)
    variance = (values - mean).square().mean(2, keepdim=True)
    normal = ((values - mean) / (variance + eps).sqrt()).reshape(batch, channels, length)
    return normal * weight[:, None] + bias[:, None]

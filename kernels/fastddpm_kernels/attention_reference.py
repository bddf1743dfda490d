"""What the attention block's kernels compute, in plain PyTorch: in float64 the oracle of their tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """(x @ weight + bias + residual) * factor: [..., K] and [K, N] -> [..., N]."""
    out = x @ weight + bias
    return (out if residual is None else residual + out) * factor


def attention(qkv: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of every head: [B, T, 3 C] -> [B, T, C] (Vaswani et al. 2017, eq. 1)."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, d]
    weights = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def tile_statistics(out: Tensor, units: int, rows: int) -> Tensor:
    """Mean, and sum of squared distances from it, of each unit in each tile of `rows` tokens.

    [B, T, C] -> [B, tiles, units, 2]; the last tile may have fewer tokens.
    """
    made = []
    for tile in out.split(rows, dim=1):
        values = tile.unflatten(2, (units, -1)).transpose(1, 2).flatten(2)  # [B, units, rows x channels]
        mean = values.mean(2)
        made.append(torch.stack([mean, (values - mean[..., None]).square().sum(2)], dim=-1))
    return torch.stack(made, dim=1)


def merged_statistics(statistics: Tensor, tokens: int, rows: int, channels: int) -> tuple[Tensor, Tensor]:
    """Each unit's mean and (biased) variance over a sample from its tiles', [B, units] each.

    `statistics` [B, tiles, units, 2] as `tile_statistics` makes it of units of `channels` (Chan, Golub & LeVeque
    1979): squares of the tiles, and those of the distances of their means from the mean of all.
    """
    counts = [channels * min(rows, tokens - start) for start in range(0, tokens, rows)]
    count = torch.tensor(counts, dtype=statistics.dtype, device=statistics.device)[:, None]
    mean, squares = statistics.unbind(-1)
    together = (count * mean).sum(1) / (tokens * channels)
    between = count * (mean - together[:, None]).square()
    return together, (squares + between).sum(1) / (tokens * channels)

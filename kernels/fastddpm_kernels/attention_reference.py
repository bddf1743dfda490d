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

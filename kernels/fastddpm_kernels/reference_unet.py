"""What each of the UNet engine's kernels computes, in plain PyTorch, on NHWC activations.

In float64 it is the oracle of the tests; from float32 down the arithmetic is float32, rounded once, to x's dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def group_norm(
    x: Tensor,
    second: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int,
    eps: float,
    row: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """silu(norm(x + row) * weight + bias), or of that times (1 + scale) plus shift: [B, H, W, C], in x's dtype.

    GroupNorm is Wu & He 2018 (arXiv 1803.08494, eq. 7); scale and shift are AdaGN's (Dhariwal & Nichol 2021, eq. 3).

    Args:
        x: [B, H, W, C0].
        second: [B, H, W, C1], the channels after x's, or None; C = C0 + C1.
        weight, bias: [C].
        groups: how many; a group may have channels of both sources.
        row: [B, C], added before the norm (the time embedding), or None.
        scale, shift: [B, C], both or neither.
    """
    h = x if second is None else torch.cat([x, second], dim=-1)
    h = h.to(torch.promote_types(h.dtype, torch.float32))
    if row is not None:
        h = h + row.to(h.dtype)[:, None, None]
    parts = h.unflatten(-1, (groups, -1))
    parts = parts - parts[:, :1, :1, :, :1]  # so that a mean far from 0 costs no digits
    variance, mean = torch.var_mean(parts, (1, 2, 4), correction=0, keepdim=True)
    y = ((parts - mean) * torch.rsqrt(variance + eps)).flatten(-2) * weight.to(h.dtype) + bias.to(h.dtype)
    if scale is not None and shift is not None:
        y = y * (1 + scale.to(h.dtype)[:, None, None]) + shift.to(h.dtype)[:, None, None]
    return (F.silu(y) if silu else y).to(x.dtype)

"""What `conv` computes, in plain PyTorch, and the weights as it wants them. Read this first."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Weight columns are padded with zeros to a multiple of this: 16 bytes of a 16-bit type, so that rows start aligned.
COLUMNS = 8


def pack_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A convolution's weight as a matrix: [c_out, c_in, kh, kw] -> [kh kw c_in, c_out up to a multiple of 8].

    Row (tap, channel), the taps row by row. The columns beyond c_out are zero. A linear layer's [c_out, c_in] is a 1x1
    convolution's. The result is contiguous, in `dtype` (default: the weight's).
    """
    c_out = weight.shape[0]
    taps = weight.reshape(*weight.shape[:2], -1)
    rows = taps.permute(2, 1, 0).reshape(-1, c_out)
    return F.pad(rows, (0, -c_out % COLUMNS)).to(weight.dtype if dtype is None else dtype).contiguous()


def phase_weights(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A 3x3 convolution of the nearest-neighbour 2x image, as four 2x2 ones of the image: -> [4, 4 c_in, columns].

    Two of the three rows that an output row sees are copies of one row of the image, so their weights add up:
    an even row (phase 0) sees row i - 1 with w[0] and row i with w[1] + w[2], an odd one row i with w[0] + w[1] and row
    i + 1 with w[2]; columns alike. Phase 2 py + px makes the pixels (2 i + py, 2 j + px). Each is packed as by
    `pack_weight`.

    Exact algebra: 4/9 of the products. The sums are made in float64 and rounded once, to `dtype` (default: the
    weight's); rounding is all that changes: a sum of two or four weights is rounded to half an ulp of itself, where
    the 3x3 weights were exact.
    """
    w = weight.double()
    rows = {0: (w[:, :, :1], w[:, :, 1:].sum(2, keepdim=True)), 1: (w[:, :, :2].sum(2, keepdim=True), w[:, :, 2:])}
    phases = []
    for py in (0, 1):
        tall = torch.cat(rows[py], dim=2)
        for first, second in ((tall[..., :1], tall[..., 1:].sum(3, True)), (tall[..., :2].sum(3, True), tall[..., 2:])):
            phases.append(pack_weight(torch.cat([first, second], dim=3), weight.dtype if dtype is None else dtype))
    return torch.stack(phases)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    second: Tensor | None = None,
    row: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut_x: Tensor | None = None,
    shortcut_second: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    scale: float = 1.0,
    stride: int = 1,
    padding: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`launch_conv`'s result [B, OH, OW, c_out] in `dtype`, float64 by default: then the oracle of the tests.

    Takes what `launch_conv` takes: NHWC activations and packed weights; three dimensions of `weight` are phases. What
    `launch_conv` writes to a norm's `out` is `reference_unet.group_norm` of this, unrounded. Without a bias, c_out is
    the row's, or else a multiple of 8.
    """

    def image(first: Tensor, then: Tensor | None) -> Tensor:
        both = first if then is None else torch.cat([first, then], dim=-1)
        return both.permute(0, 3, 1, 2).to(dtype)

    c_out = row.shape[1] if bias is None and row is not None else weight.shape[-1] if bias is None else bias.shape[0]
    inner = image(x, second)
    out: Tensor
    if weight.ndim == 3:
        out = _phases(inner, weight[..., :c_out].to(dtype))
    else:
        kernel = 3 if weight.shape[0] == 9 * inner.shape[1] else 1
        taps = unpacked(weight[:, :c_out].to(dtype), kernel)
        if kernel == 3:
            inner = F.pad(inner, (1, 1, 1, 1) if padding else (0, 1, 0, 1))
        out = F.conv2d(inner, taps, stride=stride)
    out = out.permute(0, 2, 3, 1)
    if bias is not None:
        out = out + bias.to(dtype)
    if row is not None:
        out = out + row.to(dtype)[:, None, None]
    if residual is not None:
        out = out + residual.to(dtype)
    if shortcut_x is not None and shortcut_weight is not None:
        skip = image(shortcut_x, shortcut_second)
        out = out + F.conv2d(skip, unpacked(shortcut_weight[:, :c_out].to(dtype), 1)).permute(0, 2, 3, 1)
    return (out * scale).contiguous()


def unpacked(rows: Tensor, kernel: int) -> Tensor:
    """[taps c_in, c_out] -> [c_out, c_in, kernel, kernel], the inverse of `pack_weight` (but for its padding)."""
    return rows.reshape(kernel, kernel, -1, rows.shape[1]).permute(3, 2, 0, 1).contiguous()


def _phases(inner: Tensor, weight: Tensor) -> Tensor:
    b, _, h, w = inner.shape
    out = inner.new_empty(b, weight.shape[2], 2 * h, 2 * w)
    for phase in range(4):
        py, px = divmod(phase, 2)
        near = F.pad(inner, (1 - px, px, 1 - py, py))
        out[:, :, py::2, px::2] = F.conv2d(near, unpacked(weight[phase], 2))
    return out

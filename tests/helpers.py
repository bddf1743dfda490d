"""What several test files need: the kernels' device, guarded buffers, and a table with everything in it."""

from __future__ import annotations

import math

import torch
from fastddpm_kernels import columns as col
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # on the CPU the kernels are interpreted
GUARD = 4096
SENTINEL = 1024.0  # exact in every float dtype


class Guarded:
    """A tensor with guard cells before and behind it, filled with NaN (poison) until it is written."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, channels_last: bool = False
    ) -> None:
        n = math.prod(shape)
        fill = SENTINEL if dtype.is_floating_point else 77
        self.memory = torch.full((n + 2 * GUARD,), fill, dtype=dtype, device=DEVICE)
        inside = self.memory[GUARD : GUARD + n]
        inside.fill_(math.nan if dtype.is_floating_point else 0)
        if channels_last:
            b, c, h, w = shape
            self.tensor = inside.view(b, h, w, c).permute(0, 3, 1, 2)
        else:
            self.tensor = inside.view(shape)

    def intact(self) -> bool:
        """Whether nothing was written outside."""
        guards = torch.cat([self.memory[:GUARD], self.memory[-GUARD:]])
        return bool((guards == guards[0]).all()) and guards[0].item() in (SENTINEL, 77)


def fenced(values: Tensor) -> Tensor:
    """A copy of `values` that lies between NaN: a read outside makes NaN."""
    memory = torch.full((values.numel() + 2 * GUARD,), math.nan, dtype=values.dtype, device=DEVICE)
    inside = memory[GUARD : GUARD + values.numel()]
    last = values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last) and not values.is_contiguous()
    view = inside.view(values.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) if last else inside.view(values.shape)
    return view.copy_(values)


def random_table(rows: int, seed: int = 0, *, history: int = 3, noise: bool = True, clip: float = 0.7) -> Tensor:
    """Rows of random coefficients, float64, the last one an identity row."""
    table = torch.randn(rows, len(col.COLUMNS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table[:, col.T] = torch.arange(rows).flip(0) * 10
    table[:, col.CLIP] = clip
    table[:, col.RATIO] = 0
    table[:, col.STEP] = torch.arange(rows)
    table[:, col.ADVANCE] = 1
    for depth, column in ((1, col.X_H1), (2, col.X_H2), (3, col.X_H3)):
        table[:, column] *= history >= depth
    table[:, col.X_Z] *= noise
    identity = torch.zeros(len(col.COLUMNS), dtype=torch.float64)
    identity[[col.X_X, col.C_IN]] = 1
    identity[col.CLIP] = math.inf
    identity[col.STEP] = rows - 1
    table[-1] = identity
    return table.to(DEVICE)


def store_error(value: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a store in `dtype` may be from `value`: half an ulp.

    Triton's interpreter truncates to bfloat16: a whole ulp there. That the GPU's code rounds, test_codegen.py sees.
    """
    info = torch.finfo(dtype)
    ulp = info.eps * torch.exp2(torch.floor(torch.log2(value.abs().clamp_min(info.tiny))))
    truncated = dtype == torch.bfloat16 and DEVICE.type == "cpu"
    return ulp if truncated else 0.5 * ulp

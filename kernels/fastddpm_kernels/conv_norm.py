"""The GroupNorms that a convolution's epilogue makes: what they are, where they can be, what memory they need."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .conv_tiles import FILL, TOGETHER, Tile, programs, statistics_rows

WIDEST = 64  # channels a group: a column tile has whole groups
SEGMENTS = 8  # of a sum, at most


class NormOut(NamedTuple):
    """act(GroupNorm(y) * weight + bias), or of that times (1 + scale) plus shift, of y before it is rounded.

    Attributes:
        out: [B, OH, OW, c_out], contiguous, in the activations' dtype.
        weight, bias: float32 [c_out], contiguous.
        group: channels a group, a power of two.
        eps: added to the variance.
        silu: whether act is SiLU; else it is nothing.
        scale, shift: float32 [B, c_out], only the last dimension contiguous; both or neither.
    """

    out: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    group: int
    eps: float
    silu: bool = True
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class Scratch(NamedTuple):
    """Memory of a launch: `workspace` of so many float32, `counters` of so many int32."""

    floats: int
    counters: int


def can_exchange(pixels: int, cout: int, groups: Sequence[int], itemsize: int, *, up: bool = False) -> bool:
    """Whether `launch_conv` takes norms of these groups: by shape, never by the batch.

    Args:
        pixels: of a sample's output, OH OW.
        cout: output channels.
        groups: each norm's channels a group; one or two.
        itemsize: bytes of an activation: float32's tiles are smaller.
        up: whether the convolution is of the doubled image.
    """
    phases = 4 if up else 1
    if pixels & (pixels - 1) or not phases <= pixels <= 1024 or len(groups) > 2:
        return False
    if any(group & (group - 1) or group > WIDEST or cout % group for group in groups):
        return False
    side = 128 if itemsize == 2 else 64
    return programs(Tile(side, side, 0, 0, 0), pixels // phases, phases, cout) <= TOGETHER


def conv_scratch(batch: int, pixels: int, cout: int, groups: Sequence[int] = (), *, up: bool = False) -> Scratch:
    """What `launch_conv` needs at most, on any GPU, for `can_exchange`'s arguments and this batch.

    With `tile_of`'s tiles, and with those of a table that `conv_choice.takes`: 64 pixels and 16 channels at least; 64
    and 64 at most, or 128 and 16, where a sum is divided.
    """
    rows, columns = -(-batch * pixels // 64) * 64, -(-cout // 64) * 64
    tiles = rows // 64 * (columns // 16)
    if pixels <= 64 and not up:  # each segment's part of the sum, of fewer than FILL tiles
        return Scratch(SEGMENTS * min(rows * columns, (FILL - 1) * 64 * 64), min(tiles, FILL - 1))
    if not groups:
        return Scratch(0, 0)
    unit = min(groups)
    parts = pixels // statistics_rows(pixels // 4 if up else pixels)
    return Scratch(2 * batch * parts * (cout // unit), batch * (columns // 16))

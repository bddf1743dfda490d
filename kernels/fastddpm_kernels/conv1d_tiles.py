"""How a 1-D convolution is divided among programs: without Triton, for an engine on a machine that has none.

Not measured on a GPU: the reasons are what is counted.
"""

from typing import NamedTuple

import torch

# Programs that fill a GPU: the multiprocessors of an H100 or H200 (an A100 has 108, a B200 148).
FILL = 132
LONGEST = 64  # positions of a sample (of a phase): all of them lie in one tile
WIDEST = 128  # channels of a group, which too lie in one tile


class Channels(NamedTuple):
    """How output channels are divided: tiles of whole groups, each padded to a power of two."""

    padded: int  # channels a group, with those that it doesn't have
    block: int  # of a tile; 64 at least, which is what an instruction of wgmma makes
    tiles: int


def fits(positions: int, group: int) -> bool:
    """Whether a sample's positions (of a phase), and a norm's group (0: none), are few enough."""
    return positions <= LONGEST and group <= WIDEST


def channels_of(c_out: int, group: int) -> Channels:
    """The tiles of `c_out` channels, in groups of `group`, 0 where no norm follows."""
    padded = _power_of_2(group) if group else 1
    block = max(64, padded)
    return Channels(padded, block, _cdiv(c_out // (group or 1), block // padded))


def step_of(sources: tuple[int, ...], dtype: torch.dtype) -> int:
    """How many channels a step of the sum takes: 128 bytes, shared memory's widest swizzle, where there are as many."""
    most = 64 if dtype.itemsize == 2 else 32
    return min(most, max(16, _power_of_2(max(sources))))


def segments_of(steps: int, tiles: int) -> int:
    """In how many parts a sum of so many steps is divided: the batch has no say.

    At batch 1 there are as many tiles as tiles of channels, 4 or 8, and what is to be read are the weights: as many
    segments as fill the GPU, of 4 steps at least, the depth of a pipeline. None is empty.
    """
    wanted = max(1, min(FILL // tiles, steps // 4))
    return _cdiv(steps, _cdiv(steps, wanted))


def rows_of(batch: int, positions: int) -> int:
    """Rows of a tile, samples x positions (a power of two): 16 are the least of a product, more share the weights.

    The order of the sums is the same in all.
    """
    return max(16, min(LONGEST, _power_of_2(batch * positions)))


def _power_of_2(n: int) -> int:
    """The least that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def _cdiv(n: int, by: int) -> int:
    return -(-n // by)

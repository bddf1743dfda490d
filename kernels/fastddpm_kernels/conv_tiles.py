"""How a convolution is divided among programs. Nothing here is measured on a GPU: the reasons are what is counted."""

from typing import NamedTuple

import torch

# Programs that fill a GPU: the multiprocessors of an H100 or H200 (an A100 has 108, a B200 148).
FILL = 132
# Programs of a sample that may wait for each other. GPUs start programs in order of their index, and a sample's are
# neighbours: with fewer than a GPU holds at once, those that are waited for have been started, or will be.
TOGETHER = 32


class Tile(NamedTuple):
    """What one program makes, and how."""

    m: int  # pixels; 64 at least, for wgmma, so that all tiles sum in the same instructions
    n: int  # output channels
    k: int  # channels a step
    warps: int
    stages: int  # of the pipeline: the steps whose loads are on their way, and the one that is computed
    registers: int | None = None  # a thread's, at most


def step_of(channels: tuple[int, ...], dtype: torch.dtype, *, flat: bool = False) -> int:
    """How many channels a step of the sum takes, for sources of these channels: it decides the order of the sum.

    64 channels of 16 bits are 128 bytes, the width of shared memory's widest swizzle, and 4 products of wgmma. `flat`:
    taps and channels are one axis, 27 long in the first convolution of RGB.
    """
    if flat:
        return 32
    if dtype == torch.float32:  # no tensor cores: for tests
        return 16
    given = [c for c in channels if c]
    return next((k for k in (64, 32, 16) if all(c % k == 0 for c in given)), 64 if min(given) > 32 else 32)


def tile_of(
    rows: int,
    cout: int,
    k: int,
    dtype: torch.dtype,
    *,
    most: int = 128 * 256,
    spare: bool = True,
    shared: int = 232448,
    phases: int = 1,
    pixels: int = 0,
    group: int = 1,
) -> Tile:
    """The largest tile that fills the GPU with programs, for rows x cout outputs in steps of k.

    Args:
        rows: of a phase.
        most: outputs, where registers are needed for something else.
        spare: whether 128 registers are enough: not for a residual, `flat`, or Blackwell's norms.
        shared: bytes of shared memory that a program may have; an H100's unless given.
        phases: four of an upsampled image.
        pixels: rows of a sample and phase, where norms make its programs wait for each other; 0: they don't.
        group: channels that one program must have: the norms' largest group.
    """
    if dtype == torch.float32:
        return Tile(64, 16 if cout <= 16 else 64, k, 4, 2)
    if cout <= 16:  # the last convolution: its time is that of reading the image
        return Tile(128, 16, k, 4, 4)
    hopper = shared > 200_000  # or Blackwell: before them a buffer is free as soon as it is read, and one less is held
    tiles = [
        # wgmma reads 128 bytes of shared memory a cycle at most. With 256 columns it wants 80 of them, and 48 are
        # written; with 128 columns 96 and 64. But 128 sums a thread leave no registers for a second program.
        Tile(128, 256, k, 8, 4),
        # 96 KB and 128 registers: two programs a multiprocessor, one multiplies while the other begins or ends.
        Tile(128, 128, k, 8, 3, 128 if hopper and spare else None),
        Tile(128, 64, k, 4, 3),  # 72 KB: three
        Tile(64, 64, k, 4, 4),  # 64 KB: three
        Tile(64, 32, k, 4, 4),
    ]
    able = [tile for tile in tiles if tile.n % group == 0 and programs(tile, pixels, phases, cout) <= TOGETHER]
    for tile in able:
        held = 2 * (tile.m + tile.n) * k * (tile.stages - (not hopper))
        fits = held <= shared and tile.n <= max(cout, 64) and tile.m * tile.n <= most
        if fits and -(-rows // tile.m) * phases * -(-cout // tile.n) >= FILL:
            return tile
    return able[-1]


def programs(tile: Tile, pixels: int, phases: int, cout: int) -> int:
    """How many of a sample wait for each other, counted with those that stand between them in the order of starting."""
    tiles = max(1, pixels // tile.m) * phases if pixels else 1
    return tiles * -(-cout // tile.n) if tiles > 1 else 1


def segments_of(pixels: int, steps: int) -> int:
    """In how many parts a sum of so many steps is divided, for maps of so many pixels. The batch has no say.

    At batch 1 an 8x8 map of 256 channels has 8 tiles of 64x32: with 4 or 8 segments of 8 steps or more, 32 or 64.
    """
    return max(1, min(8, steps // 8)) if pixels <= 64 else 1


def side_by_side(tiles: int) -> bool:
    """Whether segments go to programs of their own. The bits are the same."""
    return tiles < FILL


def statistics_rows(pixels: int) -> int:
    """How many pixels of a sample, or of its phase, are one part of its statistics: no tile has less of it."""
    return min(64, pixels & -pixels)

"""How a convolution is divided among programs. Nothing here is measured on a GPU: the reasons are what is counted."""

from typing import NamedTuple

import torch

# Programs that fill a GPU: the multiprocessors of an H100 or H200 (an A100 has 108, a B200 148).
FILL = 132


class Tile(NamedTuple):
    """What one program makes, and how."""

    m: int  # pixels; 64 at least, for wgmma, so that all tiles sum in the same instructions
    n: int  # output channels
    k: int  # channels a step
    warps: int
    stages: int  # of the pipeline: the steps whose loads are on their way, and the one that is computed


def tile_of(
    rows: int, cout: int, channels: tuple[int, ...], dtype: torch.dtype, *, flat: bool = False, least: int = 1
) -> Tile:
    """The largest tile that fills the GPU with programs: rows x cout outputs, from sources of these channels.

    `least` is the smallest m and n that will do. The sums' order depends on k alone, and k on the channels alone.
    """
    given = [c for c in channels if c]
    if dtype == torch.float32:  # no tensor cores: exact products, for tests
        return Tile(64, 16 if cout <= 16 else 64, 32 if flat else 16, 4, 2)
    # 64 channels are 128 bytes, a whole line of shared memory's widest swizzle, and 4 products of wgmma.
    k = 32 if flat else next((k for k in (64, 32, 16) if all(c % k == 0 for c in given)), 64 if min(given) > 32 else 32)
    if cout <= 16:  # the last convolution: its time is that of reading the image
        return Tile(128, 16, k, 4, 4)
    tiles = (
        Tile(128, 128, k, 8, 3),  # 96 KB: two programs on a multiprocessor of 228 KB; 64 sums a thread
        Tile(128, 64, k, 4, 3),  # 72 KB
        Tile(64, 64, k, 4, 4),  # 64 KB
    )
    for tile in tiles:
        if tile.n <= max(cout, 64) and -(-rows // tile.m) * -(-cout // tile.n) >= FILL:
            return tile
    return Tile(64, 32, k, 4, 4)


def segments_of(pixels: int, steps: int) -> int:
    """In how many parts a sum of so many steps is divided, for maps of so many pixels. The batch has no say.

    At batch 1 an 8x8 map of 256 channels has 8 tiles of 64x32: with 4 or 8 segments of 8 steps or more, 32 or 64.
    """
    return max(1, min(8, steps // 8)) if pixels <= 64 else 1


def side_by_side(tiles: int, part: int) -> bool:
    """Whether segments go to programs of their own. The bits are the same, but for those of statistics."""
    return part > 0 or tiles < FILL


def statistics_rows(pixels: int) -> int:
    """How many pixels of a sample go into one part of its statistics: the largest power of 2 up to 64 that divides
    `pixels`, those of one phase where the image is upsampled. A part's n is then at most a tile's.
    """
    return min(64, pixels & -pixels)

"""Which tile a convolution takes, and whether it is ours or cuDNN's, as `python -m benchmarks.tune` measured it.

A table a GPU lies in `tuned/`, named after it. Where there is none, or it lacks a shape, `conv_tiles` decides: no table
ships that was not measured on its GPU. What a table may say of a batch leaves the bits alone: it has neither the steps
of a sum nor its segments. Whether cuDNN takes over, which changes them, is said of a shape, for all batches.
"""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from .conv_tiles import TOGETHER, Tile, programs, segments_of, step_of, tile_of

FOLDER = Path(__file__).resolve().parent / "tuned"
FORMAT = 1
# What a tile's numbers may be: powers of two, as Triton wants them; 64 pixels at least, so that all sum alike.
ALLOWED = {"m": (64, 128, 256), "n": (16, 32, 64, 128, 256), "warps": (4, 8, 16), "stages": tuple(range(1, 9))}


class ConvShape(NamedTuple):
    """What the best way to make a convolution depends on, beside the GPU and the batch."""

    dtype: str  # bfloat16
    height: int  # of the output
    width: int
    c0: int  # channels of the two sources, 0: none
    c1: int
    cout: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    up: bool = False  # of the doubled image
    row: bool = False  # a number a sample and channel is added
    s0: int = 0  # channels of the shortcut's sources
    s1: int = 0
    residual: bool = False
    norms: tuple[int, ...] = ()  # made in the epilogue, of groups of so many channels
    raw: bool = True  # whether the output itself is written

    @property
    def key(self) -> str:
        """In a table, a line to read: ``bfloat16 16x16 256+128 to 256, 3x3, shortcut 384+0``."""
        words = [f"{self.dtype} {self.height}x{self.width} {self.c0}+{self.c1} to {self.cout}"]
        words += [
            f"{self.kernel}x{self.kernel}" + (f"/{self.stride} padding {self.padding}" if self.stride > 1 else "")
        ]
        words += ["of the doubled image"] if self.up else []
        words += ["row"] if self.row else []
        words += [f"shortcut {self.s0}+{self.s1}"] if self.s0 else []
        words += ["residual"] if self.residual else []
        words += [f"norm of {group}" for group in self.norms]
        words += [] if self.raw else ["not raw"]
        return ", ".join(words)


def step(shape: ConvShape) -> int:
    """Channels a step of the sum: the rule's, whatever a table says."""
    channels = (shape.c0, shape.c1, shape.s0, shape.s1)
    return step_of(channels, getattr(torch, shape.dtype), flat=flat(shape))


@lru_cache(maxsize=4096)
def steps(shape: ConvShape, k: int) -> int:
    """How many steps of k channels the sum has."""
    taps = 4 if shape.up else shape.kernel**2  # `phase_weights`
    counts = [9 * shape.c0] if flat(shape) else [shape.c0, shape.c1] * taps + [shape.s0, shape.s1]
    return sum(-(-count // k) for count in counts)


def segments(shape: ConvShape) -> int:
    """In how many parts the sum is divided: the rule's too."""
    return 1 if shape.up else segments_of(shape.height * shape.width, steps(shape, step(shape)))


def flat(shape: ConvShape) -> bool:
    """Whether taps and channels are one axis of the sum."""
    return not shape.up and shape.kernel == 3 and shape.c0 < 16 and shape.c1 == shape.s0 == 0


def takes(shape: ConvShape, tile: Tile) -> bool:
    """Whether the convolution can have this tile at any batch, within `conv_scratch`'s memory.

    Divided sums have room for tiles of 64 x 64 and smaller. With norms, a tile has whole groups, and no more programs
    wait for each other than surely run at once.
    """
    if segments(shape) > 1 and (tile.m > 64 or tile.n > 64):
        return False
    if not shape.norms:
        return True
    phases = 4 if shape.up else 1
    waiting = programs(tile, shape.height * shape.width // phases, phases, shape.cout)
    return tile.n % max(shape.norms) == 0 and waiting <= TOGETHER


class Choice(NamedTuple):
    """What was fastest."""

    own: bool  # our kernel; else cuDNN's
    numbers: tuple[int, int, int, int, int | None] | None  # m, n, warps, stages, registers; None: the rule's
    split: bool | None  # False: the programs aren't divided, though the sums are; None: the rule's

    def tile(self, k: int) -> Tile | None:
        """The tile, with the steps that the rule says; None: the rule's."""
        if self.numbers is None:
            return None
        m, n, warps, stages, registers = self.numbers
        return Tile(m, n, k, warps, stages, registers)


class Gpu(NamedTuple):
    """What a tile depends on."""

    name: str  # torch's; "": none, and no table is looked for
    shared: int  # bytes of shared memory that a program may have
    hopper: bool  # a thread has few columns of a product; a warp of Blackwell's has 32 rows, and a thread all of a row


@lru_cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU; an H100's numbers where there is none."""
    if device.type != "cuda":
        return Gpu("", 232448, True)
    shared = driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return Gpu(torch.cuda.get_device_name(device), shared, torch.cuda.get_device_capability(device)[0] == 9)


def rule(gpu: Gpu, shape: ConvShape, batch: int, parts: int) -> Tile:
    """`tile_of` this shape, of a sum in so many parts."""
    pixels, phases = shape.height * shape.width, 4 if shape.up else 1
    # Segments have a second total; norms need registers; and a 1x1 convolution is over too soon.
    most = 64 * 64 if parts > 1 else 128 * 128 if shape.norms or shape.kernel == 1 else 128 * 256
    few = gpu.hopper and pixels >= 128  # statistics of several samples are not few
    return tile_of(
        batch * pixels // phases,
        shape.cout,
        step(shape),
        getattr(torch, shape.dtype),
        most=most,
        spare=few if shape.norms else not shape.residual and not flat(shape),
        shared=gpu.shared,
        phases=phases,
        pixels=pixels // phases if shape.norms else 0,
        group=max(shape.norms, default=1),
    )


class Division(NamedTuple):
    """Among which programs a launch is divided."""

    tile: Tile
    segments: int
    split: bool | None  # None: as `side_by_side` says


@lru_cache(maxsize=4096)
def division(gpu: Gpu, shape: ConvShape, batch: int) -> Division:
    """The GPU's table, where it has the shape; else the rule. Files are read once."""
    parts = segments(shape)
    found = choice(gpu.name, shape, batch, FOLDER) if gpu.name else None
    tile = None if found is None else found.tile(step(shape))
    return Division(tile or rule(gpu, shape, batch, parts), parts, None if found is None else found.split)


def slug(gpu: str) -> str:
    """A GPU's name as a file's: ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def choice(gpu: str, shape: ConvShape, batch: int, folder: Path = FOLDER) -> Choice | None:
    """What was measured of this shape at the nearest batch; None: nothing, so `conv_tiles` decides.

    Args:
        gpu: torch's name of the GPU.
        batch: the nearest is that of the least ratio.

    Raises:
        ValueError: a table that is there can't be used; the message says why.
    """
    return _found(gpu, shape, batch, folder)


@lru_cache(maxsize=1024)
def _found(gpu: str, shape: ConvShape, batch: int, folder: Path) -> Choice | None:
    path = folder / f"{slug(gpu)}.json"
    table = _table(path)
    entry = None if table is None else table["shapes"].get(shape.key)
    if table is None or entry is None:
        return None
    if table["gpu"] != gpu:  # two names may make one file's name
        return None
    nearest = min(entry["batches"], key=lambda b: (abs(math.log(int(b) / max(batch, 1))), int(b)))
    best = entry["batches"][nearest]
    found = Choice(entry["own"], None if best["tile"] is None else tuple(best["tile"]), best["split"])
    tile = found.tile(step(shape))
    if tile is not None and not takes(shape, tile):
        raise ValueError(f"{path}: {shape.key} can't have the tile {best['tile']}; remove the table, or tune again")
    return found


@lru_cache(maxsize=16)
def _table(path: Path) -> dict[str, Any] | None:
    return read(path) if path.is_file() else None


def read(path: Path) -> dict[str, Any]:
    """A table that `benchmarks.tune` wrote. Raises ValueError where it is none, and says why."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} can't be read as a table of convolutions: {error}; remove it, or tune again"
        ) from error
    wrong = fault(table)
    if wrong is not None:
        raise ValueError(f"{path} is no table of convolutions: {wrong}; remove it, or tune again")
    return table


def fault(table: object) -> str | None:
    """What is wrong with a table; None: nothing."""
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        return f"its format is not {FORMAT}"
    if not isinstance(table.get("gpu"), str) or not isinstance(table.get("shapes"), dict):
        return "gpu or shapes is missing"
    for key, entry in table["shapes"].items():
        batches = entry.get("batches") if isinstance(entry, dict) else None
        if not isinstance(batches, dict) or not batches or not isinstance(entry.get("own"), bool):
            return f"{key}: own or batches is missing"
        for batch, best in batches.items():
            if not re.fullmatch("[1-9][0-9]*", batch) or not isinstance(best, dict):
                return f"{key}: {batch!r} is no batch"
            if wrong := _wrong_tile(best):
                return f"{key}, batch {batch}: {wrong}"
    return None


def _wrong_tile(best: dict[str, Any]) -> str | None:
    split, tile = best.get("split"), best.get("tile")
    if split is not None and split is not False:
        return f"split is {split!r}; allowed: false, null"  # true could want more memory than `conv_scratch` says
    if tile is None:
        return None
    if not isinstance(tile, list) or len(tile) != 5:
        return f"tile is {tile!r}; allowed: null, or [m, n, warps, stages, registers]"
    for value, (name, allowed) in zip(tile, ALLOWED.items(), strict=False):
        if type(value) is not int or value not in allowed:
            return f"{name} is {value!r}; allowed: {', '.join(map(str, allowed))}"
    registers = tile[4]
    if registers is not None and (type(registers) is not int or not 24 <= registers <= 255):
        return f"registers is {registers!r}; allowed: null, or 24 ... 255"
    return None

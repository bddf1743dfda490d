"""Compile GroupNorm for the UNet's shapes and several GPUs, and print what the machine code shows, as JSON.

Run by test_group_norm_codegen.py in a process of its own, as compile_kernels.py is by test_codegen.py.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
import triton
from compile_kernels import TARGETS, Launch, inspect, launched
from fastddpm_kernels import group_norm, group_norm_tiles
from triton.backends.compiler import GPUTarget


def variants() -> dict[str, Launch]:
    """The kernels as the launchers launch them for DDPM's CIFAR-10 network, and for larger images."""

    def norm(side, c0, c1=0, *, dtype=torch.bfloat16, row=False, scale=False, silu=True, split=False, stats=None):
        """(tile, unit) of `stats`: given ones, as a convolution makes them."""
        pixel = torch.zeros(1, 1, 1, 1, dtype=dtype)
        x, second = (pixel.expand(2, side, side, c) if c else None for c in (c0, c1))
        c = torch.zeros(c0 + c1)
        names = [*(["row"] if row else []), *(["scale", "shift"] if scale else [])]
        options = dict(groups=32, eps=1e-6, silu=silu) | {name: torch.zeros(2, c0 + c1) for name in names}
        if stats is not None:
            tile, unit = stats
            made = [torch.zeros(2, side**2 // tile, width // unit, 2) if width else None for width in (c0, c1)]
            launch = partial(group_norm_tiles.launch_group_norm_apply, x, second, *made, x, c, c)
            return launched(group_norm_tiles, launch, tile=tile, second_tile=tile, **options)
        launch = group_norm_tiles.split_group_norm if split else group_norm.launch_group_norm
        return launched(group_norm_tiles if split else group_norm, launch, x, second, x, c, c, **options)

    made = {
        "32x32-128": norm(32, 128),
        "32x32-128-row": norm(32, 128, row=True),
        "32x32-128-scale": norm(32, 128, scale=True),
        "32x32-128-fp32": norm(32, 128, dtype=torch.float32),
        "32x32-128+128": norm(32, 128, 128),
        "32x32-256+128": norm(32, 256, 128),
        "16x16-256-row": norm(16, 256, row=True),
        "16x16-256-attention": norm(16, 256, silu=False),
        "16x16-256+128": norm(16, 256, 128),
        "8x8-256-row": norm(8, 256, row=True),
        "4x4-256+256": norm(4, 256, 256),
        "given-32x32-128": norm(32, 128, stats=(64, 4)),
        "given-32x32-256+128": norm(32, 256, 128, stats=(64, 4)),
        "given-16x16-256": norm(16, 256, stats=(64, 8)),
        "split-256x256-128": norm(256, 128, split=True),
    }
    single = {name: launches[0] for name, launches in made.items() if len(launches) == 1}
    many = {name: launches for name, launches in made.items() if len(launches) > 1}
    return single | {f"{name}-{k}": launch for name, launches in many.items() for k, launch in enumerate(launches)}


def elements(source, warps: int) -> float:
    """A thread's, but for padding: of groups that are no power of two, a tile has a quarter that is none of theirs."""
    constant = {name: source.constants.get((k,)) for k, name in enumerate(source.fn.arg_names)}
    if "CHANNELS" not in constant:  # the statistics: a block before the loop and one in it
        return (1 + (constant["TILE"] > constant["BLOCK_P"])) * constant["BLOCK_P"] * constant["BLOCK_C"] / (32 * warps)
    return constant["BLOCK_P"] * constant["CHANNELS"] / (32 * warps)


def main() -> None:
    jobs = [(name, sm, *launch) for name, launch in variants().items() for sm in TARGETS]

    def build(job):
        name, sm, source, options = job
        made = inspect(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options))
        warps = options["num_warps"]
        return f"{name}-sm{sm}", made | {"elements": elements(source, warps), "warps": warps}

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

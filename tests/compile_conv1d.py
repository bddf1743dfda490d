"""Compile the convolutions of Diffusion Policy's UNet for several GPUs without one; print what it shows, as JSON.

Run by test_conv1d_codegen.py in a process of its own, since the tests' process interprets the kernels.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
from compile_conv import inspect
from compile_kernels import TARGETS, launched
from fastddpm_kernels import conv1d
from fastddpm_kernels.conv1d_reference import pack_conv1d
from triton.backends.compiler import GPUTarget

# batch, length, sources, output channels, taps; then what else there is
SHAPES: dict[str, tuple[int, int, tuple[int, ...], int, int, dict[str, Any]]] = {
    "first": (1, 16, (2,), 256, 5, dict(film=True)),
    "film-16": (1, 16, (256,), 256, 5, dict(film=True)),
    "residual-16": (1, 16, (256,), 256, 5, dict(residual=True)),
    "film-8": (1, 8, (512,), 512, 5, dict(film=True)),
    "residual-4": (1, 4, (1024,), 1024, 5, dict(residual=True)),
    "two-sources-4": (1, 4, (1024, 1024), 512, 5, dict(film=True)),
    "shortcut-4": (1, 4, (1024, 1024), 512, 1, dict(norm=False)),
    "down-16": (1, 16, (256,), 256, 3, dict(norm=False, stride=2)),
    "up-4": (1, 4, (512,), 512, 4, dict(norm=False, up=True)),
    "last": (1, 16, (256,), 2, 1, dict(norm=False)),
    "batch-64-film-16": (64, 16, (256,), 256, 5, dict(film=True)),
    "batch-64-residual-4": (64, 4, (1024,), 1024, 5, dict(residual=True)),
    "batch-256-film-16": (256, 16, (256,), 256, 5, dict(film=True)),
}


def launches(name: str) -> list[Any]:
    """What the launcher compiles for this shape."""
    batch, length, sources, c_out, taps, options = SHAPES[name]
    zeros = partial(torch.zeros, dtype=torch.bfloat16)
    up, stride, norm = options.get("up", False), options.get("stride", 1), options.get("norm", True)
    weight = zeros(sum(sources), c_out, taps) if up else zeros(c_out, sum(sources), taps)
    packed = pack_conv1d(weight, sources, group=c_out // 8 if norm else 0, up=up)
    out = zeros(batch, 2 * length if up else length // stride, c_out)
    wide = torch.zeros(c_out)
    more: dict[str, Any] = dict(stride=stride, second=zeros(batch, length, sources[1]) if len(sources) > 1 else None)
    more |= dict(norm=(wide, wide), groups=8) if norm else {}
    more |= dict(film=torch.zeros(batch, 2 * c_out)) if options.get("film") else {}
    more |= dict(residual=zeros(*out.shape)) if options.get("residual") else {}
    return launched(conv1d, conv1d.launch_conv1d, zeros(batch, length, sources[0]), packed, wide, out, **more)


def protocol(ptx: str) -> list[str]:
    """Global stores and loads, barriers and the atomic, in the order of the code, from the last product on."""
    kinds = r"(st\.global|ld\.global\.cg|ld\.global|bar\.sync|bar\.warp\.sync|atom[.\w]*|membar[.\w]*|fence[.\w]*)"
    found = re.findall(rf"^\s*(?:@%p\d+\s+)?{kinds}", ptx, re.MULTILINE)
    return [kind for kind, _ in itertools.groupby(found)]


def main() -> None:
    names = sys.argv[1:] or list(SHAPES)
    jobs = [(f"{name}-sm{sm}", sm, *launches(name)[0]) for name in names for sm in TARGETS]

    def build(job: tuple[str, int, Any, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        name, sm, source, options = job
        compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        return name, inspect(compiled, options) | {"protocol": protocol(compiled.asm["ptx"])}

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

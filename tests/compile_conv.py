"""Compile the convolutions of the CIFAR-10 UNet for several GPUs without one; print what the code shows, as JSON.

Run by test_conv_codegen.py in a process of its own, since the tests' process interprets the kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
from compile_kernels import CUOBJDUMP, TARGETS, launched
from fastddpm_kernels import conv
from fastddpm_kernels.conv_choice import Gpu
from fastddpm_kernels.conv_norm import NormOut
from triton.backends.compiler import GPUTarget

SHARED = {80: 166912, 90: 232448, 100: 232448}  # bytes that a program may have
NEXT_4, NEXT_8 = [dict(group=4)], [dict(group=8)]
NEXT_AND_SKIP_4, NEXT_AND_SKIP_8 = [dict(group=4), dict(group=8)], [dict(group=8), dict(group=16)]
# size of the input, its channels, output channels; then what else there is. The batch decides the tile.
SHAPES: dict[str, tuple[tuple[int, int], tuple[int, ...], int, dict[str, Any]]] = {
    "first-32": ((256, 32), (3,), 128, dict(norms=NEXT_4)),
    "last-32": ((256, 32), (128,), 3, dict()),
    "two-sources-32": ((256, 32), (256, 128), 128, dict(row=True)),
    "conv1-32": ((256, 32), (128,), 128, dict(row=True, norms=NEXT_4, raw=False)),
    "shortcut-32": ((256, 32), (256,), 128, dict(shortcut=(256, 128), norms=NEXT_4)),
    "residual-32": ((256, 32), (128,), 128, dict(residual=True, norms=NEXT_AND_SKIP_4)),
    "shifted-32": ((256, 32), (128,), 128, dict(norms=[dict(group=4, shifted=True)], raw=False)),
    "down-32": ((256, 32), (128,), 128, dict(stride=2, padding=0, norms=NEXT_4)),
    "conv1-16": ((256, 16), (256,), 256, dict(row=True, norms=NEXT_8, raw=False)),
    "residual-16": ((256, 16), (256,), 256, dict(residual=True, norms=NEXT_AND_SKIP_8)),
    "plain-16": ((256, 16), (256,), 256, dict(residual=True)),
    "up-16": ((256, 16), (256,), 256, dict(up=True)),
    "to-out-8": ((1024, 8), (256,), 256, dict(kernel=1, residual=True, norms=NEXT_8)),
    "up-8": ((256, 8), (256,), 256, dict(up=True, norms=NEXT_8)),
    "qkv-16": ((256, 16), (256,), 768, dict(kernel=1)),
    "to-out-16": ((256, 16), (256,), 256, dict(kernel=1, residual=True, norms=NEXT_8)),
    "segments-8": ((1024, 8), (256, 256), 256, dict(row=True, norms=NEXT_8)),
    "batch-1-32": ((1, 32), (128,), 128, dict(row=True, norms=NEXT_4, raw=False)),
    "batch-1-16": ((1, 16), (256,), 256, dict(residual=True, norms=NEXT_AND_SKIP_8)),
    "batch-1-4": ((1, 4), (256,), 256, dict(shortcut=(256, 256), norms=NEXT_AND_SKIP_8)),
}
EVERYWHERE = ("two-sources-32", "up-8", "batch-1-4")  # CODEGEN=all: all of them


def launches(name: str, sm: int) -> list[Any]:
    """What the launcher compiles for this shape on this GPU."""
    (b, h), c_in, c_out, options = SHAPES[name]
    options, zeros = dict(options), partial(torch.zeros, dtype=torch.bfloat16)
    kernel, up, stride = options.pop("kernel", 3), options.pop("up", False), options.get("stride", 1)
    rows, columns, side = sum(c_in) * (4 if up else kernel**2), c_out + -c_out % 8, 2 * h if up else h // stride
    weight = zeros(4, rows, columns) if up else zeros(rows, columns)
    if len(c_in) > 1:
        options["second"] = zeros(b, h, h, c_in[1])
    if options.get("residual"):
        options["residual"] = zeros(b, side, side, c_out)
    bias = None if options.get("row") else torch.zeros(c_out)
    if options.get("row"):
        options["row"] = torch.zeros(b, c_out)
    if shortcut := options.pop("shortcut", None):
        options |= dict(zip(("shortcut_x", "shortcut_second"), (zeros(b, h, h, c) for c in shortcut), strict=False))
        options["shortcut_weight"] = zeros(sum(shortcut), columns)
    out = zeros(b, side, side, c_out)
    options["norms"] = [norm_of(out, **norm) for norm in options.pop("norms", ())]
    raw = options.pop("raw", True)
    conv.gpu_of = lambda device: Gpu("", SHARED[sm], sm == 90)
    return launched(conv, conv.launch_conv, zeros(b, h, h, c_in[0]), weight, bias, out if raw else None, **options)


def norm_of(out: torch.Tensor, *, group: int, silu: bool = True, shifted: bool = False) -> NormOut:
    """A norm of this output."""
    b, cout = out.shape[0], out.shape[3]
    slices = torch.zeros(b, 2 * cout).chunk(2, 1) if shifted else (None, None)
    return NormOut(torch.zeros_like(out), torch.zeros(cout), torch.zeros(cout), group, 1e-5, silu, *slices)


def inspect(compiled: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Registers, spills, shared memory, and the instructions that matter."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [CUOBJDUMP, "-sass", "-res-usage", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    ptx = re.findall(
        r"^\s+(?:@%p\d+ )?(bar\.sync|atom\.\S+|ld\.global\.gpu\S*|st\.global)", compiled.asm["ptx"], re.MULTILINE
    )
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {
        "warps": options["num_warps"],
        "registers": int(usage["REG"]),
        "local": int(usage["LOCAL"]) + int(usage["STACK"]) + sum(op.startswith(("LDL", "STL")) for op in sass),
        "shared": compiled.metadata.shared,
        "products": sum(op.startswith(("HMMA", "HGMMA", "UTCHMMA")) for op in sass),
        "unit": next((op.split(".")[0] for op in sass if op.startswith(("HMMA", "HGMMA", "UTCHMMA"))), ""),
        "asynchronous": dict(Counter(op for op in sass if op.startswith("LDGSTS"))),
        "stores": dict(Counter(op for op in sass if op.startswith("STG"))),
        "exchange": exchange(ptx, sass),
        "shuffles": sum(op.startswith("SHFL") for op in sass),
        "instructions": sum(not op.startswith("NOP") for op in sass),
    }


def exchange(ptx: list[str], sass: list[str]) -> str:
    """What stands around the first atomic addition: barriers, and what comes after it; in the machine code too."""
    at = next((i for i, op in enumerate(ptx) if op.startswith("atom")), None)
    if at is None:
        return ""
    machine = [op for op in sass if op.startswith(("ATOMG", "CCTL", "MEMBAR.ALL.GPU", "MEMBAR.SC.GPU", "LDG.E.STRONG"))]
    return " ".join([*ptx[at - 1 : at + 5], "|", *machine])


def main() -> None:
    jobs = [
        (f"{name}-sm{sm}", sm, *launch)
        for name in SHAPES
        for sm in (TARGETS if name in EVERYWHERE or os.environ.get("CODEGEN") == "all" else (90,))
        for launch in launches(name, sm)
    ]

    def build(job: tuple[str, int, Any, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        name, sm, source, options = job
        return name, inspect(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options), options)

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

"""Compile the attention block's kernels for several GPUs without one, and print what the machine code shows, as JSON.

Run by test_attention_codegen.py in a process of its own, since the tests' process interprets the kernels.
"""

from __future__ import annotations

import json
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
from compile_kernels import CUOBJDUMP, TARGETS, Launch, launched
from fastddpm_kernels import attention, linear
from triton.backends.compiler import GPUTarget


def product(
    tokens: int, k: int, n: int, *, groups: int = 0, dtype: torch.dtype = torch.bfloat16, wide: bool = False
) -> Launch:
    """The product for q, k and v; or, with groups, the projection: residual, factor, statistics."""
    x, out = torch.zeros(2, tokens, k, dtype=dtype), torch.zeros(2, tokens, n, dtype=dtype)
    more: dict[str, Any] = {}
    if groups:
        rows = linear.linear_tiles(tokens, n, x.element_size()).rows
        more = {"residual": out, "factor": 0.5, "statistics": torch.zeros(2, -(-tokens // rows), groups, 2)}
    if wide:
        more["tiles"] = linear.linear_tiles(1, n, x.element_size(), wide=True)
    weight = torch.zeros(k, n, dtype=dtype)
    [made] = launched(linear, partial(linear.launch_linear, **more), x, weight, torch.zeros(n), out)
    return made


def attended(tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    out = torch.zeros(2, tokens, heads * dim, dtype=dtype)
    [made] = launched(attention, partial(attention.launch_attention, heads=heads), torch.cat([out] * 3, dim=2), out)
    return made


SM_90_ONLY = ("qkv-256-wide", "qkv-fp32", "attention-256x1x256-fp16", "attention-100x2x40", "attention-fp32")


def variants() -> dict[str, Launch]:
    """The shapes of the UNets: DDPM's for CIFAR-10 (256 channels) and at 256 x 256 (512), diffusers' default heads."""
    float32, float16 = torch.float32, torch.float16
    return {
        "qkv-256": product(256, 256, 768),
        "qkv-256-wide": product(256, 256, 768, wide=True),
        "qkv-fp32": product(256, 256, 768, dtype=float32),
        "projection-256": product(256, 256, 256, groups=32),
        "projection-256-4x4": product(16, 256, 256, groups=32),
        "projection-512": product(256, 512, 512, groups=32),
        "attention-16x1x256": attended(16, 1, 256),
        "attention-64x1x256": attended(64, 1, 256),
        "attention-256x1x256": attended(256, 1, 256),
        "attention-256x1x256-fp16": attended(256, 1, 256, float16),
        "attention-64x1x512": attended(64, 1, 512),
        "attention-256x1x512": attended(256, 1, 512),
        "attention-1024x4x64": attended(1024, 4, 64),
        "attention-1024x64x8": attended(1024, 64, 8),
        "attention-100x2x40": attended(100, 2, 40),
        "attention-fp32": attended(256, 1, 256, float32),
    }


def inspect(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [CUOBJDUMP, "-sass", "-res-usage", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    kinds = ("LDGSTS", "LDG.", "STG.", "HGMMA", "HMMA", "UTCHMMA", "MUFU.EX2", "ATOM", "RED")
    return {
        "registers": int(usage["REG"]),
        "local": int(usage["LOCAL"]) + int(usage["STACK"]) + sum(op.startswith(("LDL", "STL")) for op in sass),
        "shared": compiled.metadata.shared,
        "instructions": sum(not op.startswith("NOP") for op in sass),
        "ops": dict(Counter(op for op in sass if op.startswith(kinds))),
        "rounds": bool(re.search(r"cvt\.rn\.(bf16|f16)", compiled.asm["ptx"])),
    }


def main() -> None:
    made = variants().items()
    jobs = [(name, sm, *job) for name, job in made for sm in TARGETS if sm == 90 or name not in SM_90_ONLY]

    def build(job: tuple[str, int, Any, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        name, sm, source, options = job
        made = inspect(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options))
        return f"{name}-sm{sm}", made | {"threads": 32 * options["num_warps"]}

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

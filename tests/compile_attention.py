"""Compile the attention block's kernels for several GPUs without one, and print what the machine code shows, as JSON.

Run by test_attention_codegen.py in a process of its own, since the tests' process interprets the kernels.
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
from compile_kernels import CUOBJDUMP, TARGETS, Launch, launched
from fastddpm_kernels import attention, linear
from triton.backends.compiler import GPUTarget


def product(rows: int, k: int, n: int, *, residual: bool = False, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """The product for q, k and v; or, with a residual, the projection."""
    x, out = torch.zeros(rows, k, dtype=dtype), torch.zeros(rows, n, dtype=dtype)
    more: dict[str, Any] = {"residual": out, "factor": 0.5} if residual else {}
    weight = torch.zeros(k, n, dtype=dtype)
    [made] = launched(linear, partial(linear.launch_linear, **more), x, weight, torch.zeros(n), out)
    return made


def attended(tokens: int, heads: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    out = torch.zeros(2, tokens, heads * dim, dtype=dtype)
    [made] = launched(attention, partial(attention.launch_attention, heads=heads), torch.cat([out] * 3, dim=2), out)
    return made


# Compiled for sm_90, and for the others with CODEGEN=all.
SM_90_ONLY = ("qkv-256-b4", "qkv-256-b8", "qkv-fp32", "projection-512")
SM_90_ONLY += ("attention-256x1x256-fp16", "attention-100x2x40", "attention-fp32")


def variants() -> dict[str, Launch]:
    """The shapes of the UNets: DDPM's for CIFAR-10 (256 channels) and at 256 x 256 (512), diffusers' default heads."""
    float32, float16 = torch.float32, torch.float16
    return {
        "qkv-256-b1": product(256, 256, 768),
        "qkv-256-b4": product(1024, 256, 768),
        "qkv-256-b8": product(2048, 256, 768),
        "qkv-256-b16": product(4096, 256, 768),
        "qkv-fp32": product(256, 256, 768, dtype=float32),
        "projection-256-b1": product(256, 256, 256, residual=True),
        "projection-256-b64": product(16384, 256, 256, residual=True),
        "projection-512": product(8192, 512, 512, residual=True),
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
    few = () if os.environ.get("CODEGEN") == "all" else SM_90_ONLY
    jobs = [(name, sm, *job) for name, job in made for sm in TARGETS if sm == 90 or name not in few]

    def build(job: tuple[str, int, Any, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        name, sm, source, options = job
        made = inspect(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options))
        return f"{name}-sm{sm}", made | {"threads": 32 * options["num_warps"]}

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

"""Compile every kernel variant for several GPUs without one, and print what the machine code shows, as JSON.

Run by test_codegen.py in a process of its own, since the tests' process interprets the kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from fastddpm_kernels import guidance_rescale, noise_mse_kernel, philox, q_sample_kernel, reverse_step_kernel, threshold
from fastddpm_kernels.columns import COLUMNS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "int32": "*i32", "int64": "*i64", "uint8": "*u8"}
Launch = tuple[ASTSource, dict[str, Any]]


def launched(module: ModuleType, launch: Callable[..., object], *args: Any, **kwargs: Any) -> list[Launch]:
    """What `launch` asks Triton to compile for these arguments, in order: kernels of `module`, and their options."""
    kernels = {name: f for name, f in vars(module).items() if isinstance(f, JITFunction) and name.endswith("_kernel")}
    caught: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: JITFunction) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.record

        def record(self, *positional: Any, **keywords: Any) -> None:
            names = self.kernel.arg_names
            options = {k: keywords.pop(k) for k in list(keywords) if k not in names}
            values = dict(zip(names, positional, strict=False)) | keywords
            caught.append((specialised(self.kernel, {name: values[name] for name in names}), options))

    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel))
    try:
        launch(*args, **kwargs)
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return caught


def specialised(kernel: Any, values: dict[str, Any]) -> ASTSource:
    """As Triton does it: a tensor is a 16-byte aligned pointer, 1 a constant, a multiple of 16 known as one."""
    signature, constexprs, attrs = {}, {}, {}
    for index, (name, value) in enumerate(values.items()):
        fixed = name in (kernel.do_not_specialize or ())
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[str(value.dtype).removeprefix("torch.")]
        elif kernel.params[index].is_constexpr or (value == 1 and not fixed):
            signature[name], constexprs[(index,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if signature[name][0] == "*" or (signature[name] == "i32" and not fixed and value % 16 == 0):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs, attrs)


def variants() -> dict[str, Launch]:
    """Every kernel, as the launchers launch it."""
    made = {}
    seeds, cursor, t = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32), torch.zeros(2).long()

    def reverse(dtype=torch.bfloat16, *, shape=(2, 3, 32, 32), history=0, x0=False, last=False, guided=False, **flags):
        """As the DDPM sampler launches it, but for what is said."""
        x, table = torch.zeros(shape), torch.zeros(4, len(COLUMNS))
        m = torch.zeros(2 * shape[0] if guided else shape[0], *shape[1:], dtype=dtype)
        m = m.to(memory_format=torch.channels_last) if last else m
        buffers = {"x0": x if x0 else None} | {f"h{k}": x for k in range(1, history + 1)}
        buffers |= {name: torch.zeros(shape[0]) for name in ("guidance", "rescale") if guided}
        buffers |= {"bound": torch.zeros(shape[0], 2)} if flags.pop("dynamic", False) else {}
        buffers |= {"known": x, "mask": x > 0} if flags.pop("inpaint", False) else {}
        buffers |= {"z": x} if flags.pop("given", False) else {}
        buffers |= {"next_cursor": cursor, "t": t}
        flags = {"limited": True, "noise": True, "direct": False, "scaled": False} | flags
        launch = partial(reverse_step_kernel.launch_reverse_step, out=x, model_input=m, **buffers, **flags)
        output = torch.cat([m, m], dim=1) if flags.get("learned") else m
        return launched(reverse_step_kernel, launch, x, output, table, cursor, seeds, cursor)[0]

    def loss(dtype, *, shape=(2, 3, 32, 32), mixed=False, backward=False, last=False):
        """The training loss or its gradient; mixed: of a target that has x0 in it."""
        m = torch.zeros(shape, dtype=dtype)
        m = m.to(memory_format=torch.channels_last) if last else m
        x0 = (torch.zeros(shape), t, torch.zeros(10, 2)) if mixed else ()
        gradient = {"grad": torch.zeros(shape[0]), "out": m} if backward else {}
        launch = partial(noise_mse_kernel.launch_noise_mse, step=1, **gradient)
        return launched(noise_mse_kernel, launch, m, seeds, *x0)[0]

    for dtype, short in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        made[f"reverse_step-{short}"] = reverse(dtype)
        made[f"noise_mse-{short}"] = loss(dtype)
        made[f"noise_mse-backward-{short}"] = loss(dtype, backward=True)
        x, pairs = torch.zeros(2, 3, 32, 32, dtype=dtype), torch.zeros(10, 2)
        q = partial(launched, q_sample_kernel, q_sample_kernel.launch_q_sample)
        [made[f"q_sample-{short}"]] = q(x, x, x, t, pairs, seeds, step=1)
        [made[f"noised-{short}"]] = q(x, None, x, t, pairs, seeds, step=1)
        [made[f"add_noise-{short}"]] = q(x, x, x, t, pairs)
    made["noise_mse-mixed"] = loss(torch.bfloat16, mixed=True)
    made["noise_mse-backward-mixed"] = loss(torch.bfloat16, mixed=True, backward=True)
    made["noise_mse-backward-channels_last"] = loss(torch.bfloat16, mixed=True, backward=True, last=True)
    made["noise_mse-odd"] = loss(torch.float32, shape=(2, 3, 5, 7))
    made["noise_mse-large"] = loss(torch.float32, shape=(2, 3, 64, 64))
    made["reverse_step-masked"] = reverse(shape=(2, 1, 28, 28))
    made["reverse_step-odd"] = reverse(shape=(2, 3, 5, 7))
    made["reverse_step-one"] = reverse(shape=(2, 1))
    made["reverse_step-ddim"] = reverse(noise=False, direct=True)
    made["reverse_step-unlimited"] = reverse(limited=False)
    made["reverse_step-dynamic"] = reverse(dynamic=True)
    made["reverse_step-scaled"] = reverse(scaled=True, direct=True)
    made["reverse_step-guided"] = reverse(guided=True)
    made["reverse_step-learned"] = reverse(learned=True)
    made["reverse_step-inpaint"] = reverse(inpaint=True)
    made["reverse_step-history1"] = reverse(history=1, noise=False, direct=True)
    made["reverse_step-history2"] = reverse(history=2)
    made["reverse_step-history3"] = reverse(history=3)
    made["reverse_step-history3-noiseless"] = reverse(history=3, noise=False)
    made["reverse_step-history3-odd"] = reverse(history=3, shape=(2, 3, 5, 7))
    made["reverse_step-channels_last-history3"] = reverse(last=True, history=3)
    made["reverse_step-x0"] = reverse(x0=True)
    made["reverse_step-given"] = reverse(given=True)
    made["reverse_step-channels_last-given"] = reverse(last=True, given=True, history=1, direct=True, scaled=True)
    made["reverse_step-history1-noise"] = reverse(history=1, x0=True, shape=(2, 1, 28, 28))
    made["reverse_step-channels_last"] = reverse(last=True)
    made["reverse_step-channels_last-learned"] = reverse(torch.float32, last=True, learned=True, shape=(2, 1, 28, 28))
    made["reverse_step-channels_last-inpaint"] = reverse(last=True, inpaint=True)
    made["reverse_step-channels_last-guided"] = reverse(
        last=True, inpaint=True, guided=True, shape=(2, 3, 64, 64), scaled=True, direct=True
    )
    everything = dict(history=3, x0=True, guided=True, learned=True, inpaint=True, dynamic=True, direct=True)
    made["reverse_step-everything"] = reverse(scaled=True, **everything)
    [made["normal"]] = launched(philox, philox.launch_normal, x.float(), seeds, step=1, stream=0)
    table = torch.zeros(4, len(COLUMNS))
    [made["advance"]] = launched(reverse_step_kernel, reverse_step_kernel.launch_advance, cursor, t, table)
    return made | whole_samples(cursor, table)


def whole_samples(cursor: torch.Tensor, table: torch.Tensor) -> dict[str, Launch]:
    """The kernels that look at a whole sample before its step: dynamic thresholding and guidance rescale."""
    made, two = {}, torch.zeros(2)

    def model(shape, *, guided=True, learned=False, last=False):
        m = torch.zeros(4 if guided else 2, shape[1] * (2 if learned else 1), *shape[2:], dtype=torch.bfloat16)
        return m.to(memory_format=torch.channels_last) if last else m

    for name, shape, options in (
        ("small", (2, 3, 32, 32), dict(guided=False)),
        ("full", (2, 4, 64, 64), dict(guided=False)),
        ("everything", (2, 3, 64, 64), dict(learned=True, last=True)),
        ("odd", (2, 3, 63, 63), dict(learned=True)),
        ("large", (2, 3, 256, 256), dict(guided=False)),
    ):
        weights = {"guidance": two, "rescale": two} if options.get("guided", True) else {}
        launch = partial(threshold.launch_threshold, learned=options.get("learned", False), **weights)
        launches = launched(threshold, launch, torch.zeros(shape), model(shape, **options), table, cursor, two)
        made |= {f"threshold-{name}-{k}": launch for k, launch in enumerate(launches)}
    for name, shape, options in (
        ("small", (2, 3, 32, 32), {}),
        ("full", (2, 4, 64, 64), {}),
        ("learned", (2, 3, 64, 64), dict(learned=True, last=True)),
        ("large", (2, 3, 256, 256), {}),
    ):
        launch = partial(guidance_rescale.launch_rescale_factor, learned=options.get("learned", False))
        launches = launched(guidance_rescale, launch, model(shape, **options), two, two, two)
        made |= {f"rescale-{name}-{k}": launch for k, launch in enumerate(launches)}
    return made


def inspect(compiled) -> dict[str, object]:
    """What the regression test asks about: registers, local memory, access widths, instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        run = [CUOBJDUMP, "-sass", "-res-usage", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    sass = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text)
    usage = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text))
    return {
        "registers": int(usage["REG"]),
        "local": int(usage["LOCAL"]) + int(usage["STACK"]) + sum(op.startswith(("LDL", "STL")) for op in sass),
        "shared": int(usage["SHARED"]) + sum(op.startswith(("LDS", "STS", "LDSM", "STSM")) for op in sass),
        "barriers": sum(op.startswith("BAR") for op in sass),
        "accesses": dict(Counter(op for op in sass if op.startswith(("LDG", "STG")))),
        "loads": sorted({op for op in sass if op.startswith("LDG")}),
        "stores": sorted({op for op in sass if op.startswith("STG")}),
        "instructions": sum(not op.startswith("NOP") for op in sass),
        "conversions": sorted(set(re.findall(r"cvt\.rn[\w.]*", compiled.asm["ptx"]))),
        "keeps_nan": sorted(set(re.findall(r"(min|max)(?:\.\w+)*\.NaN", compiled.asm["ptx"]))),
        "fused": sum(2 if packed else 1 for packed in re.findall(r"fma\.rn\.f32(x2)?", compiled.asm["ptx"])),
    }


# On sm_90 all variants are compiled, on the others these, unless CODEGEN=all: they differ in few instructions.
CORE = {f"reverse_step-{name}" for name in ("bf16", "fp32", "guided", "learned", "inpaint", "history3", "everything")}
CORE |= {"reverse_step-channels_last", "normal", "q_sample-bf16", "noise_mse-backward-bf16", "advance"}
CORE |= {f"threshold-everything-{k}" for k in range(5)} | {"rescale-learned-0"}


def targets(name: str) -> tuple[int, ...]:
    """The GPUs that a variant is compiled for."""
    return TARGETS if name in CORE or os.environ.get("CODEGEN") == "all" else (90,)


def main() -> None:
    jobs = [(name, sm, *launch) for name, launch in variants().items() for sm in targets(name)]

    def build(job: tuple[str, int, ASTSource, dict[str, Any]]) -> tuple[str, dict[str, object]]:
        name, sm, source, options = job
        made = inspect(triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options))
        names, threads = source.fn.arg_names, 32 * options["num_warps"]
        lanes = source.constants[(names.index("BLOCK"),)] if "BLOCK" in names else threads // 4
        made["elements"] = 4 * lanes / threads  # a thread's
        return f"{name}-sm{sm}", made

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

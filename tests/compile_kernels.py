"""Compile every kernel variant for several GPUs without one, and print what the machine code shows, as JSON.

Run by test_codegen.py in a process of its own, since the tests' process interprets the kernels.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton
from fastddpm_kernels import philox, q_sample_kernel, reverse_step_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = (80, 90, 100)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(kernel, pointers: dict[str, str], constexprs: dict[str, object], *, aligned: bool = True) -> ASTSource:
    """Arguments as the launcher would specialise them: 16-byte pointers, n a multiple of 16 (or not), q always.

    An integer of 1 becomes a constant, unless the kernel says that it may not.
    """
    signature, attrs = {}, {}
    if "step" in kernel.arg_names and "step" not in (kernel.do_not_specialize or ()):
        constexprs = constexprs | {"step": 1}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constexprs else pointers.get(name, "i32")
        if name in pointers or name == "q" or (name == "n" and aligned):
            attrs[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constexprs.items()}, attrs)


def variants() -> dict[str, ASTSource]:
    """Every kernel, with the arguments that the launchers give."""
    made = {}
    step = {"table_ptr": "*fp32", "cursor_ptr": "*i32", "seeds_ptr": "*i64", "nonfinite_ptr": "*i32"}
    step |= dict.fromkeys(("x_ptr", "out_ptr", "x0_ptr", "h1_ptr", "h2_ptr"), "*fp32")

    def reverse(dtype="bf16", *, aligned=True, **switches):
        constexprs = dict(LIMITED=True, NOISE=True, HISTORY=0, WRITE_INPUT=True, WRITE_X0=False)
        constexprs |= dict(PLANE=0, CHANNELS=0, BLOCK=512) | switches
        pointers = step | {"m_ptr": f"*{dtype}", "input_ptr": f"*{dtype}"}
        return source(reverse_step_kernel.reverse_step_kernel, pointers, constexprs, aligned=aligned)

    for dtype in ("fp32", "bf16", "fp16"):
        made[f"reverse_step-{dtype}"] = reverse(dtype)
    made["reverse_step-odd"] = reverse(aligned=False)
    made["reverse_step-one"] = reverse(aligned=False, n=1)
    made["reverse_step-ddim"] = reverse(NOISE=False)
    made["reverse_step-unlimited"] = reverse(LIMITED=False)
    made["reverse_step-history1"] = reverse(HISTORY=1, NOISE=False)
    made["reverse_step-history2"] = reverse(HISTORY=2)
    made["reverse_step-x0"] = reverse(WRITE_X0=True)
    made["reverse_step-channels_last"] = reverse(PLANE=1024, CHANNELS=3)

    made["normal"] = source(philox.normal_kernel, {"out_ptr": "*fp32", "seeds_ptr": "*i64"}, dict(stream=0, BLOCK=512))
    for draw in (True, False):
        for dtype in ("fp32", "bf16", "fp16"):
            pointers = {f"{name}_ptr": f"*{dtype}" for name in ("x0", "noise", "out")}
            pointers |= {"t_ptr": "*i64", "table_ptr": "*fp32", "seeds_ptr": "*i64"}
            constexprs = dict(stream=2, DRAW=draw, BLOCK=512)
            name = f"{'q_sample' if draw else 'add_noise'}-{dtype}"
            made[name] = source(q_sample_kernel.q_sample_kernel, pointers, constexprs)
    pointers = {"cursor_ptr": "*i32", "t_ptr": "*i64", "table_ptr": "*fp32"}
    made["advance"] = source(reverse_step_kernel.advance_kernel, pointers, dict(BLOCK=128))
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
        "shared": sum(op.startswith(("LDS", "STS")) for op in sass),
        "loads": sorted({op for op in sass if op.startswith("LDG")}),
        "stores": sorted({op for op in sass if op.startswith("STG")}),
        "instructions": sum(not op.startswith("NOP") for op in sass),
        "conversions": sorted(set(re.findall(r"cvt\.rn[\w.]*", compiled.asm["ptx"]))),
        "nan_clamp": ".NaN" in compiled.asm["ptx"],
        "fp_fusion": compiled.metadata.enable_fp_fusion,
    }


def main() -> None:
    jobs = [(name, sm, src) for name, src in variants().items() for sm in TARGETS]

    def build(job):
        name, sm, src = job
        options = {"num_warps": 4, "enable_fp_fusion": True}
        return f"{name}-sm{sm}", inspect(triton.compile(src, target=GPUTarget("cuda", sm, 32), options=options))

    with ThreadPoolExecutor(2) as pool:
        json.dump(dict(pool.map(build, jobs)), sys.stdout, indent=1)


if __name__ == "__main__":
    main()

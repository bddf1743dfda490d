"""The machine code of the attention block's kernels, for three GPUs, without a GPU: what the design asks of it.

What is compiled is what the launchers launch. The table is recorded from a compilation with Triton 3.7.1; a change may
lower its figures but not raise them by more than 3 %.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMS = (80, 90, 100)

ALL = os.environ.get("CODEGEN") == "all"  # else some are compiled for sm_90 alone

# Registers on sm_80, sm_90 and sm_100, SASS instructions on sm_90, KB of shared memory on sm_90.
TABLE = {
    "qkv-256-b1": (64, 46, 36, 395, 48),
    "qkv-256-b4": (102, 64, 64, 481, 64),
    "qkv-256-b8": (184, 128, 102, 675, 72),
    "qkv-256-b16": (128, 102, 106, 576, 96),
    "qkv-fp32": (96, 80, 89, 822, 8),
    "projection-256-b1": (72, 48, 41, 477, 48),
    "projection-256-b64": (198, 167, 164, 977, 72),
    "projection-512": (198, 205, 164, 1354, 72),
    "attention-16x1x256": (56, 56, 56, 408, 16),
    "attention-64x1x256": (128, 133, 89, 1192, 64),
    "attention-256x1x256": (254, 204, 228, 1558, 160),
    "attention-256x1x256-fp16": (254, 204, 228, 1558, 160),
    "attention-64x1x512": (128, 132, 94, 1473, 128),
    "attention-256x1x512": (244, 189, 200, 1695, 160),
    "attention-1024x4x64": (139, 106, 110, 632, 48),
    "attention-1024x64x8": (106, 130, 128, 546, 20),
    "attention-100x2x40": (156, 106, 108, 651, 48),
    "attention-fp32": (122, 119, 121, 1406, 32),
}
SM_90_ONLY = ("qkv-256-b4", "qkv-256-b8", "qkv-fp32", "projection-512")
SM_90_ONLY += ("attention-256x1x256-fp16", "attention-100x2x40", "attention-fp32")
ONE_BLOCK = ("attention-16x1x256", "attention-64x1x256", "attention-64x1x512")  # of keys: no loop, nothing to overlap
SHARED = {80: 163, 90: 227, 100: 227}  # KB that a program may have
TENSOR_CORES = {80: "HMMA.16816", 90: "HGMMA.64x", 100: "UTCHMMA"}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent / "kernels")
    run = subprocess.run(
        [sys.executable, HERE / "compile_attention.py"], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def count(code: dict, *kinds: str) -> int:
    return sum(n for op, n in code["ops"].items() if op.startswith(kinds))


def test_every_variant_compiles_for_every_gpu(compiled):
    few = () if ALL else SM_90_ONLY
    assert set(compiled) == {f"{name}-sm{sm}" for name in TABLE for sm in SMS if sm == 90 or name not in few}


def test_nothing_spills(compiled):
    assert {name: code["local"] for name, code in compiled.items() if code["local"]} == {}


@pytest.mark.parametrize("name", TABLE)
def test_registers_instructions_and_shared_memory(compiled, name):
    *registers, instructions, shared = TABLE[name]
    for sm, recorded in zip(SMS, registers, strict=True):
        if code := compiled.get(f"{name}-sm{sm}"):
            assert code["registers"] <= 1.03 * recorded + 2
            assert code["registers"] * code["threads"] <= 65536
            assert code["shared"] <= 1024 * SHARED[sm]
    code = compiled[f"{name}-sm90"]
    assert code["instructions"] <= 1.03 * instructions
    assert code["shared"] <= 1024 * (shared + 1)


def test_products_are_the_tensor_cores(compiled):
    for name, code in compiled.items():
        if "fp32" in name:
            assert count(code, "HMMA", "HGMMA") == 0  # exact products, which the tensor cores don't have
        elif "attention-16x" in name:
            assert count(code, "HMMA.16816") > 0  # 16 rows: too few for a warpgroup's instruction
        else:
            sm = int(name.rpartition("sm")[2])
            assert count(code, TENSOR_CORES[sm]) > 0, name
            assert sm == 80 or count(code, "HMMA") == 0, name


def test_loads_overlap_with_products(compiled):
    """Copied to shared memory asynchronously, 16 bytes a thread at a time, past L1."""
    for name, code in compiled.items():
        if not name.startswith(ONE_BLOCK) and "attention-fp32" not in name:
            copies = [op for op in code["ops"] if op.startswith("LDGSTS")]
            assert copies == ["LDGSTS.E.BYPASS.128"], name


def test_everything_else_moves_in_128_bits(compiled):
    for name, code in compiled.items():
        assert {op for op in code["ops"] if op.startswith("STG")} == {"STG.E.128"}, name
        if "attention" in name:  # the products also load a bias
            assert {op for op in code["ops"] if op.startswith("LDG.")} == {"LDG.E.128"}, name


def test_a_multiprocessor_has_two_programs_of_a_product(compiled):
    """By registers, which come by 8 a thread, and by shared memory, of which each program takes 1 KB more."""
    for name, code in compiled.items():
        if "attention" not in name:
            assert 2 * -(-code["registers"] // 8) * 8 * code["threads"] <= 65536, name
            assert 2 * (code["shared"] + 1024) <= 1024 * (SHARED[int(name.rpartition("sm")[2])] + 1), name


def test_one_power_of_two_a_score(compiled):
    """And one a row of the thread's, of which it has two, for what was summed before: no library function."""
    for name, scores in (("256x1x256", 32), ("256x1x512", 16), ("1024x4x64", 32), ("1024x64x8", 64), ("64x1x256", 32)):
        assert count(compiled[f"attention-{name}-sm90"], "MUFU.EX2") == scores + 2


def test_nothing_is_added_in_an_order_of_chance(compiled):
    for name, code in compiled.items():
        # ATOMS and REDUX are how sm_100 gives out its tensor memory.
        assert [
            op for op in code["ops"] if op.startswith(("ATOM", "RED")) and op[:5] not in ("ATOMS", "REDUX")
        ] == [], name


def test_half_precision_stores_round_to_nearest(compiled):
    assert {name for name, code in compiled.items() if not code["rounds"]} == {n for n in compiled if "fp32" in n}

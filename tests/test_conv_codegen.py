"""The machine code of the CIFAR-10 UNet's convolutions, for three GPUs, without a GPU: what the design asks of it.

What is compiled is what the launcher launches, in bfloat16, at batch 256 where the name doesn't say otherwise. The
figures are recorded from a compilation with Triton 3.7.1. Not measured on a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SMS = (80, 90, 100)
UNIT = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# A multiprocessor of sm_90 has two of their programs at once: 128 registers. One multiplies while the other waits.
TWO_PROGRAMS = (
    "first-32", "two-sources-32", "conv1-32", "shortcut-32", "residual-32", "shifted-32", "down-32", "conv1-16",
    "residual-16", "up-8", "qkv-16", "to-out-16",
)  # fmt: skip
WAITING = [name for name in TWO_PROGRAMS if name not in ("two-sources-32", "qkv-16")] + ["batch-1-32", "batch-1-16"]

# (registers, bytes of shared memory, instructions) on sm_80, sm_90, sm_100. Those with norms: first, conv1, shortcut,
# residual (two norms), shifted, down, up-8, to-out, segments, batch-1.
RESOURCES = {
    "first-32": ((148, 24576, 3113), (128, 32768, 3254), (186, 40976, 3269)),
    "last-32": ((101, 55296, 1527), (64, 73728, 1517), (56, 73744, 1864)),
    "two-sources-32": ((172, 65536, 1222), (116, 98304, 1138), (123, 98320, 1413)),
    "conv1-32": ((168, 65536, 2561), (128, 98304, 2585), (168, 98320, 2755)),
    "shortcut-32": ((170, 65536, 2752), (128, 98304, 2757), (182, 98320, 2956)),
    "residual-32": ((172, 65536, 3959), (128, 98304, 4076), (236, 98320, 3977)),
    "shifted-32": ((168, 65536, 2621), (128, 98304, 2765), (247, 98320, 2949)),
    "down-32": ((170, 65536, 2527), (128, 98304, 2500), (182, 98320, 2706)),
    "conv1-16": ((166, 65536, 2500), (128, 98304, 2578), (131, 98320, 2550)),
    "residual-16": ((174, 65536, 3606), (128, 98304, 3649), (184, 98320, 3511)),
    "plain-16": ((248, 147456, 1924), (250, 196608, 1736), (254, 196624, 2132)),
    "up-16": ((254, 147456, 1677), (206, 196608, 1367), (166, 196624, 1686)),
    "to-out-8": ((175, 65536, 2676), (179, 98304, 2744), (182, 98320, 2641)),
    "up-8": ((173, 65536, 2666), (128, 98304, 2668), (190, 98320, 2722)),
    "qkv-16": ((160, 65536, 1003), (120, 98304, 898), (106, 98320, 1162)),
    "to-out-16": ((170, 65536, 2637), (128, 98304, 2705), (190, 98320, 2679)),
    "segments-8": ((161, 49152, 2422), (132, 65536, 2431), (132, 65552, 2703)),
    "batch-1-32": ((128, 49152, 1856), (95, 65536, 1839), (123, 65552, 2125)),
    "batch-1-16": ((72, 36864, 1822), (59, 49152, 1792), (64, 49168, 1960)),
    "batch-1-4": ((80, 36864, 1885), (95, 49152, 1868), (72, 49168, 2093)),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent / "kernels")
    run = subprocess.run([sys.executable, HERE / "compile_conv.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_shape_compiles(compiled):
    assert {f"{name}-sm90" for name in RESOURCES} <= set(compiled)
    assert len(compiled) > len(RESOURCES)


def test_nothing_spills(compiled):
    assert {name: code["local"] for name, code in compiled.items() if code["local"]} == {}


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("sm", SMS)
def test_programs_wait_for_each_other(compiled, name, sm):
    """All threads have stored, one adds to the counter, and reads it until all are there; then all threads read.

    Stores, barrier, and an addition that is a release: by causality what all of the program's threads wrote is there
    for who reads the sum. The load is an acquire, and empties the multiprocessor's L1 (CCTL.IVALL): what is read after
    the barrier behind it can't be old.
    """
    if f"{name}-sm{sm}" not in compiled:
        pytest.skip("compiled with CODEGEN=all")
    ptx, machine = compiled[f"{name}-sm{sm}"]["exchange"].split(" | ")
    assert ptx.split()[:2] == ["bar.sync", "atom.global.gpu.acq_rel.add.u32"]
    after = ptx.split()[2:]
    load = after.index("ld.global.gpu.acquire.b32")
    assert set(after[:load]) == {"bar.sync"}
    assert after[load + 1] == "bar.sync"
    assert machine.split()[:3] == ["MEMBAR.ALL.GPU", "ATOMG.E.ADD.STRONG.GPU", "CCTL.IVALL"]
    assert machine.split()[3:5] == ["LDG.E.STRONG.GPU", "CCTL.IVALL"]


def test_the_last_segment_does_not_wait(compiled):
    ptx, machine = compiled["batch-1-4-sm90"]["exchange"].split(" | ")
    assert ptx.split()[:2] == ["bar.sync", "atom.global.gpu.acq_rel.add.u32"]
    assert "LDG.E.STRONG" not in machine


@pytest.mark.parametrize("name", RESOURCES)
@pytest.mark.parametrize("sm", SMS)
def test_tensor_cores_and_asynchronous_copies_of_16_bytes(compiled, name, sm):
    if f"{name}-sm{sm}" not in compiled:
        pytest.skip("compiled with CODEGEN=all")
    code = compiled[f"{name}-sm{sm}"]
    assert code["unit"] == UNIT[sm]
    # Nothing narrower: a pointer whose alignment was lost would silently have no pipeline. The first convolution's
    # three channels are no 16 bytes: there only the weights come so.
    assert set(code["asynchronous"]) == {"LDGSTS.E.BYPASS.128"}
    # As many for the prologue's steps as for the loop's: the pipeline has its stages.
    assert code["asynchronous"]["LDGSTS.E.BYPASS.128"] >= (6 if name == "first-32" else 24)


def test_results_are_stored_in_16_bytes(compiled):
    for name, code in compiled.items():
        if not name.startswith("last-32"):  # three channels
            wide = code["stores"]
            # The rest: mean and squares, by column; a counter.
            assert set(wide) <= {"STG.E.128", "STG.E"}, name
            assert wide.get("STG.E", 0) <= 2, name


@pytest.mark.parametrize("name", TWO_PROGRAMS)
def test_two_programs_a_multiprocessor(compiled, name):
    code = compiled[f"{name}-sm90"]
    assert code["registers"] * 32 * code["warps"] * 2 <= 65536
    assert code["shared"] * 2 <= 228 * 1024 - 2 * 1024


@pytest.mark.parametrize("name", RESOURCES)
def test_resources(compiled, name):
    for sm, (registers, shared, instructions) in zip(SMS, RESOURCES[name], strict=True):
        if f"{name}-sm{sm}" not in compiled:
            continue
        code = compiled[f"{name}-sm{sm}"]
        assert code["registers"] <= max(1.05 * registers, registers + 8)
        assert code["shared"] <= shared
        assert code["instructions"] <= 1.05 * instructions

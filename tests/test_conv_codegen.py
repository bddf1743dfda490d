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
TWO_PROGRAMS = ("two-sources-32", "shortcut-32", "down-32", "statistics-32")  # a multiprocessor of sm_90: 128 registers

# (registers, bytes of shared memory, instructions) on sm_80, sm_90, sm_100. "+" is the kernel that adds the segments.
RESOURCES = {
    "first-32": ((152, 32768, 1663), (114, 32768, 1642), (131, 40976, 1907)),
    "last-32": ((100, 55296, 1562), (80, 73728, 1577), (74, 73744, 1997)),
    "two-sources-32": ((172, 65536, 1274), (107, 98304, 1181), (126, 98320, 1481)),
    "shortcut-32": ((170, 65536, 1303), (103, 98304, 1215), (119, 98320, 1526)),
    "residual-32": ((162, 65536, 1440), (136, 98304, 1346), (134, 98320, 1566)),
    "statistics-32": ((182, 65536, 2239), (128, 98304, 2175), (164, 98320, 2446)),
    "down-32": ((169, 65536, 1214), (124, 98304, 1121), (122, 98320, 1410)),
    "residual-16": ((252, 147456, 2005), (249, 196608, 1866), (255, 196624, 2189)),
    "up-16": ((241, 147456, 1862), (216, 196608, 1607), (171, 196624, 1930)),
    "1x1-residual-16": ((163, 65536, 1262), (135, 98304, 1170), (126, 98320, 1381)),
    "segments-8": ((165, 49152, 1753), (124, 65536, 1687), (117, 65552, 2168)),
    "batch-1-4": ((80, 36864, 1196), (48, 49152, 1186), (40, 49168, 1475)),
    "batch-1-4+": ((44, 128, 449), (34, 128, 454), (34, 128, 438)),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent / "kernels")
    run = subprocess.run([sys.executable, HERE / "compile_conv.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_shape_compiles_for_every_gpu(compiled):
    assert set(compiled) == {f"{name}-sm{sm}" for name in RESOURCES for sm in SMS}


def test_nothing_spills(compiled):
    assert {name: code["local"] for name, code in compiled.items() if code["local"]} == {}


@pytest.mark.parametrize("name", [name for name in RESOURCES if not name.endswith("+")])
@pytest.mark.parametrize("sm", SMS)
def test_tensor_cores_and_asynchronous_copies_of_16_bytes(compiled, name, sm):
    code = compiled[f"{name}-sm{sm}"]
    assert code["unit"] == UNIT[sm]
    # Nothing narrower: a pointer whose alignment was lost would silently have no pipeline. The first convolution's
    # three channels are no 16 bytes: there only the weights come so.
    assert set(code["asynchronous"]) == {"LDGSTS.E.BYPASS.128"}
    # As many for the prologue's steps as for the loop's: the pipeline has its stages.
    assert code["asynchronous"]["LDGSTS.E.BYPASS.128"] >= (6 if name == "first-32" else 24)


@pytest.mark.parametrize("sm", SMS)
def test_results_are_stored_in_16_bytes(compiled, sm):
    for name in RESOURCES:
        if name != "last-32":  # three channels
            wide = compiled[f"{name}-sm{sm}"]["stores"]
            assert set(wide) - {"STG.E"} == {"STG.E.128"}, name
            assert "STG.E" not in wide or name.startswith(("statistics", "batch-1-4")), name


@pytest.mark.parametrize("name", TWO_PROGRAMS)
def test_two_programs_a_multiprocessor(compiled, name):
    code = compiled[f"{name}-sm90"]
    assert code["registers"] * 32 * code["warps"] * 2 <= 65536
    assert code["shared"] * 2 <= 228 * 1024 - 2 * 1024


@pytest.mark.parametrize("name", RESOURCES)
def test_resources(compiled, name):
    for sm, (registers, shared, instructions) in zip(SMS, RESOURCES[name], strict=True):
        code = compiled[f"{name}-sm{sm}"]
        assert code["registers"] <= max(1.05 * registers, registers + 8)
        assert code["shared"] <= shared
        assert code["instructions"] <= 1.05 * instructions

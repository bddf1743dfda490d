"""The machine code of Diffusion Policy's convolutions, for three GPUs, without a GPU: what the design asks of it.

What is compiled is what the launcher launches, in bfloat16, at batch 1 where the name doesn't say otherwise. The
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
WHOLE = ("first", "last", "batch-256-film-16")  # one program has the whole sum of a tile

# (registers, bytes of shared memory, instructions) on sm_80, sm_90, sm_100
RESOURCES = {
    "first": ((40, 7680, 695), (35, 10240, 765), (32, 10256, 832)),
    "film-16": ((48, 30720, 912), (39, 40960, 912), (32, 40976, 1120)),
    "residual-16": ((48, 30720, 903), (39, 40960, 908), (32, 40976, 1114)),
    "film-8": ((56, 30720, 931), (46, 40960, 961), (42, 40976, 1167)),
    "residual-4": ((60, 55296, 1027), (48, 73728, 1063), (54, 73744, 1295)),
    "two-sources-4": ((56, 30720, 1009), (48, 40960, 1034), (47, 40976, 1263)),
    "shortcut-4": ((56, 30720, 467), (40, 40960, 486), (64, 40976, 719)),
    "down-16": ((40, 30720, 426), (40, 40960, 418), (40, 40976, 656)),
    "up-4": ((40, 30720, 440), (40, 40960, 430), (44, 40976, 643)),
    "last": ((42, 30720, 427), (36, 40960, 427), (32, 40976, 514)),
    "batch-64-film-16": ((128, 49152, 2121), (108, 65536, 2111), (87, 65552, 2318)),
    "batch-64-residual-4": ((128, 73728, 2780), (106, 98304, 2779), (100, 98320, 3148)),
    "batch-256-film-16": ((128, 49152, 2918), (110, 65536, 2421), (95, 65552, 2127)),
}


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent / "kernels")
    run = subprocess.run([sys.executable, HERE / "compile_conv1d.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_shape_compiles_for_every_gpu(compiled):
    assert set(compiled) == {f"{name}-sm{sm}" for name in RESOURCES for sm in SMS}


def test_nothing_spills(compiled):
    assert {name: code["local"] for name, code in compiled.items() if code["local"]} == {}


@pytest.mark.parametrize("name", RESOURCES)
@pytest.mark.parametrize("sm", SMS)
def test_tensor_cores_and_asynchronous_copies(compiled, name, sm):
    code = compiled[f"{name}-sm{sm}"]
    assert code["unit"] == UNIT[sm]
    # The weights, which are nearly all that is read, come in 16 bytes. What is narrower are trajectories: two actions,
    # or 16 positions among 256 threads.
    copies = code["asynchronous"]
    assert set(copies) - {"LDGSTS.E.BYPASS.128"} == {"first": {"LDGSTS.E"}, "residual-4": {"LDGSTS.E.64"}}.get(
        name, set()
    )
    assert copies["LDGSTS.E.BYPASS.128"] >= (8 if name == "first" else 16)


@pytest.mark.parametrize("sm", SMS)
def test_results_and_partial_sums_are_stored_in_16_bytes(compiled, sm):
    for name in RESOURCES:
        wide = {"STG.E"} if name == "last" else {"STG.E.128"}  # two actions
        assert set(compiled[f"{name}-sm{sm}"]["stores"]) == wide, name


@pytest.mark.parametrize("name", [name for name in RESOURCES if name not in WHOLE])
@pytest.mark.parametrize("sm", SMS)
def test_the_last_one_sees_what_the_others_stored(compiled, name, sm):
    """All threads' stores, a barrier, one thread's release and acquire, a barrier, loads from L2: in this order."""
    said = [kind for kind in compiled[f"{name}-sm{sm}"]["protocol"] if not kind.startswith("fence.proxy")]
    at = said.index("atom.global.gpu.acq_rel.add.u32")
    assert said[at - 2 : at + 3] == ["st.global", "bar.sync", said[at], "bar.sync", "ld.global.cg"]
    assert sum(kind.startswith("atom") for kind in said) == 1


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_sum_needs_no_counter(compiled, name):
    for sm in SMS:
        assert not any(kind.startswith("atom") for kind in compiled[f"{name}-sm{sm}"]["protocol"])


@pytest.mark.parametrize("name", RESOURCES)
def test_resources(compiled, name):
    for sm, (registers, shared, instructions) in zip(SMS, RESOURCES[name], strict=True):
        code = compiled[f"{name}-sm{sm}"]
        assert code["registers"] <= max(1.05 * registers, registers + 8)
        assert code["shared"] <= shared
        assert code["instructions"] <= 1.05 * instructions

"""The machine code of every kernel variant, for three GPUs, without a GPU: what the design asks of it.

What is compiled is what the launchers launch. Instructions are counted over the whole program and divided by a thread's
elements; the figures below are recorded from a
compilation with Triton 3.7.1, and a change may lower them but not raise them by more than 3 %.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import targets

HERE = Path(__file__).parent

# SASS instructions an element on sm_90. The H200 issues 80 in the time in which it moves 12 B an element.
INSTRUCTIONS = {
    "add_noise-bf16": 8.1,
    "add_noise-fp16": 7.1,
    "add_noise-fp32": 4.7,
    "noise_mse-backward-bf16": 33.0,
    "noise_mse-backward-channels_last": 52.1,
    "noise_mse-backward-fp16": 32.5,
    "noise_mse-backward-fp32": 31.3,
    "noise_mse-backward-mixed": 36.7,
    "noise_mse-bf16": 33.0,
    "noise_mse-fp16": 32.5,
    "noise_mse-fp32": 31.5,
    "noise_mse-large": 31.5,
    "noise_mse-mixed": 37.1,
    "noise_mse-odd": 36.6,
    "noised-bf16": 34.0,
    "noised-fp16": 33.5,
    "noised-fp32": 32.3,
    "normal": 29.4,
    "q_sample-bf16": 35.0,
    "q_sample-fp16": 34.5,
    "q_sample-fp32": 32.6,
    "rescale-full-0": 26.6,
    "rescale-large-0": 26.6,
    "rescale-large-1": 621.0,
    "rescale-learned-0": 50.0,
    "rescale-small-0": 47.8,
    "reverse_step-bf16": 42.5,
    "reverse_step-channels_last": 54.1,
    "reverse_step-channels_last-given": 40.0,
    "reverse_step-channels_last-guided": 107.0,
    "reverse_step-channels_last-history3": 70.7,
    "reverse_step-channels_last-inpaint": 95.6,
    "reverse_step-channels_last-learned": 76.7,
    "reverse_step-ddim": 16.0,
    "reverse_step-dynamic": 43.6,
    "reverse_step-everything": 111.5,
    "reverse_step-fp16": 42.0,
    "reverse_step-fp32": 42.4,
    "reverse_step-given": 17.1,
    "reverse_step-guided": 50.1,
    "reverse_step-history1": 18.4,
    "reverse_step-history1-noise": 48.8,
    "reverse_step-history2": 47.9,
    "reverse_step-history3": 59.6,
    "reverse_step-history3-noiseless": 29.0,
    "reverse_step-history3-odd": 81.7,
    "reverse_step-inpaint": 75.5,
    "reverse_step-learned": 49.7,
    "reverse_step-masked": 45.7,
    "reverse_step-odd": 57.4,
    "reverse_step-one": 55.7,
    "reverse_step-scaled": 46.7,
    "reverse_step-unlimited": 40.4,
    "reverse_step-x0": 44.7,
    "threshold-everything-0": 79.2,
    "threshold-everything-1": 91.4,
    "threshold-everything-2": 93.8,
    "threshold-everything-3": 84.0,
    "threshold-everything-4": 579.0,
    "threshold-full-0": 25.1,
    "threshold-large-0": 62.2,
    "threshold-large-1": 74.4,
    "threshold-large-2": 76.8,
    "threshold-large-3": 67.0,
    "threshold-large-4": 579.0,
    "threshold-odd-0": 87.4,
    "threshold-odd-1": 96.9,
    "threshold-odd-2": 100.0,
    "threshold-odd-3": 90.5,
    "threshold-odd-4": 579.0,
    "threshold-small-0": 40.2,
}
WHOLE_SAMPLES = ("threshold", "rescale")  # the kernels that sum and count over a sample: these do need shared memory
SMS = (80, 90, 100)


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent / "kernels")
    run = subprocess.run([sys.executable, HERE / "compile_kernels.py"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_every_variant_compiles_for_every_gpu(compiled):
    expected = {f"{name}-sm{sm}" for name in (*INSTRUCTIONS, "advance") for sm in targets(name)}
    assert set(compiled) == expected


def test_nothing_spills(compiled):
    assert {name: code["local"] for name, code in compiled.items() if code["local"]} == {}


def test_nothing_that_streams_goes_through_shared_memory(compiled):
    for what in ("shared", "barriers"):
        used = {name for name, code in compiled.items() if code[what]}
        assert {name for name in used if not name.startswith(WHOLE_SAMPLES)} == set()


def test_registers_leave_room_for_other_warps(compiled):
    # 222, with two histories: 9 warps an SM, each with 14 KB on its way. The plain step has up to 128 (16 warps), and
    # so has one with three histories, with half as many elements a thread.
    assert max(code["registers"] for code in compiled.values()) <= 222
    for name in ("reverse_step-fp32", "reverse_step-bf16", "reverse_step-fp16"):
        assert max(compiled[f"{name}-sm{sm}"]["registers"] for sm in targets(name)) <= 130
    assert max(compiled[f"reverse_step-history3-sm{sm}"]["registers"] for sm in SMS) <= 128


@pytest.mark.parametrize("sm", SMS)
def test_the_state_moves_in_128_bits(compiled, sm):
    narrow = ("-odd", "-one", "-channels_last")  # where adjacent lanes are not adjacent, or not aligned
    plain = [n for n in INSTRUCTIONS if n.startswith("reverse_step") and not any(word in n for word in narrow)]
    plain = [n for n in plain if sm in targets(n)]
    assert len(plain) > (12 if sm == 90 else 6)
    for name in plain:
        code = compiled[f"{name}-sm{sm}"]
        assert any(op.startswith("LDG.E.128") for op in code["loads"]), name
        assert any(op.startswith("STG.E.128") for op in code["stores"]), name
    # And nothing but a sample's scalars in less than 64: four of the model's 16-bit numbers, beside four float32.
    bf16 = compiled[f"reverse_step-bf16-sm{sm}"]
    assert bf16["accesses"]["LDG.E.128"] == bf16["accesses"]["STG.E.128"] == bf16["elements"] / 4
    assert bf16["accesses"]["STG.E.64"] == bf16["elements"] / 4 + 1  # one is the next time input, int64
    for name in ("normal", "q_sample-fp32", "q_sample-bf16", "q_sample-fp16", "add_noise-fp32", "add_noise-bf16"):
        if sm not in targets(name):
            continue
        assert compiled[f"{name}-sm{sm}"]["stores"] == ["STG.E.128"], name


def test_the_budget_of_the_step(compiled):
    """What was asked of the step as the DDPM sampler runs it: float32 state, bfloat16 model, 12 B an element."""
    assert compiled["reverse_step-bf16-sm90"]["instructions"] / compiled["reverse_step-bf16-sm90"]["elements"] <= 45


def test_the_clamp_keeps_nan(compiled):
    for name, code in compiled.items():
        if name.startswith("reverse_step") and "unlimited" not in name:
            assert code["keeps_nan"], name  # Triton may write a clamp as one min.NaN.xorsign.abs
        if name.startswith(("threshold-small", "threshold-large-4")):  # the bound of a sample with a NaN
            assert code["keeps_nan"] == ["max", "min"], name
    assert not compiled["reverse_step-unlimited-sm90"]["keeps_nan"]


def test_multiplications_and_additions_fuse(compiled):
    """The update's own, and the polynomials' of the normals: 7.5 for each element that gets one."""
    for name, code in compiled.items():
        if name.startswith(("reverse_step", "add_noise")):
            assert code["fused"] >= code["elements"], name
        if name.startswith(("normal", "q_sample", "reverse_step-bf16")):
            assert code["fused"] >= 7.5 * code["elements"], name


def test_half_precision_stores_round_to_nearest(compiled):
    for sm in SMS:
        for dtype, conversion in (("bf16", "cvt.rn.bf16"), ("fp16", "cvt.rn.f16")):
            for kernel in ("reverse_step", "q_sample"):
                if sm in targets(f"{kernel}-{dtype}"):
                    assert any(c.startswith(conversion) for c in compiled[f"{kernel}-{dtype}-sm{sm}"]["conversions"])


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instructions_an_element(compiled, name):
    code = compiled[f"{name}-sm90"]
    assert code["instructions"] / code["elements"] <= 1.03 * INSTRUCTIONS[name]

"""Ho et al.'s CIFAR-10 network (35.7 M weights, random): the engine against diffusers and the compiler.

Run: ``OMP_WAIT_POLICY=PASSIVE pytest benchmarks/test_unet.py -s``; ``BATCHES=1,8,64`` sets the batch sizes. Correct
first, against float64, then timed, all of a batch in one run in rotated order.

On a CPU a forward, by the processor's time. On a GPU whole reverse steps, `unet_contenders` says whose, by the clock
around synchronised runs of them; images/s at 1000 and 50 steps are computed from the time of a step. ``SECONDS`` (480):
flags of the compiler are tried, and batches begun, in that time; ``FLAGS=2``: how many at most at a batch; ``OUT``: the
folder of the figures, written after each batch (benchmarks/results/<gpu>). A cold start is timed in processes of its
own, with empty caches: ``COLD=1``.
"""

import copy
import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import cold_start, gpu_facts, unet_race, unet_results
from benchmarks.measure import Interleaved, machine, table
from benchmarks.unet_contenders import Contender, all_of
from benchmarks.unet_networks import CIFAR
from benchmarks.unet_race import WHOLE, UNetRace, flops_of, measured, rms, setting_of
from fastddpm import engine
from fastddpm.unet import UNet

ROUNDS = 7
CUDA = torch.cuda.is_available()
BATCHES = [int(batch) for batch in os.environ.get("BATCHES", "1,8,64,256" if CUDA else "1,8").split(",")]
DEVICE = torch.device("cuda" if CUDA else "cpu")
ALONE = 180.0  # seconds that ours has to be compiled and to sample once
SECONDS, BEGAN = float(os.environ.get("SECONDS", "480")), time.monotonic()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def contenders(net: UNet, x: Tensor, t: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The forwards, all with the same weights and the same input."""
    made: dict[str, Callable[[], Tensor]] = {}
    for name, dtype in DTYPES.items():
        theirs = UNet2DModel(**dict(net.config.to_diffusers())).eval()
        theirs.load_state_dict(net.state_dict())
        theirs = theirs.to(DEVICE, dtype)
        last = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
        given = x.to(dtype)
        wide = given.to(memory_format=torch.channels_last)
        fast = engine.compile(net, batch=len(x), dtype=dtype)
        made[f"diffusers {name}"] = lambda theirs=theirs, given=given: theirs(given, t).sample
        made[f"diffusers {name} channels_last"] = lambda last=last, wide=wide: last(wide, t).sample
        made[f"engine {name}"] = lambda fast=fast, wide=wide: fast(wide, t)
    return made


@pytest.mark.skipif(CUDA, reason="a GPU is there: test_steps")
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_forward(batch: int, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = UNet(CIFAR).eval().requires_grad_(False).to(DEVICE)
    x, t = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(0, 1000, (batch,), device=DEVICE)
    truth = copy.deepcopy(net).double()(x[:4].double(), t[:4])
    calls = contenders(net, x, t)
    errors = {name: rms(call()[:4] - truth) / rms(truth) for name, call in calls.items()}
    for name in DTYPES:
        eager = max(errors[f"diffusers {name}"], errors[f"diffusers {name} channels_last"])
        assert errors[f"engine {name}"] <= 2 * eager, f"engine {name}: {errors}"

    turns = Interleaved(calls)
    benchmark.pedantic(turns, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    times = {name: taken.median_cpu for name, taken in turns.times.items()}
    rows = {}
    for name, seconds in times.items():
        peers = [
            s
            for other, s in times.items()
            if not other.startswith("engine") and ("float32" in other) == ("float32" in name)
        ]
        rows[name] = {
            "ms": f"{seconds * 1e3:.1f}",
            "images/s": f"{batch / seconds:.1f}",
            "x best peer of the dtype": f"{min(peers) / seconds:.2f}",
            "error, part of the output": f"{errors[name]:.1e}",
        }
    benchmark.extra_info.update(machine=machine(), rows=rows, batch=batch)
    with capsys.disabled():
        print(table(f"UNet forward, {DEVICE.type}, batch {batch}, 35.7 M weights", rows))
        print(json.dumps(machine()))


class Steps:
    """The figures of all batches, and what is kept from one to the next."""

    def __init__(self) -> None:
        self.flops = flops_of(CIFAR)
        self.matmul = gpu_facts.matmul_rate(DEVICE)
        self.best_flags: str | None = None
        self.record = unet_results.header("unet") | {"flops_an_image": self.flops, "matmul_tflops": self.matmul * 1e-12}
        self.record["batches"] = {}

    def measure(self, batch: int, seconds: float) -> dict[str, Any]:
        """A batch: its figures, which are also written, before the compilers begin and at the end."""

        def keep(made: dict[str, Any]) -> None:
            self.record["batches"][str(batch)] = made
            unet_results.write(self.record)

        end = time.monotonic() + seconds
        setting, most = setting_of(CIFAR, batch, DEVICE), int(os.environ.get("FLAGS", "8"))
        race = UNetRace(setting, checked(all_of(setting), batch))
        try:
            left = end - time.monotonic()
            made = measured(race, self.flops, self.matmul, keep, seconds=left, first=self.best_flags, most=most)
        finally:
            torch._dynamo.reset()  # the next batch is not taken for a size that varies
        if WHOLE in race.ready:
            self.best_flags = race.made[WHOLE]["flags"]
        return made


def checked(makers: unet_race.Makers, batch: int) -> unet_race.Makers:
    """The makers, after ours has run once in a process of its own; where that fails, ours only says why.

    A kernel that waits forever, or writes where it may not, would take the others' figures with it. What is compiled
    there is found in Triton's cache here.
    """
    if not CUDA:
        return makers
    alone = cold_start.run("ours", batch, ALONE)
    if "failed" not in alone:
        return makers

    def fail() -> Contender:
        raise RuntimeError(f"in a process of its own: {alone['failed']}")

    return {name: maker if name not in unet_race.OURS[:1] else fail for name, maker in makers.items()}


@pytest.fixture(scope="module")
def steps() -> Steps:
    # what all contenders of float32 have on; those of bfloat16 don't mind
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64  # C2's flags are of one function
    return Steps()


@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_steps(batch: int, steps: Steps, capsys: pytest.CaptureFixture[str]) -> None:
    left = SECONDS - (time.monotonic() - BEGAN)
    if left <= 0:
        pytest.skip(f"no time left of SECONDS={SECONDS:g}")
    made = steps.measure(batch, left / (len(BATCHES) - BATCHES.index(batch)))
    with capsys.disabled():
        print(table(f"A reverse step, batch {batch}; matmul {steps.matmul * 1e-12:.0f} TFLOP/s", unet_race.rows(made)))
        print("C2's flags, ms a step:", made["c2_flags"])
    assert "failed" not in made["contenders"]["ours"], made["contenders"]["ours"]


@pytest.mark.skipif(not CUDA or os.environ.get("COLD") != "1", reason="needs an NVIDIA GPU, and COLD=1")
def test_cold_start(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds from a process's beginning to its first samples, nothing compiled before: ours, C1 and C2."""
    record = unet_results.header("cold start") | {"batch": BATCHES[0], "contenders": {}}
    for name in ("ours", "C1", "C2"):
        left = SECONDS - (time.monotonic() - BEGAN)
        record["contenders"][name] = cold_start.timed(name, BATCHES[0], max(10.0, left))
        unet_results.write(record)
        with capsys.disabled():
            print(f"cold start, batch {BATCHES[0]}: {name}: {record['contenders'][name]}")
    assert "seconds" in record["contenders"]["ours"]

"""A forward of Ho et al.'s CIFAR-10 network (35.7 M weights, random): the engine against diffusers and the compiler.

Run: ``OMP_WAIT_POLICY=PASSIVE pytest benchmarks/test_unet.py -s``; ``BATCHES=1,8,64`` sets the batch sizes. Correct
first, against float64, then timed, all of a batch in one run in rotated order. On a CPU the time is the processor's; on
a GPU the wall's around synchronised calls, with `torch.compile(mode="max-autotune")` and a CUDA graph beside eager.
"""

import copy
import json
import os
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import Interleaved, machine, table
from fastddpm import engine
from fastddpm.unet import UNet
from fastddpm.unet_config import UNetConfig

ROUNDS = 7
BATCHES = [int(batch) for batch in os.environ.get("BATCHES", "1,8").split(",")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CIFAR = UNetConfig(
    sample_size=32,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
)
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
        if DEVICE.type == "cuda" and dtype == torch.bfloat16:
            best = torch.compile(last, mode="max-autotune", fullgraph=True)
            made["torch.compile max-autotune"] = lambda best=best, wide=wide: best(wide, t).sample
            made["engine, graph"] = graphed(lambda fast=fast, wide=wide: fast(wide, t))
            made["diffusers, graph"] = graphed(lambda last=last, wide=wide: last(wide, t).sample)
    return made


def graphed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The replay of a CUDA graph of it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_unet(batch: int, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = UNet(CIFAR).eval().requires_grad_(False).to(DEVICE)
    x, t = torch.randn(batch, 3, 32, 32, device=DEVICE), torch.randint(0, 1000, (batch,), device=DEVICE)
    truth = copy.deepcopy(net).double()(x[:4].double(), t[:4])
    calls = contenders(net, x, t)
    errors = {name: rms(call()[:4] - truth) / rms(truth) for name, call in calls.items()}
    for name in DTYPES:
        eager = max(errors[f"diffusers {name}"], errors[f"diffusers {name} channels_last"])
        assert errors[f"engine {name}"] <= 2 * eager, f"engine {name}: {errors}"

    def waited(call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        return run

    measured = Interleaved({name: waited(call) for name, call in calls.items()})
    benchmark.pedantic(measured, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    times = {
        name: taken.median if DEVICE.type == "cuda" else taken.median_cpu for name, taken in measured.times.items()
    }
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

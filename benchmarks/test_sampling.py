"""Whole sampling on the CPU, 16 images: diffusers UNet2DModel and DDIM loop against `Sampler`, the same weights.

Run: ``OMP_WAIT_POLICY=PASSIVE pytest benchmarks/test_sampling.py -s``. Correct first (the same x_T, the same picture),
then timed, all in one run in rotated order; medians.
"""

import json
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import Interleaved, machine, table
from fastddpm import Sampler, UNet
from fastddpm.pretrained import DEFAULT, SchedulerConfig

BATCH, STEPS, ROUNDS = 16, 10, 7
FLOAT32_BOUND = 1e-4  # of pixels in [-1, 1]
PEER = "diffusers float32"


def contenders() -> dict[str, Callable[[], Tensor]]:
    """Ways from the same x_T to 16 images."""
    x_T = torch.randn(BATCH, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(BATCH) % 10
    config = SchedulerConfig.from_folder(DEFAULT)
    steps = config.table("ddim", STEPS)
    theirs = UNet2DModel.from_pretrained(DEFAULT, torch_dtype=torch.float32).eval()
    scheduler = DDIMScheduler.from_pretrained(DEFAULT)

    def diffusers_loop() -> Tensor:
        scheduler.set_timesteps(STEPS)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(theirs(x, t, labels).sample, t, x, use_clipped_model_output=True).prev_sample
        return x

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        net = UNet.from_pretrained(DEFAULT, dtype=dtype).to(memory_format=torch.channels_last)
        sampler = Sampler(net, steps)
        return lambda: sampler.sample(x_T.shape, seeds=0, x_T=x_T, model_kwargs={"class_labels": labels})

    return {
        PEER: diffusers_loop,
        "fastddpm float32": ours(torch.float32),
        "fastddpm bfloat16": ours(torch.bfloat16),
    }


@torch.no_grad()
def test_sampling(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    calls = contenders()
    expected = calls[PEER]()
    errors = {name: (call() - expected).abs() for name, call in calls.items()}
    assert errors["fastddpm float32"].max() <= FLOAT32_BOUND

    measured = Interleaved(calls)
    benchmark.pedantic(measured, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    peer = measured.times[PEER].median
    rows = {
        name: {
            "ms an image-step": f"{taken.median * 1e3 / (BATCH * STEPS):.2f}",
            "images/s at 50 steps": f"{BATCH / taken.median * STEPS / 50:.1f}",
            "against diffusers": f"{peer / taken.median:.2f}x",
            "max error": f"{errors[name].max():.1e}",
            "mean error": f"{errors[name].mean():.1e}",
        }
        for name, taken in measured.times.items()
    }
    benchmark.extra_info.update(machine(), rows=rows)
    with capsys.disabled():
        print(f"\n{json.dumps(machine())}\n{table('Sampling, 16 images, CPU', rows)}")

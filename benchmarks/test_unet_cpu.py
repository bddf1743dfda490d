"""One forward of the shipped UNet on the CPU, batch 16, against diffusers' UNet2DModel with the same weights.

Run: ``OMP_WAIT_POLICY=PASSIVE pytest benchmarks/test_unet_cpu.py -s`` (``OMP_NUM_THREADS`` sets the threads).
Correct first, then timed, all in one run in rotated order; medians. diffusers runs in eager float32, in its default
memory format and in channels_last: the comparison is with the faster of the two.
"""

import json
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DModel
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.measure import Interleaved, machine, table
from fastddpm.pretrained import DEFAULT
from fastddpm.unet import UNet

BATCH, ROUNDS = 16, 21
# Greatest difference from diffusers in float32, as a part of the output's greatest value (15 with the shipped weights)
FLOAT32_BOUND = 2e-6  # measured: 3e-7 to 8e-7, and diffusers against itself in another memory format 9e-7
BFLOAT16_BOUND = 2e-2  # 8 bits of significand through 20 layers; measured: 7e-3
PEERS = ("diffusers float32", "diffusers float32 channels_last")


def contenders() -> dict[str, Callable[[], Tensor]]:
    """The forwards, all with the same weights and the same input."""
    torch.manual_seed(0)
    theirs = UNet2DModel.from_pretrained(DEFAULT, torch_dtype=torch.float32)
    x, t, labels = torch.randn(BATCH, 1, 32, 32), torch.randint(0, 1000, (BATCH,)), torch.arange(BATCH) % 11

    def made(
        kind: type[UNet] | type[UNet2DModel], dtype: torch.dtype, layout: torch.memory_format
    ) -> Callable[[], Tensor]:
        net = UNet.from_pretrained(DEFAULT) if kind is UNet else UNet2DModel(**dict(theirs.config))
        net.load_state_dict(theirs.state_dict())
        net = net.eval().to(dtype=dtype, memory_format=layout)
        given = x.to(dtype=dtype, memory_format=layout)
        return (lambda: net(given, t, labels)) if kind is UNet else (lambda: net(given, t, labels).sample)

    plain, last = torch.contiguous_format, torch.channels_last
    return {
        PEERS[0]: made(UNet2DModel, torch.float32, plain),
        PEERS[1]: made(UNet2DModel, torch.float32, last),
        "fastddpm float32": made(UNet, torch.float32, plain),
        "fastddpm float32 channels_last": made(UNet, torch.float32, last),
        "fastddpm bfloat16 channels_last": made(UNet, torch.bfloat16, last),
    }


@torch.inference_mode()
def test_unet_cpu(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    calls = contenders()
    expected = calls[PEERS[0]]()
    size = expected.abs().max()
    errors = {name: ((call().float() - expected).abs().max() / size).item() for name, call in calls.items()}
    for name, error in errors.items():
        assert error <= (BFLOAT16_BOUND if "bfloat16" in name else FLOAT32_BOUND), f"{name}: off by {error:.3g}"

    measured = Interleaved(calls)
    benchmark.pedantic(measured, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    times = measured.times
    best_peer = min(times[name].median for name in PEERS)
    rows = {
        name: {
            "median ms": f"{taken.median * 1e3:.1f}",
            "cpu ms": f"{taken.median_cpu * 1e3:.1f}",
            "image-steps/s": f"{BATCH / taken.median:.0f}",
            "x diffusers' best": f"{best_peer / taken.median:.2f}",
            "max difference": f"{errors[name]:.1e}",
        }
        for name, taken in times.items()
    }
    parameters = UNet.from_pretrained(DEFAULT).config.num_parameters
    benchmark.extra_info.update(machine=machine(), rows=rows, batch=BATCH, parameters=parameters)
    with capsys.disabled():
        print(table(f"UNet forward, CPU, batch {BATCH}, {parameters / 1e6:.2f}M parameters", rows))
        print(json.dumps(machine()))
    assert min(taken.median for name, taken in times.items() if name not in PEERS) <= best_peer

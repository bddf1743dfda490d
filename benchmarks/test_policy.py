"""A forward of Diffusion Policy's 1-D UNet (random weights): the engine against the module and the compiler.

Run: ``OMP_WAIT_POLICY=PASSIVE pytest benchmarks/test_policy.py -s``; ``BATCHES=1,8`` sets the batches. Correct first,
against float64, then timed, all of a batch in one run in rotated order; medians. On a CPU the time is the processor's;
on a GPU its own, of calls in a CUDA graph, but for "eager", with `torch.compile(mode="max-autotune")` beside them.

"engine" is a call with the observation; "engine, conditioned" one that has been told it before: all but the first step.
"""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.measure import Interleaved, by_the_clock, machine, table
from benchmarks.race import graphed
from benchmarks.timers import DeviceTimer
from fastddpm.engine.policy import PolicyEngine
from tests.policy_networks import made as network

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
BATCHES = [int(batch) for batch in os.environ.get("BATCHES", "1,8,64" if CUDA else "1,8").split(",")]
ROUNDS, HORIZON = 9, 16
OBSERVED = 1028  # numbers: 512 features of an image and a position, at two moments, as Diffusion Policy's Push-T has
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Call = Callable[[], Tensor]


def contenders(net: nn.Module, x: Tensor, t: Tensor, cond: Tensor) -> dict[str, Call]:
    """The forwards, by "name dtype", all with the same weights and the same input."""
    calls: dict[str, Call] = {}
    for name, dtype in DTYPES.items():
        theirs = copy.deepcopy(net).to(dtype)
        fast = PolicyEngine(net, batch=len(x), horizon=HORIZON, dtype=dtype)
        once, given, told = fast.condition(cond), x.to(dtype), cond.to(dtype)
        calls[f"eager {name}"] = lambda theirs=theirs, given=given, told=told: theirs(given, t, global_cond=told)
        calls[f"engine {name}"] = lambda fast=fast, given=given: fast(given, t, global_cond=cond)
        calls[f"engine, conditioned {name}"] = lambda once=once, given=given: once(given, t)
        if CUDA:
            best = torch.compile(copy.deepcopy(theirs), mode="max-autotune-no-cudagraphs", fullgraph=True)
            calls[f"max-autotune {name}"] = lambda best=best, given=given, told=told: best(given, t, global_cond=told)
    return calls


def timed(calls: dict[str, Call]) -> dict[str, Callable[[], object]]:
    """On a GPU all as graphs, and eager without one too: ready to be called. Without peers that can't be captured."""
    if not CUDA:
        return dict(calls)
    ready: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        try:
            ready[f"{name}, graph"] = graphed(call)
        except Exception as error:  # PyTorch and Triton raise many kinds
            if name.startswith("engine"):
                raise
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        if name.startswith("eager"):
            ready[name] = call
    return ready


def rms(error: Tensor) -> float:
    return float(error.double().square().mean().sqrt())


def rows_of(seconds: dict[str, float], errors: dict[str, float]) -> dict[str, dict[str, str]]:
    rows = {}
    for name, taken in seconds.items():
        dtype = "float32" if "float32" in name else "bfloat16"
        peers = [s for other, s in seconds.items() if not other.startswith("engine") and dtype in other]
        rows[name] = {
            "ms": f"{taken * 1e3:.3f}",
            "x best peer of the dtype": f"{min(peers) / taken:.2f}",
            "error, part of the output": f"{errors[name.removesuffix(', graph')]:.1e}",
        }
    return rows


@pytest.mark.parametrize("batch", BATCHES)
@torch.no_grad()
def test_policy(batch: int, benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    net = network(observed=OBSERVED).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    x, cond = (torch.randn(batch, *shape, generator=generator).to(DEVICE) for shape in ((HORIZON, 2), (OBSERVED,)))
    t = torch.randint(0, 100, (batch,), generator=generator).to(DEVICE)
    truth = copy.deepcopy(net).double()(x.double(), t, global_cond=cond.double())
    calls = contenders(net, x, t, cond)
    errors: dict[str, float] = {}
    for name, call in list(calls.items()):
        try:
            errors[name] = rms(call() - truth) / rms(truth)
        except Exception as error:
            if not name.startswith("max-autotune"):
                raise
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
            del calls[name]
    for dtype in DTYPES:
        for name in (f"engine {dtype}", f"engine, conditioned {dtype}"):
            assert errors[name] <= 2 * errors[f"eager {dtype}"] + 5e-7, f"{name}: {errors}"

    ready = timed(calls)
    turns = Interleaved(ready, DeviceTimer(None) if CUDA else by_the_clock)
    benchmark.pedantic(turns, rounds=ROUNDS, iterations=1, warmup_rounds=1)
    seconds = {name: taken.median if CUDA else taken.median_cpu for name, taken in turns.times.items()}
    rows, weights = rows_of(seconds, errors), sum(p.numel() for p in net.parameters())
    facts: dict[str, Any] = dict(machine=machine(), rows=rows, batch=batch, weights=weights)
    benchmark.extra_info.update(facts)
    with capsys.disabled():
        print(table(f"Policy UNet forward, {DEVICE.type}, batch {batch}, {weights / 1e6:.1f} M weights", rows))
        print(json.dumps(facts["machine"]))

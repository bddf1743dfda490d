"""Calls that are compared by time alone: on a GPU many of each in a CUDA graph, so that no host's time counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch

from benchmarks.measure import Interleaved, Times, by_the_clock
from benchmarks.timers import DeviceTimer, l2_flush

Call = Callable[[int], object]  # given which of the calls in a row it is
ROUNDS = 7


def graphed(call: Callable[[], object], warmups: int = 3) -> Callable[[], None]:
    """The replay of a CUDA graph of it, warmed up on another stream as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmups):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(current)  # where a capture is broken torch doesn't
    return graph.replay


def race(
    calls: Mapping[str, Call], device: torch.device, in_a_row: int = 10, rounds: int = ROUNDS
) -> tuple[dict[str, float], dict[str, str]]:
    """(median seconds of a call, why the others have none), of calls in turn, each `in_a_row` times.

    What raises (a kernel that wants more shared memory than there is) takes no part. Before each timing the GPU fills
    its L2, so that the launch of the graph, which takes as long as a small copy, is done when the clock starts.
    """
    ready: dict[str, Callable[[], object]] = {}
    out: dict[str, str] = {}
    for name, call in calls.items():
        many = partial(_each, call, in_a_row)
        try:
            ready[name] = graphed(many) if device.type == "cuda" else many
            ready[name]()
        except Exception as error:  # Triton and PyTorch raise many kinds
            ready.pop(name, None)
            out[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
    turns = Interleaved(ready, DeviceTimer(l2_flush(device)) if device.type == "cuda" else by_the_clock)
    for _ in range(rounds):
        turns()
    return {name: _median(turns.times[name]) / in_a_row for name in ready}, out


def _each(call: Call, calls: int) -> None:
    for at in range(calls):
        call(at)


def _median(times: Times) -> float:
    return times.median

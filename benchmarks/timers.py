"""Timers beside `measure.by_the_clock`: a GPU's own, from a cold L2, and the host's when it only enqueues.

A call of 10 us is shorter than what surrounds its timing, so `Loop` makes many of it; and it takes other inputs each
time, since the same ones would stay in a cache.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.measure import Times, by_the_clock


class Loop:
    """`calls` calls of a function, each with the next of the inputs."""

    def __init__(self, call: Callable[[Any], object], inputs: Sequence[Any], calls: int = 1) -> None:
        self.call, self.inputs, self.calls = call, inputs, calls
        self._next = 0

    def __call__(self) -> None:
        for _ in range(self.calls):
            self.call(self.inputs[self._next])
            self._next = (self._next + 1) % len(self.inputs)


def calls_for(loop: Loop, seconds: float, most: int = 10_000) -> int:
    """How many calls take about `seconds` on the CPU: from the faster of two."""
    taken = Times()
    for _ in range(2):
        by_the_clock(loop, taken)
    return min(most, max(1, math.ceil(seconds * loop.calls / max(min(taken.wall), 1e-9))))


class DeviceTimer:
    """Seconds of a GPU between an event before a call and one behind it.

    With `flush`, a tensor, it is filled first: of twice the L2's size, it leaves nothing of the inputs there. While the
    GPU fills, the host comes to the call; where it needs longer than that (a call of many launches on few elements),
    the GPU's waiting counts too, as it would in a sampler.

    Args:
        flush: what to fill before each call; None: the caches stay warm.
        event: makes an event; torch's by default.
    """

    def __init__(self, flush: torch.Tensor | None, event: Callable[[], Any] | None = None) -> None:
        self.flush = flush
        self.event = event or (lambda: torch.cuda.Event(enable_timing=True))

    def __call__(self, call: Callable[[], object], times: Times) -> None:
        start, end = self.event(), self.event()
        cpu = time.process_time()
        if self.flush is not None:
            self.flush.fill_(1)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.cpu.append(time.process_time() - cpu)
        times.wall.append(start.elapsed_time(end) * 1e-3)


def enqueue_timer(synchronize: Callable[[], None]) -> Callable[[Callable[[], object], Times], None]:
    """The host's time to enqueue, on an idle GPU: the clock stops before the GPU is done, and then waits for it."""

    def timed(call: Callable[[], object], times: Times) -> None:
        synchronize()
        by_the_clock(call, times)
        synchronize()

    return timed


def l2_flush(device: torch.device) -> torch.Tensor:
    """A tensor of twice the GPU's L2."""
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size // 4, dtype=torch.int32, device=device)

"""Capture one step of the sampling loop into a CUDA graph, and replay it.

A step works on buffers that stay where they are (`sampler.Buffers`); seed, cursor and table are in device memory, so
every replay draws its own noise and applies its own row. What a graph can't do is told from what the user did wrong:
an error in the warm-up is the model's and is raised as it is; an error in the capture is a `GraphCaptureError`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch
from torch import nn

from .errors import GraphCaptureError

MAX_GRAPHS = 4  # each keeps its activations; the least recently used leaves
WARM_UPS = 3  # cuBLAS, cuDNN and Triton initialise lazily, and may not do so during a capture


def capture(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run `step` a few times, capture it, and return the function that replays it on the current stream.

    Raises `GraphCaptureError` where the step can't be captured: it synchronises with the host (``.item()``, a branch
    on a tensor's value), copies from pageable memory, or draws from torch's random generator (every replay would draw
    the same).
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    random_state = torch.cuda.get_rng_state(device)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    if not torch.equal(random_state, torch.cuda.get_rng_state(device)):
        torch.cuda.set_rng_state(random_state, device)
        raise GraphCaptureError("the model draws random numbers (dropout in train mode?)")

    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: another thread's cudaMalloc or synchronisation must not break this capture
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        raise GraphCaptureError(str(error).splitlines()[0]) from error
    return graph.replay


def fingerprint(model: object) -> Hashable:
    """What a captured graph of `model` depends on and can't notice by itself: it is stale when this changes.

    A change of the weights in place needs no new graph, since the graph reads the same memory.
    """
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    if not isinstance(model, nn.Module):
        return autocast
    tensors = tuple((t.data_ptr(), t.dtype) for group in (model.parameters(), model.buffers()) for t in group)
    modules = tuple((m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules())
    return autocast, tensors, modules


T = TypeVar("T")


class RecentlyUsed(Generic[T]):
    """At most `size` values by key; the least recently used leaves."""

    def __init__(self, size: int = MAX_GRAPHS) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of `key`, made now if it isn't there."""
        if key not in self._values:
            while len(self._values) >= self._size:  # before the new one is made: both at once may not fit
                self._values.popitem(last=False)
            self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()

    def __len__(self) -> int:
        return len(self._values)

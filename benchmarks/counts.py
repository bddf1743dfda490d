"""What a call asks of the machine beside time: ops dispatched, values read back to the host, kernels on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These give the host a number, or a shape, that depends on the data: on a GPU the host waits for it.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}
COPIES = {"aten::_to_copy", "aten::copy_"}


class Counter(TorchDispatchMode):
    """Counts, while it is entered, the ops that come to the dispatcher; one that calls others counts once.

    Attributes:
        ops: all of them, views included.
        reads: those that give a value of a tensor on `device` to the host.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.ops, self.reads = device, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        here = any(t.device.type == self.device.type for t in tensors)
        name = func._schema.name
        to_host = name in COPIES and self.device.type != "cpu" and out.device.type == "cpu"
        self.reads += here and (name in READS or to_host)
        return out


def ops_and_reads(call: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """(ops, reads) of one call, as `Counter` has them."""
    with Counter(device) as counter:
        call()
    return counter.ops, counter.reads


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that one call runs on the current GPU, by torch's profiler; those of a graph each."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return on_device(profiler.events())


def on_device(events: Iterable[Any]) -> int:
    """How many of a profile's events are work on the GPU; the ranges that programs name there are none."""
    return sum(e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False) for e in events)

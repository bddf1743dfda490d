"""Capture steps of the sampling loop into CUDA graphs, and replay them.

A step works on buffers that stay where they are (`buffers.Buffers`); seed, cursor and table are in device memory, so
every replay draws its own noise and applies its own row. What a graph can't do is told from what the user did wrong:
an error in the warm-up is the model's and is raised as it is; an error in the capture is a `GraphCaptureError`.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .errors import GraphCaptureError
from .inputs import Inputs
from .while_graph import WhileRefused, looped

MAX_GRAPHS = 4  # each keeps its activations; the least recently used leaves
WARM_UPS = 3  # cuBLAS, cuDNN and Triton initialise lazily, and may not do so during a capture


_ONE_AT_A_TIME = threading.Lock()  # CUDA allows one capture a process; the settings below are the process's too


def capture(
    run: Callable[[int], None],
    device: torch.device,
    lengths: Sequence[int] = (1,),
    pool: Any = None,
    *,
    loop: bool = False,
) -> dict[int, Callable[[], None]]:
    """Capture ``run(n)``, n steps, for each n of `lengths`; returns the functions that replay them, by n.

    With `loop`, those of more than one step are `WhileGraph`s, which are told how often; where there can be none, a
    warning says why, and they are as without it.

    ``run(1)`` is called a few times before. A replay is on the current stream. The graphs share their memory, also with
    others of the same `pool` (`torch.cuda.graph_pool_handle`): so no two of them may run at once, and what a step
    leaves behind must be in buffers of its own.

    Raises `GraphCaptureError` where the step can't be captured: it synchronises with the host (``.item()``, a branch
    on a tensor's value), copies from pageable memory, or draws from torch's random generator (every replay would draw
    the same; another thread that draws meanwhile is taken for the model). The model's own errors come as they are.
    """
    with _ONE_AT_A_TIME, _no_autocast_cache():
        current = torch.cuda.current_stream(device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(current)
        random_state = torch.cuda.get_rng_state(device)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS - 1):
                    run(1)
                _without_synchronising(run)
        finally:  # also where the model failed: the buffers may not be freed while the stream still writes them
            current.wait_stream(stream)
        if not torch.equal(random_state, torch.cuda.get_rng_state(device)):
            torch.cuda.set_rng_state(random_state, device)
            raise GraphCaptureError("the model draws random numbers (dropout in train mode?)")

        looping = {n: loop and n > 1 for n in lengths}
        made = {n: _captured(run, n, device, stream, pool, keep=looping[n]) for n in lengths}
        return {n: replay_of(graph, n, device, loop=looping[n]) for n, graph in made.items()}


def _captured(
    run: Callable[[int], None], n: int, device: torch.device, stream: torch.cuda.Stream, pool: Any, *, keep: bool
) -> torch.cuda.CUDAGraph:
    current, graph = torch.cuda.current_stream(device), torch.cuda.CUDAGraph(keep_graph=keep)
    try:
        # thread_local: another thread's cudaMalloc or synchronisation must not break this capture
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            run(n)
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # ending a broken capture raises before torch sets it back
        torch.cuda.synchronize(device)
        cause = error.__context__ or error
        raise GraphCaptureError((str(cause) or type(cause).__name__).splitlines()[0]) from error
    return graph


def replay_of(graph: torch.cuda.CUDAGraph, n: int, device: torch.device, *, loop: bool) -> Callable[[], None]:
    """The function that replays a captured graph of n steps; with `loop`, a `WhileGraph` of it, if there can be one."""
    if loop:
        try:
            return looped(graph, device)
        except WhileRefused as refused:
            warnings.warn(f"no WHILE node: {refused}; sampling goes on with {n} steps a launch", stacklevel=2)
            try:
                graph.instantiate()  # `keep_graph` left that undone
            except RuntimeError as error:  # as it would be raised by the capture without `keep_graph`
                raise GraphCaptureError((str(error) or type(error).__name__).splitlines()[0]) from error
    return graph.replay


def _without_synchronising(run: Callable[[int], None]) -> None:
    """Run a step; `GraphCaptureError` where it waits for the device.

    Found here, and not by a capture that breaks: torch is not whole after one (its allocator and generator go on as if
    it were still under way).
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(1)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise GraphCaptureError("the model waits for the GPU (.item(), .cpu(), a branch on a value)") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """A graph may not read autocast's cached copies of the weights: they are freed when the user leaves autocast."""
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


@contextmanager
def settled(device: torch.device) -> Iterator[None]:
    """Wait for what was launched inside, if that fails: who comes next, in another stream, has the same buffers."""
    try:
        yield
    except BaseException:
        if device.type == "cuda":
            with suppress(RuntimeError):  # what failed is raised, and not what the device says of it
                torch.cuda.current_stream(device).synchronize()
        raise


def modules_of(model: object, depth: int = 3) -> list[nn.Module]:
    """The modules that a callable runs: itself, or what a method, a partial, a closure or an object's attribute holds.

    As far as can be seen from outside, `depth` callables deep.
    """
    if isinstance(model, nn.Module):
        return [model]
    if depth == 0:
        return []
    held: list[object]
    if inspect.ismethod(model):
        return modules_of(model.__self__, depth - 1) + modules_of(model.__func__, depth - 1)
    if isinstance(model, functools.partial):
        held = [model.func, *model.args, *model.keywords.values()]
    elif inspect.isfunction(model):
        closure = inspect.getclosurevars(model)
        held = [*closure.nonlocals.values(), *closure.globals.values()]
    else:
        held = list(getattr(model, "__dict__", {}).values())
    kinds = (nn.Module, functools.partial, types.FunctionType, types.MethodType)
    return [module for h in held if isinstance(h, kinds) for module in modules_of(h, depth - 1)]


def fingerprint(model: object) -> Hashable:
    """What a captured graph of `model` depends on and can't notice by itself: it is stale when this changes.

    A change of the weights in place needs no new graph, since the graph reads the same memory.
    """
    autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
    made: list[Hashable] = [autocast]
    for root in modules_of(model):
        tensors = [t for group in (root.parameters(), root.buffers()) for t in group]
        made += [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        made += [(m.training, *m._forward_hooks, "|", *m._forward_pre_hooks) for m in root.modules()]  # by their ids
    return tuple(made)


def key_of(part: Inputs) -> tuple[Any, ...]:
    """What a captured graph is for: a tensor enters by its shape and dtype, a plain value by itself.

    Raises `GraphCaptureError` for anything else in the model_kwargs: an object may change without its graph noticing.
    """

    def described(v: Any) -> tuple[Any, ...]:
        if isinstance(v, Tensor):
            return v.shape, v.dtype, v.stride()
        if not isinstance(v, bool | int | float | str | torch.dtype | None):
            raise GraphCaptureError(f"model_kwargs hold a {type(v).__name__}, which may change between calls")
        return type(v), v

    leaves, spec = tree_flatten(part.model_kwargs)
    there = tuple(v is not None for v in (part.guidance, part.rescale, part.guided_rows, part.known))
    return part.shape, there, part.noise_is_given, str(spec), tuple(described(v) for v in leaves)


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

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

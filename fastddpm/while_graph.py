"""`WhileGraph`: captured steps as the body of a conditional WHILE node, so that a whole loop is one launch.

torch captures the steps; the driver's own calls, through the package `cuda-bindings`, put a copy of that graph into the
node's body, and behind it a kernel that counts down and says whether the body runs again. That kernel is PTX, which the
driver compiles, and where the driver itself provides `cudaGraphSetConditional` (CUDA 12.4 and later): no compiler of
CUDA is needed. Not run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import DeviceError

# left[0] -= 1; the body runs again where something is left
COUNT_DOWN = b"""
.version 6.0
.target sm_70
.address_size 64

.extern .func cudaGraphSetConditional (.param .b64 handle, .param .b32 value);

.visible .entry count_down (.param .u64 left, .param .u64 handle)
{
    .reg .pred %more;
    .reg .s32 %n;
    .reg .u32 %value;
    .reg .u64 %at, %loop;
    .param .b64 to;
    .param .b32 again;

    ld.param.u64 %at, [left];
    ld.param.u64 %loop, [handle];
    cvta.to.global.u64 %at, %at;
    ld.global.s32 %n, [%at];
    add.s32 %n, %n, -1;
    st.global.s32 [%at], %n;
    setp.gt.s32 %more, %n, 0;
    selp.u32 %value, 1, 0, %more;
    st.param.b64 [to], %loop;
    st.param.b32 [again], %value;
    call.uni cudaGraphSetConditional, (to, again);
    ret;
}
"""
# the kinds of nodes that a body may have (driver API, CUDA_CONDITIONAL_NODE_PARAMS), but for conditional nodes, which a
# child graph may not have: cuGraphAddChildGraphNode
IN_A_BODY = ("KERNEL", "MEMCPY", "MEMSET", "EMPTY", "GRAPH")
TRIALS = (3, 5)  # how often the body of the self-test runs, in one launch each


class WhileRefused(Exception):
    """Why there is no WHILE node."""


class WhileGraph:
    """``loop(times)`` replays a captured graph `times` times, at least once, in one launch on the current stream.

    Args:
        body: captured with ``keep_graph=True``; kept, since the memory that the steps work in is its.
        kernel: `COUNT_DOWN`, loaded.
        device: where; its context is the current one.

    Raises `WhileRefused` where the driver doesn't take it; a call, `DeviceError` where the launch fails.
    """

    def __init__(self, cuda: Any, kernel: Any, body: torch.cuda.CUDAGraph, device: torch.device) -> None:
        self._cuda, self._body = cuda, body
        self._left = torch.zeros(1, dtype=torch.int32, device=device)
        self._device = self._left.device  # its number too: a mere "cuda" is another when the current one changes
        graph = _called(cuda.cuGraphCreate(0))
        try:
            _build(cuda, graph, body.raw_cuda_graph(), kernel, self._left.data_ptr())
            self._exec = _called(cuda.cuGraphInstantiate(graph, 0))
        except BaseException:
            cuda.cuGraphDestroy(graph)
            raise
        # not at exit, when the driver may be gone; one that still runs is freed by the driver when it is done
        weakref.finalize(self, _free, cuda, self._exec, graph).atexit = False

    def __call__(self, times: int = 1) -> None:
        with torch.cuda.device(self._device):  # the default stream is the current device's
            self._left.fill_(times)
            error, *_ = self._cuda.cuGraphLaunch(self._exec, torch.cuda.current_stream(self._device).cuda_stream)
        if error:
            raise DeviceError(f"the WHILE graph was not launched: {error.name}; sample with graph='auto'")


def looped(body: torch.cuda.CUDAGraph, device: torch.device) -> WhileGraph:
    """A captured graph in a WHILE node.

    The first call on a device tries there whether such a node counts right; its answer stays, for the process.
    Raises `WhileRefused`, whatever it is that fails.
    """
    with _refusing(), torch.cuda.device(device):
        cuda = _bindings()
        return WhileGraph(cuda, _proved(cuda, device), body, device)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except WhileRefused:
        raise
    except Exception as error:  # a driver or a binding that is too old says so in many ways, and the chunks are there
        raise WhileRefused(f"{type(error).__name__}: {error}") from error


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise WhileRefused(f"cuda-bindings is not there ({error}); pip install 'fastddpm[while]'") from error
    return driver


def _called(result: tuple[Any, ...]) -> Any:
    """What a call of the driver returned beside its error code; `WhileRefused` where that isn't 0."""
    error, *values = result
    if error:
        raise WhileRefused(f"the driver says {error.name}")
    return values[0] if len(values) == 1 else values


def _build(cuda: Any, graph: Any, steps: int, kernel: Any, left: int) -> None:
    """Fill the empty `graph`: a WHILE node, with the graph `steps` and then the kernel in its body."""
    _check(cuda, steps)
    context = _called(cuda.cuCtxGetCurrent())
    # 1 at each launch: the body runs, and then the kernel says
    handle = _called(cuda.cuGraphConditionalHandleCreate(graph, context, 1, cuda.CU_GRAPH_COND_ASSIGN_DEFAULT))
    node = cuda.CUgraphNodeParams()
    node.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
    node.conditional.handle, node.conditional.ctx, node.conditional.size = handle, context, 1
    node.conditional.type = cuda.CUgraphConditionalNodeType.CU_GRAPH_COND_TYPE_WHILE
    add = getattr(cuda, "cuGraphAddNode_v2", cuda.cuGraphAddNode)  # cuda-bindings 12 has two, 13 only the second
    _called(add(graph, None, None, 0, node))
    (body,) = node.conditional.phGraph_out
    first = _called(cuda.cuGraphAddChildGraphNode(body, None, 0, steps))  # a copy
    launch = cuda.CUDA_KERNEL_NODE_PARAMS()
    launch.func = kernel
    launch.gridDimX = launch.gridDimY = launch.gridDimZ = launch.blockDimX = launch.blockDimY = launch.blockDimZ = 1
    launch.kernelParams = ((left, int(handle)), (ctypes.c_void_p, ctypes.c_uint64))
    _called(cuda.cuGraphAddKernelNode(body, [first], 1, launch))


def _check(cuda: Any, steps: Any) -> None:
    """Refuse the first node that a body may not have, by its name: the driver would refuse without one."""
    kinds = cuda.CUgraphNodeType
    allowed = [getattr(kinds, f"CU_GRAPH_NODE_TYPE_{name}") for name in IN_A_BODY]
    _, number = _called(cuda.cuGraphGetNodes(steps))
    for node in _called(cuda.cuGraphGetNodes(steps, number))[0][:number]:
        kind = _called(cuda.cuGraphNodeGetType(node))
        if kind not in allowed:
            raise WhileRefused(f"a step holds a node of the kind {kind.name.removeprefix('CU_GRAPH_NODE_TYPE_')}")
        if kind == kinds.CU_GRAPH_NODE_TYPE_GRAPH:
            _check(cuda, _called(cuda.cuGraphChildGraphNodeGetGraph(node)))


def _free(cuda: Any, *made: Any) -> None:
    executable, graph = made
    cuda.cuGraphExecDestroy(executable)
    cuda.cuGraphDestroy(graph)


_PROVED: dict[int, Any] = {}  # by the device's number: the kernel, or why there is none


def _proved(cuda: Any, device: torch.device) -> Any:
    """The kernel, in the current context, with which a WHILE node has been seen to count right."""
    number = torch.cuda.current_device()
    if number not in _PROVED:
        try:
            with _refusing():
                module = _called(cuda.cuModuleLoadData(COUNT_DOWN + b"\0"))  # never unloaded
                kernel = _called(cuda.cuModuleGetFunction(module, b"count_down"))
                _try(cuda, kernel, device)
                _PROVED[number] = kernel
        except WhileRefused as refused:
            _PROVED[number] = str(refused)
    if isinstance(_PROVED[number], str):
        raise WhileRefused(_PROVED[number])
    return _PROVED[number]


def _try(cuda: Any, kernel: Any, device: torch.device) -> None:
    """A loop that adds 1, launched for each of `TRIALS`; `WhileRefused` where the sum is another."""
    counter = torch.zeros(1, dtype=torch.int64, device=device)
    counter.add_(1)  # the kernel is loaded before the capture, which may not do that
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    body = torch.cuda.CUDAGraph(keep_graph=True)
    # torch doesn't set the current stream back where a capture breaks
    with torch.cuda.stream(stream), torch.cuda.graph(body, stream=stream, capture_error_mode="thread_local"):
        counter.add_(1)
    loop, expected = WhileGraph(cuda, kernel, body, device), int(counter)
    for times in TRIALS:
        loop(times)
        expected += times
        if (found := int(counter)) != expected:
            raise WhileRefused(f"its body ran {found - expected + times} times, not {times}, in a test")

"""CUDA's driver without CUDA, as `cuda.bindings.driver` has it: graphs of functions, which a launch runs, and loops.

What `WhileGraph` asks of it, no more. A graph that torch captured is, here, the function that replays it.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class Result(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


KINDS = ("KERNEL", "MEMCPY", "MEMSET", "HOST", "GRAPH", "EMPTY", "WAIT_EVENT", "CONDITIONAL")
Kind = IntEnum("Kind", [f"CU_GRAPH_NODE_TYPE_{name}" for name in KINDS], start=0)
MOST = 1000  # runs of a body: a loop that doesn't end is a mistake


def run_ptx(source: str, given: tuple[int, ...], set_conditional: Callable[[int, int], None]) -> None:
    """Run a kernel of one thread, of the few instructions that `COUNT_DOWN` has."""
    head, body = source[source.index(".entry") :].split("{")
    of: dict[str, Any] = dict(zip(re.findall(r"\.u64 (\w+)", head), given, strict=True))
    compare = {"gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "ne": lambda a, b: a != b}
    for line in body.replace("}", "").split(";"):
        what, *names = re.findall(r"[%\w.-]+", line) or ["ret"]
        values = [of.get(name, int(name) if name.lstrip("-").isdigit() else None) for name in names]
        match what.split("."):
            case ["reg" | "param" | "" | "ret", *_]:
                pass
            case ["ld", "param", _] | ["cvta", *_] | ["st", "param", _]:
                of[names[0]] = values[1]
            case ["ld", "global", "s32"]:
                of[names[0]] = ctypes.c_int32.from_address(values[1]).value
            case ["st", "global", "s32"]:
                ctypes.c_int32.from_address(values[0]).value = values[1]
            case ["add", "s32"]:
                of[names[0]] = values[1] + values[2]
            case ["setp", how, "s32"]:
                of[names[0]] = compare[how](values[1], values[2])
            case ["selp", "u32"]:
                of[names[0]] = values[1] if values[3] else values[2]
            case ["call", "uni"]:
                assert names[0] == "cudaGraphSetConditional"
                set_conditional(values[1], values[2])
            case _:
                raise NotImplementedError(line)


class Graph:
    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.handles: dict[int, int] = {}  # with what each is at a launch


class FakeDriver:
    """`fails`: the name of a call that answers with an error; `kinds`: of a captured graph's nodes."""

    CU_GRAPH_COND_ASSIGN_DEFAULT = 1
    CUgraphNodeType = Kind
    CUgraphConditionalNodeType = SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE="while")
    CUDA_KERNEL_NODE_PARAMS = SimpleNamespace

    def __init__(self, fails: str = "", kinds: tuple[str, ...] = ("KERNEL",), runs: int = 1) -> None:
        self.fails, self.kinds, self.runs = fails, kinds, runs
        self.calls: list[str] = []
        self.alive = 0  # graphs and executables
        self.values: dict[int, int] = {}  # of the handles

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found
        self.calls.append(name)
        return found if name != self.fails else lambda *given: (Result.CUDA_ERROR_INVALID_VALUE, None)

    @staticmethod
    def CUgraphNodeParams() -> Any:
        return SimpleNamespace(conditional=SimpleNamespace())

    def cuCtxGetCurrent(self) -> Any:
        return Result(0), "context"

    def cuModuleLoadData(self, image: bytes) -> Any:
        assert image.endswith(b"}\n\0")
        return Result(0), image

    def cuModuleGetFunction(self, module: bytes, name: bytes) -> Any:
        assert b".entry " + name + b" (" in module
        return Result(0), lambda *given: run_ptx(module.decode().rstrip("\0"), given, self.values.__setitem__)

    def cuGraphCreate(self, flags: int) -> Any:
        self.alive += 1
        return Result(flags), Graph()

    def cuGraphConditionalHandleCreate(self, graph: Graph, context: str, value: int, flags: int) -> Any:
        assert (context, flags) == ("context", 1)
        handle = len(self.values) + 11
        graph.handles[handle] = self.values[handle] = value
        return Result(0), handle

    def cuGraphAddNode(self, graph: Graph, of: None, data: None, number: int, node: Any) -> Any:
        assert (of, data, number) == (None, None, 0)
        assert node.type is Kind.CU_GRAPH_NODE_TYPE_CONDITIONAL
        made = node.conditional
        assert (made.type, made.size, made.ctx) == ("while", 1, "context")
        made.phGraph_out = [Graph()]

        def run() -> None:
            for _ in range(MOST):
                if not self.values[made.handle]:
                    return
                self._run(made.phGraph_out[0])
            raise AssertionError("it does not end")

        graph.nodes.append(run)
        return Result(0), run

    def cuGraphAddChildGraphNode(self, graph: Graph, of: None, number: int, child: Any) -> Any:
        assert (of, number) == (None, 0)

        def run() -> None:
            for _ in range(self.runs):
                child()

        graph.nodes.append(run)
        return Result(0), run

    def cuGraphAddKernelNode(self, graph: Graph, of: list[Any], number: int, node: Any) -> Any:
        assert of == graph.nodes
        assert number == 1
        threads = [getattr(node, f"{what}Dim{axis}") for what in ("grid", "block") for axis in "XYZ"]
        assert threads == [1] * 6
        values, types = node.kernelParams
        assert types == (ctypes.c_void_p, ctypes.c_uint64)
        graph.nodes.append(lambda: node.func(*values))
        return Result(0), graph.nodes[-1]

    def cuGraphGetNodes(self, graph: Any, number: int = 0) -> Any:
        return Result(0), list(self.kinds[:number]), len(self.kinds)

    def cuGraphNodeGetType(self, node: str) -> Any:
        return Result(0), Kind[f"CU_GRAPH_NODE_TYPE_{node}"]

    def cuGraphChildGraphNodeGetGraph(self, node: str) -> Any:
        self.kinds = ("WAIT_EVENT",)  # what is in it
        return Result(0), None

    def cuGraphInstantiate(self, graph: Graph, flags: int) -> Any:
        assert flags == 0
        self.alive += 1
        return Result(0), graph

    def cuGraphLaunch(self, graph: Graph, stream: int) -> Any:
        assert stream == 7
        self.values |= graph.handles
        self._run(graph)
        return (Result(0),)

    def _run(self, graph: Graph) -> None:
        for node in graph.nodes:
            node()

    def cuGraphExecDestroy(self, graph: Graph) -> Any:
        self.alive -= 1
        return (Result(0),)

    def cuGraphDestroy(self, graph: Graph) -> Any:
        self.alive -= 1
        return (Result(0),)


class FakeDriver12(FakeDriver):
    """Of cuda-bindings 12: what 13 calls cuGraphAddNode has another name there, and that name another function."""

    cuGraphAddNode_v2 = FakeDriver.cuGraphAddNode

    def cuGraphAddNode(self, graph: Graph, of: None, number: int, node: Any) -> Any:  # type: ignore[override]
        raise NotImplementedError

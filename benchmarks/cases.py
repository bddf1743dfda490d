"""What is compared: a case has contenders, which do the same work, and the bytes that the work can't do without."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gate import Gate, bytes_equal

Shape = tuple[int, ...]
Role = Literal["eager", "peer", "compile", "ours", "variant", "roof"]
BASELINES = ("eager", "peer", "compile")  # what a speed-up is over; a variant of ours and the roof are for comparison


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        call: the work, on one set of the case's inputs; it may overwrite the state in it.
        role: what it is in the comparison.
        check: compares what `call` makes of fresh inputs of a shape with float64, and tells the gate.
    """

    call: Callable[[Any], object]
    role: Role
    check: Callable[[Gate, Shape], None]

    @property
    def countable(self) -> bool:
        """Whether the dispatcher sees its ops; those of a compiled function it doesn't."""
        return self.role != "compile"


@dataclass(frozen=True)
class Case:
    """A piece of work.

    Attributes:
        name, title: for the command line, and for people.
        bytes_per_element: the least traffic, read and written: the copy's that is the roof.
        traffic: what these bytes are.
        inputs: makes a set of inputs from a shape and a seed.
        contenders: by name.
    """

    name: str
    title: str
    bytes_per_element: int
    traffic: str
    inputs: Callable[[Shape, int], Any]
    contenders: dict[str, Contender]


def ours(device: torch.device) -> str:
    """What our op is called: on the CPU it is no Triton kernel, but the reference in plain PyTorch."""
    return "fastddpm fused" if device.type == "cuda" else "fastddpm reference"


def copy(shape: Shape, bytes_per_element: int, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Source and target of a copy that reads and writes as many bytes in all as the case does."""
    size = math.prod(shape) * bytes_per_element // 2
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator(device, seed))
    return source, torch.empty_like(source)


def roof(inputs: Callable[[Shape, int], Any]) -> Contender:
    """The copy; every case's inputs have its source and target as `scratch`."""

    def call(given: Any) -> Tensor:
        source, target = given.scratch
        return target.copy_(source)

    def check(gate: Gate, shape: Shape) -> None:
        given = inputs(shape, 1)
        bytes_equal(gate, call(given), given.scratch[0])

    return Contender(call, "roof", check)


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A seeded one."""
    return torch.Generator(device).manual_seed(seed)


def coefficients(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ..., 1]."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def compile_modes(device: torch.device) -> dict[str, str]:
    """torch.compile's modes to compare with, by the contender's name.

    On a GPU max-autotune replays CUDA graphs, which copy the inputs into buffers of their own: less host time, more
    traffic. Which is faster depends on the size, so both run.
    """
    modes = {"torch.compile": "max-autotune"}
    return modes | {"torch.compile, no graphs": "max-autotune-no-cudagraphs"} if device.type == "cuda" else modes


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """`function` under torch.compile, for one shape: a second one compiles anew, and a graph break is an error."""
    made: Callable[..., Any] = torch.compile(function, mode=mode, fullgraph=True, dynamic=False)
    return made


def no_compiler() -> str | None:
    """Why torch.compile can't run here; None where a C++ compiler is found (Inductor needs one, GPU or not)."""
    wanted = os.environ.get("CXX") or "g++"
    return None if shutil.which(wanted) else f"there is no C++ compiler ({wanted})"


def shapes(device: torch.device, short: bool) -> Sequence[Shape]:
    """From launch-bound to 1 GB of traffic at 12 bytes an element; on the CPU to 38 MB, which its caches don't hold."""
    if short:
        return [(b, 3, 32, 32) for b in (1, 16)]
    if device.type == "cuda":
        small = [(b, 3, 32, 32) for b in (1, 16, 256, 1024, 4096, 8192, 28672)]
        return [*small, (1, 3, 256, 256), (64, 3, 256, 256)]
    return [*((b, 3, 32, 32) for b in (1, 16, 256, 1024)), (4, 3, 256, 256)]

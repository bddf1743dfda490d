# ruff: noqa: E402 (the environment and the path are set before the imports)
"""What the other figures rest on, of one GPU: its roofs, whether cuDNN looks at the slot, our normals, gaps in graphs.

    python -m benchmarks.gpu_facts roofs          # bandwidth of a copy, rate of a matrix product
    python -m benchmarks.gpu_facts slots          # is a sample's convolution the same, bit for bit, in another slot?
    python -m benchmarks.gpu_facts normal         # our normals against float64
    python -m benchmarks.gpu_facts gaps           # microseconds a node of a CUDA graph of tiny kernels

Each prints what it found and writes it to ``OUT`` (benchmarks/results/<gpu>). On a CPU the first three run too, small.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]

import click
import torch
from fastddpm_kernels import normal, reference
from fastddpm_kernels.constants import STREAM_INITIAL
from torch import Tensor

from benchmarks import command, unet_results
from benchmarks.cases import generator
from benchmarks.conv_problem import Problem, shapes_of
from benchmarks.measure import Times
from benchmarks.race import graphed, race
from benchmarks.timers import DeviceTimer
from benchmarks.unet_networks import CIFAR
from fastddpm.engine.plan import Plan
from fastddpm.errors import InputError

Keep = Callable[[dict[str, Any]], object]  # is given what was found so far


def _nowhere(found: dict[str, Any]) -> None:
    pass


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of a product of square matrices of random numbers: 8192 a side on a GPU."""
    n = 8192 if device.type == "cuda" else 256
    pairs = [tuple(_random(n, n, device=device, dtype=dtype, seed=2 * i + j) for j in range(2)) for i in range(2)]
    out = torch.empty(n, n, device=device, dtype=dtype)
    seconds, failed = race({"product": lambda at: torch.mm(*pairs[at % 2], out=out)}, device, 10)
    if failed:
        raise InputError(f"the product can't be timed: {failed['product']}")
    return 2 * n**3 / seconds["product"]


def _random(*size: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(size, device=device, generator=generator(device, seed)).to(dtype)


def roofs(device: torch.device) -> dict[str, Any]:
    """Bytes/s of copies, read and written together, by size; FLOP/s of products, by dtype."""
    most = 30 if device.type == "cuda" else 22
    copies = {}
    for size in (2**p for p in range(20, most + 1, 2)):
        sources = [torch.randint(0, 256, (size,), dtype=torch.uint8, device=device) for _ in range(2)]
        target = torch.empty_like(sources[0])
        seconds, _ = race({"copy": lambda at, s=sources, to=target: to.copy_(s[at % 2])}, device, 10)
        copies[str(2 * size)] = 2 * size / seconds["copy"] * 1e-9
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    products = {str(kind).removeprefix("torch."): matmul_rate(device, kind) * 1e-12 for kind in kinds}
    return {"copy_gb_per_s_by_bytes": copies, "matmul_tflops": products}


def slots(device: torch.device, keep: Keep = _nowhere) -> dict[str, Any]:
    """Of each convolution of the CIFAR-10 network, cuDNN's and ours: does a result depend on its slot, or on the batch?

    With cuDNN's search (benchmark) and without; the other batch is twice as large. First all of cuDNN, which nothing of
    ours can spoil; `keep` is given what there is after each shape.
    """
    small = device.type == "cpu"
    batch = 4 if small else 64
    operations = Plan.of(CIFAR, 1, 32, 32, 2).lowered.operations
    plain = [s._replace(norms=(), raw=True) for s in shapes_of(operations, torch.bfloat16)]
    ways: dict[str, Callable[[Problem], list[Tensor]]] = {"cudnn": Problem.cudnn}
    if not small:
        ways["ours"] = Problem.own
    found: dict[str, Any] = {}
    before = torch.backends.cudnn.benchmark
    made = {"batch": batch, "shapes": found}
    shapes = list(dict.fromkeys(plain))[: 3 if small else None]
    for what, how in ways.items():
        for shape in shapes:
            part = found.setdefault(shape.key, {})
            for search in (False, True) if what == "cudnn" else (None,):
                torch.backends.cudnn.benchmark = before if search is None else search
                name = what if search is None else f"{what}, benchmark {search}"
                try:
                    part[name] = looks(how, *(Problem(shape, b, device, sets=1) for b in (batch, 2 * batch)))
                except Exception as error:  # of one shape; PyTorch and Triton raise many kinds
                    part[name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
            keep(made)
    torch.backends.cudnn.benchmark = before
    return made


def looks(how: Callable[[Problem], list[Tensor]], problem: Problem, larger: Problem) -> dict[str, bool]:
    """Whether the same samples have the same bits in other slots, in another batch, and in a second call.

    Args:
        how: what is called.
        problem: whose inputs are moved around.
        larger: the same with a batch of twice the size: its samples are overwritten.
    """
    batch = problem.batch
    first = how(problem)[0].clone()
    again = how(problem)[0].clone()
    larger = _with(  # whose weights are the same, by their seed
        larger, lambda name: torch.cat([_part(problem, name), _part(problem, name).flip(0)])
    )
    both = how(larger)[0].clone()
    return {
        "same again": torch.equal(first, again),
        "same in another batch": torch.equal(first, both[:batch]),
        "same in another slot": torch.equal(both[:batch], both[batch:].flip(0)),
    }


def _part(problem: Problem, name: str) -> Tensor:
    made: Tensor = getattr(problem.given[0], name)
    return made


def _with(problem: Problem, value: Callable[[str], Tensor]) -> Problem:
    for name in vars(problem.given[0]):
        target = getattr(problem.given[0], name)
        if target is not None:
            target.copy_(value(name))
    return problem


def normals(device: torch.device) -> dict[str, Any]:
    """The greatest and the mean error of our normals against float64 of the same bits, and where the greatest is."""
    count, samples = (1 << 22, 16) if device.type == "cuda" else (1 << 12, 2)
    worst, total, at = 0.0, 0.0, (0, 0)
    for seed in range(samples):
        seeds = torch.tensor([seed * 1_000_003], device=device)
        got = normal(seeds, (count,), stream=STREAM_INITIAL)
        exact = reference.normal(seeds.cpu(), (count,), step=0, stream=STREAM_INITIAL, dtype=torch.float64)
        off = (got.cpu().double() - exact).abs()
        total += float(off.sum())
        if not float(off.max()) <= worst:
            worst, at = float(off.max()), (seed, int(off.argmax()))
    return {"numbers": count * samples, "greatest": worst, "mean": total / (count * samples), "seed, element": at}


def gaps(device: torch.device) -> dict[str, Any]:
    """Microseconds a node: graphs of 1000 and of 200 dependent kernels on one element, their difference over 800."""
    if device.type != "cuda":
        raise InputError("gaps is of CUDA graphs: it needs an NVIDIA GPU")
    x = torch.zeros(1, device=device)
    ways: dict[str, Callable[[], object]] = {"PyTorch's add_": lambda: x.add_(1)}
    ways |= {f"Triton, programmatic launch {on}": partial(_tiny, x, on) for on in (False, True)}
    made: dict[str, Any] = {}
    for name, call in ways.items():
        try:
            short, long = (_graph_seconds(call, nodes) for nodes in (200, 1000))
            made[name] = (long - short) / 800 * 1e6
        except Exception as error:  # such as a GPU without programmatic launch
            made[name] = f"{type(error).__name__}: {error}"
    return {"us_a_node": made}


def _tiny(x: Tensor, programmatic: bool) -> None:
    from benchmarks.tiny_kernel import add_one

    add_one[(1,)](x, WAIT=programmatic, num_warps=1, launch_pdl=programmatic)


def _graph_seconds(call: Callable[[], object], nodes: int) -> float:
    replay, times = graphed(lambda: [call() for _ in range(nodes)]), Times()
    replay()
    for _ in range(11):
        DeviceTimer(None)(replay, times)
    return times.median


FACTS: dict[str, Callable[..., dict[str, Any]]] = {"roofs": roofs, "slots": slots, "normal": normals, "gaps": gaps}


@click.command()
@click.argument("fact", type=click.Choice(list(FACTS)))
def main(fact: str) -> None:
    """Measure one FACT of this GPU, print it and write it as JSON."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    header = unet_results.header(fact)

    def keep(found: dict[str, Any]) -> Path:
        return unet_results.write(header | {"found": found})

    with torch.no_grad():
        found = slots(device, keep) if fact == "slots" else FACTS[fact](device)
    click.echo(json.dumps(found, indent=1))
    click.echo(f"wrote {keep(found)}")


if __name__ == "__main__":
    raise SystemExit(command.run(main))

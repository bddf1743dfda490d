# ruff: noqa: E402 (the environment and the path are set before the imports)
"""Measure which tile each convolution of a UNet is fastest with on this GPU, and where cuDNN is faster.

    python -m benchmarks.tune                                   # the CIFAR-10 network: into the package's table
    python -m benchmarks.tune --unet folder --batches 1,16 --out /tmp/tuned
    python -m benchmarks.tune --list                            # the shapes; needs no GPU

Correct first, against float64. A tile takes part only where its bits are those of the rule's tile, so that a sample is
the same in any batch. Beside cuDNN's convolution stands what the engine's does as well: bias, row, residual, shortcut,
norms. Many calls are timed in a CUDA graph, in turn. What was measured before stays, but where it is measured again.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "kernels")]

import click
import torch
from fastddpm_kernels.conv_choice import ConvShape, segments, step, takes
from fastddpm_kernels.conv_tiles import Tile

from benchmarks import command, tuned
from benchmarks.conv_problem import Problem, flops, shapes_of
from benchmarks.race import Call, race
from benchmarks.unet_networks import CIFAR
from fastddpm.engine.plan import Plan
from fastddpm.errors import InputError
from fastddpm.unet_config import UNetConfig

Race = Callable[..., tuple[dict[str, float], dict[str, str]]]
CALLS_FLOPS = 2e11  # of the calls that are timed together: a quarter of a millisecond at best
RULE, CUDNN = "rule", "cudnn"
# Pixels and channels of a tile, the likeliest first: of any convolution, of the smallest maps, of the last convolution.
SIZES = ((128, 128), (64, 64), (128, 64), (64, 128), (64, 32), (128, 256), (256, 128), (128, 32), (256, 64))
SMALL = ((64, 32), (64, 64))
LAST = ((64, 16), (128, 16), (256, 16))


def candidates(shape: ConvShape, most: int) -> dict[str, tuple[Tile | None, bool | None]]:
    """(tile, split) by name: the rule's, then others with its steps, the likeliest first, `most` in all."""
    made: dict[str, tuple[Tile | None, bool | None]] = {RULE: (None, None)}
    if shape.dtype == "float32":
        return made
    divided = segments(shape) > 1
    for m, n in SMALL if divided else LAST if shape.cout <= 16 else SIZES:
        warps = 8 if m * n >= 128 * 128 else 4
        for split in (None, False) if divided else (None,):
            for stages in (3, 4):
                registers = 128 if (m, n, stages) == (128, 128, 3) else None
                tile = Tile(m, n, step(shape), warps, stages, registers)
                if n > max(shape.cout, 16) or (shape.norms and m * n > 128 * 128) or not takes(shape, tile):
                    continue
                name = f"{m}x{n}, {stages} stages, {registers or 'any'} registers, split {split}"
                made[name] = tile, split
    return dict(list(made.items())[:most])


def measure(problem: Problem, most: int, timed: Race = race) -> tuple[dict[str, Any], dict[str, str]]:
    """(a batch's part of the table, who took no part and why).

    Raises:
        ArithmeticError: the rule's own tile is wrong, or cuDNN's result: nothing of this shape is to be measured.
    """
    exact, first = problem.exact(), [made.clone() for made in problem.own(0, problem.rule)]
    errors = {RULE: problem.error(first, exact), CUDNN: problem.error(problem.cudnn(), exact)}
    for name, error in errors.items():
        if not error <= problem.bound:
            raise ArithmeticError(f"{name} is off by {error:.2e} of the output; allowed: {problem.bound:.2e}")
    found, out = candidates(problem.shape, most), {}
    for name, (tile, split) in list(found.items()):
        reason = _refused(problem, first, tile, split)
        if reason is not None:
            out[name] = reason
            del found[name]
    calls: dict[str, Call] = {name: _own(problem, *given) for name, given in found.items()}
    seconds, failed = timed({CUDNN: problem.cudnn, **calls}, problem.device, len(problem.counters))
    ours = {name: taken for name, taken in seconds.items() if name != CUDNN}
    if RULE not in ours or CUDNN not in seconds:
        raise ArithmeticError(f"{failed.get(RULE) or failed.get(CUDNN)}")
    best = min(ours, key=lambda name: ours[name])
    tile, split = found[best]
    return {
        "tile": None if tile is None else [tile.m, tile.n, tile.warps, tile.stages, tile.registers],
        "split": split,
        "us": ours[best] * 1e6,
        "rule_us": ours[RULE] * 1e6,
        "cudnn_us": seconds[CUDNN] * 1e6,
        "error": errors[RULE],
        "cudnn_error": errors[CUDNN],
    }, out | failed


def _own(problem: Problem, tile: Tile | None, split: bool | None) -> Call:
    tile = tile or problem.rule  # not the table's: tuned again it would be compared with itself
    return lambda at: problem.own(at, tile, split)


def _refused(problem: Problem, first: Sequence[torch.Tensor], tile: Tile | None, split: bool | None) -> str | None:
    try:
        made = problem.own(0, tile or problem.rule, split)
    except Exception as error:  # too much shared memory, too few registers: Triton has a kind for each
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
    same = all(torch.equal(a, b) for a, b in zip(made, first, strict=True))
    return None if same else "its bits are not those of the rule's tile"


def here() -> torch.device:
    """The GPU; the CPU, in tests."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def calls_in_a_row(shape: ConvShape, batch: int) -> int:
    """How many calls make one timing."""
    return int(min(40, max(4, CALLS_FLOPS // (flops(shape) * batch))))


def line(shape: ConvShape, batch: int, part: dict[str, Any]) -> str:
    """A measurement, to read."""
    rate = flops(shape) * batch / part["us"] * 1e-6
    return (
        f"{shape.key}, batch {batch}: ours {part['us']:.1f} us ({rate:.0f} TFLOP/s; the rule's tile "
        f"{part['rule_us']:.1f}), cuDNN {part['cudnn_us']:.1f}; tile {part['tile']}, split {part['split']}"
    )


def tune(
    shapes: Sequence[ConvShape], batches: Sequence[int], most: int, seconds: float, path: Path, timed: Race = race
) -> int:
    """Measure, adding to the table at `path` after each shape; returns how many there was no time for."""
    device, end = here(), time.monotonic() + seconds
    for at, shape in enumerate(shapes):
        measured: dict[str, Any] = {}
        late = False
        for batch in batches:
            late = time.monotonic() > end
            if late:
                break
            try:
                problem = Problem(shape, batch, device, calls=calls_in_a_row(shape, batch))
                measured[str(batch)], left_out = measure(problem, most, timed)
            except Exception as error:  # of one shape; the others are measured
                click.echo(f"{shape.key}, batch {batch}: left out: {type(error).__name__}: {error}", err=True)
                continue
            click.echo(line(shape, batch, measured[str(batch)]))
            for name, reason in left_out.items():
                click.echo(f"    {name}: {reason}")
        if measured:
            tuned.add(path, tuned.gpu_name(), {shape.key: measured})
        if late:
            return len(shapes) - at
    return 0


def compile_ahead(words: Sequence[str], jobs: int, seconds: float) -> None:
    """Let `jobs` processes compile the kernels, each a part of the shapes, into Triton's cache on the disk."""
    command_line = [sys.executable, "-m", "benchmarks.tune", *words]
    parts = [
        subprocess.Popen([*command_line, "--part", f"{i}/{jobs}"], cwd=_ROOT, stdout=subprocess.DEVNULL)
        for i in range(jobs)
    ]
    end = time.monotonic() + seconds
    for part in parts:
        try:
            part.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            part.kill()
            part.wait()


def compile_part(shapes: Sequence[ConvShape], part: str, most: int) -> None:
    """One of those processes: run each candidate of its shapes once."""
    first, of = (int(word) for word in part.split("/"))
    for shape in shapes[first::of]:
        problem = Problem(shape, 1, here(), sets=1)
        for tile, split in candidates(shape, most).values():
            with contextlib.suppress(Exception):  # `measure` says what it was
                problem.own(0, tile, split)


def network(folder: Path | None) -> UNetConfig:
    """The config of a checkpoint, or Ho et al.'s for CIFAR-10."""
    if folder is None:
        return CIFAR
    from fastddpm.unet import UNet

    return UNet.from_pretrained(folder).config


def numbers(text: str, name: str) -> list[int]:
    """1,8,64 as integers; raises `InputError`."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise InputError(f"{name} is {text!r}; allowed: integers of at least 1 with commas between, as 1,8,64")
    return [int(word) for word in words]


@click.command()
@click.option(
    "--unet", "folder", type=click.Path(path_type=Path), help="A checkpoint's folder.  [Ho et al.'s CIFAR-10]"
)
@click.option("--size", type=click.IntRange(1), help="Pixels a side.  [the config's sample_size]")
@click.option("--batches", default="1,8,64,256", show_default=True, metavar="NUMBERS")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--tiles", type=click.IntRange(1), default=12, show_default=True, help="Tiles tried, the rule's too.")
@click.option("--seconds", type=float, default=1800.0, show_default=True, help="No shape is begun after these.")
@click.option("--jobs", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), help="Compiling processes.")
@click.option("--out", type=click.Path(path_type=Path), default=tuned.FOLDER, help="Folder.  [the package's]")
@click.option("--list", "only_list", is_flag=True, help="Say the shapes, measure nothing.")
@click.option("--part", hidden=True)
def main(
    folder: Path | None,
    size: int | None,
    batches: str,
    dtype: str,
    tiles: int,
    seconds: float,
    jobs: int,
    out: Path,
    only_list: bool,
    part: str | None,
) -> None:
    """Measure which tile each convolution of a UNet is fastest with on this GPU, and where cuDNN is faster."""
    config, given = network(folder), numbers(batches, "batches")
    side = size or config.sample_size
    if side is None:
        raise InputError("the UNet's config has no sample_size: give --size")
    kind: torch.dtype = getattr(torch, dtype)
    shapes = shapes_of(Plan.of(config, 1, side, side, kind.itemsize).lowered.operations, kind)
    if only_list:
        click.echo("\n".join(f"{shape.key}: {flops(shape) / 1e6:.1f} MFLOP an image" for shape in shapes))
        return
    if not torch.cuda.is_available():
        raise InputError("torch finds no NVIDIA GPU, and only one can be tuned for; --list says the shapes")
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        if part is not None:
            compile_part(shapes, part, tiles)
            return
        start = time.monotonic()
        words = ["--dtype", dtype, "--tiles", str(tiles), "--size", str(side)]
        compile_ahead([*words, *(["--unet", str(folder)] if folder else [])], jobs, seconds / 2)
        click.echo(f"compiled in {time.monotonic() - start:.0f} s by {jobs} processes")
        path = out / tuned.file_name()
        left = tune(shapes, given, tiles, seconds - (time.monotonic() - start), path)
    click.echo(f"wrote {path}" + (f"; no time for {left} of {len(shapes)} shapes: give more --seconds" if left else ""))


if __name__ == "__main__":
    raise SystemExit(command.run(main))

# ruff: noqa: E402 (the path is set before the imports)
"""All that is to be measured first on a GPU, in one go, the worthiest first.

    python benchmarks/first_on_gpu.py --out /tmp/first --minutes 25
    python benchmarks/first_on_gpu.py --list
    python benchmarks/first_on_gpu.py --out /tmp/first --only kernels,unet

Each step is a process with a time limit of its own; one that fails or is stopped doesn't stop the next. What it says
goes to <out>/<step>.log as it says it, its figures to <out>, and after each step <out>/steps.json and <out>/README.md,
the summary, are written anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import click

from benchmarks import command
from fastddpm.checkpoint import write_atomically
from fastddpm.errors import InputError

PYTHON, PYTEST = (sys.executable,), (sys.executable, "-m", "pytest", "-q", "-s")
FACT = (*PYTHON, "-m", "benchmarks.gpu_facts")
POLICY, LOOP = "benchmarks/test_policy.py", "benchmarks/loop_latency.py"
LEAST = 20.0  # seconds: with less left a step is not begun
GRACE = 10.0  # seconds that a stopped step has to say what it found so far
# Names as they come, and where one hangs, since that is never done; files that lack a package are left out.
TESTS = (*PYTHON, "-m", "pytest", "-v", "-s", "--tb=short", "--continue-on-collection-errors")
# What else the interpreter runs, compiled for this GPU.
NATIVE = [f"tests/test_{name}.py" for name in (
    "conv", "conv_norm", "group_norm", "attention", "engine_kernels", "reverse_step", "noise",
)]  # fmt: skip
TAIL = 25  # lines of a log in the summary
Outcome = Literal["passed", "failed", "stopped", "not run"]


@dataclass(frozen=True)
class Step:
    """A process to run.

    Attributes:
        name, says: for `--only`, and for people.
        words: the command; {out} is the folder.
        minutes: its time limit.
        needs: a file of the repository without which it is left out.
        sets: environment variables beside OUT.
    """

    name: str
    says: str
    words: tuple[str, ...]
    minutes: float
    needs: str = ""
    sets: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Done:
    """How a step ended."""

    name: str
    outcome: Outcome
    seconds: float = 0.0
    code: int | None = None
    why: str = ""


STEPS = (
    Step("tests", "the tests that need a GPU", (*TESTS, "-o", "faulthandler_timeout=60", "-m", "gpu", "tests"), 4.0),
    Step("roofs", "bandwidth of a copy, rate of a matrix product", (*FACT, "roofs"), 1.0),
    Step(
        "unet",
        "a reverse step with the CIFAR-10 network: eager, graph, two compiles, ours",
        (*PYTEST, "benchmarks/test_unet.py"),
        8.5,
        sets={"BATCHES": "1,256,64,8", "SECONDS": "450", "FLAGS": "3"},
    ),
    Step("kernels", "every kernel: correct, then timed", (*PYTHON, "benchmarks/run.py", "--out", "{out}"), 4.0),
    Step(
        "convolutions",
        "our convolution and cuDNN's on the UNet's shapes; the tiles",
        (*PYTHON, "-m", "benchmarks.tune", "--out", "{out}", "--tiles", "5", "--seconds", "220"),
        4.0,
    ),
    Step("native", "the kernels' tests, compiled for the GPU", (*TESTS, "-n", "7", "-m", "not gpu", *NATIVE), 5.0),
    Step("slots", "is cuDNN independent of the slot?", (*FACT, "slots"), 2.5),
    Step("normal", "our normals against float64", (*FACT, "normal"), 1.0),
    Step("gaps", "microseconds a node of a CUDA graph", (*FACT, "gaps"), 1.0),
    Step("policy", "Diffusion Policy's network", (*PYTEST, POLICY), 3.0, needs=POLICY, sets={"BATCHES": "1,64"}),
    Step(  # a folder of its own: its file is called as that of `kernels`
        "loop",
        "host time and latency of the sampling loop",
        (*PYTHON, LOOP, "--steps", "200", "--out", "{out}/loop"),
        2.0,
        needs=LOOP,
    ),
    Step(
        "cold",
        "seconds to the first samples, nothing compiled before",
        (*PYTEST, "benchmarks/test_unet.py", "-k", "cold"),
        5.0,
        sets={"BATCHES": "1", "COLD": "1", "SECONDS": "280"},
    ),
)


def run_step(step: Step, out: Path, seconds: float) -> Done:
    """Run a step for so long at most; its output goes to a log as it comes. Its whole process group ends with it."""
    if step.needs and not (ROOT / step.needs).exists():
        return Done(step.name, "not run", why=f"there is no {step.needs}")
    if seconds < LEAST:
        return Done(step.name, "not run", why="no time left")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "OUT": str(out), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path, **step.sets}
    environment["PYTHONUNBUFFERED"] = "1"
    words = [word.replace("{out}", str(out)) for word in step.words]
    limit, begin = min(seconds, 60 * step.minutes), time.monotonic()
    with (out / f"{step.name}.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            return Done(step.name, "failed", why=str(error))
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            _interrupt(process)
            return Done(step.name, "stopped", time.monotonic() - begin, why=f"not done in {limit:.0f} s")
        finally:
            _end(process)
    return Done(step.name, "failed" if code else "passed", time.monotonic() - begin, code)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Let it end as by Ctrl-C: pytest then says which tests failed, and why."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGINT)
        process.wait(GRACE)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop it and all that it started: compilers live on otherwise."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(steps: Sequence[Step], out: Path, seconds: float) -> list[Done]:
    """Run the steps in order in so many seconds together; the summary is written after each."""
    out.mkdir(parents=True, exist_ok=True)
    end, done = time.monotonic() + seconds, []
    for step in steps:
        click.echo(f"{step.name}: {step.says} ...")
        done.append(run_step(step, out, end - time.monotonic()))
        last = done[-1]
        click.echo(f"    {last.outcome} in {last.seconds:.0f} s" + (f": {last.why}" if last.why else ""))
        write_atomically(out / "steps.json", json.dumps([asdict(d) for d in done], indent=1).encode() + b"\n")
        write_atomically(out / "README.md", summary(steps, done, out).encode())
    return done


def summary(steps: Sequence[Step], done: Sequence[Done], out: Path) -> str:
    """A page: how each step ended, the end of its log, and the files."""
    by_name = {step.name: step for step in steps}
    lines = ["# First figures on a GPU", "", "| step | | outcome | s | |", "|---|---|---|---:|---|"]
    lines += [f"| {d.name} | {by_name[d.name].says} | {d.outcome} | {d.seconds:.0f} | {d.why} |" for d in done]
    lines += [f"| {step.name} | {step.says} | to come | | |" for step in steps[len(done) :]]
    for d in done:
        log = out / f"{d.name}.log"
        if d.outcome != "not run" and log.exists():
            said = log.read_text(errors="replace").splitlines()
            lines += ["", f"## {d.name}", "", f"`{' '.join(by_name[d.name].words)}`; the end of {log.name}:", ""]
            lines += [f"    {line}" for line in said[-TAIL:]]
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*.json"))
    return "\n".join([*lines, "", "Files: " + (", ".join(files) or "none") + ".", ""])


def chosen(only: str | None, skip: str | None, steps: Sequence[Step] = STEPS) -> list[Step]:
    """The steps of these names, in their order; raises `InputError` for a name that is none's."""
    names = [step.name for step in steps]
    wanted, unwanted = ([w.strip() for w in text.split(",")] if text else [] for text in (only, skip))
    for name in (*wanted, *unwanted):
        if name not in names:
            raise InputError(f"there is no step {name!r}; allowed: {', '.join(names)}")
    return [step for step in steps if (not wanted or step.name in wanted) and step.name not in unwanted]


def gpu() -> str | None:
    """Torch's name of the GPU; None: there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the figures and logs.")
@click.option("--minutes", type=click.FloatRange(min=0), default=25.0, show_default=True, help="Of all steps together.")
@click.option("--only", metavar="NAMES", help="With commas between.")
@click.option("--skip", metavar="NAMES", help="With commas between.")
@click.option("--list", "only_list", is_flag=True, help="Say the steps, run none; needs no GPU.")
def main(out: Path | None, minutes: float, only: str | None, skip: str | None, only_list: bool) -> None:
    """Measure on a GPU all that is to be measured first, the worthiest first."""
    steps = chosen(only, skip)
    if only_list:
        for step in steps:
            click.echo(f"{step.name:<13} {step.minutes:>4g} min at most  {step.says}")
        return
    name = gpu()
    if name is None:
        raise InputError("torch finds no NVIDIA GPU, and all of this is measured on one; --list says what")
    if out is None:
        raise InputError("give --out, the folder of the figures")
    click.echo(name)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the step would live on without us
    try:
        done = run(steps, out.resolve(), 60 * minutes)
    finally:
        signal.signal(signal.SIGTERM, before)
    click.echo(f"wrote {out / 'README.md'}")
    if any(d.outcome in ("failed", "stopped") for d in done):
        raise SystemExit(1)


if __name__ == "__main__":
    raise SystemExit(command.run(main))

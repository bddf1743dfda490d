"""Mutation test of the kernels: put one fault at a time into a kernel module, and see whether the tests notice.

    python tests/mutate_kernels.py [--module NAME] [--jobs 2] [--sample N | --codegen]

A mutant lives in a fork of this process, which has imported everything but the kernels, so that one costs what its
tests cost until the first that fails. It counts as killed if a test fails, if a test can't be run, if the process dies,
or if a test takes longer than `TIMEOUT`. Prints a table and the survivors that docs/mutants.md does not list; exits
with 1 if fewer than 95 % are killed of those that are not listed there. The kernels are interpreted: no GPU is used.
"""

from __future__ import annotations

import os

os.environ |= {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}

import argparse
import contextlib
import importlib
import itertools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels" / "fastddpm_kernels"
LIST = HERE.parent / "docs" / "mutants.md"
sys.path[:0] = [str(HERE), str(HERE.parent), str(KERNELS.parent)]

from mutations import Mutant, mutants  # noqa: E402 (after the settings above)

SEEN_IN_CODE = "Killed by test_codegen.py"  # a heading of the list
TIMEOUT = 20  # seconds for one test with its parameters, of which the slowest takes 1.5

QUICK = 4  # of a test's parameter sets at most these many, evenly; what survives them meets all of them

NOISE = ["test_noise.test_kernel_and_reference_agree_and_stay_inside", "test_noise.test_philox_has_the_published_bits"]
STEP = [
    "test_survivors.test_launches_are_as_stated",
    "test_step_variants.test_the_launcher_of_the_op_hands_everything_on",
    "test_step_variants.test_a_variant_against_float64",
    "test_reverse_step.test_advance_moves_each_cursor_and_reads_its_next_time",
    "test_step_variants",
    "test_reverse_step",
]
Q_SAMPLE, LOSS = ["test_q_sample"], ["test_noise_mse.test_slices_and_single_elements", "test_noise_mse"]
TESTS = {  # a module's tests: the quickest to kill first, then whole files; what has run does not run again
    "lanes": [
        "test_survivors.test_how_samples_are_divided",
        *NOISE,
        *STEP,
        *LOSS,
        *Q_SAMPLE,
        "test_noise",
        "test_survivors",
        "test_far",
    ],
    "philox": [*NOISE, "test_noise", *Q_SAMPLE, *STEP, "test_survivors", "test_far"],
    "prediction": [*STEP, "test_survivors", "test_far", "test_threshold.test_an_identity_row_reads_no_model_output"],
    "reverse_step_kernel": [
        "test_loop_step.test_the_first_of_several_programs_writes_what_is_next",
        *STEP,
        "test_loop_step.test_it_is_reverse_step_and_advance",
        "test_survivors",
        "test_far",
    ],
    "q_sample_kernel": [*Q_SAMPLE, *LOSS, "test_survivors", "test_far"],
    "noise_mse_kernel": [*LOSS, "test_survivors", "test_far"],
    "threshold": ["test_threshold", "test_survivors", "test_far"],
    "guidance_rescale": ["test_guidance_rescale", "test_survivors", "test_far"],
}
WITHOUT_KERNELS = (
    "test_bad_",
    "test_gradient",
    "test_a_training_step_compiles",
    "test_no_two_draws",
    "test_tails_reach",
)


def cases(name: str, thorough: bool) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """The tests of a module of tests, or one of them, with their parameters; those with fixtures left out."""
    torch = importlib.import_module("torch")
    module, _, only = name.partition(".")
    if not (HERE / f"{module}.py").exists():
        return
    for title, test in list(vars(importlib.import_module(module)).items()):  # the interpreter adds to it
        if not title.startswith(only or "test_") or title.startswith(WITHOUT_KERNELS):
            continue
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if any(mark.name == "gpu" for mark in getattr(test, "pytestmark", [])):
            continue
        names = [[part.strip() for part in mark.args[0].split(",")] for mark in marks]
        fixtures = {*test.__code__.co_varnames[: test.__code__.co_argcount]} - {*itertools.chain(*names)}
        if fixtures - {"monkeypatch"}:
            continue
        sets = list(itertools.product(*(mark.args[1] for mark in marks)))
        sets = [values for values in sets if torch.float16 not in values]  # whose path is bfloat16's
        for values in sets if thorough else sets[:: -(-len(sets) // QUICK)]:
            given: dict[str, Any] = {}
            for keys, value in zip(names, values, strict=True):
                given |= zip(keys, value, strict=True) if len(keys) > 1 else {keys[0]: value}
            yield f"{module}.{title}", repr(given), partial(call, test, given, fixtures)


def call(test: Callable[..., None], given: dict[str, Any], fixtures: set[str]) -> None:
    with importlib.import_module("pytest").MonkeyPatch.context() as patch:
        test(**given, **dict.fromkeys(fixtures, patch))


def run_tests(module: str, thorough: bool) -> str:
    """What killed the mutant of this module, and in which test; or "" if nothing did."""
    ran, title = set(), ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in TESTS[module]:
            try:
                for title, given, test in cases(name, thorough):
                    if (title, given) not in ran:
                        ran.add((title, given))
                        signal.alarm(TIMEOUT)  # its default action ends the process
                        test()
            except BaseException as error:
                asserted = isinstance(error, AssertionError) or "DID NOT" in str(error)
                return f"{'assertion' if asserted else 'error'} {title} {type(error).__name__}"
    return ""


def child(mutant: Mutant, folder: str, thorough: bool) -> None:
    """In the fork: the mutant takes the place of its module, and the tests are imported with it."""
    package = importlib.import_module("fastddpm_kernels")
    (Path(folder) / f"{mutant.module}.py").write_text(mutant.source)
    package.__path__.insert(0, folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    (Path(folder) / "killed").write_text(run_tests(mutant.module, thorough))


class Fork:
    """A process with one mutant."""

    def __init__(self, mutant: Mutant, thorough: bool) -> None:
        self.mutant = mutant
        self.folder = tempfile.TemporaryDirectory()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                child(mutant, self.folder.name, thorough)
            os._exit(0)

    def verdict(self) -> str | None:
        """None while it runs; then "" if the mutant survived, else what killed it."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return None
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) == signal.SIGALRM else f"error signal {os.WTERMSIG(status)}"
        said = Path(self.folder.name) / "killed"
        return said.read_text() if said.exists() else "error before the tests"


def run_all(todo: list[Mutant], options: argparse.Namespace, *, thorough: bool) -> dict[str, str]:
    """The verdict on each mutant, by name."""
    verdicts: dict[str, str] = {}
    waiting, running = list(reversed(todo)), list[Fork]()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(Fork(waiting.pop(), thorough))
        time.sleep(0.005)
        for fork in list(running):
            verdict = fork.verdict()
            if verdict is not None:
                verdicts[fork.mutant.name] = verdict
                if options.verbose:
                    print(f"{verdict or 'survived'} | {fork.mutant.line} | {fork.mutant.name}", flush=True)
                fork.folder.cleanup()
                running.remove(fork)
    return verdicts


def listed(path: Path) -> dict[str, str]:
    """The survivors of a list like docs/mutants.md, each with the heading under which it stands."""
    found, heading, inside = {}, "", False
    for line in path.read_text().splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith("```"):
            inside = not inside
        elif inside and line:
            found[line] = heading
    return found


def seen_in_code(mutant: Mutant) -> bool:
    """Whether test_codegen.py fails with this mutant: in a process of its own, on a copy of what it needs."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(KERNELS, copy / "kernels" / KERNELS.name, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / "kernels" / KERNELS.name / f"{mutant.module}.py").write_text(mutant.source)
        (copy / "tests").mkdir()
        for name in ("conftest.py", "test_codegen.py", "compile_kernels.py"):
            shutil.copy(HERE / name, copy / "tests")
        shutil.copy(HERE.parent / "pyproject.toml", copy)
        run = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_codegen.py"]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run(run, cwd=copy, env=environment, capture_output=True).returncode == 1


def preload() -> None:
    """Import what the tests import, but no kernel: the forks do that."""
    for name in ("triton.language", "numpy", "pytest", "scipy.stats", "hypothesis", "fastddpm"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    for name in ("step_ops", "reference"):
        importlib.import_module(f"fastddpm_kernels.{name}")
    assert "fastddpm_kernels.lanes" not in sys.modules


def report(todo: list[Mutant], verdicts: dict[str, str], known: dict[str, str]) -> bool:
    """Print the table and the survivors; whether at least 95 % are killed of those that are not equivalent."""
    print(
        f"{'module':20} {'mutants':>8} {'killed':>8} {'by assertion':>13} {'by error':>9} {'timeout':>8} {'listed':>7}"
    )
    total: Counter[str] = Counter()
    for module in [*dict.fromkeys(m.module for m in todo), "all"]:
        of = [m for m in todo if module in (m.module, "all")]
        count = Counter(verdicts[m.name].partition(" ")[0] or ("listed" if m.name in known else "survived") for m in of)
        killed = sum(count[kind] for kind in ("assertion", "error", "timeout"))
        print(
            f"{module:20} {len(of):8} {killed:8} {count['assertion']:13} {count['error']:9} {count['timeout']:8} "
            f"{count['listed']:7}  {killed / len(of):.1%} killed, {killed / max(1, len(of) - count['listed']):.1%} of "
            "those not listed"
        )
        total = count | Counter(killed=killed)
    for mutant in todo:
        if not verdicts[mutant.name] and mutant.name not in known:
            print(f"survived: {mutant.module}.py:{mutant.line}\n{mutant.name}")
        if verdicts[mutant.name] and mutant.name in known:
            print(f"listed as equivalent, but killed ({verdicts[mutant.name]}):\n{mutant.name}")
    return total["killed"] >= 0.95 * (total["killed"] + total["survived"])


def sources() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (*KERNELS.glob("*.py"), *HERE.glob("*.py"))}


def mutate(todo: list[Mutant], known: dict[str, str], options: argparse.Namespace) -> bool:
    """Run the tests on these mutants and report; whether enough are killed."""
    started, before = time.monotonic(), sources()
    preload()
    modules = [] if options.sample else dict.fromkeys(mutant.module for mutant in todo)  # the sample's run in CI anyway
    unchanged = [Mutant(m, 0, f"{m}: unchanged", (KERNELS / f"{m}.py").read_text()) for m in modules]
    for name, verdict in run_all(unchanged, options, thorough=True).items():
        if verdict:
            sys.exit(f"{name}, and yet the tests fail ({verdict}): nothing can be said of mutants")
    verdicts = run_all(todo, options, thorough=False)
    survived = [mutant for mutant in todo if not verdicts[mutant.name] and mutant.name not in known]
    verdicts |= run_all(survived, options, thorough=True)
    if sources() != before:
        sys.exit("kernels or tests were changed while they were tested: nothing can be said of mutants")
    enough = report(todo, verdicts, known)
    print(f"{time.monotonic() - started:.0f} s, {options.jobs} at a time")
    return enough


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", choices=TESTS, help="only this module's mutants (default: all modules)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="forks at a time (default: the cores)")
    parser.add_argument("--sample", type=int, help="so many mutants that are not listed, always the same")
    parser.add_argument("--only", default="", help="only mutants whose name has this in it")
    parser.add_argument("--list", type=Path, default=LIST, help="the known survivors (default: docs/mutants.md)")
    parser.add_argument("--codegen", action="store_true", help="run test_codegen.py on those listed as killed by it")
    parser.add_argument("--verbose", action="store_true", help="print what killed each")
    options = parser.parse_args()
    modules = [options.module] if options.module else list(TESTS)
    todo = [mutant for module in modules for mutant in mutants(KERNELS / f"{module}.py")]
    known = listed(options.list)
    gone = {name for name in known if name.partition(".")[0] in modules} - {mutant.name for mutant in todo}
    for name in sorted(gone):
        print(f"listed, but there is no such mutant any more:\n{name}")
    todo = [mutant for mutant in todo if options.only in mutant.name]
    if options.codegen:
        todo = [mutant for mutant in todo if known.get(mutant.name, "").startswith(SEEN_IN_CODE)]
        blind = [mutant.name for mutant in todo if not seen_in_code(mutant)]
        print("\n".join([f"{len(todo) - len(blind)} of {len(todo)} killed by test_codegen.py; not:", *blind]))
        return 1 if blind else 0
    if options.sample:
        todo = [mutant for mutant in todo if mutant.name not in known]
        todo = [todo[i] for i in sorted(random.Random(0).sample(range(len(todo)), min(options.sample, len(todo))))]
    enough = mutate(todo, known, options) if todo else True
    return 0 if enough and not gone else 1


if __name__ == "__main__":
    sys.exit(main())

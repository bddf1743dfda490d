"""The measurements of a fresh GPU machine: steps in order, each ended in time, a page that says how; and the facts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastddpm_kernels.conv_choice import ConvShape
from torch import Tensor

from benchmarks import cold_start, command, first_on_gpu, gpu_facts, unet_results
from benchmarks.conv_problem import Problem
from benchmarks.first_on_gpu import ROOT, STEPS, Done, Step, chosen, run, run_step, summary
from fastddpm.errors import InputError

CPU = torch.device("cpu")


def python(name: str, code: str, minutes: float = 1.0, **more: Any) -> Step:
    return Step(name, f"does {name}", (sys.executable, "-c", code), minutes, **more)


def test_a_failure_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        python("good", "import os; print('said', os.environ['OUT'], os.environ['SET'])", sets={"SET": "7"}),
        python("bad", "import sys; print('why', file=sys.stderr); sys.exit(3)"),
        Step("absent", "no program", ("/no/such/program",), 1.0),
        python("lacking", "", needs="benchmarks/no_such_file.py"),
        Step("file", "writes", (sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", "{out}/figures.json"), 1.0),
    ]
    out = tmp_path / "deep" / "out"
    done = run(steps, out, 60.0)
    assert [d.outcome for d in done] == ["passed", "failed", "failed", "not run", "passed"]
    assert [d.code for d in done] == [0, 3, None, None, 0]
    assert (out / "good.log").read_text() == f"said {out} 7\n"
    assert (out / "bad.log").read_text() == "why\n"
    assert done[3].why == "there is no benchmarks/no_such_file.py"
    assert [d["outcome"] for d in json.loads((out / "steps.json").read_text())] == [d.outcome for d in done]
    page = (out / "README.md").read_text()
    assert "| bad | does bad | failed | 0 |  |" in page
    assert f"    said {out} 7" in page
    assert "    why" in page
    assert "Files: figures.json, steps.json." in page
    assert "bad: does bad ...\n    failed in 0 s\n" in capsys.readouterr().out


def test_a_step_and_its_children_end_in_time(tmp_path: Path) -> None:
    """A compiler that a stopped step has started doesn't run on beside the next."""
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(1.5); pathlib.Path({str(mark)!r}).touch()"
    popen = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    code = f"{popen}; import time; time.sleep(60)"
    begin = time.monotonic()
    done = run_step(python("slow", code, minutes=0.5 / 60), tmp_path, 60.0)
    assert time.monotonic() - begin < 10
    assert (done.outcome, done.why) == ("stopped", "not done in 0 s")
    time.sleep(2.0)
    assert not mark.exists()
    assert run_step(python("orphan", popen), tmp_path, 60.0).outcome == "passed"
    time.sleep(2.0)
    assert not mark.exists()


def test_a_stopped_step_may_say_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('so far')"
    assert run_step(python("slow", code, minutes=3 / 60), tmp_path, 60.0).outcome == "stopped"
    assert (tmp_path / "slow.log").read_text() == "so far\n"
    monkeypatch.setattr(first_on_gpu, "GRACE", 0.3)
    deaf = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    begin = time.monotonic()
    assert run_step(python("deaf", deaf, minutes=2 / 60), tmp_path, 60.0).outcome == "stopped"
    assert time.monotonic() - begin < 10


def test_no_step_lives_on_when_all_are_ended(tmp_path: Path) -> None:
    """As by a limit on the whole: the step is in a session of its own, which the signal doesn't reach."""
    mark, begun = tmp_path / "mark", tmp_path / "begun"
    touch = "__import__('pathlib').Path({!r}).touch()"
    slow = f"import time; {touch.format(str(begun))}; time.sleep(3); {touch.format(str(mark))}"
    code = (
        "import sys\nfrom benchmarks import command, first_on_gpu as f\n"
        f"f.gpu = lambda: 'GPU'\nf.chosen = lambda *_: [f.Step('slow', '', (sys.executable, '-c', {slow!r}), 1.0)]\n"
        f"sys.exit(command.run(f.main, ['--out', {str(tmp_path)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 130
    time.sleep(3.5)
    assert begun.exists()
    assert not mark.exists()


def test_no_two_steps_write_the_same_file() -> None:
    """`kernels` and `loop` call their files after the machine and the commit."""
    folders = [step.words[step.words.index("--out") + 1] for step in STEPS if step.name in ("kernels", "loop")]
    assert len(folders) == len(set(folders)) == 2


def test_no_step_begins_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run([python("a", "")], tmp_path, first_on_gpu.LEAST - 0.01)
    assert done == [Done("a", "not run", why="no time left")]
    assert not (tmp_path / "a.log").exists()
    monkeypatch.setattr(first_on_gpu, "LEAST", 0.0)
    begin = time.monotonic()
    last = run([python("slow", "import time; time.sleep(60)")], tmp_path, 0.5)[0]
    assert time.monotonic() - begin < 20
    assert last.outcome == "stopped"  # the time of all, where that is shorter than its own


def test_the_page_while_steps_are_to_come(tmp_path: Path) -> None:
    steps = [python("a", ""), python("b", "")]
    (tmp_path / "a.log").write_text("\n".join(f"line {i}" for i in range(100)))
    page = summary(steps, [Done("a", "passed", 1.6, 0)], tmp_path)
    assert "| a | does a | passed | 2 |  |" in page
    assert "| b | does b | to come | | |" in page
    assert "    line 99" in page
    assert page.count("    line") == first_on_gpu.TAIL
    assert "Files: none." in page


def test_names() -> None:
    assert [s.name for s in chosen("gaps, tests", None)] == ["tests", "gaps"]
    assert [s.name for s in chosen(None, "gaps")] == [s.name for s in STEPS if s.name != "gaps"]
    for only, skip in (("gap", None), (None, "gap")):
        with pytest.raises(InputError, match="there is no step 'gap'; allowed: tests, roofs"):
            chosen(only, skip)


def test_the_steps_are_commands_that_are_there() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for step in STEPS:
        words = [word for word in step.words if word.startswith("benchmarks")]
        for word in words:
            path = ROOT / (word if word.endswith(".py") else word.replace(".", "/") + ".py")
            assert path.exists() or step.needs == word
        assert all((ROOT / word).exists() for word in step.words if word.startswith("tests"))
    assert sum(step.minutes for step in STEPS[:3]) < 25


def test_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(first_on_gpu.main, ["--list", "--skip", "cold"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == len(STEPS) - 1
    assert "8.5 min at most  a reverse step" in said


@pytest.mark.parametrize("words", [["--out", "x"], []])
def test_without_a_gpu_one_line(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(first_on_gpu, "gpu", lambda: None)
    assert command.run(first_on_gpu.main, words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: torch finds no NVIDIA GPU")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_the_command_with_fake_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(first_on_gpu, "gpu", lambda: "Some GPU")
    assert command.run(first_on_gpu.main, []) == 2  # no folder
    monkeypatch.setattr(first_on_gpu, "chosen", lambda *_: [python("a", "")])
    assert command.run(first_on_gpu.main, ["--out", str(tmp_path)]) == 0
    assert "Some GPU" in capsys.readouterr().out
    monkeypatch.setattr(first_on_gpu, "chosen", lambda *_: [python("a", "1 / 0")])
    with pytest.raises(SystemExit, match="1"):
        command.run(first_on_gpu.main, ["--out", str(tmp_path)])


# --- the facts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spoil, wrong",
    [
        (lambda v, calls: v, None),
        (lambda v, calls: v + calls, "same again"),
        (lambda v, calls: v * len(v), "same in another batch"),
        (lambda v, calls: v + torch.arange(len(v))[:, None, None, None] // 2, "same in another slot"),
    ],
)
def test_what_depends_on_slot_or_batch(spoil: Callable[[Tensor, int], Tensor], wrong: str | None) -> None:
    shape = ConvShape("float32", 4, 4, 8, 8, 8, row=True, s0=8, residual=True)
    small, large = (Problem(shape, batch, CPU, sets=1) for batch in (2, 4))
    calls = 0

    def how(problem: Problem) -> list[Tensor]:
        nonlocal calls
        calls += problem.batch == 2  # of the two calls of the same
        return [spoil(problem.cudnn()[0], calls if wrong == "same again" else 0)]

    torch.backends.mkldnn.enabled = False
    try:
        found = gpu_facts.looks(how, small, large)
    finally:
        torch.backends.mkldnn.enabled = True
    if wrong is None:
        assert set(found.values()) == {True}
    else:
        assert not found[wrong]


def test_slots_are_kept_by_the_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[str] = []

    def looks(how: Any, problem: Problem, larger: Problem) -> dict[str, bool]:
        if len(kept) == 1:
            raise RuntimeError("no kernel\nat all")
        return {"same again": problem.batch * 2 == larger.batch}

    monkeypatch.setattr(gpu_facts, "looks", looks)
    before = torch.backends.cudnn.benchmark
    found = gpu_facts.slots(CPU, lambda made: kept.append(json.dumps(made)))
    assert len(kept) == len(found["shapes"]) == 3
    assert [len(json.loads(text)["shapes"]) for text in kept] == [1, 2, 3]
    assert list(found["shapes"].values())[1] == {
        f"cudnn, benchmark {on}": "RuntimeError: no kernel" for on in (False, True)
    }
    assert torch.backends.cudnn.benchmark is before


def test_facts_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    assert command.run(gpu_facts.main, ["normal"]) == 0
    path = next(tmp_path.glob("normal-*.json"))
    found = json.loads(path.read_text())["found"]
    assert found["numbers"] == 8192
    assert 0 < found["mean"] < found["greatest"] < 4e-6
    assert f"wrote {path}" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert command.run(gpu_facts.main, ["gaps"]) == 2
        assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_normal_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_facts.normal

    def wrong(seeds: Tensor, shape: Any, *, stream: int) -> Tensor:
        made = right(seeds, shape, stream=stream)
        made[0, 7] += 1e-3 if int(seeds) else 0.0  # of the second sample
        return made

    monkeypatch.setattr(gpu_facts, "normal", wrong)
    found = gpu_facts.normals(CPU)
    assert found["greatest"] == pytest.approx(1e-3, rel=1e-2)
    assert found["seed, element"] == (1, 7)


def test_the_rate_of_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "race", lambda calls, device, n: ({"product": 1e-3}, {}))
    assert gpu_facts.matmul_rate(CPU) == pytest.approx(2 * 256**3 * 1e3)
    monkeypatch.setattr(gpu_facts, "race", lambda calls, device, n: ({}, {"product": "no"}))
    with pytest.raises(InputError, match="can't be timed: no"):
        gpu_facts.matmul_rate(CPU)


def test_copies_are_counted_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_facts, "race", lambda calls, device, n: (dict.fromkeys(calls, 1e-3), {}))
    found = gpu_facts.roofs(CPU)
    assert found["copy_gb_per_s_by_bytes"] == pytest.approx({str(2 << 20): 2.097152, str(8 << 20): 8.388608})
    assert list(found["matmul_tflops"]) == ["bfloat16", "float16", "float32"]


def test_a_record_is_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    record = unet_results.header("cold start") | {"commit": "a" * 40, "dirty": True}
    path = unet_results.write(record)
    assert path == tmp_path / "cold-start-aaaaaaa-dirty.json"
    assert json.loads(path.read_text()) == record
    with pytest.raises(InputError, match="NaN or infinite"):
        unet_results.write(record | {"found": float("nan")})
    assert json.loads(path.read_text()) == record
    monkeypatch.delenv("OUT")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    assert unet_results.folder() == unet_results.results.FOLDER / "some-gpu"


def test_a_cold_start(tmp_path: Path) -> None:
    found = cold_start.timed("ours", 1, 120.0, ("--small",))
    assert 0 < found["import_s"] < found["seconds"] < 120
    assert cold_start.timed("ours", 1, 0.1)["failed"] == "not done in 0 s"
    assert "invalid choice" in cold_start.timed("theirs", 1, 60.0)["failed"]


def test_a_cold_start_has_caches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def fake(words: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> Any:
        seen.append(env)
        assert all(not os.path.exists(env[cache]) for cache in cold_start.CACHES if env[cache] != "/warm")
        stdout.write('noise\n{"import_s": 1.0}\nmore noise\n')
        return type("Done", (), dict(returncode=0))

    monkeypatch.setattr(cold_start.subprocess, "run", fake)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/warm")
    assert cold_start.timed("ours", 1, 60.0)["import_s"] == 1.0
    cold_start.timed("ours", 1, 60.0)
    assert len({env["TRITON_CACHE_DIR"] for env in seen} | {"/warm"}) == 3
    monkeypatch.setattr(cold_start, "CACHES", ("TRITON_CACHE_DIR",))
    cold_start.run("ours", 1, 60.0)
    assert seen[-1]["TRITON_CACHE_DIR"] == "/warm"

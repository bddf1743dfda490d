"""The benchmark harness: wrong contenders have no speed, turns rotate, files are strict, figures are what they say."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm_kernels import LoopStep
from torch import Tensor
from torch.autograd import DeviceType

from benchmarks import command, counts, report, results, step_cases, suite
from benchmarks import run as run_module
from benchmarks.cases import Case, Contender, compile_modes, no_compiler, roof, shapes
from benchmarks.gate import Gate, bytes_equal, parts, passes
from benchmarks.guided_cases import Guided
from benchmarks.measure import Interleaved, Times
from benchmarks.step_cases import Noise, Steps
from benchmarks.timers import DeviceTimer, Loop, enqueue_timer
from benchmarks.training_cases import Training, with_gradient
from fastddpm import Sampler, sampler, solvers
from fastddpm.errors import InputError
from fastddpm.schedule import NoiseSchedule

CPU = torch.device("cpu")
SHAPE = (2, 3, 8, 8)
QUICK = suite.Plan(CPU, rounds=2, sample_seconds=1e-5, no_compile="not in this test")


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_every_contender_of_every_case_passes() -> None:
    for name in suite.CASES:
        for who, c in suite.make(name, QUICK).contenders.items():
            assert passes(c.check, SHAPE).reasons == [], (name, who)


def spoilt(case: Case, who: str, call: Any) -> Case:
    """The case with one contender's work replaced; its gate compares the replacement."""
    steps = Steps("ddpm", 1000, 499, CPU)
    role = case.contenders[who].role
    contender = steps.contender(call, role, "contract" if role == "ours" else "replayed")
    return replace(case, contenders=case.contenders | {who: contender})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x, m: (x + 1e-4, m),  # a wrong coefficient
        lambda x, m: (x, m * 1.01),  # a wrong next input
        lambda x, m: (x.index_fill(0, torch.tensor(1), math.nan), m),
        lambda x, m: (x[:1], m[:1]),
    ],
    ids=["state", "input", "nan", "shape"],
)
def test_a_wrong_contender_has_no_speed(spoil: Any) -> None:
    steps = Steps("ddpm", 1000, 499, CPU)
    case = spoilt(suite.make("ddpm_step", QUICK), "fastddpm reference", lambda g: spoil(*steps.fused(noise=True)(g)))
    made = suite.measure(case, SHAPE, QUICK)["contenders"]
    assert set(made["fastddpm reference"]) == {"role", "gate"}
    assert not made["fastddpm reference"]["gate"]["passed"]
    assert made["diffusers"]["x_eager"] > 0


def test_nothing_is_relative_to_a_wrong_baseline() -> None:
    steps = Steps("ddpm", 1000, 499, CPU)
    case = spoilt(suite.make("ddpm_step", QUICK), "eager", lambda g: tuple(2 * v for v in steps.eager(g)))
    made = suite.measure(case, SHAPE, QUICK)["contenders"]
    assert made["fastddpm reference"]["x_eager"] is None
    best = made["diffusers"]["us"]["median"]  # the only baseline left
    assert made["fastddpm reference"]["x_best"] == pytest.approx(best / made["fastddpm reference"]["us"]["median"])
    alone = replace(case, contenders={n: c for n, c in case.contenders.items() if n != "diffusers"})
    assert suite.measure(alone, SHAPE, QUICK)["contenders"]["fastddpm reference"]["x_best"] is None


def own_noise(scale: float, seeded: bool) -> Gate:
    """The gate of a step that draws its noise itself, as a compiled one does."""
    steps = Steps("ddpm", 1000, 499, CPU)

    def call(given: Any) -> Any:
        if seeded:
            torch.manual_seed(0)
        z = None if given.cursor[0] == steps.silent else torch.randn_like(given.x) * scale
        x = steps.update(given.x, given.m.float(), z)
        return x, x.to(torch.bfloat16)

    contender = steps.contender(call, "compile", "own")
    return passes(contender.check, (4, 3, 32, 32))


def test_noise_of_a_contenders_own_is_tested() -> None:
    assert own_noise(1.0, seeded=False).passed
    assert "variance" in own_noise(1.1, seeded=False).reasons[0]
    assert "correlate" in own_noise(1.0, seeded=True).reasons[0]  # every call the same: a seed frozen in a graph


@pytest.mark.parametrize(
    "spoil",
    [
        lambda given: replace(given, guidance=given.guidance - 0.1),
        lambda given: replace(given, m=given.m.roll(2, dims=0)),  # the halves for each other
        lambda given: replace(given, m=torch.cat([given.m[2:], given.m[2:]])),  # no guidance
    ],
    ids=["weight", "order", "unguided"],
)
def test_a_wrong_guidance_has_no_speed(spoil: Any) -> None:
    steps = Guided("ddim", 50, 25, CPU)
    fused = steps.fused(noise=False)
    assert passes(steps.contender(fused, "ours").check, SHAPE).passed
    assert passes(steps.contender(lambda g: fused(spoil(g)), "ours").check, SHAPE).reasons[0].startswith("x' is off")


@pytest.mark.parametrize("spoil", [lambda m: m[:2], lambda m: torch.cat([m[:2], m[:2] * 1.01])], ids=["once", "second"])
def test_a_guided_step_writes_the_next_input_twice(spoil: Any) -> None:
    steps = Guided("ddim", 50, 25, CPU)

    def call(given: Any) -> Any:
        x, model_input = steps.fused(noise=False)(given)
        return x, spoil(model_input)

    (reason,) = passes(steps.contender(call, "ours").check, SHAPE).reasons
    assert reason.startswith("the next model input")


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda x, loss, grad: (x + 1e-4, loss, grad), "x_t"),
        (lambda x, loss, grad: (x, loss * 1.001, grad), "the loss"),
        (lambda x, loss, grad: (x, loss, grad * 1.001), "the gradient"),
        (lambda x, loss, grad: (x, loss, grad * grad.numel()), "the gradient"),  # of the sum, not of the mean
    ],
    ids=["state", "loss", "gradient", "sum"],
)
def test_a_wrong_training_loss_has_no_speed(spoil: Any, says: str) -> None:
    work = Training(CPU)
    made: list[tuple[Any, Noise]] = [(work.redrawn, "contract"), (work.stored(work.eager), "replayed")]
    for call, noise in [*made, (work.stored(work.eager), "own")]:
        contender = work.training(lambda g, call=call: spoil(*call(g)), "ours", noise)
        reason = passes(contender.check, SHAPE).reasons[0]
        # where the noise is solved for from the gradient, x_t shows that one's error
        assert reason.startswith("x_t" if (noise, says) == ("own", "the gradient") else says)


def test_the_losss_noise_is_that_of_the_noising() -> None:
    work = Training(CPU)

    def check(noising: Any, noise: Noise = "own") -> list[str]:
        return passes(work.training(work.stored(noising), "compile", noise).check, (4, 3, 32, 32)).reasons

    def seeded(given: Any) -> Any:
        torch.manual_seed(0)
        return work.eager(given)

    def scaled(given: Any) -> Any:
        noise = torch.randn_like(given.x0) * 1.1
        a, b = work.table[given.t].T[..., None, None, None]
        return a * given.x0 + b * noise, noise

    assert check(work.eager) == []
    assert "correlate" in check(seeded)[0]
    assert "variance" in check(scaled)[0]
    assert "x_t" in check(lambda given: (work.eager(given)[0], torch.randn_like(given.x0)))[0]  # two draws


def test_a_gradient_adds_to_nothing() -> None:
    m = torch.ones(3, requires_grad=True)
    with torch.no_grad():  # as everything is measured
        made = [with_gradient(lambda: m.square().sum(), m)[1] for _ in range(2)]
    assert all(torch.equal(g, torch.full((3,), 2.0)) for g in made)
    assert m.grad is None


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_step_measured_is_the_samplers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, bool]] = []

    class Told(LoopStep):
        def __init__(self, *given: Tensor, **words: Any) -> None:
            super().__init__(*given, **words)
            told.append(words)

    monkeypatch.setattr(step_cases, "reverse_step_", lambda *_, **words: told.append(words))
    monkeypatch.setattr(sampler, "LoopStep", Told)
    steps = Steps(name, 50, 25, CPU)
    steps.fused(noise=steps.noisy)(steps.inputs(SHAPE, 0))
    table = solvers.make(name, NoiseSchedule.linear(), 50, clip=1.0)
    next(Sampler(lambda x, t: x, table, dtype=torch.bfloat16).trace(SHAPE, seeds=0))
    flags = ("limited", "dynamic", "noise", "learned", "direct", "scaled")
    assert [told[0][f] for f in flags] == [told[1][f] for f in flags]
    assert told[0]["direct"] == (name == "ddim")


def test_gate_sees_what_is_not_normal() -> None:
    torch.manual_seed(0)
    uniform = (torch.rand(100_000) - 0.5) * math.sqrt(12)  # mean 0, variance 1
    gate = Gate()
    gate.standard_normal("noise", uniform)
    assert len(gate.reasons) == 1
    assert "fourth moment is 1.79" in gate.reasons[0]
    gate = Gate()
    gate.standard_normal("noise", torch.full((100,), math.nan))
    assert len(gate.reasons) == 3


def test_gate_bytes_and_exceptions() -> None:
    gate = Gate()
    bytes_equal(gate, torch.zeros(3), torch.ones(3))
    assert not gate.passed

    def raising(gate: Gate, shape: Any) -> None:
        raise RuntimeError("no nvcc\nmore")

    gate = passes(raising, SHAPE)
    assert gate.raised
    assert gate.reasons == ["RuntimeError: no nvcc"]


def test_a_compiler_that_fails_is_left_out() -> None:
    case = suite.make("normal", QUICK)

    def raises(gate: Gate, shape: Any) -> None:
        raise RuntimeError("no compiler")

    case = replace(case, contenders=case.contenders | {"torch.compile": Contender(lambda _: None, "compile", raises)})
    record = suite.measure(case, SHAPE, QUICK)
    assert record["left_out"] == {"torch.compile": "RuntimeError: no compiler"}
    assert "torch.compile" not in record["contenders"]


def test_parts_cover_the_batch() -> None:
    assert [s.stop - s.start for s in parts((5, 1 << 21))] == [2, 2, 2]
    assert list(parts((3, 1 << 23))) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert [*range(7)] == [i for s in parts((7, 1 << 20)) for i in range(7)[s]]


# --- timing -----------------------------------------------------------------------------------------------------------


def test_turns_rotate() -> None:
    seen: list[str] = []
    interleaved = Interleaved({name: lambda name=name: seen.append(name) for name in "abc"})
    for _ in range(4):
        interleaved()
    assert "".join(seen) == "abc" + "bca" + "cab" + "abc"
    assert all(len(times.wall) == len(times.cpu) == 4 for times in interleaved.times.values())


def test_a_loop_takes_other_inputs_each_time() -> None:
    seen: list[int] = []
    loop = Loop(seen.append, [1, 2, 3], calls=2)
    loop()
    loop()
    assert seen == [1, 2, 3, 1]


def test_the_clock_measures() -> None:
    interleaved = Interleaved({"slow": lambda: time.sleep(0.05), "fast": lambda: None})
    interleaved()
    assert interleaved.times["slow"].median >= 0.05 > interleaved.times["fast"].median


def test_deciles() -> None:
    times = Times([float(i) for i in range(11)])
    assert (times.decile(1), times.median, times.decile(9)) == (1.0, 5.0, 9.0)
    assert Times([2.0]).decile(9) == 2.0


class FakeEvent:
    """A CUDA event over a log of what happened."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, end: FakeEvent) -> float:
        return 3.0  # milliseconds


def test_device_timer_flushes_before_and_waits_behind() -> None:
    log: list[str] = []
    flush = SimpleNamespace(fill_=lambda value: log.append("flush"))
    times = Times()
    DeviceTimer(flush, lambda: FakeEvent(log))(lambda: log.append("call"), times)  # type: ignore[arg-type]
    assert log == ["flush", "record", "call", "record", "synchronize"]
    assert times.wall == [3e-3]
    log.clear()
    DeviceTimer(None, lambda: FakeEvent(log))(lambda: log.append("call"), times)
    assert log == ["record", "call", "record", "synchronize"]


def test_enqueuing_is_timed_on_an_idle_device() -> None:
    log: list[str] = []
    times = Times()
    enqueue_timer(lambda: (log.append("wait"), time.sleep(0.05)))(lambda: log.append("call"), times)  # type: ignore[arg-type, return-value]
    assert log == ["wait", "call", "wait"]
    assert times.median < 0.05


# --- counts and figures -----------------------------------------------------------------------------------------------


def test_ops_and_reads() -> None:
    x = torch.ones(3)
    assert counts.ops_and_reads(lambda: x * 2 + 1, CPU) == (2, 0)
    assert counts.ops_and_reads(lambda: (x[0].item(), x.nonzero()), CPU) == (3, 2)
    assert counts.ops_and_reads(lambda: torch.arange(3), torch.device("meta")) == (1, 0)


def test_kernels_are_counted_without_named_ranges() -> None:
    events = [
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=False),
        SimpleNamespace(device_type=DeviceType.CUDA, is_user_annotation=True),
        SimpleNamespace(device_type=DeviceType.CUDA),
        SimpleNamespace(device_type=DeviceType.CPU, is_user_annotation=False),
    ]
    assert counts.on_device(events) == 2


def test_speedups() -> None:
    medians = {"eager": 8.0, "peer": 2.0, "us": 1.0, "half": 0.5, "copy": 0.25}
    roles = {"eager": "eager", "peer": "peer", "us": "ours", "half": "variant", "copy": "roof"}
    assert suite.speedups("us", medians, roles) == {"x_best": 2.0, "x_eager": 8.0}
    assert suite.speedups("eager", medians, roles) == {"x_best": 0.25, "x_eager": 1.0}
    for name in ("half", "copy"):
        assert suite.speedups(name, medians, roles) == {"x_best": None, "x_eager": None}


def test_bandwidth_is_the_least_traffic_over_the_time() -> None:
    made = suite.measure(suite.make("ddim_step", QUICK), SHAPE, QUICK)
    ours = made["contenders"]["fastddpm reference"]
    elements = math.prod(SHAPE)
    assert ours["gb_per_s"] == pytest.approx(elements * 12 / (ours["us"]["median"] * 1e-6) / 1e9)
    assert ours["ns_per_element"] == pytest.approx(ours["us"]["median"] * 1e3 / elements)
    assert ours["of_copy"] == pytest.approx(made["contenders"]["copy"]["us"]["median"] / ours["us"]["median"])
    assert ours["host_us"] == ours["us"]["median"]


def test_the_copy_moves_the_cases_bytes() -> None:
    for name in suite.CASES:
        case = suite.make(name, QUICK)
        source, target = case.inputs(SHAPE, 0).scratch
        assert source.nbytes + target.nbytes == math.prod(SHAPE) * case.bytes_per_element
        assert passes(roof(case.inputs).check, SHAPE).passed


def test_the_way_of_a_gpu_on_a_fake_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Any) -> float:
            return (end.at - self.at) * 1e3

    flushes: list[int] = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(suite, "l2_flush", lambda device: SimpleNamespace(fill_=flushes.append))
    monkeypatch.setattr(counts, "launches", lambda call: 7)
    record = suite.measure(suite.make("ddim_step", QUICK), SHAPE, replace(QUICK, device=torch.device("cuda")))
    names = list(record["contenders"])
    assert len(flushes) == QUICK.rounds * len(names)  # before each single call, and not among many
    for c in record["contenders"].values():
        assert (c["launches"], c["calls_a_timing"]) == (7, 1)
        assert 0 < c["host_us"] < 1e4
        assert 0 < c["burst_us"] < 1e4  # of one call, not of all


def test_a_run_that_is_stopped_leaves_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, seen = suite.measure, []

    def stopped(*given: Any) -> Any:
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(suite, "measure", stopped)
    words = ["--short", "--device", "cpu", "--cases", "normal", "--out", str(tmp_path)]
    assert command.run(run_module.main, words) == 130
    (path,) = tmp_path.iterdir()
    assert len(results.read(path)["cases"]) == 1


def test_sizes_reach_a_gigabyte_on_a_gpu() -> None:
    traffic = [12 * math.prod(s) for s in shapes(torch.device("cuda"), short=False)]
    assert min(traffic) < 1e5
    assert 1e9 < max(traffic) < 1.2e9
    assert set(compile_modes(torch.device("cuda")).values()) == {"max-autotune", "max-autotune-no-cudagraphs"}


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert no_compiler() == "there is no C++ compiler (no-such-compiler)"


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_short_form_runs_and_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert command.run(run_module.main, ["--short", "--device", "cpu", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    path = next(tmp_path.glob("cpu-*-short.json"))
    run = results.read(path)
    assert {r["case"] for r in run["cases"]} == set(suite.CASES)
    assert all(c["gate"]["passed"] for r in run["cases"] for c in r["contenders"].values())
    assert run["machine"]["threads"] == 1
    assert run["left_out"] == {"torch.compile": "the short form compiles nothing"}
    assert results.write(tmp_path / "again", run).read_bytes() == path.read_bytes()

    pytest.importorskip("matplotlib")
    assert command.run(report.main, [str(path), "--out", str(tmp_path / "drawn")]) == 0
    page, *pictures = (tmp_path / "drawn" / f"{path.stem}{end}" for end in (".md", "-bandwidth.png", "-host.png"))
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.name in page.read_text() for p in pictures)
    assert "It is no Triton kernel" in page.read_text()
    assert "DDPM step" in capsys.readouterr().out


def small_run(**changed: Any) -> dict[str, Any]:
    """A run on a GPU that there never was, whose eager failed."""

    def timed(role: str, us: float, **more: Any) -> dict[str, Any]:
        gate = {"passed": True, "error": 1e-7, "tolerance": 1e-5, "reasons": []}
        figures = dict(ns_per_element=us, gb_per_s=12 / us, of_copy=1 / us, x_best=None, x_eager=None)
        counted = dict(launches=1, ops=2, reads=0, burst_us=us, host_us=us)
        return dict(role=role, gate=gate, us=dict(median=us, p10=us, p90=us)) | figures | counted | more

    wrong = {"passed": False, "error": None, "tolerance": 1e-5, "reasons": ["x' is off by inf"]}
    contenders = {
        "eager": {"role": "eager", "gate": wrong},
        "fastddpm fused": timed("ours", 2.0, x_best=1.5),
        "copy": timed("roof", 1.0),
    }
    cases = [
        dict(case="c", title="A step", shape=[b, 1], elements=b, bytes_per_element=12, traffic="x read")
        | dict(contenders=contenders)
        for b in (4, 1000)
    ]
    machine = dict(cpu="X", cores=1, threads=1, gpu="GPU (Y)", driver="1.2", versions={"torch": "9"})
    machine |= dict(load_average=0.1, load_average_after=0.2)
    run = dict(
        format=results.FORMAT,
        kind="kernels",
        date="2026-01-02T03:04:05+00:00",
        commit="a" * 40,
        dirty=True,
        short=False,
    )
    return run | dict(device="cuda", machine=machine, rounds=7, left_out={}, cases=cases) | changed


def test_names_and_strictness(tmp_path: Path) -> None:
    run = small_run()
    path = results.write(tmp_path, run)
    assert path.name == "cuda-gpu-y-aaaaaaa-dirty.json"
    assert results.read(path) == run
    assert results.file_name(small_run(commit=None, dirty=False)) == "cuda-gpu-y-no-commit.json"
    with pytest.raises(InputError, match="NaN or infinite"):
        results.write(tmp_path, small_run(rounds=math.nan, commit="b"))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # nothing else, not even a part
    path.write_text(json.dumps(run | {"rounds": math.nan}))
    with pytest.raises(InputError, match="NaN is no JSON"):
        results.read(path)
    path.write_text(json.dumps(run | {"format": 1}))
    with pytest.raises(InputError, match="is no run of"):
        results.read(path)


def test_a_page_shows_no_figure_of_who_failed() -> None:
    page = report.markdown(small_run(), "stem")
    failed = [line for line in page.splitlines() if line.startswith("| eager")]
    assert failed[0] == "| eager | failed: x' is off by inf |" + " - |" * 10
    assert failed[1:] == ["| eager | failed | failed |"] * 2
    fused = next(line for line in page.splitlines() if line.startswith("| fastddpm fused"))
    assert [cell.strip() for cell in fused.split("|")][1:-1] == [
        *("fastddpm fused", "2", "2 ... 2", "2", "6", "50 %", "1", "0", "2", "1.50", "-", "1.0e-07")
    ]
    assert "12 bytes an element: x read. At 1000x1:" in page
    assert "GPU (Y), driver 1.2; torch 9; commit aaaaaaa with changes, 2026-01-02" in page


def test_plots_of_a_gpu_run_with_a_failure() -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    assert len(plots.bandwidth(small_run())) > 10_000
    assert len(plots.host(small_run())) > 10_000
    assert set(plots.styles(small_run()["cases"][0])) == {"fastddpm fused", "copy"}


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_of_a_checkout(tmp_path: Path) -> None:
    root = tmp_path.resolve()
    assert results.commit(root) == (None, False)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run([*git, *words], check=True)
    made, dirty = results.commit(root)
    assert len(made or "") == 40
    assert not dirty
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "benchmarks" / "results" / "run.json").touch()
    assert results.commit(root) == (made, False)
    (root / "kernel.py").touch()
    assert results.commit(root) == (made, True)


@pytest.mark.parametrize(
    "main, words, says",
    [
        (run_module.main, ["--cases", "ddpm_stop"], "there is no case 'ddpm_stop'; allowed: ddpm_step"),
        (run_module.main, ["--device", "tpu"], "device is 'tpu'; allowed"),
        (run_module.main, ["--device", "mps"], "device is 'mps'; allowed"),
        (run_module.main, ["--device", "cuda:99"], "torch finds"),
        (run_module.main, ["--threads", "0"], "--threads"),
        (run_module.main, ["--thread", "x"], "--thread"),
        (report.main, ["no-such.json"], "no-such.json can't be read as a run"),
    ],
)
def test_errors_are_one_line(main: Any, words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(main, words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert says in said.err
    assert said.err.count("\n") == 1

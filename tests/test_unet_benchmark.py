"""The UNet's benchmark: all contenders do DDPM's step, wrong ones have no speed, C2 is the best of its flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from benchmarks import race as race_module
from benchmarks import test_unet, unet_contenders, unet_race
from benchmarks.measure import table
from benchmarks.unet_contenders import FLAGS, Documented, Eager, Ours, Setting, Whole
from benchmarks.unet_networks import CIFAR, SMALL
from benchmarks.unet_race import UNetRace, flops_of, rows, setting_of

CPU = torch.device("cpu")


def uncompiled(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
    return function


@pytest.fixture(scope="module")
def setting() -> Setting:
    return setting_of(SMALL, 2, CPU, steps=5)


def test_steps_of_a_run_and_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [setting_of(SMALL, batch, torch.device("meta")).steps for batch in (1, 64, 65, 256, 257)] == [
        50,
        50,
        20,
        20,
        10,
    ]
    assert flops_of(CIFAR) == pytest.approx(12.444e9, rel=1e-3)


@torch.no_grad()
def test_all_contenders_run_and_predict_the_same(setting: Setting) -> None:
    made = {
        "eager": Eager(setting, torch.bfloat16),
        "float32": Eager(setting, torch.float32),
        "C1": Documented(setting, uncompiled),
        "C2": Whole(setting, "max-autotune", uncompiled),
        "C2 trees": Whole(setting, "trees", uncompiled),
        "ours": Ours(setting),
    }
    exact = setting.exact()
    for name, contender in made.items():
        contender.prepare()
        error = unet_race.rms(contender.predict().double() - exact) / unet_race.rms(exact)
        assert error < (1e-5 if name == "float32" else 3e-2), name
        first = contender.run().float().clone()
        assert first.shape == setting.x.shape
        assert first.isfinite().all()
        assert first.std() > 0.1
        if name != "ours":  # whose noise is that of its seeds
            assert not torch.equal(first, contender.run().float())


@torch.no_grad()
@pytest.mark.parametrize("flags", ["max-autotune", "trees"])
def test_the_whole_step_is_the_schedulers(setting: Setting, flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Whole(setting, flags, uncompiled)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.full(shape, 0.5))
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(setting.steps)
    whole.x.copy_(setting.x)
    whole.cursor.zero_()
    x = setting.x
    for t in scheduler.timesteps:
        m = whole.model(x.bfloat16().contiguous(memory_format=torch.channels_last), t[None]).sample.float()
        x = scheduler.step(m, t, x).prev_sample
        whole._advance()
        assert (whole.x - x).abs().max() < 1e-4
    assert int(whole.cursor) == setting.steps
    assert (whole.x - setting.x).abs().max() > 0.5


def test_graphs_of_ten_steps_and_of_one(setting: Setting) -> None:
    whole = Whole(replace(setting, steps=23), "max-autotune", uncompiled)
    seen: list[int] = []
    whole.replays = {n: lambda n=n: seen.append(n) for n in whole.lengths}  # type: ignore[misc]
    whole.run()
    assert seen == [10, 10, 1, 1, 1]
    assert Whole(replace(setting, steps=5), "max-autotune", uncompiled).lengths == [1]


def test_flags_are_inductors() -> None:
    known = set(torch._inductor.list_options())
    for name, options in FLAGS.items():
        assert set(options) <= known, name


# --- the race ---------------------------------------------------------------------------------------------------------


@cache
def exact_of(setting: Setting) -> Tensor:
    return setting.exact()


class Fake:
    """A contender that answers so far off, and takes so long."""

    def __init__(self, setting: Setting, off: float = 0.0, seconds: float = 0.0, result: float = 0.0) -> None:
        self.setting, self.off, self.seconds, self.result = setting, off, seconds, result

    def prepare(self) -> None:
        pass

    def predict(self) -> Tensor:
        return (exact_of(self.setting) * (1 + self.off)).float()

    def run(self) -> Tensor:
        unet_race.time.sleep(self.seconds)
        return torch.full_like(self.setting.x, self.result)


def broken() -> Any:
    raise RuntimeError("no kernel\nat all")


def test_who_fails_has_no_speed(setting: Setting) -> None:
    makers = {
        "E bfloat16": lambda: Fake(setting, 0.01),
        "close": lambda: Fake(setting, 0.019),
        "off": lambda: Fake(setting, 0.021),
        "nan": lambda: Fake(setting, result=float("nan")),
        "lost": lambda: Fake(setting, float("nan")),
        "broken": broken,
    }
    race = UNetRace(setting, makers)
    race.make()
    record = race.record(10**9, 1e12, rounds=2)
    timed = {name for name, c in record["contenders"].items() if "ms_step" in c}
    assert timed == {"E bfloat16", "close"}
    assert record["contenders"]["broken"] == {"failed": "RuntimeError: no kernel"}
    for name, says in (("off", "off by 2.10e-02"), ("nan", "not finite"), ("lost", "off by nan")):
        assert says in record["contenders"][name]["failed"]
    json.dumps(record, allow_nan=False)
    shown = rows(record)
    assert shown["broken"]["error"] == "FAILED: RuntimeError: no kernel"
    assert shown["off"]["ms a step"] == "-"
    assert "E bfloat16" in table("title", shown)


def test_figures_are_what_they_say(setting: Setting) -> None:
    race = UNetRace(setting, {"E bfloat16": lambda: Fake(setting, seconds=0.05), "ours": lambda: Fake(setting)})
    race.make()
    record = race.record(10**9, 4e12, rounds=7)
    c = record["contenders"]["E bfloat16"]
    step = c["ms_step"]["median"] * 1e-3
    assert 0.05 <= step * setting.steps < 0.1
    assert c["images_per_s_1000_steps"] == pytest.approx(2 / (1000 * step))
    assert c["images_per_s_50_steps"] == pytest.approx(2 / (50 * step))
    assert c["tflops"] == pytest.approx(2e9 / step * 1e-12)
    assert c["of_matmul"] == pytest.approx(2e9 / step / 4e12)
    assert c["peak_mb"] is c["kernels_step"] is None
    assert (record["batch"], record["steps_a_run"], record["rounds"]) == (2, 5, 7)
    assert float(rows(record)["ours"]["x best peer"]) > 1
    assert rows(record)["E bfloat16"]["x best peer"] == "1.00"


def test_the_best_flags_are_kept(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    times = {"freezing": 0.002, "conv_1x1_as_mm": 0.006}

    def maker(flags: str) -> Fake:
        tried.append(flags)
        if flags == "no epilogue fusion":
            raise RuntimeError("compiler")
        return Fake(setting, 0.5 if flags == "trees" else 0.0, times.get(flags, 0.01))

    race = UNetRace(setting, {})
    race.make_whole(60.0, "freezing", maker)
    assert tried == ["freezing", *(name for name in FLAGS if name != "freezing")]
    assert race.made["C2"]["flags"] == "freezing"
    assert race.ready["C2"].seconds == 0.002  # type: ignore[attr-defined]
    assert race.flags["no epilogue fusion"] == "RuntimeError: compiler"
    assert "off by 5.00e-01" in str(race.flags["trees"])
    assert race.flags["freezing"] == pytest.approx(0.4, rel=0.5)  # ms a step
    assert list(rows(race.record(1, None, rounds=1))) == ["C2 (freezing)"]

    tried.clear()
    race = UNetRace(setting, {})
    race.make_whole(-1.0, None, maker)
    assert tried == ["max-autotune"]
    assert race.flags["trees"] == "not tried"
    tried.clear()
    UNetRace(setting, {}).make_whole(60.0, None, maker, most=2)
    assert tried == ["max-autotune", "conv_1x1_as_mm"]
    race = UNetRace(setting, {})
    race.make_whole(60.0, None, lambda flags: broken())
    assert race.made["C2"]["failed"] == "RuntimeError: no kernel"
    assert set(race.flags.values()) == {"RuntimeError: no kernel"}


def test_capture_warms_up_from_the_first_row(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor stays within the table: beyond it index_select reads what is not there."""
    whole = Whole(setting, "max-autotune", uncompiled)
    seen: list[int] = []

    def graphed(call: Callable[[], None], warmups: int) -> Callable[[], None]:
        seen.append(int(whole.cursor))
        call()
        return call

    monkeypatch.setattr(unet_contenders, "graphed", graphed)
    fake = SimpleNamespace(**{name: getattr(setting, name) for name in ("net", "x", "t", "steps", "device")}, cuda=True)
    whole.setting = fake  # type: ignore[assignment]
    with torch.no_grad():
        whole.prepare()
    assert seen == [0]
    assert int(whole.cursor) == setting.steps


def test_the_figures_are_kept_before_the_compilers_begin(setting: Setting) -> None:
    order: list[str] = []

    def made(name: str, seconds: float = 0.0) -> Fake:
        order.append(name)
        return Fake(setting, 0.01, seconds)

    makers = {name: lambda name=name: made(name) for name in ("E bfloat16", "C1", "ours")}
    kept: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        order.append("kept")
        kept.append(record)

    race = UNetRace(setting, makers)
    returned = unet_race.measured(race, 1, None, keep, seconds=60.0, first="trees", most=2, maker=made)
    assert order == ["E bfloat16", "kept", "ours", "kept", "trees", "max-autotune", "kept", "C1", "kept"]
    assert [set(record["contenders"]) for record in kept] == [
        {"E bfloat16"},
        {"E bfloat16", "ours"},
        {"E bfloat16", "ours", "C2"},
        {"E bfloat16", "ours", "C1", "C2"},
    ]
    assert [record["rounds"] for record in kept] == [2, 2, 2, 7]
    assert returned is kept[3]
    order.clear()
    unet_race.measured(UNetRace(setting, makers), 1, None, keep, seconds=-1.0, maker=made)
    assert order[-4:] == ["max-autotune", "kept", "C1", "kept"]  # one of the flags is tried whatever it takes


def test_what_the_profiler_counts_comes_last(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be what ends the process."""
    kept: list[Any] = []

    def launches(call: Callable[[], object]) -> int:
        assert len(kept) == 4
        return 10

    monkeypatch.setattr(unet_race.counts, "launches", launches)
    monkeypatch.setattr(UNetRace, "_tidy", lambda race: None)
    monkeypatch.setattr(UNetRace, "_reserved", lambda race: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    race = UNetRace(setting, {"E bfloat16": lambda: Fake(setting)})
    race.setting = SimpleNamespace(batch=2, steps=5, cuda=True)  # type: ignore[assignment]
    unet_race.measured(
        race, 1, None, lambda record: kept.append(json.dumps(record)), seconds=1.0, maker=lambda _: broken()
    )
    assert len(kept) == 5
    assert json.loads(kept[-1])["contenders"]["E bfloat16"]["kernels_step"] == 2.0


def test_a_step_that_is_not_captured_is_told(setting: Setting) -> None:
    class Warning_(Fake):
        def prepare(self) -> None:
            unet_race.warnings.warn("torch is new", FutureWarning, stacklevel=1)
            unet_race.warnings.warn("no CUDA graph: the model waits; slower", stacklevel=1)

    race = UNetRace(setting, {"ours": lambda: Warning_(setting), "other": lambda: Fake(setting)})
    race.make()
    shown = rows(race.record(1, None, 1))
    assert shown["ours"]["error"].endswith("(no CUDA graph: the model waits; slower)")
    assert "warned" not in race.made["other"]


def test_ours_runs_alone_first(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"failed": "not done in 180 s"}
    makers = {name: lambda: Fake(setting) for name in ("E bfloat16", "ours", "ours, PyTorch's kernels")}
    assert test_unet.checked(makers, 2) is makers  # on a CPU
    monkeypatch.setattr(test_unet, "CUDA", True)
    monkeypatch.setattr(test_unet.cold_start, "run", lambda name, batch, limit: found)
    race = UNetRace(setting, test_unet.checked(makers, 2))
    race.make()
    assert set(race.ready) == {"E bfloat16", "ours, PyTorch's kernels"}
    assert race.made["ours"] == {"failed": "RuntimeError: in a process of its own: not done in 180 s"}
    found.clear()
    assert test_unet.checked(makers, 2) is makers


@torch.no_grad()
def test_a_frozen_network_has_no_weights_as_arguments(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo asks Inductor's config while it traces; the option alone froze nothing."""
    seen: list[bool] = []
    for flags in ("freezing", "max-autotune"):
        whole = Whole(setting, flags, uncompiled)
        monkeypatch.setattr(whole, "predict", lambda: seen.append(torch._inductor.config.freezing))
        whole.prepare()
    assert seen == [True, False]
    assert not torch._inductor.config.freezing


def test_the_documented_way_has_a_size_that_is_fixed(setting: Setting) -> None:
    given: dict[str, Any] = {}
    Documented(setting, lambda model, **options: given.update(options))
    assert given == {"mode": "max-autotune", "fullgraph": True, "dynamic": False}


@torch.no_grad()
def test_the_replayed_network_reads_its_inputs(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def graphed(call: Callable[[], None]) -> Callable[[], None]:
        call()
        return call

    monkeypatch.setattr(unet_contenders, "graphed", graphed)
    replayed = unet_contenders.Graph(setting, torch.bfloat16, torch.channels_last)
    eager = Eager(setting, torch.bfloat16, torch.channels_last)
    replayed.prepare()
    given = setting.x.bfloat16().contiguous(memory_format=torch.channels_last)
    for t in (setting.t, 3):
        assert torch.equal(replayed.call(given, torch.tensor(t)), eager.call(given, torch.tensor(t)))
    assert replayed.run().isfinite().all()


def test_a_graph_is_warmed_up_elsewhere_and_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Scope:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            log.append(self.name)

        def __exit__(self, *_: object) -> None:
            log.append(f"end of {self.name}")

    other = SimpleNamespace(wait_stream=lambda stream: log.append("other waits"))
    current = SimpleNamespace(wait_stream=lambda stream: log.append("current waits"))
    made = SimpleNamespace(replay=lambda: log.append("replay"))
    for name, value in dict(
        Stream=lambda: other,
        current_stream=lambda: current,
        stream=lambda stream: Scope("other stream"),
        synchronize=lambda: log.append("synchronize"),
        CUDAGraph=lambda: made,
        set_stream=lambda stream: log.append("set back" if stream is current else "elsewhere"),
        graph=lambda graph: Scope("capture"),
    ).items():
        monkeypatch.setattr(torch.cuda, name, value)
    replay = race_module.graphed(lambda: log.append("call"), warmups=2)
    replay()
    assert log == [
        *("other waits", "other stream", "call", "call", "end of other stream", "current waits", "synchronize"),
        *("capture", "call", "end of capture", "set back", "replay"),
    ]
    log.clear()

    def breaks() -> None:
        if "capture" in log:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        race_module.graphed(breaks, warmups=1)
    assert log[-1] == "set back"


def test_kernels_are_counted_a_step(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    race = UNetRace(setting, {"E bfloat16": lambda: Fake(setting)})
    race.make()
    monkeypatch.setattr(unet_race.counts, "launches", lambda call: 35)
    assert race.record(1, None, 1, count=True)["contenders"]["E bfloat16"]["kernels_step"] == 7.0
    monkeypatch.setattr(unet_race.counts, "launches", lambda call: broken())
    assert race.record(1, None, 1, count=True)["contenders"]["E bfloat16"]["kernels_step"] is None


@torch.no_grad()
def test_the_file_of_all_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's run does, on a CPU with a small network and no compiler."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("FLAGS", "2")
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setattr(unet_contenders, "graphed", lambda call, warmups=1: (call(), call)[1])
    monkeypatch.setattr(test_unet, "CIFAR", SMALL)
    monkeypatch.setattr(test_unet, "setting_of", lambda config, batch, device: setting_of(config, batch, CPU, steps=2))
    monkeypatch.setattr(unet_race, "ROUNDS", 1)
    steps = test_unet.Steps()
    for batch in (1, 2):
        steps.measure(batch, 60.0)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert (record["kind"], record["format"], list(record["batches"])) == ("unet", 1, ["1", "2"])
    assert record["flops_an_image"] == flops_of(SMALL)
    assert record["matmul_tflops"] > 0
    for batch, made in record["batches"].items():
        contenders = made["contenders"]
        assert set(contenders) == {"E bfloat16", "E tf32", "G bfloat16", "ours", "ours, PyTorch's kernels", "C1", "C2"}
        timed = {name for name, c in contenders.items() if "failed" not in c}
        assert timed == set(contenders), contenders
        assert made["batch"] == int(batch)
        assert [v == "not tried" for v in made["c2_flags"].values()].count(False) == 2
        for c in contenders.values():
            assert c["error"] < 0.02
            assert c["ms_step"]["median"] > 0
    assert steps.best_flags in FLAGS

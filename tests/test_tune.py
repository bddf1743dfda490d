"""The tuning of convolutions: a table is what was measured, and says nothing that changes a sample's bits by batch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastddpm_kernels import conv_choice
from fastddpm_kernels.conv_choice import ConvShape, choice
from fastddpm_kernels.conv_tiles import Tile

from benchmarks import command, tune, tuned
from benchmarks.conv_problem import Problem, flops, shapes_of
from benchmarks.race import race
from benchmarks.unet_networks import CIFAR
from fastddpm.engine.on_triton import shape_of
from fastddpm.engine.plan import Plan
from fastddpm.errors import InputError

CPU = torch.device("cpu")
SMALL = ConvShape("float32", 4, 4, 16, 0, 16)
HALF = SMALL._replace(dtype="float16")
COVERING = [
    ConvShape("float32", 4, 4, 3, 0, 16),
    ConvShape("float32", 4, 4, 16, 0, 3, residual=True),
    ConvShape("float32", 4, 4, 16, 8, 16, row=True),
    ConvShape("float32", 4, 4, 16, 0, 16, stride=2, padding=0),
    ConvShape("float32", 4, 4, 16, 0, 16, stride=2, padding=1),
    ConvShape("float32", 8, 8, 16, 0, 16, up=True),
    ConvShape("float32", 4, 4, 16, 0, 16, s0=8, s1=16),
    ConvShape("float32", 4, 4, 16, 0, 24, kernel=1, residual=True),
    ConvShape("float32", 4, 4, 16, 0, 16, norms=(4, 8)),
    ConvShape("float16", 4, 4, 16, 0, 16, row=True, norms=(4,), raw=False),
]
NONE_TIME: dict[str, str] = {}


def fake(times: Mapping[str, float], calls: Mapping[str, Any], *_: object) -> tuple[dict[str, float], dict[str, str]]:
    """A race with these microseconds; others take 100."""
    return {name: times.get(name, 100.0) * 1e-6 for name in calls}, NONE_TIME


def part(us: float = 10.0, cudnn: float = 20.0, tile: Any = None, split: Any = None) -> dict[str, Any]:
    return dict(tile=tile, split=split, us=us, rule_us=us, cudnn_us=cudnn, error=1e-3, cudnn_error=1e-3)


@pytest.fixture(autouse=True)
def _no_table_is_remembered() -> None:
    conv_choice._found.cache_clear()
    conv_choice._table.cache_clear()


# --- the work ---------------------------------------------------------------------------------------------------------


def test_a_network_is_its_distinct_convolutions() -> None:
    operations = Plan.of(CIFAR, 1, 32, 32, 2).lowered.operations
    products = [operation for operation in operations if operation.kind in ("conv", "linear")]
    shapes = shapes_of(operations, torch.bfloat16)
    assert {shape_of(operation, torch.bfloat16) for operation in products} == set(shapes)
    assert len({shape.key for shape in shapes}) == len(shapes) < len(products)
    assert sum(s.up for s in shapes) == 3
    assert {s.stride for s in shapes} == {1, 2}
    assert any(s.s1 for s in shapes)
    assert any(s.row for s in shapes)
    total = sum(flops(shape_of(operation, torch.bfloat16)) for operation in products)
    total += sum(operation.flops for operation in operations if operation.kind == "attention")
    assert total == pytest.approx(12.444e9, rel=1e-3)  # a forward's, by PyTorch's counter


def test_a_key_tells_all_shapes_apart() -> None:
    base = ConvShape("bfloat16", 8, 8, 16, 0, 16, stride=2, s0=8)
    others = dict(dtype="float16", height=4, width=4, c0=8, c1=8, cout=8, kernel=1, stride=1, padding=0, up=True)
    others |= dict(row=True, s0=16, s1=8, residual=True, norms=(4,), raw=False)
    assert set(others) == set(ConvShape._fields)
    keys = {base.key, *(base._replace(**{name: value}).key for name, value in others.items())}
    assert len(keys) == len(others) + 1


@pytest.mark.parametrize("shape", COVERING, ids=lambda shape: shape.key)
def test_both_ways_compute_the_same(shape: ConvShape) -> None:
    problem = Problem(shape, 2, CPU, sets=2, calls=3)
    exact = problem.exact()
    for at in (0, 2):  # the same inputs, and other counters
        assert problem.error(problem.own(at), exact) <= problem.bound
        assert problem.error(problem.cudnn(at), exact) <= problem.bound
    assert min(problem.error(problem.own(1), exact), problem.error(problem.cudnn(1), exact)) > 0.1  # other inputs


def test_counters_begin_as_zeros() -> None:
    """Each tile leaves others behind; a row of calls clears those of all at its beginning."""
    problem = Problem(SMALL._replace(norms=(4,)), 2, CPU, calls=2)
    problem.counters.fill_(7)
    assert problem.error(problem.own(), problem.exact()) <= problem.bound
    assert problem.counters.shape[1] > 0
    assert not problem.counters[1].any()


def test_an_error_sees_each_output_and_nan() -> None:
    problem = Problem(SMALL._replace(norms=(4,)), 2, CPU)
    exact = problem.exact()
    assert len(exact) == 2
    for i in range(2):
        spoilt = [v.clone() for v in exact]
        spoilt[i] *= 1.5
        assert problem.error(spoilt, exact) == pytest.approx(0.5)
        spoilt[i][0, 0, 0, 0] = torch.nan
        assert problem.error(spoilt, exact) == torch.inf


# --- what is tried ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [HALF, HALF._replace(height=32, width=32, c0=128, cout=128), HALF._replace(cout=3)])
def test_tiles_that_are_tried(shape: ConvShape) -> None:
    found = tune.candidates(shape, 100)
    assert next(iter(found.items())) == (tune.RULE, (None, None))
    tiles = [tile for tile, _ in found.values() if tile is not None]
    assert len(set(found.values())) == len(found) > 4
    assert len({tile.k for tile in tiles}) == 1
    for tile in tiles:
        given = [tile.m, tile.n, tile.warps, tile.stages, tile.registers]
        assert conv_choice._wrong_tile(dict(tile=given, split=None)) is None
        assert tile.m * tile.n <= 128 * 256
    assert list(tune.candidates(shape, 3)) == list(found)[:3]
    assert list(tune.candidates(shape._replace(dtype="float32"), 100)) == [tune.RULE]


def test_sums_of_small_maps_are_divided_both_ways() -> None:
    small = HALF._replace(c0=256, cout=256)
    assert {split for _, split in tune.candidates(small, 100).values()} == {None, False}
    for other in (small._replace(up=True), small._replace(height=16, width=16)):
        assert {split for _, split in tune.candidates(other, 100).values()} == {None}


def test_the_tried_tiles_have_the_rules_bits() -> None:
    problem = Problem(HALF._replace(c0=64, cout=32), 2, CPU)
    first = [v.clone() for v in problem.own()]
    found = tune.candidates(problem.shape, 5)
    assert len(found) == 5
    for tile, split in found.values():
        assert tune._refused(problem, first, tile, split) is None
    other = next(tile for tile, _ in found.values() if tile is not None)
    assert other.k == 64
    assert tune._refused(problem, first, other._replace(k=16), None) == "its bits are not those of the rule's tile"
    assert "Error" in (tune._refused(problem, first, other._replace(m=7), None) or "")


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_fastest_is_chosen() -> None:
    problem = Problem(HALF._replace(c0=64, cout=32), 2, CPU)
    names = list(tune.candidates(problem.shape, 4))
    measured, out = tune.measure(problem, 4, partial(fake, {names[2]: 7.0, tune.CUDNN: 9.0}))
    tile, split = tune.candidates(problem.shape, 4)[names[2]]
    assert tile is not None
    assert measured["tile"] == [tile.m, tile.n, tile.warps, tile.stages, tile.registers]
    assert measured["split"] is split
    assert [measured[name] for name in ("us", "rule_us", "cudnn_us")] == pytest.approx([7.0, 100.0, 9.0])
    assert 0 < measured["error"] < 1e-3
    assert out == {}
    measured, _ = tune.measure(problem, 4, partial(fake, {tune.RULE: 5.0, tune.CUDNN: 1.0}))
    assert measured["tile"] is measured["split"] is None
    assert measured["us"] == pytest.approx(5.0)  # cuDNN is never taken for a tile of ours


def test_wrong_results_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(HALF, 2, CPU)
    own, cudnn = problem.own, problem.cudnn
    monkeypatch.setattr(problem, "own", lambda *given: [1.01 * v for v in own(*given)])
    with pytest.raises(ArithmeticError, match="rule is off by 9"):
        tune.measure(problem, 2, partial(fake, {}))
    monkeypatch.setattr(problem, "own", own)
    monkeypatch.setattr(problem, "cudnn", lambda at=0: [torch.full_like(v, torch.nan) for v in cudnn(at)])
    with pytest.raises(ArithmeticError, match="cudnn is off by inf"):
        tune.measure(problem, 2, partial(fake, {}))


def test_a_tile_that_fails_or_has_other_bits_takes_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(HALF, 2, CPU)
    own, names = problem.own, list(tune.candidates(HALF, 4))
    tiles = tune.candidates(HALF, 4)

    def some(at: int = 0, tile: Tile | None = None, split: bool | None = None) -> list[torch.Tensor]:
        made = own(at)
        if (tile, split) == tiles[names[1]]:
            made[0][0, 0, 0, 0] += 1e-3
        if (tile, split) == tiles[names[2]]:
            raise RuntimeError("out of resource: shared memory\nmore")
        return made

    monkeypatch.setattr(problem, "own", some)
    measured, out = tune.measure(problem, 4, partial(fake, {names[1]: 1.0, names[2]: 1.0, names[3]: 50.0}))
    assert measured["us"] == pytest.approx(50.0)
    assert out == {
        names[1]: "its bits are not those of the rule's tile",
        names[2]: "RuntimeError: out of resource: shared memory",
    }


def test_who_cannot_be_timed_has_no_time() -> None:
    problem = Problem(HALF, 2, CPU)

    def failing(calls: Mapping[str, Any], *_: object) -> tuple[dict[str, float], dict[str, str]]:
        return {name: 1.0 for name in calls if name != tune.RULE}, {tune.RULE: "no capture"}

    with pytest.raises(ArithmeticError, match="no capture"):
        tune.measure(problem, 1, failing)


def test_a_race_takes_turns_and_outlives_failures() -> None:
    seen: list[tuple[str, int]] = []

    def bad(at: int) -> None:
        raise RuntimeError("no\nmore")

    seconds, out = race({"a": lambda at: seen.append(("a", at)), "bad": bad}, CPU, in_a_row=2, rounds=3)
    assert list(seconds) == ["a"]
    assert seconds["a"] > 0
    assert out == {"bad": "RuntimeError: no"}
    assert seen == [("a", 0), ("a", 1)] * 4  # once before the rounds


def test_on_a_gpu_a_launch_is_done_when_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU fills its L2 meanwhile; calls are a graph's."""
    from benchmarks import race as module

    log: list[str] = []

    def graphed(call: Any) -> Any:
        log.append("captured")
        return lambda: log.append("replay")

    event = SimpleNamespace(record=lambda: log.append("event"), synchronize=lambda: None, elapsed_time=lambda _: 6.0)
    monkeypatch.setattr(module, "graphed", graphed)
    monkeypatch.setattr(module, "l2_flush", lambda device: SimpleNamespace(fill_=lambda value: log.append("fill")))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    seconds, out = race({"a": lambda at: None}, torch.device("cuda"), in_a_row=2, rounds=2)
    assert log == ["captured", "replay", *["fill", "event", "replay", "event"] * 2]
    assert (seconds, out) == ({"a": 3e-3}, {})


def test_a_table_grows_by_the_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(tuned, "gpu_name", lambda: "Some GPU")
    path = tmp_path / "some-gpu.json"
    wrong = SMALL._replace(c0=0)  # no source: can't be made
    left = tune.tune([SMALL, wrong, HALF], [1, 2], 1, 60.0, path, partial(fake, {tune.RULE: 3.0}))
    assert left == 0
    assert list(conv_choice.read(path)["shapes"]) == [SMALL.key, HALF.key]
    assert list(conv_choice.read(path)["shapes"][SMALL.key]["batches"]) == ["1", "2"]
    said = capsys.readouterr()
    assert said.err.count("16, 3x3, batch 1: left out: ZeroDivisionError") == 1
    assert "ours 3.0 us (" in said.out
    assert tune.tune([SMALL, HALF], [1], 1, -1.0, path) == 2


def test_what_was_measured_of_a_shape_is_kept_without_time_for_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "gpu_name", lambda: "Some GPU")
    now = iter([0.0, 1.0, 11.0, 99.0])  # the beginning, before batches 1, 2
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(now))
    path = tmp_path / "some-gpu.json"
    assert tune.tune([SMALL, HALF], [1, 2], 1, 10.0, path, partial(fake, {tune.RULE: 3.0})) == 2
    assert list(conv_choice.read(path)["shapes"][SMALL.key]["batches"]) == ["1"]


def test_the_rules_tile_is_the_rules_where_there_is_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else tuning again would compare the table with itself."""
    given: list[Any] = []
    monkeypatch.setattr("fastddpm_kernels.conv.launch_conv", lambda *_, **more: given.append(more["tile"]))
    problem = Problem(HALF._replace(c0=64, cout=32), 2, CPU)
    monkeypatch.setattr(problem, "error", lambda *_: 0.0)
    tune.measure(problem, 1, lambda calls, *_: ([call(0) for call in calls.values()], fake({}, calls))[1])
    rule = conv_choice.rule(conv_choice.gpu_of(CPU), problem.shape, 2, conv_choice.segments(problem.shape))
    assert given == [rule] * 3  # what all are compared with, itself compared, and timed


def test_compiling_processes_share_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [HALF._replace(height=h) for h in (1, 2, 4, 8, 16)]
    seen: list[Any] = []

    def problem(shape: ConvShape, *_: Any, **__: Any) -> Any:
        def own(at: int, tile: Tile | None, split: bool | None) -> None:
            seen.append((shape, tile, split))
            raise RuntimeError("out of resource")  # the rule's tile too: the others are compiled all the same

        return SimpleNamespace(own=own)

    monkeypatch.setattr(tune, "Problem", problem)
    for part in ("0/2", "1/2"):
        tune.compile_part(shapes, part, 3)
    expected = [(shape, *given) for shape in shapes for given in tune.candidates(shape, 3).values()]
    assert sorted(seen, key=str) == sorted(expected, key=str)


def test_compiling_processes_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Process:
        def __init__(self, words: list[str], **_: Any) -> None:
            log.append(" ".join(words[-4:]))
            self.late = words[-1] == "1/2"

        def wait(self, limit: float | None = None) -> None:
            if self.late and limit is not None:
                raise tune.subprocess.TimeoutExpired("x", limit)
            log.append("waited")

        def kill(self) -> None:
            log.append("killed")

    monkeypatch.setattr(tune.subprocess, "Popen", Process)
    tune.compile_ahead(["--tiles", "3"], 2, 0.0)
    assert log == ["--tiles 3 --part 0/2", "--tiles 3 --part 1/2", "waited", "killed", "waited"]


# --- the table --------------------------------------------------------------------------------------------------------


def test_measured_again_and_more_of_it(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tuned.add(path, "GPU", {"a": {"64": part(us=10.0)}, "b": {"1": part()}})
    tuned.add(path, "GPU", {"a": {"8": part(us=5.0)}})
    assert list(conv_choice.read(path)["shapes"]["a"]["batches"]) == ["8", "64"]
    tuned.add(path, "GPU", {"a": {"64": part(us=11.0)}})
    table = conv_choice.read(path)
    assert list(table["shapes"]) == ["a", "b"]
    assert {b: p["us"] for b, p in table["shapes"]["a"]["batches"].items()} == {"8": 5.0, "64": 11.0}
    assert list(table["shapes"]["a"]["batches"]) == ["8", "64"]
    with pytest.raises(InputError, match="the table is of 'GPU', and this GPU is 'Other'"):
        tuned.add(path, "Other", {})
    with pytest.raises(InputError, match="the measurement is no table: a, batch 1: m is 7"):
        tuned.add(path, "GPU", {"a": {"1": part(tile=[7, 64, 4, 3, None])}})
    assert conv_choice.read(path) == table


def test_cudnn_takes_a_shape_over_for_all_batches_or_none() -> None:
    assert tuned.own({"1": part(10, 10)})
    assert tuned.own({"1": part(10, 9.6)})  # not clearly
    assert not tuned.own({"1": part(10, 9.4)})
    assert tuned.own({"1": part(10, 30), "64": part(10, 5)})  # geometric mean 12.2
    assert not tuned.own({"1": part(10, 15), "64": part(10, 5)})


def test_what_is_found(tmp_path: Path) -> None:
    best = [128, 64, 4, 3, None]
    shapes = {SMALL.key: {"1": part(tile=best, split=False), "64": part()}, HALF.key: {"8": part(20, 10)}}
    tuned.add(tmp_path / "some-gpu-1.json", "Some GPU (1)", shapes)
    find = partial(choice, "Some GPU (1)", folder=tmp_path)
    assert find(SMALL, 1) == (True, (128, 64, 4, 3, None), False)
    assert find(SMALL, 7) == find(SMALL, 8) == find(SMALL, 1)  # nearest by ratio; of two alike the smaller
    assert find(SMALL, 9) == find(SMALL, 10_000) == (True, None, None)
    found = find(SMALL, 1)
    assert found is not None
    assert found.tile(32) == Tile(128, 64, 32, 4, 3, None)
    rule = find(HALF, 1)
    assert rule is not None
    assert rule == (False, None, None)
    assert rule.tile(32) is None
    assert find(SMALL._replace(cout=8), 1) is None
    assert choice("Another", SMALL, 1, tmp_path) is None
    assert choice("some gpu 1", SMALL, 1, tmp_path) is None  # another name, the same file
    assert choice("Some GPU (1)", SMALL, 1, tmp_path / "nowhere") is None


def test_tiles_that_a_shape_can_not_have(tmp_path: Path) -> None:
    """More memory than `conv_scratch` says, groups in two tiles, or more programs that wait than run at once."""
    divided = HALF._replace(c0=256, cout=256)
    normed = HALF._replace(height=32, width=32, c0=128, cout=128, norms=(4, 64))
    wide = normed._replace(cout=512, norms=(16,))
    tiles = [[m, n, 4, 3, None] for m in (64, 128) for n in (32, 64, 128)]
    allowed = {
        divided: [[64, 32], [64, 64]],
        divided._replace(up=True): [tile[:2] for tile in tiles],
        normed: [[64, 64], [64, 128], [128, 64], [128, 128]],
        wide: [[128, 128]],  # 8 x 4 programs
    }
    for shape, those in allowed.items():
        found = []
        for i, tile in enumerate(tiles):
            folder = tmp_path / f"{shape.cout}-{shape.up}-{len(shape.norms)}-{i}"
            folder.mkdir()
            tuned.add(folder / "gpu.json", "GPU", {shape.key: {"1": part(tile=tile)}})
            try:
                choice("GPU", shape, 1, folder)
            except ValueError:
                continue
            found.append(tile[:2])
        assert found == those, shape.key
        for tried, _ in tune.candidates(shape, 100).values():
            assert tried is None or conv_choice.takes(shape, tried)


@pytest.mark.parametrize("shape", COVERING[2:], ids=lambda shape: shape.key)
def test_the_launcher_looks_for_the_tables_shape(shape: ConvShape, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastddpm_kernels import conv

    seen = []
    monkeypatch.setattr(conv, "division", lambda *given: seen.append(given[1:]) or conv_choice.division(*given))
    large = shape._replace(c0=64, c1=8 * shape.c1, s0=8 * shape.s0)
    Problem(large, 2, CPU).own()
    assert seen == [(large, 2)]


def test_no_table_ships_that_is_none() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        assert conv_choice.slug(conv_choice.read(path)["gpu"]) == path.stem


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(format=2), "its format is not 1"),
        (dict(gpu=None), "gpu or shapes is missing"),
        (dict(shapes=[]), "gpu or shapes is missing"),
        (dict(shapes={"a": {"own": True}}), "a: own or batches is missing"),
        (dict(shapes={"a": {"own": True, "batches": {}}}), "a: own or batches is missing"),
        (dict(shapes={"a": {"own": 1, "batches": {"1": part()}}}), "a: own or batches is missing"),
        (dict(shapes={"a": {"own": True, "batches": {"0": part()}}}), "a: '0' is no batch"),
        (dict(shapes={"a": {"own": True, "batches": {"x": part()}}}), "a: 'x' is no batch"),
        (
            dict(shapes={"a": {"own": True, "batches": {"1": part(split=1)}}}),
            "batch 1: split is 1; allowed: false, null",
        ),
        (dict(shapes={"a": {"own": True, "batches": {"1": part(split=True)}}}), "batch 1: split is True; allowed"),
        (dict(shapes={"a": {"own": True, "batches": {"1": part(split=0)}}}), "batch 1: split is 0; allowed"),
        *(
            (dict(shapes={"a": {"own": True, "batches": {"1": part(tile=tile)}}}), f"batch 1: {says}")
            for tile, says in [
                ([128, 64, 4, 3], "tile is [128, 64, 4, 3]; allowed: null, or [m, n"),
                ([32, 64, 4, 3, None], "m is 32; allowed: 64, 128, 256"),
                ([128, 48, 4, 3, None], "n is 48"),
                ([128, 64, 4.0, 3, None], "warps is 4.0"),
                ([128, 64, 4, 9, None], "stages is 9"),
                ([128, 64, 4, 3, 300], "registers is 300; allowed: null, or 24 ... 255"),
            ]
        ),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"format": 1, "gpu": "GPU", "shapes": {}} | change))
    with pytest.raises(ValueError) as refused:
        choice("GPU", SMALL, 1, tmp_path)
    assert says in str(refused.value)
    assert "gpu.json is no table of convolutions" in str(refused.value)
    with pytest.raises(InputError):
        tuned.add(path, "GPU", {})


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read as a table of convolutions"):
        choice("GPU", SMALL, 1, tmp_path)


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_list_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(tune.main, ["--list"]) == 0
    assert "bfloat16 32x32 3+0 to 128, 3x3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, says",
    [
        (["--batches", "1,x"], "batches is '1,x'; allowed: integers of at least 1"),
        (["--batches", "0"], "batches is '0'"),
        (["--tiles", "0"], "--tiles"),
        pytest.param(
            [], "finds no NVIDIA GPU", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
        ),
    ],
)
def test_errors_are_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(tune.main, words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert says in said.err
    assert said.err.count("\n") == 1


@pytest.mark.gpu
@torch.no_grad()
def test_a_shape_is_tuned_on_a_gpu(tmp_path: Path) -> None:
    shape = ConvShape("bfloat16", 16, 16, 64, 0, 64, row=True)
    path = tmp_path / tuned.file_name()
    assert tune.tune([shape], [1, 8], 4, 120.0, path) == 0
    found = choice(tuned.gpu_name(), shape, 8, tmp_path)
    assert found is not None
    entry = conv_choice.read(path)["shapes"][shape.key]["batches"]["8"]
    assert 0 < entry["us"] <= entry["rule_us"]
    assert 0 < entry["cudnn_us"] < 1e5

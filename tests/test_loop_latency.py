"""The benchmark of the loops: without a GPU it says so; its figures are of loops that gave the eager bytes."""

import json

import pytest
import torch
from fake_graph import FakeGraphs

from benchmarks import command, loop_latency
from fastddpm import NoiseSchedule, solvers

TABLE = solvers.ddpm(NoiseSchedule.linear(), 100)


def model(x, t, class_labels):
    return 0.3 * x + class_labels[:, None]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert command.run(loop_latency.main, ["--short", "--out", str(tmp_path)]) == 7
    assert capsys.readouterr().err.startswith("error: loop_latency.py needs a GPU, and torch finds none")
    assert list(tmp_path.iterdir()) == []


def test_each_loop_is_what_it_is_called(monkeypatch):
    fake, waits = FakeGraphs(monkeypatch), []
    monkeypatch.setattr("fastddpm.sampler.Sampler._makes_noise_ahead", lambda sampler, device: False)
    rows = list(loop_latency.measured(model, TABLE, (2, 8), 2, lambda: waits.append(1)))
    assert [row["loop"] for row in rows] == list(loop_latency.LOOPS)
    by_name = {row["loop"]: row for row in rows}
    for name, row in by_name.items():
        if name.startswith("WHILE"):
            assert row["reason"].startswith("no WHILE node: ")
            assert "host_us_a_step" not in row
        else:
            assert row["reason"] is None
            assert 0 < row["host_us_a_step"] <= row["wall_us_a_step"]
    runs = 4  # the sample, a warm-up, two rounds
    assert fake.replays == {1: 100 * runs, 10: 10 * (runs + 1), 50: 2 * (runs + 1), 2: 50}  # a WHILE refused: in chunks
    assert len(waits) == 2 * 4 * 3
    json.dumps(rows, allow_nan=False)
    text = [loop_latency.line(row, rows[0]) for row in rows]
    assert text[0].endswith("| 1.00x |")
    assert "none: no WHILE node" in text[-1]


def test_a_loop_that_raises_takes_no_other_with_it(monkeypatch):
    FakeGraphs(monkeypatch)
    monkeypatch.setattr("fastddpm.sampler.Sampler._makes_noise_ahead", lambda sampler, device: False)
    capture = loop_latency.Sampler._capture

    def broken(made, *given):
        if made.graph == "while":
            raise RuntimeError("driver\nmore")
        loop_latency.warnings.warn("torch is new", FutureWarning, stacklevel=1)  # no reason to leave a loop out
        return capture(made, *given)

    monkeypatch.setattr(loop_latency.Sampler, "_capture", broken)
    rows = {row["loop"]: row["reason"] for row in loop_latency.measured(model, TABLE, (2, 8), 1, lambda: None)}
    assert {loop for loop, reason in rows.items() if reason == "RuntimeError: driver"} == {
        loop for loop in rows if loop.startswith("WHILE")
    }
    assert sum(reason is None for reason in rows.values()) == 4


def test_each_batch_is_written(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loop_latency, "UNet", FakeUNet)
    monkeypatch.setattr(loop_latency, "machine", lambda: {"gpu": "GPU"})
    made = []

    def measured(model, table, shape, *_):
        if made:
            raise KeyboardInterrupt
        made.append(table.num_rows)
        return [{"batch": shape[0], "loop": "eager", "reason": "none"}]

    monkeypatch.setattr(loop_latency, "measured", measured)
    assert command.run(loop_latency.main, ["--steps", "200", "--out", str(tmp_path)]) == 130
    (path,) = tmp_path.iterdir()
    assert [row["batch"] for row in json.loads(path.read_text())["rows"]] == [1]
    assert made == [200]


class FakeUNet:
    """Goes to a GPU that is not there."""

    @classmethod
    def from_pretrained(cls, name):
        return cls()

    def to(self, *_, **__):
        return self

    eval = to

    def requires_grad_(self, on):
        return self


def test_who_differs_has_no_figures(monkeypatch):
    prepared = loop_latency.prepared

    def off(model, table, shape, loop):
        run, sample = prepared(model, table, shape, "eager")
        return run, sample + (1e-3 if loop == "graphs of 10" else 0)

    monkeypatch.setattr(loop_latency, "prepared", off)
    rows = {row["loop"]: row for row in loop_latency.measured(model, TABLE, (2, 8), 1, lambda: None)}
    assert rows["graphs of 10"]["reason"] == "its samples differ from the eager ones by 0.001"
    assert "wall_us_a_step" not in rows["graphs of 10"]
    assert rows["graphs of 50"]["reason"] is None

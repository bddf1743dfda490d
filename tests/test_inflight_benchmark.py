"""The benchmark of continuous batching: its servers do what they are called, and who is wrong has no figures."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch

from benchmarks import inflight, inflight_servers
from benchmarks.inflight_servers import SLOTS, Ask, Clock, first, mix, shortest

CPU = torch.device("cpu")


def model(x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * (1 + class_labels[:, None, None, None] / 20)


def test_the_policies() -> None:
    asks = [Ask(i, 0, "ddim", steps) for i, steps in enumerate([9, 1, 8, 2, 7, 3, 6, 4, 5, 10])]
    waiting = deque(asks)
    assert [ask.seed for ask in first(waiting)] == list(range(8))
    assert [ask.seed for ask in waiting] == [8, 9]
    assert [ask.steps for ask in shortest(deque(asks))] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_mix_is_the_same_each_time_and_mixed() -> None:
    assert [vars(a) | {"sample": 0} for a in mix(30, 10)] == [vars(a) | {"sample": 0} for a in mix(30, 10)]
    assert {ask.solver for ask in mix(30, 10)} == set(inflight_servers.SOLVERS)


def test_idle_time_is_skipped() -> None:
    clock = Clock(CPU)
    clock.skip(1000.0)
    assert 1000 <= clock() < 1010
    clock.skip(5.0)
    assert clock() >= 1000


@pytest.mark.parametrize("gap", [0.0, 100.0])
def test_all_contenders_serve_all_and_alike(gap: float) -> None:
    asks = mix(11, 10, (2, 4))
    for i, ask in enumerate(asks):
        ask.arrives = gap * i
    runs = inflight.race(inflight.contenders(model, CPU), asks, 2, CPU, model)
    assert list(runs) == ["static", "static, shortest first", "grouped", "grouped, not padded", "in-flight"]
    if gap:  # each is alone
        assert [round(run.utilisation * SLOTS) for run in runs.values()] == [1, 1, 1, SLOTS, 1]
        assert all(run.mean < 10 for run in runs.values())
    else:
        assert runs["in-flight"].utilisation >= runs["static"].utilisation
        assert runs["grouped, not padded"].utilisation == 1
    assert all(run.p99 >= run.mean > 0 for run in runs.values())


def test_who_is_wrong_has_no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = inflight.serve

    def off(server: Any, asks: list[Ask], device: torch.device) -> inflight.Run:
        run = serve(server, asks, device)
        if isinstance(server, inflight_servers.Grouped):
            asks[3].sample = asks[3].sample + 1e-2
        return run

    monkeypatch.setattr(inflight, "serve", off)
    with pytest.raises(SystemExit, match=r"no figures: grouped differs from in-flight by 0.01"):
        inflight.race(inflight.contenders(model, CPU), mix(4, 10, (2,)), 1, CPU, model)
    made = {"in-flight": [torch.zeros(1, 32, 32)]}
    assert "in-flight differs from Sampler" in str(inflight.wrong(made, mix(1, 10, (2,)), model))


def test_it_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Small(torch.nn.Module):
        @classmethod
        def from_pretrained(cls, _: Any) -> Small:
            return cls()

        def forward(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            return model(x, t, class_labels)

    monkeypatch.setattr(inflight, "UNet", Small)
    threads = torch.get_num_threads()
    try:
        inflight.main(["--short"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert "1 threads" in lines[0]
    assert len(lines) == 3 + 2 + 2 * 5
    assert {line.count("|") for line in lines[3:]} == {8}
    assert lines[9].startswith("| all at once | in-flight | ")
    assert lines[10].startswith("| Poisson, ")

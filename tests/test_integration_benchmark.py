"""The benchmark of the integrations: who differs has no time, who isn't there says so, and the table is of the record.

Of the peers, diffusers is there; the others run where they are installed (`benchmarks/integrations.py` says how).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import command, integrations, peers
from benchmarks.integration_cases import CASES, Race, Setup
from fastddpm.sampler import Sampler

CPU = torch.device("cpu")
TINY = Setup(CPU, steps=3, batch=2, size=8, free=True)
ONES = torch.ones(2, 3)


def race(**changed: Any) -> Race:
    made = Race("loop", 4, peer=lambda: ONES, ours=lambda: ONES, network=lambda: None, sampler=lambda: ONES)
    return replace(made, **changed)


@pytest.mark.parametrize("name", CASES)
def test_ours_is_the_peers(name: str) -> None:
    try:
        races = list(CASES[name](TINY))
    except peers.Missing as error:
        pytest.skip(str(error))
    assert races
    for one in races:
        with torch.no_grad():
            gate, errors = integrations.checked(one, integrations.contenders(one, CPU))
            one.network()
        assert gate.reasons == [], one.loop
        assert ("Sampler" in errors) == one.same


@pytest.mark.parametrize(
    "changed",
    [
        {"ours": lambda: ONES + 2e-4},
        {"ours": lambda: ONES[:1]},
        {"sampler": lambda: ONES + 2e-4, "same": True},
        {"sampler": lambda: ONES / 0},
    ],
    ids=["off", "shape", "sampler off", "sampler infinite"],
)
def test_who_differs_has_no_time(changed: Any) -> None:
    made = integrations.measured(race(**changed), CPU, 2, 0.0)
    assert "contenders" not in made
    assert made["reasons"]
    cells = integrations.cells({**made, "network": "none"}, {**made, "network": "small"})
    assert cells[0].startswith("FAILED: ")
    json.dumps(made, allow_nan=False)


def test_a_step_is_an_evaluation_of_the_network() -> None:
    made = integrations.measured(race(), CPU, 7, 0.0)
    assert made["rounds"] == 7
    assert made["contenders"]["peer"]["x_peer"] == 1
    assert list(made["contenders"]) == ["peer", "fastddpm", "Sampler", "network"]
    for of in made["contenders"].values():
        assert of["us_a_step"]["median"] == pytest.approx(of["ms"]["median"] * 1e3 / 4)
        assert of["ms"]["least"] <= of["ms"]["p10"] <= of["ms"]["median"] <= of["ms"]["p90"]


def test_on_cuda_the_graphs_are_taken_away_too() -> None:
    seen: list[bool] = []
    sampler = Sampler(lambda x, t: x, race_table())

    def ours() -> torch.Tensor:
        seen.append(sampler._wants_graph(torch.device("cuda")))
        return ONES

    made = integrations.contenders(race(ours=ours), torch.device("cuda"))
    assert list(made) == ["peer", "fastddpm", "Sampler", "fastddpm, no graph", "Sampler, no graph", "network"]
    made["fastddpm"]()
    made["fastddpm, no graph"]()
    made["fastddpm, no graph"]()  # a decorated call can be made again
    assert seen == [True, False, False]


def race_table() -> Any:
    from fastddpm import NoiseSchedule, solvers

    return solvers.ddim(NoiseSchedule.linear(), 3)


def test_it_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(peers.CHECKOUT, raising=False)
    threads = torch.get_num_threads()
    words = ["--short", "--out", str(tmp_path), "--device", "cpu", "--peers", "Diffusion Policy; guided-diffusion"]
    try:
        assert command.run(integrations.main, words) == 0
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_bytes())
    assert (record["kind"], record["device"], record["machine"]["threads"]) == ("integrations", "cpu", 1)
    assert record["peers"]["diffusers"]
    loops = record["loops"]
    assert [v["network"] for v in loops] == ["none"] * 3 + ["small"] * 3
    assert all(v["rounds"] == 2 and v["reasons"] == [] for v in loops if "skipped" not in v)
    assert [v["peer"] for v in loops if "skipped" in v] == ["guided-diffusion"] * 2
    assert len(lines) == 2 + 2 + 3
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert "skipped: no checkout: git clone" in lines[-1]
    peer, ours = (loops[0]["contenders"][name] for name in ("peer", "fastddpm"))
    assert f"| {peer['us_a_step']['median']:.0f} (" in lines[4]
    assert f"), {ours['x_peer']:.2f} |" in lines[4]


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(integrations.main, ["--peers", "ComfyUI"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no peer 'ComfyUI'; allowed: diffusers, accelerate; ")
    assert said.count("\n") == 1

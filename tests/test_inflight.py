"""`InflightSampler`: what a request becomes is bit for bit what it becomes alone, whoever shares the batch."""

import itertools
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from fake_graph import FakeGraphs
from inflight import KINDS, NONE, SCHEDULE, SHAPE, SLOTS, Asked, Net, drained
from test_front_syncs import Waits
from test_graphs import ROOT
from torch import nn

from fastddpm import EDMSchedule, InflightSampler, NoiseSchedule, Sampler, inflight, solvers
from fastddpm._table_rows import Needs, Program, TableRows
from fastddpm.errors import ConfigError, GraphCaptureError, InputError, NonFiniteError

LABELS = {"class_labels": 0}


def made(model=None, **given):
    given = {"slots": SLOTS, "schedule": SCHEDULE, "background": False, "max_pending": 500, **given}
    return InflightSampler(model or Net(), SHAPE, **given)


def requests(n, *, guided=False):
    """A mix, the same each time."""
    draw, asked = random.Random(0), []
    for seed in range(n):
        solver, options = KINDS[draw.randrange(len(KINDS))]
        one = Asked(2**64 - 1 - seed, solver, draw.choice([2, 3, 5, 8, 13]), options, label=draw.randrange(NONE))
        if guided:
            one.weight = draw.choice([None, 1.0, 2.5, -1.0])
        if seed % 7 == 0:
            one.x_T = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        asked.append(one)
    return asked


@pytest.mark.parametrize("n, guided", [(200, True), (60, False)])
def test_two_hundred_requests_from_several_threads_are_those_alone(n, guided):
    model, asked = Net(), requests(n, guided=guided)
    given = dict(model_kwargs=LABELS, unconditional_kwargs={"class_labels": NONE} if guided else None)
    futures, draw = [None] * len(asked), random.Random(1)
    pauses = [draw.random() * 2e-3 if draw.random() < 0.3 else 0.0 for _ in asked]

    with made(model, background=True, max_pending=9, **given) as sampler:

        def some(first):
            for i in range(first, len(asked), 4):
                time.sleep(pauses[i])
                futures[i] = asked[i].submit(sampler)

        threads = [threading.Thread(target=some, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        results = [future.result(timeout=60) for future in futures]
    assert sampler.counts.finished == n
    assert sampler.counts.uploads <= len(KINDS) * 5
    assert sampler.counts.occupied == sum(one.table.num_rows for one in asked)
    assert 0.3 < sampler.utilisation <= 1

    alone = made(model, **given)
    for one, result in zip(asked, results, strict=True):
        assert result.shape == SHAPE
        assert torch.equal(drained(alone, one)[0], result), one
        assert torch.equal(one.plain(model, guided=guided), result), one


def test_who_is_submitted_later_joins_at_the_next_step_in_the_free_slot():
    sampler, seen = made(slots=2), []
    first = sampler.submit(seed=0, solver="ddim", steps=3, progress=lambda *at: seen.append(("first", *at)))
    second = sampler.submit(seed=1, solver="ddim", steps=5, progress=lambda *at: seen.append(("second", *at)))
    third = sampler.submit(seed=2, solver="heun", steps=2, progress=lambda *at: seen.append(("third", *at)))
    counts = [sampler.counts]
    while sampler.step():
        counts.append(sampler.counts)
    assert [(c.pending, c.running) for c in counts] == [(3, 0), (1, 2), (1, 2), (1, 1), (0, 2), (0, 1)]
    at = {name: [step for step, (n, *_) in enumerate(seen) if n == name] for name in ("first", "second", "third")}
    assert [entry[1:] for entry in seen if entry[0] == "third"] == [(1, 3), (2, 3), (3, 3)]
    assert at["third"][0] > at["first"][-1]
    assert first.done()
    assert second.done()
    assert third.done()
    assert (sampler.counts.steps, sampler.counts.occupied, sampler.utilisation) == (6, 11, 11 / 12)


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_that_can_do_more_changes_no_bits(graph, monkeypatch):
    """Each kind of table comes while others are under way, so that the step grows under them."""
    model = Net()
    fake = FakeGraphs(monkeypatch) if graph else None
    for order in (KINDS, KINDS[::-1]):
        asked = [Asked(i, solver, 11, options, label=1) for i, (solver, options) in enumerate(order)]
        sampler, futures = made(model, slots=len(KINDS), model_kwargs=LABELS, graph=graph), []
        for one in asked:
            futures.append(one.submit(sampler))
            sampler.step()
        while sampler.step():
            pass
        monkeypatch.setattr(Sampler, "_wants_graph", lambda *_: False)
        for one, future in zip(asked, futures, strict=True):
            assert torch.equal(future.result(timeout=0), one.plain(model, len(KINDS))), one
        if fake:
            monkeypatch.setattr(Sampler, "_wants_graph", lambda *_: True)
            assert fake.captures > 4
            assert sum(fake.replays.values()) == sampler.counts.steps
            fake.captures, fake.replays = 0, {}


def test_a_learned_variance_beside_none():
    model = Net(learned=True)
    asked = [Asked(0, "ddim", 9), Asked(1, "ddpm", 6, {"variance": "learned_range"}), Asked(2, "ddpm", 5)]
    sampler = made(model)
    first = asked[0].submit(sampler)
    for _ in range(3):
        sampler.step()
    results = [*drained(sampler, *asked[1:]), first.result(timeout=0)]
    for one, result in zip([*asked[1:], asked[0]], results, strict=True):
        assert torch.equal(result, one.plain(model))


def test_a_learned_variance_that_the_model_has_not_fails_that_request_alone():
    sampler, other = made(), Asked(3)
    sampled = other.submit(sampler)
    sampler.step()
    refused = Asked(1, "ddpm", 6, {"variance": "learned_range"}).submit(sampler)
    while sampler.step():
        pass
    with pytest.raises(InputError, match="for a solver with a learned variance"):
        refused.result(timeout=0)
    assert torch.equal(sampled.result(timeout=0), other.plain(Net()))
    assert torch.equal(drained(sampler, other)[0], other.plain(Net()))


def test_time_steps_that_are_not_whole():
    asked = [Asked(0, "euler", 5, {"state": "ve", "spacing": "karras", "quantize": False}), Asked(1, "heun", 4)]
    with pytest.raises(InputError, match=r"not whole; make the sampler with time_dtype=torch.float32"):
        asked[0].submit(made())
    for one, result in zip(asked, drained(made(time_dtype=torch.float32), *asked), strict=True):
        assert torch.equal(result, one.plain(Net()))


def test_an_edm_network():
    schedule, model = EDMSchedule(), Net()
    table = solvers.heun(schedule, 4, prediction_type="edm")
    sampler = made(model, schedule=schedule)
    future = sampler.submit(seed=3, solver="heun", steps=4, prediction_type="edm")
    own = sampler.submit(seed=3, table=table)
    while sampler.step():
        pass
    expected = Sampler(model, table).sample((SLOTS, *SHAPE), seeds=[3] * SLOTS)[0]
    assert torch.equal(future.result(timeout=0), expected)
    assert torch.equal(own.result(timeout=0), expected)
    assert sampler.counts.uploads == 1


def test_a_model_in_bfloat16_and_channels_last():
    model = Net().to(torch.bfloat16, memory_format=torch.channels_last)
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append((args[0].dtype, args[0].is_contiguous())))
    one = Asked(5, "dpm_solver", 7, label=2)
    assert torch.equal(drained(made(model, model_kwargs=LABELS), one)[0], one.plain(model))
    assert set(seen) == {(torch.bfloat16, False)}


def test_more_than_labels():
    def model(x, t, cond, scale):
        return torch.tanh(x * scale[:, None, None, None]) + cond["y"].flatten(1).sum(1)[:, None, None, None]

    y = torch.arange(6.0).reshape(2, 3) / 10
    sampler = made(model, model_kwargs={"cond": {"y": torch.zeros(2, 3)}, "scale": 1.0}, unconditional_kwargs={})
    futures = [
        sampler.submit(seed=0, solver="ddim", steps=4),
        sampler.submit(seed=0, solver="ddim", steps=4, model_kwargs={"cond": {"y": y}, "scale": 2}, guidance_scale=3),
    ]
    y += 1  # it was copied
    while sampler.step():
        pass
    y -= 1
    for future, (cond, scale) in zip(futures, [(torch.zeros(2, 3), 1.0), (y, 2.0)], strict=True):
        given = {"cond": {"y": cond.expand(SLOTS, 2, 3)}, "scale": torch.full((SLOTS,), scale)}
        table = solvers.ddim(SCHEDULE, 4)
        expected = Sampler(model, table).sample((SLOTS, *SHAPE), seeds=[0] * SLOTS, model_kwargs=given)[0]
        # both halves are told the same, so w changes nothing but the rounding
        assert (future.result(timeout=0) - expected).abs().max() < 1e-4


# --- what is not finite -----------------------------------------------------------------------------------------------


def breaks_at(t_bad):
    """Not finite for label 3 at that t, but for the unconditional half."""
    net = Net()

    def model(x, t, class_labels):
        bad = (class_labels == 3) & (t <= t_bad) & (t > 0)
        return torch.where(bad[:, None, None, None], torch.nan, net(x, t, class_labels))

    return model


def test_what_is_not_finite_fails_alone_and_leaves_a_clean_slot():
    model = breaks_at(30)
    sampler = made(model, model_kwargs=LABELS, slots=1)
    bad = Asked(7, "dpm_solver", 10, label=3)
    failed = bad.submit(sampler)
    after = [Asked(8, "unipc", 6, label=1), Asked(9, "ddpm", 6, label=2)]
    futures = [one.submit(sampler) for one in after]
    while sampler.step():
        pass
    step = int((bad.table.timesteps <= 30).argmax())
    with pytest.raises(NonFiniteError, match=rf"the sample of seed 7 is not finite from step {step} \(t = ") as error:
        failed.result(timeout=0)
    assert error.value.samples.shape == (1, *SHAPE)
    assert error.value.bad.tolist() == [True]
    for one, future in zip(after, futures, strict=True):
        assert torch.equal(future.result(timeout=0), one.plain(model, 1))
    assert (sampler.counts.finished, sampler.counts.failed) == (2, 1)


def test_its_neighbours_are_untouched_and_the_empty_slot_flags_nothing():
    model = breaks_at(60)
    asked = [Asked(1, "unipc", 20, label=1), Asked(2, "ddim", 6, label=3), Asked(3, "ddpm", 15, label=2)]
    sampler = made(model, model_kwargs=LABELS)
    futures = [one.submit(sampler) for one in asked]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while sampler.step():
            pass
    for i in (0, 2):
        assert torch.equal(futures[i].result(timeout=0), asked[i].plain(model))
    assert isinstance(futures[1].exception(timeout=0), NonFiniteError)
    slots = sampler._loop._slots
    assert slots._nonfinite.tolist() == [0] * SLOTS
    assert not slots._x[1].any()
    assert sampler._loop._slots._loop_step.cursor[1] == TableRows.IDLE


def test_an_x_T_that_is_not_finite():
    sampler = made()
    x_T = torch.full(SHAPE, torch.inf)
    future = sampler.submit(seed=0, solver="ddim", steps=3, x_T=x_T)
    good = sampler.submit(seed=0, solver="ddim", steps=4)
    while sampler.step():
        pass
    assert isinstance(future.exception(timeout=0), NonFiniteError)
    assert torch.equal(good.result(timeout=0), Asked(0, steps=4).plain(Net()))


# --- the device side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_a_step_in_which_nobody_joins_or_leaves_reads_nothing_and_uploads_nothing(guided):
    given = dict(model_kwargs=LABELS, unconditional_kwargs={"class_labels": NONE} if guided else None)
    sampler, asked = made(**given), requests(30, guided=guided)
    kept = [one for one in asked if one.table.num_rows == 13][:3]  # and an empty slot
    futures = [one.submit(sampler) for one in kept]
    sampler.step()
    for _ in range(10):
        with Waits() as waits:
            sampler.step()
        assert not waits.seen
    while sampler.step():
        pass
    assert all(future.done() for future in futures)


def test_the_noise_that_a_sample_gets_is_that_of_its_own_rows():
    """The counter's step is the row's number in its own table, wherever that lies."""
    one = Asked(4, "ddpm", 6)
    sampler = made()
    drained(sampler, *(Asked(i, "ddim", 3 + i) for i in range(5)))
    assert torch.equal(drained(sampler, one)[0], one.plain(Net()))


def program(steps, solver="ddim", **options):
    return Program.of(solvers.make(solver, SCHEDULE, steps, **options), torch.device("cpu"))


def test_tables_stay_on_the_device_until_their_room_is_needed():
    tables = TableRows(1 + 4 + 5 + 6, torch.device("cpu"))
    three, four, five, two = (program(n) for n in (3, 4, 5, 2))
    assert [tables.acquire(p) for p in (three, four, five)] == [1, 5, 10]
    assert tables.acquire(program(3)) == 1  # an equal one is the same
    assert tables.uploads == 3
    assert tables.acquire(two) is None  # all are in use
    for p in (three, four, five):
        tables.release(p)
    assert tables.acquire(two) == 5  # `three` has a user yet; `four` was used less recently than `five`
    assert tables.acquire(five) == 10
    tables.release(three)
    assert tables.acquire(four) == 1 or tables.uploads == 4
    for p, at in ((two, 5), (five, 10)):
        assert torch.equal(tables.tensor[at : at + len(p.rows)], p.rows)
    with pytest.raises(InputError, match="the table has 16 rows; allowed: 14"):
        tables.check(program(16))
    tables.check(program(14))


@pytest.mark.parametrize("seed", range(5))
def test_no_two_tables_overlap_and_none_in_use_is_lost(seed):
    draw, tables, used = random.Random(seed), TableRows(60, torch.device("cpu")), []
    programs = [program(n) for n in range(1, 20)]
    for _ in range(300):
        if used and draw.random() < 0.5:
            tables.release(used.pop(draw.randrange(len(used)))[0])
        else:
            one = draw.choice(programs)
            if (at := tables.acquire(one)) is not None:
                used.append((one, at))
        assert all(torch.equal(tables.tensor[at : at + len(p.rows)], p.rows) for p, at in used)
    for one, _ in used:
        tables.release(one)
    assert tables.acquire(program(58)) == 1  # no room is lost


def test_requests_wait_for_room_for_their_table(monkeypatch):
    monkeypatch.setattr(inflight, "MAX_ROWS", 20)
    asked = [Asked(i, "ddim", steps) for i, steps in enumerate([10, 9, 12, 3])]
    sampler = made()
    results = drained(sampler, *asked)
    for one, result in zip(asked, results, strict=True):
        assert torch.equal(result, one.plain(Net()))
    with pytest.raises(InputError, match="the table has 30 rows; allowed: 18"):
        sampler.submit(seed=0, solver="ddim", steps=30)


def test_equal_tables_are_uploaded_once_and_made_once(monkeypatch):
    sampler, calls = made(), []
    make = solvers.make
    monkeypatch.setattr(solvers, "make", lambda *a, **o: calls.append(a) or make(*a, **o))
    drained(sampler, *(Asked(i, "ddpm", 4 + i % 2) for i in range(9)))
    drained(sampler, *(Asked(i, "ddpm", 4 + i % 2) for i in range(9)))
    assert sampler.counts.uploads == 2
    assert len(calls) == 2


def test_what_a_table_needs():
    needs = Needs.of(solvers.unipc(SCHEDULE, 9, order=3))
    assert needs.history >= 2
    assert needs.union(Needs()) == Needs().union(needs) == needs
    both = Needs.of(solvers.ddpm(SCHEDULE, 5, clip=1.0)).union(needs)
    assert both.noise
    assert both.limited
    assert both.history == needs.history
    assert not both.learned


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_graphs_give_the_eager_bytes(monkeypatch):
    model, asked = Net(), requests(40, guided=True)
    given = dict(model_kwargs=LABELS, unconditional_kwargs={"class_labels": NONE})
    eager = drained(made(model, graph=False, **given), *asked)
    fake = FakeGraphs(monkeypatch)
    sampler = made(model, **given)
    results = drained(sampler, *asked)
    assert all(map(torch.equal, eager, results))
    assert 1 <= fake.captures <= 7  # no more than there are things that a step can need
    captures = fake.captures
    assert all(map(torch.equal, eager, drained(sampler, *asked)))
    assert fake.captures == captures
    assert sum(fake.replays.values()) == sampler.counts.steps


def test_changed_weights_are_noticed_when_a_request_joins(monkeypatch):
    fake, net, one = FakeGraphs(monkeypatch), Net(), Asked(0, steps=3)
    sampler = made(net)
    drained(sampler, one)
    net.last.weight.mul_(0.5)
    drained(sampler, one)
    assert fake.captures == 1  # the same memory
    net.last.weight.data = net.last.weight.data * 0.5
    result = drained(sampler, one)[0]
    assert fake.captures == 2
    monkeypatch.setattr(Sampler, "_wants_graph", lambda *_: False)
    assert torch.equal(result, one.plain(net))


def test_a_model_that_can_not_be_captured(monkeypatch):
    def refuse(run, device, *_):
        for _ in range(3):
            run(1)
        raise GraphCaptureError("not this one")

    monkeypatch.setattr("fastddpm.graphs.capture", refuse)
    monkeypatch.setattr(Sampler, "_wants_graph", lambda s, _: s.graph is not False and not s._graph_refused)
    one, expected = Asked(0, "unipc", 6), drained(made(graph=False), Asked(0, "unipc", 6))[0]
    sampler = made()
    with pytest.warns(UserWarning, match="no CUDA graph: not this one; sampling goes on eagerly"):
        assert torch.equal(drained(sampler, one)[0], expected)  # the warm-up leaves no trace
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(drained(sampler, one)[0], expected)
    with pytest.raises(GraphCaptureError, match="not this one"):
        drained(made(graph=True), one)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(slots=0), "slots is 0; allowed: an integer of at least 1"),
        (dict(slots=True), "slots is True"),
        (dict(max_pending=0), "max_pending is 0"),
        (dict(time_dtype=torch.float64), "time_dtype is torch.float64"),
        (dict(model=3), "model is a int"),
        (dict(graph="yes"), "graph is 'yes'"),
        (dict(device="nowhere"), "device is 'nowhere'"),
        (dict(dtype=torch.bfloat16), "parameters are torch.float32"),
        (dict(model_kwargs={"a": "text"}), "model_kwargs hold a str; needed: numbers and tensors"),
        (dict(model_kwargs={"a": 1}, unconditional_kwargs={"b": 1}), "unconditional_kwargs have 'b'"),
        (dict(model_kwargs={"a": 1}, unconditional_kwargs={"a": 1.5}), "hold torch.float32 of shape"),
        (dict(model_kwargs={"a": 1}, unconditional_kwargs=3), "unconditional_kwargs is a int"),
    ],
)
def test_what_it_is_not_made_of(given, words):
    with pytest.raises(InputError, match=words):
        made(**given)


@pytest.mark.parametrize(
    "given, error, words",
    [
        (dict(seed=-1), InputError, "seed is -1"),
        (dict(seed=True), InputError, "seed is True"),
        (dict(solver="dimm"), ConfigError, "did you mean 'ddim'"),
        (dict(solver="ddim", guidance_rescale=0.5), ConfigError, "has no option 'guidance_rescale'"),
        (dict(table=3), InputError, "table is a int"),
        (dict(table=solvers.ddim(SCHEDULE, 3), steps=3), InputError, "give the one or the others"),
        (dict(x_T=torch.zeros(2, 2)), InputError, r"x_T is a torch.float32 \(2, 2\); needed: .* \(2, 4, 8\)"),
        (dict(x_T=torch.zeros(SHAPE).int()), InputError, "x_T is a torch.int32"),
        (dict(x_T=1.0), InputError, "x_T is a float"),
        (dict(guidance_scale=2.0), InputError, "a sampler without guidance; make it with unconditional_kwargs"),
        (dict(model_kwargs={"labels": 3}), InputError, "have 'labels'; the sampler's own model_kwargs have 'class_la"),
        (dict(model_kwargs={"class_labels": 1.5}), InputError, r"hold torch.float32 of shape \(\) where"),
        (dict(model_kwargs={"class_labels": torch.arange(4)}), InputError, r"of shape \(4,\)"),
        (dict(model_kwargs={"class_labels": [1]}), InputError, "differ in structure"),
        (dict(model_kwargs={"class_labels": None}), InputError, "hold a NoneType|differ in structure"),
        (dict(solver="ddim_inversion"), InputError, "starts from a picture, not from noise"),
        (dict(solver="ddpm", variance=[1]), ConfigError, "variance"),
    ],
)
def test_what_is_not_a_request(given, error, words):
    sampler = made(model_kwargs=LABELS)
    with pytest.raises(error, match=words):
        sampler.submit(**{"seed": 0, **given})
    assert sampler.counts.submitted == 0


@pytest.mark.parametrize("scale", [True, float("nan"), "3", float("inf")])
def test_what_is_not_a_weight(scale):
    sampler = made(model_kwargs=LABELS, unconditional_kwargs={"class_labels": NONE})
    with pytest.raises(InputError, match=r"guidance_scale is .*; allowed: None, or a finite number"):
        sampler.submit(seed=0, guidance_scale=scale)


def test_numbers_of_numpy():
    one = Asked(3, "ddim", 5, {"eta": 1.0}, weight=2.0, label=4)
    sampler = made(model_kwargs=LABELS, unconditional_kwargs={"class_labels": np.int64(NONE)})
    given = dict(guidance_scale=np.float32(2.0), model_kwargs={"class_labels": np.int64(4)})
    future = sampler.submit(seed=np.int64(3), solver="ddim", steps=5, eta=np.float64(1.0), **given)
    while sampler.step():
        pass
    assert torch.equal(future.result(timeout=0), one.plain(Net(), guided=True))


def test_a_table_that_is_kept_lets_no_wrong_option_through():
    sampler = made()
    sampler.submit(seed=0, solver="ddim", steps=1, eta=1)
    for wrong in (dict(steps=True, eta=1), dict(steps=1.0, eta=1), dict(steps=1, eta=True)):
        with pytest.raises(ConfigError):
            sampler.submit(seed=0, solver="ddim", **wrong)


def test_the_shape_is_the_models():
    class Particular(nn.Module):
        def check_shape(self, shape):
            raise InputError(f"no shape {shape}")

    with pytest.raises(InputError, match="no shape"):
        made(Particular())


def test_the_docs_lines_run(capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "inflight.md").read_text(), re.S).group(1)
    names: dict = {}
    exec(compile(code.replace("steps=50", "steps=2").replace("steps=12", "steps=3"), "inflight.md", "exec"), names)
    assert names["picture"].shape == (1, 32, 32)
    assert capsys.readouterr().out == "1 of 3\n2 of 3\n3 of 3\n"


# --- on a GPU ---------------------------------------------------------------------------------------------------------

ON_GPU = """
import itertools, torch
from inflight import KINDS, NONE, SCHEDULE, SHAPE, Asked, Net
from fastddpm import InflightSampler, Sampler
model = Net().cuda()
given = dict(slots=4, schedule=SCHEDULE, model_kwargs={"class_labels": 0}, unconditional_kwargs={"class_labels": NONE})
asked = [Asked(i, solver, steps, options, weight=[None, 3.0][i % 2], label=i % NONE)
         for i, ((solver, options), steps) in enumerate(itertools.product(KINDS, (3, 20, 7)))]
results = {}
for graph in (True, False):
    with InflightSampler(model, SHAPE, graph=graph, max_pending=9, **given) as sampler:
        futures = [one.submit(sampler) for one in asked]
        results[graph] = [future.result(timeout=100) for future in futures]
for one, a, b in zip(asked, results[True], results[False]):
    assert a.is_cuda and torch.equal(a, b) and torch.equal(a, one.plain(model, guided=True)), one
x_T = torch.randn(SHAPE, device="cuda")
with InflightSampler(model, SHAPE, **given) as sampler:
    future = sampler.submit(seed=0, solver="ddim", steps=5, x_T=x_T)
    x_T.zero_()
    assert future.result(timeout=100).abs().max() > 0
    bad = sampler.submit(seed=0, solver="ddim", steps=5, x_T=x_T / 0)
    assert "not finite" in str(bad.exception(timeout=100))
"""


@pytest.mark.gpu
def test_on_a_gpu():
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    code = textwrap.dedent(ON_GPU)
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_code_for_a_gpu_is_right_as_far_as_a_cpu_can_say():
    names: dict = {}
    code = ON_GPU.replace(".cuda()", "").replace(', device="cuda"', "").replace("a.is_cuda and ", "")
    exec(compile(code.replace("graph=graph, ", ""), "ON_GPU", "exec"), names)
    assert len(names["asked"]) == len(list(itertools.product(KINDS, range(3))))
    assert isinstance(names["SCHEDULE"], NoiseSchedule)

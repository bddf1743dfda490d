"""What would break `InflightSampler`: Ctrl-C, fork, no thread, thousands of requests, the user's defaults."""

import asyncio
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
import torch
from inflight import NONE, SCHEDULE, SHAPE, Asked, Net, drained
from test_graphs import ROOT, NoCuda, on_the_cpu

from fastddpm import InflightSampler, _slots, inflight, solvers
from fastddpm._inflight_loop import Loop
from fastddpm._requests import Request
from fastddpm._slots import Slots
from fastddpm._table_rows import Program, TableRows
from fastddpm.errors import FastDDPMError, InputError

WAIT = 30  # seconds that nothing here takes
CPU = torch.device("cpu")


def made(model=None, *, slots=2, **given):
    return InflightSampler(model or Net(), SHAPE, slots=slots, **{"schedule": SCHEDULE, **given})


def to_its_end(sampler, steps=100):
    for _ in range(steps):
        if not sampler.step():
            return
    raise AssertionError("it never ends")


# --- Ctrl-C, and who raises what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [2, 3])  # 3: the last
def test_ctrl_c_in_progress_ends_that_request_and_no_other_loses_a_step(at):
    def progress(step, steps):
        if step == at:
            raise KeyboardInterrupt

    sampler = made(background=False, slots=3)
    others = [Asked(1, "unipc", 3), Asked(2, "unipc", 5)]
    futures = [Asked(0, steps=3).submit(sampler, progress=progress), *(one.submit(sampler) for one in others)]
    with pytest.raises(KeyboardInterrupt):
        to_its_end(sampler)
    to_its_end(sampler)
    assert isinstance(futures[0].exception(0), KeyboardInterrupt)
    for one, future in zip(others, futures[1:], strict=True):
        assert torch.equal(future.result(0), one.plain(Net(), 3))
    assert sampler.counts.occupied == 3 + 5 + at


def test_ctrl_c_while_a_slot_is_filled(monkeypatch):
    fill, sampler, other = SlotsFill(), made(background=False), Asked(1, "unipc", 4)
    monkeypatch.setattr(Slots, "fill", fill)
    futures = [Asked(0, steps=3).submit(sampler), other.submit(sampler)]
    with pytest.raises(KeyboardInterrupt):
        sampler.step()
    to_its_end(sampler)
    assert isinstance(futures[0].exception(0), KeyboardInterrupt)
    assert torch.equal(futures[1].result(0), other.plain(Net(), 2))


class SlotsFill:
    """`Slots.fill`, interrupted half way the first time."""

    def __init__(self):
        self.fill, self.first = Slots.fill, True

    def __get__(self, slots, _):
        def fill(*given):
            self.fill(slots, *given)
            if self.first:
                self.first = False
                slots._x.fill_(torch.nan)
                raise KeyboardInterrupt

        return fill


def test_who_awaits_is_told_of_a_stop_iteration():
    """An asyncio future can't have one: it would never be done."""

    async def main():
        with made() as sampler:
            future = Asked(0).submit(sampler, progress=lambda *_: next(iter(())))
            with pytest.raises(RuntimeError, match="raised StopIteration") as error:
                await asyncio.wait_for(asyncio.wrap_future(future), WAIT)
            assert isinstance(error.value.__cause__, StopIteration)

    asyncio.run(main())


# --- threads and processes --------------------------------------------------------------------------------------------


def test_a_thread_that_does_not_start_is_started_by_the_next_submit(monkeypatch):
    def no_more(_):
        raise RuntimeError("can't start new thread")

    sampler = made()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            Asked(0).submit(sampler)
    assert sampler.counts.submitted == sampler.counts.pending == 0
    assert Asked(1).submit(sampler).result(WAIT).shape == SHAPE
    sampler.close()


def test_close_of_a_sampler_whose_thread_did_not_start(monkeypatch):
    sampler = made()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Asked(0).submit(sampler)
    sampler.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_the_process_is_told_that_there_is_no_thread():
    """Its parent's thread is not there, and who held the lock at that moment never gives it back."""
    sampler = made()
    Asked(0).submit(sampler).result(WAIT)
    held, release = threading.Event(), threading.Event()

    def hold():
        with sampler._loop._lock:
            held.set()
            release.wait(WAIT)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(WAIT)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            sampler.counts  # noqa: B018
            Asked(1).submit(sampler)
        except FastDDPMError as error:
            sampler.close()
            code = 0 if "make a new one" in str(error) else 2
        finally:
            os._exit(code)
    release.set()
    thread.join()
    end = time.monotonic() + WAIT
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if done == (0, 0):
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert done == (child, 0)
    assert Asked(1).submit(sampler).result(WAIT).shape == SHAPE  # the parent's goes on
    sampler.close()


def test_a_callback_of_a_loop_that_broke_may_close(monkeypatch, caplog):
    monkeypatch.setattr(Slots, "take", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    sampler = made()
    future = Asked(0, steps=50).submit(sampler)
    future.add_done_callback(lambda _: sampler.close())
    assert isinstance(future.exception(WAIT), ZeroDivisionError)
    sampler._loop._thread.join(WAIT)
    assert not caplog.records  # "exception calling callback"


def test_room_for_one_wakes_one_of_those_who_wait(monkeypatch):
    woken, loop = [], Loop([None], 1, False)
    wait_for = threading.Condition.wait_for
    monkeypatch.setattr(
        threading.Condition,
        "wait_for",
        lambda self, true, timeout=None: wait_for(self, lambda: woken.append(self) or true(), timeout),
    )
    loop._background, loop._start = True, lambda: None
    loop.put(request(), None)
    threads = [threading.Thread(target=loop.put, args=(request(), None)) for _ in range(40)]
    for count, thread in enumerate(threads, start=1):
        thread.start()
        while len(loop._waiting) < count:
            time.sleep(1e-3)
    woken.clear()
    for _ in threads:
        with loop._lock:
            loop._queue.popitem(last=False)
            loop._wake()
        while not loop._queue:
            time.sleep(1e-3)
    for thread in threads:
        thread.join(WAIT)
    assert len(woken) <= 4 * len(threads)  # and not the square of it


# --- very many --------------------------------------------------------------------------------------------------------


def request():
    return Request(Future(), SimpleNamespace(), 0, None, 1)


def test_twenty_thousand_in_the_queue_are_cancelled_at_once():
    loop, asked = Loop([None], 10**5, False), [request() for _ in range(20000)]
    for one in asked:
        loop.put(one, None)
    start = time.process_time()
    for one in reversed(asked):
        assert one.future.cancel()
    assert time.process_time() - start < 2
    assert not loop._queue
    assert loop._counts.cancelled == len(asked)


def test_room_among_twenty_thousand_tables_is_found_at_once():
    tables, like = TableRows(1 << 16, CPU), Program.of(solvers.ddim(SCHEDULE, 2), CPU)
    programs = [Program(like.table, like.rows, str(i).encode(), like.needs) for i in range(20000)]
    random.Random(0).shuffle(programs)
    start = time.process_time()
    for one in programs:
        assert tables.acquire(one) is not None
    for one in random.Random(1).sample(programs, len(programs)):
        tables.release(one)
        tables.acquire(one)
        tables.release(one)
    long = Program.of(solvers.ddpm(SCHEDULE), CPU)
    for i in range(100):
        assert tables.acquire(Program(long.table, long.rows, b"long %d" % i, long.needs)) is not None
    assert time.process_time() - start < 10


# --- the host and the device ------------------------------------------------------------------------------------------


def test_the_host_is_two_steps_ahead_of_the_device_and_no_more(monkeypatch):
    """Else all of a sample's steps were launched at once, and who comes then waited for them beside empty slots."""
    marks, reached, seen = [], [], []

    def mark(device):
        number = len(marks)
        marks.append(SimpleNamespace(synchronize=lambda: reached.append(number)))
        return marks[-1]

    monkeypatch.setattr(_slots, "mark", mark)
    net = Net()
    sampler = made(lambda x, t: seen.append(len(marks) - len(reached)) or net(x, t), background=False)
    drained(sampler, Asked(0, steps=6))
    assert reached == [0, 1, 2, 3]  # in their order
    assert seen == [0, 1, 2, 2, 2, 2]  # launched and perhaps not done, when the next is launched


def test_what_was_made_on_another_stream_is_waited_for(monkeypatch):
    waited = []
    stream = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(inflight, "mark", lambda device: f"mark {len(waited)}")
    one = Asked(0, x_T=torch.ones(SHAPE))
    assert torch.equal(drained(made(background=False), one)[0], one.plain(Net(), 2))
    assert waited == ["mark 0"]


# --- the user's settings, and what is the user's ----------------------------------------------------------------------


def test_it_is_made_in_inference_mode_with_arguments():
    given = dict(model_kwargs={"class_labels": 0}, unconditional_kwargs={"class_labels": NONE})
    one = Asked(3, steps=3, label=2, weight=2.0)
    with torch.inference_mode():
        sampler = made(background=False, **given)
        drained(sampler, one)
    assert torch.equal(drained(sampler, one)[0], one.plain(Net(), 2, guided=True))


def test_the_default_dtype_changes_nothing():
    net, one = Net(), Asked(3, "unipc", 4, label=2, weight=2.0, x_T=torch.ones(SHAPE))

    def model(x, t, class_labels):
        return net(x, t.float(), class_labels)  # a whole number times 0.01 is of the default dtype

    given = dict(model_kwargs={"class_labels": 0}, unconditional_kwargs={"class_labels": NONE})
    expected = one.plain(model, 2, guided=True)
    torch.set_default_dtype(torch.float64)
    try:
        result = drained(made(model, background=False, **given), one)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


def test_defaults_that_the_caller_changes_later_are_as_they_were():
    def model(x, t, cond, scale):
        return x * cond["y"][:, None, None, None] * scale[:, None, None, None]

    cond = {"y": torch.tensor(0.1)}
    sampler = made(
        model, background=False, model_kwargs={"cond": cond, "scale": 1.0}, unconditional_kwargs={"scale": 2}
    )

    def sample(**given):
        future = sampler.submit(seed=0, solver="ddim", steps=3, **given)
        to_its_end(sampler)
        return future.result(0)

    before = sample()
    cond["y"] += 5
    cond["z"] = torch.zeros(())
    assert torch.equal(sample(model_kwargs={"scale": 1}), before)
    assert torch.equal(sample(), before)


@pytest.mark.parametrize("label", [2**63, -(2**63) - 1, 2**64])
def test_an_integer_that_is_too_large(label):
    with pytest.raises(InputError, match=r"model_kwargs hold -?\d+; allowed: integers of 64 bits"):
        made(background=False, model_kwargs={"class_labels": 0}).submit(seed=0, model_kwargs={"class_labels": label})
    with pytest.raises(InputError, match="integers of 64 bits"):
        made(background=False, model_kwargs={"class_labels": label})


def test_a_model_that_returns_its_input_or_writes_to_it():
    one, futures = Asked(1, "unipc", 5), []
    for model in (lambda x, t: x, lambda x, t: x.clone(), lambda x, t: x.mul_(1.0)):
        sampler = made(model, background=False, slots=3)
        Asked(0, "ddpm", 3).submit(sampler)
        sampler.step()
        futures.append(one.submit(sampler))
        to_its_end(sampler)
    first, *others = (future.result(0) for future in futures)
    assert all(torch.equal(first, other) for other in others)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

PRELUDE = """
import time, torch
from inflight import KINDS, SCHEDULE, SHAPE, Asked, Net
from fastddpm import InflightSampler, NoiseSchedule
net = Net().cuda()
def slow(x, t, **given):
    torch.cuda._sleep(10**6)  # half a millisecond
    return net(x, t, **given)
"""

ON_GPU = {
    "who_comes_joins_a_batch_under_way": """
        order = []
        with InflightSampler(slow, SHAPE, slots=4, schedule=SCHEDULE) as sampler:
            sampler.submit(seed=0, solver="ddpm", steps=2).result(100)
            long = [Asked(i, "ddpm", 100).submit(sampler) for i in range(2)]
            short = Asked(2, "ddpm", 5).submit(sampler)
            for name, future in (("long", long[0]), ("long", long[1]), ("short", short)):
                future.add_done_callback(lambda _, name=name: order.append(name))
        assert order == ["short", "long", "long"], order
        assert sampler.counts.steps < 2 + 100 + 50, sampler.counts
    """,
    "submit_waits_for_no_step": """
        def model(x, t, class_labels):
            torch.cuda._sleep(10**8)  # 50 ms
            return net(x, t, class_labels)
        with InflightSampler(model, SHAPE, slots=1, schedule=SCHEDULE, max_pending=99,
                             model_kwargs={"class_labels": 0}) as sampler:
            Asked(0, "ddim", 2, label=1).submit(sampler).result(100)
            first = Asked(0, "ddim", 20, label=1).submit(sampler)
            start = time.monotonic()
            others = [Asked(i, "ddim", 20, label=2, x_T=torch.ones(SHAPE)).submit(sampler) for i in range(20)]
            assert time.monotonic() - start < 0.5
            for future in [first, *others]: future.cancel()
    """,
    "submitted_on_another_stream": """
        side, futures = torch.cuda.Stream(), []
        asked = [Asked(i, "unipc", 6, label=i % 5, x_T=torch.full(SHAPE, 0.1 * i)) for i in range(12)]
        with InflightSampler(slow, SHAPE, slots=3, schedule=SCHEDULE, model_kwargs={"class_labels": 0},
                             max_pending=20) as sampler, torch.cuda.stream(side):
            for one in asked:
                torch.cuda._sleep(10**6)
                label, x_T = torch.zeros((), dtype=torch.int64, device="cuda") + one.label, one.x_T.to("cuda") + 0
                futures.append(sampler.submit(seed=one.seed, solver="unipc", steps=6, x_T=x_T,
                                              model_kwargs={"class_labels": label}))
                del x_T, label
                waste = [torch.full(SHAPE, float("nan"), device="cuda"), torch.full((), 1 << 40, device="cuda")]
                if one.seed % 3 == 2: futures[-1].cancel()
            for one, future in zip(asked, futures):
                assert future.cancelled() or torch.equal(future.result(100), one.plain(net, 3))
    """,
    "a_step_that_can_do_more": """
        for order in (KINDS, KINDS[::-1]):
            for graph in (True, False):
                sampler = InflightSampler(net, SHAPE, slots=len(KINDS), schedule=SCHEDULE, background=False,
                                          model_kwargs={"class_labels": 0}, graph=graph)
                futures = []
                asked = [Asked(i, solver, 11, options, label=1) for i, (solver, options) in enumerate(order)]
                for one in asked:
                    futures.append(one.submit(sampler))
                    sampler.step()
                while sampler.step(): pass
                for one, future in zip(asked, futures):
                    assert torch.equal(future.result(0), one.plain(net, len(KINDS))), one
    """,
    "new_weights_when_a_request_joins": """
        one, last = Asked(0, "ddpm", 5), net.last
        with InflightSampler(net, SHAPE, slots=4, schedule=SCHEDULE, graph=True) as sampler:
            for change in (lambda: None, lambda: last.weight.mul_(0.5), lambda: net.double().float(), net.train,
                           lambda: setattr(last.weight, "data", 0.5 * last.weight.data)):
                change()
                assert torch.equal(one.submit(sampler).result(100), one.plain(net))
    """,
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_GPU)
def test_on_a_gpu(name):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    code, environment = PRELUDE + textwrap.dedent(ON_GPU[name]), {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("name", ON_GPU)
def test_the_code_for_a_gpu_is_right_as_far_as_a_cpu_can_say(name):
    exec(compile(on_the_cpu(PRELUDE + textwrap.dedent(ON_GPU[name])), name, "exec"), {"NoCuda": NoCuda})

"""`InflightSampler`'s requests: queue, order, cancelling, progress, errors, closing; in a thread and without one."""

import asyncio
import concurrent.futures
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections import deque

import pytest
import torch
from inflight import SCHEDULE, SHAPE, Asked, Net, drained
from test_graphs import ROOT

import fastddpm
from fastddpm import InflightSampler
from fastddpm._slots import Slots, Taken
from fastddpm.errors import BusyError, FastDDPMError, InputError

WAIT = 30  # seconds that nothing here takes


def made(model=None, *, slots=2, **given):
    return InflightSampler(model or Net(), SHAPE, slots=slots, **{"schedule": SCHEDULE, **given})


class Gated(Net):
    """A model that waits for a permit before each call."""

    def __init__(self, permits=0):
        super().__init__()
        self.permits, self.entered = threading.Semaphore(permits), threading.Semaphore(0)

    def forward(self, x, t):
        self.entered.release()
        assert self.permits.acquire(timeout=WAIT)
        return super().forward(x, t)


def until(true):
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(1e-3)


def test_the_public_name_is_there():
    assert fastddpm.InflightSampler is InflightSampler
    assert "InflightSampler" in fastddpm.__all__


def test_it_awaits():
    asked = [Asked(i, "ddim", 3 + i % 5) for i in range(12)]

    async def main(sampler):
        async def one(request):
            return await asyncio.wrap_future(request.submit(sampler))

        return await asyncio.wait_for(asyncio.gather(*map(one, asked)), WAIT)

    with made(max_pending=20) as sampler:
        results = asyncio.run(main(sampler))
    for one, result in zip(asked, results, strict=True):
        assert torch.equal(result, one.plain(Net(), 2))


def test_a_cancelled_task_leaves_the_batch():
    model = Gated()

    async def main(sampler):
        task = asyncio.ensure_future(asyncio.wrap_future(Asked(0, steps=50).submit(sampler)))
        await asyncio.to_thread(model.entered.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.permits.release(1000)

    with made(model) as sampler:
        asyncio.run(main(sampler))
        until(lambda: sampler.counts.cancelled == 1)
    assert sampler.counts.steps == 1


def test_first_come_first_served():
    done = []
    sampler = made(slots=1, background=False, max_pending=50)
    for i in range(20):
        Asked(i, steps=1 + i % 4).submit(sampler).add_done_callback(lambda _, i=i: done.append(i))
    while sampler.step():
        pass
    assert done == list(range(20))


def test_submitters_that_wait_for_room_come_in_their_order():
    model, order = Gated(), []
    with made(model, slots=1, max_pending=1) as sampler:
        first = Asked(0, steps=1).submit(sampler)
        assert model.entered.acquire(timeout=WAIT)
        second = Asked(1, steps=1).submit(sampler)

        def late(i):
            Asked(i, steps=1).submit(sampler).add_done_callback(lambda _: order.append(i))

        threads = []
        for i in range(2, 10):
            threads.append(threading.Thread(target=late, args=(i,)))
            threads[-1].start()
            until(lambda i=i: len(sampler._loop._waiting) == i - 1)
        model.permits.release(100)
        for thread in threads:
            thread.join(WAIT)
        first.result(WAIT)
        second.result(WAIT)
    assert order == list(range(2, 10))


def test_a_full_queue():
    model = Gated()
    with made(model, slots=1, max_pending=2) as sampler:
        futures = [Asked(0, steps=1).submit(sampler)]
        assert model.entered.acquire(timeout=WAIT)
        futures += [Asked(i, steps=1).submit(sampler) for i in (1, 2)]
        for timeout in (0, 0.01):
            with pytest.raises(
                BusyError, match=r"the queue is full: 2 requests \(max_pending\) wait for one of 1 slot"
            ):
                Asked(3).submit(sampler, timeout=timeout)
        assert issubclass(BusyError, TimeoutError)
        assert futures[1].cancel()  # makes room at once
        assert sampler.counts.pending == 1
        futures.append(Asked(4, steps=1).submit(sampler, timeout=0))
        assert sampler.counts.submitted == 4
        model.permits.release(100)
        for i in (0, 2, 3):
            futures[i].result(WAIT)
    assert sampler.counts.cancelled == 1
    assert sampler.counts.finished == 3


def test_nobody_waits_without_a_thread():
    sampler = made(background=False, max_pending=1)
    first = Asked(0).submit(sampler)
    with pytest.raises(BusyError):
        Asked(1).submit(sampler)
    sampler.step()
    second = Asked(1).submit(sampler)
    sampler.close()
    assert torch.equal(first.result(0), Asked(0).plain(Net(), 2))
    assert torch.equal(second.result(0), Asked(1).plain(Net(), 2))


def test_a_running_request_is_cancelled_and_its_slot_is_free_at_the_next_step():
    sampler = made(slots=1, background=False)
    first, second = Asked(0, "unipc", 30).submit(sampler), Asked(1, "unipc", 4).submit(sampler)
    for _ in range(3):
        sampler.step()
    assert first.cancel()
    assert first.cancelled()
    while sampler.step():
        pass
    assert torch.equal(second.result(0), Asked(1, "unipc", 4).plain(Net(), 1))
    counts = sampler.counts
    assert (counts.steps, counts.occupied, counts.finished, counts.cancelled) == (7, 7, 1, 1)
    with pytest.raises(concurrent.futures.CancelledError):
        first.result(0)
    assert concurrent.futures.wait([first, second], timeout=0).not_done == set()  # who waits was told


def test_a_request_that_is_done_can_not_be_cancelled():
    with made() as sampler:
        future = Asked(0).submit(sampler)
        future.result(WAIT)
        assert not future.cancel()


def test_cancelling_from_all_sides_loses_nobody():
    with made(Net(), max_pending=300) as sampler:
        futures = [Asked(i, steps=2 + i % 6).submit(sampler) for i in range(200)]
        threads = [
            threading.Thread(target=lambda part=futures[k::3]: [f.cancel() for f in part[::2]]) for k in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert concurrent.futures.wait(futures, timeout=WAIT).not_done == set()
    counts = sampler.counts
    assert (counts.finished, counts.cancelled) == (
        sum(not f.cancelled() for f in futures),
        sum(f.cancelled() for f in futures),
    )
    assert counts.failed == counts.pending == counts.running == 0
    for i, future in enumerate(futures[:20]):
        if not future.cancelled():
            assert torch.equal(future.result(), Asked(i, steps=2 + i % 6).plain(Net(), 2))


def test_progress_is_each_requests_own():
    told, threads = {}, set()

    def listener(name):
        def progress(*at):
            told.setdefault(name, []).append(at)
            threads.add(threading.current_thread().name)

        return progress

    with made() as sampler:
        for i, steps in enumerate((3, 5, 2)):
            Asked(i, steps=steps).submit(sampler, progress=listener(i))
    assert told == {i: [(k, n) for k in range(1, n + 1)] for i, n in enumerate((3, 5, 2))}
    assert threads == {"fastddpm in-flight loop"}


def test_an_error_in_progress_fails_that_request_alone():
    def progress(step, steps):
        if step == 2:
            raise KeyError("mine")

    sampler = made(slots=2, background=False)
    bad, good = Asked(0, steps=6).submit(sampler, progress=progress), Asked(1, steps=6).submit(sampler)
    third = Asked(2, steps=3).submit(sampler)
    while sampler.step():
        pass
    with pytest.raises(KeyError, match="mine"):
        bad.result(0)
    assert torch.equal(good.result(0), Asked(1, steps=6).plain(Net(), 2))
    assert torch.equal(third.result(0), Asked(2, steps=3).plain(Net(), 2))
    assert (sampler.counts.steps, sampler.counts.failed) == (6, 1)


class Failing(Net):
    """Raises at one call."""

    def __init__(self, at, error):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x, t):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return super().forward(x, t)


@pytest.mark.parametrize("background", [True, False])
def test_a_model_that_raises_fails_those_in_the_batch_and_the_others_have_their_turn(background):
    error = ValueError("the model's")
    with made(Failing(3, error), background=background, max_pending=20) as sampler:
        futures = [Asked(i, "unipc", 5).submit(sampler) for i in range(6)]
    assert [future.exception(0) for future in futures[:2]] == [error, error]
    for i, future in enumerate(futures[2:], start=2):
        assert torch.equal(future.result(0), Asked(i, "unipc", 5).plain(Net(), 2))
    assert (sampler.counts.failed, sampler.counts.finished) == (2, 4)


def test_a_model_whose_output_is_no_sample():
    with made(lambda x, t: x[:, :1]) as sampler, pytest.raises(InputError, match="the model returned shape"):
        Asked(0).submit(sampler).result(WAIT)


def test_what_is_no_exception_is_raised_where_step_is_called():
    sampler = made(Failing(2, KeyboardInterrupt()), background=False)
    future, later = Asked(0).submit(sampler), [Asked(i, steps=2) for i in (1, 2)]
    sampler.step()
    with pytest.raises(KeyboardInterrupt):
        sampler.step()
    assert isinstance(future.exception(0), KeyboardInterrupt)
    for one, result in zip(later, drained(sampler, *later), strict=True):
        assert torch.equal(result, one.plain(Net(), 2))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loop_that_breaks_leaves_nobody_waiting(monkeypatch):
    def broken(slots, slot):
        raise RuntimeError("broken")

    monkeypatch.setattr(Slots, "take", broken)
    model = Gated()
    sampler = made(model, max_pending=20)
    futures = [Asked(i, steps=1 + i).submit(sampler) for i in range(6)]
    model.permits.release(100)
    for future in futures:
        with pytest.raises(RuntimeError, match="broken"):
            future.result(WAIT)
    with pytest.raises(FastDDPMError, match="closed"):
        Asked(0).submit(sampler)
    sampler.close()


# --- results that the device is not done with -------------------------------------------------------------------------


class Late:
    """An event that is over after so many questions."""

    def __init__(self, questions):
        self.left, self.waited = questions, False

    def query(self):
        self.left -= 1
        return self.left < 0

    def synchronize(self):
        self.left, self.waited = 0, True


def test_the_loop_goes_on_while_the_device_copies(monkeypatch):
    take, events = Slots.take, []

    def late(slots, slot):
        taken = take(slots, slot)
        events.append(Late(3))
        return Taken(taken.sample, taken.verdict, events[-1])

    monkeypatch.setattr(Slots, "take", late)
    sampler, log = made(slots=1, background=False), []
    futures = [Asked(i, steps=2).submit(sampler) for i in range(4)]
    while sampler.step():
        log.append([future.done() for future in futures].count(True))
    assert sampler.counts.steps == 8  # no step was waited for
    assert log == [0, 0, 0, 0, 1, 1, 1]  # the first was taken at step 2 and asked for at steps 2, 3, 4, 5
    assert [event.waited for event in events] == [False, True, True, True]  # when there was nothing else to do
    for i, future in enumerate(futures):
        assert torch.equal(future.result(0), Asked(i, steps=2).plain(Net(), 1))


def test_a_result_is_the_callers_own():
    with made(slots=1) as sampler:
        first = Asked(0).submit(sampler).result(WAIT)
        kept = first.clone()
        first.zero_()
        again = Asked(0).submit(sampler).result(WAIT)
        Asked(1).submit(sampler).result(WAIT)
    assert torch.equal(again, kept)
    assert not first.any()
    assert again.untyped_storage().nbytes() == again.nbytes
    assert not again.requires_grad


def test_it_works_in_the_submitters_inference_mode():
    with torch.inference_mode():
        sampler = made()
        x_T = torch.ones(SHAPE)
        first = sampler.submit(seed=0, solver="ddim", steps=4, x_T=x_T)
        first.result(WAIT)
    again = sampler.submit(seed=0, solver="ddim", steps=4, x_T=torch.ones(SHAPE))
    assert torch.equal(again.result(WAIT), first.result())
    assert not first.result().is_inference()
    sampler.close()


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_close_finishes_what_there_is(background):
    sampler = made(background=background, max_pending=9)
    futures = [Asked(i).submit(sampler) for i in range(6)]
    sampler.close()
    assert all(future.done() and not future.cancelled() for future in futures)
    for _ in range(2):
        sampler.close()
    with pytest.raises(FastDDPMError, match="the in-flight sampler is closed; make a new one"):
        Asked(0).submit(sampler)


@pytest.mark.parametrize("background", [True, False])
def test_close_can_cancel(background):
    model = Gated(1000)
    sampler = made(model, background=background, max_pending=9)
    futures = [Asked(i, steps=80).submit(sampler) for i in range(6)]
    if background:
        model.entered.acquire(timeout=WAIT)
    else:
        sampler.step()
    sampler.close(cancel=True)
    assert all(future.cancelled() for future in futures)
    assert sampler.counts.cancelled == 6
    assert concurrent.futures.wait(futures, timeout=0).not_done == set()


def test_an_exception_in_the_with_block_cancels():
    futures = []

    def block():
        with made(background=False) as sampler:
            futures.append(Asked(0).submit(sampler))
            raise KeyError

    with pytest.raises(KeyError):
        block()
    assert futures[0].cancelled()


def test_close_wakes_who_waits_for_room():
    model, errors = Gated(), deque()
    sampler = made(model, slots=1, max_pending=1)
    running = Asked(0, steps=1).submit(sampler)
    model.entered.acquire(timeout=WAIT)
    queued = Asked(1, steps=1).submit(sampler)

    def late():
        try:
            Asked(2).submit(sampler)
        except FastDDPMError as error:
            errors.append(str(error))

    thread = threading.Thread(target=late)
    thread.start()
    until(lambda: sampler._loop._waiting)
    sampler.close(wait=False)
    thread.join(WAIT)
    assert list(errors) == ["the in-flight sampler is closed; make a new one"]
    model.permits.release(10)
    running.result(WAIT)
    queued.result(WAIT)  # what was accepted is finished


def test_what_a_step_calls_can_not_wait_for_the_loop():
    """In `progress` and in a done-callback: submit does not block, close does not join, step refuses."""
    caught, inner = [], []
    sampler = made(slots=1, max_pending=1)

    def callback(_):
        inner.append(Asked(5).submit(sampler))
        with pytest.raises(BusyError) as error:
            Asked(6).submit(sampler)
        caught.append(error.value)
        sampler.close()

    future = Asked(0, steps=2).submit(sampler)
    future.add_done_callback(callback)
    future.result(WAIT)
    until(lambda: inner)
    assert torch.equal(inner[0].result(WAIT), Asked(5).plain(Net(), 1))
    assert len(caught) == 1
    sampler.close()

    sampler = made(background=False)
    future = Asked(0, steps=2).submit(sampler, progress=lambda *_: sampler.step())
    sampler.step()
    with pytest.raises(FastDDPMError, match="a step is under way"):
        future.result(0)


def test_step_is_for_samplers_without_a_thread():
    with made() as sampler, pytest.raises(InputError, match="background=False"):
        sampler.step()
    assert not made(background=False).step()


def test_a_sampler_that_is_collected_finishes_and_its_thread_ends():
    model = Gated()
    sampler = made(model, max_pending=9)
    futures = [Asked(i, steps=2).submit(sampler) for i in range(3)]
    thread, gone = sampler._loop._thread, weakref.ref(sampler)
    del sampler
    gc.collect()
    assert gone() is None
    model.permits.release(100)
    for future in futures:
        future.result(WAIT)
    thread.join(WAIT)
    assert not thread.is_alive()


def test_a_future_does_not_keep_the_model():
    model = Net()
    sampler, gone = made(model, background=False), weakref.ref(model)
    future = Asked(0).submit(sampler)
    sampler.close()
    del sampler, model
    gc.collect()
    assert gone() is None
    assert future.done()


def test_a_sampler_without_a_thread_that_is_collected_cancels():
    sampler = made(background=False)
    future = Asked(0).submit(sampler)
    del sampler
    gc.collect()
    assert future.cancelled()


def test_python_can_exit_while_requests_run():
    code = (
        "import torch, fastddpm\n"
        "s = fastddpm.InflightSampler(lambda x, t: 0.1 * x, (1, 64, 64), slots=4, max_pending=50)\n"
        "futures = [s.submit(seed=i, solver='ddpm') for i in range(40)]\n"
        "print('end')"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_two_samplers_at_once():
    with made() as one, made(slots=3) as other:
        futures = [(Asked(i).submit(one), Asked(i).submit(other)) for i in range(4)]
        for i, pair in enumerate(futures):
            for future, slots in zip(pair, (2, 3), strict=True):
                assert torch.equal(future.result(WAIT), Asked(i).plain(Net(), slots))

"""The host side of `InflightSampler`: the queue, the thread, and which request is in which slot."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import OrderedDict, deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice

from torch import Tensor

from ._requests import Counts, Request, not_finite
from ._slots import Slots, Taken
from .errors import BusyError, FastDDPMError


class Loop:
    """Fills free slots from the queue, does a step, hands out what is finished; in a thread, or where `step` is called.

    The thread holds this object and not the `InflightSampler`, which can thus be collected while it waits.
    """

    def __init__(self, slots: Slots, max_pending: int, background: bool) -> None:
        self._slots, self._max_pending, self._background = slots, max_pending, background
        self._lock = threading.RLock()  # of all that submitters see: what stands before the empty line
        self._come = threading.Condition(self._lock)  # where the thread waits for requests
        self._queue: OrderedDict[Future[Tensor], Request] = OrderedDict()
        self._waiting: deque[threading.Condition] = deque()  # submitters, in their order
        self._closed = False
        self._look = False  # whether a request in the batch was cancelled
        self._thread: threading.Thread | None = None
        self._counts = Counts()

        self._stepping = threading.Lock()  # of the rest
        self._stepper: threading.Thread | None = None
        self._running: dict[int, Request] = {}  # by slot
        self._left: set[int] = set()  # slots with what is left of a sample in them
        self._taken: deque[tuple[Request, Taken]] = deque()

    # --- in the submitter's thread ------------------------------------------------------------------------------------

    def put(self, request: Request, timeout: float | None) -> None:
        """Queue a request, when there is room for it, and start the thread."""
        if not self._background or self._in_a_step():
            timeout = 0  # nobody else would make room
        ticket = threading.Condition(self._lock)  # its own: room for one wakes one
        with self._lock:
            self._waiting.append(ticket)
            try:
                if not ticket.wait_for(lambda: self._closed or self._turn_of(ticket), timeout):
                    raise BusyError(
                        f"the queue is full: {len(self._queue)} requests (max_pending) wait for one of "
                        f"{len(self._slots)} slots; submit later, with a longer timeout, or raise max_pending"
                    )
                self.check_open()
                self._start()
                self._queue[request.future] = request
                self._counts.submitted += 1
            finally:
                self._waiting.remove(ticket)
                self._wake()
        loop = weakref.ref(self)  # a future is kept by its user: it may not keep the model

        def forget(future: Future[Tensor]) -> None:
            if (there := loop()) is not None:
                there._forget(future)

        request.future.add_done_callback(forget)

    def _start(self) -> None:
        """Start the thread, where there is to be one; raises what `Thread.start` raises, and may be called again."""
        if self._background and self._thread is None:
            thread = threading.Thread(target=self._work, name="fastddpm in-flight loop", daemon=True)
            thread.start()
            self._thread = thread
            _LOOPS.add(self)

    def _wake(self) -> None:
        """The queue has changed: wake the thread, and the first who waits for room; all of them when it is closed."""
        self._come.notify()
        for ticket in islice(self._waiting, None if self._closed else 1):
            ticket.notify()

    def _in_a_step(self) -> bool:
        """Whether this is called by what a step calls, or the thread: the model, `progress`, a future's callback."""
        return threading.current_thread() in (self._stepper, self._thread)

    def _turn_of(self, ticket: object) -> bool:
        return self._waiting[0] is ticket and len(self._queue) < self._max_pending

    def check_open(self) -> None:
        """Raises `FastDDPMError` after `close`."""
        if self._closed:
            raise FastDDPMError("the in-flight sampler is closed; make a new one")

    def _forget(self, future: Future[Tensor]) -> None:
        """A request that was cancelled in the queue makes room at once; for one in the batch the next step looks."""
        if not future.cancelled():
            return
        with self._lock:
            found = self._queue.pop(future, None)
            if found is None:
                self._look = True
                return
            self._wake()
        self._owns(found)

    def counts(self) -> Counts:
        """As they are now."""
        with self._lock:
            now = dict(pending=len(self._queue), running=len(self._running), uploads=self._slots.tables.uploads)
            return replace(self._counts, **now)

    def close(self, wait: bool = True, cancel: bool = False) -> None:
        """No more requests; those there are finished, or cancelled."""
        with self._lock:
            self._closed = True
            self._wake()
            there = [*self._queue.values(), *self._running.values()] if cancel else []
        for request in there:
            request.future.cancel()
        if not wait or self._in_a_step():
            return
        if self._thread is not None:
            self._thread.join()
        elif not self._background:
            while self.step():
                pass
        self._slots.forget()

    def forked(self) -> None:
        """In a child of a process: the thread is not there, nor who held a lock; the requests are the parent's."""
        self._lock = threading.RLock()
        self._come = threading.Condition(self._lock)
        self._closed, self._thread, self._stepper = True, None, None
        for there in (self._queue, self._waiting, self._running, self._taken):
            there.clear()

    # --- in the loop's thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            with self._slots.context():
                while True:
                    with self._lock:
                        self._come.wait_for(lambda: self._queue or self._closed)
                        if not self._queue:
                            return
                    while self._step():
                        pass
        except BaseException as error:  # of ours, or an exit: nobody may wait for a loop that is gone
            with self._lock:
                self._closed = True
                there = [*self._queue.values(), *self._running.values(), *(request for request, _ in self._taken)]
                self._queue.clear()
                self._running.clear()
                self._taken.clear()
                self._wake()
            for request in there:
                self._fail(request, error)
            raise

    def step(self) -> bool:
        """One step of the batch; whether there is more to do."""
        if self._in_a_step():
            raise FastDDPMError("a step is under way, and it is this one that calls step")
        with self._stepping, self._slots.context():
            return self._step()

    def _step(self) -> bool:
        self._stepper = threading.current_thread()
        try:
            self._join()
            if self._running:
                self._evaluate()
            self._hand_out(wait=not (self._running or self._queue))
        finally:
            self._stepper = None
        with self._lock:
            return bool(self._running or self._taken or self._queue)

    def _evaluate(self) -> None:
        try:
            self._slots.step()
        except BaseException as error:
            self._fail_all(error)
            if not isinstance(error, Exception):
                raise
        else:
            self._advance()

    def _join(self) -> None:
        """Those that were cancelled leave; the first in the queue get the free slots."""
        if self._look:
            self._look = False
            for slot, request in list(self._running.items()):
                if request.future.cancelled():
                    self._leave(slot)
                    self._owns(request)
        free = [slot for slot in range(len(self._slots)) if slot not in self._running]
        while free and self._queue and self._next(free[0]):
            if free[0] in self._running:
                del free[0]
        for slot in self._left:
            self._slots.empty(slot)
        self._left.clear()

    def _next(self, slot: int) -> bool:
        """Give the slot to the next request; False where there is none, or no room for its table yet."""
        with self._lock:
            if not self._queue:
                return False
            request = next(iter(self._queue.values()))
            first_row = self._slots.tables.acquire(request.start.program)
            if first_row is None:
                return False
            self._queue.popitem(last=False)
            self._running[slot] = request
            self._wake()
        if request.future.cancelled():  # just now
            self._leave(slot)
            self._owns(request)
            return True
        try:
            self._slots.fill(slot, request.start, first_row)
        except BaseException as error:  # Ctrl-C too: nobody may go on from a slot that was filled by half
            self._leave(slot)
            self._fail(request, error)
            if not isinstance(error, Exception):
                raise
        else:
            self._left.discard(slot)
        return True

    def _advance(self) -> None:
        """After a step: the host knows who is where, for it has counted."""
        with self._lock:
            self._counts.steps += 1
            self._counts.occupied += len(self._running)
        for request in self._running.values():  # all of them, before a `progress` can raise
            request.done += 1
        stop: BaseException | None = None
        for slot, request in list(self._running.items()):
            if request.progress is not None and not request.future.cancelled():
                try:
                    request.progress(request.done, request.rows)
                except BaseException as error:
                    self._leave(slot)
                    self._fail(request, error)
                    stop = stop if isinstance(error, Exception) else error
                    continue
            if request.done >= request.rows:  # greater, where Ctrl-C came between a step and this
                self._taken.append((request, self._slots.take(slot)))
                self._leave(slot)
        if stop is not None:
            raise stop

    def _leave(self, slot: int) -> None:
        with self._lock:
            request = self._running.pop(slot)
        self._slots.tables.release(request.start.program)
        self._left.add(slot)

    def _fail_all(self, error: BaseException) -> None:
        """A model that raises fails those who are in the batch; the others have their turn."""
        for slot, request in list(self._running.items()):
            self._leave(slot)
            self._fail(request, error)

    def _hand_out(self, wait: bool) -> None:
        """Resolve the futures of samples that the device is done with, in their order."""
        while self._taken:
            request, taken = self._taken[0]
            if wait:
                taken.wait()
            elif not taken.ready():
                return
            self._taken.popleft()
            step, bad = taken.verdict.tolist()
            if step or bad:
                self._fail(request, not_finite(request, step - 1 if step else request.rows - 1, taken.sample))
            elif self._owns(request):
                self._count("finished")
                request.future.set_result(taken.sample)

    # --- ends ---------------------------------------------------------------------------------------------------------

    def _owns(self, request: Request) -> bool:
        """Whether the future is still to be set; one that was cancelled tells those who wait for it."""
        if request.future.set_running_or_notify_cancel():
            return True
        self._count("cancelled")
        return False

    def _fail(self, request: Request, error: BaseException) -> None:
        if isinstance(error, StopIteration):  # no asyncio future can have it: who awaits would wait for ever
            cause, error = error, RuntimeError("the model, or progress, raised StopIteration")
            error.__cause__ = cause
        if self._owns(request):
            self._count("failed")
            request.future.set_exception(error)

    def _count(self, what: str) -> None:
        with self._lock:
            setattr(self._counts, what, getattr(self._counts, what) + 1)


_LOOPS: weakref.WeakSet[Loop] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """A thread that is in torch while the interpreter goes down brings the process down."""
    for loop in list(_LOOPS):
        loop.close(cancel=True)


def _in_a_child() -> None:
    for loop in list(_LOOPS):
        loop.forked()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_in_a_child)

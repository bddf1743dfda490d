"""The device side of `InflightSampler`: a batch whose every sample has a table, a step and a weight of its own."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastddpm_kernels import LoopStep
from fastddpm_kernels import columns as col
from torch import Tensor

from . import graphs
from ._slot_kwargs import SlotKwargs
from ._table_rows import Needs, Program, TableRows
from .buffers import initial_noise
from .errors import GraphCaptureError
from .models import memory_format_of, tensor_of
from .sampler import Sampler

AHEAD = 2  # steps that are launched and not done: with one the device would wait for the host's work on the next


def mark(device: torch.device) -> Any:
    """An event behind all that was launched on the current stream so far; None on a CPU, where all is done."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(blocking=True)  # who waits for it sleeps, and leaves the processor to submitters
    event.record(torch.cuda.current_stream(device))
    return event


@dataclass(frozen=True)
class Start:
    """What a sample begins with; its tensors are on the device or in pinned memory, and nobody else's.

    Attributes:
        program: its table.
        seed: its bits, as a signed number.
        x_T: [C, H, W], float32, or None: from the seed.
        weight: of guidance.
        kwargs: the rows of the model's keyword arguments, as `SlotKwargs.rows` makes them.
        made: an event: when the device has made its tensors.
    """

    program: Program
    seed: int
    x_T: Tensor | None
    weight: float
    kwargs: list[Tensor]
    made: Any  # torch.cuda.Event, or None


@dataclass(frozen=True)
class Taken:
    """A finished sample; `verdict` may be read when `ready` says so."""

    sample: Tensor  # [C, H, W]
    verdict: Tensor  # int32 [2], on the CPU: 1 + the first step that was not finite; whether the sample is not
    event: Any  # torch.cuda.Event, or None

    def ready(self) -> bool:
        """Whether the device is done with it."""
        return self.event is None or self.event.query()

    def wait(self) -> None:
        """Until it is."""
        if self.event is not None:
            self.event.synchronize()


class Slots:
    """`slots` samples at once, each at its own row; an empty slot stands at an identity row.

    Not safe for threads: one at a time.

    Args:
        like: a sampler of the model, which says dtype, memory format, device, and whether there is to be a graph.
        shape: of one sample.
        slots: how many.
        time_dtype: of the model's time input.
        kwargs: the model's keyword arguments.
        guided: whether the model is called with both halves.
        max_rows: how many rows all tables in use may have together.
    """

    def __init__(
        self,
        like: Sampler,
        shape: tuple[int, ...],
        slots: int,
        *,
        time_dtype: torch.dtype,
        kwargs: SlotKwargs,
        guided: bool,
        max_rows: int,
    ) -> None:
        self._like, self.device, self._kwargs = like, like._device(None), kwargs
        zeros = partial(torch.zeros, device=self.device)  # with dtypes: the default one is the user's
        whole, calls = (slots, *shape), (2 if guided else 1) * slots
        self._x = zeros(whole, dtype=torch.float32)
        self._model_input = torch.zeros(calls, *shape, dtype=like._model_dtype(), device=self.device).contiguous(
            memory_format=memory_format_of(like.model, whole)
        )
        self._t = zeros(calls, dtype=time_dtype)
        self._cursors = zeros((2, slots), dtype=torch.int32)
        self._seeds = zeros(slots, dtype=torch.int64)
        self._nonfinite = zeros(slots, dtype=torch.int32)
        self._weights = torch.ones(slots, dtype=torch.float32, device=self.device) if guided else None
        self._history: list[Tensor] = []
        self.tables = TableRows(max_rows, self.device)
        self._needs = Needs()
        self._loop_step = self._make_step()
        self._run: Callable[[], None] | None = None  # a step; None: to be made
        self._made_for: Hashable = None
        self._launched: deque[Any] = deque()  # events of the last steps

    def __len__(self) -> int:
        return len(self._x)

    def fill(self, slot: int, start: Start, first_row: int) -> None:
        """Let a sample begin in a slot. Raises `InputError` where the model has no learned variance to give."""
        self._grow(start.program.needs)
        self._notice_changes()
        self._receive(start)
        row, begin = start.program.rows[0], slice(slot, slot + 1)
        self._seeds[begin].fill_(start.seed)
        if start.x_T is not None:
            self._x[slot].copy_(start.x_T, non_blocking=True)
        else:
            drawn = initial_noise(self._seeds[begin], self._x.shape[1:], self._x.dtype)
            self._x[begin].copy_(start.program.table.init_noise_sigma * drawn)
        if self._weights is not None:
            self._weights[begin].fill_(start.weight)
        self._kwargs.fill(slot, start.kwargs)
        self._stand(slot, first_row, float(row[col.T]), float(row[col.C_IN]))

    def _receive(self, start: Start) -> None:
        """Wait, on this stream, for what was made on another one, which may not reuse its memory before."""
        if start.made is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(start.made)
            for tensor in (start.x_T, *start.kwargs):
                if tensor is not None and tensor.is_cuda:
                    tensor.record_stream(stream)

    def empty(self, slot: int) -> None:
        """Let a slot stand at the identity row, with nothing left in it that is not finite."""
        self._x[slot].zero_()
        self._stand(slot, TableRows.IDLE, 0.0, 1.0)

    def _stand(self, slot: int, row: int, t: float, c_in: float) -> None:
        self._loop_step.cursor[slot : slot + 1].fill_(row)
        self._nonfinite[slot : slot + 1].zero_()
        for h in self._history:
            h[slot].zero_()
        for half in self._model_input.split(len(self)):
            half[slot].copy_(c_in * self._x[slot])
        for times in self._t.split(len(self)):
            times[slot : slot + 1].fill_(t)

    def step(self) -> None:
        """Evaluate the model once, and apply each sample's row; then wait until the device is but `AHEAD` steps behind.

        Launches return at once. A loop that did not wait would have launched a sample's thousand steps before the
        device did the first, and who came then would have to wait for them all, beside empty slots.
        """
        if self._run is None:
            self._run = self._launcher()
        self._run()
        if (event := mark(self.device)) is not None:
            self._launched.append(event)
            if len(self._launched) > AHEAD:
                self._launched.popleft().synchronize()

    def forget(self) -> None:
        """Free the graph, and the memory that it holds; the next step is captured anew."""
        self._run = None
        self._launched.clear()

    def take(self, slot: int) -> Taken:
        """A copy of a slot's sample, and whether all was finite."""
        sample = self._x[slot].clone()
        found = torch.stack([self._nonfinite[slot], sample.isfinite().all().logical_not().int()])
        if self.device.type == "cpu":
            return Taken(sample, found, None)
        verdict = torch.empty(2, dtype=torch.int32, device="cpu", pin_memory=True)
        verdict.copy_(found, non_blocking=True)
        return Taken(sample, verdict, mark(self.device))

    @contextmanager
    def context(self) -> Iterator[None]:
        """In which all of this is to be called: no derivatives, no inference tensors, the device the current one."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            yield

    # --- the step: made anew when a table needs more ------------------------------------------------------------------

    def _output(self, learned: bool) -> Tensor:
        output = self._like.model(self._model_input, self._t, **self._kwargs.buffers)
        return tensor_of(output, self._model_input.shape, learned)

    def _eager(self) -> None:
        self._loop_step(self._output(self._needs.learned))

    def _grow(self, needs: Needs) -> None:
        wanted = self._needs.union(needs)
        if wanted == self._needs:
            return
        if wanted.learned and not self._needs.learned:
            self._output(learned=True)  # else it were every step that fails, and everyone's
        self._cursors[0].copy_(self._loop_step.cursor)
        self._needs, self._run = wanted, None
        self._history += [torch.zeros_like(self._x) for _ in range(wanted.history - len(self._history))]
        self._loop_step = self._make_step()

    def _make_step(self) -> LoopStep:
        options: dict[str, Any] = self._needs._asdict()
        del options["history"]
        options |= {f"h{k}": h for k, h in enumerate(self._history, start=1)}
        return LoopStep(
            self._x,
            self.tables.tensor,
            self._cursors,
            self._t,
            self._seeds,
            self._nonfinite,
            model_input=self._model_input,
            guidance=self._weights,
            **options,
        )

    def _notice_changes(self) -> None:
        """A graph is stale when the model has changed; looked for whenever a request joins, since it takes 0.4 ms."""
        if self._like._wants_graph(self.device):
            fingerprint = graphs.fingerprint(self._like.model)
            if fingerprint != self._made_for:
                self._made_for, self._run = fingerprint, None

    def _launcher(self) -> Callable[[], None]:
        if not self._like._wants_graph(self.device):
            return self._eager
        try:
            return self._captured()
        except GraphCaptureError as error:
            if self._like.graph is True:
                raise
            self._like._graph_refused = True
            warnings.warn(f"no CUDA graph: {error}; sampling goes on eagerly, slower", stacklevel=2)
            return self._eager

    def _captured(self) -> Callable[[], None]:
        """Capture a step. It is run a few times for that: what it does to the samples on their way is undone."""
        written = (self._x, self._model_input, self._t, self._cursors, self._nonfinite, *self._history)
        before = [v.clone() for v in written]

        def run(n: int) -> None:
            for _ in range(n):
                self._eager()
            if n % 2:
                self._loop_step.turn_back()  # every replay reads the same one of the two buffers of cursors

        try:
            return graphs.capture(run, self.device)[1]
        finally:
            for mine, was in zip(written, before, strict=True):
                mine.copy_(was)

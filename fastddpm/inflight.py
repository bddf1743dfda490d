"""`InflightSampler`: continuous batching. Requests join and leave a running batch, each at a step of its own."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import solvers
from ._inflight_loop import Loop
from ._requests import Counts, Progress, Request
from ._slot_kwargs import SlotKwargs, near
from ._slots import Slots, Start, mark
from ._table_rows import Program
from .errors import InputError
from .graphs import RecentlyUsed
from .sampler import GraphMode, Sampler
from .schedule import NoiseSchedule
from .seeds import check_seed, sample_seeds
from .solvers import StepTable, step_table

MAX_PROGRAMS = 64  # tables by (solver, steps, options) that are kept on the host
MAX_ROWS = 1 << 16  # of all tables on the device: 5 MB


class InflightSampler:
    """Samples one request at a time, many at once: each has its own solver, steps, seed, guidance and label.

        with InflightSampler(unet, (1, 32, 32), slots=8) as sampler:
            futures = [sampler.submit(seed=i, solver="ddim", steps=10 + i) for i in range(20)]
            pictures = [future.result() for future in futures]

    The model is always called with `slots` samples (twice as many with guidance). A request that has finished leaves
    its slot, and the next one in the queue begins there at the very next step, so that nobody waits for another's
    steps. What a request becomes does not depend, bit for bit, on who shares the batch, on its slot or on when it came:
    it is what ``Sampler(model, table, batch_size=slots).sample((slots, *shape), seeds=[seed] * slots)`` makes of it.
    (As long as the model treats each sample of a batch alone: no batch norm in train mode.)

    The queue is first come, first served: a request waits for a free slot, or for room for its step table, and for
    nothing else; who waits in `submit` comes in the order of the calls.

    The model runs in one thread, started by the first `submit`, without the submitters' autocast or inference mode. Its
    weights may be changed in place at any time; what a graph can't see of a change (`load_state_dict(assign=True)`,
    ``.data =``, hooks) is noticed when the next request joins. On CUDA results are made on the thread's default stream,
    and a future is resolved when the device is done with its sample.

    A model that raises fails the requests that are in the batch then, with its error; the next ones are tried.
    Futures that nobody waits for are cancelled when Python exits; without `close`, the loop of a sampler that is
    collected finishes what it was given.

    Args:
        model: as in `Sampler`: ``model(x, t, **kwargs)`` with x of [slots, ...].
        shape: of one sample, as (3, 32, 32).
        slots: how many samples are computed at once.
        schedule: the one that the model was trained with, for `submit`'s solvers; None: linear with T = 1000.
        model_kwargs: the names of what a request may tell the model, with what it is told otherwise: numbers and
            tensors of one sample, in dicts and lists too, as ``{"class_labels": 0}``. The model gets tensors with a row
            a slot, int64 of integers and float32 of floats.
        unconditional_kwargs: those of the unconditional half of classifier-free guidance, where they are others, as
            ``{"class_labels": 10}``. Given (be it an empty dict), the model is called with 2 * slots samples, the
            unconditional ones first, and requests may have a guidance_scale.
        max_pending: how many requests the queue holds; None: four times the slots.
        dtype, device, graph: as in `Sampler`, but that "while" is "auto" here: who is in the batch is decided before
            each step. A graph is captured anew when a request needs a kind of step that none before it did (noise,
            history, ...), which changes nobody's bits.
        time_dtype: of the model's time input; None: int64 for a `NoiseSchedule`, else float32, which tables whose time
            steps are not whole need.
        background: False: no thread. Steps are done by `step`, in the caller's, and by `close`.

    Raises:
        InputError: for an argument that isn't allowed.
        DeviceError: for a device that isn't there.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        shape: Sequence[int],
        *,
        slots: int,
        schedule: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        unconditional_kwargs: Mapping[str, Any] | None = None,
        max_pending: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        graph: GraphMode = "auto",
        time_dtype: torch.dtype | None = None,
        background: bool = True,
    ) -> None:
        for name, number in (("slots", slots), ("max_pending", 1 if max_pending is None else max_pending)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is {number!r}; allowed: an integer of at least 1")
        self.schedule = schedule or NoiseSchedule.linear()
        self._times = time_dtype or (torch.int64 if isinstance(self.schedule, NoiseSchedule) else torch.float32)
        if self._times not in (torch.int64, torch.float32):
            raise InputError(f"time_dtype is {time_dtype}; allowed: None, torch.int64, torch.float32")
        like = Sampler(model, step_table([0.0], x_x=1.0), dtype=dtype, device=device, graph=graph, batch_size=slots)
        self.shape = like._checked((slots, *shape), 0).shape[1:]
        self._device, self._guided = like._device(None), unconditional_kwargs is not None
        with torch.inference_mode(False):
            self._kwargs = SlotKwargs(model_kwargs or {}, unconditional_kwargs, slots, self._device)
            made = Slots(
                like,
                self.shape,
                slots,
                time_dtype=self._times,
                kwargs=self._kwargs,
                guided=self._guided,
                max_rows=MAX_ROWS,
            )
        if self._device.type == "cuda":  # what was made on the caller's stream is used on the loop's
            torch.cuda.current_stream(self._device).synchronize()
        self._tables, self._slots, self._background = made.tables, slots, background
        self._programs: RecentlyUsed[Program] = RecentlyUsed(MAX_PROGRAMS)
        self._making = threading.Lock()  # of the programs
        self._loop = Loop(made, 4 * slots if max_pending is None else max_pending, background)
        weakref.finalize(self, self._loop.close, wait=False, cancel=not background).atexit = False

    def submit(
        self,
        *,
        seed: int,
        solver: str = "ddpm",
        steps: int | None = None,
        table: StepTable | None = None,
        x_T: Tensor | None = None,
        guidance_scale: float | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> Future[Tensor]:
        """Ask for one sample. Safe for threads; what it is given is copied.

        Args:
            seed: of the sample's noise, 0 ... 2^64 - 1, as it is (not mixed).
            solver, steps, options: as in `solvers.make`: ``solver="ddim", steps=50, eta=0.5``.
            table: a table of your own, in place of these.
            x_T: start from this, of the sampler's `shape`, the state as it is.
            guidance_scale: w of classifier-free guidance, m_u + w (m_c - m_u); None: 1.
            model_kwargs: what this sample's are, ``{"class_labels": 3}``.
            progress: progress(step, steps) is called after each of its steps, in the loop's thread: be quick. An error
                in it fails this request.
            timeout: how many seconds to wait for room in the queue; None: as long as it takes. There is no waiting in
                the loop's own thread (in `progress` or a done-callback), nor without a thread.

        Returns:
            A future, whose result is the sample, of `shape`, float32, on the sampler's device; yours to keep.
            ``await asyncio.wrap_future(future)`` works, and ``future.cancel()`` at any time before it is done: a
            request that is in the batch leaves it before the next step. (``future.running()`` is False until then.)
            Its exception is a `NonFiniteError` where the sample became NaN or infinite, what the model or `progress`
            raised, or with graph=True a `GraphCaptureError`.

        Raises:
            ConfigError, InputError: for a solver, an option or an argument that isn't allowed.
            BusyError: where the queue stayed full.
            FastDDPMError: after `close`.
        """
        self._loop.check_open()
        seed = check_seed(seed)
        with torch.inference_mode(False):  # what is made here lives in the loop
            start = Start(
                program=self._program(solver, steps, table, options, from_noise=x_T is None),
                seed=int(sample_seeds([seed], 1)),
                x_T=self._state(x_T),
                weight=self._weight(guidance_scale),
                kwargs=self._kwargs.rows(model_kwargs),
                made=mark(self._device),
            )
        request = Request(Future(), start, seed, progress, start.program.table.num_rows)
        self._loop.put(request, timeout)
        return request.future

    def step(self) -> bool:
        """Without a background thread: one step of the batch. Returns whether there is more to do.

        ``while sampler.step(): pass`` finishes all that was submitted. Raises `InputError` where there is a thread.
        """
        if self._background:
            raise InputError("step is for a sampler that was made with background=False; this one steps by itself")
        return self._loop.step()

    def close(self, wait: bool = True, cancel: bool = False) -> None:
        """Take no more requests, and finish those there are, or cancel them; `wait` until that is done.

        Then the memory of the CUDA graph is free. A `submit` that waits for room raises. To close again does nothing.
        """
        self._loop.close(wait, cancel)

    def __enter__(self) -> InflightSampler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Finish what there is; after an exception, cancel it."""
        self.close(cancel=error is not None)

    @property
    def counts(self) -> Counts:
        """Requests by what became of them, steps, and tables copied to the device."""
        return self._loop.counts()

    @property
    def utilisation(self) -> float:
        """How many of the slots had a sample in them, over all steps so far: 0 ... 1."""
        counts = self.counts
        return counts.occupied / max(1, counts.steps * self._slots)

    # --- what a request gives, checked --------------------------------------------------------------------------------

    def _program(
        self, solver: str, steps: int | None, table: StepTable | None, options: Mapping[str, Any], *, from_noise: bool
    ) -> Program:
        if table is not None and (solver != "ddpm" or steps is not None or options):
            raise InputError("table is given with a solver, steps or options; give the one or the others")
        if table is not None and not isinstance(table, StepTable):
            raise InputError(f"table is a {type(table).__name__}; needed: a StepTable, as from fastddpm.solvers.ddpm")

        def make() -> Program:
            made = solvers.make(solver, self.schedule, steps, **options) if table is None else table
            return Program.of(made, self._device)

        key: Hashable = table
        if table is None:  # with the types: True is no 1
            key = (solver, steps, type(steps), *((name, type(v), v) for name, v in sorted(options.items())))
        try:
            hash(key)
        except TypeError:  # an option that is a list, or an array
            program = make()
        else:
            with self._making:
                program = self._programs.get(key, make)
        self._tables.check(program)
        if self._times == torch.int64 and any(not t.is_integer() for t in program.table.timesteps.tolist()):
            raise InputError("this solver's time steps are not whole; make the sampler with time_dtype=torch.float32")
        if from_noise and program.table.start[1] == 0:
            raise InputError("this solver starts from a picture, not from noise; give the picture as x_T")
        return program

    def _state(self, x_T: Tensor | None) -> Tensor | None:
        if x_T is None:
            return None
        if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or tuple(x_T.shape) != self.shape:
            what = f"{x_T.dtype} {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else type(x_T).__name__
            raise InputError(f"x_T is a {what}; needed: a tensor of a float dtype, of one sample's shape {self.shape}")
        mine = x_T.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return near(mine, self._device)

    def _weight(self, scale: float | None) -> float:
        if scale is None:
            return 1.0
        if not self._guided:
            raise InputError(
                "guidance_scale is given to a sampler without guidance; make it with unconditional_kwargs, as "
                '{"class_labels": 10} where 10 is the class that stands for "none"'
            )
        if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
            raise InputError(f"guidance_scale is {scale!r}; allowed: None, or a finite number")
        return float(scale)

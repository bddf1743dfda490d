"""`Sampler`: an epsilon-model and a step table become samples. `sample` is the loop, `_step` its body."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, Unpack

import torch
from fastddpm_kernels import LoopStep
from torch import Tensor, nn

from . import graphs, solvers
from .buffers import Buffers, NoiseAhead
from .errors import DeviceError, GraphCaptureError, InputError
from .inputs import Conditions, Inputs, PerSample
from .models import device_of, dtype_of, finite_samples, memory_format_of, tensor_of
from .schedule import NoiseSchedule
from .seeds import check_seed
from .solvers import StepTable
from .while_graph import WhileGraph

GraphMode = Literal["auto", "while"] | bool
Noise = Callable[[int], Tensor | None]
Callback = Callable[[int, Tensor], object]
Step = Callable[[Callable[[], None] | None, int], int]  # given what sets the noise, and how many rows: does some
UNROLLED = 10  # steps in a graph, beside one of a single step; even, for `LoopStep`. Not measured on a GPU yet.


class TraceStep(NamedTuple):
    """One step of `Sampler.trace`."""

    step: int  # the row's number, from 0
    t: float  # the model's time input at that row
    x: Tensor  # the state after the step, [B, ...]
    x0: Tensor  # the predicted clean sample, limited, [B, ...]


class Sampler:
    """Samples from a model that predicts noise (or v, or x0: the table knows).

    ``Sampler(model, solvers.ddim(schedule, 50)).sample((16, 3, 32, 32), seeds=0)``

    Args:
        model: any callable ``model(x, t, **kwargs)`` that returns a tensor like x, or an object with one as `.sample`.
            It may have a second half of channels, a learned variance: only ``ddpm(variance="learned_range")`` reads it.
            x is [B, ...] in `dtype`; t is [B], int64 where all of the table's time steps are whole, else float32.
        table: the solver, from `fastddpm.solvers`.
        dtype: dtype of the model's input; None: that of its parameters, or float32 where it has none.
        graph: on CUDA, "auto" captures a step into a CUDA graph and replays it (for a model that can't be captured: one
            warning, then the eager loop with the same bytes); True insists; False never does. On a CPU there is none.
            "while" is "auto" with the whole loop in one launch, where cuda-bindings (`fastddpm[while]`), the driver and
            the model allow it; else one warning, and "auto". Not run on a GPU yet.
            A number that the model reads elsewhere than in its arguments (in a closure, an attribute) stays what it
            was at the capture: give it in model_kwargs.
        batch_size: compute in batches of exactly this many samples, the last one padded. The result of a seed is then
            the same, bit for bit, whatever it is sampled with. None: one batch of all.
        device: where to sample; None: where the model's parameters are, or x_T, or the CPU.
        state_dtype: float32; float64 is allowed on the CPU, for verification.

    Raises:
        InputError: for an argument that isn't allowed, or a model whose parameters are not in `dtype`.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        table: StepTable,
        *,
        dtype: torch.dtype | None = None,
        graph: GraphMode = "auto",
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        if not callable(model):
            raise InputError(f"model is a {type(model).__name__}; needed: a callable model(x, t, **kwargs)")
        if not isinstance(table, StepTable):
            raise InputError(f"table is a {type(table).__name__}; needed: a StepTable, as from fastddpm.solvers.ddpm")
        if graph not in ("auto", "while") and not isinstance(graph, bool):
            raise InputError(f"graph is {graph!r}; allowed: 'auto', 'while', True, False")
        if state_dtype not in (torch.float32, torch.float64):
            raise InputError(f"state_dtype is {state_dtype}; allowed: torch.float32, or torch.float64 on the CPU")
        whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if batch_size is not None and not (whole and batch_size >= 1):
            raise InputError(f"batch_size is {batch_size!r}; allowed: None, or an integer of at least 1")
        self.model, self.table, self.graph = model, table, graph
        self.batch_size, self.state_dtype = batch_size, state_dtype
        self._dtype = dtype
        self._model_dtype()  # refuses a wrong one now
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise InputError(f"device is {device!r}; allowed: None, 'cpu', 'cuda' or 'cuda:0'") from error
        self._lock = threading.Lock()
        self._captured: graphs.RecentlyUsed[tuple[Buffers, Step]] = graphs.RecentlyUsed()
        self._captured_for: object = None
        self._pool: Any = None  # of the memory that all graphs share: only one runs at a time
        self._graph_refused = False

    def sample(
        self,
        shape: Sequence[int],
        *,
        seeds: int | Sequence[int],
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: PerSample | None = None,
        unconditional_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: PerSample = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
        noise: Noise | None = None,
        callback: Callback | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Run the table from x_T to x_0.

        Args:
            shape: (B, ...), the whole batch: (16, 3, 32, 32).
            seeds: one integer in 0 ... 2^64 - 1 a sample, or a single one from which each sample's is mixed
                (`fastddpm.seeds.sample_seeds`). A sample's noise depends on its own seed alone.
            x_T: start from this [B, ...], the state as it is, instead of from the seeds' noise; never written to.
            model_kwargs: passed on to the model. Tensors in it, in dicts and lists too, are moved to the device; one
                whose first size is B is taken to hold a row a sample.
            guidance_scale: w of classifier-free guidance, m_u + w (m_c - m_u) (Ho & Salimans 2022, arXiv 2207.12598,
                eq. 6, with w = 1 + theirs); a number, or one a sample. None or 1: off, and half the work.
            unconditional_kwargs: model_kwargs for m_u, where they differ: ``{"class_labels": 10}``, a tensor like the
                conditional one, or one row or number for all. The model is called once a step, with 2 B samples, the
                unconditional ones first.
            guidance_rescale: phi in 0 ... 1, a number or one a sample: how far the deviation of the guided output is
                brought back to that of m_c (Lin et al. 2023, arXiv 2305.08891, eq. 15-16; 0.7 there).
            guidance_interval: (low, high): guidance only where low < sigma / alpha <= high, and w = 1 elsewhere
                (Kynkaanniemi et al. 2024, arXiv 2404.07724).
            known, mask: for inpainting: x_0 where the mask (bool) is True; both [B, ...] or broadcast to it. There the
                state is the known sample, noised as the level asks for (Lugmayr et al. 2022, eq. 8a), with noise of
                stream 3. Mind that a solver with history looks back at what it predicted there.
            noise: the steps' noise, in place of the seeds': noise(row) is called once a row, whether it adds noise or
                not, for z, standard normal [B, ...], or None for none: after the model, or before a graph's replay.
                (Not for x_T, nor for what `known` is noised with.)
            callback: callback(row, x) is called after each row, with the state of the batch that is computed: a buffer,
                to be copied if it is to be kept.
            progress: show a progress bar on stderr.

        Returns:
            [B, ...] in the state's dtype, on the sampler's device; a fresh tensor.

        Raises:
            InputError: for arguments that don't fit each other.
            NonFiniteError: where a sample became NaN or infinite; the others are in its `samples`.
            GraphCaptureError: with graph=True, for a model that can't be captured.
        """
        given = self._checked(
            shape,
            seeds,
            x_T=x_T,
            model_kwargs=model_kwargs,
            guidance_scale=guidance_scale,
            unconditional_kwargs=unconditional_kwargs,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            known=known,
            mask=mask,
        )
        if noise is not None and self.batch_size is not None:
            raise InputError("noise is for one batch of all samples; make the sampler without a batch_size")
        batch = given.shape[0]
        size = self.batch_size or batch
        samples, flags = [], []
        # inference_mode(False): buffers made in the caller's inference mode could not be used outside of it again.
        whole = graphs.settled(self._device(given.x_T))
        with self._lock, whole, torch.inference_mode(False), torch.no_grad(), self._bar(progress, batch, size) as bar:
            for rows in torch.arange(batch, device="cpu").split(size):
                part = given.part(torch.cat([rows, rows[-1:].expand(size - len(rows))]))  # the last one again and again
                buffers = self._run(part, noise, callback, bar)
                samples.append(buffers.x[: len(rows)].clone())
                flags.append(buffers.nonfinite[: len(rows)].clone())
            # in the lock, since it waits for the device: another thread, in a stream of its own, has the same buffers
            return finite_samples(torch.cat(samples), torch.cat(flags), self.table.timesteps.tolist())

    def _run(self, part: Inputs, noise: Noise | None, callback: Callback | None, bar: Any) -> Buffers:
        """The loop."""
        device = self._device(part.x_T)
        ahead = noise is None and self._makes_noise_ahead(device)
        part = replace(part, noise_is_given=noise is not None or ahead)
        buffers, step = self._prepared(part)
        buffers.start(part, self.table.init_noise_sigma)
        z_of = NoiseAhead(buffers.seeds, buffers.x, self.table.num_rows) if ahead else noise
        row, rows = 0, self.table.num_rows
        while row < rows:
            alone = z_of is not None or callback is not None
            done = step(None if z_of is None else partial(buffers.set_noise, z_of, row), 1 if alone else rows - row)
            row += done
            if callback is not None:
                callback(row - 1, buffers.x)
            bar.update(done)
        return buffers

    def trace(
        self,
        shape: Sequence[int],
        *,
        seeds: int | Sequence[int],
        progress: bool = False,
        **conditions: Unpack[Conditions],
    ) -> Iterator[TraceStep]:
        """`sample`, one step at a time: yields (step, t, x, x0) after each row; the tensors are copies.

        All samples are in one batch, whatever `batch_size` says, and no graph is used. Arguments and errors are
        those of `sample`; a sample that isn't finite is reported at the end.
        """
        given = self._checked(shape, seeds, **conditions)
        with torch.inference_mode(False), torch.no_grad():
            part = given.part(torch.arange(given.shape[0], device="cpu"))
            buffers = self._allocate(part)
            buffers.x0 = torch.empty_like(buffers.x)
            buffers.start(part, self.table.init_noise_sigma)
        return self._steps(buffers, self._loop_step(buffers), buffers.x0, progress)

    def _steps(self, buffers: Buffers, step: LoopStep, predicted: Tensor, progress: bool) -> Iterator[TraceStep]:
        """The generator of `trace`, which has checked its arguments when it was called."""
        with self._bar(progress, 1, 1) as bar:
            for i, (t, (of_x, of_x0)) in enumerate(zip(self.table.timesteps, self.table.predicted, strict=True)):
                with torch.inference_mode(False), torch.no_grad():
                    before = buffers.x.clone()
                    self._step(buffers, step)
                    x0 = predicted.clone() if of_x == 0 else before.mul_(of_x).add_(predicted, alpha=of_x0)
                bar.update()
                yield TraceStep(i, float(t), buffers.x.clone(), x0)
        finite_samples(buffers.x, buffers.nonfinite, self.table.timesteps.tolist())

    # --- one step, and what it needs ----------------------------------------------------------------------------------

    def _step(self, b: Buffers, apply: LoopStep, set_noise: Callable[[], None] | None = None) -> None:
        """Evaluate the model and apply each sample's row: all that happens in the loop, and all that a graph holds."""
        b.weigh(apply.cursor)
        output = self.model(b.model_input, b.t, **b.model_kwargs)
        if set_noise is not None:  # after the model, which may draw from the same generator
            set_noise()
        apply(tensor_of(output, b.model_input.shape, self.table.learned))

    def _loop_step(self, b: Buffers) -> LoopStep:
        return LoopStep(
            b.x,
            b.table,
            b.cursors,
            b.t,
            b.seeds,
            b.nonfinite,
            h1=b.h1,
            h2=b.h2,
            h3=b.h3,
            model_input=b.model_input,
            x0=b.x0,
            guidance=b.weights,
            rescale=b.rescale,
            known=b.known,
            mask=b.mask,
            z=b.z,
            limited=self.table.limited,
            dynamic=self.table.dynamic,
            noise=self.table.stochastic,
            learned=self.table.learned,
            direct=self.table.direct,
            scaled=self.table.scaled,
        )

    def _prepared(self, part: Inputs) -> tuple[Buffers, Step]:
        """Buffers, and the function that does a step on them: eagerly, or by replaying a graph."""
        device = self._device(part.x_T)
        if self._wants_graph(device):
            fingerprint = (self.model, self.table, graphs.fingerprint(self.model))
            if fingerprint != self._captured_for:
                self._captured.clear()
                self._captured_for = fingerprint
            if self._pool is None and torch.cuda.is_available():
                self._pool = torch.cuda.graph_pool_handle()
            key = None
            try:
                key = (graphs.key_of(part), device)
                return self._captured.get(key, partial(self._capture, part, device))
            except GraphCaptureError as error:
                if self.graph is True:
                    raise
                if key is not None:  # the model's fault, not of what this call passes on: it is not tried again
                    self._graph_refused = True
                    self._captured.clear()
                warnings.warn(f"no CUDA graph: {error}; sampling goes on eagerly, slower", stacklevel=3)
        buffers = self._allocate(part)
        apply = self._loop_step(buffers)

        def step(set_noise: Callable[[], None] | None, rows: int) -> int:
            self._step(buffers, apply, set_noise)
            return 1

        return buffers, step

    def _makes_noise_ahead(self, device: torch.device) -> bool:
        return self.table.stochastic and device.type == "cpu"

    def _wants_graph(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.graph is not False and not self._graph_refused

    def _capture(self, part: Inputs, device: torch.device) -> tuple[Buffers, Step]:
        buffers = self._allocate(part)
        buffers.start(part, self.table.init_noise_sigma)  # for the warm-up
        apply = self._loop_step(buffers)

        def run(n: int) -> None:
            for _ in range(n):
                self._step(buffers, apply)
            if n % 2:
                apply.turn_back()  # every replay reads the same one of the two buffers of cursors

        lengths = (UNROLLED, 1) if self.table.num_rows >= UNROLLED and not part.noise_is_given else (1,)
        replays = graphs.capture(run, device, lengths, self._pool, loop=self.graph == "while")

        def step(set_noise: Callable[[], None] | None, rows: int) -> int:
            if set_noise is not None:
                set_noise()
            n = next(n for n in lengths if n <= rows)
            replay = replays[n]
            if not isinstance(replay, WhileGraph):
                replay()
                return n
            replay(rows // n)
            return rows // n * n

        return buffers, step

    def close(self) -> None:
        """Free the CUDA graphs, and the memory that they hold; the next call captures anew."""
        with self._lock:
            self._captured.clear()
            self._captured_for = self._pool = None

    def _allocate(self, part: Inputs) -> Buffers:
        return Buffers.of(
            part,
            self.table,
            state_dtype=self.state_dtype,
            model_dtype=self._model_dtype(),
            memory_format=memory_format_of(self.model, part.shape),
            device=self._device(part.x_T),
        )

    # --- what the model wants -----------------------------------------------------------------------------------------

    def _model_dtype(self) -> torch.dtype:
        return dtype_of(self.model, self._dtype, self.state_dtype)  # as it is now: the user may have converted it

    def _device(self, x_T: Tensor | None) -> torch.device:
        found = self.device or device_of(self.model)
        return found or (torch.device("cpu") if x_T is None else x_T.device)

    # --- checks before and after --------------------------------------------------------------------------------------

    def _checked(self, shape: Sequence[int], seeds: int | Sequence[int], **conditions: Unpack[Conditions]) -> Inputs:
        given = Inputs.of(self.table, shape, seeds, **conditions)
        if hasattr(self.model, "check_shape"):
            self.model.check_shape(given.shape[1:])
        if hasattr(self.model, "check_timesteps"):
            self.model.check_timesteps(self.table.timesteps.tolist())
        if given.x_T is None and self.table.start[1] == 0:
            raise InputError("this solver starts from a picture, not from noise; give the picture as x_T")
        alpha, sigma = self.table.start
        if given.x_T is None and alpha > 3 * sigma:  # one "leading" step is at t = 0; a `start` leaves levels out
            warnings.warn(
                f"the table begins where the noise is {sigma / alpha:.2g} of the picture, and is given noise alone; "
                'give x_T, or use a spacing that begins at pure noise ("trailing")',
                stacklevel=4,
            )
        device = self._device(given.x_T)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError("the device is cuda, but torch finds no NVIDIA GPU; use device='cpu'")
        own = device_of(self.model) or device
        if isinstance(self.model, nn.Module) and own.type != device.type:
            raise InputError(f"the model is on {own}, the device is {device}; move it first: model.to({str(device)!r})")
        if device.type != "cpu" and self.state_dtype == torch.float64:
            raise InputError(f"state_dtype float64 is for the CPU; the device is {device}")
        return given

    def _bar(self, progress: bool, n: int, size: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=-(-n // size) * self.table.num_rows, disable=not progress, unit="step", desc="sampling")


def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule | None = None,
    solver: str = "ddpm",
    steps: int | None = None,
    seed: int = 0,
    x_T: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: PerSample | None = None,
    unconditional_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    graph: GraphMode = "auto",
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Sample in one line: ``fastddpm.sample(model, (16, 3, 32, 32), solver="ddim", steps=50)``.

    Args:
        model: any callable ``model(x, t, **model_kwargs)``; see `Sampler`.
        shape: (B, ...), the whole batch.
        schedule: the schedule that the model was trained with; None: that of Ho et al. 2020, linear with T = 1000.
        solver: a name in `fastddpm.solvers.names()`.
        steps: how many steps; None: all of the schedule's.
        seed: one integer from which each sample's seed is mixed.
        x_T, model_kwargs, guidance_scale, unconditional_kwargs, dtype, device, graph, progress: as in `Sampler` and
            `Sampler.sample`.
        options: the solver's own, as ``eta=0.5`` or ``clip=1.0``.

    Returns:
        [B, ...] float32. Raises what `solvers.make` and `Sampler.sample` raise.
    """
    check_seed(seed)
    table = solvers.make(solver, schedule or NoiseSchedule.linear(), steps, **options)
    sampler = Sampler(model, table, dtype=dtype, device=device, graph=graph)
    return sampler.sample(
        shape,
        seeds=seed,
        x_T=x_T,
        model_kwargs=model_kwargs,
        guidance_scale=guidance_scale,
        unconditional_kwargs=unconditional_kwargs,
        progress=progress,
    )

"""`Sampler`: an epsilon-model and a step table become samples. `sample` is the loop, `_step` its body."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from fastddpm_kernels import advance_, normal, reference, reverse_step_
from fastddpm_kernels import columns as col
from fastddpm_kernels.constants import STREAM_INITIAL
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from . import graphs, solvers
from .errors import DeviceError, GraphCaptureError, InputError, NonFiniteError
from .schedule import NoiseSchedule
from .seeds import check_seed, sample_seeds
from .solvers import StepTable

GraphMode = Literal["auto"] | bool


class TraceStep(NamedTuple):
    """One step of `Sampler.trace`."""

    step: int  # the row's number, from 0
    t: float  # the model's time input at that row
    x: Tensor  # the state after the step, [B, ...]
    x0: Tensor  # the predicted clean sample, limited, [B, ...]


@dataclass
class Buffers:
    """All that a step reads and writes, in memory that stays where it is, so that a graph can be replayed over it."""

    x: Tensor  # state [B, ...]
    model_input: Tensor  # [B, ...] c_in * x in the model's dtype and memory format
    t: Tensor  # [B] the model's time input
    table: Tensor  # [rows + 1, columns]
    cursor: Tensor  # int32 [B]
    seeds: Tensor  # int64 [B]
    nonfinite: Tensor  # int32 [B], 1 + the first bad step
    x0: Tensor | None = None
    h1: Tensor | None = None
    h2: Tensor | None = None
    h3: Tensor | None = None
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # its tensors, in dicts and lists too, are buffers

    def start(self, x_T: Tensor | None, seeds: Tensor, model_kwargs: dict[str, Any]) -> None:
        """Put every sample at row 0 of the table, with x_T given or drawn."""
        self.seeds.copy_(seeds)
        if x_T is None:
            x_T = initial_noise(self.seeds, self.x.shape[1:], self.x.dtype)
        self.x.copy_(x_T)
        self.cursor.zero_()
        self.nonfinite.zero_()
        self.t.fill_(self.table[0, col.T])
        self.model_input.copy_(self.table[0, col.C_IN] * self.x)
        for history in (self.h1, self.h2, self.h3):
            if history is not None:
                history.zero_()
        for mine, given in zip(tree_leaves(self.model_kwargs), tree_leaves(model_kwargs), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(given)


def initial_noise(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x_T of each seed: stream 0 of the noise contract, [B, *shape]."""
    if dtype == torch.float64:
        return reference.normal(seeds, shape, step=0, stream=STREAM_INITIAL, dtype=dtype)
    return normal(seeds, shape, stream=STREAM_INITIAL)


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
        if graph != "auto" and not isinstance(graph, bool):
            raise InputError(f"graph is {graph!r}; allowed: 'auto', True, False")
        if state_dtype not in (torch.float32, torch.float64):
            raise InputError(f"state_dtype is {state_dtype}; allowed: torch.float32, or torch.float64 on the CPU")
        whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if batch_size is not None and not (whole and batch_size >= 1):
            raise InputError(f"batch_size is {batch_size!r}; allowed: None, or an integer of at least 1")
        self.model, self.table, self.graph = model, table, graph
        self.batch_size, self.state_dtype = batch_size, state_dtype
        self._dtype = dtype
        self._model_dtype()  # refuses a wrong one now
        self.device = None if device is None else torch.device(device)
        self._lock = threading.Lock()
        self._captured: graphs.RecentlyUsed[tuple[Buffers, Callable[[], None]]] = graphs.RecentlyUsed()
        self._captured_for: object = None
        self._graph_refused = False

    def sample(
        self,
        shape: Sequence[int],
        *,
        seeds: int | Sequence[int],
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Run the table from x_T to x_0.

        Args:
            shape: (B, ...), the whole batch: (16, 3, 32, 32).
            seeds: one integer in 0 ... 2^64 - 1 a sample, or a single one from which each sample's is mixed
                (`fastddpm.seeds.sample_seeds`). A sample's noise depends on its own seed alone.
            x_T: start from this [B, ...] instead of from the seeds' noise; never written to.
            model_kwargs: passed on to the model. Tensors in it, in dicts and lists too, are moved to the device; one
                whose first size is B is taken to hold a row a sample.
            progress: show a progress bar on stderr.

        Returns:
            [B, ...] in the state's dtype, on the sampler's device; a fresh tensor.

        Raises:
            InputError: for arguments that don't fit each other.
            NonFiniteError: where a sample became NaN or infinite; the others are in its `samples`.
            GraphCaptureError: with graph=True, for a model that can't be captured.
        """
        shape, bits = self._checked(shape, seeds, x_T)
        kwargs = dict(model_kwargs or {})
        size = self.batch_size or shape[0]
        samples, flags = [], []
        # inference_mode(False): buffers made in the caller's inference mode could not be used outside of it again.
        with self._lock, torch.inference_mode(False), torch.no_grad(), self._bar(progress, shape[0], size) as bar:
            for rows in torch.arange(shape[0], device="cpu").split(size):
                padded = torch.cat([rows, rows[-1:].expand(size - len(rows))])  # the last sample again and again
                part = _rows(kwargs, padded, shape[0])
                buffers, step = self._prepared((size, *shape[1:]), part, x_T)
                buffers.start(None if x_T is None else x_T[padded], bits[padded], part)
                for _ in range(self.table.num_rows):
                    step()
                    bar.update()
                samples.append(buffers.x[: len(rows)].clone())
                flags.append(buffers.nonfinite[: len(rows)].clone())
        return self._finite(torch.cat(samples), torch.cat(flags))

    def trace(
        self,
        shape: Sequence[int],
        *,
        seeds: int | Sequence[int],
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        progress: bool = False,
    ) -> Iterator[TraceStep]:
        """`sample`, one step at a time: yields (step, t, x, x0) after each row; the tensors are copies.

        All samples are in one batch, whatever `batch_size` says, and no graph is used. Arguments and errors are
        those of `sample`; a sample that isn't finite is reported at the end.
        """
        shape, bits = self._checked(shape, seeds, x_T)
        kwargs = dict(model_kwargs or {})
        with torch.inference_mode(False), torch.no_grad():
            buffers = self._allocate(shape, kwargs, x_T)
            buffers.x0 = torch.empty_like(buffers.x)
            buffers.start(x_T, bits, kwargs)
        return self._steps(buffers, buffers.x0, progress)

    def _steps(self, buffers: Buffers, x0: Tensor, progress: bool) -> Iterator[TraceStep]:
        """The generator of `trace`, which has checked its arguments when it was called."""
        with self._bar(progress, 1, 1) as bar:
            for i, t in enumerate(self.table.timesteps):
                with torch.inference_mode(False), torch.no_grad():
                    self._step(buffers)
                bar.update()
                yield TraceStep(i, float(t), buffers.x.clone(), x0.clone())
        self._finite(buffers.x, buffers.nonfinite)

    # --- one step, and what it needs ----------------------------------------------------------------------------------

    def _step(self, b: Buffers) -> None:
        """Evaluate the model and apply each sample's row: all that happens in the loop, and all that a graph holds."""
        output = _tensor_of(self.model(b.model_input, b.t, **b.model_kwargs), b.x.shape, self.table.learned)
        reverse_step_(
            b.x,
            output,
            b.table,
            b.cursor,
            b.seeds,
            b.nonfinite,
            h1=b.h1,
            h2=b.h2,
            h3=b.h3,
            model_input=b.model_input,
            x0=b.x0,
            limited=self.table.limited,
            dynamic=self.table.dynamic,
            noise=self.table.stochastic,
            learned=self.table.learned,
            direct=self.table.direct,
            scaled=self.table.scaled,
        )
        advance_(b.cursor, b.t, b.table)

    def _prepared(
        self, shape: tuple[int, ...], kwargs: dict[str, Any], x_T: Tensor | None
    ) -> tuple[Buffers, Callable[[], None]]:
        """Buffers, and the function that does a step on them: eagerly, or by replaying a graph."""
        device = self._device(x_T)
        if self._wants_graph(device):
            fingerprint = graphs.fingerprint(self.model)
            if fingerprint != self._captured_for:
                self._captured.clear()
                self._captured_for = fingerprint
            try:
                key = (_key(shape, kwargs), device)
                return self._captured.get(key, partial(self._capture, shape, kwargs, x_T, device))
            except GraphCaptureError as error:
                if self.graph is True:
                    raise
                self._graph_refused = True  # a failed capture is not tried again
                self._captured.clear()
                warnings.warn(f"no CUDA graph: {error}; sampling goes on eagerly, slower", stacklevel=3)
        buffers = self._allocate(shape, kwargs, x_T)
        return buffers, partial(self._step, buffers)

    def _wants_graph(self, device: torch.device) -> bool:
        return device.type == "cuda" and self.graph is not False and not self._graph_refused

    def _capture(
        self, shape: tuple[int, ...], kwargs: dict[str, Any], x_T: Tensor | None, device: torch.device
    ) -> tuple[Buffers, Callable[[], None]]:
        buffers = self._allocate(shape, kwargs, x_T)
        buffers.start(None, buffers.seeds, kwargs)  # the warm-up runs on noise of seed 0
        return buffers, graphs.capture(partial(self._step, buffers), device)

    def _allocate(self, shape: tuple[int, ...], kwargs: Mapping[str, Any], x_T: Tensor | None) -> Buffers:
        device, batch = self._device(x_T), shape[0]
        table = torch.tensor(self.table.with_identity(), dtype=self.state_dtype, device=device)
        whole = all(t.is_integer() for t in self.table.timesteps.tolist())
        state = partial(torch.empty, shape, dtype=self.state_dtype, device=device)
        history = self.table.history
        return Buffers(
            x=state(),
            model_input=torch.empty(
                shape, dtype=self._model_dtype(), device=device, memory_format=self._memory_format(shape)
            ),
            t=torch.zeros(batch, dtype=torch.int64 if whole else torch.float32, device=device),
            table=table,
            cursor=torch.zeros(batch, dtype=torch.int32, device=device),
            seeds=torch.zeros(batch, dtype=torch.int64, device=device),
            nonfinite=torch.zeros(batch, dtype=torch.int32, device=device),
            h1=state() if history >= 1 else None,
            h2=state() if history >= 2 else None,
            h3=state() if history >= 3 else None,
            model_kwargs=tree_map_only(Tensor, lambda v: torch.empty_like(v, device=device), dict(kwargs)),
        )

    # --- what the model wants -----------------------------------------------------------------------------------------

    def _parameters(self) -> list[Tensor]:
        """Those of the model, or of the modules that a function around them runs."""
        return [p for module in graphs.modules_of(self.model) for p in module.parameters()]

    def _model_dtype(self) -> torch.dtype:
        """The dtype of the model's input, as it is now: the user may have converted the model."""
        dtype, own = self._dtype, next((p.dtype for p in self._parameters() if p.is_floating_point()), None)
        if dtype is None:
            return own or self.state_dtype
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise InputError(f"dtype is {dtype}; needed: a floating-point dtype")
        if isinstance(self.model, nn.Module) and own is not None and own != dtype:
            raise InputError(f"the model's parameters are {own}, dtype is {dtype}; convert it first: model.to({dtype})")
        return dtype

    def _memory_format(self, shape: Sequence[int]) -> torch.memory_format:
        """channels_last where a convolution's weights are, so that the model's first layer needs no copy."""
        last = torch.channels_last
        wants = any(
            p.ndim == 4 and p.is_contiguous(memory_format=last) and not p.is_contiguous() for p in self._parameters()
        )
        return last if wants and len(shape) == 4 else torch.contiguous_format

    def _device(self, x_T: Tensor | None) -> torch.device:
        if self.device is not None:
            return self.device
        own = next((p.device for p in self._parameters()), None)
        return own or (torch.device("cpu") if x_T is None else x_T.device)

    # --- checks before and after --------------------------------------------------------------------------------------

    def _checked(
        self, shape: Sequence[int], seeds: int | Sequence[int], x_T: Tensor | None
    ) -> tuple[tuple[int, ...], Tensor]:
        shape = tuple(shape)
        if len(shape) < 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in shape):
            raise InputError(f"shape is {shape}; needed: (batch, ...), whole numbers of at least 1, as (16, 3, 32, 32)")
        if x_T is not None and tuple(x_T.shape) != shape:
            raise InputError(f"x_T has shape {tuple(x_T.shape)}, shape is {shape}; they must be the same")
        if hasattr(self.model, "check_shape"):
            self.model.check_shape(shape[1:])
        device = self._device(x_T)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceError("the device is cuda, but torch finds no NVIDIA GPU; use device='cpu'")
        own = next((p.device for p in self._parameters()), device)
        if isinstance(self.model, nn.Module) and own.type != device.type:
            raise InputError(f"the model is on {own}, the device is {device}; move it first: model.to({str(device)!r})")
        if device.type != "cpu" and self.state_dtype == torch.float64:
            raise InputError(f"state_dtype float64 is for the CPU; the device is {device}")
        return shape, sample_seeds(seeds, shape[0])

    def _finite(self, samples: Tensor, flags: Tensor) -> Tensor:
        """`samples`, or `NonFiniteError` where one is not finite or its flag is set."""
        bad = (flags != 0) | ~torch.isfinite(samples).flatten(1).all(dim=1)
        if not bad.any():
            return samples
        first = int(bad.nonzero()[0])
        step = int(flags[first]) - 1 if flags[first] else self.table.num_rows - 1
        others = f" ({int(bad.sum())} of {len(samples)} samples)" if int(bad.sum()) > 1 else ""
        raise NonFiniteError(
            f"sample {first} is not finite from step {step} (t = {self.table.timesteps[step]:g}) on{others}: "
            "the model's output there is NaN, infinite or too large",
            samples=samples,
            bad=bad,
        )

    def _bar(self, progress: bool, n: int, size: int) -> Any:
        from tqdm import tqdm

        return tqdm(total=-(-n // size) * self.table.num_rows, disable=not progress, unit="step", desc="sampling")


def _rows(kwargs: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """The keyword arguments of some samples: of a tensor with a row a sample, those rows."""

    def picked(v: Tensor) -> Tensor:
        return v[rows.to(v.device)] if v.ndim and v.shape[0] == batch else v

    made: dict[str, Any] = tree_map_only(Tensor, picked, kwargs)
    return made


def _key(shape: tuple[int, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a captured graph is for: a tensor enters by its shape and dtype, a plain value by itself.

    Raises `GraphCaptureError` for anything else in `kwargs`: an object may change without its graph noticing.
    """

    def described(v: Any) -> tuple[Any, ...]:
        if isinstance(v, Tensor):
            return v.shape, v.dtype, v.stride()
        if not isinstance(v, bool | int | float | str | torch.dtype | None):
            raise GraphCaptureError(f"model_kwargs hold a {type(v).__name__}, which may change between calls")
        return type(v), v

    leaves, spec = tree_flatten(kwargs)
    return shape, str(spec), tuple(described(v) for v in leaves)


def _tensor_of(output: Any, shape: torch.Size, learned: bool) -> Tensor:
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise InputError(f"the model returned a {type(output).__name__}; needed: a tensor, or an object with .sample")
    with_variance = (shape[0], 2 * shape[1], *shape[2:])
    if not learned and len(shape) > 2 and output.shape == with_variance:
        return output[:, : shape[1]]  # the solver has a variance of its own
    if output.shape != (expected := with_variance if learned else tuple(shape)):
        why = ", for a solver with a learned variance" if learned else ""
        raise InputError(
            f"the model returned shape {tuple(output.shape)} for an input of {tuple(shape)}; needed: {expected}{why}"
        )
    return output


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
        x_T, model_kwargs, dtype, device, graph, progress: as in `Sampler` and `Sampler.sample`.
        options: the solver's own, as ``eta=0.5`` or ``clip=1.0``.

    Returns:
        [B, ...] float32. Raises what `solvers.make` and `Sampler.sample` raise.
    """
    check_seed(seed)
    table = solvers.make(solver, schedule or NoiseSchedule.linear(), steps, **options)
    sampler = Sampler(model, table, dtype=dtype, device=device, graph=graph)
    return sampler.sample(shape, seeds=seed, x_T=x_T, model_kwargs=model_kwargs, progress=progress)

"""guided-diffusion's loop, a step at a time: the model and the user's functions in PyTorch, the rest one kernel."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..buffers import initial_noise
from ..errors import InputError
from ..graphs import modules_of
from ..seeds import sample_seeds
from ..solvers import StepTable
from .gaussian import Process
from .given import Rows

Model = Callable[..., Any]
Seeds = int | Sequence[int] | None


class Call(NamedTuple):
    """What a loop is called with; see `GaussianDiffusion.p_sample_loop`."""

    model: Model
    shape: Sequence[int]
    noise: Tensor | None
    denoised_fn: Callable[[Tensor], Tensor] | None
    cond_fn: Callable[..., Tensor] | None
    model_kwargs: Mapping[str, Any] | None
    device: torch.device | str | None
    progress: bool
    seeds: Seeds

    def place(self) -> torch.device:
        """Where to sample: `device`, where the model's parameters are, where the noise is, or the CPU."""
        if self.device is not None:
            try:
                return torch.device(self.device)
            except (RuntimeError, TypeError) as error:
                raise InputError(f"device is {self.device!r}; allowed: None, 'cpu', 'cuda' or 'cuda:0'") from error
        own = next((p.device for module in modules_of(self.model) for p in module.parameters()), None)
        return own or (torch.device("cpu") if self.noise is None else self.noise.device)

    def start(self) -> Tensor:
        """x_T; raises `InputError` for a shape or a noise that doesn't fit."""
        try:
            shape = tuple(operator.index(n) for n in self.shape)
        except TypeError:
            shape = ()
        if len(shape) < 2 or min(shape) < 1:
            raise InputError(f"shape is {self.shape!r}; needed: (B, C, ...), whole numbers of at least 1")
        if not callable(self.model):
            raise InputError(f"model is a {type(self.model).__name__}; needed: a callable model(x, t, **model_kwargs)")
        if self.noise is not None:
            if not isinstance(self.noise, Tensor):
                raise InputError(f"noise is a {type(self.noise).__name__}; needed: a tensor, or None")
            if tuple(self.noise.shape) != shape:
                raise InputError(f"noise has shape {tuple(self.noise.shape)}, shape is {shape}; they must be the same")
            return self.noise
        if self.seeds is None:
            return torch.randn(shape, device=self.place())
        return initial_noise(sample_seeds(self.seeds, shape[0]).to(self.place()), shape[1:], torch.float32)


def steps(process: Process, table: StepTable, ancestral: bool, call: Call) -> Iterator[dict[str, Tensor]]:
    """Yields {"sample", "pred_xstart"} after each row of `table`, and goes on from the "sample" that is there then.

    Args:
        process: the diffusion.
        table: of its `ddpm` (then `ancestral`) or `ddim`, for an x_0 in the output's place where `call` has a
            denoised_fn.
        call: what the user gave.

    Raises:
        InputError: for what the model and the user's functions return, where it doesn't fit.
        NonFiniteError: at the end, where a sample became NaN or infinite.
    """
    from tqdm.auto import tqdm

    start = call.start()
    rows = Rows(table, start, call.seeds)
    times = rows.times(torch.float32 if process.rescaled else torch.int64)
    told = dict(call.model_kwargs or {})
    like = torch.empty_like(start, dtype=rows.x.dtype)
    for i in tqdm(range(table.num_rows), disable=not call.progress):
        with torch.no_grad():
            x, t = rows.x if like.is_contiguous() else torch.empty_like(like).copy_(rows.x), times[i]
            output = _checked(process, x, call.model(x, t, **told))
            prediction, v = output[:, : x.shape[1]], output[:, x.shape[1] :]
            if call.denoised_fn is not None:
                prediction = _denoised(process, i, x, prediction, call.denoised_fn)
                output = torch.cat([prediction, v.to(prediction.dtype)], dim=1)
            z = torch.randn_like(like) if ancestral and call.seeds is None else None
            gradient = None if call.cond_fn is None else _gradient(call.cond_fn(x, t, **told), x)
            if not ancestral and call.seeds is None:
                z = torch.randn_like(like)
            z = None if z is None else z.contiguous()
            x0 = rows.step(i, output if table.learned else prediction, lambda z=z: z)  # type: ignore[misc]
            if gradient is not None and ancestral:
                rows.x.add_(_variance(process, i, v.to(x.dtype)) * gradient)
            elif gradient is not None:
                of_x0, of_x = process.score_shift(table, i)
                rows.x.add_(gradient, alpha=of_x)
                x0 = x0.add(gradient, alpha=of_x0)
            if (process.mean != "epsilon" or call.denoised_fn is not None) and (gradient is None or ancestral):
                like = torch.empty_like(prediction, dtype=x.dtype)  # theirs then has the output's memory format
        out = {"sample": rows.x, "pred_xstart": x0}
        yield out
        rows.x = out["sample"].to(rows.x.dtype).contiguous()
    rows.finished()


def _checked(process: Process, x: Tensor, output: Any) -> Tensor:
    """The model's output, [B, C, ...] or with the variance [B, 2 C, ...]."""
    output = getattr(output, "sample", output)
    if not isinstance(output, Tensor):
        raise InputError(f"the model returned a {type(output).__name__}; needed: a tensor, or an object with .sample")
    learned = process.variance.startswith("learned")
    needed = (len(x), x.shape[1] * (2 if learned else 1), *x.shape[2:])
    if output.shape != needed:
        raise InputError(
            f"the model returned shape {tuple(output.shape)} for an input of {tuple(x.shape)}; needed: {needed}, as "
            f"model_var_type is {process.variance!r}"
        )
    return output


def _denoised(
    process: Process, i: int, x: Tensor, prediction: Tensor, denoised_fn: Callable[[Tensor], Tensor]
) -> Tensor:
    of_x, of_m = process.predicted[i].tolist()
    x0 = denoised_fn(of_x * x + of_m * prediction.to(x.dtype))
    if not isinstance(x0, Tensor) or x0.shape != x.shape:
        what = tuple(x0.shape) if isinstance(x0, Tensor) else type(x0).__name__
        raise InputError(f"denoised_fn returned {what}; needed: x_0 as it was given, {tuple(x.shape)}")
    return x0


def _gradient(gradient: Any, x: Tensor) -> Tensor:
    if not isinstance(gradient, Tensor):
        raise InputError(f"cond_fn returned a {type(gradient).__name__}; needed: a gradient like x, {tuple(x.shape)}")
    return gradient.detach().to(x.dtype)


def _variance(process: Process, i: int, v: Tensor) -> Tensor | float:
    """That of p(x_{t-1} | x_t) at row i, whose noise the last row doesn't add: with the gradient it counts."""
    if process.variance.startswith("fixed"):
        return process.fixed_variance(i)
    small, large = process.log_variances[i].tolist()
    return torch.exp(v if process.variance == "learned" else (large * (1 + v) + small * (1 - v)) / 2)

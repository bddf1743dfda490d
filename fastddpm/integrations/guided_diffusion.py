"""guided-diffusion's and improved-diffusion's `GaussianDiffusion`, its sampling loops as tables.

    diffusion = guided_diffusion.GaussianDiffusion.of(diffusion)  # theirs, or a SpacedDiffusion
    images = diffusion.p_sample_loop(model, (16, 3, 64, 64), model_kwargs={"y": classes})

Same names, arguments and defaults, and torch's global random numbers drawn in the same order: the samples are theirs,
but for rounding. A step is one kernel beside the model and the noise, and nothing waits for the GPU. With ``seeds``,
one integer or one a sample, the noise is the kernel's own: a sample doesn't depend on what it is sampled with, and a
loop without `cond_fn` and `denoised_fn` is a `Sampler`'s, on a GPU one graph a step.

All that they have is exact: `cond_fn` moves the state by a multiple of the gradient behind the kernel (after the clip,
as theirs does), and a `denoised_fn` is applied to x_0 in eager PyTorch before the kernel, whose table is then one of a
model that predicts x_0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fastddpm_kernels import q_sample as noised
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from ..buffers import initial_noise
from ..errors import ConfigError, InputError
from ..sampler import Sampler
from ..schedule import NoiseSchedule
from ..seeds import sample_seeds
from ..solvers import StepTable
from ..solvers.levels import Floats
from ..solvers.spacing import timesteps
from .gaussian import MEANS, VARIANCES, Process
from .given import Rows

Model = Callable[..., Any]
Seeds = int | Sequence[int] | None


class GaussianDiffusion:
    """A diffusion as guided-diffusion has it: betas, what the model predicts, and its variance.

    Args:
        betas: [T], those that the model was trained with.
        model_mean_type: "epsilon", "start_x" or "previous_x", or guided-diffusion's ModelMeanType.
        model_var_type: "fixed_small", "fixed_large", "learned" (the second half of the model's channels is the log
            variance) or "learned_range" (a fraction between the logs of the fixed ones), or their ModelVarType.
        loss_type: not used; their constructor has it.
        rescale_timesteps: the model is told t 1000 / T, a float.
        use_timesteps: the time steps that are visited: any of 0 ... T - 1, or their ``timestep_respacing``, as "250",
            "10,10,20" or "ddim50"; None: all.

    Attributes:
        betas: float64 [num_timesteps], of the visited steps.
        num_timesteps: how many are visited.
        timestep_map: the model's time step of each.
        original_num_steps: T.
        model_mean_type, model_var_type, rescale_timesteps: as given, the types as words.

    Raises:
        ConfigError: for a value that is not among these.
    """

    def __init__(
        self,
        betas: ArrayLike,
        model_mean_type: Any = "epsilon",
        model_var_type: Any = "fixed_small",
        loss_type: Any = None,
        rescale_timesteps: bool = False,
        use_timesteps: str | Iterable[int] | None = None,
    ) -> None:
        trained = NoiseSchedule.from_betas(betas)
        visited = _visited(trained.num_steps, use_timesteps)
        ends = trained.log_alphas_cumprod[visited]
        spaced = trained.betas if len(visited) == trained.num_steps else -np.expm1(np.diff(ends, prepend=0.0))
        self._set(spaced, model_mean_type, model_var_type, rescale_timesteps, visited.tolist(), trained.num_steps)

    @classmethod
    def of(cls, diffusion: Any) -> GaussianDiffusion:
        """The same as their `diffusion`, a GaussianDiffusion or SpacedDiffusion.

        Read are betas, model_mean_type, model_var_type, rescale_timesteps and, where they are, timestep_map and
        original_num_steps. Raises `ConfigError` for an object without them.
        """
        made = cls.__new__(cls)
        try:
            betas = np.asarray(diffusion.betas, dtype=np.float64)
            types = diffusion.model_mean_type, diffusion.model_var_type, diffusion.rescale_timesteps
        except AttributeError as error:
            raise ConfigError(
                f"a {type(diffusion).__name__} is no GaussianDiffusion of guided-diffusion: {error}"
            ) from error
        steps = list(getattr(diffusion, "timestep_map", range(len(betas))))
        made._set(betas, *types, steps, getattr(diffusion, "original_num_steps", len(betas)))
        return made

    def _set(self, betas: Floats, mean: Any, variance: Any, rescale: bool, steps: list[int], trained: int) -> None:
        self.betas, self.num_timesteps, self.rescale_timesteps = betas, len(betas), bool(rescale)
        self.model_mean_type, self.model_var_type = _word("mean", mean, MEANS), _word("var", variance, VARIANCES)
        self.timestep_map, self.original_num_steps = steps, trained
        told = np.array(steps, dtype=np.float64) * (1000.0 / trained if rescale else 1.0)
        self._process = Process(NoiseSchedule.from_betas(betas), self.model_mean_type, self.model_var_type, told[::-1])
        self._last: tuple[Model, Sampler] | None = None

    # --- their methods ------------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4).

        Args:
            x_start: clean samples, [B, ...].
            t: int64 [B], counted among the visited time steps.
            noise: standard normal, like x_start; None: torch.randn_like.
        """
        schedule, exact = self._process.schedule, x_start.dtype == torch.float64
        columns = np.column_stack([schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod])
        table = torch.tensor(columns, dtype=torch.float64 if exact else torch.float32, device=x_start.device)
        return noised(x_start, t, table, noise=torch.randn_like(x_start) if noise is None else noise)[0]

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seeds: Seeds = None,
    ) -> Tensor:
        """Samples by ancestral sampling (Ho et al. 2020, algorithm 2).

        Args:
            model: model(x, t, **model_kwargs), x float32 [B, ...], t [B]; with a learned variance it returns twice the
                channels.
            shape: (B, ...).
            noise: x_T; None: drawn.
            clip_denoised: clip the predicted x_0 to [-1, 1].
            denoised_fn: applied to the predicted x_0 before that.
            cond_fn: cond_fn(x, t, **model_kwargs), the gradient of log p(y | x_t) that the mean is moved by, times the
                variance (Dhariwal & Nichol 2021, arXiv 2105.05233, algorithm 1).
            model_kwargs: for the model and cond_fn.
            device: where to sample; None: where the model's parameters are.
            progress: show a bar.
            seeds: draw all noise from these instead of torch's global random numbers.

        Returns:
            float32 [B, ...] (float64 on the CPU where `noise` is).

        Raises:
            ConfigError: for a denoised_fn where the model predicts x_{t-1} (it would change nothing).
            InputError, ValueError: for a shape, a noise or an output that doesn't fit.
            NonFiniteError: where a sample became NaN or infinite.
        """
        table = self._process.ddpm(clip_denoised, denoised_fn is not None)
        given: dict[str, Any] = dict(
            noise=noise, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, device=device
        )
        return self._sample(table, True, model, shape, progress=progress, seeds=seeds, **given)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seeds: Seeds = None,
    ) -> Tensor:
        """Samples by DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12), the noise derived again from the clipped x_0.

        Args:
            eta: 0 ... 1.
            cond_fn: as in `p_sample_loop`; here it moves the predicted noise (2105.05233, algorithm 2).

        The other arguments, what is returned and raised: as in `p_sample_loop`.
        """
        table = self._process.ddim(clip_denoised, denoised_fn is not None, eta)
        given: dict[str, Any] = dict(
            noise=noise, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, device=device
        )
        return self._sample(table, False, model, shape, progress=progress, seeds=seeds, **given)

    def p_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        *,
        seeds: Seeds = None,
    ) -> Iterator[dict[str, Tensor]]:
        """`p_sample_loop`, yielding {"sample", "pred_xstart"} after each step; a "sample" put there is gone on from."""
        table = self._process.ddpm(clip_denoised, denoised_fn is not None)
        given: dict[str, Any] = dict(
            noise=noise, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, device=device
        )
        return self._steps(table, True, model, shape, progress=progress, seeds=seeds, **given)

    def ddim_sample_loop_progressive(
        self,
        model: Model,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        cond_fn: Callable[..., Tensor] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        *,
        seeds: Seeds = None,
    ) -> Iterator[dict[str, Tensor]]:
        """`ddim_sample_loop`, yielding as `p_sample_loop_progressive` does."""
        table = self._process.ddim(clip_denoised, denoised_fn is not None, eta)
        given: dict[str, Any] = dict(
            noise=noise, denoised_fn=denoised_fn, cond_fn=cond_fn, model_kwargs=model_kwargs, device=device
        )
        return self._steps(table, False, model, shape, progress=progress, seeds=seeds, **given)

    # --- the loops ----------------------------------------------------------------------------------------------------

    def _sample(self, table: StepTable, ancestral: bool, model: Model, shape: Sequence[int], **given: Any) -> Tensor:
        if given["seeds"] is not None and given["cond_fn"] is None and given["denoised_fn"] is None:
            return self._by_sampler(table, model, shape, **given)
        (final,) = deque(self._steps(table, ancestral, model, shape, **given), maxlen=1)
        return final["sample"]

    def _by_sampler(
        self,
        table: StepTable,
        model: Model,
        shape: Sequence[int],
        *,
        noise: Tensor | None,
        model_kwargs: Mapping[str, Any] | None,
        device: torch.device | str | None,
        progress: bool,
        seeds: int | Sequence[int],
        **_: None,
    ) -> Tensor:
        """The last `Sampler` again, if it is for the same: it may have a graph."""
        exact = torch.float64 if noise is not None and noise.dtype == torch.float64 else torch.float32
        device = _device(model, noise, device)
        last, sampler = self._last or (None, None)
        same = last is model and sampler is not None and sampler.device == device and sampler.state_dtype == exact
        if sampler is None or not same or not np.array_equal(sampler.table.rows, table.rows):
            sampler = Sampler(model, table, device=device, state_dtype=exact)
            self._last = model, sampler
        return sampler.sample(shape, seeds=seeds, x_T=noise, model_kwargs=model_kwargs, progress=progress)

    def _steps(
        self,
        table: StepTable,
        ancestral: bool,
        model: Model,
        shape: Sequence[int],
        *,
        noise: Tensor | None,
        denoised_fn: Callable[[Tensor], Tensor] | None,
        cond_fn: Callable[..., Tensor] | None,
        model_kwargs: Mapping[str, Any] | None,
        device: torch.device | str | None,
        progress: bool,
        seeds: Seeds,
    ) -> Iterator[dict[str, Tensor]]:
        from tqdm.auto import tqdm

        rows = Rows(table, _start(shape, noise, _device(model, noise, device), seeds), seeds)
        times = rows.times(torch.float32 if self.rescale_timesteps else torch.int64)
        told = dict(model_kwargs or {})
        for i in tqdm(range(table.num_rows), disable=not progress):
            with torch.no_grad():
                x, t = rows.x, times[i]
                output: Any = model(x, t, **told)
                output = self._prepared(i, x, getattr(output, "sample", output), denoised_fn, table.learned)
                z = torch.randn_like(x) if ancestral and seeds is None else None
                gradient = None if cond_fn is None else cond_fn(x, t, **told).to(x.dtype)
                if not ancestral and seeds is None:
                    z = torch.randn_like(x)
                x0 = rows.step(i, output, lambda z=z: z)  # type: ignore[misc]
                if gradient is not None and ancestral:
                    rows.x.add_(self._variance(i, x, output) * gradient)
                elif gradient is not None:
                    of_x0, of_x = self._process.score_shift(table, i)
                    rows.x.add_(gradient, alpha=of_x)
                    x0 = x0.add(gradient, alpha=of_x0)
            out = {"sample": rows.x, "pred_xstart": x0}
            yield out
            rows.x = out["sample"].to(rows.x.dtype).contiguous()
        rows.finished()

    def _prepared(
        self, i: int, x: Tensor, output: Tensor, denoised_fn: Callable[[Tensor], Tensor] | None, learned: bool
    ) -> Tensor:
        """What the table's row expects: the output; without the variance, where it isn't read; or x_0 in its place."""
        channels = x.shape[1]
        prediction, v = output[:, :channels], output[:, channels:]
        if denoised_fn is not None:
            of_x, of_m = self._process.predicted[i].tolist()
            prediction = denoised_fn(of_x * x + of_m * prediction.to(x.dtype))
            return torch.cat([prediction, v.to(prediction.dtype)], dim=1) if learned else prediction
        return prediction if self.model_var_type.startswith("learned") and not learned else output

    def _variance(self, i: int, x: Tensor, output: Tensor) -> Tensor | float:
        """That of p(x_{t-1} | x_t) at row i, whose noise the last row doesn't add: with the gradient it counts."""
        small, large = self._process.log_variances[i].tolist()
        if self.model_var_type.startswith("fixed"):
            return self._process.fixed_variance(i)
        v = output[:, x.shape[1] :].to(x.dtype)
        return torch.exp(v if self.model_var_type == "learned" else (large * (1 + v) + small * (1 - v)) / 2)


def _start(shape: Sequence[int], noise: Tensor | None, device: torch.device, seeds: Seeds) -> Tensor:
    if noise is not None:
        if tuple(noise.shape) != tuple(shape):
            raise InputError(f"noise has shape {tuple(noise.shape)}, shape is {tuple(shape)}; they must be the same")
        return noise
    if seeds is None:
        return torch.randn(*shape, device=device)
    return initial_noise(sample_seeds(seeds, shape[0]).to(device), shape[1:], torch.float32)


def _device(model: Model, noise: Tensor | None, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    own = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    if own is not None:
        return own.device
    return torch.device("cpu") if noise is None else noise.device


def _visited(num_steps: int, use: str | Iterable[int] | None) -> NDArray[np.int64]:
    """The visited time steps, int64, rising; `ConfigError` for what isn't of 0 ... num_steps - 1."""
    if use is None:
        return np.arange(num_steps)
    if isinstance(use, str):
        return timesteps(num_steps, None, use)[::-1]
    visited = sorted(set(use))
    good = all(isinstance(t, int | np.integer) and not isinstance(t, bool) and 0 <= t < num_steps for t in visited)
    if not visited or not good:
        raise ConfigError(
            f"use_timesteps are not all time steps; allowed: whole numbers in 0 ... {num_steps - 1}, or "
            "words as '250', '10,10,20', 'ddim50'"
        )
    return np.array(visited, dtype=np.int64)


def _word(name: str, given: Any, allowed: tuple[str, ...]) -> str:
    """A type as a word: that of an enum by its name."""
    word = str(getattr(given, "name", given)).lower()
    if word not in allowed:
        raise ConfigError(f"model_{name}_type is {given!r}; allowed: {', '.join(map(repr, allowed))}, or their enum's")
    return word

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

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from fastddpm_kernels import q_sample as noised
from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import ConfigError
from ..sampler import Sampler
from ..schedule import NoiseSchedule
from ..solvers import StepTable
from ..solvers.levels import Floats
from ._guided_loop import Call, Model, Seeds, steps
from .gaussian import MEANS, VARIANCES, Process, visited_steps, word

_CLASSES = ("GaussianDiffusion", "SpacedDiffusion")
_STEP = (  # what a sample is made of: a class with another one samples otherwise
    "p_sample_loop",
    "p_sample_loop_progressive",
    "ddim_sample_loop",
    "ddim_sample_loop_progressive",
    "p_sample",
    "ddim_sample",
    "p_mean_variance",
    "condition_mean",
    "condition_score",
    "q_posterior_mean_variance",
    "_predict_xstart_from_eps",
    "_predict_xstart_from_xprev",
    "_predict_eps_from_xstart",
    "_scale_timesteps",
    "_wrap_model",
)


class GaussianDiffusion:
    """A diffusion as guided-diffusion has it: betas, what the model predicts, and its variance.

    Args:
        betas: [T], those that the model was trained with.
        model_mean_type: "epsilon", "start_x" or "previous_x", or guided-diffusion's ModelMeanType.
        model_var_type: "fixed_small", "fixed_large", "learned" (the second half of the model's channels is the log
            variance) or "learned_range" (a fraction between the logs of the fixed ones), or their ModelVarType.
        loss_type: kept; nothing here reads it.
        rescale_timesteps: the model is told t 1000 / T, a float.
        use_timesteps: the time steps that are visited: any of 0 ... T - 1, or their ``timestep_respacing``, as "250",
            "10,10,20" or "ddim50"; None: all.

    Attributes:
        betas: float64 [num_timesteps], of the visited steps.
        num_timesteps: how many are visited.
        timestep_map: the model's time step of each.
        original_num_steps: T.
        model_mean_type, model_var_type, loss_type, rescale_timesteps: as given, the first two as words.

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
        visited = visited_steps(trained.num_steps, use_timesteps)
        ends = trained.log_alphas_cumprod[visited]
        spaced = trained.betas if len(visited) == trained.num_steps else -np.expm1(np.diff(ends, prepend=0.0))
        types = model_mean_type, model_var_type, loss_type
        self._set(spaced, *types, rescale_timesteps, visited.tolist(), trained.num_steps)

    @classmethod
    def of(cls, diffusion: Any) -> GaussianDiffusion:
        """The same as their `diffusion`, a GaussianDiffusion or SpacedDiffusion (DiT's too, and improved-diffusion's).

        Read are betas, model_mean_type, model_var_type and, where they are, rescale_timesteps, timestep_map and
        original_num_steps. What this class hasn't (training_losses, calc_bpd_loop, p_mean_variance, p_sample,
        ddim_reverse_sample, alphas_cumprod, ...) is `diffusion`'s own.

        Raises `ConfigError` for an object without these, or of a class that changes what a step is.
        """
        made = cls.__new__(cls)
        try:
            betas = np.asarray(diffusion.betas, dtype=np.float64)
            types = diffusion.model_mean_type, diffusion.model_var_type
        except AttributeError as error:
            raise ConfigError(
                f"a {type(diffusion).__name__} is no GaussianDiffusion of guided-diffusion: {error}"
            ) from error
        _check_is_theirs(diffusion)
        visited = list(getattr(diffusion, "timestep_map", range(len(betas))))
        loss, rescale = getattr(diffusion, "loss_type", None), getattr(diffusion, "rescale_timesteps", False)
        made._set(betas, *types, loss, rescale, visited, getattr(diffusion, "original_num_steps", len(betas)))
        made._theirs = diffusion
        return made

    def _set(
        self, betas: Floats, mean: Any, variance: Any, loss: Any, rescale: bool, visited: list[int], trained: int
    ) -> None:
        self.betas, self.num_timesteps, self.rescale_timesteps = betas, len(betas), bool(rescale)
        self.model_mean_type, self.model_var_type = word("mean", mean, MEANS), word("var", variance, VARIANCES)
        self.loss_type, self.timestep_map, self.original_num_steps = loss, visited, trained
        types = self.model_mean_type, self.model_var_type
        self._process = Process.of(betas, *types, self.rescale_timesteps, visited, trained)
        self._last: tuple[Model, Sampler] | None = None
        self._theirs: Any = None

    # --- their methods ------------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4).

        Args:
            x_start: clean samples, [B, ...].
            t: int64 [B], counted among the visited time steps.
            noise: standard normal, like x_start; None: torch.randn_like.

        Returns:
            Like x_start, in float32 (float64 where it is), as theirs; gradients pass through.
        """
        schedule, exact = self._process.schedule, x_start.dtype == torch.float64
        noise = torch.randn_like(x_start) if noise is None else noise
        if not exact:
            x_start, noise = x_start.float(), noise.float()
        columns = np.column_stack([schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod])
        table = torch.tensor(columns, dtype=torch.float64 if exact else torch.float32, device=x_start.device)
        return noised(x_start, t, table, noise=noise)[0]

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
        call = Call(model, shape, noise, denoised_fn, cond_fn, model_kwargs, device, progress, seeds)
        return self._sample(table, True, call)

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
        call = Call(model, shape, noise, denoised_fn, cond_fn, model_kwargs, device, progress, seeds)
        return self._sample(table, False, call)

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
        call = Call(model, shape, noise, denoised_fn, cond_fn, model_kwargs, device, progress, seeds)
        return steps(self._process, table, True, call)

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
        call = Call(model, shape, noise, denoised_fn, cond_fn, model_kwargs, device, progress, seeds)
        return steps(self._process, table, False, call)

    # --- the loops ----------------------------------------------------------------------------------------------------

    def _sample(self, table: StepTable, ancestral: bool, call: Call) -> Tensor:
        if call.seeds is not None and call.cond_fn is None and call.denoised_fn is None:
            return self._by_sampler(table, call, call.seeds)
        (final,) = deque(steps(self._process, table, ancestral, call), maxlen=1)
        return final["sample"]

    def _by_sampler(self, table: StepTable, call: Call, seeds: int | Sequence[int]) -> Tensor:
        """The last `Sampler` again, if it is for the same: it may have a graph."""
        model, noise, device = call.model, call.noise, call.place()
        exact = torch.float64 if noise is not None and noise.dtype == torch.float64 else torch.float32
        last, sampler = self._last or (None, None)
        same = last == model and sampler is not None and sampler.device == device and sampler.state_dtype == exact
        if sampler is None or not same or not np.array_equal(sampler.table.rows, table.rows):
            sampler = Sampler(model, table, device=device, state_dtype=exact)
            self._last = model, sampler
        return sampler.sample(
            call.shape, seeds=seeds, x_T=noise, model_kwargs=call.model_kwargs, progress=call.progress
        )

    # --- what isn't here ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Losses, single steps, likelihoods, tables: those of the diffusion that `of` was given."""
        theirs = self.__dict__.get("_theirs")
        if theirs is not None and not name.startswith("__"):
            return getattr(theirs, name)
        raise AttributeError(
            f"this GaussianDiffusion has no {name}: it samples; GaussianDiffusion.of(diffusion) has guided-diffusion's"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}  # a copy makes its own


def _check_is_theirs(diffusion: Any) -> None:
    """`ConfigError` for a subclass that changes what a step is, or a namesake with other arguments."""
    for name in _STEP:
        owner = next((c for c in type(diffusion).__mro__ if name in vars(c)), None)
        changed = owner is not None and owner.__name__ not in _CLASSES
        if owner is not None and name in vars(GaussianDiffusion):
            own, known = (inspect.signature(vars(c)[name]).parameters for c in (owner, GaussianDiffusion))
            changed = changed or not set(own) <= set(known)
        if changed:
            raise ConfigError(
                f"a {type(diffusion).__name__} samples otherwise than guided-diffusion's GaussianDiffusion (its {name} "
                "is another); use its own loop, or GaussianDiffusion(betas, ...), which samples as guided-diffusion's"
            )

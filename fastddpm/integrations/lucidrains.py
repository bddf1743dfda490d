"""lucidrains' denoising-diffusion-pytorch (2.3): ``fastddpm.accelerate(diffusion).sample(16)``.

Its objectives, self-conditioning, spacing of time steps, its DDIM (noise that agrees with the clipped x_0), its clip to
[-1, 1] and its output in [0, 1] are kept, and the draws from torch's global generator in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from torch import Tensor

from ..buffers import initial_noise
from ..errors import ConfigError
from ..schedule import NoiseSchedule
from ..seeds import sample_seeds
from ..solvers import StepTable
from ..solvers.ddim import ddim_table
from ..solvers.ddpm import posterior_table
from .loops import SELF_CONDITION, Loops, strides_between

Seeds = int | Sequence[int] | None

_OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}
_KEPT = (  # what a step is made of: a subclass with another one samples another way
    "sample",
    "p_sample_loop",
    "ddim_sample",
    "p_sample",
    "p_mean_variance",
    "model_predictions",
    "q_posterior",
    "predict_start_from_noise",
    "predict_start_from_v",
    "predict_noise_from_start",
)


def accelerate(diffusion: Any, *, seeds: Seeds = None) -> Any:
    """Make `sample`, `p_sample_loop` and `ddim_sample` run through `Sampler`, and on CUDA through its graph; in place.

    They keep their arguments and results, and also take ``seeds=``, as in `Sampler.sample`: then the kernel makes the
    noise and nothing is drawn on the host. Weights, training, `interpolate`, and the `Trainer` stay as they are.
    A sample that isn't finite is a `NonFiniteError`.

    Args:
        diffusion: a `GaussianDiffusion`, or a subclass that samples as it does; any model(x, t, x_self_cond) in it.
        seeds: for the calls that are given none. None: torch's noise, as in the library.

    Returns:
        `diffusion`. `sampling_timesteps`, `ddim_sampling_eta` and the rest may be changed later; a copy or a pickle of
        it is accelerated too.

    Raises:
        ConfigError: for another kind of diffusion, and in `sample` for weights in float64.
    """
    if not isinstance(diffusion, _Front):
        changed = [
            name for name in _KEPT if getattr(type(diffusion), name, None) is not getattr(GaussianDiffusion, name)
        ]
        if changed:
            raise ConfigError(
                f"accelerate can't know how a {type(diffusion).__name__} samples (its {changed[0]} is not "
                "GaussianDiffusion's); use fastddpm.Sampler(model, table)"
            )
        cls: Any = type(diffusion)
        diffusion.__class__ = _fronted(cls)
        diffusion._fastddpm_loops = Loops()
    diffusion._fastddpm_seeds = seeds
    return diffusion


@cache
def _fronted(cls: type) -> type:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (_Front, cls), names)


def _blank(cls: type) -> Any:
    """An accelerated diffusion without a state, for a pickle to fill."""
    fronted: Any = _fronted(cls)
    return fronted.__new__(fronted)


class _Front:
    """What stands before the class of a diffusion."""

    model: Any
    betas: Tensor
    parameters: Callable[[], Iterable[Tensor]]
    num_timesteps: int
    sampling_timesteps: int
    ddim_sampling_eta: float
    is_ddim_sampling: bool
    objective: str
    self_condition: bool
    channels: int
    image_size: tuple[int, int]
    unnormalize: Callable[[Tensor], Tensor]
    _fastddpm_loops: Loops
    _fastddpm_seeds: Seeds

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A pickle names the library's class, for this one is made here."""
        state: tuple[Any, ...] = tuple(super().__reduce_ex__(protocol)[2:])
        return _blank, (type(self).__bases__[1],), *state

    def sample(self, batch_size: int = 16, return_all_timesteps: bool = False, *, seeds: Seeds = None) -> Tensor:
        """[batch_size, channels, height, width], in [0, 1]; or the states of all steps, [B, steps + 1, ...]."""
        run = self.ddim_sample if self.is_ddim_sampling else self.p_sample_loop
        return run((batch_size, self.channels, *self.image_size), return_all_timesteps, seeds=seeds)

    def p_sample_loop(self, shape: Sequence[int], return_all_timesteps: bool = False, *, seeds: Seeds = None) -> Tensor:
        """All time steps, by DDPM; as in the library."""
        times = range(self.num_timesteps - 1, -1, -1)
        strides = strides_between(self._schedule(), times, range(self.num_timesteps - 2, -2, -1))
        table = posterior_table(strides, strides.t != 0, prediction_type=_OBJECTIVES[self.objective], clip=1.0)
        return self._sampled(tuple(shape), table, return_all_timesteps, seeds)

    def ddim_sample(self, shape: Sequence[int], return_all_timesteps: bool = False, *, seeds: Seeds = None) -> Tensor:
        """`sampling_timesteps` of them, by DDIM; as in the library."""
        if not 1 <= self.sampling_timesteps <= self.num_timesteps:
            raise ConfigError(
                f"sampling_timesteps is {self.sampling_timesteps!r}; allowed: an integer in 1 ... {self.num_timesteps}"
            )
        points = torch.linspace(-1, self.num_timesteps - 1, steps=self.sampling_timesteps + 1, device="cpu")
        times = points.int().flip(0).tolist()
        table = ddim_table(
            strides_between(self._schedule(), times[:-1], times[1:]),
            eta=self.ddim_sampling_eta,
            use_clipped_model_output=True,
            prediction_type=_OBJECTIVES[self.objective],
            clip=1.0,
        )
        return self._sampled(tuple(shape), table, return_all_timesteps, seeds)

    def _schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_betas(self.betas.cpu().double().numpy())

    def _sampled(self, shape: tuple[int, ...], table: StepTable, all_timesteps: bool, seeds: Seeds) -> Tensor:
        from tqdm.auto import tqdm

        if any(p.dtype == torch.float64 for p in self.parameters()):
            raise ConfigError("the diffusion's weights are float64, its samples here float32; use diffusion.float()")
        seeds = self._fastddpm_seeds if seeds is None else seeds
        device, states = self.betas.device, []
        told = {SELF_CONDITION: torch.zeros(shape, device=device)} if self.self_condition else {}
        loop = self._fastddpm_loops.get(self.model, table, partial(_called, self.model))
        if seeds is None:
            x_T = torch.randn(shape, device=device)
        else:
            x_T = initial_noise(sample_seeds(seeds, shape[0]).to(device), shape[1:], torch.float32)

        def noise(row: int) -> Tensor | None:  # drawn even where eta is 0, and not for the last row
            return torch.randn(shape, device=device) if row + 1 < table.num_rows else None

        with tqdm(total=table.num_rows, desc="sampling loop time step") as bar:

            def after(row: int, x: Tensor) -> None:
                bar.update()
                if all_timesteps:
                    states.append(x.clone())

            last = loop.sample(
                shape,
                seeds=0 if seeds is None else seeds,
                x_T=x_T,
                noise=noise if seeds is None else None,
                callback=after,
                model_kwargs=told,
            )
        if not all_timesteps:
            return self.unnormalize(last)
        return self.unnormalize(torch.stack([x_T, *states], dim=1))


def _called(model: Callable[..., Any], x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Any:
    return model(x, t, x_self_cond)

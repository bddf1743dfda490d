"""Diffusion Policy and LeRobot: their sampling loop, `conditional_sample`, in one call.

A diffusion policy (Chi et al. 2023, arXiv 2303.04137) draws a short trajectory of actions, [B, horizon, dim], from a
network that is told of the observations. Both code bases sample it with diffusers' DDPMScheduler or DDIMScheduler:

    policy = accelerate_policy(policy)  # and policy.predict_action(obs) or policy.select_action(batch) as before

or, without a policy around it,

    conditional_sample(unet, (1, 16, 2), scheduler, global_cond=features)

The noise is torch's, drawn in the order of their loop, unless `seeds` are given: then a trajectory's noise is a
function of its seed alone. What is known of a trajectory (`condition_data` where `condition_mask`) is put into the
state before every evaluation of the model as it is, without noise, and is there at the end; in the step table that is
k_x = 1, k_z = 0 in every row.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..seeds import check_seed
from ._policy_sampler import PolicySampler

__all__ = ["PolicySampler", "accelerate_policy", "conditional_sample"]


def conditional_sample(
    model: Any,
    shape: Sequence[int],
    scheduler: Any,
    *,
    num_inference_steps: int | None = None,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    **conditions: Any,
) -> Tensor:
    """Draw trajectories: ``conditional_sample(unet, (B, horizon, action_dim), scheduler, global_cond=features)``.

    For more than one call make a `PolicySampler`, which keeps the table, and on a GPU the graph.

    Args:
        model: ConditionalUnet1D or any callable model(x, t, **given), x [B, horizon, dim], t int64 [B].
        shape: (B, horizon, dim).
        scheduler, num_inference_steps, eta, use_clipped_model_output: as in `PolicySampler`.
        conditions: those of `PolicySampler.sample`: condition_data, condition_mask, local_cond, global_cond, cond,
            generator, seeds, noise.

    Returns:
        [B, horizon, dim]. Raises what `PolicySampler` and its `sample` raise.
    """
    made = PolicySampler(
        model, scheduler, num_inference_steps, eta=eta, use_clipped_model_output=use_clipped_model_output
    )
    return made.sample(shape, **conditions)


def accelerate_policy(policy: Any, *, seed: int | None = None) -> Any:
    """Replace a policy's `conditional_sample` by one with the same signature and the same samples; returns the policy.

    For Diffusion Policy's classes (of UNet and Transformer, low-dimensional, image, hybrid and video), and LeRobot's
    DiffusionPolicy or its DiffusionModel. ``del policy.conditional_sample`` (LeRobot: of policy.diffusion) undoes it.
    The policy's model, scheduler and number of steps are read at every call, so they may be exchanged; a copy of the
    policy samples with the copy's model. (A conditional_sample of your own with the same arguments is replaced too.)

    Args:
        policy: the policy.
        seed: None: torch's noise, as theirs. An integer: noise by `PolicySampler.sample`'s `seeds`, the first call with
            this seed and each call after it with the next; ``policy.conditional_sample.seed = 0`` begins again.

    Raises:
        InputError: for an object that has not what such a policy has, or whose conditional_sample takes more.
        ConfigError: for its scheduler, as `PolicySampler` (at once, not at the first call).
    """
    inner = policy if hasattr(policy, "unet") else getattr(policy, "diffusion", policy)
    needed = ("conditional_sample", "noise_scheduler", "num_inference_steps")
    missing = [name for name in needed if not hasattr(inner, name)]
    if missing or not (hasattr(inner, "unet") or hasattr(inner, "model")):
        raise InputError(
            f"policy is a {type(policy).__name__} without {', '.join(missing) or 'model or unet'}; needed: a policy of "
            "Diffusion Policy or LeRobot, or else call conditional_sample"
        )
    loop: type[_Loop] = _UNetLoop
    if hasattr(inner, "unet"):
        loop = _LeRobotLoop
    elif "cond" in inspect.signature(inner.conditional_sample).parameters:
        loop = _TransformerLoop
    known = inspect.signature(loop.__call__).parameters
    more = [name for name in inspect.signature(inner.conditional_sample).parameters if name not in known]
    if more:
        raise InputError(
            f"the conditional_sample of {type(inner).__name__} takes {', '.join(more)}, as Diffusion Policy's and "
            "LeRobot's do not; keep the policy's own loop, or call fastddpm's conditional_sample"
        )
    made = loop(inner, None if seed is None else check_seed(seed))
    made.sampler()
    inner.conditional_sample = made
    return policy


class _Loop:
    """What stands in the place of a policy's `conditional_sample`."""

    model_name = "model"

    def __init__(self, policy: Any, seed: int | None) -> None:
        self.policy, self.seed = policy, seed
        self._made: tuple[tuple[Any, ...], tuple[Any, ...], PolicySampler] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}  # a copy makes its own, for its policy's model

    def sampler(self, eta: float = 0.0, use_clipped_model_output: bool = False) -> PolicySampler:
        """That of the policy as it is now; the last one where nothing has changed."""
        policy = self.policy
        model, scheduler = getattr(policy, self.model_name), policy.noise_scheduler
        config = getattr(scheduler, "config", None)
        steps = policy.num_inference_steps
        of = (model, scheduler, config)  # kept, so that an id stays theirs
        key = (*map(id, of), steps, eta, use_clipped_model_output)
        if self._made is None or self._made[0] != key:
            made = PolicySampler(model, scheduler, steps, eta=eta, use_clipped_model_output=use_clipped_model_output)
            self._made = key, of, made
        return self._made[2]

    def run(self, shape: Sequence[int], step: dict[str, Any], **conditions: Any) -> Tensor:
        """Sample; `step` are the keywords of the scheduler's step."""
        unknown = set(step) - {"eta", "use_clipped_model_output"}
        if unknown:
            raise ConfigError(f"{', '.join(sorted(unknown))}: not supported; allowed: eta, use_clipped_model_output")
        if self.seed is None or conditions.get("generator") is not None:
            return self.sampler(**step).sample(shape, **conditions)
        made = self.sampler(**step).sample(shape, seeds=self.seed, **conditions)
        self.seed = (self.seed + 1) % 2**64
        return made


class _UNetLoop(_Loop):
    """Diffusion Policy with ConditionalUnet1D."""

    def __call__(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        known = {"condition_data": condition_data, "condition_mask": condition_mask, "generator": generator}
        return self.run(condition_data.shape, kwargs, local_cond=local_cond, global_cond=global_cond, **known)


class _TransformerLoop(_Loop):
    """Diffusion Policy with TransformerForDiffusion."""

    def __call__(
        self,
        condition_data: Tensor,
        condition_mask: Tensor,
        cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        known = {"condition_data": condition_data, "condition_mask": condition_mask, "generator": generator}
        return self.run(condition_data.shape, kwargs, cond=cond, **known)


class _LeRobotLoop(_Loop):
    """LeRobot's DiffusionModel."""

    model_name = "unet"

    def __call__(
        self,
        batch_size: int,
        global_cond: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        config = self.policy.config
        shape = (batch_size, config.horizon, config.action_feature.shape[0])
        return self.run(shape, {}, global_cond=global_cond, generator=generator, noise=noise)

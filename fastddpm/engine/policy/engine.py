"""`PolicyEngine`: a diffusion policy's UNet lowered to fused operations, as a model to sample with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import InputError
from ..base import Compiled, check_kernels_can_run, kernels_run
from ..lowering import Lowered, uses
from ..plan import Plan
from . import on_torch, on_triton
from .film import FilmRows
from .lowering import at_horizon, lower, operations_of
from .network import read


class PolicyEngine(Compiled):
    """A policy's UNet that runs fast: ``PolicyEngine(policy.model)``. ``print(engine)`` shows its plan.

    The weights are copies: make another after changing or moving those of the UNet. It computes what the UNet does in
    eval mode, without gradients or autocast.

    Where an observation is used for several steps, `condition` does its part once; a call with `global_cond` does it
    anew each time.

    Args:
        unet: ConditionalUnet1D of Diffusion Policy, or LeRobot's DiffusionConditionalUnet1d.
        batch, horizon: trajectories a call and moments a trajectory, for the plan; others are allowed in a call.
        dtype: of weights and activations. Sums, and the FiLM rows, are float32 (float64 in float64).
        steps: how many time steps the model was trained with: their part of FiLM is computed now.
        kernels: whether to use fastddpm's kernel, else PyTorch's; None: on CUDA, but for float64, and for networks and
            horizons that it doesn't take.

    Raises:
        InputError: for a module of another structure, or with a local condition; another dtype; a horizon that the
            network doesn't take.
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        batch: int = 1,
        horizon: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        steps: int = 100,
        kernels: bool | None = None,
    ) -> None:
        super().__init__(dtype, batch=batch, horizon=horizon, steps=steps)
        network = read(unet)
        first: Any = unet.get_submodule(network.downs[0].first.first.conv)
        self.channels = first.in_channels
        self.multiple = 2 ** sum(bool(level.resample) for level in network.downs)
        self.check_shape((horizon, self.channels))
        lowered = lower(network, unet, horizon)
        self.plan = Plan.of_lowered(lowered, batch, dtype.itemsize)
        # By batch and horizon, for all threads. Not a method: the engine would keep itself, and its weights, in memory.
        self._plan = lru_cache(maxsize=16)(partial(_planned, lowered, dtype))
        self._own = self._uses_kernels(kernels, dtype, first.weight.device)
        maker = on_triton.maker if self._own else on_torch.maker
        with torch.no_grad(), torch.autocast(first.weight.device.type, enabled=False):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            self.film = FilmRows(unet, lowered, steps, wide)
            self._runs: list[Any] = [maker(operation, unet, dtype) for operation in operations_of(self.plan.lowered)]
        self.place(first.weight.device, dtype)
        self._dies = {value.index: last for value, _, last in uses(lowered)}

    @property
    def known_timesteps(self) -> int:
        """How many rows the table of time steps has."""
        return len(self.film.table)

    @torch.no_grad()
    def forward(
        self, x: Tensor, t: Tensor | float, *, local_cond: None = None, global_cond: Tensor | None = None
    ) -> Tensor:
        """What the UNet predicts: x [B, horizon, C], t a number or [B], global_cond [B, n]; returns [B, horizon, C].

        On a GPU, integers in a tensor t must be below `steps`: nobody looks. (A `Sampler` does, before it begins.)

        Raises:
            InputError: for a shape that the network doesn't take, or a local_cond.
        """
        if local_cond is not None:
            raise InputError("the engine has no local_cond: leave it out, or keep the module itself")
        self._check(x)
        with torch.autocast(x.device.type, enabled=False):
            return self._run(x, t, self.film.observation(len(x), global_cond))

    def condition(self, global_cond: Tensor) -> ConditionedPolicy:
        """The model (x, t) for these observations, [B, n]: their part of FiLM is computed now, once for all steps.

        Raises:
            InputError: where they have another shape, or the network has no observations: then call the engine itself.
        """
        return ConditionedPolicy(self, global_cond)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise `InputError` unless trajectories may have this shape, (horizon, channels)."""
        if len(shape) != 2 or shape[1] != self.channels or shape[0] % self.multiple or not shape[0]:
            raise InputError(
                f"trajectories have shape {tuple(shape)}; the network takes (horizon, {self.channels}), "
                f"horizon a multiple of {self.multiple}"
            )

    def _check(self, x: Tensor) -> None:
        if x.ndim != 3:
            raise InputError(f"x has shape {tuple(x.shape)}; the network takes [batch, horizon, channels]")
        self.check_shape(x.shape[1:])
        if x.device != self.dtype_.device:
            raise InputError(f"x is on {x.device}, the engine on {self.dtype_.device}; they must be on one device")

    def _run(self, x: Tensor, t: Tensor | float, observation: Tensor | None) -> Tensor:
        rows = self.film.time(len(x), t)
        rows = rows if observation is None else rows + observation
        x = x.to(self.dtype).contiguous()[:, None]
        return self._by_kernels(x, rows)[:, 0] if self._own else self._by_torch(x, rows)[:, 0]

    def _by_torch(self, x: Tensor, rows: Tensor) -> Tensor:
        lowered = self.plan.lowered
        values = {lowered.given.index: x.permute(0, 3, 1, 2)}
        for at, (operation, run) in enumerate(zip(operations_of(self.plan.lowered), self._runs, strict=True)):
            residual = None if operation.residual is None else values[operation.residual.index]
            values[operation.out.index] = run([values[v.index] for v in operation.sources], rows, residual)
            for value in operation.reads:
                if self._dies.get(value.index) == at:
                    del values[value.index]
        return values[lowered.out.index].permute(0, 2, 3, 1).contiguous()

    def _by_kernels(self, x: Tensor, rows: Tensor) -> Tensor:
        """All memory is this call's own, from torch's allocator: two streams or threads never share it."""
        plan, partials, counts = self._plan(len(x), x.shape[2])
        block = torch.empty(plan.memory // plan.width, dtype=self.dtype, device=x.device)
        partial = torch.empty(partials, dtype=torch.float32, device=x.device)
        counters = torch.zeros(counts[-1].stop, dtype=torch.int32, device=x.device)
        lowered = plan.lowered
        values = {lowered.given.index: x}
        for operation, run, count in zip(operations_of(plan.lowered), self._runs, counts, strict=True):
            value = operation.out
            shape = (len(x), 1, value.width, value.channels)
            strides = (value.elements, value.elements, value.channels, 1)
            out = block.as_strided(shape, strides, plan.offsets[value.index] // plan.width)
            if value == lowered.out:
                out = torch.empty(shape, dtype=self.dtype, device=x.device)
            values[value.index] = out
            residual = None if operation.residual is None else values[operation.residual.index]
            run(out, [values[v.index] for v in operation.sources], rows, residual, partial, counters[count])
        return values[lowered.out.index]

    def _uses_kernels(self, asked: bool | None, dtype: torch.dtype, device: torch.device) -> bool:
        able = dtype != torch.float64 and all(map(on_triton.fits, operations_of(self.plan.lowered)))
        if asked and not able:
            raise InputError("the kernel takes no torch.float64, horizon over 64 or group over 128: leave kernels out")
        if asked:
            check_kernels_can_run(device)
        return able and kernels_run(device, dtype) if asked is None else asked


def _planned(lowered: Lowered, dtype: torch.dtype, batch: int, horizon: int) -> tuple[Plan, int, list[slice]]:
    """The plan for a call, elements of its partial sums, and each operation's counters."""
    plan = Plan.of_lowered(at_horizon(lowered, horizon), batch, dtype.itemsize)
    if not all(map(on_triton.fits, operations_of(plan.lowered))):
        raise InputError(f"the kernel doesn't take horizon {horizon}: compile with kernels=False")
    return plan, *on_triton.scratch_of(plan, dtype)


class ConditionedPolicy(nn.Module):
    """A `PolicyEngine` that knows its observations: ``model(x, t)``, for a `Sampler`. Made by `PolicyEngine.condition`.

    A CUDA graph of it reads the observations where they are, so after `observe` it draws for the new ones.
    """

    def __init__(self, engine: PolicyEngine, global_cond: Tensor) -> None:
        super().__init__()
        self.engine = engine
        rows = self._rows(global_cond, None)
        with torch.inference_mode(False):  # memory that `observe` may write to, in whatever mode that is called
            self.rows = torch.empty_like(rows)
        self.rows.copy_(rows)

    def observe(self, global_cond: Tensor) -> None:
        """Replace the observations by others, [B, n], of as many trajectories."""
        self.rows.copy_(self._rows(global_cond, len(self.rows)))

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        """What the UNet predicts, as `PolicyEngine.forward`; x has as many trajectories as there are observations."""
        self.engine._check(x)
        if len(x) != len(self.rows):
            raise InputError(f"x has {len(x)} trajectories, and there are {len(self.rows)} observations; they must fit")
        with torch.autocast(x.device.type, enabled=False):
            return self.engine._run(x, t, self.rows)

    def check_shape(self, shape: Sequence[int]) -> None:
        """As the engine's."""
        self.engine.check_shape(shape)

    def check_timesteps(self, t: Sequence[float]) -> None:
        """As the engine's."""
        self.engine.check_timesteps(t)

    @torch.no_grad()
    def _rows(self, global_cond: Tensor, batch: int | None) -> Tensor:
        """Their part of FiLM; of `batch` trajectories, where that is known."""
        if not isinstance(global_cond, Tensor) or global_cond.ndim != 2:
            what = list(global_cond.shape) if isinstance(global_cond, Tensor) else type(global_cond).__name__
            raise InputError(f"global_cond is {what}; give the observations, a tensor [B, n]")
        with torch.autocast(self.engine.dtype_.device.type, enabled=False):
            rows = self.engine.film.observation(len(global_cond) if batch is None else batch, global_cond)
        return cast(Tensor, rows)  # None is of no observation

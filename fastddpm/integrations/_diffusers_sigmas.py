"""What the drop-in schedulers of Karras' sigmas share: Euler, ancestral Euler, Heun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._diffusers_plan import EXACT, Fused, Plan


class SigmaPlan(Plan):
    """`Plan` of a scheduler that counts its steps. Its time steps are float32, and may be there twice.

    Attributes:
        on_host: the time steps, a tensor on the CPU.
    """

    def __init__(
        self,
        timesteps: Tensor,
        on_host: Tensor,
        columns: Sequence[Tensor],
        table: Callable[[], Any] | None,
        seen: tuple[Any, ...],
    ) -> None:
        there = [True] * (len(columns[0]) if columns else 0)
        super().__init__(timesteps, on_host.tolist(), columns, there, table, seen)
        self.on_host = on_host
        self._columns = columns

    @cached_property
    def _tensors(self) -> list[tuple[Tensor, ...]]:
        with torch.inference_mode(False):
            values = torch.stack([c.to(torch.float32) for c in self._columns], dim=1).view(-1).unbind(0)
        return list(zip(*[iter(values)] * len(self._columns), strict=True))

    def row(self, at: int) -> Any:
        """The row of a step, or None. Its values are tensors of one element, which torch takes in half of a number's
        time (1.4 us a product for 3.1); in compiled code they are numbers, which it makes constants.
        """
        if not 0 <= at < len(self.rows):
            return None
        return self.rows[at] if torch.compiler.is_compiling() else self._tensors[at]

    def same(self, host: Tensor, sigmas: Tensor, device: Any) -> bool:
        """Whether its time steps and sigmas are these still. In inference mode nobody knows."""
        t = self.timesteps
        return (
            self.knows(t)
            and not t.is_inference()
            and (host.dtype, host.shape, sigmas.shape) == (t.dtype, t.shape, self.seen[2].shape)
            and torch.equal(host, self.on_host)
            and torch.equal(sigmas, self.seen[2])
            and t.device == torch.empty(0, device="cpu" if device is None else device).device
        )

    def place(self, timestep: Any) -> int | None:
        """The row of an item of `timesteps`, by its address: nothing is read. Where it is there twice, the second."""
        t = self.timesteps
        if (
            not isinstance(timestep, Tensor)
            or timestep.numel() != 1
            or (timestep.dtype, timestep.device)
            != (
                t.dtype,
                t.device,
            )
        ):
            return None
        at, within = divmod(timestep.data_ptr() - t.data_ptr(), t.stride(0) * t.element_size())
        return self.positions[self.host[at]][:2][-1] if 0 <= at < len(self.host) and not within else None


class FusedSigmas(Fused):
    """Finding the step, scaling the model's input, and x0."""

    config: Any  # these are of diffusers' class
    sigmas: Any
    is_scale_input_called: bool
    _step_index: Any
    _begin_index: Any

    _plan: SigmaPlan | None = None

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a time step, as diffusers has it: where it is there twice, the second. IndexError for others."""
        stock: Any = super()
        if schedule_timesteps is not None and schedule_timesteps is not self.timesteps:
            return int(stock.index_for_timestep(timestep, schedule_timesteps))
        plan = self._planned()
        at = plan.place(timestep)
        if at is not None:
            return at
        known = timestep.cpu() if isinstance(timestep, Tensor) else timestep
        return int(stock.index_for_timestep(known, plan.on_host))

    @torch.compiler.disable
    def _init_step_index(self, timestep: Any) -> None:
        """Where a trajectory starts. (Compiled code stops here, unless `set_begin_index` was called.)"""
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _at(self, timestep: Any) -> int:
        """The index of the step that is to be taken."""
        if self._step_index is None:
            if self._begin_index is None:
                self._init_step_index(timestep)
            else:
                self._step_index = self._begin_index
        at: Any = self._step_index
        return int(at)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The model's input, sample / sqrt(sigma^2 + 1), as diffusers has it; a fresh tensor."""
        row = self._planned().row(self._at(timestep))
        if row is None:
            scaled: Tensor = getattr(super(), "scale_model_input")(sample, timestep)  # noqa: B009 (of diffusers' class)
            return scaled
        self.is_scale_input_called = True
        return sample / row[0]

    def _x0(self, row: Sequence[Any], m: Tensor, x: Tensor) -> Tensor:
        """The predicted clean sample, by diffusers' operations; a fresh tensor."""
        kind = self.config.prediction_type
        if kind == "epsilon":
            return x - m * row[1]  # laid out as x, as there
        return (m * row[-2]).add_(x / row[-1]) if kind == "v_prediction" else m.clone()

    def _eager(self, m: Tensor, x: Tensor) -> bool:
        """Whether the operations in place equal diffusers', with x cast to float32."""
        return m.dtype in EXACT and m.device == x.device

    def _started(self, device: Any) -> None:
        """Make the plan of the time steps, which are on the CPU, and move them to `device`.

        Where all is as it was (a pipeline sets the same before each picture) the plan and what it is made of stay.
        """
        host, plan = self.timesteps, self._plan
        if plan is not None and plan.same(host, self.sigmas, device):
            self.timesteps, self.sigmas = plan.seen[1:3]
        else:
            self.timesteps = host.to(device)
            self._plan = self._made(host)

    def _planned(self) -> SigmaPlan:
        """The plan of the time steps and sigmas as they are now."""
        plan = self._plan
        return self._renewed() if plan is None or not plan.made_from(*self._seen()) else plan

    @torch.compiler.disable
    def _renewed(self) -> SigmaPlan:
        """A new plan. Only time steps that somebody else has set are read from a device."""
        plan = self._plan
        known = plan is not None and plan.knows(self.timesteps)
        self._plan = self._made(plan.on_host if plan is not None and known else self.timesteps.cpu())
        return self._plan

    def _seen(self) -> tuple[Any, ...]:
        return self._internal_dict, self.timesteps, self.sigmas

    def _made(self, host: Tensor) -> SigmaPlan:
        """The plan of time steps whose values are `host`'s."""
        raise NotImplementedError

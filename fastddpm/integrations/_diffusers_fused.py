"""What the drop-in schedulers share: keeping the plan, the kernel's call, the noise, and counting the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from fastddpm_kernels import normal, reverse_step
from fastddpm_kernels.constants import STREAM_STEP
from torch import Tensor

from ..errors import InputError
from ..seeds import sample_seeds
from ._diffusers_plan import Plan


class Fused:
    """The part of a drop-in scheduler that diffusers' class doesn't have.

    By default the noise is torch's, drawn as diffusers draws it. `use_counter_noise` is a switch of the object: nothing
    of it is in the config.
    """

    config: Any  # these are of diffusers' class
    _internal_dict: Any
    timesteps: Any
    num_inference_steps: Any

    _plan: Plan | None = None
    _seeds: int | Sequence[int] | None = None
    _seeds_on: tuple[Any, Tensor] | None = None
    _hooks: tuple[str, ...] = ()  # diffusers' methods that a step of its own calls, and ours does not
    _kernel_devices: tuple[str, ...] = ("cuda",)

    def use_counter_noise(self, seeds: int | Sequence[int] | None) -> None:
        """Draw the noise of the steps from a counter, so that a sample's depends on its seed alone, or stop doing so.

        Args:
            seeds: one integer for all, from which each sample's seed is mixed, or one a sample, as in
                `fastddpm.Sampler.sample`, which gives the same noise. None: torch's noise again.

        Raises:
            InputError: in this call or in a step: seeds that aren't integers in 0 ... 2^64 - 1, or not one a sample; a
                generator beside them.
        """
        if seeds is not None:
            sample_seeds(seeds, len(seeds) if isinstance(seeds, Sequence) else 1)
        self._seeds, self._seeds_on = seeds, None

    def __getstate__(self) -> dict[str, Any]:
        """All but the plan, which knows its time steps by where they are: a copy makes its own."""
        return {**vars(self), "_plan": None}

    # --- the plan ---

    def _started(self, device: Any) -> None:
        """Make the plan of the time steps that diffusers has set on the CPU, and move them to `device`.

        Where all is as it was (a pipeline sets the same before each picture) the plan and what it is made of stay.
        """
        host, sigmas, plan = self.timesteps.cpu(), vars(self).get("sigmas"), self._plan
        if plan is not None and plan.same(host, sigmas, device):
            self.timesteps = plan.timesteps
            if sigmas is not None:
                vars(self)["sigmas"] = plan.seen[2]
        else:
            self.timesteps = self.timesteps.to(device)
            self._plan = self._made(host, *(plan.given if plan is not None else ()))

    def _planned(self, *given: Any) -> Plan:
        """The plan of the scheduler as it is now, for these arguments of a step (any, where there are none)."""
        plan = self._plan  # of threads with different arguments, each keeps its own
        if plan is None or (given and given != plan.given) or not plan.made_from(*self._seen()):
            return self._renewed(*given)
        return plan

    @torch.compiler.disable
    def _renewed(self, *given: Any) -> Plan:
        """A new plan. Only time steps that somebody else has set are read from a device."""
        before = self._plan
        known = before is not None and before.knows(self.timesteps)
        host = before.on_host if before is not None and known else self.timesteps.cpu()
        plan = self._plan = self._made(host, *(given or (before.given if before is not None else ())))
        return plan

    def _seen(self) -> tuple[Any, ...]:
        """What a plan is made from: see `Plan.seen`."""
        own = vars(self)
        hooks = [own.get(name) or getattr(type(self), name) for name in self._hooks]
        return self._internal_dict, self.timesteps, own.get("sigmas"), *hooks

    def _made(self, host: Tensor, *given: Any) -> Plan:
        """The plan of time steps whose values are `host`'s, for these arguments of a step, or for the default ones."""
        raise NotImplementedError

    def _plan_of(
        self,
        host: Tensor,
        columns: Sequence[Tensor] = (),
        exists: Sequence[bool] | None = None,
        table: Callable[[], Any] | None = None,
    ) -> Plan:
        """`Plan` of these columns; without any, diffusers is asked."""
        return Plan(self._seen(), host, columns, exists, table)

    def _replaced(self) -> bool:
        """Whether somebody has put another in the place of a method of `_hooks`: then diffusers is to be asked."""
        own = next(c for c in type(self).__mro__ if c.__module__.startswith("fastddpm."))
        return any(h in vars(self) or getattr(type(self), h) is not getattr(own, h) for h in self._hooks)

    def _stock(self, step: Callable[..., Any], *args: Any) -> Any:
        """diffusers' own step, which draws torch's noise."""
        if self._seeds is not None:
            raise InputError(
                "diffusers itself does this step (its config, dtype or time step has no row), without counter-based "
                "noise; turn that off: use_counter_noise(None)"
            )
        return step(*args)

    # --- the noise ---

    def _checked_generator(self, generator: Any) -> None:
        if generator is not None and self._seeds is not None:
            raise InputError(
                "a generator is given, and counter-based noise is on; use_counter_noise(None) turns it off"
            )

    def _bits(self, batch: int, device: torch.device) -> Tensor:
        """The samples' seeds, int64 [batch] on the device."""
        key = (batch, device)
        if self._seeds_on is None or self._seeds_on[0] != key:
            self._seeds_on = key, sample_seeds(self._seeds or 0, batch).to(device)
        return self._seeds_on[1]

    def _torchs(self, like: Tensor, dtype: torch.dtype, generator: Any) -> Tensor | None:
        """Standard normal noise of torch; None where the counter's is to be used, which the kernel makes itself."""
        if self._seeds is not None:
            return None
        noise: Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
        return noise

    def _drawn(self, like: Tensor, dtype: torch.dtype, row: int, generator: Any) -> Tensor:
        """Standard normal noise: torch's, or the counter's of this row."""
        noise = self._torchs(like, dtype, generator)
        if noise is None:
            bits = self._bits(like.shape[0], like.device)
            noise = normal(bits, like.shape[1:], step=row, stream=STREAM_STEP).to(dtype)
        return noise

    # --- the kernel ---

    def _kernel_takes(self, plan: Plan, row: int, model_output: Tensor, sample: Tensor) -> bool:
        """Whether the fused kernel does this step."""
        return (
            plan.has_table
            and sample.device.type in self._kernel_devices
            and sample.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and model_output.dtype in (torch.float32, torch.float16, torch.bfloat16)
            and model_output.device == sample.device
            and not (torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad))
            and plan.finite(row)
        )

    def _step_by_kernel(
        self,
        plan: Plan,
        row: int,
        model_output: Tensor,
        sample: Tensor,
        past: Sequence[Tensor] = (),
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(x', x0), float32, like the sample. `past` and `z`: what the columns x_h1, x_h2, x_h3 and x_z are for.

        A step is elementwise, so that all samples can be one, in the order that they have in memory. Only where the
        kernel makes noise, whose counter is an element's index in its sample, they stay apart and in row-major order.
        """
        counted, strides = z is None and self._seeds is not None, sample.stride()
        order = sorted(range(sample.ndim), key=lambda d: 0 if counted else -strides[d])
        turned = sample.permute(order)
        batch = sample.shape[0] if counted else 1
        x, m, *terms = [v.permute(order).reshape(batch, -1) for v in (sample, model_output, *past)]
        if z is not None:
            z = z.permute(order).reshape(batch, -1).float()
        table, cursors, seeds = plan.on(sample.device, batch)
        if counted:
            seeds = self._bits(batch, sample.device)
        h1, h2, h3 = (*(v.float() for v in terms), None, None, None)[:3]
        noisy = counted or z is not None
        out, x0, _ = reverse_step(
            x.float(), m, table, cursors[row], seeds, h1=h1, h2=h2, h3=h3, z=z, limited=plan.limited, noise=noisy
        )
        back = sorted(range(sample.ndim), key=order.__getitem__)
        return out.view(turned.shape).permute(back), x0.view(turned.shape).permute(back)


class Counted(Fused):
    """Finding the step, in a scheduler that counts its steps."""

    _step_index: Any  # these are of diffusers' class
    _begin_index: Any

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a time step, as diffusers has it: where it is there twice, the second."""
        stock: Any = super()
        if schedule_timesteps is not None and schedule_timesteps is not self.timesteps:
            return int(stock.index_for_timestep(timestep, schedule_timesteps))
        plan = self._planned()
        at = plan.locate(timestep)
        if at is None:
            return int(stock.index_for_timestep(timestep))
        return plan.positions[plan.host[at]][:2][-1]

    def _init_step_index(self, timestep: Any) -> None:
        """Where a trajectory starts."""
        self._step_index = self._searched(timestep) if self._begin_index is None else self._begin_index

    @torch.compiler.disable
    def _searched(self, timestep: Any) -> int:
        """`index_for_timestep`; compiled code stops here, unless `set_begin_index` was called."""
        return self.index_for_timestep(timestep)

    def _at(self, timestep: Any) -> int:
        """The index of the step that is to be taken."""
        if self._step_index is None:
            self._init_step_index(timestep)
        at: int = self._step_index
        return at


def as_stock(prev: Tensor, x0: Tensor, m: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The kernel's (prev, x0) in the dtypes that diffusers' arithmetic gives them."""
    both = torch.promote_types(m.dtype, x.dtype)
    return prev.to(both), x0.to(m.dtype if kind == "sample" else both)

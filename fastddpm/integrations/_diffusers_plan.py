"""What the drop-in schedulers share: the plan of a trajectory, the kernel's call, and the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from fastddpm_kernels import normal, reverse_step
from fastddpm_kernels.constants import STREAM_STEP
from torch import Tensor

from ..errors import InputError
from ..seeds import sample_seeds

EXACT = (torch.float32, torch.float64)  # dtypes whose eager path equals diffusers' to the last bit
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LEARNED = ("learned", "learned_range")


class Plan:
    """The coefficients of a trajectory, made when the time steps are set.

    Attributes:
        timesteps: the scheduler's own tensor, [n].
        host: its values.
        rows: coefficients of the eager path, a tuple of numbers a row; None where diffusers is to be asked.
        seen: what they were made from: attributes of the scheduler, compared by identity. Tensors that are changed in
            place are noticed too (but for those made in inference mode, which count no versions).
        eta: of DDIM.
    """

    eta: float = 0.0

    def __init__(
        self,
        timesteps: Tensor,
        host: list[int],
        columns: Sequence[Tensor],
        exists: Sequence[bool],
        table: Callable[[], Any] | None,
        seen: tuple[Any, ...],
    ) -> None:
        self.timesteps, self.host, self.seen, self._made = timesteps, host, seen, table
        given = zip(*(c.tolist() for c in columns), strict=True)
        self.rows: list[Any] = [row if there else None for row, there in zip(given, exists, strict=True)]
        self.positions: dict[int, list[int]] = {}
        for i, t in enumerate(host):
            self.positions.setdefault(t, []).append(i)
        self._stride = timesteps.stride(0) * timesteps.element_size()
        self._versions, self._counted = _versions(seen), _versions([timesteps])
        self._devices: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    @property
    def has_table(self) -> bool:
        """Whether there are rows for the kernel."""
        return self._made is not None

    @cached_property
    def table(self) -> Any:
        """The rows for the kernel, float64 [n + 1, columns], the last an identity row; made when they are asked for."""
        return self._made() if self._made is not None else None

    def made_from(self, *seen: Any) -> bool:
        """Whether it was made from these very objects."""
        if not all(a is b for a, b in zip(self.seen, seen, strict=True)):
            return False
        return torch.compiler.is_compiling() or self._versions == _versions(seen)

    def knows(self, timesteps: Tensor) -> bool:
        """Whether `host` are the values of `timesteps`."""
        return timesteps is self.timesteps and _versions([timesteps]) == self._counted

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_devices": {}}

    def locate(self, timestep: Any) -> int | None:
        """The (first) row of a time step, or None.

        An item of `timesteps` is a view of it, so that its address is its index: no value is read, and no device waited
        for. Another tensor's value is read; on a GPU that waits.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1 or timestep.ndim > 1:
                return None
            offset = timestep.data_ptr() - self.timesteps.data_ptr()
            if 0 <= offset < self._stride * len(self.host) and timestep.device == self.timesteps.device:
                return self.positions[self.host[offset // self._stride]][0]
            timestep = timestep.item()
        at = self.positions.get(timestep)
        return at[0] if at else None

    def index_by_time(self, columns: Sequence[Tensor], times: Tensor | None = None) -> None:
        """Prepare `row_of`. `times`: the columns' time steps, where they are not those of the plan."""
        at = torch.tensor(self.host, device="cpu") if times is None else times
        by_time = torch.full((int(at.max()) + 1, len(columns)), torch.nan, dtype=columns[0].dtype, device="cpu")
        by_time[at] = torch.stack(list(columns), dim=1)
        self._table_by_time = by_time.to(self.timesteps.device)

    def row_of(self, timestep: Tensor) -> tuple[Tensor, ...]:
        """The row of a time step, as tensors: for compiled code, which can't see addresses. NaN where there is none."""
        return self._table_by_time.index_select(0, timestep.reshape(1).to(self._table_by_time.device))[0].unbind(0)

    def on(self, device: torch.device, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """The kernel's table on a device, cursors, int32 [rows, batch], and seeds of 0; made once."""
        key = (device, batch)
        if key not in self._devices:
            with torch.inference_mode(False):
                table = torch.from_numpy(self.table.astype(np.float32)).to(device)
                cursors = torch.arange(len(table), dtype=torch.int32).repeat_interleave(batch).view(-1, batch)
                self._devices[key] = table, cursors.to(device), torch.zeros(batch, dtype=torch.int64, device=device)
        return self._devices[key]

    def finite(self, row: int) -> bool:
        """Whether a row of the table is made of numbers: where a level has no signal, diffusers divides by 0."""
        return bool(self._finite[row])

    @cached_property
    def _finite(self) -> list[bool]:
        from fastddpm_kernels.columns import CLIP

        good: list[bool] = np.isfinite(np.delete(self.table, CLIP, axis=1).astype(np.float32)).all(axis=1).tolist()
        return good


def _versions(seen: Sequence[Any]) -> list[int]:
    """How often each tensor was changed in place."""
    return [v._version for v in seen if isinstance(v, Tensor) and not v.is_inference()]


class Fused:
    """The part of a drop-in scheduler that diffusers' class doesn't have.

    By default the noise is torch's, drawn as diffusers draws it. `use_counter_noise` is a switch of the object: nothing
    of it is in the config.
    """

    config: Any  # these are of diffusers' class
    _internal_dict: Any
    timesteps: Any
    alphas_cumprod: Any
    num_inference_steps: Any
    model_outputs: Any
    _threshold_sample: Any

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

    def _replaced(self) -> bool:
        """Whether somebody has put another in the place of a method of `_hooks`: then diffusers is to be asked."""
        own = next(c for c in type(self).__mro__ if c.__module__.startswith("fastddpm."))
        return any(h in vars(self) or getattr(type(self), h) is not getattr(own, h) for h in self._hooks)

    def _checked_generator(self, generator: Any) -> None:
        if generator is not None and self._seeds is not None:
            raise InputError(
                "a generator is given, and counter-based noise is on; use_counter_noise(None) turns it off"
            )

    def _stock(self, step: Callable[..., Any], *args: Any) -> Any:
        """diffusers' own step, which draws torch's noise."""
        if self._seeds is not None:
            raise InputError(
                "diffusers itself does this step (its config, dtype or time step has no row), without counter-based "
                "noise; turn that off: use_counter_noise(None)"
            )
        return step(*args)

    def _bits(self, batch: int, device: torch.device) -> Tensor:
        """The samples' seeds, int64 [batch] on the device."""
        key = (batch, device)
        if self._seeds_on is None or self._seeds_on[0] != key:
            self._seeds_on = key, sample_seeds(self._seeds or 0, batch).to(device)
        return self._seeds_on[1]

    def _drawn(self, like: Tensor, dtype: torch.dtype, row: int, generator: Any) -> Tensor:
        """Standard normal noise: torch's, or the counter's of this row."""
        if self._seeds is None:
            return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)
        bits = self._bits(like.shape[0], like.device)
        return normal(bits, like.shape[1:], step=row, stream=STREAM_STEP).to(dtype)

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
        self, plan: Plan, row: int, model_output: Tensor, sample: Tensor, past: Sequence[Tensor], limited: bool
    ) -> tuple[Tensor, Tensor]:
        """(x', x0), float32, like the sample. `past`: what the columns x_h1, x_h2, x_h3 are for: earlier x0, or noise.

        A step is elementwise, so that all samples can be one, in the order that they have in memory. Only where the
        kernel makes noise, whose counter is an element's index in its sample, they stay apart and in row-major order.
        """
        counted, strides = self._seeds is not None, sample.stride()
        order = sorted(range(sample.ndim), key=lambda d: 0 if counted else -strides[d])
        turned = sample.permute(order)
        batch = sample.shape[0] if counted else 1
        x, m, *past = [v.permute(order).reshape(batch, -1) for v in (sample, model_output, *past)]
        table, cursors, seeds = plan.on(sample.device, batch)
        if counted:
            seeds = self._bits(batch, sample.device)
        h1, h2, h3 = (*(v.float() for v in past), None, None, None)[:3]
        out, x0, _ = reverse_step(
            x.float(), m, table, cursors[row], seeds, h1=h1, h2=h2, h3=h3, limited=limited, noise=counted
        )
        back = sorted(range(sample.ndim), key=order.__getitem__)
        return out.view(turned.shape).permute(back), x0.view(turned.shape).permute(back)

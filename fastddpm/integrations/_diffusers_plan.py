"""The plan of a drop-in scheduler's trajectory: its coefficients, and where a time step is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from fastddpm_kernels import columns as col
from torch import Tensor

EXACT = (torch.float32, torch.float64)  # dtypes whose eager path equals diffusers' to the last bit
PREDICTIONS = ("epsilon", "sample", "v_prediction")
LEARNED = ("learned", "learned_range")


class Plan:
    """The coefficients of a trajectory, made when the time steps are set.

    Attributes:
        timesteps: the scheduler's own tensor, [n].
        on_host, host: its values, a tensor on the CPU and a list.
        rows: coefficients of the eager path, a tuple of numbers a row; None where diffusers is to be asked.
        seen: what they were made from: the scheduler's config, time steps, sigmas (or None) and other attributes, known
            again by identity, numbers and strings by value. Tensors that are changed in place are noticed too (but for
            those made in inference mode, which count no versions).
        given: the arguments of the step that they were made for: DDIM's eta, Euler's churn.
        orders: of a multistep solver: the plans of its orders, itself first.
    """

    given: tuple[Any, ...] = ()
    orders: tuple[Plan, ...] = ()

    def __init__(
        self,
        seen: tuple[Any, ...],
        on_host: Tensor,
        columns: Sequence[Tensor],
        exists: Sequence[bool] | None,
        table: Callable[[], Any] | None,
    ) -> None:
        self.on_host, self._columns, self._made = on_host, columns, table
        self.timesteps, self.host = seen[1], on_host.tolist()
        rows = list(zip(*(c.tolist() for c in columns), strict=True))
        there = [True] * len(rows) if exists is None else exists
        self.rows: list[Any] = [row if good else None for row, good in zip(rows, there, strict=True)]
        self.positions: dict[float, list[int]] = {}
        for i, t in enumerate(self.host):
            self.positions.setdefault(t, []).append(i)
        self._stride = self.timesteps.stride(0) * self.timesteps.element_size()
        self._counted = 0 if self.timesteps.is_inference() else self.timesteps._version
        self._devices: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}
        self.saw(*seen)

    # --- what it was made from ---

    def saw(self, *seen: Any) -> None:
        """These are what it was made from."""
        self.seen = seen
        self._watched = [v for v in seen if isinstance(v, Tensor) and not v.is_inference()]
        self._versions = [v._version for v in self._watched]

    def made_from(self, *seen: Any) -> bool:
        """Whether it was made from these very objects."""
        for a, b in zip(self.seen, seen, strict=True):
            if a is not b and not (isinstance(a, int | str) and a == b):
                return False
        return torch.compiler.is_compiling() or [v._version for v in self._watched] == self._versions

    def knows(self, timesteps: Tensor) -> bool:
        """Whether `host` are the values of `timesteps`."""
        return timesteps is self.timesteps and (timesteps.is_inference() or timesteps._version == self._counted)

    def same(self, host: Tensor, sigmas: Tensor | None, device: Any) -> bool:
        """Whether its time steps and sigmas have these values, on this device. In inference mode nobody knows."""
        t = self.timesteps
        return (
            self.knows(t)
            and not t.is_inference()
            and host.dtype == t.dtype
            and torch.equal(host, self.on_host)
            and (sigmas is None or torch.equal(sigmas, self.seen[2]))
            and t.device == torch.empty(0, device="cpu" if device is None else device).device
        )

    # --- finding a row ---

    def locate(self, timestep: Any) -> int | None:
        """The (first) row of a time step, or None.

        An item of `timesteps` is a view of it, so that its address is its index: no value is read, and no device waited
        for. Another tensor's value is read; on a GPU that waits.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1 or timestep.ndim > 1:
                return None
            t = self.timesteps
            offset = timestep.data_ptr() - t.data_ptr()
            inside = 0 <= offset < self._stride * len(self.host)
            if inside and timestep.device == t.device and timestep.dtype == t.dtype:
                return self.positions[self.host[offset // self._stride]][0]
            timestep = timestep.item()
        at = self.positions.get(timestep)
        return at[0] if at else None

    def row(self, at: int) -> Any:
        """The row of a step, or None. Its values are tensors of one element, which torch takes in half of a number's
        time (1.3 us a product for 2.9); in compiled code they are numbers, which it makes constants.
        """
        numbers = self.rows[at] if 0 <= at < len(self.rows) else None
        return numbers if numbers is None or torch.compiler.is_compiling() else self._tensors[at]

    @cached_property
    def _tensors(self) -> list[tuple[Tensor, ...]]:
        with torch.inference_mode(False):
            return list(zip(*(c.clone().unbind(0) for c in self._columns), strict=True))

    def index_by_time(self, columns: Sequence[Tensor], times: Tensor | None = None) -> None:
        """Prepare `row_of`. `times`: the columns' time steps, where they are not those of the plan."""
        at = self.on_host if times is None else times
        by_time = torch.full((int(at.max()) + 1, len(columns)), torch.nan, dtype=columns[0].dtype, device="cpu")
        by_time[at] = torch.stack(list(columns), dim=1)
        self._table_by_time = by_time.to(self.timesteps.device)

    def row_of(self, timestep: Tensor) -> tuple[Tensor, ...]:
        """The row of a time step, as tensors: for compiled code, which can't see addresses. NaN where there is none."""
        return self._table_by_time.index_select(0, timestep.reshape(1).to(self._table_by_time.device))[0].unbind(0)

    # --- the kernel's rows ---

    @property
    def has_table(self) -> bool:
        """Whether there are rows for the kernel."""
        return self._made is not None

    @cached_property
    def table(self) -> Any:
        """The rows for the kernel, float64 [n + 1, columns], the last an identity row; made when they are asked for."""
        return self._made() if self._made is not None else None

    @cached_property
    def limited(self) -> bool:
        """Whether any row of the table has a limit."""
        return bool(np.isfinite(self.table[:-1, col.CLIP]).any())

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
        good: list[bool] = np.isfinite(np.delete(self.table, col.CLIP, axis=1).astype(np.float32)).all(axis=1).tolist()
        return good

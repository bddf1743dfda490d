"""Step tables behind one another in one tensor: where a sample's cursor stands says which solver it is sampled with."""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from fastddpm_kernels import columns as col
from torch import Tensor

from .errors import InputError
from .solvers import StepTable


class Needs(NamedTuple):
    """What a step has to be able to do for a table, or for several: a step that can do more gives the same samples.

    (The terms that a table has not are there with the coefficient 0, the limits that it has not at infinity.)
    """

    history: int = 0
    limited: bool = False
    dynamic: bool = False
    noise: bool = False
    learned: bool = False
    direct: bool = False
    scaled: bool = False

    @classmethod
    def of(cls, table: StepTable) -> Needs:
        """Those of one table."""
        flags = (table.limited, table.dynamic, table.stochastic, table.learned, table.direct, table.scaled)
        return cls(table.history, *flags)

    def union(self, other: Needs) -> Needs:
        """Those of both."""
        return Needs(*map(max, self, other))  # type: ignore[arg-type]  # the greater of two bools is a bool


@dataclass(eq=False)
class Program:
    """A table as the device has it.

    Attributes:
        rows: float32 [num_rows + 1, columns], on the CPU (in pinned memory for CUDA), the identity row the last.
        key: the rows' bytes: equal tables are one.
    """

    table: StepTable
    rows: Tensor
    key: bytes
    needs: Needs

    @classmethod
    def of(cls, table: StepTable, device: torch.device) -> Program:
        """That of `table`, for `device`."""
        rows = torch.tensor(table.with_identity(), dtype=torch.float32, device="cpu")
        key = rows.numpy().tobytes()
        return cls(table, rows.pin_memory() if device.type == "cuda" else rows, key, Needs.of(table))


@dataclass
class _Held:
    start: int
    rows: int
    users: int = field(default=0)


class TableRows:
    """One tensor of `rows` rows on the device. The tables in it that nobody uses stay until their room is needed.

    Attributes:
        tensor: float32 [rows, columns]. Its row 0 is an identity row, for those who have no table.
        uploads: how many tables were copied to the device.
    """

    IDLE = 0

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tensor = torch.zeros(rows, len(col.COLUMNS), dtype=torch.float32, device=device)
        self.tensor[self.IDLE, [col.C_IN, col.X_X]] = 1.0
        self.tensor[self.IDLE, col.CLIP] = torch.inf
        self.uploads = 0
        self._held: OrderedDict[bytes, _Held] = OrderedDict()  # the least recently used first
        self._free = [(self.IDLE + 1, rows)]  # (start, end), in order, no two of them side by side

    def check(self, program: Program) -> None:
        """Raises `InputError` for a table for which there will never be room."""
        if len(program.rows) >= len(self.tensor):
            raise InputError(f"the table has {len(program.rows) - 1} rows; allowed: {len(self.tensor) - 2}")

    def acquire(self, program: Program) -> int | None:
        """The number of its first row, which it keeps until it is released; None where there is no room for it now."""
        held = self._held.get(program.key)
        if held is None:
            start = self._room_for(len(program.rows))
            if start is None:
                return None
            self.tensor[start : start + len(program.rows)].copy_(program.rows, non_blocking=True)
            self.uploads += 1
            held = self._held[program.key] = _Held(start, len(program.rows))
        held.users += 1
        self._held.move_to_end(program.key)
        return held.start

    def release(self, program: Program) -> None:
        """One user less: as often as it was acquired."""
        self._held[program.key].users -= 1

    def _room_for(self, rows: int) -> int | None:
        """The first of so many free rows; tables that nobody uses leave for it, the least recently used first."""
        for gap, (start, end) in enumerate(self._free):
            if end - start >= rows:
                return self._take(gap, rows)
        for key in [key for key, held in self._held.items() if held.users == 0]:
            gap = self._drop(key)
            start, end = self._free[gap]
            if end - start >= rows:
                return self._take(gap, rows)
        return None

    def _take(self, gap: int, rows: int) -> int:
        start, end = self._free.pop(gap)
        if start + rows < end:
            self._free.insert(gap, (start + rows, end))
        return start

    def _drop(self, key: bytes) -> int:
        """Let a table leave; returns which gap there is now."""
        held = self._held.pop(key)
        start, end = held.start, held.start + held.rows
        gap = bisect_left(self._free, (start, end))
        if gap < len(self._free) and self._free[gap][0] == end:
            end = self._free.pop(gap)[1]
        if gap and self._free[gap - 1][1] == start:
            gap -= 1
            start = self._free.pop(gap)[0]
        self._free.insert(gap, (start, end))
        return gap

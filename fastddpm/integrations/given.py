"""A table that is applied row by row, with the caller's noise: the loop that the peers' samplers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from fastddpm_kernels import normal, reference, reverse_step
from torch import Tensor

from ..errors import InputError
from ..models import finite_samples
from ..seeds import sample_seeds
from ..solvers import StepTable


class Rows:
    """A state that a table is applied to row by row, with noise of the caller's or of seeds. Nothing waits for a GPU.

    Args:
        table: the solver; its rows are applied in their order. All of their `c_in` are 1: `x` is the model's input.
        x: the state at the first row, [B, ...]; float64 stays so on the CPU, all else becomes float32. Stays as it is.
        seeds: the step kernel draws the noise of these (see `Sampler.sample`); None: `step` is given it.

    Attributes:
        x: the state now, float32 or float64; a tensor of its own after each step.

    Raises:
        InputError: for a state that has no samples, or is float64 on a GPU; or for wrong seeds.
    """

    def __init__(self, table: StepTable, x: Tensor, seeds: int | Sequence[int] | None = None) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise InputError("x is no float tensor of shape [B, ...]; give the noise to start from")
        exact = x.dtype == torch.float64
        if exact and x.device.type != "cpu":
            raise InputError(f"x is float64 on {x.device}; that is for the CPU: give x.float()")
        self.x = x.detach().to(torch.float64 if exact else torch.float32).contiguous()
        self.table, self.drawn = table, seeds is not None
        batch, device = len(x), x.device
        self.seeds = sample_seeds(0 if seeds is None else seeds, batch).to(device)
        self._rows = torch.tensor(table.with_identity(), dtype=self.x.dtype, device=device)
        self._cursors = torch.arange(table.num_rows, dtype=torch.int32, device=device).repeat(batch, 1).T.contiguous()
        self._history: list[Tensor] = [torch.zeros_like(self.x)] * table.history
        self._flags: list[Tensor] = []

    def times(self, dtype: torch.dtype) -> Tensor:
        """The model's time input, [rows, B]."""
        t = torch.tensor(self.table.timesteps, device=self.x.device).to(dtype)
        return t[:, None].expand(-1, len(self.x)).contiguous()

    def step(self, row: int, output: Tensor, noise: Callable[[], Tensor | None] | None = None) -> Tensor:
        """Apply `row` to the model's `output`, and add its `noise`, standard normal and shaped as x, if there is any.

        Returns x_0 as the table predicts it, limited. `noise` isn't called where the seeds say what it is.
        """
        table = self.table
        z = None if self.drawn or noise is None else noise()
        self.x, x0, flags = reverse_step(
            self.x,
            output if output.dtype != torch.float64 else output.to(self.x.dtype),
            self._rows,
            self._cursors[row],
            self.seeds,
            **{f"h{k}": h for k, h in enumerate(self._history, 1)},
            limited=table.limited,
            dynamic=table.dynamic,
            z=None if z is None else z.to(self.x.dtype),
            noise=(self.drawn or z is not None) and table.stochastic,
            learned=table.learned,
            direct=table.direct,
        )
        self._flags.append(flags)
        self._history = [x0, *self._history][: table.history]
        return x0

    def noise_of_seeds(self) -> Tensor:
        """Noise beside that of the rows, [B, ...]: stream 1, the step behind the last."""
        if self.x.dtype == torch.float64:
            return reference.normal(
                self.seeds, self.x.shape[1:], step=self.table.num_rows, stream=1, dtype=self.x.dtype
            )
        return normal(self.seeds, self.x.shape[1:], step=self.table.num_rows, stream=1)

    def finished(self) -> Tensor:
        """The state, or `NonFiniteError` where a sample isn't finite (it names the step); waits for the device."""
        flags = torch.stack(self._flags)  # [steps, B]
        first = (flags != 0).int().argmax(dim=0)  # of the steps, or 0 where none is flagged
        return finite_samples(self.x, flags.gather(0, first[None])[0], self.table.timesteps[: len(flags)].tolist())

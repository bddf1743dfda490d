"""`Buffers`: the memory that the sampling loop works in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import normal, reference
from fastddpm_kernels.constants import STREAM_INITIAL, STREAM_STEP
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .inputs import Inputs
from .solvers import StepTable


@dataclass
class Buffers:
    """All that a step reads and writes, in memory that stays where it is, so that a graph can be replayed over it.

    With guidance the model is called with both halves at once, so that what is the model's has 2 B samples, the
    unconditional ones first.
    """

    x: Tensor  # state [B, ...]
    model_input: Tensor  # [B or 2 B, ...] c_in * x in the model's dtype and memory format
    t: Tensor  # [B or 2 B] the model's time input
    table: Tensor  # [rows + 1, columns]
    cursors: Tensor  # int32 [2, B]; a step reads the one row and writes the other
    seeds: Tensor  # int64 [B]
    nonfinite: Tensor  # int32 [B], 1 + the first bad step
    x0: Tensor | None
    h1: Tensor | None
    h2: Tensor | None
    h3: Tensor | None
    guidance: Tensor | None  # [B] weights
    weights: Tensor | None  # [B] those at each sample's row: `guidance` itself, but for an interval
    rescale: Tensor | None  # [B]
    guided_rows: Tensor | None  # bool [rows + 1]
    known: Tensor | None  # [B, ...]
    mask: Tensor | None  # bool [B, ...]
    z: Tensor | None  # [B, ...] noise that is given
    model_kwargs: dict[str, Any]  # its tensors, in dicts and lists too, are buffers

    @classmethod
    def of(
        cls,
        given: Inputs,
        table: StepTable,
        *,
        state_dtype: torch.dtype,
        model_dtype: torch.dtype,
        memory_format: torch.memory_format,
        device: torch.device,
    ) -> Buffers:
        """Empty ones for what is `given`, a `part`; `start` fills them."""
        batch = given.shape[0]
        calls = batch if given.guidance is None else 2 * batch
        whole = all(t.is_integer() for t in table.timesteps.tolist())
        zeros = partial(torch.zeros, device=device)
        state = partial(torch.empty, given.shape, dtype=state_dtype, device=device)
        guidance = None if given.guidance is None else torch.empty(batch, dtype=state_dtype, device=device)

        def like(v: Tensor | None, dtype: torch.dtype = state_dtype) -> Tensor | None:
            return None if v is None else torch.empty(v.shape, dtype=dtype, device=device)

        return cls(
            x=state(),
            model_input=torch.empty(
                (calls, *given.shape[1:]), dtype=model_dtype, device=device, memory_format=memory_format
            ),
            t=zeros(calls, dtype=torch.int64 if whole else torch.float32),
            table=torch.tensor(table.with_identity(), dtype=state_dtype, device=device),
            cursors=zeros((2, batch), dtype=torch.int32),
            seeds=zeros(batch, dtype=torch.int64),
            nonfinite=zeros(batch, dtype=torch.int32),
            x0=None,
            h1=state() if table.history >= 1 else None,
            h2=state() if table.history >= 2 else None,
            h3=state() if table.history >= 3 else None,
            guidance=guidance,
            weights=guidance if given.guided_rows is None else like(given.guidance),
            rescale=like(given.rescale),
            guided_rows=like(given.guided_rows, torch.bool),
            known=like(given.known),
            mask=like(given.mask, torch.bool),
            z=state() if given.noise_is_given else None,
            model_kwargs=tree_map_only(Tensor, lambda v: torch.empty_like(v, device=device), given.model_kwargs),
        )

    def start(self, given: Inputs, init_noise_sigma: float) -> None:
        """Put every sample at row 0 of the table, with x_T given or drawn."""
        self.seeds.copy_(given.seeds)
        x_T = given.x_T
        if x_T is None:
            x_T = init_noise_sigma * initial_noise(self.seeds, self.x.shape[1:], self.x.dtype)
        self.x.copy_(x_T)
        self.cursors.zero_()
        self.nonfinite.zero_()
        self.t.fill_(self.table[0, col.T])
        for half in self.model_input.split(len(self.x)):
            half.copy_(self.table[0, col.C_IN] * self.x)
        for history in (self.h1, self.h2, self.h3):
            if history is not None:
                history.zero_()
        for name in ("guidance", "rescale", "guided_rows", "known", "mask"):
            if (mine := getattr(self, name)) is not None:
                mine.copy_(getattr(given, name))
        for mine, theirs in zip(tree_leaves(self.model_kwargs), tree_leaves(given.model_kwargs), strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(theirs)

    def set_noise(self, noise: Callable[[int], Tensor | None], row: int) -> None:
        """Put the noise that is given for this row into its buffer."""
        z = noise(row)
        if self.z is not None:
            self.z.zero_() if z is None else self.z.copy_(z)

    def weigh(self, cursor: Tensor) -> None:
        """Set each sample's weight of guidance to that at its row."""
        if self.guided_rows is not None and self.guidance is not None and self.weights is not None:
            guided = self.guided_rows.index_select(0, cursor)
            self.weights.copy_(torch.where(guided, self.guidance, torch.ones_like(self.guidance)))


def initial_noise(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x_T of each seed: stream 0 of the noise contract, [B, *shape], standard normal."""
    if dtype == torch.float64:
        return reference.normal(seeds, shape, step=0, stream=STREAM_INITIAL, dtype=dtype)
    return normal(seeds, shape, stream=STREAM_INITIAL)


class NoiseAhead:
    """The noise of a loop's steps on the CPU, made for many rows at once: of one small row most would be overhead.

    Called with a row's number, for its z of stream 1, [B, ...]: bit for bit what the step would make itself.
    """

    MOST = 1 << 16  # elements that are kept

    def __init__(self, seeds: Tensor, like: Tensor, rows: int) -> None:
        self._seeds, self._like, self._steps = seeds, like, torch.arange(rows)
        self._rows = max(1, self.MOST // like.numel())  # of a block
        self._block = -1
        self._z: tuple[Tensor, ...] = ()

    def __call__(self, row: int) -> Tensor:
        block, at = divmod(row, self._rows)
        if block != self._block:
            steps = self._steps[block * self._rows :][: self._rows]
            seeds, shape = self._seeds.repeat(len(steps)), self._like.shape
            each = steps.repeat_interleave(len(self._seeds))
            z = reference.normal(seeds, shape[1:], step=each, stream=STREAM_STEP, dtype=self._like.dtype)
            self._block, self._z = block, z.view(-1, *shape).unbind()
        return self._z[at]

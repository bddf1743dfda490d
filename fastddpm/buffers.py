"""`Buffers`: the memory that the sampling loop works in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import normal, reference
from fastddpm_kernels.constants import STREAM_INITIAL
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
    cursors: Tensor  # int32 [B or 2 B]; each half its own, since a cursor's advance writes its t
    seeds: Tensor  # int64 [B]
    nonfinite: Tensor  # int32 [B], 1 + the first bad step
    x0: Tensor | None
    h1: Tensor | None
    h2: Tensor | None
    h3: Tensor | None
    guidance: Tensor | None  # [B] weights
    rescale: Tensor | None  # [B]
    guided_rows: Tensor | None  # bool [rows + 1]
    known: Tensor | None  # [B, ...]
    mask: Tensor | None  # bool [B, ...]
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

        def like(v: Tensor | None, dtype: torch.dtype = state_dtype) -> Tensor | None:
            return None if v is None else torch.empty(v.shape, dtype=dtype, device=device)

        return cls(
            x=state(),
            model_input=torch.empty(
                (calls, *given.shape[1:]), dtype=model_dtype, device=device, memory_format=memory_format
            ),
            t=zeros(calls, dtype=torch.int64 if whole else torch.float32),
            table=torch.tensor(table.with_identity(), dtype=state_dtype, device=device),
            cursors=zeros(calls, dtype=torch.int32),
            seeds=zeros(batch, dtype=torch.int64),
            nonfinite=zeros(batch, dtype=torch.int32),
            x0=None,
            h1=state() if table.history >= 1 else None,
            h2=state() if table.history >= 2 else None,
            h3=state() if table.history >= 3 else None,
            guidance=like(given.guidance),
            rescale=like(given.rescale),
            guided_rows=like(given.guided_rows, torch.bool),
            known=like(given.known),
            mask=like(given.mask, torch.bool),
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

    @property
    def cursor(self) -> Tensor:
        """Each sample's row, int32 [B]."""
        return self.cursors[: len(self.x)]

    def weights(self) -> Tensor | None:
        """Each sample's weight of guidance at its row, [B] on the device; None where there is none."""
        if self.guidance is None or self.guided_rows is None:
            return self.guidance
        guided = self.guided_rows.index_select(0, self.cursor)
        return torch.where(guided, self.guidance, torch.ones_like(self.guidance))


def initial_noise(seeds: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """x_T of each seed: stream 0 of the noise contract, [B, *shape], standard normal."""
    if dtype == torch.float64:
        return reference.normal(seeds, shape, step=0, stream=STREAM_INITIAL, dtype=dtype)
    return normal(seeds, shape, stream=STREAM_INITIAL)

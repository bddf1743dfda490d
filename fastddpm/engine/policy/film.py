"""What FiLM needs of time step and observation: one row of scales and shifts for all residual blocks of a network.

Each block has Linear(Mish([time, observation])), which splits: W_t Mish(time) + b depends on the time step alone, and
is a table made once; W_o Mish(observation) is one product for an observation, however many steps follow. Of the 79.9 M
weights of Diffusion Policy's image network, which observes 1028 numbers, 18.9 M leave the loop so: 24 %. Sums are
float32, or float64 in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import InputError
from ..lowering import Lowered
from ..time_path import tabled


class FilmRows(nn.Module):
    """The FiLM rows, [B, columns], each block's part where `Lowered.time_names` says.

    Args:
        module: the policy's UNet, whose layers they are.
        lowered: says which columns are whose.
        steps: time steps in the table.
        dtype: float32 or float64.
    """

    def __init__(self, module: nn.Module, lowered: Lowered, steps: int, dtype: torch.dtype) -> None:
        super().__init__()
        layers: list[Any] = [module.get_submodule(name) for name in lowered.time_names]
        encoder: Any = module.get_submodule("diffusion_step_encoder")
        self.dtype = dtype
        self._encoder = [copy.deepcopy(encoder).to(dtype).eval()]  # in a list: no submodule, neither saved nor trained
        width = encoder[3].out_features
        weight = torch.cat([layer.weight.detach() for layer in layers]).to(dtype)
        bias = torch.cat([layer.bias.detach() for layer in layers]).to(dtype)
        self.observed = weight.shape[1] - width
        self.of_time = nn.Parameter(weight[:, :width].contiguous(), requires_grad=False)
        self.of_observation = nn.Parameter(weight[:, width:].contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("table", self._computed(torch.arange(steps, device=weight.device)), persistent=False)
        self.table: Tensor

    def time(self, batch: int, t: Tensor | float) -> Tensor:
        """The part of the time step, and the bias, [batch, columns]: t is a number, or a tensor [], [1] or [batch]."""
        unknown = isinstance(t, int | float) and not 0 <= t < len(self.table)  # a GPU's tensors are not looked at
        t = torch.as_tensor(t, device=self.table.device)
        if t.shape not in ((), (1,), (batch,)):
            raise InputError(f"t has shape {tuple(t.shape)}; the network takes a number, or a tensor [] or [{batch}]")
        t = t.expand(batch)
        if not unknown and tabled(t, batch, self.table):
            return self.table.index_select(0, t)
        return self._computed(t)

    def observation(self, batch: int, global_cond: Tensor | None) -> Tensor | None:
        """The part of the observation, [batch, columns]; None where the network has none."""
        if global_cond is None and self.observed:
            raise InputError(f"the network was made for observations: give global_cond, [{batch}, {self.observed}]")
        if global_cond is None:
            return None
        if global_cond.shape != (batch, self.observed):
            needed = f"[{batch}, {self.observed}]" if self.observed else "none: leave it out"
            raise InputError(f"global_cond has shape {tuple(global_cond.shape)}; needed: {needed}")
        return F.linear(F.mish(global_cond.to(self.bias)), self.of_observation)

    def _computed(self, t: Tensor) -> Tensor:
        position, first, mish, second = self._encoder[0]
        embedded = second(mish(first(position(t).to(self.dtype))))
        return F.linear(F.mish(embedded), self.of_time, self.bias)

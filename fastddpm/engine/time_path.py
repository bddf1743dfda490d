"""All that depends on the time step alone, computed once: a row for each time step, read by every residual block.

Of the module, at each step: the sinusoidal embedding, two linear layers, and one in each residual block: a quarter of a
small UNet's launches, and in the CIFAR-10 network 2.9 of 35.7 million weights.
"""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..unet import UNet
from .lowering import Lowered


class TimePath(nn.Module):
    """The time rows of a UNet: [B, columns], each residual block's part where `Lowered.time_names` says.

    Without classes they are rows of a table, made by the module's own layers and equal to theirs bit for bit, for the
    time steps 0 ... `steps` - 1. A class is added before the last layer, so with classes that one remains to be done:
    one product with all blocks' matrices. So it is for time steps that are no whole numbers, or beyond the table.

    Args:
        unet: whose layers they are; in its dtype.
        lowered: says which columns are whose.
        steps: time steps in the table.
    """

    def __init__(self, unet: UNet, lowered: Lowered, steps: int) -> None:
        super().__init__()
        # A copy of the embedding's layers alone, in a list: so it is no submodule, neither saved nor trained.
        kept = ("conv_in", "time_embedding", "class_embedding")
        self._unet = [copy.deepcopy(unet, {id(part): None for name, part in unet.named_children() if name not in kept})]
        layers: list[Any] = [unet.get_submodule(name) for name in lowered.time_names]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]).detach(), requires_grad=False)
        self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]).detach(), requires_grad=False)
        table: Tensor | None = None
        if unet.config.num_class_embeds is None:
            with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
                silu_emb = unet.embedding(torch.arange(steps, device=self.weight.device), steps)
                table = torch.cat([layer(silu_emb) for layer in layers], dim=1)
        self.table: Tensor | None
        self.register_buffer("table", table, persistent=False)

    @property
    def unet(self) -> UNet:
        """The UNet without its blocks: the embedding of time step and class, and the checks."""
        return self._unet[0]

    def forward(self, batch: int, t: Tensor | float, class_labels: Tensor | None) -> Tensor:
        """The rows of each sample, [batch, columns], in the UNet's dtype; t is a number, or a tensor [] or [batch]."""
        table = self.table
        if table is None or class_labels is not None or not tabled(t, batch, table):
            return F.linear(self.unet.embedding(t, batch, class_labels), self.weight, self.bias)
        return table.index_select(0, t)


def tabled(t: Tensor | float, batch: int, table: Tensor) -> TypeGuard[Tensor]:
    """Whether the table has these. On a GPU nobody looks: there an integer is taken to be one of its rows."""
    if not isinstance(t, Tensor) or t.shape != (batch,) or t.device != table.device:
        return False
    if t.dtype not in (torch.int64, torch.int32):  # what index_select takes
        return False
    return t.device.type != "cpu" or bool(((t >= 0) & (t < len(table))).all())

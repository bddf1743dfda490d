"""The model's keyword arguments of `InflightSampler`: each request has its own, in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import InputError


class SlotKwargs:
    """The model's keyword arguments: a buffer a value, with a row a slot; with guidance the unconditional ones first.

    Args:
        defaults: each request's, where it gives no others: numbers and tensors, in dicts and lists too.
        unconditional: those of the unconditional half, where they are others, or None: no guidance.
        slots, device: how many rows, where.

    Raises:
        InputError: for a value of another kind, or a name in `unconditional` that is not in `defaults`.
    """

    def __init__(
        self, defaults: Mapping[str, Any], unconditional: Mapping[str, Any] | None, slots: int, device: torch.device
    ) -> None:
        self._slots, self._halves, self._device = slots, 1 if unconditional is None else 2, device
        values, self._spec = tree_flatten(dict(defaults))
        self._defaults = [_row(v).to(device) for v in values]
        self._given: dict[str, Any] = tree_unflatten(self._defaults, self._spec)  # ours: the caller's may change
        self._buffers = [row.expand(self._halves * slots, *row.shape).clone() for row in self._defaults]
        self._follows = [True] * len(values)  # whether the unconditional half has what the conditional one has
        if unconditional:
            others = self._leaves(unconditional, "unconditional_kwargs")
            self._follows = [other is value for other, value in zip(others, self._defaults, strict=True)]
            for buffer, row, other in zip(self._buffers, self._defaults, others, strict=True):
                buffer[:slots] = _row(other, like=row)
        self.buffers: dict[str, Any] = tree_unflatten(self._buffers, self._spec)

    def rows(self, given: Mapping[str, Any] | None) -> list[Tensor]:
        """What a request gives, checked and `near` the device, with the defaults for the rest. Raises `InputError`."""
        if not given:
            return self._defaults
        pairs = zip(self._leaves(given, "model_kwargs"), self._defaults, strict=True)
        return [_row(value, like=row) for value, row in pairs]

    def fill(self, slot: int, rows: list[Tensor]) -> None:
        """Set a slot's."""
        for buffer, row, follows in zip(self._buffers, rows, self._follows, strict=True):
            for half in buffer.split(self._slots)[0 if follows else -1 :]:
                half[slot].copy_(row, non_blocking=True)

    def _leaves(self, given: Mapping[str, Any], what: str) -> list[Any]:
        if not isinstance(given, Mapping):
            raise InputError(f'{what} is a {type(given).__name__}; needed: a dict, as {{"class_labels": 3}}')
        for name in given:
            if name not in self._given:
                names = ", ".join(map(repr, self._given)) or "none"
                raise InputError(f"{what} have {name!r}; the sampler's own model_kwargs have {names}")
        leaves, spec = tree_flatten({**self._given, **given})
        if spec != self._spec:
            raise InputError(f"{what} and the sampler's own model_kwargs differ in structure")
        return leaves


def _row(value: Any, like: Tensor | None = None) -> Tensor:
    """`value` as one sample's row, a copy; with `like`, of its shape and dtype or an `InputError`, and `near` it."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Tensor):
        row = value.detach().clone()
    elif isinstance(value, bool | int | float):
        if type(value) is int and not -(2**63) <= value < 2**63:
            raise InputError(f"model_kwargs hold {value}; allowed: integers of 64 bits, -2^63 ... 2^63 - 1")
        row = torch.tensor(value, dtype=torch.float32 if isinstance(value, float) else None, device="cpu")
    else:
        raise InputError(
            f"model_kwargs hold a {type(value).__name__}; needed: numbers and tensors, of one sample. What is the same "
            "for all samples goes into the model: functools.partial(model, name=value)"
        )
    if like is None:
        return row
    if type(value) is int and like.is_floating_point():
        row = row.to(like.dtype)
    if row.shape != like.shape or row.dtype != like.dtype:
        raise InputError(
            f"model_kwargs hold {row.dtype} of shape {tuple(row.shape)} where one sample's are {like.dtype} of "
            f"{tuple(like.shape)}, as in the sampler's own model_kwargs"
        )
    return near(row, like.device)


def near(value: Tensor, device: torch.device) -> Tensor:
    """On the device; or in pinned memory, from where a copy waits for nothing: others' steps are on the same stream."""
    return value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value.to(device)

"""What the engines of images and of trajectories have in common: they are compiled, and stay where they are."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from .plan import Plan

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Compiled(nn.Module):
    """A network whose operations hold weights that were laid out for one device and dtype.

    Args:
        dtype: of weights and activations.
        counts: integers of at least 1, by name.

    Raises:
        InputError: for another dtype or count.
    """

    plan: Plan
    dtype_: nn.Parameter  # the device and dtype, where torch looks for them

    def __init__(self, dtype: torch.dtype, **counts: int) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"dtype is {dtype}; allowed: {', '.join(map(str, DTYPES))}")
        for name, number in counts.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise InputError(f"{name} is {number!r}; allowed: an integer of at least 1")

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Say where the weights are, and what."""
        self.dtype_ = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations."""
        return self.dtype_.dtype

    @property
    def known_timesteps(self) -> int | None:
        """How many rows the table of time steps has; None: there is none."""
        raise NotImplementedError

    def check_timesteps(self, t: Sequence[float]) -> None:
        """Raise `InputError` where whole time steps are outside the table, on a GPU, where a call doesn't look."""
        known = self.known_timesteps
        if known is None or not self._trusts_t or not all(float(step).is_integer() for step in t):
            return
        if not 0 <= min(t) <= max(t) < known:
            raise InputError(
                f"time steps are {min(t):g} ... {max(t):g}; this engine has those below {known}: "
                f"engine.compile(unet, steps={int(max(t)) + 1})"
            )

    @property
    def _trusts_t(self) -> bool:
        return self.dtype_.device.type != "cpu"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Refuse another device or dtype."""
        then = fn(self.dtype_.data)
        if (then.device, then.dtype) != (self.dtype_.device, self.dtype):
            raise InputError(
                f"the engine was compiled for {self.dtype_.device} and {self.dtype}, and can't be moved to "
                f"{then.device} and {then.dtype}: move the UNet, and compile again with dtype={then.dtype}"
            )
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise InputError("an engine loads no weights: load them into the UNet, and compile again")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        made = memo[id(self)] = self.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __reduce__(self) -> Any:
        raise InputError("an engine can't be pickled: save the UNet, and compile again where it is loaded")

    def __repr__(self) -> str:
        return str(self.plan)


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fastddpm's kernels are the choice for such weights."""
    return device.type == "cuda" and dtype != torch.float64 and find_spec("triton") is not None


def check_kernels_can_run(device: torch.device) -> None:
    """Raise `InputError` where they can't: before a weight is laid out, and not in the first call."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"kernels=True needs a GPU, and the weights are on {device}: move the UNet, or leave kernels out"
        )

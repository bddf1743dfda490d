"""fastddpm's kernels: noise, forward noising and the reverse step, as PyTorch ops.

`reference` says what each computes; the ops run it on the CPU and the Triton kernels on CUDA. Importing this package
imports neither torch nor triton: `columns` is read by NumPy code too, and Triton is needed at the first CUDA call only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import add_noise, normal, q_sample
    from .step_ops import advance_, reverse_step, reverse_step_

_HOME = {
    "add_noise": "ops",
    "advance_": "step_ops",
    "normal": "ops",
    "q_sample": "ops",
    "reverse_step": "step_ops",
    "reverse_step_": "step_ops",
}
__all__ = ["add_noise", "advance_", "normal", "q_sample", "reverse_step", "reverse_step_"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""fastddpm's kernels: noise, forward noising and the reverse step, as PyTorch ops.

`reference` says what each computes; the ops run it on the CPU and the Triton kernels on CUDA. Importing this package
imports neither torch nor triton: `columns` is read by NumPy code too, and Triton is needed at the first CUDA call only.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import add_noise, noise_mse, normal, q_sample
    from .step_loop import LoopStep
    from .step_ops import advance_, reverse_step, reverse_step_

__all__ = ["LoopStep", "add_noise", "advance_", "noise_mse", "normal", "q_sample", "reverse_step", "reverse_step_"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # all modules: one name is enough for all of torch.ops.fastddpm
        for home in ("ops", "step_ops", "step_loop"):
            found = vars(import_module(f".{home}", __name__))
            globals().update({op: found[op] for op in __all__ if op in found})
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""The ops as `torch.library` knows them: opaque to the compiler, with a CPU and a CUDA implementation.

The CPU implementations are `reference`; the CUDA ones import the Triton kernels when they are first called. `ops` has
the functions that check their arguments and call these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference

LIB = torch.library.Library("fastddpm", "DEF")
LIB.define("normal(Tensor seeds, SymInt[] shape, int step, int stream) -> Tensor")
LIB.define("add_noise(Tensor x0, Tensor noise, Tensor t, Tensor table) -> Tensor")
LIB.define("q_sample(Tensor x0, Tensor t, Tensor table, Tensor seeds, int step, int stream) -> (Tensor, Tensor)")

# --- CPU: the reference -----------------------------------------------------------------------------------------------


def _normal_cpu(seeds: Tensor, shape: Sequence[int], step: int, stream: int) -> Tensor:
    return reference.normal(seeds, shape, step=step, stream=stream)


# --- CUDA: the Triton kernels, imported at the first call -------------------------------------------------------------


def _normal_cuda(seeds: Tensor, shape: Sequence[int], step: int, stream: int) -> Tensor:
    from .philox import launch_normal

    out = torch.empty((seeds.shape[0], *shape), dtype=torch.float32, device=seeds.device)
    launch_normal(out, seeds, step=step, stream=stream)
    return out


def _add_noise_cuda(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    from .q_sample_kernel import launch_q_sample

    out = torch.empty_like(x0, memory_format=torch.contiguous_format)
    launch_q_sample(x0.contiguous(), noise.contiguous(), out, t, table)
    return out


def _q_sample_cuda(
    x0: Tensor, t: Tensor, table: Tensor, seeds: Tensor, step: int, stream: int
) -> tuple[Tensor, Tensor]:
    from .q_sample_kernel import launch_q_sample

    out, noise = (torch.empty_like(x0, memory_format=torch.contiguous_format) for _ in range(2))
    launch_q_sample(x0.contiguous(), noise, out, t, table, seeds, step=step, stream=stream)
    return out, noise


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may not be the tensors', and takes a vector's elements as adjacent.

    The vectors that are read are t, seeds and cursor, often made by ``expand``; those that are written `ops` checks.
    """

    def guarded(*args: Any) -> Any:
        args = tuple(a.contiguous() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args)
        with torch.cuda.device_of(args[0]):
            return launch(*args)

    return guarded


# --- what the compiler and autograd need to know ----------------------------------------------------------------------


def _normal_fake(seeds: Tensor, shape: Sequence[int], step: int, stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)


def contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name, _cpu, _cuda in (
    ("normal", _normal_cpu, _normal_cuda),
    ("add_noise", lambda *args: reference.add_noise(*args).contiguous(), _add_noise_cuda),
    ("q_sample", lambda *args: tuple(r.contiguous() for r in reference.q_sample(*args)), _q_sample_cuda),
):
    LIB.impl(_name, _cpu, "CPU")
    LIB.impl(_name, on_its_device(_cuda), "CUDA")

torch.library.register_fake("fastddpm::normal", _normal_fake, lib=LIB)
torch.library.register_fake("fastddpm::add_noise", lambda x0, *_: contiguous_like(x0), lib=LIB)
torch.library.register_fake("fastddpm::q_sample", lambda x0, *_: (contiguous_like(x0), contiguous_like(x0)), lib=LIB)


def _save_rows(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: object) -> None:
    t, table = (inputs[2], inputs[3]) if len(inputs) == 4 else (inputs[1], inputs[2])
    ctx.save_for_backward(t, table)


def _times_row(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, column: int) -> Tensor:
    t, table = ctx.saved_tensors  # type: ignore[attr-defined]
    scale = table[t, column].reshape(-1, *[1] * (grad.ndim - 1))
    return (scale * grad.to(table.dtype)).to(grad.dtype)


torch.library.register_autograd(
    "fastddpm::add_noise",
    lambda ctx, grad: (_times_row(ctx, grad, 0), _times_row(ctx, grad, 1), None, None),
    setup_context=_save_rows,
    lib=LIB,
)
torch.library.register_autograd(
    "fastddpm::q_sample",  # the noise is a constant: no gradient comes through it
    lambda ctx, grad, _: (_times_row(ctx, grad, 0), None, None, None, None, None),
    setup_context=_save_rows,
    lib=LIB,
)

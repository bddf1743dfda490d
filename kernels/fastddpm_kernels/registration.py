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
LIB.define("normal(Tensor seeds, SymInt[] shape, SymInt step, int stream) -> Tensor")
LIB.define("add_noise(Tensor x0, Tensor noise, Tensor t, Tensor table) -> Tensor")
LIB.define("q_sample(Tensor x0, Tensor t, Tensor table, Tensor seeds, SymInt step, int stream) -> (Tensor, Tensor)")
LIB.define("noised(Tensor x0, Tensor t, Tensor table, Tensor seeds, SymInt step, int stream) -> Tensor")
_DRAWN = "Tensor model_output, Tensor seeds, Tensor? x0, Tensor? t, Tensor? table, SymInt step, int stream"
LIB.define(f"noise_mse({_DRAWN}) -> Tensor")
LIB.define(f"noise_mse_backward(Tensor grad, {_DRAWN}) -> Tensor")

# --- CPU: the reference -----------------------------------------------------------------------------------------------


def _normal_cpu(seeds: Tensor, shape: Sequence[int], step: int, stream: int) -> Tensor:
    return reference.normal(seeds, shape, step=step, stream=stream)


def _noise_mse_backward_cpu(grad: Tensor, model_output: Tensor, *drawn: Any) -> Tensor:
    made = reference.noise_mse_backward(grad, model_output, *drawn)
    return made.contiguous(memory_format=_layout(model_output))


def _layout(x: Tensor) -> torch.memory_format:
    """The layout in which the kernel reads a model's output, and that of its gradient: its own, or contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


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


def _noised_cuda(x0: Tensor, t: Tensor, table: Tensor, seeds: Tensor, step: int, stream: int) -> Tensor:
    from .q_sample_kernel import launch_q_sample

    out = contiguous_like(x0)
    launch_q_sample(x0.contiguous(), None, out, t, table, seeds, step=step, stream=stream)
    return out


def _noise_mse_cuda(
    model_output: Tensor, seeds: Tensor, x0: Tensor | None, *drawn: Any, grad: Tensor | None = None
) -> Tensor:
    from .noise_mse_kernel import launch_noise_mse

    m = model_output.contiguous(memory_format=_layout(model_output))
    x0 = None if x0 is None else x0.contiguous()
    return launch_noise_mse(m, seeds, x0, *drawn, grad=grad, out=None if grad is None else torch.empty_like(m))


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may not be the tensors', and takes a vector's elements as adjacent.

    The vectors that are read are t, seeds and cursor, often made by ``expand``; those that are written `ops` checks.
    """

    def guarded(*args: Any, **written: Any) -> Any:
        args = tuple(a.contiguous() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args)
        with torch.cuda.device_of(args[0]):
            try:
                return launch(*args, **written)
            except ModuleNotFoundError as error:
                if error.name != "triton":
                    raise
                raise RuntimeError(
                    "on a GPU fastddpm needs Triton: pip install triton (on Windows triton-windows)"
                ) from error

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
    ("noised", lambda *args: reference.q_sample(*args)[0].contiguous(), _noised_cuda),
    ("noise_mse", reference.noise_mse, _noise_mse_cuda),
    ("noise_mse_backward", _noise_mse_backward_cpu, lambda grad, *drawn: _noise_mse_cuda(*drawn, grad=grad)),
):
    LIB.impl(_name, _cpu, "CPU")
    LIB.impl(_name, on_its_device(_cuda), "CUDA")

torch.library.register_fake("fastddpm::normal", _normal_fake, lib=LIB)
torch.library.register_fake("fastddpm::add_noise", lambda x0, *_: contiguous_like(x0), lib=LIB)
torch.library.register_fake("fastddpm::q_sample", lambda x0, *_: (contiguous_like(x0), contiguous_like(x0)), lib=LIB)
torch.library.register_fake("fastddpm::noised", lambda x0, *_: contiguous_like(x0), lib=LIB)
torch.library.register_fake(
    "fastddpm::noise_mse",
    lambda m, *_: m.new_empty(m.shape[0], dtype=torch.promote_types(m.dtype, torch.float32)),
    lib=LIB,
)
torch.library.register_fake(
    "fastddpm::noise_mse_backward", lambda grad, m, *_: torch.empty_like(m, memory_format=_layout(m)), lib=LIB
)


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
torch.library.register_autograd(
    "fastddpm::noised",
    lambda ctx, grad: (_times_row(ctx, grad, 0), None, None, None, None, None),
    setup_context=_save_rows,
    lib=LIB,
)


def _save_drawn(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.counter = inputs[5:]


def _noise_mse_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.fastddpm.noise_mse_backward(grad, *ctx.saved_tensors, *ctx.counter)
    return gradient, None, None, None, None, None, None


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError("noise_mse has no second derivative; take it from fastddpm_kernels.reference.noise_mse")


torch.library.register_autograd("fastddpm::noise_mse", _noise_mse_gradients, setup_context=_save_drawn, lib=LIB)
torch.library.register_autograd("fastddpm::noise_mse_backward", _no_second_derivative, lib=LIB)

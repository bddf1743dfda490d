"""The ops as `torch.library` knows them: opaque to the compiler, with a CPU and a CUDA implementation.

The CPU implementations are `reference`; the CUDA ones import the Triton kernels when they are first called. `ops` has
the functions that check their arguments and call these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import columns as col
from . import constants as const
from . import reference

_LIB = torch.library.Library("fastddpm", "DEF")
_LIB.define("normal(Tensor seeds, SymInt[] shape, int step, int stream) -> Tensor")
_LIB.define("add_noise(Tensor x0, Tensor noise, Tensor t, Tensor table) -> Tensor")
_LIB.define("q_sample(Tensor x0, Tensor t, Tensor table, Tensor seeds, int step, int stream) -> (Tensor, Tensor)")
_LIB.define(
    "reverse_step(Tensor x, Tensor model_output, Tensor table, Tensor cursor, Tensor seeds, Tensor? h1, Tensor? h2, "
    "bool limited, bool noise) -> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "reverse_step_(Tensor(a!) x, Tensor model_output, Tensor table, Tensor cursor, Tensor seeds, Tensor(b!)? h1, "
    "Tensor(c!)? h2, Tensor(d!)? model_input, Tensor(e!)? x0, Tensor(f!) nonfinite, bool limited, bool noise) -> ()"
)
_LIB.define("advance_(Tensor(a!) cursor, Tensor(b!) t, Tensor table) -> ()")


# --- CPU: the reference -----------------------------------------------------------------------------------------------


def _normal_cpu(seeds: Tensor, shape: Sequence[int], step: int, stream: int) -> Tensor:
    return reference.normal(seeds, shape, step=step, stream=stream)


def _step_noise(x: Tensor, table: Tensor, cursor: Tensor, seeds: Tensor) -> Tensor:
    step = table[cursor.long(), col.STEP].long()
    return reference.normal(seeds, x.shape[1:], step=step, stream=const.STREAM_STEP, dtype=x.dtype)


def _reverse_step_cpu(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    limited: bool,
    noise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    z = _step_noise(x, table, cursor, seeds) if noise else None
    made = reference.reverse_step(x, model_output, table, cursor, z, h1, h2, limited=limited)
    step = table[cursor.long(), col.STEP].int()
    return made.x, made.x0, torch.where(made.finite, 0, step + 1)


def _reverse_step_inplace_cpu(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    model_input: Tensor | None,
    x0: Tensor | None,
    nonfinite: Tensor,
    limited: bool,
    noise: bool,
) -> None:
    made = _reverse_step_cpu(x, model_output, table, cursor, seeds, h1, h2, limited, noise)
    x.copy_(made[0])
    if h2 is not None and h1 is not None:
        h2.copy_(h1)
    for target in (h1, x0):
        if target is not None:
            target.copy_(made[1])
    nonfinite.copy_(torch.where(nonfinite == 0, made[2], nonfinite))
    if model_input is not None:
        at = cursor.long()
        c_in = table[at + table[at, col.ADVANCE].long(), col.C_IN]
        model_input.copy_(c_in.reshape(-1, *[1] * (x.ndim - 1)) * x)


def _advance_cpu(cursor: Tensor, t: Tensor, table: Tensor) -> None:
    cursor += table[cursor.long(), col.ADVANCE].to(cursor.dtype)
    t.copy_(table[cursor.long(), col.T])


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


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which may not be the tensors', and takes a vector's elements as adjacent.

    The vectors that are read are t, seeds and cursor, often made by ``expand``; those that are written `ops` checks.
    """

    def guarded(*args: Any) -> Any:
        args = tuple(a.contiguous() if isinstance(a, Tensor) and a.ndim == 1 else a for a in args)
        with torch.cuda.device_of(args[0]):
            return launch(*args)

    return guarded


def _in_model_order(m: Tensor) -> Tensor:
    """As it is where the kernel can read it (contiguous, or 4-d channels_last), else a contiguous copy."""
    known = m.ndim == 4 and m.is_contiguous(memory_format=torch.channels_last)
    return m if known else m.contiguous()


def _reverse_step_cuda(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    limited: bool,
    noise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .reverse_step_kernel import launch_reverse_step

    out, x0 = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    nonfinite = torch.zeros_like(cursor, dtype=torch.int32)
    launch_reverse_step(
        x.contiguous(),
        _in_model_order(model_output),
        table,
        cursor,
        seeds,
        nonfinite,
        out=out,
        x0=x0,
        h1=None if h1 is None else h1.clone(memory_format=torch.contiguous_format),  # the kernel moves the history on
        h2=None if h2 is None else h2.clone(memory_format=torch.contiguous_format),
        limited=limited,
        noise=noise,
    )
    return out, x0, nonfinite


def _reverse_step_inplace_cuda(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    model_input: Tensor | None,
    x0: Tensor | None,
    nonfinite: Tensor,
    limited: bool,
    noise: bool,
) -> None:
    from .lanes import memory_order
    from .reverse_step_kernel import launch_reverse_step

    m = _in_model_order(model_output)
    if model_input is not None and memory_order(model_input) != memory_order(m):
        last = memory_order(model_input)[0] > 0
        m = m.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    launch_reverse_step(
        x,
        m,
        table,
        cursor,
        seeds,
        nonfinite,
        out=x,
        model_input=model_input,
        x0=x0,
        h1=h1,
        h2=h2,
        limited=limited,
        noise=noise,
    )


def _advance_cuda(cursor: Tensor, t: Tensor, table: Tensor) -> None:
    from .reverse_step_kernel import launch_advance

    launch_advance(cursor, t, table)


# --- what the compiler and autograd need to know ----------------------------------------------------------------------


def _normal_fake(seeds: Tensor, shape: Sequence[int], step: int, stream: int) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


for _name, _cpu, _cuda in (
    ("normal", _normal_cpu, _normal_cuda),
    ("add_noise", lambda *args: reference.add_noise(*args).contiguous(), _add_noise_cuda),
    ("q_sample", lambda *args: tuple(r.contiguous() for r in reference.q_sample(*args)), _q_sample_cuda),
    ("reverse_step", lambda *args: tuple(r.contiguous() for r in _reverse_step_cpu(*args)), _reverse_step_cuda),
    ("reverse_step_", _reverse_step_inplace_cpu, _reverse_step_inplace_cuda),
    ("advance_", _advance_cpu, _advance_cuda),
):
    _LIB.impl(_name, _cpu, "CPU")
    _LIB.impl(_name, _on_its_device(_cuda), "CUDA")

torch.library.register_fake("fastddpm::normal", _normal_fake, lib=_LIB)
torch.library.register_fake("fastddpm::add_noise", lambda x0, *_: _contiguous_like(x0), lib=_LIB)
torch.library.register_fake("fastddpm::q_sample", lambda x0, *_: (_contiguous_like(x0), _contiguous_like(x0)), lib=_LIB)
torch.library.register_fake(
    "fastddpm::reverse_step",
    lambda x, m, table, cursor, *_: (_contiguous_like(x), _contiguous_like(x), cursor.new_empty(cursor.shape)),
    lib=_LIB,
)
torch.library.register_fake("fastddpm::reverse_step_", lambda *_: None, lib=_LIB)
torch.library.register_fake("fastddpm::advance_", lambda *_: None, lib=_LIB)


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
    lib=_LIB,
)
torch.library.register_autograd(
    "fastddpm::q_sample",  # the noise is a constant: no gradient comes through it
    lambda ctx, grad, _: (_times_row(ctx, grad, 0), None, None, None, None, None),
    setup_context=_save_rows,
    lib=_LIB,
)

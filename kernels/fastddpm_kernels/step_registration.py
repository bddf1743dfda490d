"""The step's ops as `torch.library` knows them (see `registration`); `step_ops` has the functions that call these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import columns as col
from . import constants as const
from . import reference
from .registration import LIB, contiguous_like, on_its_device

_READ = (
    "Tensor? guidance, Tensor? rescale, Tensor? known, Tensor? mask, Tensor? z, "
    "bool limited, bool dynamic, bool noise, bool learned, bool direct"
)
LIB.define(
    "reverse_step(Tensor x, Tensor model_output, Tensor table, Tensor cursor, Tensor seeds, "
    f"Tensor? h1, Tensor? h2, Tensor? h3, {_READ}) -> (Tensor, Tensor, Tensor)"
)
LIB.define(
    "reverse_step_(Tensor(a!) x, Tensor model_output, Tensor table, Tensor cursor, Tensor seeds, Tensor(b!)? h1, "
    "Tensor(c!)? h2, Tensor(d!)? h3, Tensor(e!)? model_input, Tensor(f!)? x0, Tensor(g!) nonfinite, "
    f"{_READ}, bool scaled) -> ()"
)
LIB.define("advance_(Tensor(a!) cursor, Tensor(b!) t, Tensor table) -> ()")


# --- CPU: the reference -----------------------------------------------------------------------------------------------


def _reverse_step_cpu(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    guidance: Tensor | None,
    rescale: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    limited: bool,
    dynamic: bool,
    noise: bool,
    learned: bool,
    direct: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def drawn(stream: int) -> Tensor:
        step = table[cursor.long(), col.STEP].long()
        return reference.normal(seeds, x.shape[1:], step=step, stream=stream, dtype=x.dtype)

    made = reference.reverse_step(
        x,
        model_output,
        table,
        cursor,
        (drawn(const.STREAM_STEP) if z is None else z) if noise else None,
        h1,
        h2,
        h3,
        guidance=guidance,
        rescale=rescale,
        known=known,
        mask=mask,
        known_noise=None if known is None else drawn(const.STREAM_INPAINTING),
        limited=limited,
        dynamic=dynamic,
        learned=learned,
        direct=direct,
    )
    return made.x, made.x0, _flags(made.finite, table, cursor)


def _flags(finite: Tensor, table: Tensor, cursor: Tensor) -> Tensor:
    """int32 [B]: 0 for a finite sample, else its step + 1."""
    if finite.all():
        return torch.zeros_like(cursor)
    return torch.where(finite, 0, table[cursor.long(), col.STEP].int() + 1)


def _reverse_step_inplace_cpu(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    model_input: Tensor | None,
    x0: Tensor | None,
    nonfinite: Tensor,
    *read: Any,
    next_cursor: Tensor | None = None,
    t: Tensor | None = None,
) -> None:
    *others, scaled = read
    made = _reverse_step_cpu(x, model_output, table, cursor, seeds, h1, h2, h3, *others)
    x.copy_(made[0])
    for older, newer in ((h3, h2), (h2, h1)):
        if older is not None and newer is not None:
            older.copy_(newer)
    for target in (h1, x0):
        if target is not None:
            target.copy_(made[1])
    if made[2].any():
        nonfinite.copy_(torch.where(nonfinite == 0, made[2], nonfinite))
    if next_cursor is None and not scaled:
        following = cursor
    else:
        following = cursor.long()
        following = following + table[following, col.ADVANCE].long()
    if model_input is not None:
        _copy_to_halves(model_input, reference.per_sample(table[following, col.C_IN], x) * x if scaled else x)
    if next_cursor is not None and t is not None:
        next_cursor.copy_(following)
        _copy_to_halves(t, table[following, col.T])


def _copy_to_halves(both: Tensor, one: Tensor) -> None:
    """With guidance the model is called with two samples for each."""
    for half in [both] if both.shape == one.shape else both.split(len(one)):
        half.copy_(one)


def _advance_cpu(cursor: Tensor, t: Tensor, table: Tensor) -> None:
    cursor += table[cursor.long(), col.ADVANCE].to(cursor.dtype)
    t.copy_(table[cursor.long(), col.T])


# --- CUDA: the Triton kernels, imported at the first call -------------------------------------------------------------


def _in_model_order(m: Tensor) -> Tensor:
    """As it is where the kernel can read it (contiguous, or 4-d channels_last), else a contiguous copy."""
    known = m.ndim == 4 and m.is_contiguous(memory_format=torch.channels_last)
    return m if known else m.contiguous()


def _launch(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    nonfinite: Tensor,
    guidance: Tensor | None,
    rescale: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    limited: bool,
    dynamic: bool,
    noise: bool,
    learned: bool,
    direct: bool,
    scaled: bool = True,
    **buffers: Tensor | None,
) -> None:
    """The step kernel, after the kernels that look at whole samples, where there is need of them."""
    from .reverse_step_kernel import launch_reverse_step

    bound = None
    if guidance is not None and rescale is not None:
        from .guidance_rescale import launch_rescale_factor

        factor = torch.empty_like(guidance)
        launch_rescale_factor(m, guidance, rescale, factor, learned=learned)
        rescale = factor
    if dynamic:
        from .threshold import launch_threshold

        bound = x.new_empty(x.shape[0], 2)
        launch_threshold(x, m, table, cursor, bound, guidance=guidance, rescale=rescale, learned=learned)
    launch_reverse_step(
        x,
        m,
        table,
        cursor,
        seeds,
        nonfinite,
        guidance=guidance,
        rescale=rescale,
        bound=bound,
        known=None if known is None else known.contiguous(),
        mask=None if mask is None else mask.contiguous(),
        z=None if z is None else z.contiguous(),
        limited=limited,
        noise=noise,
        learned=learned,
        direct=direct,
        scaled=scaled,
        **buffers,  # type: ignore[arg-type]
    )


def _reverse_step_cuda(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    *read: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    out, x0 = contiguous_like(x), contiguous_like(x)
    nonfinite = torch.zeros_like(cursor, dtype=torch.int32)
    # The kernel moves the history on: not in the caller's tensors.
    h1, h2, h3 = (None if h is None else h.clone(memory_format=torch.contiguous_format) for h in (h1, h2, h3))
    m = _in_model_order(model_output)
    _launch(x.contiguous(), m, table, cursor, seeds, nonfinite, *read, out=out, x0=x0, h1=h1, h2=h2, h3=h3)
    return out, x0, nonfinite


def _reverse_step_inplace_cuda(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
    h3: Tensor | None,
    model_input: Tensor | None,
    x0: Tensor | None,
    nonfinite: Tensor,
    *read: Any,
    next_cursor: Tensor | None = None,
    t: Tensor | None = None,
) -> None:
    from .lanes import memory_order

    m = _in_model_order(model_output)
    if model_input is not None and (memory_order(model_input)[0] > 0) != (memory_order(m)[0] > 0):
        last = memory_order(model_input)[0] > 0
        m = m.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    given = (x, m, table, cursor, seeds, nonfinite)
    buffers = dict(model_input=model_input, x0=x0, h1=h1, h2=h2, h3=h3, next_cursor=next_cursor, t=t)
    _launch(*given, *read, out=x, **buffers)  # type: ignore[arg-type]  # `read` has no types of its own


def _advance_cuda(cursor: Tensor, t: Tensor, table: Tensor) -> None:
    from .reverse_step_kernel import launch_advance

    launch_advance(cursor, t, table)


for _name, _cpu, _cuda in (
    ("reverse_step", lambda *args: tuple(r.contiguous() for r in _reverse_step_cpu(*args)), _reverse_step_cuda),
    ("reverse_step_", _reverse_step_inplace_cpu, _reverse_step_inplace_cuda),
    ("advance_", _advance_cpu, _advance_cuda),
):
    LIB.impl(_name, _cpu, "CPU")
    LIB.impl(_name, on_its_device(_cuda), "CUDA")


def inplace_step(x: Tensor) -> Callable[..., None]:
    """What `torch.ops.fastddpm.reverse_step_` comes to on x's device, without the dispatcher."""
    return _reverse_step_inplace_cpu if x.device.type == "cpu" else on_its_device(_reverse_step_inplace_cuda)


torch.library.register_fake(
    "fastddpm::reverse_step",
    lambda x, m, table, cursor, *_: (contiguous_like(x), contiguous_like(x), cursor.new_empty(cursor.shape)),
    lib=LIB,
)
torch.library.register_fake("fastddpm::reverse_step_", lambda *_: None, lib=LIB)
torch.library.register_fake("fastddpm::advance_", lambda *_: None, lib=LIB)


def _no_derivative(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("reverse_step has no derivative; take it from fastddpm_kernels.reference.reverse_step")


torch.library.register_autograd("fastddpm::reverse_step", _no_derivative, lib=LIB)

"""The public ops of the reverse step: each checks what it is given, fills in defaults, and calls the registered op."""

from __future__ import annotations

import torch
from torch import Tensor

from . import columns as col
from . import step_registration  # noqa: F401 (defines the ops)
from .ops import FLOATS, check, check_index, check_tensors


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    *,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    guidance: Tensor | None = None,
    rescale: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    limited: bool = True,
    dynamic: bool = False,
    noise: bool = True,
    learned: bool = False,
    direct: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One reverse step of each sample, by the table's row that its cursor is at; `columns` has the formulas.

    With DDPM's rows this is x_{t-1} = posterior mean(x_0, x_t) + sigma_t z (Ho et al. 2020, eq. 7 and algorithm 2).

    Args:
        x: state [B, ...], float32 (float64 on the CPU, with a float64 table).
        model_output: float32, bfloat16 or float16, contiguous or channels_last, shaped as x. With `guidance` it has 2 B
            samples, the unconditional ones first; with `learned`, twice as many channels (the second dimension).
        table: float32 [rows, len(COLUMNS)], contiguous, its last row an identity row; the coefficients are not checked.
        cursor: int32 [B], each sample's row; not checked against the table's length.
        seeds: int64 [B]; the noise is normal(seed, stream 1, the row's step).
        h1, h2, h3: float32, the predicted clean samples of the last three rows, the last one first, as far back as the
            table looks.
        guidance: float32 [B], each sample's weight w of classifier-free guidance, m = m_u + w (m_c - m_u)
            (Ho & Salimans 2022, eq. 6, with w = 1 + theirs; 1 is the conditional model alone).
        rescale: float32 [B], phi of each sample: how far the guided output's deviation is brought back to that of the
            conditional one (Lin et al. 2023, eq. 15-16). 0: not at all.
        known, mask: a known sample, float32, and where it is known, bool, both shaped as x: there x' is
            k_x known + k_z z, with z of stream 3 (inpainting; Lugmayr et al. 2022, eq. 8a). Not checked for NaN.
        z: the noise in place of the seeds', standard normal, float32, shaped as x. Not checked for NaN.
        limited: whether any row has a finite `clip`. False leaves the clamp out.
        dynamic: whether any row has a `ratio`: dynamic thresholding (Imagen, arXiv 2205.11487).
        noise: whether any row has `x_z`. False leaves the noise out.
        learned: whether the noise's scale is learned: x_z 2^(s_0 + s_v v), with v the output's second half of channels.
        direct: whether any row has `x_m`. False leaves the term out.

    Returns:
        (x', x0, nonfinite): the new state; the limited prediction of the clean sample (the next row's h1); int32 [B],
        0 where all of x0 (and v) was finite before the limit, else the row's step + 1.

    The flags must be true of the table, as `StepTable`'s properties of these names are: what one leaves out is left
    out whatever the rows say.

    Raises:
        ValueError: where a shape, a dtype or a device is not as above.
        RuntimeError: where a derivative is asked for.
    """
    history = (h1, h2, h3)
    _check_reverse_step(x, table, cursor, seeds, history, guidance, rescale, known, mask, z, learned)
    check_output(model_output, x, guidance is not None, learned)
    read = (guidance, rescale, known, mask, z, limited, dynamic, noise, learned, direct)
    return torch.ops.fastddpm.reverse_step(x, model_output, table, cursor, seeds, *history, *read)


def reverse_step_(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    nonfinite: Tensor,
    *,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    model_input: Tensor | None = None,
    x0: Tensor | None = None,
    guidance: Tensor | None = None,
    rescale: Tensor | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
    z: Tensor | None = None,
    limited: bool = True,
    dynamic: bool = False,
    noise: bool = True,
    learned: bool = False,
    direct: bool = True,
    scaled: bool = True,
) -> None:
    """`reverse_step` over buffers that stay: writes x, h1, h2, h3, and where given x0 and the next model input.

    `model_input` (any float dtype, contiguous or channels_last) gets ``c_in * x'`` with the c_in of the row that the
    sample comes to next; twice, one behind the other, where there is guidance. `scaled` False: all c_in are 1.
    `nonfinite`, int32 [B], keeps the first bad step + 1 of each sample. The cursor stays: see `advance_`. All but
    `model_output` and `model_input` must be contiguous.
    """
    read = (guidance, rescale, known, mask, z, limited, dynamic, noise, learned, direct, scaled)
    check_inplace(x, table, cursor, seeds, (h1, h2, h3), model_input, x0, nonfinite, *read)
    check_output(model_output, x, guidance is not None, learned)
    history = (h1, h2, h3)
    torch.ops.fastddpm.reverse_step_(x, model_output, table, cursor, seeds, *history, model_input, x0, nonfinite, *read)


def check_inplace(
    x: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    history: tuple[Tensor | None, Tensor | None, Tensor | None],
    model_input: Tensor | None,
    x0: Tensor | None,
    nonfinite: Tensor,
    guidance: Tensor | None,
    rescale: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    *flags: bool,
) -> None:
    _check_reverse_step(x, table, cursor, seeds, history, guidance, rescale, known, mask, z, learned=flags[3])
    check_index("nonfinite", nonfinite, x, (torch.int32,))
    histories = zip(("h1", "h2", "h3"), history, strict=True)
    for name, buffer in (("x", x), *histories, ("x0", x0), ("nonfinite", nonfinite)):
        check(buffer is None or buffer.is_contiguous(), "{} is not contiguous; it is written in place", name)
    if x0 is not None:
        _check_like("x0", x0, x)
        check(x0.dtype == x.dtype, "x0 and x differ in dtype; x is {}", x.dtype)
    if model_input is not None:
        _check_like("model_input", model_input, x, samples=2 if guidance is not None else 1)
        last = model_input.ndim == 4 and model_input.is_contiguous(memory_format=torch.channels_last)
        check(model_input.is_floating_point(), "model_input is {}; needed: a float dtype", model_input.dtype)
        check(model_input.is_contiguous() or last, "model_input is written in place; make it contiguous")


def _check_like(name: str, like: Tensor, x: Tensor, samples: int = 1, channels: int = 1) -> None:
    check_tensors(**{name: like})
    expected = (samples * x.shape[0], *x.shape[1:])
    if channels > 1 and x.ndim > 1:
        expected = (*expected[:1], channels * x.shape[1], *expected[2:])
    check(
        like.shape == expected,
        "{} has shape {}; x has {}; needed: {}",
        *(name, tuple(like.shape), tuple(x.shape), tuple(expected)),
    )
    check(like.device == x.device, "{} is on {}; x is on {}", name, like.device, x.device)


def _exact(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float64


def check_output(model_output: Tensor, x: Tensor, guided: bool, learned: bool) -> None:
    check_tensors(model_output=model_output)
    _check_like("model_output", model_output, x, 2 if guided else 1, 2 if learned else 1)
    allowed = (*FLOATS, torch.float64) if _exact(x) else FLOATS
    check(model_output.dtype in allowed, "model_output is {}; needed: {}", model_output.dtype, allowed)


def _check_reverse_step(
    x: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    history: tuple[Tensor | None, Tensor | None, Tensor | None],
    guidance: Tensor | None,
    rescale: Tensor | None,
    known: Tensor | None,
    mask: Tensor | None,
    z: Tensor | None,
    learned: bool,
) -> None:
    check_tensors(x=x, table=table)
    check(x.dtype == torch.float32 or _exact(x), "x is {}; the state is float32 (float64 on the CPU)", x.dtype)
    check(not learned or x.ndim > 1, "x has shape {}; a learned variance needs channels", tuple(x.shape))
    for name, like in (*zip(("h1", "h2", "h3"), history, strict=True), ("known", known), ("z", z)):
        if like is not None:
            _check_like(name, like, x)
            check(like.dtype == x.dtype, "{} is {}; x is {}", name, like.dtype, x.dtype)
    for k in (1, 2):
        check(history[k] is None or history[k - 1] is not None, "h{} is given without h{}", k + 1, k)
    check((known is None) == (mask is None), "known and mask go together; one is given without the other")
    if mask is not None:
        _check_like("mask", mask, x)
        check(mask.dtype == torch.bool, "mask is {}; needed: torch.bool", mask.dtype)
    check(rescale is None or guidance is not None, "rescale is given without guidance")
    for name, weight in (("guidance", guidance), ("rescale", rescale)):
        if weight is not None:
            check_index(name, weight, x, (x.dtype,))
    _check_table(table, x.dtype, x.device)
    check_index("cursor", cursor, x, (torch.int32,))
    check_index("seeds", seeds, x, (torch.int64,))


def _check_table(table: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    check(
        table.ndim == 2
        and table.shape[1] == len(col.COLUMNS)
        and table.dtype == dtype
        and table.is_contiguous()
        and table.device == device,
        "table is {} {} on {}; needed: {} [rows, {}] on {}, contiguous",
        *(table.dtype, tuple(table.shape), table.device, dtype, len(col.COLUMNS), device),
    )


def advance_(cursor: Tensor, t: Tensor, table: Tensor) -> None:
    """Move each cursor (int32 [B]) to its next row, in place, and write that row's time input to `t` ([B], any dtype).

    At an identity row a cursor stays.
    """
    check_tensors(cursor=cursor, t=t, table=table)
    check_index("cursor", cursor, cursor, (torch.int32,))
    check(table.dtype in (torch.float32, torch.float64), "table is {}; needed: float32 or float64", table.dtype)
    check(t.shape == cursor.shape, "t has shape {}; cursor has {}", tuple(t.shape), tuple(cursor.shape))
    check(cursor.is_contiguous() and t.is_contiguous(), "cursor and t are written in place; make them contiguous")
    _check_table(table, table.dtype, cursor.device)
    torch.ops.fastddpm.advance_(cursor, t, table)

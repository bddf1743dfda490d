"""The public ops: each checks what it is given, fills in defaults, and calls the registered op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import columns as col
from . import constants as const
from . import registration  # noqa: F401 (defines torch.ops.fastddpm)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _check_index(name: str, index: Tensor, batch: int, dtypes: tuple[torch.dtype, ...]) -> None:
    _check(
        index.shape == (batch,) and index.dtype in dtypes,
        f"{name} is {index.dtype} of shape {tuple(index.shape)}; needed: {' or '.join(map(str, dtypes))} of ({batch},)",
    )


def normal(seeds: Tensor, shape: Sequence[int], *, step: int = 0, stream: int = const.STREAM_INITIAL) -> Tensor:
    """Standard normal noise by the noise contract: z[b, e] = normal(seed[b], stream, step, e).

    Args:
        seeds: int64 [B], the bits of each sample's unsigned 64-bit seed.
        shape: shape of one sample.
        step: the counter's step, 0 ... 2^31 - 1.
        stream: 0 initial x_T, 1 step noise, 2 training noise, 3 inpainting noise.

    Returns:
        float32 [B, *shape] on the seeds' device: the same in any batch, at any position, on any GPU and the CPU
        (the words are equal bit for bit; a normal can differ by 4e-6, the rounding of log, square root and sine).

    Raises:
        ValueError: seeds that aren't int64 [B], an empty or negative shape, a step or stream out of range.
    """
    _check_index("seeds", seeds, seeds.shape[0] if seeds.ndim else 0, (torch.int64,))
    _check(all(s >= 1 for s in shape), f"shape is {tuple(shape)}; every size must be at least 1")
    _check_counter(step, stream)
    return torch.ops.fastddpm.normal(seeds, list(shape), step, stream)


def _check_counter(step: int, stream: int) -> None:
    _check(0 <= step < 2**31, f"step is {step}; needed: 0 ... 2^31 - 1")
    _check(0 <= stream <= 3, f"stream is {stream}; needed: 0 ... 3")


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """q(x_t | x_0) with the noise given: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Ho et al. 2020, eq. 4).

    Arguments and errors as in `q_sample`. Differentiable in `x0` and `noise`.
    """
    _check_q_sample(x0, t, table)
    _check(noise.shape == x0.shape, f"noise has shape {tuple(noise.shape)}; x0 has {tuple(x0.shape)}")
    return torch.ops.fastddpm.add_noise(x0, noise.to(x0.dtype), t, table)


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    seeds: Tensor,
    *,
    step: int = 0,
    stream: int = const.STREAM_TRAINING,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward noising, q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) (Ho et al. 2020, eq. 4).

    Args:
        x0: clean samples [B, ...], float32, bfloat16 or float16 (float64 on the CPU, with a float64 table).
        t: int64 [B], the row of the table that each sample is noised to; not checked against the table's length.
        table: float32 [T, 2]: sqrt(alpha_bar), sqrt(1 - alpha_bar), on x0's device.
        seeds: int64 [B].
        step, stream: the noise counter's, where the noise is drawn here.
        noise: given noise, like x0; then seeds, step and stream are not used.

    Returns:
        (x_t, noise), both in x0's dtype; `noise` is the given one where it was given. The arithmetic is float32; x_t is
        made from the unrounded noise.
        Differentiable in x0.

    Raises:
        ValueError: where a shape or a dtype is not as above.
    """
    if noise is not None:
        return add_noise(x0, noise, t, table), noise
    _check_q_sample(x0, t, table)
    _check_index("seeds", seeds, x0.shape[0], (torch.int64,))
    _check_counter(step, stream)
    return torch.ops.fastddpm.q_sample(x0, t, table, seeds, step, stream)


def _check_q_sample(x0: Tensor, t: Tensor, table: Tensor) -> None:
    exact = x0.device.type == "cpu" and x0.dtype == table.dtype == torch.float64
    _check(x0.dtype in FLOATS or exact, f"x0 is {x0.dtype}; needed: float32, bfloat16 or float16")
    _check_index("t", t, x0.shape[0], (torch.int64,))
    _check(
        table.ndim == 2 and table.shape[1] == 2 and (table.dtype == torch.float32 or exact) and table.is_contiguous(),
        f"table is {table.dtype} {tuple(table.shape)}; needed: float32 [T, 2], contiguous",
    )


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    *,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    limited: bool = True,
    noise: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """One reverse step of each sample, by the table's row that its cursor is at; `columns` has the formulas.

    With DDPM's rows this is x_{t-1} = posterior mean(x_0, x_t) + sigma_t z (Ho et al. 2020, eq. 7 and algorithm 2).

    Args:
        x: state [B, ...], float32 (float64 on the CPU, with a float64 table).
        model_output: same shape, float32, bfloat16 or float16, contiguous or channels_last.
        table: float32 [rows, len(COLUMNS)], contiguous; its coefficients are not checked.
        cursor: int32 [B], each sample's row; not checked against the table's length.
        seeds: int64 [B]; the noise is normal(seed, stream 1, the row's step).
        h1, h2: float32, the predicted clean samples of the last two rows, where the table has history.
        limited: whether any row has a finite `clip`. False leaves the clamp out.
        noise: whether any row has `x_z`. False leaves the noise out.

    Returns:
        (x', x0, nonfinite): the new state; the limited prediction of the clean sample (the next row's h1); int32 [B],
        0 where all of x0 was finite before the limit, else the row's step + 1.

    Raises:
        ValueError: where a shape or a dtype is not as above.
    """
    _check_reverse_step(x, model_output, table, cursor, seeds, h1, h2)
    return torch.ops.fastddpm.reverse_step(x, model_output, table, cursor, seeds, h1, h2, limited, noise)


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
    model_input: Tensor | None = None,
    x0: Tensor | None = None,
    limited: bool = True,
    noise: bool = True,
) -> None:
    """`reverse_step` over buffers that stay: writes x, h1, h2, and where given x0 and the next model input.

    `model_input` (any float dtype, contiguous or channels_last) gets ``c_in * x'`` with the c_in of the row that the
    sample comes to next. `nonfinite`, int32 [B], keeps the first bad step + 1 of each sample. The cursor stays: see
    `advance_`. All but `model_output` and `model_input` must be contiguous.
    """
    _check_reverse_step(x, model_output, table, cursor, seeds, h1, h2)
    _check_index("nonfinite", nonfinite, x.shape[0], (torch.int32,))
    for name, buffer in (("x", x), ("h1", h1), ("h2", h2), ("x0", x0), ("nonfinite", nonfinite)):
        _check(buffer is None or buffer.is_contiguous(), f"{name} is not contiguous; it is written in place")
    for name, like in (("x0", x0), ("model_input", model_input)):
        if like is not None:
            _check_like(name, like, x)
    _check(x0 is None or x0.dtype == x.dtype, f"x0 and x differ in dtype; x is {x.dtype}")
    if model_input is not None:
        last = model_input.ndim == 4 and model_input.is_contiguous(memory_format=torch.channels_last)
        _check(model_input.is_floating_point(), f"model_input is {model_input.dtype}; needed: a float dtype")
        _check(model_input.is_contiguous() or last, "model_input is written in place; make it contiguous")
    torch.ops.fastddpm.reverse_step_(
        x, model_output, table, cursor, seeds, h1, h2, model_input, x0, nonfinite, limited, noise
    )


def _check_like(name: str, like: Tensor, x: Tensor) -> None:
    _check(like.shape == x.shape, f"{name} has shape {tuple(like.shape)}; x has {tuple(x.shape)}")
    _check(like.device == x.device, f"{name} is on {like.device}; x is on {x.device}")


def _check_reverse_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    cursor: Tensor,
    seeds: Tensor,
    h1: Tensor | None,
    h2: Tensor | None,
) -> None:
    exact = x.device.type == "cpu" and x.dtype == torch.float64
    _check(x.dtype == torch.float32 or exact, f"x is {x.dtype}; the state is float32 (float64 on the CPU)")
    for name, like in (("model_output", model_output), ("h1", h1), ("h2", h2)):
        if like is not None:
            _check_like(name, like, x)
            _check(name == "model_output" or like.dtype == x.dtype, f"{name} is {like.dtype}; x is {x.dtype}")
    _check(model_output.dtype in FLOATS or exact, f"model_output is {model_output.dtype}; needed: {FLOATS}")
    _check(h2 is None or h1 is not None, "h2 is given without h1")
    _check_table(table, x.dtype, x.device)
    _check_index("cursor", cursor, x.shape[0], (torch.int32,))
    _check_index("seeds", seeds, x.shape[0], (torch.int64,))


def _check_table(table: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    _check(
        table.ndim == 2
        and table.shape[1] == len(col.COLUMNS)
        and table.dtype == dtype
        and table.is_contiguous()
        and table.device == device,
        f"table is {table.dtype} {tuple(table.shape)} on {table.device}; needed: {dtype} "
        f"[rows, {len(col.COLUMNS)}] on {device}, contiguous",
    )


def advance_(cursor: Tensor, t: Tensor, table: Tensor) -> None:
    """Move each cursor (int32 [B]) to its next row, in place, and write that row's time input to `t` ([B], any dtype).

    At an identity row a cursor stays.
    """
    _check_index("cursor", cursor, cursor.shape[0], (torch.int32,))
    _check(t.shape == cursor.shape, f"t has shape {tuple(t.shape)}; cursor has {tuple(cursor.shape)}")
    _check(cursor.is_contiguous() and t.is_contiguous(), "cursor and t are written in place; make them contiguous")
    _check_table(table, table.dtype, cursor.device)
    torch.ops.fastddpm.advance_(cursor, t, table)

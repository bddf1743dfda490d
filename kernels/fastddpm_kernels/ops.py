"""The public ops: each checks what it is given, fills in defaults, and calls the registered op."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import constants as const
from . import registration  # noqa: F401 (defines torch.ops.fastddpm)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_index(name: str, index: Tensor, batch: int, dtypes: tuple[torch.dtype, ...]) -> None:
    check(
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
    check_index("seeds", seeds, seeds.shape[0] if seeds.ndim else 0, (torch.int64,))
    check(all(s >= 1 for s in shape), f"shape is {tuple(shape)}; every size must be at least 1")
    _check_counter(step, stream)
    return torch.ops.fastddpm.normal(seeds, list(shape), step, stream)


def _check_counter(step: int, stream: int) -> None:
    check(0 <= step < 2**31, f"step is {step}; needed: 0 ... 2^31 - 1")
    check(0 <= stream <= 3, f"stream is {stream}; needed: 0 ... 3")


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """q(x_t | x_0) with the noise given: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Ho et al. 2020, eq. 4).

    Arguments and errors as in `q_sample`. Differentiable in `x0` and `noise`.
    """
    _check_q_sample(x0, t, table)
    check(noise.shape == x0.shape, f"noise has shape {tuple(noise.shape)}; x0 has {tuple(x0.shape)}")
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
    check_index("seeds", seeds, x0.shape[0], (torch.int64,))
    _check_counter(step, stream)
    return torch.ops.fastddpm.q_sample(x0, t, table, seeds, step, stream)


def _check_q_sample(x0: Tensor, t: Tensor, table: Tensor) -> None:
    exact = x0.device.type == "cpu" and x0.dtype == table.dtype == torch.float64
    check(x0.dtype in FLOATS or exact, f"x0 is {x0.dtype}; needed: float32, bfloat16 or float16")
    check_index("t", t, x0.shape[0], (torch.int64,))
    check(
        table.ndim == 2 and table.shape[1] == 2 and (table.dtype == torch.float32 or exact) and table.is_contiguous(),
        f"table is {table.dtype} {tuple(table.shape)}; needed: float32 [T, 2], contiguous",
    )

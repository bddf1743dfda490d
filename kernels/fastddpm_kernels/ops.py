"""The public ops: each checks what it is given, fills in defaults, and calls the registered op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import constants as const
from . import registration  # noqa: F401 (defines torch.ops.fastddpm)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def check(ok: bool, message: str, *values: object) -> None:
    """Raise `ValueError` unless `ok`; the message's {} take the values.

    That is put off until then, since a graph with dynamic sizes or steps (``torch.compile``) can't format them.
    """
    if not ok:
        raise ValueError(message.format(*values) if values else message)


def check_tensors(**tensors: object) -> None:
    """Raise `ValueError` unless all are tensors, with a first dimension."""
    for name, given in tensors.items():
        check(isinstance(given, Tensor), "{} is a {}; needed: a tensor", name, type(given).__name__)
        check(given.ndim >= 1, "{} has no dimension; needed: one row a sample", name)  # type: ignore[attr-defined]


def check_index(name: str, index: Tensor, like: Tensor, dtypes: tuple[torch.dtype, ...], batch: int = -1) -> None:
    """Raise `ValueError` unless it has an element for each of `like`'s samples (or `batch`), on its device."""
    batch = like.shape[0] if batch < 0 else batch
    check_tensors(**{name: index})
    check(index.device == like.device, "{} is on {}; needed: {}", name, index.device, like.device)
    check(
        index.shape == (batch,) and index.dtype in dtypes,
        "{} is {} of shape {}; needed: {} of ({},)",
        *(name, index.dtype, tuple(index.shape), " or ".join(map(str, dtypes)), batch),
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
    check_tensors(seeds=seeds)
    check_index("seeds", seeds, seeds, (torch.int64,))
    check(all(s >= 1 for s in shape), "shape is {}; every size must be at least 1", tuple(shape))
    _check_counter(step, stream)
    return torch.ops.fastddpm.normal(seeds, list(shape), step, stream)


def _check_counter(step: int, stream: int) -> None:
    check(0 <= step < 2**31, "step is {}; needed: 0 ... 2^31 - 1", step)
    check(0 <= stream <= 3, "stream is {}; needed: 0 ... 3", stream)


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """q(x_t | x_0) with the noise given: sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise (Ho et al. 2020, eq. 4).

    Arguments and errors as in `q_sample`. Differentiable in `x0` and `noise`.
    """
    _check_q_sample(x0, t, table)
    check_tensors(noise=noise)
    check(noise.shape == x0.shape, "noise has shape {}; x0 has {}", tuple(noise.shape), tuple(x0.shape))
    check(noise.device == x0.device, "noise is on {}; x0 is on {}", noise.device, x0.device)
    return torch.ops.fastddpm.add_noise(x0, noise.to(x0.dtype), t, table)


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    seeds: Tensor | None = None,
    *,
    step: int = 0,
    stream: int = const.STREAM_TRAINING,
    noise: Tensor | None = None,
    keep_noise: bool = True,
) -> tuple[Tensor, Tensor | Any]:  # Any: who keeps the noise need not rule out None for the type checker
    """Forward noising, q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) (Ho et al. 2020, eq. 4).

    Args:
        x0: clean samples [B, ...], float32, bfloat16 or float16 (float64 on the CPU, with a float64 table).
        t: int64 [B], the row of the table that each sample is noised to; not checked against the table's length.
        table: float32 [T, 2]: sqrt(alpha_bar), sqrt(1 - alpha_bar), on x0's device.
        seeds: int64 [B]; needed unless the noise is given.
        step, stream: the noise counter's, where the noise is drawn here.
        noise: given noise, like x0; then seeds, step and stream are not used.
        keep_noise: with False, noise that is drawn here is not stored, and None is returned for it: 8 bytes an element
            in float32 instead of 12. `noise_mse` draws the same again.

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
    if seeds is None:
        raise ValueError("neither seeds nor noise are given; needed: one of them")
    check_index("seeds", seeds, x0, (torch.int64,))
    _check_counter(step, stream)
    if not keep_noise:
        return torch.ops.fastddpm.noised(x0, t, table, seeds, step, stream), None
    return torch.ops.fastddpm.q_sample(x0, t, table, seeds, step, stream)


def _check_q_sample(x0: Tensor, t: Tensor, table: Tensor) -> None:
    check_tensors(x0=x0, table=table)
    exact = x0.device.type == "cpu" and x0.dtype == table.dtype == torch.float64
    check(x0.dtype in FLOATS or exact, "x0 is {}; needed: float32, bfloat16 or float16", x0.dtype)
    check_index("t", t, x0, (torch.int64,))
    check(table.device == x0.device, "table is on {}; x0 is on {}", table.device, x0.device)
    check(
        table.ndim == 2 and table.shape[1] == 2 and (table.dtype == torch.float32 or exact) and table.is_contiguous(),
        "table is {} {}; needed: float32 [T, 2], contiguous",
        *(table.dtype, tuple(table.shape)),
    )


def noise_mse(
    model_output: Tensor,
    seeds: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    table: Tensor | None = None,
    step: int = 0,
    stream: int = const.STREAM_TRAINING,
) -> Tensor:
    """Each sample's mean (eps_hat - eps)^2 (Ho et al. 2020, eq. 14), with the noise of `q_sample` drawn again.

    The noise is a tensor nowhere: forward and backward both draw it. The batch's loss is ``noise_mse(...).mean()``,
    and ``(weight * noise_mse(...)).mean()`` with a weight a sample (such as min-SNR's, Hang et al. 2023,
    arXiv 2303.09556).

    With `x0`, `t` and `table` the target is a mixture, table[t, 0] eps + table[t, 1] x0: v-prediction's (Salimans and
    Ho 2022, arXiv 2202.00512, section 4) where the table's columns are sqrt(alpha_bar), -sqrt(1 - alpha_bar).

    Args:
        model_output: what the model predicts, [B, ...], float32, bfloat16 or float16 (float64 on the CPU).
            Contiguous and channels_last tensors are read as they lie.
        seeds: int64 [B]; these, `step` and `stream` as they were given to `q_sample`.
        x0: clean samples, like the output, in any of its dtypes; a constant.
        t: int64 [B], the row of the table that each sample is at; not checked against the table's length.
        table: float32 [T, 2], on the output's device.
        step, stream: the noise counter's.

    Returns:
        float32 [B] (float64 for a float64 output); the arithmetic is in that dtype. Differentiable, once, in
        `model_output`; the gradient has its dtype and memory format, and its bits don't depend on the batch.

    Raises:
        ValueError: where a shape or a dtype is not as above, x0 requires a gradient, or only some of x0, t and table
            are given.
        RuntimeError: where a second derivative is asked for.
    """
    check_tensors(model_output=model_output)
    m, shape = model_output, tuple(model_output.shape)
    exact = m.device.type == "cpu" and m.dtype == torch.float64
    check(m.dtype in FLOATS or exact, "model_output is {}; needed: float32, bfloat16 or float16", m.dtype)
    check(all(s >= 1 for s in shape[1:]), "model_output has shape {}; needed: [B, ...]", shape)
    check_index("seeds", seeds, m, (torch.int64,))
    _check_counter(step, stream)
    if x0 is not None and t is not None and table is not None:
        _check_q_sample(x0, t, table)
        check(x0.shape == m.shape, "x0 has shape {}; model_output has {}", tuple(x0.shape), shape)
        check(x0.device == m.device, "x0 is on {}; model_output is on {}", x0.device, m.device)
        check(exact == (table.dtype == torch.float64), "table is {}; model_output is {}", table.dtype, m.dtype)
        check(not x0.requires_grad, "x0 requires a gradient, and noise_mse has none for it; give x0.detach()")
    else:
        check(x0 is t is table, "some of x0, t and table are missing; give all three, or none for the noise as target")
    return torch.ops.fastddpm.noise_mse(m, seeds, x0, t, table, step, stream)

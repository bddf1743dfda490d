"""The reverse step as a loop calls it: checked once, no dispatcher, and the cursors move on in the same kernel."""

from __future__ import annotations

from torch import Tensor

from .ops import check, check_index, check_tensors
from .step_ops import check_inplace, check_output
from .step_registration import inplace_step


class LoopStep:
    """`reverse_step_` and `advance_` over buffers that stay: a call takes the model's output, and that is a step.

    There are two buffers of cursors: a step reads the one and writes the other, and the next call has them change
    places. A CUDA graph must therefore hold an even number of steps, or `turn_back` at its end.

    Not a registered op, so not for `torch.compile`.

    Args:
        x, table, seeds, nonfinite, and the options: as in `reverse_step_`.
        cursors: int32 [2, B], contiguous. The first is read first.
        t: the model's time input, [B], or [2 B] with guidance, contiguous, of any dtype; gets the next row's.

    Raises:
        ValueError: where a shape, a dtype or a device is not as said; in the call, the model's output's.
    """

    def __init__(
        self,
        x: Tensor,
        table: Tensor,
        cursors: Tensor,
        t: Tensor,
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
        check_tensors(x=x, cursors=cursors, t=t, seeds=seeds)
        check(
            cursors.is_contiguous() and tuple(cursors.shape) == (2, x.shape[0]),
            "cursors have shape {}; needed: ({}, {}), contiguous",
            *(tuple(cursors.shape), 2, x.shape[0]),
        )
        self._cursor, self._next = cursors.unbind()
        read = (guidance, rescale, known, mask, z, limited, dynamic, noise, learned, direct, scaled)
        check_inplace(x, table, self._cursor, seeds, (h1, h2, h3), model_input, x0, nonfinite, *read)
        calls = (2 if guidance is not None else 1) * x.shape[0]
        check_index("t", t, x, (t.dtype,), calls)
        check(t.is_contiguous() and seeds.is_contiguous(), "t or seeds are not contiguous; make them so")
        self._x, self._table, self._seeds, self._t = x, table, seeds, t
        self._guided, self._learned = guidance is not None, learned
        self._rest = (seeds, h1, h2, h3, model_input, x0, nonfinite, *read)
        self._step = inplace_step(x)

    @property
    def cursor(self) -> Tensor:
        """Each sample's row, int32 [B]: the buffer that the next call reads."""
        return self._cursor

    def __call__(self, model_output: Tensor) -> None:
        """Apply each sample's row to the model's output, and move the sample on to its next row."""
        check_output(model_output, self._x, self._guided, self._learned)
        following = dict(next_cursor=self._next, t=self._t)
        self._step(self._x, model_output, self._table, self._cursor, *self._rest, **following)
        self._cursor, self._next = self._next, self._cursor

    def turn_back(self) -> None:
        """Let the buffers of cursors change places, the contents with them: after an odd number of steps."""
        self._next.copy_(self._cursor)
        self._cursor, self._next = self._next, self._cursor

"""The step table: a sampler as data (see `fastddpm_kernels.columns` for what a row does)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from fastddpm_kernels.columns import ADVANCE, C_IN, CLIP, COLUMNS, K_X, K_Z, RATIO, S_0, S_V, STEP, X_M, X_X, X_Z, T
from numpy.typing import ArrayLike, NDArray

from ..errors import ConfigError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """A sampler: one row of float64 coefficients for each model evaluation, in the order in which they are applied.

    ``table["x_z"]`` is a column, float64 [num_rows]. `step_table` makes one from columns.

    Attributes:
        rows: float64 [num_rows, len(COLUMNS)], read-only, without the identity row.
        start: (alpha, sigma) of the noise level at which the first row finds its state, alpha x_0 + sigma eps: what a
            picture is noised with to start from it. The level behind row i is (k_x[i], k_z[i]).
        init_noise_sigma: what standard normal noise is scaled with to start from it.
        history_of: what "x0" is in the rows' formulas, and so what they look back at: "sample", the predicted x_0, or
            "epsilon", the predicted noise (where it is a combination of noises that a solver extrapolates).
        predicted: float64 [num_rows, 2], read-only: the predicted x_0 as a combination of the state before the row and
            of the row's "x0"; (0, 1) where that is it. By default as `history_of` says.

    Raises:
        ConfigError: where a value isn't finite in float32 (`clip` may be infinite), `clip` isn't positive, `step`
            doesn't count 0, 1, 2 ..., `advance` isn't 1, `ratio` isn't in 0 ... 1, or noise is to be clipped.
    """

    rows: Floats
    start: tuple[float, float] = (0.0, 1.0)
    init_noise_sigma: float = 1.0
    history_of: Literal["sample", "epsilon"] = "sample"
    predicted: Floats = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        rows = np.array(self.rows, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[0] < 1 or rows.shape[1] != len(COLUMNS):
            raise ConfigError(f"a step table has shape [rows, {len(COLUMNS)}] and a row at least; given: {rows.shape}")
        bad = ~(np.abs(rows) <= np.finfo(np.float32).max)  # it is float32 on the device
        bad[:, CLIP] = ~(rows[:, CLIP] > 0)
        bad[:, STEP] |= rows[:, STEP] != np.arange(len(rows))
        bad[:, ADVANCE] |= rows[:, ADVANCE] != 1
        bad[:, RATIO] |= (rows[:, RATIO] < 0) | (rows[:, RATIO] > 1)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            allowed = {CLIP: "above 0", STEP: "the row's number", ADVANCE: "1", RATIO: "0 ... 1"}.get(
                int(column), "numbers that float32 holds"
            )
            raise ConfigError(
                f"step table: {COLUMNS[column]} of row {row} is {rows[row, column]:g}; allowed: {allowed}"
            )
        for name, value in (("start", sum(self.start)), ("init_noise_sigma", self.init_noise_sigma)):
            if not 0 < value < np.inf or min(self.start) < 0:
                raise ConfigError(f"step table: {name} is {getattr(self, name)}; allowed: finite numbers above 0")
        if self.history_of not in ("sample", "epsilon"):
            raise ConfigError(f"history_of is {self.history_of!r}; allowed: 'sample', 'epsilon'")
        if self.history_of == "epsilon" and (np.isfinite(rows[:, CLIP]).any() or rows[:, RATIO].any()):
            raise ConfigError("this solver looks back at predicted noise, which can't be clipped; use clip=None")
        rows.flags.writeable = False
        object.__setattr__(self, "rows", rows)
        predicted = self._predicted() if self.predicted is None else np.array(self.predicted, dtype=np.float64)
        predicted.flags.writeable = False
        object.__setattr__(self, "predicted", predicted)

    def _predicted(self) -> Floats:
        """x_0 from x and "x0": itself, or (x - sigma eps) / alpha."""
        if self.history_of == "sample":
            return np.tile([0.0, 1.0], (self.num_rows, 1))
        levels = self.levels[:-1]
        return np.stack([1 / levels[:, 0], -levels[:, 1] / levels[:, 0]], axis=1)

    @cached_property
    def levels(self) -> Floats:
        """(alpha, sigma) of the state before each row and behind the last, [num_rows + 1, 2]."""
        return np.vstack([self.start, self.rows[:, [K_X, K_Z]]])

    def __repr__(self) -> str:
        kind = "stochastic" if self.stochastic else "deterministic"
        return f"StepTable({self.num_rows} rows, {kind}, history={self.history})"

    def __getitem__(self, column: str) -> Floats:
        if column not in COLUMNS:
            raise ConfigError(f"a step table has no column {column!r}; it has {', '.join(COLUMNS)}")
        return self.rows[:, COLUMNS.index(column)]

    @property
    def num_rows(self) -> int:
        """How many times the model is evaluated."""
        return len(self.rows)

    @cached_property
    def history(self) -> int:
        """How many earlier x0 a row may look back at: 0 ... 3."""
        return max(k if self[f"x_h{k}"].any() else 0 for k in (1, 2, 3))

    @cached_property
    def stochastic(self) -> bool:
        """Whether any row adds noise."""
        return bool(self.rows[:, X_Z].any())

    @cached_property
    def limited(self) -> bool:
        """Whether any row clips x0."""
        return bool(np.isfinite(self.rows[:, CLIP]).any())

    @cached_property
    def dynamic(self) -> bool:
        """Whether any row has dynamic thresholding."""
        return bool(self.rows[:, RATIO].any())

    @cached_property
    def learned(self) -> bool:
        """Whether the model's second half of channels says how much noise is added."""
        return bool(self.rows[:, [S_0, S_V]].any())

    @cached_property
    def direct(self) -> bool:
        """Whether any row's update has a term in the model's output itself."""
        return bool(self.rows[:, X_M].any())

    @cached_property
    def scaled(self) -> bool:
        """Whether any row scales the model's input."""
        return bool((self.rows[:, C_IN] != 1).any())

    @property
    def timesteps(self) -> Floats:
        """The model's time input of each row, float64 [num_rows]."""
        return self.rows[:, T]

    def with_identity(self) -> Floats:
        """The rows and the identity row behind them, float64 [num_rows + 1, len(COLUMNS)]: a finished sample stays."""
        identity = np.zeros(len(COLUMNS))
        identity[T] = self.rows[-1, T]  # any time step that the model knows
        identity[[C_IN, X_X]] = 1.0
        identity[CLIP] = np.inf
        identity[STEP] = self.num_rows
        return np.vstack([self.rows, identity])


def step_table(
    t: ArrayLike,
    *,
    c_in: ArrayLike = 1.0,
    clip: float | None = None,
    start: tuple[float, float] = (0.0, 1.0),
    init_noise_sigma: float = 1.0,
    history_of: Literal["sample", "epsilon"] = "sample",
    **columns: ArrayLike,
) -> StepTable:
    """A table from its columns: arrays of one length, or numbers for all rows; what isn't given is 0.

    Args:
        t: the model's time input of each row, [rows].
        c_in: scale of the model's input.
        clip: bound of abs(x0); None: no limit.
        start, init_noise_sigma, history_of: see `StepTable`.
        columns: any of x0_x, x0_m, x_x, x_x0, x_m, x_h1, x_h2, x_h3, x_z, ratio, s_0, s_v, k_x, k_z.

    Raises:
        ConfigError: for a column that doesn't exist or a table that `StepTable` doesn't allow.
    """
    times = np.asarray(t, dtype=np.float64)
    rows = np.zeros((times.size, len(COLUMNS)))
    rows[:, CLIP] = np.inf if clip is None else check_clip(clip)
    rows[:, STEP] = np.arange(len(rows))
    rows[:, ADVANCE] = 1.0
    for name, values in {"t": times, "c_in": c_in, **columns}.items():
        if name not in COLUMNS or name in ("step", "advance"):
            raise ConfigError(f"a step table takes no column {name!r}; it takes {', '.join(COLUMNS[:-2])}")
        rows[:, COLUMNS.index(name)] = values
    return StepTable(rows, start, init_noise_sigma, history_of)


def check_ratio(ratio: float | None, clip: float | None) -> float:
    """The column of dynamic thresholding's quantile: 0 for None. `ConfigError` for a ratio or a clip out of range."""
    if ratio is None:
        return 0.0
    number = isinstance(ratio, int | float | np.number) and not isinstance(ratio, bool)
    if not number or not 0 < ratio <= 1:
        raise ConfigError(
            f"dynamic_thresholding_ratio is {ratio!r}; allowed: None, or a number above 0 and up to 1 (0.995)"
        )
    if clip is None or check_clip(clip) < 1:
        raise ConfigError(
            f"clip is {clip!r}; with dynamic thresholding it bounds the threshold: a number of at least 1"
        )
    return float(ratio)


def check_clip(clip: object) -> float:
    """`clip` as a float; `ConfigError` unless it is a positive, finite number."""
    number = isinstance(clip, int | float | np.number) and not isinstance(clip, bool)
    if not number or not 0 < clip < np.inf:  # type: ignore[operator]
        raise ConfigError(f"clip is {clip!r}; allowed: None, or a number above 0 (1.0 for images in [-1, 1])")
    return float(clip)  # type: ignore[arg-type]

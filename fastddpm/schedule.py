"""Noise schedules: beta_t, alpha_bar_t and the log-SNR, in float64.

The forward process is q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) with alpha_t = 1 - beta_t and
alpha_bar_t = alpha_0 ... alpha_t (Ho et al. 2020, arXiv 2006.11239, eq. 4). Time steps are 0-based.

1 - alpha_bar_t cancels where alpha_bar_t is near 1, and a product of a thousand factors gathers rounding errors. So
everything is derived from log alpha_bar_t, a compensated sum of log1p(-beta_t), by exp and expm1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ConfigError

Floats = NDArray[np.float64]

MAX_STEPS = 1_000_000  # an untrusted config may not make us allocate more


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """The betas of a diffusion and what follows from them; every array is float64 [num_steps] and read-only.

    Make one with `linear`, `scaled_linear`, `cosine`, `sigmoid`, `from_betas` or `from_diffusers`.

    Attributes:
        betas: beta_t, the variance that step t adds; in (0, 1), or exactly 1 at the last step (zero terminal SNR).
        alphas: alpha_t = 1 - beta_t.
        alphas_cumprod: alpha_bar_t.
        sqrt_alphas_cumprod: sqrt(alpha_bar_t), the scale of x_0 in x_t.
        sqrt_one_minus_alphas_cumprod: sqrt(1 - alpha_bar_t), the scale of the noise in x_t.
        log_snr: log(alpha_bar_t / (1 - alpha_bar_t)); -inf at a terminal SNR of zero.
        log_alphas, log_alphas_cumprod: the logarithms that the others are computed from.
    """

    betas: Floats
    alphas: Floats = field(init=False)
    alphas_cumprod: Floats = field(init=False)
    sqrt_alphas_cumprod: Floats = field(init=False)
    sqrt_one_minus_alphas_cumprod: Floats = field(init=False)
    log_snr: Floats = field(init=False)
    log_alphas: Floats = field(init=False)
    log_alphas_cumprod: Floats = field(init=False)
    _fields: Mapping[str, Any] | None = None  # diffusers' fields, where a few numbers say what the betas are

    def __post_init__(self) -> None:
        betas = _checked_betas(self.betas)
        with np.errstate(divide="ignore"):  # log1p(-1) is -inf, and is meant
            log_alphas = np.log1p(-betas)
        log_bar = _cumulative_sum(log_alphas)
        one_minus = -np.expm1(log_bar)
        for name, value in {
            "betas": betas,
            "alphas": 1.0 - betas,
            "alphas_cumprod": np.exp(log_bar),
            "sqrt_alphas_cumprod": np.exp(0.5 * log_bar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(one_minus),
            "log_snr": log_bar - np.log(one_minus),
            "log_alphas": log_alphas,
            "log_alphas_cumprod": log_bar,
        }.items():
            value.flags.writeable = False
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        name = "betas" if self._fields is None else self._fields["beta_schedule"]
        end = self.alphas_cumprod[-1]
        return f"NoiseSchedule({name}, num_steps={self.num_steps}, alpha_bar_T={end:.3g})"

    @property
    def num_steps(self) -> int:
        """T, the number of time steps that the model was trained with."""
        return len(self.betas)

    @classmethod
    def linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta_t evenly spaced from `beta_start` to `beta_end` (Ho et al. 2020, section 4).

        Raises `ConfigError` for a `num_steps` that is no positive integer, or betas outside (0, 1).
        """
        _check_num_steps(num_steps)
        _check_range(beta_start, beta_end)
        betas = np.linspace(beta_start, beta_end, num_steps)
        return cls(betas, _named("linear", num_steps, beta_start, beta_end))

    @classmethod
    def scaled_linear(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """sqrt(beta_t) evenly spaced (Rombach et al. 2021, arXiv 2112.10752; Stable Diffusion: 0.00085 to 0.012).

        Raises `ConfigError` as `linear` does.
        """
        _check_num_steps(num_steps)
        _check_range(beta_start, beta_end)
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_steps) ** 2
        return cls(betas, _named("scaled_linear", num_steps, beta_start, beta_end))

    @classmethod
    def cosine(cls, num_steps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """alpha_bar(u) = cos^2(pi/2 (u + s) / (1 + s)) (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17).

        beta_t = min(1 - alpha_bar((t+1)/T) / alpha_bar(t/T), max_beta); diffusers' ``squaredcos_cap_v2``.
        Raises `ConfigError` for a wrong `num_steps`, an `s` outside [0, 1] or a `max_beta` outside (0, 1).
        """
        _check_num_steps(num_steps)
        _check_number("s", s, 0.0, 1.0)
        _check_number("max_beta", max_beta, 0.0, 1.0)
        # cos^2 a - cos^2 b = sin(b - a) sin(b + a), and cos a = sin(pi/2 - a): no cancellation at either end.
        k = np.arange(num_steps + 1)
        to_right_angle = np.pi / 2 * (num_steps - k) / (num_steps * (1.0 + s))
        angle = np.pi / 2 * (k + s * num_steps) / (num_steps * (1.0 + s))
        width = np.pi / 2 / (num_steps * (1.0 + s))
        both = np.minimum(angle[1:] + angle[:-1], to_right_angle[1:] + to_right_angle[:-1])  # they add up to pi
        betas = np.sin(width) * np.sin(both) / np.sin(to_right_angle[:-1]) ** 2
        plain = s == 0.008 and max_beta == 0.999  # the only ones that diffusers' fields can say
        return cls(np.minimum(betas, max_beta), _named("squaredcos_cap_v2", num_steps) if plain else None)

    @classmethod
    def sigmoid(cls, num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """beta_t = beta_start + (beta_end - beta_start) sigmoid(u), u from -6 to 6 (GeoDiff, arXiv 2203.02923).

        Raises `ConfigError` as `linear` does.
        """
        _check_num_steps(num_steps)
        _check_range(beta_start, beta_end)
        betas = beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_steps)))
        return cls(betas, _named("sigmoid", num_steps, beta_start, beta_end))

    @classmethod
    def from_betas(cls, betas: ArrayLike) -> NoiseSchedule:
        """A schedule from its betas: one-dimensional, copied; the last one may be exactly 1.

        Raises `ConfigError` for an empty or many-dimensional array, NaN, or a beta outside (0, 1).
        """
        return cls(betas)  # type: ignore[arg-type]  # made an array by the check

    def rescale_zero_terminal_snr(self) -> NoiseSchedule:
        """The schedule with sqrt(alpha_bar) shifted and scaled so that it ends at 0 and keeps its first value.

        Lin et al. 2023, arXiv 2305.08891, algorithm 1. An epsilon-model can't be sampled from it (x_0 can't be had
        from pure noise): use ``v_prediction`` or ``sample``. Raises `ConfigError` for a schedule of one step.
        """
        if self.num_steps < 2:
            raise ConfigError("zero terminal SNR needs a schedule of at least 2 steps; this one has 1")
        # With s_t = sqrt(alpha_bar_t): 1 - s'_t/s'_{t-1} = (s_{t-1} - s_t)/(s_{t-1} - s_T), and s_{t-1} drops out.
        tail = _cumulative_sum(self.log_alphas[::-1])[::-1]
        drop = np.expm1(0.5 * self.log_alphas) / np.expm1(0.5 * tail)
        betas = drop * (2.0 - drop)
        betas[0], betas[-1] = self.betas[0], 1.0
        fields = None if self._fields is None else {**self._fields, "rescale_betas_zero_snr": True}
        return NoiseSchedule(betas, fields)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """A schedule from diffusers' ``scheduler_config.json``, with diffusers' defaults for fields that are absent.

        Reads beta_schedule (linear, scaled_linear, squaredcos_cap_v2, sigmoid), beta_start, beta_end,
        num_train_timesteps, trained_betas and rescale_betas_zero_snr; other fields are a solver's. The betas are
        float64, where diffusers' are float32. Raises `ConfigError` for a value that isn't one of these.
        """
        steps = config.get("num_train_timesteps", 1000)
        _check_num_steps(steps, "num_train_timesteps")
        rescale = config.get("rescale_betas_zero_snr", False)
        if not isinstance(rescale, bool):
            raise ConfigError(f"scheduler config: rescale_betas_zero_snr is {rescale!r}; allowed: true or false")
        made = cls._from_diffusers_betas(config, steps)
        return made.rescale_zero_terminal_snr() if rescale else made

    @classmethod
    def _from_diffusers_betas(cls, config: Mapping[str, Any], steps: int) -> NoiseSchedule:
        trained = config.get("trained_betas")
        if trained is not None:
            made = cls.from_betas(trained)
            if made.num_steps != steps:
                raise ConfigError(
                    f"scheduler config: there are {made.num_steps} trained_betas, but num_train_timesteps is {steps}"
                )
            return made
        name = config.get("beta_schedule", "linear")
        if name == "squaredcos_cap_v2":
            return cls.cosine(steps)
        makers: dict[object, Callable[..., NoiseSchedule]] = {
            "linear": cls.linear,
            "scaled_linear": cls.scaled_linear,
            "sigmoid": cls.sigmoid,
        }
        if not isinstance(name, str) or name not in makers:
            allowed = ", ".join(map(repr, [*makers, "squaredcos_cap_v2"]))
            raise ConfigError(f"scheduler config: beta_schedule is {name!r}; allowed: {allowed}")
        return makers[name](steps, config.get("beta_start", 1e-4), config.get("beta_end", 0.02))

    def to_diffusers(self) -> dict[str, Any]:
        """The fields of ``scheduler_config.json`` that say what this schedule is; `from_diffusers` reads them.

        A schedule that diffusers has no name for is written as its list of ``trained_betas``.
        """
        if self._fields is not None:
            return dict(self._fields)
        return {"num_train_timesteps": self.num_steps, "trained_betas": self.betas.tolist()}


def _named(name: str, num_steps: int, *ends: float) -> dict[str, Any]:
    span = dict(zip(("beta_start", "beta_end"), map(float, ends), strict=False))
    return {"num_train_timesteps": int(num_steps), "beta_schedule": name, **span}


def _cumulative_sum(values: Floats) -> Floats:
    """Compensated cumulative sum (Ogita, Rump and Oishi 2005): as accurate as one rounding, whatever the length."""
    total = np.cumsum(values)
    before = np.concatenate(([0.0], total[:-1]))
    with np.errstate(invalid="ignore"):  # -inf, at a terminal SNR of zero, needs no correction
        added = total - before
        error = (before - (total - added)) + (values - added)
    corrected: Floats = total + np.cumsum(np.where(np.isfinite(error), error, 0.0))
    return corrected


def _check_num_steps(value: object, name: str = "num_steps") -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= MAX_STEPS:
        raise ConfigError(f"{name} is {value!r}; allowed: an integer in 1 ... {MAX_STEPS}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool | np.complexfloating)
    if not number or not low <= value < high:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; allowed: a number in {low:g} ... {high:g}")


def _check_range(beta_start: object, beta_end: object) -> None:
    for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
        _check_number(name, value, 0.0, 1.0)
        if value == 0:
            raise ConfigError(f"{name} is 0; every step must add noise: allowed are betas above 0 and below 1")


def _checked_betas(given: object) -> Floats:
    """A float64 copy of `given`, or `ConfigError` with what is wrong with it."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError) as error:  # a ragged list
        raise ConfigError("betas are no array; allowed: a one-dimensional array of real numbers") from error
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"betas are {array.dtype}; allowed: real numbers")
    if array.ndim != 1 or not 1 <= array.size <= MAX_STEPS:
        raise ConfigError(f"betas have shape {array.shape}; allowed: one dimension of 1 ... {MAX_STEPS} numbers")
    betas = array.astype(np.float64)
    good = (betas > 0.0) & (betas < 1.0)
    good[-1] |= betas[-1] == 1.0
    if not good.all():
        t = int(np.argmin(good))
        raise ConfigError(
            f"betas[{t}] is {betas[t]:g}; allowed: above 0 and below 1 (exactly 1 at the last step alone, "
            f"for zero terminal SNR)"
        )
    return betas

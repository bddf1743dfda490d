"""What a run of the sampler is given: checked once, as a whole, and then taken apart into batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import InputError
from .seeds import sample_seeds
from .solvers import StepTable

PerSample = float | Sequence[float] | Tensor  # one number for all samples, or one a sample


class Guidance(TypedDict, total=False):
    """What the model is told of the samples, by keyword; `Sampler.sample` says what each is."""

    model_kwargs: Mapping[str, Any] | None
    guidance_scale: PerSample | None
    unconditional_kwargs: Mapping[str, Any] | None
    guidance_rescale: PerSample
    guidance_interval: tuple[float, float] | None


class Conditions(Guidance, total=False):
    """All that may be given to a run by keyword."""

    x_T: Tensor | None
    known: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class Inputs:
    """What some samples are made from; tensors are where the user had them.

    Attributes:
        shape: (B, ...).
        seeds: int64 [B].
        x_T: state to start from, [B, ...], or None.
        model_kwargs: of the model; with guidance those of the conditional half, and of a `part` those of both halves.
        unconditional_kwargs: None, or the unconditional half's: the same structure, with as many rows.
        guidance, rescale: float64 [B], or None where all are without.
        guided_rows: bool [rows + 1], the table's rows with guidance, or None: all.
        known, mask: [B, ...], or None.
        noise_is_given: whether each step is given its noise.
    """

    shape: tuple[int, ...]
    seeds: Tensor
    x_T: Tensor | None
    model_kwargs: dict[str, Any]
    unconditional_kwargs: dict[str, Any] | None
    guidance: Tensor | None
    rescale: Tensor | None
    guided_rows: Tensor | None
    known: Tensor | None
    mask: Tensor | None
    noise_is_given: bool = False

    @classmethod
    def of(
        cls,
        table: StepTable,
        shape: Sequence[int],
        seeds: int | Sequence[int],
        *,
        x_T: Tensor | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        guidance_scale: PerSample | None = None,
        unconditional_kwargs: Mapping[str, Any] | None = None,
        guidance_rescale: PerSample = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        known: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Inputs:
        """The arguments of `Sampler.sample`, checked. Raises `InputError` for what is not allowed."""
        shape = _shape(shape)
        _check_x_T(x_T, shape)
        for name, mapping in (("model_kwargs", model_kwargs), ("unconditional_kwargs", unconditional_kwargs)):
            if not isinstance(mapping, Mapping | None):
                raise InputError(f'{name} is a {type(mapping).__name__}; needed: a dict, as {{"class_labels": labels}}')
        kwargs, batch = dict(model_kwargs or {}), shape[0]
        guidance = _per_sample("guidance_scale", guidance_scale, batch, off=1.0)
        rescale = _per_sample("guidance_rescale", guidance_rescale, batch, off=0.0, most=1.0)
        for name, given in (
            ("unconditional_kwargs", unconditional_kwargs),
            ("guidance_interval", guidance_interval),
            ("guidance_rescale", rescale),
        ):
            if guidance_scale is None and given is not None:
                raise InputError(f"{name} is given without guidance_scale; give a number, as 3.0 (1.0: off)")
        guided = guidance is not None
        known, mask = _inpainting(known, mask, shape, table)
        return cls(
            shape=shape,
            seeds=sample_seeds(seeds, batch),
            x_T=x_T,
            model_kwargs=kwargs,
            unconditional_kwargs=_unconditional(kwargs, unconditional_kwargs, batch) if guided else None,
            guidance=guidance,
            rescale=rescale if guided else None,
            guided_rows=_rows_within(guidance_interval, table) if guided else None,
            known=known,
            mask=mask,
        )

    def part(self, rows: Tensor) -> Inputs:
        """Those of some samples, int64 [n], each as often as it is named; the halves' model_kwargs are joined."""

        def taken(v: Tensor | None) -> Tensor | None:
            return None if v is None else v[rows.to(v.device)]

        batch = self.shape[0]

        def joined(*halves: Any) -> Any:
            if not _has_rows(halves[0], batch):
                return halves[0]
            return torch.cat([half[rows.to(half.device)] for half in halves])

        halves = [half for half in (self.unconditional_kwargs, self.model_kwargs) if half is not None]
        return replace(
            self,
            shape=(len(rows), *self.shape[1:]),
            seeds=self.seeds[rows],
            x_T=taken(self.x_T),
            model_kwargs=tree_map(joined, *halves),
            unconditional_kwargs=None,
            guidance=taken(self.guidance),
            rescale=taken(self.rescale),
            known=taken(self.known),
            mask=taken(self.mask),
        )


def _shape(given: Sequence[int]) -> tuple[int, ...]:
    """`given` as a tuple of integers. Raises `InputError` unless it has two, all of at least 1."""
    shape = tuple(given) if isinstance(given, Sequence) else ()
    if len(shape) < 2 or any(isinstance(s, bool) or not isinstance(s, int | np.integer) or s < 1 for s in shape):
        raise InputError(f"shape is {given}; needed: (batch, ...), whole numbers of at least 1, as (16, 3, 32, 32)")
    return tuple(int(s) for s in shape)


def _check_x_T(x_T: Tensor | None, shape: tuple[int, ...]) -> None:
    if x_T is None:
        return
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        what = x_T.dtype if isinstance(x_T, Tensor) else type(x_T).__name__
        raise InputError(f"x_T is a {what}; needed: a tensor of a float dtype")
    if tuple(x_T.shape) != shape:
        raise InputError(f"x_T has shape {tuple(x_T.shape)}, shape is {shape}; they must be the same")


def _has_rows(value: object, batch: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch


def _per_sample(name: str, given: PerSample | None, batch: int, *, off: float, most: float = math.inf) -> Tensor | None:
    """float64 [B]; None for None, and for the single number that stands for "off".

    One a sample is never off, so that what a sample becomes does not depend on the others' numbers.
    """
    if given is None:
        return None
    wanted = f"allowed: a finite number{'' if most == math.inf else f' in 0 ... {most:g}'}, or one a sample"
    try:
        values = torch.as_tensor(given, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} is {given!r}; {wanted}") from error
    if values.ndim > 1 or (values.ndim == 1 and len(values) != batch):
        raise InputError(f"{name} has shape {tuple(values.shape)} for {batch} samples; {wanted}")
    least = -math.inf if most == math.inf else 0.0
    if isinstance(given, bool) or not values.isfinite().all() or not ((values >= least) & (values <= most)).all():
        raise InputError(f"{name} is {given!r}; {wanted}")
    return None if values.ndim == 0 and values == off else values.expand(batch)


def _unconditional(kwargs: dict[str, Any], given: Mapping[str, Any] | None, batch: int) -> dict[str, Any]:
    """model_kwargs of the unconditional half: `kwargs`, where `given` has no others, with rows for all samples."""
    if not given:
        raise InputError(
            "guidance_scale needs unconditional_kwargs: what the model is given instead of the condition, "
            'as {"class_labels": 10} where 10 is the class that stands for "none"'
        )
    for name in given:
        if name not in kwargs:
            raise InputError(f"unconditional_kwargs have {name!r}, model_kwargs have not; one call has both halves")
    (leaves, spec), (others, other) = tree_flatten(kwargs), tree_flatten({**kwargs, **given})
    if spec != other:
        raise InputError("unconditional_kwargs and model_kwargs differ in structure; give tensors of the same shapes")
    return tree_unflatten([_half(c, u, batch) for c, u in zip(leaves, others, strict=True)], spec)


def _half(conditional: Any, given: Any, batch: int) -> Any:
    """The unconditional value that stands beside the conditional one."""
    if not _has_rows(conditional, batch):
        same = given is conditional
        if not same and isinstance(given, Tensor) and isinstance(conditional, Tensor):
            same = given.shape == conditional.shape and bool((given.to(conditional.device) == conditional).all())
        elif not same and not isinstance(given, Tensor) and not isinstance(conditional, Tensor):
            same = bool(given == conditional)
        if not same:
            raise InputError("unconditional_kwargs differ from model_kwargs in a value that has not a row a sample")
        return conditional
    if isinstance(given, int | float | np.number) and not isinstance(given, bool):
        return _filled(conditional, given)
    if not isinstance(given, Tensor) or given.dtype != conditional.dtype:
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise InputError(f"unconditional_kwargs hold a {what} where model_kwargs hold a {conditional.dtype} tensor")
    if given.shape not in (conditional.shape, (1, *conditional.shape[1:])):
        raise InputError(
            f"unconditional_kwargs hold a tensor of shape {tuple(given.shape)} where model_kwargs hold one of "
            f"{tuple(conditional.shape)}; allowed: the same, or one row for all samples"
        )
    return given.to(conditional.device).expand(conditional.shape)


def _filled(like: Tensor, value: Any) -> Tensor:
    """A tensor of one number; `InputError` where its dtype would make another one of it (10.5 of integers: 10)."""
    try:
        made = torch.full_like(like, value)
    except (RuntimeError, OverflowError, TypeError):
        made = None
    if made is None or (not like.is_floating_point() and not bool((made == value).all())):
        raise InputError(f"unconditional_kwargs hold {value!r}, where model_kwargs hold a {like.dtype} tensor")
    return made


def _rows_within(interval: tuple[float, float] | None, table: StepTable) -> Tensor | None:
    """Whether low < sigma / alpha <= high where each row, and the identity row, finds the state; bool [rows + 1]."""
    if interval is None:
        return None
    try:
        low, high = (float(v) for v in interval)
    except (TypeError, ValueError) as error:
        raise InputError(f"guidance_interval is {interval!r}; allowed: None, or two numbers, (low, high)") from error
    if not 0.0 <= low < high:
        raise InputError(f"guidance_interval is {interval!r}; allowed: (low, high) with 0 <= low < high, as (0.3, 5)")
    alpha, sigma = _levels(table, "guidance_interval")[:-1].T
    with np.errstate(divide="ignore"):
        noise = sigma / alpha
    within = (low < noise) & (noise <= high)
    if not within.any():
        raise InputError(
            f"guidance_interval is {interval!r}; no row is there: their noise levels are {noise[0]:.4g} ... "
            f"{noise[-1]:.4g} (sigma / alpha)"
        )
    return torch.from_numpy(np.append(within, False))


def _inpainting(
    known: Tensor | None, mask: Tensor | None, shape: tuple[int, ...], table: StepTable
) -> tuple[Tensor | None, Tensor | None]:
    """`known` and `mask` in the samples' shape. Raises `InputError` as `Sampler.sample` says."""
    if known is None and mask is None:
        return None, None
    if not isinstance(known, Tensor) or not isinstance(mask, Tensor):
        raise InputError("known and mask go together, both tensors: what is known of the samples, and where")
    if mask.dtype != torch.bool:
        raise InputError(f"mask is {mask.dtype}; needed: torch.bool, True where the sample is known (mask > 0.5)")
    if not known.is_floating_point():
        raise InputError(f"known is {known.dtype}; needed: a float dtype, in the samples' range (-1 ... 1)")
    for name, given in (("known", known), ("mask", mask)):
        try:
            broadcast = torch.broadcast_shapes(given.shape, shape) == shape
        except RuntimeError:
            broadcast = False
        if not broadcast:
            raise InputError(
                f"{name} has shape {tuple(given.shape)}, shape is {shape}; they must fit (by broadcasting)"
            )
    known, mask = known.expand(shape), mask.expand(shape)
    if not known.isfinite()[mask.to(known.device)].all():
        raise InputError("known is NaN or infinite in places where the mask says that it is known")
    _levels(table, "known")
    return known, mask


def _levels(table: StepTable, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(alpha, sigma) where each row finds the state and behind the last, [rows + 1, 2]."""
    if not table.levels.any(axis=1).all():
        raise InputError(f"{what} needs a table that knows its noise levels; this one has no k_x and k_z")
    return table.levels

"""GroupNorms become part of the operations that make what they normalise, where those can: `fused`.

A norm of two sources becomes two, of whole groups each: h's in the operation that makes h, and the skip connection's in
the one that made it on the way down. Each value is then written normalised, and raw only where that is read too.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import accumulate, chain

from fastddpm_kernels.conv_norm import can_exchange

from .lowering import Lowered
from .operations import Conv, Norm, Operation, Product, Value


def fused(lowered: Lowered, itemsize: int) -> Lowered:
    """The same network with its norms in convolutions and projections, where those can make them.

    Args:
        lowered: with each norm an operation of its own.
        itemsize: bytes of an activation.
    """
    makers = {operation.out: operation for operation in lowered.operations}
    gained: dict[Value, list[Norm]] = defaultdict(list)  # by what is normalised
    instead: dict[Value, tuple[Value, ...]] = {}  # of a norm's output: that of its parts
    fresh = 1 + max(operation.out.index for operation in lowered.operations)
    for norm in lowered.operations:
        if not isinstance(norm, Norm) or not _fits(norm, makers, gained, itemsize):
            continue
        parts = _parts(norm, fresh)
        fresh += len(parts)
        instead[norm.out] = tuple(part.out for part in parts)
        for part in parts:
            gained[part.sources[0]].append(part)
    kept = [_reading(operation, instead) for operation in lowered.operations if operation.out not in instead]
    read = {lowered.out, *chain.from_iterable(operation.reads for operation in kept)}
    made = [_writing(operation, gained[operation.out], operation.out in read) for operation in kept]
    return replace(lowered, operations=made)


def _fits(norm: Norm, makers: dict[Value, Operation], gained: dict[Value, list[Norm]], itemsize: int) -> bool:
    """Whether the operations that make the norm's sources can normalise them: each has whole groups of the norm's."""
    group = norm.channels_in // norm.groups
    return all(
        isinstance(maker := makers.get(source), Product)
        and can_exchange(
            source.height * source.width,
            source.channels,
            [*(other.channels_in // other.groups for other in gained[source]), group],
            itemsize,
            up=isinstance(maker, Conv) and maker.up,
        )
        for source in norm.sources
    )


def _parts(norm: Norm, fresh: int) -> list[Norm]:
    """The norm of each of its sources alone; their values are numbered from `fresh` on."""
    group = norm.channels_in // norm.groups
    ends = accumulate(source.channels for source in norm.sources)
    return [
        replace(
            norm,
            sources=(source,),
            out=replace(source, index=fresh + at),
            groups=source.channels // group,
            first=end - source.channels,
        )
        for at, (source, end) in enumerate(zip(norm.sources, ends, strict=True))
    ]


def _reading(operation: Operation, instead: dict[Value, tuple[Value, ...]]) -> Operation:
    sources = chain.from_iterable(instead.get(source, (source,)) for source in operation.sources)
    return replace(operation, sources=tuple(sources))


def _writing(operation: Operation, norms: list[Norm], raw: bool) -> Operation:
    return replace(operation, norms=tuple(norms), raw=raw) if isinstance(operation, Product) else operation

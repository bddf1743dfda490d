"""A network as one page: its operations, where in one block of memory each value lies, and what all of it costs."""

from __future__ import annotations

from dataclasses import dataclass

from ..unet_config import UNetConfig
from .fusion import fused
from .lowering import Lowered, lower, uses
from .operations import Value

ALIGNED = 256  # bytes: what CUDA's allocator gives, and more than any access is wide


@dataclass(frozen=True)
class Plan:
    """What an engine runs.

    Attributes:
        lowered: the operations.
        batch: images a forward.
        width: bytes of an activation's element.
        offsets: where each value begins in the block, in bytes, by the value's index.
        memory: bytes of the block.
    """

    lowered: Lowered
    batch: int
    width: int
    offsets: dict[int, int]
    memory: int

    @classmethod
    def of(cls, config: UNetConfig, batch: int, height: int, width: int, element_bytes: int) -> Plan:
        """The plan of an image network: lowered, its norms in the operations before them, its values placed."""
        return cls.of_lowered(fused(lower(config, height, width), element_bytes), batch, element_bytes)

    @classmethod
    def of_lowered(cls, lowered: Lowered, batch: int, element_bytes: int) -> Plan:
        """Place the values of these operations: where two are never needed at once, they may share memory."""
        placed = _placed(lowered, batch * element_bytes)
        memory = max(offset + _size(value, batch * element_bytes) for value, offset in placed.items())
        return cls(lowered, batch, element_bytes, {value.index: offset for value, offset in placed.items()}, memory)

    @property
    def flops(self) -> int:
        """Of an image."""
        return sum(operation.flops for operation in self.lowered.operations)

    @property
    def bytes_moved(self) -> int:
        """Of an image's activations: each read and written once by each operation."""
        return self.width * sum(operation.elements_moved for operation in self.lowered.operations)

    @property
    def weights(self) -> int:
        """How many the operations have."""
        return sum(operation.weights for operation in self.lowered.operations)

    def __str__(self) -> str:
        lines = [f"{'':>3} {'operation':<38} {'sources':<12} {'out (H, W, C)':<15} {'MFLOP':>8} {'KB':>7}  kernel"]
        for at, operation in enumerate(self.lowered.operations):
            out = operation.out
            shape = f"{out.height} x {out.width} x {out.channels}"
            sources = " + ".join(str(source.channels) for source in operation.sources)
            cost = f"{operation.flops / 1e6:8.1f} {self.width * operation.elements_moved / 1024:7.0f}"
            kernel = f"{operation.kind} {operation.details()}".rstrip()
            lines.append(f"{at:3} {operation.name:<38} {sources:<12} {shape:<15} {cost}  {kernel}")
        lines.append(
            f"{len(self.lowered.operations)} operations; an image: {self.flops / 1e9:.3f} GFLOP, "
            f"{self.bytes_moved / 1e6:.1f} MB of activations moved; {self.weights / 1e6:.2f} M weights; "
            f"batch {self.batch}: {self.memory / 1e6:.1f} MB of activations in memory"
        )
        return "\n".join(lines)


def _size(value: Value, bytes_an_element: int) -> int:
    return -(-value.elements * bytes_an_element // ALIGNED) * ALIGNED


def _placed(lowered: Lowered, bytes_an_element: int) -> dict[Value, int]:
    """An offset for each value: the largest first, each as low as the values allow that live while it does."""
    lives = {value: (first, last) for value, first, last in uses(lowered)}
    offsets: dict[Value, int] = {}
    for value in sorted(lives, key=lambda v: (-v.elements, v.index)):
        first, last = lives[value]
        others = sorted(
            (offset, offset + _size(other, bytes_an_element))
            for other, offset in offsets.items()
            if lives[other][0] <= last and first <= lives[other][1]
        )
        at = 0
        for start, end in others:
            if at + _size(value, bytes_an_element) <= start:
                break
            at = max(at, end)
        offsets[value] = at
    return offsets

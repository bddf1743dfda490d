"""The operations that a UNet is lowered to, each one fused kernel, with what it costs for one image.

A value is an activation [H, W, C] of an image, kept in NHWC. Where the UNet concatenates, an operation has two sources,
and reads their channels one behind the other: no concatenated tensor exists. Nor is there an upsampled one: `Conv.up`.
A GroupNorm may be an operation of its own, or part of the one that makes what it normalises: `Product.norms`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """An activation of one image: channels of each position adjacent."""

    index: int
    height: int
    width: int
    channels: int

    @property
    def elements(self) -> int:
        return self.height * self.width * self.channels


@dataclass(frozen=True)
class Operation:
    """What all operations have: a name (the module's, whose weights it has), what it reads, and what it writes."""

    name: str
    sources: tuple[Value, ...]
    out: Value

    kind = "operation"

    @property
    def channels_in(self) -> int:
        """Of all sources together."""
        return sum(source.channels for source in self.sources)

    @property
    def reads(self) -> tuple[Value, ...]:
        """All values that are read, each once."""
        return self.sources

    @property
    def writes(self) -> tuple[Value, ...]:
        """All values that are written."""
        return (self.out,)

    @property
    def weights(self) -> int:
        """How many there are."""
        return 0

    @property
    def flops(self) -> int:
        """Of an image: a multiplication and an addition are two."""
        return 0

    @property
    def elements_moved(self) -> int:
        """Of an image's activations, read and written once each."""
        return sum(value.elements for value in (*self.writes, *self.reads))

    def details(self) -> str:
        """What the kernel does beside its main work, for the plan's page."""
        return ""


@dataclass(frozen=True)
class Norm(Operation):
    """GroupNorm over the sources' channels, (1 + scale) and shift from the time rows, and SiLU."""

    groups: int = 32
    silu: bool = True
    time: slice | None = None  # of the time rows: scale, then shift, each of `channels_in`
    first: int = 0  # the module's channel that is the first here

    kind = "norm"

    @property
    def weights(self) -> int:
        return 2 * self.channels_in

    @property
    def flops(self) -> int:
        return 8 * self.out.elements  # two sums, two multiplications and additions, and SiLU

    def details(self) -> str:
        words = [f"{self.groups} groups"]
        words += ["scale, shift"] if self.time else []
        words += ["SiLU"] if self.silu else []
        return ", ".join(words)


@dataclass(frozen=True)
class Product(Operation):
    """Of a matrix with the sources, + bias, + residual, times `scale`; and the norms of that."""

    residual: Value | None = None
    scale: float = 1.0
    norms: tuple[Norm, ...] = ()  # of `out`, before it is rounded
    raw: bool = True  # whether `out` itself is written

    @property
    def reads(self) -> tuple[Value, ...]:
        return self.sources if self.residual is None else (*self.sources, self.residual)

    @property
    def writes(self) -> tuple[Value, ...]:
        return (*((self.out,) if self.raw else ()), *(norm.out for norm in self.norms))

    @property
    def matrix(self) -> int:
        """Rows of the matrix: products an output."""
        return self.channels_in

    @property
    def weights(self) -> int:
        return (self.channels_in + 1) * self.out.channels + sum(norm.weights for norm in self.norms)

    @property
    def flops(self) -> int:
        return 2 * self.matrix * self.out.elements + sum(norm.flops for norm in self.norms)

    def product_details(self) -> str:
        """The product itself, for `details`."""
        return ""

    def details(self) -> str:
        words = [self.product_details()]
        words += ["+ residual"] if self.residual else []
        words += [f"* {self.scale:g}"] if self.scale != 1.0 else []
        return " ".join(words).strip() + "".join(f"; norm {norm.details()}" for norm in self.norms)


@dataclass(frozen=True)
class Conv(Product):
    """A convolution, + bias, + time row, + residual or 1x1 shortcut of its own sources."""

    kernel: int = 3
    stride: int = 1
    padding: int = 1  # 0, with stride 2: one to the right and one below, as in diffusers' downsample_padding=0
    up: bool = False  # of the image doubled by nearest neighbour
    time: slice | None = None  # of the time rows: added to each position
    shortcut: tuple[Value, ...] = ()  # sources of a 1x1 convolution, added
    shortcut_name: str = ""

    kind = "conv"

    @property
    def reads(self) -> tuple[Value, ...]:
        read = super().reads
        return (*read, *(value for value in self.shortcut if value not in read))

    @property
    def weights(self) -> int:
        shortcut = sum(value.channels for value in self.shortcut)
        more = (self.kernel**2 - 1) * self.channels_in + (shortcut + 1 if shortcut else 0)
        return super().weights + more * self.out.channels

    @property
    def matrix(self) -> int:
        taps = 4 if self.up else self.kernel**2  # each phase of a doubled image sees 2 x 2 positions of the small one
        return taps * self.channels_in + sum(value.channels for value in self.shortcut)

    def product_details(self) -> str:
        words = [f"{self.kernel}x{self.kernel}"]
        words += [f"/{self.stride}"] if self.stride > 1 else []
        words += ["of the doubled image"] if self.up else []
        words += ["+ time"] if self.time else []
        words += ["+ 1x1 shortcut"] if self.shortcut else []
        return " ".join(words)


@dataclass(frozen=True)
class Linear(Product):
    """A product at each position: attention's projections."""

    names: tuple[str, ...] = ()  # of the modules whose rows the matrix has, one behind the other

    kind = "linear"

    def product_details(self) -> str:
        return "q, k, v" if len(self.names) == 3 else ""


@dataclass(frozen=True)
class Attention(Operation):
    """softmax(q k^T / sqrt(d)) v over the positions, of q, k and v packed along the channels."""

    heads: int = 1

    kind = "attention"

    @property
    def flops(self) -> int:
        return 4 * self.out.height * self.out.width * self.out.elements

    def details(self) -> str:
        return f"{self.heads} heads of {self.out.channels // self.heads}"

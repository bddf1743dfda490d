"""Convolution as a matrix product on tensor cores, over NHWC activations, with all that follows it in the UNet.

Rows are output pixels, columns output channels, and the sum runs over taps x channels. No im2col tensor exists: each
block of the sum is read from the image where it lies, and a tap outside the image is zero. Nor does any of these:

- the concatenation of two sources: each tap's channels are first those of `x`, then those of `second`;
- the upsampled image: a 3x3 convolution of it is four 2x2 convolutions of the small one (`phase_weights`);
- the 1x1 shortcut's output: its input channels are a tenth tap, with weights of their own;
- what bias, time row, residual and scale would each read and write;
- nor, where only its norms are read, the convolution's own output (`conv_finish`).

The order of every sum is fixed by the channels and the size of the map: a sample's bits depend neither on its slot nor
on the batch. Where a map is so small that the sum is divided (`segments_of`), each segment is summed alone and the
segments are added in order: by one program, or by the last of many to be done, to the same bits.

Not measured on a GPU. `tests/test_conv_codegen.py` has what the machine code shows.
"""

from collections.abc import Sequence

import torch

from .conv_choice import ConvShape, division, flat, gpu_of, rule, steps
from .conv_choice import segments as count
from .conv_kernel import conv_kernel
from .conv_norm import NormOut
from .conv_reference import COLUMNS
from .conv_tiles import Tile, side_by_side, statistics_rows
from .products import interpreted

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def launch_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    *,
    norms: Sequence[NormOut] = (),
    second: torch.Tensor | None = None,
    row: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    shortcut_x: torch.Tensor | None = None,
    shortcut_second: torch.Tensor | None = None,
    shortcut_weight: torch.Tensor | None = None,
    scale: float = 1.0,
    stride: int = 1,
    padding: int = 1,
    workspace: torch.Tensor | None = None,
    counters: torch.Tensor | None = None,
    tile: Tile | None = None,
    segments: int | None = None,
    split: bool | None = None,
) -> None:
    """Write scale * (conv(x, second) + bias + row + residual + shortcut) to `out`. Checks nothing.

    All tensors are contiguous. `x`, `second`, `residual`, the shortcut's sources, the weights and `out` have one dtype,
    bfloat16, float16 or float32; sums are float32. A sample has fewer than 2^31 elements.

    Args:
        x, second: [B, H, W, c0] and [B, H, W, c1] or None; the convolution is over x's channels, then second's.
        weight: by `pack_weight`, 3x3 or 1x1; or by `phase_weights`, [4, ...]: the 3x3 convolution of the 2x image.
        bias: float32 [c_out]; of a block with a shortcut, the sum of both biases; None where it is in `row` already.
        out: [B, OH, OW, c_out], or None where only its norms are wanted.
        norms: at most two, where `can_exchange` says so: of the result before it is rounded.
        row: float32 [B, c_out], added to every pixel of its sample: the time embedding, best with the bias in it. A
            slice of a table's columns is no copy: only the last dimension must be contiguous.
        residual: [B, OH, OW, c_out].
        shortcut_x, shortcut_second, shortcut_weight: a 1x1 convolution, added; [B, H, W, s0], [B, H, W, s1] or None,
            and [s0 + s1, columns] by `pack_weight`. With a 3x3 or 1x1 convolution of stride 1 only.
        scale: 1 / rescale factor.
        stride, padding: of a 3x3 convolution; stride 1 or 2. Padding is 1 pixel on all sides, or, 0, one zero row
            below and one column to the right (diffusers' `downsample_padding=0`).
        workspace, counters: float32 and int32, `conv_scratch`'s numbers of elements or more; allocated where they are
            needed and None. The counters are zeros, or as a launch of the same shapes left them.
        tile, segments, split: `conv_choice.division`'s and `side_by_side` unless given. Only `tile.k` and `segments`
            change the order of the sums, and so the last bits.
    """
    like = norms[0].out if out is None else out
    if like.numel() == 0:
        return
    shape = _shape(x, second, weight, row, residual, shortcut_x, shortcut_second, out, norms, like, stride, padding)
    batch, height, width, c0 = x.shape
    c1, s0, s1, cout, groups, up = shape.c1, shape.s0, shape.s1, shape.cout, shape.norms, shape.up
    kernel, phases, columns = 2 if up else shape.kernel, 4 if up else 1, weight.shape[-1]
    pixels = shape.height * shape.width // phases

    if tile is None and segments is None:
        tile, segments, chosen = division(gpu_of(x.device), shape, batch)
        split = chosen if split is None else split
    segments = segments or count(shape)
    tile = tile or rule(gpu_of(x.device), shape, batch, segments)
    all_steps = steps(shape, tile.k)
    tiles, across = _cdiv(batch * pixels, tile.m), _cdiv(cout, tile.n)
    together = max(1, pixels // tile.m) if norms else 1  # tiles of a sample that wait for each other
    exchange = len(norms) > 0 and together * phases > 1
    split = segments > 1 and not exchange and (side_by_side(tiles * across) if split is None else split)
    part_bits = statistics_rows(pixels).bit_length() - 1
    if workspace is None and (split or exchange):
        statistics = 2 * like.numel() // min(groups, default=1) >> part_bits
        floats = tiles * across * segments * tile.m * tile.n if split else statistics
        workspace = torch.empty(floats, dtype=torch.float32, device=x.device)
    if counters is None and (split or exchange):
        counters = torch.zeros(tiles // together * across, dtype=torch.int32, device=x.device)

    unit = 8 if (c0 | c1 | s0 | s1) % 8 == 0 else 1
    apart = cout if row is None else row.stride(0)
    cout_unit = 8 if cout % 8 == 0 and apart % 8 == 0 else 1
    normalised, other = (_norm(norms[i] if i < len(norms) else None, like) for i in range(2))
    on_cpu = interpreted()
    # The interpreter runs one program after the other: in its first run all statistics are left, in the second found.
    for _ in range(2 if on_cpu and exchange else 1):
        conv_kernel[(tiles * phases * across, segments if split else 1)](
            x,
            _or(second, x),
            weight,
            _or(shortcut_x, x),
            _or(shortcut_second, x),
            _or(shortcut_weight, weight),
            _or(bias, like),
            _or(row, like),
            _or(residual, like),
            like,
            _or(workspace, like),
            _or(counters, like),
            *normalised,
            *other,
            batch,
            height,
            width,
            height if up else shape.height,
            width if up else shape.width,
            c0 // unit,
            c1 // unit,
            s0 // unit,
            s1 // unit,
            columns // COLUMNS,
            cout // cout_unit,
            apart // cout_unit,
            _cdiv(all_steps, segments),
            all_steps,
            scale,
            KERNEL=kernel,
            STRIDE=stride,
            PADDING=padding if kernel == 3 else 0,
            UP=up,
            TWO=c1 > 0,
            SHORTCUT=s0 > 0,
            FLAT=flat(shape),
            FULL_K=not flat(shape) and all(c % tile.k == 0 for c in (c0, c1, s0, s1)),
            FULL_N=columns % tile.n == 0,
            UNIT=unit,
            COLUMN_UNIT=COLUMNS,
            COUT_UNIT=cout_unit,
            SEGMENTS=segments,
            SPLIT=split,
            ONE_SAMPLE=pixels % tile.m == 0,
            FULL_COUT=cout % tile.n == 0,
            WIDEN=on_cpu,
            COLUMN_BITS=tile.n.bit_length() - 1,
            BLOCK_M=tile.m,
            BLOCK_N=tile.n,
            BLOCK_K=tile.k,
            BIAS=bias is not None,
            ROW=row is not None,
            RESIDUAL=residual is not None,
            SCALED=scale != 1.0,
            RAW=out is not None,
            PIXEL_BITS=(phases * pixels).bit_length() - 1 if norms else 0,
            PART_BITS=part_bits,
            UNIT_BITS=min(groups, default=1).bit_length() - 1,
            EXCHANGE=exchange,
            WAIT=not on_cpu,
            TILES=together,
            **_constants(norms),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )


def _shape(
    x: torch.Tensor,
    second: torch.Tensor | None,
    weight: torch.Tensor,
    row: torch.Tensor | None,
    residual: torch.Tensor | None,
    shortcut_x: torch.Tensor | None,
    shortcut_second: torch.Tensor | None,
    out: torch.Tensor | None,
    norms: Sequence[NormOut],
    like: torch.Tensor,
    stride: int,
    padding: int,
) -> ConvShape:
    """What the division depends on."""
    _, height, width, cout = like.shape
    c0 = x.shape[3]
    c1, s0, s1 = (0 if t is None else t.shape[3] for t in (second, shortcut_x, shortcut_second))
    up = weight.ndim == 3
    kernel = 3 if up or weight.shape[0] == 9 * (c0 + c1) else 1
    return ConvShape(
        NAMES[x.dtype], height, width, c0, c1, cout, kernel, stride, padding, up, row is not None,
        s0, s1, residual is not None, tuple(norm.group for norm in norms), out is not None,
    )  # fmt: skip


def _norm(norm: NormOut | None, other: torch.Tensor) -> list[torch.Tensor | int | float]:
    """The kernel's arguments of a norm."""
    if norm is None:
        return [other] * 5 + [0, 0, 0.0]
    scale, shift = _or(norm.scale, other), _or(norm.shift, other)
    return [norm.out, norm.weight, norm.bias, scale, shift, scale.stride(0), shift.stride(0), norm.eps]


def _constants(norms: Sequence[NormOut]) -> dict[str, int | bool]:
    """What is compiled for the norms."""
    constants: dict[str, int | bool] = {"NORMS": len(norms)}
    for i, prefix in enumerate(("", "OTHER_")):
        norm = norms[i] if i < len(norms) else None
        constants[prefix + "GROUP_BITS"] = norm.group.bit_length() - 1 if norm else 0
        constants[prefix + "SCALE"] = norm is not None and norm.scale is not None
        constants[prefix + "SILU"] = norm is not None and norm.silu
    return constants


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer that is not used must still be one."""
    return other if tensor is None else tensor


def _cdiv(n: int, by: int) -> int:
    """Rounded up. Triton's own, which kernels call as well, takes microseconds."""
    return -(-n // by)

"""Samples as pictures: a grid, the filmstrip of a denoising, and PNG files that say how they were made.

Pixels are in [-1, 1], as the models are trained; -1 is black.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

TILE = 96  # samples smaller than this are enlarged, so that the pixels of a 32 x 32 one can be seen
GAP = 2  # between tiles, in pixels of the picture
MAX_SIDE = 32768  # of a picture; most viewers give up beyond


def to_uint8(samples: ArrayLike) -> NDArray[np.uint8]:
    """Pixels in [-1, 1] as bytes: round((x + 1) * 127.5), what is outside clipped.

    Args:
        samples: [B, C, H, W], C = 1 (grey) or 3 (RGB), any float dtype that NumPy knows.

    Returns:
        uint8 [B, H, W, C].

    Raises:
        InputError: for another shape, or values that are NaN or infinite.
    """
    x = np.asarray(samples)
    if x.ndim != 4 or x.shape[1] not in (1, 3) or 0 in x.shape:
        raise InputError(
            f"samples have shape {x.shape}; a picture needs [B, C, H, W] with 1 (grey) or 3 (RGB) channels"
        )
    if not np.isfinite(x).all():
        raise InputError("samples have values that are NaN or infinite, which no picture can show")
    pixels = np.clip(np.rint((x.astype(np.float64) + 1.0) * 127.5), 0, 255)
    return pixels.astype(np.uint8).transpose(0, 2, 3, 1)


def enlargement(height: int, width: int) -> int:
    """The whole number by which a sample is enlarged so that its longer side has about `TILE` pixels; at least 1."""
    return max(1, TILE // max(height, width))


def grid(samples: ArrayLike, *, columns: int | None = None, scale: int | None = None) -> Image:
    """Samples beside and below one another, row by row, enlarged without smoothing.

    Args:
        samples: [B, C, H, W] in [-1, 1], grey or RGB.
        columns: samples in a row; None: as near to a square as can be.
        scale: enlargement, a whole number; None: see `enlargement`.

    Returns:
        A Pillow image in mode "L" or "RGB"; what B leaves empty is white, as the gaps are.

    Raises:
        InputError: for samples that `to_uint8` does not take, a `columns` or a `scale` below 1, or a picture too large.
    """
    pixels = to_uint8(samples)
    n, height, width, channels = pixels.shape
    columns = min(n, _at_least_1("columns", math.ceil(math.sqrt(n)) if columns is None else columns))
    scale = _at_least_1("scale", enlargement(height, width) if scale is None else scale)
    rows = -(-n // columns)
    high, wide = height * scale + GAP, width * scale + GAP
    if max(rows * high, columns * wide) > MAX_SIDE:
        raise InputError(f"a picture of {columns} x {rows} samples is over {MAX_SIDE} pixels a side; use fewer samples")
    canvas = np.full((rows * high + GAP, columns * wide + GAP, channels), 255, dtype=np.uint8)
    for i, tile in enumerate(pixels.repeat(scale, axis=1).repeat(scale, axis=2)):
        top, left = GAP + i // columns * high, GAP + i % columns * wide
        canvas[top : top + height * scale, left : left + width * scale] = tile
    return _image(canvas)


def filmstrip(frames: Sequence[ArrayLike], *, captions: Sequence[str] = (), scale: int | None = None) -> Image:
    """How samples come about: a row for each, time from left to right.

    Args:
        frames: one [B, C, H, W] in [-1, 1] for each moment; values outside are clipped.
        captions: a word above each moment, or none.
        scale: enlargement, a whole number; None: see `enlargement`.

    Returns:
        A Pillow image. Raises `InputError` as `grid` does, and for frames or captions that don't fit together.
    """
    arrays = [np.asarray(frame) for frame in frames]
    if not arrays or any(a.shape != arrays[0].shape for a in arrays):
        raise InputError("a filmstrip needs at least one frame, and all of one shape [B, C, H, W]")
    if captions and len(captions) != len(arrays):
        raise InputError(f"{len(captions)} captions were given for {len(arrays)} frames")
    by_sample = np.stack(arrays, axis=1)  # [B, frames, C, H, W]
    strip = grid(by_sample.reshape(-1, *by_sample.shape[2:]), columns=len(arrays), scale=scale)
    return _with_captions(strip, captions) if captions else strip


def _with_captions(strip: Image, captions: Sequence[str]) -> Image:
    from PIL import Image, ImageDraw

    margin = 16
    picture = Image.new(strip.mode, (strip.width, strip.height + margin), "white")
    picture.paste(strip, (0, margin))
    draw = ImageDraw.Draw(picture)
    wide = (strip.width - GAP) / len(captions)
    for i, caption in enumerate(captions):
        left = GAP + wide * i + (wide - GAP - draw.textlength(caption)) / 2
        draw.text((left, 3), caption, fill="black")
    return picture


def encode_png(image: Image, text: Mapping[str, object]) -> bytes:
    """A PNG file with `text` in its text chunks, which `read_text` and any image tool (``exiftool``) show."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, value in text.items():
        info.add_text(name, str(value).encode(errors="replace").decode())  # iTXt where it is not Latin-1
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info, optimize=True)
    return buffer.getvalue()


def _image(canvas: NDArray[np.uint8]) -> Image:
    from PIL import Image

    return Image.fromarray(canvas[:, :, 0] if canvas.shape[2] == 1 else canvas)


def _at_least_1(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} is {value!r}; allowed: a whole number of at least 1")
    return value

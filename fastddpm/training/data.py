"""Images to train on: idx files (MNIST's format), .npz files and folders of pictures, as one uint8 tensor.

Nothing in a data set is trusted: every header is checked against the bytes that follow it, and no pickle is opened.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BYTES = 1 << 33  # of one array: more than that does not belong in memory
MAX_CLASSES = 65535
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
GREY_MODES = ("1", "L")
MODES = (*GREY_MODES, "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # Pillow's, of at most 8 bits a channel
TRAIN_IMAGES = "train-images-idx3-ubyte"
FORMATS = "idx or idx.gz files, a folder of pictures, or an .npz with 'images' (and 'labels') or 'arr_0'"
NPZ_IMAGES, NPZ_LABELS = ("images", "arr_0"), ("labels", "arr_1")


@dataclass(frozen=True)
class ImageSet:
    """Images and, where they are known, their classes.

    Attributes:
        images: uint8 [N, C, H, W], 0 ... 255, C = 1 or 3.
        labels: int64 [N], 0 ... num_classes - 1, or None.
    """

    images: Tensor
    labels: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """One more than the largest label; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def padded(self, multiple: int, size: int | None = None) -> ImageSet:
        """The images centred on a black square whose side is `size`, or else the next multiple of `multiple`.

        Raises `InputError` where `size` is smaller than the images or no multiple of `multiple`, and where the
        padded images would have more than `MAX_BYTES`.
        """
        n, channels, height, width = self.images.shape
        side = math.ceil(max(height, width) / multiple) * multiple if size is None else size
        if side % multiple or side < max(height, width):
            raise InputError(
                f"size {side} does not fit images of {width} x {height}; give a multiple of {multiple} "
                f"of at least {math.ceil(max(height, width) / multiple) * multiple}"
            )
        if n * channels * side**2 > MAX_BYTES:
            raise InputError(
                f"{n} images of {channels} x {side} x {side} have {n * channels * side**2} bytes; allowed: at most "
                f"{MAX_BYTES}; give a smaller size, or fewer images"
            )
        left, top = (side - width) // 2, (side - height) // 2
        padding = (left, side - width - left, top, side - height - top)
        return ImageSet(F.pad(self.images, padding), self.labels)

    def fingerprint(self) -> str:
        """SHA-256 over shape, images and labels, in hexadecimal: the data set's identity."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.labels is not None)).encode())
        digest.update(self.images.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def load_images(path: str | Path) -> ImageSet:
    """Read a data set into memory.

    `path` is one of

    - an idx file of images (``*-images-idx3-ubyte``, also .gz; labels are read from ``*-labels-idx1-ubyte`` beside it),
      or a folder that holds ``train-images-idx3-ubyte``;
    - an .npz file: ``images`` (or ``arr_0``), uint8 [N, H, W], [N, H, W, C] or [N, C, H, W], and, where it is there,
      ``labels`` (or ``arr_1``), whole numbers [N];
    - a folder of pictures of one size; where they lie in subfolders, these are the classes, in alphabetical order.

    Pictures have at most 8 bits a channel. Raises `InputError` for anything else, and for a file that is damaged.
    """
    path = Path(path)
    try:
        path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist; give {FORMATS}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path} can't be read: {_first_line(error)}; give {FORMATS}") from error
    # From here on os.path, whose answer is "no" where pathlib's is an exception
    if os.path.isdir(path):
        found = (p for p in (path / TRAIN_IMAGES, path / f"{TRAIN_IMAGES}.gz") if os.path.isfile(p))
        return _load_idx(p) if (p := next(found, None)) else _load_folder(path)
    if path.suffix == ".npz":
        return _load_npz(path)
    if "idx" in path.name or path.name.endswith("ubyte"):
        return _load_idx(path)
    raise InputError(f"{path} is no data set that can be read; give {FORMATS}")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An array of bytes from an idx file, or from a gzipped one (magic 00 00 08 ndim, then big-endian sizes).

    Raises `InputError` where the file is not idx, is truncated, or has bytes left over.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(path, file)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} can't be read: {_first_line(error)}") from error


def _parse_idx(path: Path, file: BinaryIO) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) != 4 or magic[:3] != b"\x00\x00\x08" or not 1 <= magic[3] <= 4:
        raise InputError(f"{path} is no idx file of bytes: it begins {magic.hex(' ')}; expected 00 00 08 and 1 ... 4")
    header = file.read(4 * magic[3])
    if len(header) != 4 * magic[3]:
        raise InputError(f"{path} is truncated: its header ends early")
    shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
    count = math.prod(shape)
    if not 0 < count <= MAX_BYTES:
        raise InputError(f"{path} says that it holds {shape} bytes; allowed: 1 ... {MAX_BYTES}")
    data = file.read(count + 1)
    if len(data) != count:
        what = "is truncated" if len(data) < count else "has bytes left over"
        raise InputError(f"{path} {what}: its header says {shape}, {count} bytes")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _load_idx(path: Path) -> ImageSet:
    images = read_idx(path)
    if images.ndim != 3:
        raise InputError(f"{path} holds an array of {images.ndim} dimensions; images have 3: [N, H, W]")
    stem = path.name.removesuffix(".gz").replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")
    beside = [p for name in (stem, stem + ".gz") if os.path.isfile(p := path.parent / name) and p != path]
    return _image_set(path, images, read_idx(beside[0]) if stem not in path.name and beside else None)


def _load_npz(path: Path) -> ImageSet:
    try:
        with zipfile.ZipFile(path) as archive:
            images, labels = (_read_member(path, archive, names) for names in (NPZ_IMAGES, NPZ_LABELS))
    except InputError:
        raise
    except Exception as error:  # encrypted, cut, LZMA, a .npy renamed, ...: each ends in another class of exception
        raise InputError(f"{path} can't be read as .npz: {_first_line(error)}") from error
    if images is None:
        raise InputError(f"{path} has neither {' nor '.join(map(repr, NPZ_IMAGES))}")
    return _image_set(path, images, labels)


def _read_member(path: Path, archive: zipfile.ZipFile, names: Sequence[str]) -> NDArray[np.generic] | None:
    """The first of the arrays called `names`, or None; nothing is unpacked where all are too large together."""
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    if (total := sum(member.file_size for member in archive.infolist())) > MAX_BYTES:
        raise InputError(f"{path} holds {total} bytes uncompressed; allowed: at most {MAX_BYTES}")
    if (member := next((members[name] for name in names if name in members), None)) is None:
        return None
    with archive.open(member) as file:
        array: NDArray[np.generic] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _load_folder(path: Path) -> ImageSet:
    folders = [p for p in _listing(path) if os.path.isdir(p)]
    files, labels = _pictures(path), None
    per_class = [_pictures(folder) for folder in folders]
    if files and (folder := next((f for f, group in zip(folders, per_class, strict=True) if group), None)):
        raise InputError(
            f"{path} holds pictures ({files[0].name}) beside a folder of pictures ({folder.name}); "
            f"give pictures alone, or one folder for each class"
        )
    if not files:
        files = [file for group in per_class for file in group]
        labels = np.repeat(np.arange(len(per_class)), [len(group) for group in per_class])
    if not files:
        raise InputError(f"{path} holds no pictures ({', '.join(sorted(PICTURES))}); give {FORMATS}")
    return _image_set(path, _decode(files), labels)


def _pictures(folder: Path) -> list[Path]:
    return [p for p in _listing(folder) if p.suffix.lower() in PICTURES]


def _listing(folder: Path) -> list[Path]:
    """What the folder holds, sorted, without hidden names."""
    try:
        return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    except OSError as error:
        raise InputError(f"{folder} can't be read: {_first_line(error)}") from error


def _decode(files: Sequence[Path]) -> NDArray[np.uint8]:
    """Pictures as [N, H, W, C]: grey where the first one is grey, otherwise RGB (transparency on black)."""
    from PIL import Image as pillow

    made: NDArray[np.uint8] | None = None
    target = ""
    for i, file in enumerate(files):
        try:
            with pillow.open(file) as picture:
                if (mode := picture.mode) in MODES:
                    target = target or ("L" if mode in GREY_MODES else "RGB")
                    pixels = np.asarray(_opaque(picture).convert(target))
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise InputError(f"{file} is no picture that can be read: {_first_line(error)}") from error
        if mode not in MODES:  # Pillow would clip 16 bits to 8: nearly white
            raise InputError(f"{file} has the pixel mode {mode}; give 8 bits a channel: {', '.join(MODES)}")
        if made is None:
            made = np.empty((len(files), *pixels.shape), np.uint8)
        if pixels.shape != made.shape[1:]:
            (h, w), (height, width) = pixels.shape[:2], made.shape[1:3]
            raise InputError(f"{file} has {w} x {h} pixels, {files[0].name} {width} x {height}: give one size")
        made[i] = pixels
    if made is None:
        raise InputError("no pictures were given")
    return made


def _opaque(picture: Image) -> Image:
    from PIL import Image as pillow

    if picture.mode not in ("RGBA", "LA", "PA") and "transparency" not in picture.info:
        return picture
    picture = picture.convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", picture.size, (0, 0, 0, 255)), picture)


def _image_set(path: Path, images: NDArray[np.generic], labels: NDArray[np.generic] | None) -> ImageSet:
    """Check the arrays and bring the images to [N, C, H, W]."""
    if images.dtype != np.uint8:
        raise InputError(f"{path}: images are {images.dtype}; give uint8, 0 ... 255")
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.size == 0:
        raise InputError(f"{path}: images have the shape {images.shape}; give [N, H, W], [N, H, W, C] or [N, C, H, W]")
    made = torch.from_numpy(np.ascontiguousarray(images).copy())
    return ImageSet(made, None if labels is None else _labels(path, labels, len(made)))


def _labels(path: Path, labels: NDArray[np.generic], n: int) -> Tensor:
    if labels.shape != (n,) or labels.dtype.kind not in "iu":
        raise InputError(f"{path}: labels are {labels.dtype} {labels.shape}; give whole numbers of the shape ({n},)")
    if int(labels.min()) < 0 or int(labels.max()) >= MAX_CLASSES:
        raise InputError(f"{path}: labels go from {labels.min()} to {labels.max()}; allowed: 0 ... {MAX_CLASSES - 1}")
    return torch.from_numpy(labels.astype(np.int64))


def _first_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return (text.splitlines() or [type(error).__name__])[0]

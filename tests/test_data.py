"""Data sets: what is read is what was written, and what is damaged or no data set is refused with one clear line."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastddpm.errors import InputError
from fastddpm.training.data import ImageSet, load_images, read_idx

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 5, 6), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 2, 0, 3, 1], np.uint8)


def idx(array: np.ndarray) -> bytes:
    """The bytes of an idx file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder: Path, *, packed: bool) -> Path:
    """A folder in MNIST's layout."""
    for name, array in (("train-images-idx3-ubyte", IMAGES), ("train-labels-idx1-ubyte", LABELS)):
        data = idx(array)
        (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)
    return folder


def refusal(path: Path) -> str:
    """The message that a data set is refused with: one line that names the path."""
    with pytest.raises(InputError) as caught:
        load_images(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folder_and_file(tmp_path: Path, packed: bool) -> None:
    write_mnist(tmp_path, packed=packed)
    for path in (tmp_path, next(tmp_path.glob("*images*"))):
        data = load_images(path)
        assert data.images.dtype == torch.uint8
        assert np.array_equal(data.images[:, 0].numpy(), IMAGES)
        assert data.labels is not None
        assert data.labels.tolist() == LABELS.tolist()
        assert data.num_classes == 4


def test_idx_without_labels(tmp_path: Path) -> None:
    (tmp_path / "some-images-idx3-ubyte").write_bytes(idx(IMAGES))
    data = load_images(tmp_path / "some-images-idx3-ubyte")
    assert data.labels is None
    assert data.num_classes == 0


GOOD = idx(IMAGES)
DAMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no idx file"),
    "magic": (b"\x00\x01" + GOOD[2:], "no idx file"),
    "float": (b"\x00\x00\x0d" + GOOD[3:], "no idx file"),
    "no dimensions": (b"\x00\x00\x08\x00" + GOOD[4:], "no idx file"),
    "header": (GOOD[:9], "header ends early"),
    "truncated": (GOOD[:-1], "truncated"),
    "header only": (GOOD[:16], "truncated"),
    "left over": (GOOD + b"\x00", "left over"),
    "huge": (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "allowed"),
    "zero": (struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28), "allowed"),
    "labels as images": (idx(LABELS), "dimensions"),
    "text": (b"<!DOCTYPE html><html></html>", "no idx file"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx(tmp_path: Path, name: str, packed: bool) -> None:
    data, expected = DAMAGES[name]
    path = tmp_path / ("x-images-idx3-ubyte" + ".gz" * packed)
    path.write_bytes(gzip.compress(data) if packed else data)
    assert expected in refusal(path)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"no gzip", lambda b: b[:40] + b"\xff" * 9 + b[49:]])
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x-images-idx3-ubyte.gz"
    path.write_bytes(damage(gzip.compress(GOOD)))
    refusal(path)


@given(st.binary(max_size=64), st.integers(0, 40))
def test_idx_parser_refuses_or_returns(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz"
    path.write_bytes(GOOD[:cut] + data)
    try:
        array = read_idx(path)
    except InputError:
        return
    assert idx(array) == path.read_bytes()


def test_label_count_must_match(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=False)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:-1]))
    with pytest.raises(InputError, match="labels"):
        load_images(tmp_path)


@pytest.mark.parametrize("names", [("images", "labels"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "NHW1"])
def test_npz(tmp_path: Path, names: tuple[str, str], layout: str) -> None:
    colour = RNG.integers(0, 256, (7, 3, 5, 6), dtype=np.uint8)
    given, expected = {
        "NHW": (IMAGES, IMAGES[:, None]),
        "NHW1": (IMAGES[..., None], IMAGES[:, None]),
        "NHWC": (colour.transpose(0, 2, 3, 1), colour),
        "NCHW": (colour, colour),
    }[layout]
    np.savez(tmp_path / "x.npz", **{names[0]: given, names[1]: LABELS.astype(np.int32)})  # type: ignore[arg-type]
    data = load_images(tmp_path / "x.npz")
    assert np.array_equal(data.images.numpy(), expected)
    assert data.images.is_contiguous()
    assert data.labels is not None
    assert data.labels.tolist() == LABELS.tolist()


BAD_NPZ: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "float": ({"images": IMAGES / 255}, "uint8"),
    "flat": ({"images": IMAGES[0]}, "shape"),
    "five channels": ({"images": np.zeros((2, 5, 8, 8), np.uint8)}, "shape"),
    "none": ({"images": IMAGES[:0]}, "shape"),
    "names": ({"x": IMAGES}, "neither"),
    "negative label": ({"images": IMAGES, "labels": LABELS.astype(int) - 1}, "labels"),
    "float labels": ({"images": IMAGES, "labels": LABELS / 2}, "labels"),
    "few labels": ({"images": IMAGES, "labels": LABELS[1:]}, "labels"),
    "huge label": ({"images": IMAGES, "labels": LABELS.astype(int) * 10**9}, "labels"),
    "pickle": ({"images": np.array([{}, {}], object)}, "can't be read"),
}


@pytest.mark.parametrize("name", BAD_NPZ)
def test_bad_npz(tmp_path: Path, name: str) -> None:
    arrays, expected = BAD_NPZ[name]
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    assert expected in refusal(tmp_path / "x.npz")


@pytest.mark.parametrize("data", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_npz_that_is_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    refusal(tmp_path / "x.npz")


def test_folder_of_pictures(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(IMAGES[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture, and not looked at")
    data = load_images(tmp_path)
    assert np.array_equal(data.images[:, 0].numpy(), IMAGES[:3])
    assert data.labels is None


def test_subfolders_are_classes(tmp_path: Path) -> None:
    for i, kind in enumerate(["boot", "ankle", "boot"]):
        (tmp_path / kind).mkdir(exist_ok=True)
        Image.fromarray(np.stack([IMAGES[i]] * 3, 2)).save(tmp_path / kind / f"{i}.png")
    data = load_images(tmp_path)
    assert data.images.shape == (3, 3, 5, 6)
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]  # ankle, boot, boot
    assert np.array_equal(data.images[0, 2].numpy(), IMAGES[1])


def test_transparency_is_black(tmp_path: Path) -> None:
    rgba = np.full((4, 4, 4), 200, np.uint8)
    rgba[:2, :, 3], rgba[2:, :, 3] = 0, 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert load_images(tmp_path).images[0, :, :, 0].tolist() == [[0, 0, 200, 200]] * 3


def test_bad_folders(tmp_path: Path) -> None:
    assert "no pictures" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "absent")
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    assert "b.png is no picture" in refusal(tmp_path)
    Image.fromarray(IMAGES[0].T.copy()).save(tmp_path / "b.png")
    assert "b.png has 5 x 6 pixels, a.png 6 x 5" in refusal(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"0")
    assert "no data set" in refusal(path)


@pytest.mark.parametrize(
    "shape, multiple, size, side",
    [((28, 28), 8, None, 32), ((32, 32), 8, None, 32), ((5, 6), 4, None, 8), ((5, 6), 1, None, 6), ((5, 6), 4, 12, 12)],
)
def test_padding(shape: tuple[int, int], multiple: int, size: int | None, side: int) -> None:
    images = torch.full((2, 1, *shape), 9, dtype=torch.uint8)
    made = ImageSet(images).padded(multiple, size).images
    assert made.shape == (2, 1, side, side)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    assert torch.equal(made[:, :, top : top + shape[0], left : left + shape[1]], images)
    assert made.long().sum() == images.long().sum()  # all else is black


@pytest.mark.parametrize("size", [4, 9, 0, -8])
def test_padding_that_does_not_fit(size: int) -> None:
    with pytest.raises(InputError, match="multiple of 4 of at least 8"):
        ImageSet(torch.zeros(1, 1, 5, 6, dtype=torch.uint8)).padded(4, size)


def test_fingerprint_sees_every_part() -> None:
    images, labels = torch.from_numpy(IMAGES[:, None].copy()), torch.from_numpy(LABELS.astype(np.int64))
    changed = images.clone()
    changed[3, 0, 2, 2] ^= 1
    sets = [
        ImageSet(images, labels),
        ImageSet(images),
        ImageSet(changed, labels),
        ImageSet(images, labels.flip(0)),
        ImageSet(images.transpose(2, 3), labels),
    ]
    assert len({data.fingerprint() for data in sets}) == len(sets)
    assert ImageSet(images.clone(), labels.clone()).fingerprint() == sets[0].fingerprint()

"""Data sets: what is read is what was written, and what is damaged or no data set is refused with one clear line."""

import gzip
import io
import lzma
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastddpm.errors import InputError
from fastddpm.training import data as data_module
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


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zipped(data: bytes, method: int = zipfile.ZIP_STORED) -> bytearray:
    """An archive with `data` as images.npy."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("images.npy", data)
    return bytearray(buffer.getvalue())


def encrypted() -> bytes:
    """An archive that says that its member is encrypted (bit 0 of the flags, in both headers)."""
    data = zipped(npy(IMAGES))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def broken_lzma() -> bytes:
    data = zipped(npy(IMAGES), zipfile.ZIP_LZMA)
    with pytest.raises(lzma.LZMAError), zipfile.ZipFile(io.BytesIO(_spoilt(data))) as archive:
        archive.read("images.npy")
    return bytes(_spoilt(data))


def _spoilt(data: bytearray) -> bytearray:
    start = 30 + len("images.npy")  # of the member's data: LZMA's version and properties
    return data[: start + 4] + b"\xff" * 5 + data[start + 9 :]


ENDLESS = npy(IMAGES).replace(b"(7, 5, 6), }", b"(%d,), }" % 2**60)


@pytest.mark.parametrize(
    "data, expected",
    [
        (npy(IMAGES), "can't be read as .npz: File is not a zip file"),
        (zipped(b"no array at all"), "can't be read as .npz"),
        (encrypted(), "encrypted"),
        (broken_lzma(), "can't be read as .npz"),
        (zipped(ENDLESS), "can't be read as .npz"),
    ],
    ids=["npy", "no npy inside", "encrypted", "lzma", "endless"],
)
def test_npz_that_is_foreign(tmp_path: Path, data: bytes, expected: str) -> None:
    (tmp_path / "x.npz").write_bytes(data)
    assert expected in refusal(tmp_path / "x.npz")


def test_npz_is_weighed_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All members together: two of them that are each small enough are refused."""
    np.savez_compressed(tmp_path / "x.npz", images=IMAGES, other=IMAGES)
    size = len(npy(IMAGES))
    monkeypatch.setattr(data_module, "MAX_BYTES", 2 * size)
    assert len(load_images(tmp_path / "x.npz").images) == 7
    monkeypatch.setattr(data_module, "MAX_BYTES", 2 * size - 1)
    monkeypatch.setattr(np.lib.format, "read_array", None)  # nothing is unpacked
    assert f"holds {2 * size} bytes" in refusal(tmp_path / "x.npz")


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


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_modes_of_eight_bits(tmp_path: Path, mode: str) -> None:
    Image.new("L", (6, 5), 255).convert(mode).save(tmp_path / "a.tif")
    images = load_images(tmp_path).images
    assert images.shape == (1, 1 if mode in ("1", "L") else 3, 5, 6)
    assert images.min() >= 254


@pytest.mark.parametrize("mode, name", [("I;16", "b.png"), ("I", "b.tif"), ("F", "b.tif")])
def test_deep_pictures_are_refused(tmp_path: Path, mode: str, name: str) -> None:
    Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
    Image.new(mode, (6, 5), 4000).save(tmp_path / name)
    message = refusal(tmp_path)
    assert f"{name} has the pixel mode I" in message or f"{name} has the pixel mode F" in message
    assert "give 8 bits a channel" in message


def test_pictures_beside_classes_are_refused(tmp_path: Path) -> None:
    for kind in ("ankle", "boot"):
        (tmp_path / kind).mkdir()
        Image.fromarray(IMAGES[0]).save(tmp_path / kind / "0.png")
    Image.fromarray(IMAGES[0]).save(tmp_path / "stray.png")
    assert "holds pictures (stray.png) beside a folder of pictures (ankle)" in refusal(tmp_path)
    for kind in ("ankle", "boot"):
        (tmp_path / kind / "0.png").unlink()
    assert load_images(tmp_path).labels is None  # folders of other things are no classes


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + ".npz", "a\0b"])
def test_impossible_names(tmp_path: Path, name: str) -> None:
    assert "can't be read" in refusal(tmp_path / name)


def test_labels_whose_name_would_be_too_long(tmp_path: Path) -> None:
    """Beside images with a name of 255 letters, the labels' with .gz would have 258: there are none."""
    path = tmp_path / "images-idx3-ubyte".rjust(255, "x")
    path.write_bytes(GOOD)
    assert load_images(path).labels is None


def test_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    assert refusal(tmp_path).endswith("can't be read: Permission denied")


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


def test_padding_beyond_memory() -> None:
    with pytest.raises(InputError, match=f"1 images of 1 x {1 << 20} x {1 << 20} have {1 << 40} bytes; allowed"):
        ImageSet(torch.zeros(1, 1, 5, 6, dtype=torch.uint8)).padded(4, 1 << 20)


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

"""Pixels, grids, filmstrips and PNG files, compared byte for byte with what they should hold."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastddpm import pictures
from fastddpm.errors import InputError


def test_the_pixel_mapping_rounds_and_clips():
    x = np.array([-9.0, -1.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.0, 1 - 0.49 / 127.5, 1.0, 9.0], dtype=np.float32)
    pixels = pictures.to_uint8(x.reshape(1, 1, 2, 4))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (1, 2, 4, 1)
    assert pixels.ravel().tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_every_grey_level_survives_the_way_there_and_back():
    levels = np.arange(256)
    x = (levels / 127.5 - 1).astype(np.float32).reshape(1, 1, 16, 16)
    for samples in (x, torch.from_numpy(x), x.astype(np.float64)):
        np.testing.assert_array_equal(pictures.to_uint8(samples).ravel(), levels)


@given(
    n=st.integers(1, 7),
    channels=st.sampled_from([1, 3]),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    columns=st.integers(1, 8),
    scale=st.integers(1, 3),
)
def test_a_grid_holds_each_sample_at_its_place_and_white_between(n, channels, size, columns, scale):
    high, wide = size
    x = np.random.default_rng(0).uniform(-1.2, 1.2, (n, channels, high, wide))
    canvas = np.array(pictures.grid(x, columns=columns, scale=scale)).astype(int)
    canvas = canvas.reshape(*canvas.shape[:2], channels)
    columns = min(columns, n)
    gap = pictures.GAP
    assert canvas.shape[0] == -(-n // columns) * (high * scale + gap) + gap
    assert canvas.shape[1] == columns * (wide * scale + gap) + gap
    pixels = pictures.to_uint8(x)
    for i in range(n):
        top = gap + i // columns * (high * scale + gap)
        left = gap + i % columns * (wide * scale + gap)
        for a, b in np.ndindex(high * scale, wide * scale):
            assert (canvas[top + a, left + b] == pixels[i, a // scale, b // scale]).all()
        canvas[top : top + high * scale, left : left + wide * scale] = 255
    assert (canvas == 255).all()


@pytest.mark.parametrize(
    "shape, size",
    [
        ((16, 1, 32, 32), (4 * 98 + 2, 4 * 98 + 2)),  # enlarged 3 times
        ((10, 3, 64, 64), (4 * 66 + 2, 3 * 66 + 2)),
        ((3, 3, 256, 128), (2 * 130 + 2, 2 * 258 + 2)),
        ((1, 1, 28, 28), (84 + 4, 84 + 4)),
    ],
)
def test_grids_are_nearly_square_and_small_samples_are_enlarged(shape, size):
    image = pictures.grid(np.zeros(shape))
    assert image.size == size
    assert image.mode == ("L" if shape[1] == 1 else "RGB")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_filmstrip_has_a_row_a_sample_and_time_from_left_to_right(channels):
    frames = np.random.default_rng(0).uniform(-1, 1, (4, 2, channels, 6, 6))
    strip = pictures.filmstrip(list(frames), scale=2)
    expected = pictures.grid(frames.transpose(1, 0, 2, 3, 4).reshape(8, channels, 6, 6), columns=4, scale=2)
    np.testing.assert_array_equal(np.array(strip), np.array(expected))
    titled = np.array(pictures.filmstrip(list(frames), captions=["a", "b", "c", "d"], scale=2))
    margin = titled.shape[0] - np.array(strip).shape[0]
    assert margin > 0
    np.testing.assert_array_equal(titled[margin:], np.array(strip))
    columns = np.array_split(titled[:margin].reshape(margin, titled.shape[1], channels), 4, axis=1)
    assert all(column.min() < 128 for column in columns)  # there is writing above each


def test_a_png_says_how_it_was_made():
    image = pictures.grid(np.zeros((1, 3, 4, 4)))
    data = pictures.encode_png(image, {"seed": 2**64 - 1, "solver": "ddim", "weights": "Äpfel 苹果"})
    assert data == pictures.encode_png(image, {"seed": 2**64 - 1, "solver": "ddim", "weights": "Äpfel 苹果"})
    back = Image.open(io.BytesIO(data))
    assert back.format == "PNG"
    assert back.text == {"seed": str(2**64 - 1), "solver": "ddim", "weights": "Äpfel 苹果"}
    np.testing.assert_array_equal(np.array(back), np.array(image))


ONE = np.zeros((1, 1, 4, 4))
BAD = {
    "3 dimensions": (lambda: pictures.grid(ONE[0]), r"shape \(1, 4, 4\)"),
    "2 channels": (lambda: pictures.grid(np.zeros((1, 2, 4, 4))), r"1 \(grey\) or 3 \(RGB\)"),
    "no samples": (lambda: pictures.grid(np.zeros((0, 1, 4, 4))), r"shape \(0, 1, 4, 4\)"),
    "NaN": (lambda: pictures.grid(ONE * np.nan), "NaN or infinite"),
    "infinite": (lambda: pictures.to_uint8(ONE + np.inf), "NaN or infinite"),
    "columns": (lambda: pictures.grid(ONE, columns=0), "columns is 0"),
    "columns a bool": (lambda: pictures.grid(ONE, columns=True), "columns is True"),
    "scale": (lambda: pictures.grid(ONE, scale=-1), "scale is -1"),
    "scale a float": (lambda: pictures.grid(ONE, scale=2.0), r"scale is 2\.0"),
    "too large": (lambda: pictures.grid(ONE, scale=10_000), "over 32768 pixels a side"),
    "no frames": (lambda: pictures.filmstrip([]), "at least one frame"),
    "frames of two shapes": (lambda: pictures.filmstrip([ONE, np.zeros((1, 1, 5, 4))]), "of one shape"),
    "captions": (lambda: pictures.filmstrip([ONE, ONE], captions=["a"]), "1 captions were given for 2 frames"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_picture_can_show_is_refused(name):
    call, message = BAD[name]
    with pytest.raises(InputError, match=message):
        call()

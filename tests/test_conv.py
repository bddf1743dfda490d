"""The convolution kernel against float64: variants, dtypes, awkward shapes; its bits; and what it must not touch."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import conv_reference
from fastddpm_kernels.conv import launch_conv
from fastddpm_kernels.conv_tiles import Tile, segments_of, statistics_rows, step_of, tile_of
from helpers import DEVICE, Guarded, fenced, store_error
from hypothesis import given
from hypothesis import strategies as st

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case:
    """A convolution of random numbers, as the UNet's modules say it, and as the kernel takes it."""

    def __init__(
        self, size, c_in, c_out, *, dtype=torch.float32, kernel=3, stride=1, padding=1, up=False, row=False,
        residual=False, shortcut=(), scale=1.0, bias=True, seed=0,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        b, h, w = size
        self.dtype, self.kernel, self.stride, self.padding, self.up, self.scale = (
            dtype,
            kernel,
            stride,
            padding,
            up,
            scale,
        )
        self.sources = [self.random(b, h, w, c) for c in c_in]
        total = sum(c_in)
        self.weight = self.random(c_out, total, kernel, kernel) / math.sqrt(total * kernel**2)
        self.bias = self.random(c_out, dtype=torch.float32) if bias else None
        oh, ow = (2 * h, 2 * w) if up else ((h - 1) // stride + 1, (w - 1) // stride + 1)
        if stride == 2 and not padding:
            oh, ow = h // 2, w // 2
        self.shape = (b, oh, ow, c_out)
        self.row = self.random(b, c_out, dtype=torch.float32) if row else None
        self.residual = self.random(*self.shape) if residual else None
        self.shortcut = [self.random(b, h, w, c) for c in shortcut]
        self.shortcut_weight = self.random(c_out, sum(shortcut), 1, 1) / math.sqrt(max(1, sum(shortcut)))

    def random(self, *shape, dtype=None):
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    def launch(self, out=None, *, raw=True, **options):
        """The result; `raw`: whether the kernel stores it (it may store its norms alone)."""
        if raw and out is None:
            out = torch.full(self.shape, math.nan, dtype=self.dtype, device=DEVICE)
        packed = conv_reference.phase_weights if self.up else conv_reference.pack_weight
        extra = {}
        if len(self.sources) > 1:
            extra["second"] = fenced(self.sources[1])
        if self.row is not None:
            table = torch.full((len(self.row), self.row.shape[1] + 13), math.nan)  # the row is some of its columns
            table[:, 8:-5] = self.row
            extra["row"] = fenced(table)[:, 8:-5]
        if self.residual is not None:
            extra["residual"] = fenced(self.residual)
        if self.shortcut:
            extra |= dict(zip(("shortcut_x", "shortcut_second"), map(fenced, self.shortcut), strict=False))
            extra["shortcut_weight"] = fenced(conv_reference.pack_weight(self.shortcut_weight))
        if not self.up:
            extra |= dict(stride=self.stride, padding=self.padding)
        bias = None if self.bias is None else fenced(self.bias)
        x, weight = fenced(self.sources[0]), fenced(packed(self.weight))
        launch_conv(x, weight, bias, out, scale=self.scale, **extra, **options)
        return out.cpu() if raw else None

    def modules(self, dtype):
        """As the UNet computes it, in `dtype`."""
        image = torch.cat(self.sources, dim=3).permute(0, 3, 1, 2).to(dtype)
        if self.up:
            image = F.interpolate(image, scale_factor=2.0, mode="nearest")
        padding = self.padding if self.kernel == 3 else 0
        if self.kernel == 3 and not padding:
            image = F.pad(image, (0, 1, 0, 1))
        bias = None if self.bias is None else self.bias.to(dtype)
        out = F.conv2d(image, self.weight.to(dtype), bias, stride=self.stride, padding=padding)
        if self.row is not None:
            out = out + self.row.to(dtype)[:, :, None, None]
        if self.shortcut:
            skip = torch.cat(self.shortcut, dim=3).permute(0, 3, 1, 2).to(dtype)
            out = out + F.conv2d(skip, self.shortcut_weight.to(dtype))
        out = out.permute(0, 2, 3, 1)
        if self.residual is not None:
            out = out + self.residual.to(dtype)
        return out * self.scale

    def bound(self, exact):
        """The largest error allowed: of the float32 sum, of weights that were rounded again, and of the store.

        A sum of n products is off by at most n eps times the sum of their sizes, in any order; by far less in fact.
        """
        terms = (
            torch.cat([s.abs() for s in self.sources], dim=3).amax().double()
            * self.weight.abs().double().sum((1, 2, 3)).amax()
        )
        size = terms + exact.abs().amax() + 4
        rounded = torch.finfo(self.dtype).eps / 2 if self.up else 0.0
        return size * (32 * torch.finfo(torch.float32).eps + rounded) + store_error(exact, self.dtype)

    def check(self, **options):
        guarded = Guarded(self.shape, self.dtype)
        out = self.launch(guarded.tensor, **options).double()
        exact = self.modules(torch.float64)
        assert guarded.intact()
        assert bool(((out - exact).abs() <= self.bound(exact)).all()), (out - exact).abs().max()
        return out


VARIANTS = {
    "plain": dict(size=(2, 8, 8), c_in=(16,), c_out=32),
    "no bias": dict(size=(1, 8, 8), c_in=(16,), c_out=32, bias=False, row=True),
    "two sources": dict(size=(2, 8, 8), c_in=(16, 8), c_out=32, row=True, residual=True, scale=0.5),
    "1x1": dict(size=(3, 4, 4), c_in=(24,), c_out=40, kernel=1, residual=True),
    "first": dict(size=(2, 8, 8), c_in=(3,), c_out=32),
    "last": dict(size=(2, 8, 8), c_in=(16,), c_out=3),
    "odd": dict(size=(3, 5, 7), c_in=(5, 3), c_out=7, row=True, residual=True),
    "one pixel": dict(size=(3, 1, 1), c_in=(8,), c_out=8, row=True),
    "one channel": dict(size=(1, 3, 2), c_in=(1,), c_out=1),
    "stride 2": dict(size=(2, 8, 6), c_in=(16,), c_out=16, stride=2),
    "stride 2, tiles": dict(size=(2, 16, 16), c_in=(8,), c_out=8, stride=2),
    "stride 2, odd": dict(size=(2, 5, 7), c_in=(16,), c_out=16, stride=2),
    "downsample_padding 0": dict(size=(2, 8, 6), c_in=(16,), c_out=16, stride=2, padding=0),
    "downsample_padding 0, odd": dict(size=(2, 5, 7), c_in=(16,), c_out=16, stride=2, padding=0),
    "first, stride 2": dict(size=(1, 6, 6), c_in=(3,), c_out=8, stride=2, padding=0),
    "up": dict(size=(2, 4, 4), c_in=(16,), c_out=16, up=True),
    "up, odd, two sources": dict(size=(3, 3, 5), c_in=(8, 16), c_out=24, up=True, row=True),
    "shortcut": dict(size=(2, 4, 4), c_in=(16,), c_out=32, shortcut=(24, 8), scale=0.7),
    "shortcut of one": dict(size=(3, 3, 5), c_in=(8,), c_out=16, shortcut=(16,), row=True),
    "shortcut, odd channels": dict(size=(1, 4, 4), c_in=(8, 5), c_out=8, shortcut=(3, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_float64(name, dtype):
    Case(**VARIANTS[name], dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["two sources", "shortcut", "up", "odd"])
def test_error_is_at_most_twice_that_of_the_modules(name, dtype):
    case = Case(**VARIANTS[name], dtype=dtype)
    exact = case.modules(torch.float64)
    error, eager = ((made.double() - exact).abs() for made in (case.launch(), case.modules(dtype)))
    assert error.mean() <= 2 * eager.mean() + (store_error(exact, dtype)).mean()


@pytest.mark.parametrize("name", VARIANTS)
def test_the_reference_says_the_same(name):
    case = Case(**VARIANTS[name], dtype=torch.float32)
    packed = conv_reference.phase_weights if case.up else conv_reference.pack_weight
    shortcut = dict(zip(("shortcut_x", "shortcut_second"), case.shortcut, strict=False))
    shortcut |= {"shortcut_weight": conv_reference.pack_weight(case.shortcut_weight)} if shortcut else {}
    second = case.sources[1] if len(case.sources) > 1 else None
    bias = torch.zeros(case.shape[3]) if case.bias is None else case.bias
    options = {} if case.up else dict(stride=case.stride, padding=case.padding)
    made = conv_reference.conv(
        case.sources[0], packed(case.weight, torch.float64), bias, second=second, row=case.row, residual=case.residual,
        scale=case.scale, **shortcut, **options,
    )  # fmt: skip
    assert torch.allclose(made, case.modules(torch.float64), rtol=1e-12, atol=1e-12)


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    c_in=st.lists(st.integers(1, 20), min_size=1, max_size=2),
    c_out=st.integers(1, 20),
    kind=st.sampled_from(["plain", "1x1", "stride", "down", "up"]),
    row=st.booleans(),
    residual=st.booleans(),
    shortcut=st.lists(st.integers(1, 12), max_size=2),
)
def test_any_shape(size, c_in, c_out, kind, row, residual, shortcut):
    if kind == "down" and min(size[1:]) < 2:
        return
    kinds = dict(plain={}, up=dict(up=True), stride=dict(stride=2), down=dict(stride=2, padding=0))
    options = kinds.get(kind, dict(kernel=1))
    shortcut = shortcut if kind in ("plain", "1x1") else []
    Case(size, c_in, c_out, row=row, residual=residual, shortcut=shortcut, **options).check()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["plain", "two sources", "shortcut", "odd"])
def test_segments(name, split):
    Case(**VARIANTS[name]).check(segments=3, split=split)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_segments_side_by_side_have_the_same_bits(dtype):
    case = Case((3, 4, 4), (16, 32), 64, dtype=dtype, row=True, residual=True, shortcut=(16,), scale=0.7)
    assert torch.equal(case.launch(segments=4, split=False), case.launch(segments=4, split=True))


def test_more_segments_than_steps():
    Case((1, 4, 4), (16,), 16, kernel=1).check(segments=3, split=True)
    Case((1, 4, 4), (16,), 16, kernel=1).check(segments=3, split=False)


@pytest.mark.parametrize("name", ["odd", "up, odd, two sources", "shortcut of one", "stride 2, odd"])
@pytest.mark.parametrize("segments", [1, 2])
def test_a_samples_bits_do_not_depend_on_its_slot(name, segments):
    case = Case(**(VARIANTS[name] | dict(size=(4, *VARIANTS[name]["size"][1:]))), dtype=torch.float16)
    if case.up and segments > 1:
        return
    whole = case.launch(segments=segments)
    for order in ([2, 0, 1, 3], [3]):
        for attribute in ("row", "residual"):
            if getattr(case, attribute) is not None:
                setattr(case, attribute, getattr(case, attribute)[order])
        case.sources, case.shortcut = [s[order] for s in case.sources], [s[order] for s in case.shortcut]
        case.shape = (len(order), *case.shape[1:])
        whole = whole[order]
        assert torch.equal(case.launch(segments=segments), whole)


def test_again_the_same_bits():
    case = Case(**VARIANTS["two sources"], dtype=torch.bfloat16)
    assert torch.equal(case.launch(), case.launch())


def test_tiles_do_not_change_the_bits():
    case = Case((2, 8, 8), (16, 16), 64, dtype=torch.float16, row=True)
    made = [case.launch(tile=Tile(m, n, 16, 4, 2)) for m, n in ((64, 32), (64, 64), (128, 64))]
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_an_empty_batch():
    launch_conv(*(torch.zeros(s, device=DEVICE) for s in ((0, 4, 4, 8), (72, 8), (8,), (0, 4, 4, 8))))


def test_packed_weights():
    w = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    packed = conv_reference.pack_weight(w)
    assert packed.shape == (27, 8)
    assert packed.is_contiguous()
    assert bool((packed[:, 5:] == 0).all())
    assert torch.equal(packed[(1 * 3 + 2) * 3 + 1, 4], w[4, 1, 1, 2])
    assert torch.equal(conv_reference.unpacked(packed[:, :5], 3), w)
    assert torch.equal(conv_reference.pack_weight(w[:, :, 0, 0]), conv_reference.pack_weight(w[:, :, :1, :1]))


def test_phase_weights_are_rounded_once():
    w = torch.tensor([1.0, 2.0**-9, 2.0**-9]).expand(1, 1, 3, 3).to(torch.bfloat16)
    last = conv_reference.phase_weights(w, torch.float64)
    assert torch.equal(conv_reference.phase_weights(w), last.to(torch.bfloat16))
    assert last[0, 3, 0] == 4 * 2.0**-9  # rows 1 and 2 times columns 1 and 2
    assert last[1, 2, 0] == 2 * (1 + 2.0**-9)


@pytest.mark.parametrize("shared", [101376, 166912, 232448])
def test_tiles_fit_the_gpu(shared):
    for rows in (16, 1024, 65536, 2**20):
        for cout in (3, 64, 128, 256, 768):
            for most in (64 * 64, 128 * 128, 128 * 256):
                tile = tile_of(rows, cout, 64, torch.bfloat16, most=most, shared=shared)
                buffers = tile.stages - (shared < 200_000)
                assert 2 * (tile.m + tile.n) * tile.k * buffers <= shared
                assert tile.m >= 64


def test_the_order_of_the_sums_is_the_shapes():
    assert step_of((128, 256), torch.bfloat16) == 64
    assert step_of((3,), torch.bfloat16, flat=True) == 32
    assert step_of((48, 0), torch.float16) == 16
    assert [segments_of(pixels, 72) for pixels in (1024, 256, 64, 16)] == [1, 1, 8, 8]
    assert [statistics_rows(pixels) for pixels in (1024, 64, 16, 48, 35)] == [64, 64, 16, 16, 1]

"""The 1-D convolution's kernel against float64: variants, dtypes, awkward shapes; its bits; what it must not touch."""

import math

import pytest
import torch
from fastddpm_kernels import conv1d as module
from fastddpm_kernels.conv1d import launch_conv1d, mish, scratch_of
from fastddpm_kernels.conv1d_reference import conv1d, pack_conv1d
from fastddpm_kernels.conv1d_tiles import channels_of, fits, rows_of, segments_of, step_of
from helpers import DEVICE, Guarded, fenced, store_error
from hypothesis import given
from hypothesis import strategies as st

EPS = 1e-3  # not the default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Case:
    """A convolution of random numbers, and what follows it."""

    def __init__(
        self, batch, length, sources, c_out, taps=5, *, dtype=torch.float32, stride=1, up=False, groups=0, film=0,
        residual=False, seed=0,
    ):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.stride, self.up, self.groups, self.taps = dtype, stride, up, groups, 2 if up else taps
        self.sources = [self.random(batch, length, c) for c in sources]
        total = sum(sources)
        shape = (total, c_out, 4) if up else (c_out, total, taps)
        self.weight = self.random(*shape) / math.sqrt(total * self.taps)
        self.bias = self.random(c_out, dtype=torch.float32)
        self.shape = (batch, 2 * length if up else (length - 1) // stride + 1, c_out)
        self.norm = tuple(self.random(c_out, dtype=torch.float32) for _ in range(2)) if groups else None
        self.film = self.random(batch, film * c_out, dtype=torch.float32) if film else None
        self.residual = self.random(*self.shape) if residual else None

    def random(self, *shape, dtype=None):
        return torch.randn(*shape, generator=self.generator).to(dtype or self.dtype)

    @property
    def group(self):
        return self.shape[2] // self.groups if self.groups else 0

    def packed(self):
        sources = tuple(s.shape[2] for s in self.sources)
        return pack_conv1d(self.weight, sources, group=self.group, up=self.up)

    def launch(self, out=None, order=None, **options):
        """`order`: which trajectories, and in which order."""
        take = (lambda v: v) if order is None else (lambda v: v[order])
        batch = len(take(self.sources[0]))
        if out is None:
            out = torch.full((batch, *self.shape[1:]), math.nan, dtype=self.dtype, device=DEVICE)
        if self.norm is not None:
            options |= dict(norm=tuple(map(fenced, self.norm)), groups=self.groups, eps=EPS)
        if self.film is not None:
            table = torch.full((batch, self.film.shape[1] + 7), math.nan)  # the rows are some of its columns
            table[:, 4:-3] = take(self.film)
            options["film"] = fenced(table)[:, 4:-3]
        if self.residual is not None:
            options["residual"] = fenced(take(self.residual))
        if len(self.sources) > 1:
            options["second"] = fenced(take(self.sources[1]))
        x, weight, bias = fenced(take(self.sources[0])), fenced(self.packed()), fenced(self.bias)
        launch_conv1d(x, weight, bias, out, stride=self.stride, **options)
        return out.cpu()

    def said(self, dtype=torch.float64):
        """What the reference says, computed in `dtype`."""
        second = self.sources[1] if len(self.sources) > 1 else None
        return conv1d(
            self.sources[0], self.weight, self.bias, second=second, stride=self.stride, up=self.up, norm=self.norm,
            groups=self.groups or 1, eps=EPS, film=self.film, residual=self.residual, dtype=dtype,
        )  # fmt: skip

    def bound(self, exact):
        """The largest error allowed: of the float32 sum, as the norm and FiLM enlarge it, and of the store.

        A sum of n products is off by at most n eps times the sum of their sizes, in any order; by far less in fact.
        """
        terms = max(s.abs().amax() for s in self.sources).double() * self.weight.abs().double().sum((1, 2)).amax()
        grown = 1.0
        if self.norm is not None:
            second = self.sources[1] if len(self.sources) > 1 else None
            y = conv1d(self.sources[0], self.weight, self.bias, second=second, stride=self.stride, up=self.up)
            within = y.reshape(len(y), y.shape[1], self.groups, -1)
            spread = within.var((1, 3), correction=0).add(EPS).sqrt().amin()
            grown = 1 + 4 * float(self.norm[0].abs().amax() / spread)
        if self.film is not None:
            grown *= 1 + float(self.film.abs().amax())
        return (terms + exact.abs().amax() + 4) * grown * 16 * torch.finfo(torch.float32).eps + store_error(
            exact, self.dtype
        )

    def check(self, **options):
        guarded = Guarded(self.shape, self.dtype)
        out = self.launch(guarded.tensor, **options).double()
        exact = self.said()
        assert guarded.intact()
        assert bool(((out - exact).abs() <= self.bound(exact)).all()), (out - exact).abs().max()
        return out


VARIANTS = {
    "film": dict(batch=2, length=16, sources=(32,), c_out=32, groups=8, film=2),
    "shift": dict(batch=1, length=8, sources=(16,), c_out=16, groups=8, film=1),
    "residual": dict(batch=3, length=4, sources=(48,), c_out=64, groups=8, residual=True),
    "two sources": dict(batch=2, length=4, sources=(32, 16), c_out=64, groups=8, film=2),
    "all": dict(batch=2, length=8, sources=(16, 40), c_out=48, groups=4, film=2, residual=True),
    "first": dict(batch=3, length=16, sources=(2,), c_out=32, groups=8, film=2),
    "odd": dict(batch=3, length=11, sources=(5, 3), c_out=21, groups=7, film=2, residual=True),
    "one of all": dict(batch=1, length=1, sources=(1,), c_out=1, groups=1),
    "wide group": dict(batch=1, length=4, sources=(16,), c_out=96, groups=1),
    "groups in many tiles": dict(batch=2, length=2, sources=(8,), c_out=144, groups=6, film=1),
    "long": dict(batch=1, length=64, sources=(16,), c_out=16, groups=8),
    "3 taps": dict(batch=2, length=5, sources=(16,), c_out=8, taps=3, groups=2),
    "shortcut": dict(batch=3, length=4, sources=(24, 16), c_out=40, taps=1),
    "down": dict(batch=2, length=16, sources=(32,), c_out=32, taps=3, stride=2),
    "down, odd": dict(batch=3, length=7, sources=(8,), c_out=72, taps=3, stride=2),
    "up": dict(batch=2, length=4, sources=(32,), c_out=32, up=True),
    "up, odd": dict(batch=3, length=3, sources=(9,), c_out=70, up=True),
    "uneven segments": dict(batch=2, length=4, sources=(72,), c_out=16, taps=3, groups=4),  # 5 and 4 steps, in float32
    "uneven segments of 16 bits": dict(batch=2, length=4, sources=(136,), c_out=16, taps=3, groups=4),
    "up, two segments": dict(batch=2, length=3, sources=(128,), c_out=16, up=True),
    "up, two tiles": dict(batch=20, length=3, sources=(8,), c_out=8, up=True),
    "last": dict(batch=3, length=16, sources=(32,), c_out=2, taps=1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_float64(name, dtype):
    Case(**VARIANTS[name], dtype=dtype).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["film", "all", "up", "odd"])
def test_error_is_at_most_twice_that_of_eager(name, dtype):
    case = Case(**VARIANTS[name], dtype=dtype)
    exact = case.said()
    error, eager = ((made.double() - exact).abs() for made in (case.launch(), case.said(dtype)))
    assert error.mean() <= 2 * eager.mean() + store_error(exact, dtype).mean()


@given(
    batch=st.integers(1, 5),
    length=st.integers(1, 20),
    sources=st.lists(st.integers(1, 40), min_size=1, max_size=2),
    group=st.integers(1, 20),
    groups=st.integers(1, 9),
    kind=st.sampled_from(["norm", "plain", "down", "up"]),
    taps=st.sampled_from([1, 3, 5]),
    film=st.integers(0, 2),
    residual=st.booleans(),
)
def test_any_shape(batch, length, sources, group, groups, kind, taps, film, residual):
    kinds = dict(norm=dict(groups=groups, film=film, residual=residual), down=dict(stride=2), up=dict(up=True))
    Case(batch, length, sources, group * groups, taps, **kinds.get(kind, {})).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["film", "all", "odd", "up", "down", "uneven segments", "uneven segments of 16 bits"])
def test_however_the_sum_is_divided_the_bits_are_the_same(name, dtype):
    case = Case(**VARIANTS[name], dtype=dtype)
    for rows in (16, 64):  # not these with each other: the interpreter's products are NumPy's
        assert torch.equal(case.launch(split=False, rows=rows), case.launch(split=True, rows=rows))


@pytest.mark.parametrize("name", ["all", "odd", "up, odd"])
def test_a_sample_depends_neither_on_its_slot_nor_on_the_batch(name):
    case = Case(**VARIANTS[name] | dict(batch=5), dtype=torch.bfloat16)
    whole = case.launch()
    assert torch.equal(case.launch(order=[4, 2, 2, 0]), whole[[4, 2, 2, 0]])
    assert torch.equal(case.launch(order=[3]), whole[[3]])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("split", [False, True])
def test_bits_on_a_gpu(dtype, split):
    """Products of 16 and of 64 columns; and a hundred times the same, whoever comes last."""
    case = Case(16, 4, (512,), 512, groups=8, film=2, dtype=dtype)
    whole = case.launch(rows=64, split=split)
    for _ in range(100):
        assert torch.equal(case.launch(rows=64, split=split), whole)
    assert torch.equal(case.launch(rows=16, split=split), whole)
    assert torch.equal(case.launch(order=[7]), whole[[7]])


def test_scratch_memory_is_as_large_as_said_and_no_larger():
    case = Case(3, 8, (64, 32), 128, groups=8, film=2)
    options = dict(group=16, up=False, dtype=torch.float32)
    partial, counters = scratch_of(3, 8, (64, 32), 128, 5, **options)
    assert partial == counters * 3 * 64 * 32  # segments x channels x rows of a tile
    memory, counted = Guarded((partial,), torch.float32), Guarded((counters,), torch.int32)
    case.check(partial=memory.tensor, counters=counted.tensor)
    assert memory.intact()
    assert counted.intact()
    assert not memory.tensor.isnan().any()
    assert bool((counted.tensor == 3).all())  # each program of a tile was counted
    assert scratch_of(10**4, 8, (64, 32), 128, 5, **options) == (0, 0)
    assert scratch_of(1, 8, (16,), 32, 1, **options | {"group": 4}) == (0, 0)
    assert scratch_of(1, 8, (64,), 64, 2, group=0, up=True, dtype=torch.float32)[1] == 0  # 4 steps: one segment
    assert scratch_of(1, 8, (128,), 64, 2, group=0, up=True, dtype=torch.float32)[1] == 2  # a tile of each phase


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_group_without_variance(constant):
    case = Case(1, 8, (16,), 16, groups=4)
    case.weight.zero_()
    case.bias.fill_(constant)
    case.check()


def test_statistics_of_numbers_far_from_zero():
    case = Case(2, 16, (16,), 32, groups=8)
    case.bias += 1000
    assert (case.launch().double() - case.said()).abs().max() <= 2e-3  # 1000 eps / the spread, 0.1 at least


def test_nan_stays_in_its_sample():
    case = Case(4, 4, (16,), 32, groups=8)
    clean = case.launch()
    case.sources[0][2, 1, 3] = math.nan
    out = case.launch()
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_nothing_to_do():
    case = Case(2, 4, (16,), 16)
    assert case.launch(order=[]).shape == (0, 4, 16)


def test_mish():
    """Where nothing but the norm's shift reaches it: large, small, and infinite numbers."""
    values = torch.tensor(
        [100.0, -100.0, 20.0, 19.9, -20.0, -87.0, 0.0, 1e-30, 3.0, -3.0, -0.5, 8.0, 1e30, -1e30, 25, -9]
    )
    case = Case(1, 1, (1,), len(values), taps=1, groups=1)
    case.norm = (torch.zeros(len(values)), values)
    exact = values.double() * torch.tanh(torch.log1p(values.double().clamp_max(700).exp()))
    assert torch.allclose(case.launch()[0, 0].double(), exact, rtol=1e-6, atol=1e-38)
    assert mish is module.mish


def test_packing():
    assert pack_conv1d(torch.ones(24, 10, 5), (10,), group=3).shape == (1, 1, 5, 64, 16)
    packed = pack_conv1d(torch.arange(24.0)[:, None, None].expand(24, 1, 1), (1,), group=3)
    assert packed[0, 0, 0, :, 0].tolist()[:8] == [0, 1, 2, 0, 3, 4, 5, 0]  # groups of 3, padded to 4
    assert packed[0, 0, 0, :, 1:].abs().sum() == 0
    taps = torch.arange(4.0).expand(1, 1, 4)
    up = pack_conv1d(taps, (1,), up=True)
    assert up[:, 0, :, 0, 0].tolist() == [[3, 1], [2, 0]]
    assert pack_conv1d(torch.ones(4, 4, 1), (4,), dtype=torch.float16).dtype == torch.float16


def test_how_the_work_is_divided():
    assert channels_of(256, 32) == (32, 64, 4)
    assert channels_of(1024, 128) == (128, 128, 8)
    assert channels_of(24, 3) == (4, 64, 1)
    assert channels_of(2, 0) == (1, 64, 1)
    assert step_of((1024, 512), torch.bfloat16) == 64
    assert step_of((1024,), torch.float32) == 32
    assert step_of((2,), torch.bfloat16) == 16
    assert segments_of(160, 8) == 16
    assert segments_of(3, 8) == 1
    for steps in range(1, 200):
        segments = segments_of(steps, 8)
        each = -(-steps // segments)
        assert (segments - 1) * each < steps <= segments * each  # none is empty
    assert [rows_of(b, 4) for b in (1, 4, 5, 16, 100)] == [16, 16, 32, 64, 64]
    assert rows_of(1, 64) == 64
    assert fits(64, 128)
    assert not fits(65, 128)
    assert not fits(64, 129)

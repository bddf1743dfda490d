"""The GroupNorms in the convolution's epilogue against float64: variants, groups, tiles; their bits; their memory.

In the interpreter one program runs after the other: the exchange of statistics runs twice, and does not wait. The wait
has a test of its own; of its order in memory test_conv_codegen.py sees the machine code.
"""

import math
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from fastddpm_kernels import conv, conv_exchange, conv_reference
from fastddpm_kernels.conv import launch_conv
from fastddpm_kernels.conv_choice import ConvShape, Gpu, rule, segments
from fastddpm_kernels.conv_exchange import all_there
from fastddpm_kernels.conv_norm import NormOut, can_exchange, conv_scratch
from fastddpm_kernels.conv_tiles import TOGETHER, Tile, programs
from helpers import DEVICE, Guarded, fenced, store_error
from test_conv import Case
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = torch.finfo(torch.float32).eps


class Norm:
    """A norm of a case's result, with random weights."""

    def __init__(self, case, group, *, silu=True, shifted=False, eps=1e-5):
        self.group, self.silu, self.eps = group, silu, eps
        b, _, _, cout = self.shape = case.shape
        self.dtype = case.dtype
        self.weight, self.bias = (case.random(cout, dtype=torch.float32) for _ in range(2))
        self.table = case.random(b, 2 * cout + 3, dtype=torch.float32) if shifted else None  # its slices are used
        self.made = Guarded(self.shape, self.dtype)

    def parts(self, table):
        """Scale and shift, of the table's columns."""
        cout = self.shape[3]
        return (None, None) if table is None else (table[:, 1 : cout + 1], table[:, cout + 2 : 2 * cout + 2])

    def given(self):
        """As the kernel takes it."""
        scale, shift = self.parts(None if self.table is None else fenced(self.table))
        weight, bias = fenced(self.weight), fenced(self.bias)
        return NormOut(self.made.tensor, weight, bias, self.group, self.eps, self.silu, scale, shift)

    def of(self, y):
        """What a module makes of `y`, in its dtype."""
        y = y.permute(0, 3, 1, 2)
        z = F.group_norm(y, y.shape[1] // self.group, self.weight.to(y.dtype), self.bias.to(y.dtype), self.eps)
        if self.table is not None:
            scale, shift = (v.to(y.dtype)[:, :, None, None] for v in self.parts(self.table))
            z = z * (1 + scale) + shift
        return (F.silu(z) if self.silu else z).permute(0, 2, 3, 1)

    def check(self, exact_y, bound_y):
        """Against float64, where the convolution may be wrong by `bound_y`.

        That error divided by the deviation, times the weights, is the norm's; then float32's roundings: of means and
        squares (trees of at most 16 + 4 additions), of the product and sum, and of SiLU, whose slope is below 1.1.
        """
        made, exact = self.made.tensor.cpu().double(), self.of(exact_y)
        b, _, _, c = self.shape
        groups = exact_y.reshape(b, -1, c // self.group, self.group)
        deviation = (groups.var((1, 3), correction=0) + self.eps).sqrt()
        gain = self.weight.double().abs().reshape(1, -1, self.group) / deviation[:, :, None]
        if self.table is not None:
            gain = gain * (1 + self.parts(self.table)[0].double()).abs().reshape(b, -1, self.group)
        distance = (groups - groups.mean((1, 3), keepdim=True)).abs().amax((1, 3)) / deviation  # at most sqrt(n)
        error = bound_y * (2 + distance**2)[:, :, None] * gain
        size = gain * deviation[:, :, None] * distance[:, :, None] + self.bias.abs().amax() + 4
        if self.table is not None:
            size = size + 8 * self.table.double().abs().amax()
        bound = 1.1 * (error + 32 * EPS * size).reshape(b, 1, 1, c) + store_error(exact, self.dtype)
        assert self.made.intact()
        assert bool(((made - exact).abs() <= bound).all()), ((made - exact).abs() - bound).max()


def checked(case, norms, *, raw=True, **options):
    """Launch, and check the result and its norms; what the norms made."""
    out = Guarded(case.shape, case.dtype)
    case.launch(out.tensor if raw else None, raw=raw, norms=[norm.given() for norm in norms], **options)
    exact = case.modules(torch.float64)
    bound = case.bound(exact)
    if raw:
        assert out.intact()
        assert bool(((out.tensor.cpu().double() - exact).abs() <= bound).all())
    rounded = torch.finfo(case.dtype).eps / 2 if case.up else 0.0
    y_bound = (bound - store_error(exact, case.dtype)).amax().item()
    assert y_bound <= (64 * EPS + rounded) * 1e4
    for norm in norms:
        norm.check(exact, y_bound)
    return [norm.made.tensor.clone() for norm in norms]


ONE, TWO = [dict(group=8)], [dict(group=4), dict(group=8, silu=False)]
# What the convolution is; its norms; what else the launcher is given.
VARIANTS = {
    "a tile": (dict(size=(2, 8, 8), c_in=(16,), c_out=32), ONE, {}),
    "a tile, no raw": (dict(size=(1, 8, 8), c_in=(16,), c_out=32, row=True, bias=False), ONE, dict(raw=False)),
    "images a tile": (dict(size=(5, 4, 4), c_in=(16,), c_out=32), TWO, {}),
    "a few images": (dict(size=(3, 2, 4), c_in=(8,), c_out=64), [dict(group=32, shifted=True)], {}),
    "one pixel": (dict(size=(3, 1, 1), c_in=(8,), c_out=16), TWO, {}),
    "tiles": (dict(size=(1, 16, 16), c_in=(8,), c_out=16), TWO, {}),
    "tiles, shifted": (
        dict(size=(3, 8, 16), c_in=(16,), c_out=32, residual=True, scale=0.7),
        [dict(group=16, shifted=True), dict(group=8)],
        {},
    ),
    "columns": (dict(size=(1, 16, 8), c_in=(8,), c_out=96), [dict(group=32), dict(group=4, shifted=True)], {}),
    "wide tiles": (
        dict(size=(1, 16, 16), c_in=(16,), c_out=128),
        [dict(group=4), dict(group=16, shifted=True)],
        dict(tile=Tile(128, 128, 16, 4, 2)),
    ),
    "wide tile": (
        dict(size=(3, 8, 8), c_in=(16,), c_out=128),
        [dict(group=16, shifted=True), dict(group=4)],
        dict(tile=Tile(128, 128, 16, 4, 2)),
    ),
    "two sources": (dict(size=(2, 8, 8), c_in=(16, 8), c_out=32, row=True, residual=True, scale=0.5), TWO, {}),
    "shortcut": (dict(size=(1, 8, 16), c_in=(16,), c_out=32, shortcut=(24, 8)), ONE, dict(raw=False)),
    "stride 2": (dict(size=(2, 16, 32), c_in=(8,), c_out=16, stride=2, padding=0), ONE, {}),
    "up": (dict(size=(3, 4, 4), c_in=(16,), c_out=32, up=True), TWO, {}),
    "up, tiles": (dict(size=(1, 8, 16), c_in=(8, 8), c_out=16, up=True, row=True), ONE, dict(raw=False)),
    "up, a pixel": (dict(size=(3, 1, 1), c_in=(8,), c_out=8, up=True), ONE, {}),
    "1x1": (dict(size=(1, 8, 16), c_in=(24,), c_out=32, kernel=1, residual=True), ONE, {}),
    "few channels": (dict(size=(1, 8, 16), c_in=(8,), c_out=8), [dict(group=2), dict(group=8)], {}),
    "odd channels": (dict(size=(1, 8, 8), c_in=(5,), c_out=12), [dict(group=4), dict(group=1)], {}),
    "first": (dict(size=(1, 16, 16), c_in=(3,), c_out=32), ONE, {}),
    "segments": (
        dict(size=(3, 4, 4), c_in=(16, 32), c_out=64, row=True, residual=True, shortcut=(16,), scale=0.7),
        TWO,
        dict(segments=4, split=True),
    ),
    "segments of one": (dict(size=(2, 8, 8), c_in=(16,), c_out=32), ONE, dict(segments=3, split=False, raw=False)),
}


HALVED = ["tiles, shifted", "two sources", "up, tiles", "segments"]


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", VARIANTS)
def test_against_float64(name, dtype):
    shape, norms, options = VARIANTS[name]
    if (dtype == torch.float32 and name.startswith("wide")) or (dtype == torch.bfloat16 and name in HALVED):
        return  # the first are tiles of 16 bits, the second in the next test
    case = Case(**shape, dtype=dtype)
    groups, pixels = [norm["group"] for norm in norms], case.shape[1] * case.shape[2]
    assert can_exchange(pixels, case.shape[3], groups, dtype.itemsize, up=case.up)
    checked(case, [Norm(case, **norm) for norm in norms], **options)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", HALVED)
def test_error_is_at_most_twice_that_of_the_modules(name, dtype):
    shape, norms, options = VARIANTS[name]
    case = Case(**shape, dtype=dtype)
    norms = [Norm(case, **norm) for norm in norms]
    checked(case, norms, **options)
    exact_y, eager_y = case.modules(torch.float64), case.modules(dtype)
    for norm in norms:
        exact = norm.of(exact_y)
        error, eager = ((made.double() - exact).abs() for made in (norm.made.tensor.cpu(), norm.of(eager_y)))
        assert error.mean() <= 2 * eager.mean() + store_error(exact, dtype).mean()


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 8, 16)])
def test_a_constant_image(size):
    case = Case(size, (8,), 16)
    case.weight.zero_()
    case.bias = torch.arange(16.0) // 4 * 333.25  # of a group alike
    norm = Norm(case, 4, eps=1e-12)
    checked(case, [norm])
    assert torch.equal(norm.made.tensor.cpu(), F.silu(norm.bias).expand(case.shape)) or torch.allclose(
        norm.made.tensor.cpu(), F.silu(norm.bias).expand(case.shape), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("size", [(2, 4, 4), (1, 16, 16)])
def test_a_large_mean_costs_no_digits(size):
    case = Case(size, (8,), 16)
    case.bias = torch.full((16,), 1000.0)
    norm = Norm(case, 4, silu=False)
    y = case.launch(norms=[norm.given()]).double()  # in float32 stored as it is
    assert y.std() < 3
    exact = norm.of(y)
    # E[x^2] - E[x]^2 would lose 1e6 eps of the variance, 6 percent. A mean is off by its own rounding, 1000 eps.
    assert (norm.made.tensor.cpu().double() - exact).abs().max() <= 16 * 1000 * EPS


def test_the_norm_is_of_what_was_not_rounded():
    case = Case((1, 8, 8), (16,), 32, dtype=torch.bfloat16)
    case.bias = torch.full((32,), 100.0)  # the result, of deviation 1, has a step of 0.5 in bfloat16
    norm = Norm(case, 8, silu=False)
    checked(case, [norm])


@pytest.mark.parametrize("name", ["images a tile", "tiles, shifted", "up", "segments"])
def test_a_samples_bits_do_not_depend_on_its_slot(name):
    shape, norms, options = VARIANTS[name]
    case = Case(**shape, dtype=torch.float16)
    norms = [Norm(case, **norm) for norm in norms]
    whole = checked(case, norms, **options)
    order = [-1, 0]  # the last one from its tile into the first, and it and the first from a larger batch
    for attribute in ("row", "residual"):
        if getattr(case, attribute) is not None:
            setattr(case, attribute, getattr(case, attribute)[order])
    case.sources, case.shortcut = [s[order] for s in case.sources], [s[order] for s in case.shortcut]
    case.shape = (len(order), *case.shape[1:])
    for norm in norms:
        norm.shape, norm.made = case.shape, Guarded(case.shape, case.dtype)
        norm.table = None if norm.table is None else norm.table[order]
    made = checked(case, norms, **options)
    assert all(torch.equal(a, b[order]) for a, b in zip(made, whole, strict=True))


@pytest.mark.parametrize("size, up", [((3, 4, 8), False), ((1, 8, 16), False), ((1, 8, 8), True)])
def test_tiles_do_not_change_the_bits(size, up):
    case = Case(size, (16,), 32, dtype=torch.float16, row=True, up=up)
    norms = [Norm(case, 4), Norm(case, 16, shifted=True)]
    tiles = [Tile(m, n, 16, 4, 2) for m, n in ((64, 32), (128, 16))]
    made = [checked(case, norms, segments=1, tile=tile) for tile in tiles]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_segments_side_by_side_have_the_same_bits():
    case = Case((3, 4, 4), (16, 32), 64, dtype=torch.float16, residual=True, shortcut=(16,))
    norms = [Norm(case, 4), Norm(case, 16)]
    made = [checked(case, norms, segments=4, split=split) for split in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there the programs' order is not known")
def test_only_the_program_that_finds_all_others_there_adds_the_segments():
    """With a counter one too low there is none: the fourth finds two. Nothing is written."""
    case = Case((1, 4, 4), (16, 32), 32)
    workspace, counters = torch.full((4 * 64 * 64,), math.nan), torch.zeros(1, dtype=torch.int32)
    options = dict(segments=4, split=True, workspace=workspace, tile=Tile(64, 32, 16, 4, 2))
    case.check(counters=counters, **options)
    workspace.fill_(math.nan)
    assert case.launch(counters=counters.fill_(-1), **options).isnan().all()


@pytest.mark.parametrize("name", ["images a tile", "tiles, shifted", "up", "segments"])
def test_memory_that_is_given(name):
    """As large as `conv_scratch` says, full of NaN, guarded; counters that an earlier launch left."""
    shape, norms, options = VARIANTS[name]
    case = Case(**shape, dtype=torch.bfloat16)
    b, h, w, c = case.shape
    scratch = conv_scratch(b, h * w, c, [norm["group"] for norm in norms], up=case.up)
    workspace, counters = Guarded((scratch.floats,)), Guarded((scratch.counters,), torch.int32)
    norms = [Norm(case, **norm) for norm in norms]
    memory = dict(workspace=workspace.tensor, counters=counters.tensor)
    made = [checked(case, norms, **memory, **options) for _ in range(2)]
    assert workspace.intact()
    assert counters.intact()
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))
    if "split" in options:
        assert not counters.tensor.any()  # the last one left them as they were


@pytest.mark.parametrize("size, up, samples", [((2, 8, 16), False, 1), ((5, 4, 4), True, 4)])
def test_programs_that_wait_for_each_other_count_in_one_place(size, up, samples):
    """Those of the same samples and channels; nobody else counts there."""
    case = Case(size, (8,), 96, dtype=torch.float16, up=up)
    counters = torch.zeros(12, dtype=torch.int32, device=DEVICE)
    checked(case, [Norm(case, 8)], counters=counters, tile=Tile(64, 32, 16, 4, 2))
    places = 3 * -(-size[0] // samples)
    together = 4 if up else 2
    passes = 1 if DEVICE.type == "cuda" else 2  # the interpreter's
    assert counters.tolist() == [together * passes] * places + [0] * (12 - places)


@triton.jit
def waiting_kernel(counter_ptr, out_ptr, PROGRAMS: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), all_there(counter_ptr, PROGRAMS, True))


@pytest.mark.parametrize("programs", [2, 4, 32])
@pytest.mark.parametrize("launches", [0, 1, 7])
def test_the_wait_of_a_launch(launches, programs, monkeypatch):
    """After launches before it, a program goes on when all of this one are there, be it the last one or not."""
    counter = torch.full((1,), launches * programs, dtype=torch.int32, device=DEVICE)
    late = torch.full((programs,), math.nan, device=DEVICE)
    if DEVICE.type == "cuda":
        waiting_kernel[(programs,)](counter, late, programs)
        assert not late.any()
        assert counter.item() == (launches + 1) * programs
        return

    def here(before: int, rounds: int) -> bool:
        """Whether one that finds so many there goes on."""
        monkeypatch.setattr(conv_exchange, "ROUNDS", tl.constexpr(rounds))
        counter.fill_(launches * programs + before)
        waiting_kernel[(1,)](counter, late, programs)
        return late[0].item() == 0.0

    assert here(programs - 1, 0)
    assert not here(0, 3)
    assert not here(programs - 2, 3)
    assert counter.item() == (launches + 1) * programs - 1
    last = threading.Thread(target=lambda: (time.sleep(0.02), counter.add_(1)))
    last.start()
    assert here(programs - 2, 1 << 16)
    last.join()
    assert counter.item() == (launches + 1) * programs


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there all programs would run, in 17 GB")
def test_addresses_beyond_2_to_the_31(tmp_path, monkeypatch):
    """Of 2^25 + 1 images of 8x8 only the last one's program runs, in files that have no pages of the others."""
    batch, last = 2**25 + 1, 2**25

    def file(name: str, apart: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.from_file(str(tmp_path / name), shared=True, size=batch * apart, dtype=dtype)

    class OneProgram:
        def __getitem__(self, grid):
            assert grid == (batch, 1)
            return kernel[(1, 1)]

    def program_id(builder, axis):
        return TensorHandle(np.array([0 if axis else last], dtype=np.int32), tl.int32)

    kernel = conv.conv_kernel
    monkeypatch.setattr(conv, "conv_kernel", OneProgram())
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    x, out, normed = (file(name, 64).view(batch, 8, 8, 1) for name in ("x", "out", "normed"))
    rows = file("rows", 64, torch.float32).view(batch, 64)
    random = torch.Generator().manual_seed(0)
    x[last], rows[last] = torch.randn(8, 8, 1, generator=random), torch.randn(64, generator=random)
    weight, one = conv_reference.pack_weight(torch.full((1, 1, 1, 1), 2.0, dtype=x.dtype)), torch.ones(1)
    norm = NormOut(normed, one, one, 1, 1e-5, False, rows[:, 1:2], rows[:, 2:3])
    launch_conv(x, weight, None, out, row=rows[:, :1], residual=x, norms=[norm], tile=Tile(64, 16, 16, 4, 2))
    exact = 3 * x[last].double() + rows[last, 0]
    assert torch.allclose(out[last].double(), exact, rtol=1e-3, atol=1e-3)
    exact = (exact - exact.mean()) / (exact.var(correction=0) + 1e-5).sqrt() + 1
    exact = exact * (1 + rows[last, 1]) + rows[last, 2]
    assert torch.allclose(normed[last].double(), exact, rtol=1e-3, atol=2e-3)


def test_neither_raw_nor_norms_of_an_empty_batch():
    x, weight, bias = (torch.zeros(s, device=DEVICE) for s in ((0, 4, 4, 8), (72, 8), (8,)))
    launch_conv(x, weight, bias, None, norms=[NormOut(torch.zeros(0, 4, 4, 8, device=DEVICE), bias, bias, 4, 1e-5)])


def test_where_norms_can_be():
    assert all(can_exchange(pixels, 256, (8, 16), 2) for pixels in (1, 4, 16, 64, 256, 1024))
    assert can_exchange(1024, 128, (4, 8), 2)
    assert can_exchange(1024, 256, (8,), 2, up=True)
    assert can_exchange(1024, 512, (8,), 2)  # 8 x 4 programs
    assert can_exchange(1024, 512, (8,), 2, up=True)  # 4 phases of 2 x 4
    assert not can_exchange(1024, 640, (4,), 2, up=True)
    assert not can_exchange(4096, 128, (4,), 2)  # statistics of too many programs
    assert not can_exchange(144, 128, (4,), 2)
    assert not can_exchange(2, 128, (4,), 2, up=True)
    assert not can_exchange(256, 384, (12,), 2)
    assert not can_exchange(256, 100, (8,), 2)
    assert not can_exchange(256, 256, (128,), 2)
    assert not can_exchange(256, 256, (8, 8, 8), 2)
    assert not can_exchange(1024, 640, (4,), 2)  # 8 x 5 programs
    assert can_exchange(64, 4096, (64,), 2)  # one program has all pixels of its columns
    assert not can_exchange(1024, 256, (8,), 4)  # whose tiles are small
    assert not can_exchange(0, 256, (8,), 2)


@pytest.mark.parametrize("shared", [101376, 166912, 232448])
@pytest.mark.parametrize("up", [False, True])
def test_the_rules_tile_has_whole_groups_and_few_programs_wait(up, shared):
    gpu, phases = Gpu("", shared, shared > 200_000), 4 if up else 1
    for height, width in ((4, 4), (8, 8), (8, 16), (16, 16), (32, 32)):
        for cout in (3, 8, 64, 128, 256, 512, 768):
            for group in (1, 4, 8, 32, 64):
                if cout % group or not can_exchange(height * width, cout, (group,), 2, up=up):
                    continue
                shape = ConvShape("bfloat16", height, width, 256, 0, cout, up=up, norms=(1, group))
                parts = segments(shape)
                for batch in (1, 8, 1024):
                    tile = rule(gpu, shape, batch, parts)
                    assert programs(tile, height * width // phases, phases, cout) <= TOGETHER
                    assert tile.n % group == 0
                    assert tile.m * tile.n <= (64 * 64 if parts > 1 else 128 * 128)


def test_the_reference_takes_no_bias():
    case = Case((1, 4, 4), (8,), 16, bias=False, row=True)
    made = conv_reference.conv(case.sources[0], conv_reference.pack_weight(case.weight), None, row=case.row)
    assert torch.allclose(made, case.modules(torch.float64), atol=1e-6)
    assert math.prod(made.shape) == 256

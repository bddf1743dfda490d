"""GroupNorm with time row, scale and shift, and SiLU against float64: every division, dtype and option."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import reference_unet as reference
from fastddpm_kernels.group_norm import (
    LARGE,
    ONE_PASS,
    RUN,
    launch_group_norm,
    launch_group_norm_apply,
    launch_group_statistics,
    split_group_norm,
    tile_of,
)
from helpers import DEVICE, Guarded, fenced, store_error
from hypothesis import given
from hypothesis import strategies as st

EPS = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = [launch_group_norm, split_group_norm]
# (H, W, C0, C1, groups)
SHAPES = [
    (1, 1, 8, 0, 2),
    (4, 4, 32, 0, 8),
    (5, 3, 16, 8, 2),  # the second group has channels of both sources, in units of 4
    (3, 3, 6, 3, 3),  # units of 1
    (2, 7, 20, 0, 1),  # all is one group
    (1, 11, 13, 0, 13),  # a channel a group
    (6, 5, 5, 7, 2),  # a border of sources that nothing divides
    (8, 8, 24, 40, 4),
]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


def inputs(shape, dtype=torch.float32, *, batch=2, mean=0.3, deviation=1.5, row=True, scale=True, silu=True, seed=0):
    """Arguments of a launch but for the output, between NaN, and its options; each sample has its own deviation."""
    h, w, c0, c1, groups = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator)

    sizes = torch.linspace(deviation, 2 * deviation, batch)[:, None, None, None]
    x, second = ((random(batch, h, w, c) * sizes + mean).to(dtype) for c in (c0, c1))
    made = {
        name: fenced(random(batch, c0 + c1)) for name, on in (("row", row), ("scale", scale), ("shift", scale)) if on
    }
    weight, bias = fenced(1 + 0.5 * random(c0 + c1)), fenced(random(c0 + c1))
    options = {"groups": groups, "eps": 1e-6, "silu": silu} | made
    return (fenced(x), fenced(second) if c1 else None, weight, bias), options


def run(launch, arguments, options):
    """What a launch makes of them; nothing around it was written."""
    x, second, weight, bias = arguments
    made = Guarded((*x.shape[:3], weight.shape[0]), x.dtype)
    launch(x, second, made.tensor, weight, bias, **options)
    assert made.intact()
    return made.tensor


def double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def exact_result(arguments, options, **changed):
    return reference.group_norm(
        *map(double, arguments), **{name: double(value) for name, value in (options | changed).items()}
    )


def bound(arguments, options):
    """What float32 may be off: sums of up to 2^12 elements in trees, and about 30 roundings after them."""
    x, second, weight, bias = map(double, arguments)
    h = x if second is None else torch.cat([x, second], dim=-1)
    row, scale, shift = (double(options.get(name, torch.zeros_like(bias[None]))) for name in ("row", "scale", "shift"))
    h = h + row[:, None, None]
    parts = h.unflatten(-1, (options["groups"], -1))
    rest = (parts - parts.mean((1, 2, 4), keepdim=True)).flatten(-2)
    rate = torch.rsqrt(parts.var((1, 2, 4), correction=0, keepdim=True) + options["eps"])
    gain = (rate.expand_as(parts).flatten(-2) * weight * (1 + scale[:, None, None])).abs()
    size = gain * (24 * rest.abs() + 12 * rest.abs().mean((1, 2), keepdim=True) + h.abs())
    size = size + 4 * ((bias * (1 + scale)).abs() + shift.abs())[:, None, None]
    y = exact_result(arguments, options)
    return EPS * (1.1 * size + (12 + 3 * exact_result(arguments, options, silu=False).abs()) * y.abs())


def check(made, arguments, options, slack=0.0):
    exact, off = exact_result(arguments, options), bound(arguments, options) + slack
    assert ((made - exact).abs() <= off + store_error(exact.abs() + off, made.dtype)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_is_torchs_group_norm(shape):
    arguments, options = inputs(shape)
    x, second, weight, bias = map(double, arguments)
    h = (x if second is None else torch.cat([x, second], dim=-1)) + double(options["row"])[:, None, None]
    y = F.group_norm(h.permute(0, 3, 1, 2), shape[-1], weight, bias, 1e-6).permute(0, 2, 3, 1)
    y = y * (1 + double(options["scale"])[:, None, None]) + double(options["shift"])[:, None, None]
    assert torch.allclose(exact_result(arguments, options), F.silu(y), rtol=1e-12, atol=1e-12)
    plain = F.group_norm(h.permute(0, 3, 1, 2), shape[-1], weight, bias, 1e-6).permute(0, 2, 3, 1)
    assert torch.allclose(exact_result(arguments, options, scale=None, silu=False), plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_dtype(shape, dtype, launch):
    arguments, options = inputs(shape, dtype)
    check(run(launch, arguments, options), arguments, options)


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("row", [False, True])
def test_every_option(row, scale, silu, launch):
    arguments, options = inputs((5, 3, 16, 8, 2), row=row, scale=scale, silu=silu)
    check(run(launch, arguments, options), arguments, options)


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("shape", [(16, 16, 32, 0, 8), (8, 8, 32, 16, 4)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_at_most_twice_eagers_error(dtype, shape, launch):
    """Root mean squares. Eager: the module's own operations in its own dtype."""
    arguments, options = inputs(shape, dtype, batch=1, scale=False)
    x, second, weight, bias = (None if v is None else v.to(dtype) for v in arguments)
    arguments = (x, second, weight.float(), bias.float())  # parameters that the eager module has too
    options["row"] = options["row"].to(dtype).float()
    h = x if second is None else torch.cat([x, second], dim=-1)
    h = (h + options["row"].to(dtype)[:, None, None]).permute(0, 3, 1, 2)
    eager = F.silu(F.group_norm(h, shape[-1], weight, bias, 1e-6)).permute(0, 2, 3, 1)
    exact = exact_result(arguments, options)
    made, theirs = ((v.double() - exact).square().mean().sqrt() for v in (run(launch, arguments, options), eager))
    assert made <= 2 * theirs + store_error(exact, dtype).square().mean().sqrt()


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("row", [False, True])
def test_a_mean_far_from_0(row, launch):
    """Mean 1000, deviation 0.01: E[x^2] - E[x]^2 would have no right digit. A tile's own mean is kept in float32."""
    arguments, options = inputs((8, 8, 16, 8, 2), mean=1000.0, deviation=0.01, row=row, scale=False, silu=False)
    if row:
        options["row"] *= 0.01
    slack = 0.0 if launch is launch_group_norm else 2.5 * EPS * 1000 / 0.01
    check(run(launch, arguments, options), arguments, options, slack)
    if launch is launch_group_norm and not row:
        exact = exact_result(arguments, options)
        assert (run(launch, arguments, options) - exact).abs().max() < 5e-6


@pytest.mark.parametrize("launch", WAYS)
def test_groups_whose_means_are_far_apart(launch):
    arguments, options = inputs((4, 4, 16, 8, 6), row=False, scale=False, silu=False)
    for group in range(6):
        source, first = (0, 4 * group) if group < 4 else (1, 4 * group - 16)
        arguments[source][..., first : first + 4] = (
            arguments[source][..., first : first + 4] * 4.0**-group + 10.0**group
        )
    slack = 0.0 if launch is launch_group_norm else 2.0  # a mean of 10^5 in float32, beside a deviation of 0.001
    made, exact = run(launch, arguments, options), exact_result(arguments, options)
    check(made, arguments, options, slack)
    assert (made - exact)[..., :12].abs().max() < 1e-4


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("first", [False, True])
def test_a_value_far_from_the_others(first, launch):
    """Also where it is the first, from which distances could have been taken."""
    arguments, options = inputs((8, 8, 24, 0, 2), scale=False, silu=False, row=False)
    arguments[0][:, 0 if first else 5, 0, 0] = 3e4
    check(run(launch, arguments, options), arguments, options)


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 / 3])
def test_a_constant_becomes_the_bias(value, launch):
    arguments, options = inputs((5, 3, 16, 8, 2), row=False, scale=False, silu=False)
    arguments[0][:], arguments[1][:] = value, value
    made = run(launch, arguments, options)
    assert (made - arguments[3]).abs().max() <= 1e3 * abs(value) * 4 * EPS + 1e-6  # 1e3 = eps^-1/2


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_group(bad, launch):
    arguments, options = inputs((5, 3, 16, 8, 4), batch=3)  # groups of 6
    clean = run(launch, arguments, options)
    arguments[1][1, 4, 2, 0] = bad  # channel 16: of the third group
    made = run(launch, arguments, options)
    assert not made[1, ..., 12:18].isfinite().any()
    made[1, ..., 12:18] = clean[1, ..., 12:18]
    assert torch.equal(made, clean)


@pytest.mark.parametrize("launch", WAYS)
def test_neither_slot_nor_company_matter(launch):
    arguments, options = inputs((5, 3, 16, 8, 2), torch.bfloat16, batch=3)
    together = run(launch, arguments, options)
    assert torch.equal(together, run(launch, arguments, options))
    for b in (2, 0):
        alone = [None if v is None else v[b : b + 1].clone() if v.ndim == 4 else v for v in arguments]
        own = options | {name: options[name][b : b + 1].clone() for name in ("row", "scale", "shift")}
        assert torch.equal(run(launch, alone, own)[0], together[b])


@pytest.mark.parametrize("launch", WAYS)
def test_rows_may_be_slices_of_a_table_or_shared(launch):
    arguments, options = inputs((3, 3, 6, 3, 3))
    expected = run(launch, arguments, options)
    table = torch.full((2, 50), math.nan, device=DEVICE)
    for first, name in ((1, "row"), (17, "scale"), (30, "shift")):
        table[:, first : first + 9] = options[name]
        options[name] = table[:, first : first + 9]
    assert torch.equal(run(launch, arguments, options), expected)
    shared = {name: options[name][:1].expand(2, 9) for name in ("row", "scale", "shift")}
    copied = {name: row.contiguous() for name, row in shared.items()}
    assert torch.equal(run(launch, arguments, options | shared), run(launch, arguments, options | copied))


@pytest.mark.parametrize("launch", WAYS)
@pytest.mark.parametrize("shape", [(7, 5, 24, 0, 6), (7, 5, 48, 0, 4)])
def test_the_output_may_be_the_input(shape, launch):
    """Then a program that wrote what is another's would be seen: two tiles of 24 channels, padded to 32."""
    arguments, options = inputs(shape)
    expected = run(launch, arguments, options)
    x, _, *parameters = arguments
    launch(x, None, x, *parameters, **options)
    assert torch.equal(x, expected)


def test_parameters_of_half_precision():
    arguments, options = inputs((3, 3, 8, 0, 2))
    arguments = (*arguments[:2], *(v.bfloat16() for v in arguments[2:]))
    options |= {name: options[name].bfloat16() for name in ("row", "scale", "shift")}
    check(run(launch_group_norm, arguments, options), arguments, options)


def test_silu_far_from_0():
    """Of the bias alone: each value twice, the input is constant."""
    z = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 87.0, -87.0, 90.0, -90.0, 1e4, -1e4, 3e38, -3e38, 5.0, -5.0]
    )
    x, weight = torch.ones(1, 2, 1, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    made = torch.empty_like(x)
    launch_group_norm(x, None, made, weight, z.to(DEVICE), groups=4, eps=1e-6)
    exact = F.silu(z.double().to(DEVICE))
    assert ((made - exact).abs() <= EPS * (12 + 3 * z.abs().double().to(DEVICE)) * exact.abs() + 1e-36).all()
    assert not made.isnan().any()


def test_an_eps_that_matters():
    arguments, options = inputs((4, 4, 8, 0, 2), deviation=0.01, row=False)
    options["eps"] = 0.5
    check(run(launch_group_norm, arguments, options), arguments, options)
    assert exact_result(arguments, options | {"silu": False, "scale": None}).sub(arguments[3]).abs().max() < 0.2


@given(
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    groups=st.integers(1, 4),
    group=st.integers(1, 9),
    border=st.floats(0.01, 1),
    kind=st.tuples(st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.booleans(), st.sampled_from(WAYS)),
)
def test_any_shape(height, width, groups, group, border, kind):
    dtype, row, scale, silu, launch = kind
    c0 = math.ceil(groups * group * border)
    shape = (height, width, c0, groups * group - c0, groups)
    arguments, options = inputs(shape, dtype, row=row, scale=scale, silu=silu)
    check(run(launch, arguments, options), arguments, options)


def unit_statistics(x, tile, unit):
    """Mean and sum of squared distances, float64, of each tile of positions and each unit."""
    made = []
    for part in x.double().flatten(1, 2).split(tile, dim=1):
        part = part.unflatten(-1, (-1, unit))
        mean = part.mean((1, 3), keepdim=True)
        made.append(torch.stack([mean[:, 0, :, 0], (part - mean).square().sum((1, 3))], dim=-1))
    return torch.stack(made, dim=1)


@pytest.mark.parametrize(
    "tile, unit, dtype",
    [
        (35, 4, torch.float32),
        (16, 1, torch.bfloat16),
        (8, 2, torch.float16),
        (10, 8, torch.float32),
        (64, 8, torch.bfloat16),
        (12, 4, torch.float32),
    ],
)
def test_statistics(tile, unit, dtype):
    """Tiles that do and don't divide the positions, and are no power of two."""
    (x, *_), options = inputs((7, 5, 24, 0, 3), dtype)
    row = options["row"]
    for added in (None, row):
        made = Guarded((2, math.ceil(35 / tile), 24 // unit, 2))
        launch_group_statistics(x, made.tensor, tile=tile, row=added)
        assert made.intact()
        exact = unit_statistics(x if added is None else x.double() + added[:, None, None], tile, unit)
        squares = exact[..., 1] + tile * unit * exact[..., 0].square() * EPS
        assert ((made.tensor - exact)[..., 0].abs() <= 8 * EPS * (exact[..., 0].abs() + squares.sqrt())).all()
        assert ((made.tensor - exact)[..., 1].abs() <= 24 * EPS * squares).all()


def test_statistics_of_several_blocks_of_positions():
    """A program's tile, 600 positions, is more than it looks at at a time; the first of them are far off."""
    x = torch.randn(1, 1, 1203, 40, generator=torch.Generator().manual_seed(0)) + 50
    x[:, :, 700:] += 300
    x = fenced(x)
    made = Guarded((1, 3, 10, 2))
    launch_group_statistics(x, made.tensor, tile=600)
    exact = unit_statistics(x, 600, 4)
    assert made.intact()
    assert ((made.tensor - exact).abs() <= 64 * EPS * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, unit, tile, second_tile",
    [
        ((5, 3, 16, 8, 2), 4, 4, 7),  # other tiles, as of two convolutions; groups of three units; a group of both
        ((5, 3, 16, 8, 2), 1, 15, 2),
        ((4, 4, 32, 16, 3), 4, 8, 16),
        ((4, 4, 8, 24, 1), 8, 5, 5),
        ((1, 80, 4, 4, 2), 2, 2, 2),  # 40 tiles: more than are merged at a time
        ((1, 80, 4, 4, 1), 4, 80, 2),  # of the second source alone
    ],
)
def test_statistics_that_are_given(shape, unit, tile, second_tile, dtype):
    arguments, options = inputs(shape, dtype)
    x, second, weight, bias = arguments
    row_x, row_second = options["row"].double()[:, None, None].split([x.shape[3], second.shape[3]], dim=-1)
    stats = fenced(unit_statistics(x.double() + row_x, tile, unit).float())
    second_stats = fenced(unit_statistics(second.double() + row_second, second_tile, unit).float())
    made = Guarded((*x.shape[:3], weight.shape[0]), dtype)
    sizes = {"tile": tile, "second_tile": second_tile}
    launch_group_norm_apply(x, second, stats, second_stats, made.tensor, weight, bias, **sizes, **options)
    assert made.intact()
    check(made.tensor, arguments, options)


def test_equal_tiles_merge_without_a_loss():
    """Tiles of the same mean, far from 0: what Chan's formula adds for their distances is nothing."""
    arguments, options = inputs((8, 4, 8, 0, 2), row=False, scale=False, silu=False, batch=1)
    x, _, weight, bias = arguments
    half = 1024 + torch.randint(-8, 9, (1, 1, 8)).repeat(1, 16, 1).to(DEVICE) / 64.0
    x[:] = torch.cat([half, 2048 - half], dim=1).repeat(1, 1, 1).view(1, 8, 4, 8)
    stats = unit_statistics(x, 32, 4).float()
    made = torch.empty_like(x)
    launch_group_norm_apply(x, None, stats, None, made, weight, bias, tile=32, **options)
    check(made, arguments, options)


@pytest.mark.parametrize("launch", WAYS)
def test_no_samples(launch):
    arguments, options = inputs((3, 3, 8, 0, 2), batch=2)
    x, _, *parameters = arguments
    options |= {name: options[name][:0] for name in ("row", "scale", "shift")}
    launch(x[:0], None, torch.empty_like(x[:0]), *parameters, **options)
    launch_group_statistics(x[:0], torch.empty(0, 1, 8, 2, device=DEVICE), tile=9)


@pytest.mark.parametrize("width", [2, 4])
def test_tiles_of_the_cifar_network(width):
    """All of it in one pass: whole groups, full sectors of a position, tiles that registers hold."""
    for side, channels in ((32, (128, 256, 384)), (16, (128, 256, 384, 512)), (8, (256, 512)), (4, (256, 512))):
        for c in channels:
            tile = tile_of(side * side, c, c // 32, width)
            assert tile.channels % (c // 32) == 0
            assert c % tile.channels == 0
            assert tile.channels * width >= RUN
            assert tile.block_p * tile.block_c <= (LARGE if side < 32 else ONE_PASS)
            assert 8 <= tile.block_p * tile.block_c // (32 * tile.warps) <= 64


@pytest.mark.parametrize("positions, channels, group", [(65536, 128, 4), (4096, 128, 4), (4096, 512, 16)])
def test_large_images_take_two_passes(positions, channels, group):
    assert tile_of(positions, channels, group, 2) is None


def test_a_large_image():
    """What is launched for it is the two passes: 4096 positions of 8 channels, in tiles of 128."""
    arguments, options = inputs((64, 64, 32, 0, 4), torch.bfloat16, batch=1, scale=False)
    made = run(launch_group_norm, arguments, options)
    check(made, arguments, options)
    assert torch.equal(made, run(split_group_norm, arguments, options))

"""The attention block's kernels against float64: every dtype, awkward shapes, far-off scores, partial statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import attention_reference as reference
from fastddpm_kernels.attention import AttentionTiles, attention_tiles, launch_attention
from fastddpm_kernels.linear import launch_linear, linear_tiles
from helpers import DEVICE, Guarded, fenced, store_error
from hypothesis import given
from hypothesis import strategies as st

EPS = 2.0**-24
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-11}


def random(*shape, dtype=torch.float32, seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return fenced(values.to(dtype))


# --- attention --------------------------------------------------------------------------------------------------------


def attended(qkv, heads, tiles=None):
    b, t, c3 = qkv.shape
    made = Guarded((b, t, c3 // 3), qkv.dtype)
    launch_attention(qkv, made.tensor, heads=heads, tiles=tiles)
    assert made.intact()
    return made.tensor.double()


def attention_bound(qkv, heads, exact):
    """How far the kernel may be off, an element: what rounds is the products' sums, 2^x, the weights of v, the store.

    A weight off by a part r moves the output by r sum(p |v|), and normalising by the sum of the others by as much.
    """
    t, c3 = qkv.shape[1:]
    d = c3 // 3 // heads
    q, k, v = qkv.double().unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    magnitude = reference.attention(
        torch.cat([qkv.double()[..., : 2 * c3 // 3], qkv.double().abs()[..., 2 * c3 // 3 :]], 2), heads
    )
    largest = (q.abs() @ k.abs().mT).amax() / math.sqrt(d)
    score = (d + 8) * EPS * largest  # of the exponent
    rounding = ROUNDING[qkv.dtype] * (2 if DEVICE.type == "cpu" and qkv.dtype == torch.bfloat16 else 1)  # it truncates
    subnormal = 2.0**-24 * t * v.abs().amax() if qkv.dtype == torch.float16 else 0.0
    return (
        magnitude * (rounding + 2 * score + (2 * t + 16) * EPS) * 1.01
        + subnormal
        + store_error(exact, qkv.dtype) * 1.01
    )


def check_attention(qkv, heads, tiles=None):
    exact = reference.attention(qkv.double(), heads)
    made = attended(qkv, heads, tiles)
    assert ((made - exact).abs() <= attention_bound(qkv, heads, exact)).all()
    return made, exact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, tokens, heads, dim",
    [(1, 1, 1, 1), (2, 16, 3, 8), (3, 17, 1, 16), (2, 49, 2, 12), (1, 64, 1, 64), (1, 80, 1, 40), (2, 16, 1, 256)],
)
def test_attention_of_every_shape_and_dtype(batch, tokens, heads, dim, dtype):
    if dtype == torch.float32 and tokens > 50:
        tokens //= 2  # its blocks are small, and the interpreter's programs many
    check_attention(random(batch, tokens, 3 * heads * dim, dtype=dtype), heads)


@pytest.mark.parametrize("tokens, heads, dim", [(256, 1, 256), (65, 1, 512), (130, 2, 8), (144, 1, 64), (16, 1, 512)])
def test_attention_at_the_networks_own_shapes(tokens, heads, dim):
    check_attention(random(1, tokens, 3 * heads * dim, dtype=torch.bfloat16), heads)


@given(
    batch=st.integers(1, 2),
    tokens=st.integers(1, 70),
    heads=st.integers(1, 3),
    dim=st.integers(1, 33),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.01, 1.0, 4.0]),
)
def test_attention_of_any_shape(batch, tokens, heads, dim, dtype, scale):
    check_attention(random(batch, tokens, 3 * heads * dim, dtype=dtype, scale=scale, seed=tokens), heads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_as_near_as_torchs(dtype):
    """At most twice as far from float64 as eager scaled_dot_product_attention at the same dtype, and the store."""
    qkv = random(2, 48, 3 * 2 * 32, dtype=dtype)
    made, exact = check_attention(qkv, 2)
    q, k, v = qkv.unflatten(2, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    eager = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).double()
    slack = store_error(exact.abs().max(), dtype)
    assert (made - exact).abs().max() <= 2 * (eager - exact).abs().max() + slack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("where", [0, 15, 16, 69])
def test_one_key_far_above_the_others(where, dtype):
    """Scores of 1000 and more, in the first block of keys, in a later one, in the last: no overflow, no 0 / 0."""
    tiles = AttentionTiles(16, 16, 16, 1, 1)
    qkv = random(1, 70, 3 * 16, dtype=dtype)
    qkv[..., :16] = 8.0
    qkv[..., 16:32] = -64.0
    qkv[:, where, 16:32] = 64.0
    made, _ = check_attention(qkv, 1, tiles)
    assert torch.equal(made, qkv[:, where : where + 1, 32:].double().expand_as(made))


def test_several_heads_each_in_slices_of_v():
    check_attention(random(2, 20, 3 * 2 * 64, dtype=torch.bfloat16), 2, AttentionTiles(32, 32, 16, 4, 1))


def test_equal_scores_give_the_mean():
    qkv = random(1, 33, 3 * 16, dtype=torch.float32)
    qkv[..., :16] = 0.0
    made, _ = check_attention(qkv, 1)
    assert (made - qkv[..., 32:].double().mean(1, keepdim=True)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_rise_from_block_to_block(dtype):
    """Every block brings a new maximum, so that what was summed before must shrink; and the same from last to first."""
    tiles = AttentionTiles(16, 16, 16, 1, 1)
    for order in (1, -1):
        qkv = random(1, 64, 3 * 16, dtype=dtype)
        qkv[..., :32] = 0.25
        qkv[..., 16:32] += (torch.arange(64, device=DEVICE) * order / 16)[:, None].to(dtype)
        check_attention(qkv, 1, tiles)


@pytest.mark.filterwarnings("ignore:All-NaN|invalid value:RuntimeWarning")  # NumPy's, of the NaN put there
@pytest.mark.parametrize("tokens, heads, dim", [(16, 2, 16), (49, 1, 8)])
def test_a_sample_does_not_see_the_others(tokens, heads, dim):
    """Its bits are those of a batch of its own, in any place, whatever NaN its neighbours have."""
    qkv = random(3, tokens, 3 * heads * dim, dtype=torch.bfloat16)
    alone = attended(fenced(qkv[1:2]), heads)
    qkv[0], qkv[2] = math.nan, math.nan
    assert torch.equal(attended(qkv, heads)[1:2], alone)
    assert torch.equal(attended(fenced(qkv[[1, 0, 1, 1]]), heads)[[0, 2, 3]], alone.expand(3, -1, -1))


@pytest.mark.gpu  # the interpreter's products are a BLAS's, whose order depends on the shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_of_queries_and_of_columns_change_no_bit(dtype):
    qkv = random(1, 70, 3 * 32, dtype=dtype)
    first = attended(qkv, 1, AttentionTiles(64, 16, 32, 4, 1))
    for block_m, block_v in ((128, 32), (64, 16), (128, 16)):  # all by one kind of instruction
        assert torch.equal(attended(qkv, 1, AttentionTiles(block_m, 16, block_v, block_m // 16, 2)), first)


def test_heads_that_are_too_wide():
    for tokens, dim, itemsize in ((16, 513, 2), (16, 257, 4), (256, 1024, 2)):
        with pytest.raises(ValueError, match=f"a head has {dim} dimensions of {itemsize} bytes; .* scaled_dot_product"):
            attention_tiles(tokens, dim, itemsize)
    with pytest.raises(ValueError, match="a head has 520"):
        launch_attention(torch.zeros(1, 1, 1560), torch.zeros(1, 1, 520), heads=1)


# --- the products -----------------------------------------------------------------------------------------------------


def product(x, weight, bias, residual=None, *, units=0, **options):
    """The output, float64, and the partial statistics or None."""
    b, t, _ = x.shape
    n = weight.shape[1]
    made = Guarded((b, t, n), x.dtype)
    statistics = None
    if units:
        tiles = options.get("tiles") or linear_tiles(t, n, x.element_size())
        statistics = Guarded((b, math.ceil(t / tiles.rows), units, 2))
        options["statistics"] = statistics.tensor
    launch_linear(x, weight, bias, made.tensor, residual=residual, **options)
    assert made.intact()
    assert statistics is None or statistics.intact()
    return made.tensor.double(), None if statistics is None else statistics.tensor.double()


def inputs(batch, tokens, k, n, dtype, seed=0):
    weight = random(k, n, dtype=dtype, seed=seed + 1, scale=k**-0.5)
    return random(batch, tokens, k, dtype=dtype, seed=seed), weight, random(n, seed=seed + 2)


def check_product(x, weight, bias, residual=None, *, factor=1.0, units=0, **options):
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, residual)]
    factor32 = torch.tensor(factor, dtype=torch.float32).item()  # what the kernel is given
    exact = reference.linear(*wide, factor32)
    made, statistics = product(x, weight, bias, residual, units=units, factor=factor, **options)
    magnitudes = reference.linear(*(None if tensor is None else tensor.abs() for tensor in wide), abs(factor32))
    bound = 1.01 * store_error(exact, x.dtype) + (x.shape[2] + 4) * EPS * magnitudes
    if x.dtype == torch.float16:
        bound = bound + 2.0**-25  # half of the smallest subnormal
    assert ((made - exact).abs() <= bound).all()
    if units:
        check_statistics(made, statistics, units, x.element_size())
    return made, exact


def check_statistics(made, statistics, units, itemsize):
    """Of what was stored, not of what should have been."""
    _, tokens, n = made.shape
    rows = linear_tiles(tokens, n, itemsize).rows
    exact = reference.tile_statistics(made, units, rows)
    assert statistics.shape == exact.shape
    count = min(rows, tokens) * n // units
    largest = made.abs().max()
    assert ((statistics[..., 0] - exact[..., 0]).abs() <= (count + 2) * EPS * largest).all()
    assert ((statistics[..., 1] - exact[..., 1]).abs() <= (count + 8) * EPS * (exact[..., 1] + largest**2 * 1e-6)).all()
    mean, variance = reference.merged_statistics(statistics, tokens, rows, n // units)
    values = made.unflatten(2, (units, -1)).transpose(1, 2).flatten(2)
    assert torch.allclose(mean, values.mean(2), rtol=1e-5, atol=1e-5)
    assert torch.allclose(variance, values.var(2, correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "batch, tokens, k, n",
    [(1, 1, 1, 1), (3, 16, 32, 96), (2, 7, 13, 17), (1, 65, 40, 136), (2, 64, 130, 128), (1, 31, 72, 200)],
)
def test_products_of_every_shape_and_dtype(batch, tokens, k, n, residual, dtype):
    x, weight, bias = inputs(batch, tokens, k, n, dtype)
    check_product(x, weight, bias, random(batch, tokens, n, dtype=dtype, seed=9) if residual else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, tokens, k, n, units",
    [(5, 16, 32, 64, 8), (1, 1, 8, 8, 8), (2, 9, 24, 24, 6), (2, 64, 16, 128, 32), (1, 150, 16, 96, 6)]
    + [(1, 20, 8, 192, 3), (3, 33, 8, 34, 17), (1, 64, 8, 136, 17)],
)
def test_partial_statistics(batch, tokens, k, n, units, dtype):
    """Samples smaller and larger than a tile, tokens that end within one; units of 1 to 64 channels."""
    x, weight, bias = inputs(batch, tokens, k, n, dtype)
    residual = random(batch, tokens, n, dtype=dtype, seed=9)
    check_product(x, weight, bias, residual, factor=2**-0.5, units=units)


@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 70),
    k=st.integers(1, 70),
    units=st.integers(1, 5),
    channels=st.sampled_from([1, 2, 4, 8, 16, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from([1.0, 0.5, -1.5]),
)
def test_products_of_any_shape(batch, tokens, k, units, channels, dtype, factor):
    x, weight, bias = inputs(batch, tokens, k, units * channels, dtype, seed=tokens)
    residual = random(batch, tokens, units * channels, dtype=dtype, seed=9)
    check_product(x, weight, bias, residual, factor=factor, units=units)


def test_deviations_that_are_small_beside_the_mean():
    """2048 + small: E[x^2] - E[x]^2 would be off by a tenth and more."""
    x, weight, bias = inputs(2, 64, 16, 64, torch.float32)
    bias[:] = 2048.0
    check_product(x, weight, bias, units=8)


def test_the_block_is_the_modules():
    """Norm (eager), product, attention, projection: as near to float64 as the eager block in the same dtype, twice."""
    b, t, c, heads = 2, 16, 32, 2
    dtype = torch.bfloat16
    x = random(b, t, c, dtype=dtype, seed=4)
    weights = [random(c, n, dtype=dtype, seed=n, scale=c**-0.5) for n in (3 * c, c)]
    biases = [random(3 * c, seed=5), random(c, seed=6)]

    def block(to):
        qkv = reference.linear(x.to(to), weights[0].to(to), biases[0].to(to))
        out = reference.attention(qkv, heads)
        return reference.linear(out, weights[1].to(to), biases[1].to(to), x.to(to), 2**-0.5).double()

    qkv = Guarded((b, t, 3 * c), dtype)
    launch_linear(x, weights[0], biases[0], qkv.tensor)
    out = attended(qkv.tensor, heads).to(dtype)
    made, _ = product(out, weights[1], biases[1], x, factor=2**-0.5)
    assert qkv.intact()
    exact = block(torch.float64)
    assert (made - exact).abs().max() <= 2 * (block(dtype) - exact).abs().max() + store_error(exact.abs().max(), dtype)


def test_in_place_of_the_residual():
    x, weight, bias = inputs(2, 20, 16, 32, torch.bfloat16)
    made = Guarded((2, 20, 32), torch.bfloat16)
    residual = random(2, 20, 32, dtype=torch.bfloat16, seed=9)
    made.tensor.copy_(residual)
    launch_linear(x, weight, bias, made.tensor, residual=made.tensor)
    assert made.intact()
    assert torch.equal(made.tensor.double(), product(x, weight, bias, residual)[0])


@pytest.mark.parametrize("units", [0, 8])
@pytest.mark.parametrize("tokens", [16, 48, 96])
def test_a_row_does_not_see_the_others(tokens, units):
    x, weight, bias = inputs(3, tokens, 72, 64, torch.bfloat16)
    residual = random(3, tokens, 64, dtype=torch.bfloat16, seed=9)
    alone = product(fenced(x[1:2]), weight, bias, fenced(residual[1:2]), units=units)
    x[0], residual[2] = math.nan, math.nan
    for order in ([0, 1, 2], [1, 0], [0, 0, 2, 2, 2, 1]):
        place = order.index(1)
        together = product(fenced(x[order]), weight, bias, fenced(residual[order]), units=units)
        assert torch.equal(together[0][place], alone[0][0])
        assert not units or torch.equal(together[1][place], alone[1][0])


@pytest.mark.gpu
def test_wider_tiles_change_no_bit():
    x, weight, bias = inputs(1, 130, 72, 256, torch.bfloat16)
    wide = linear_tiles(1, 256, 2, wide=True)
    assert wide != linear_tiles(1, 256, 2)
    assert torch.equal(product(x, weight, bias)[0], product(x, weight, bias, tiles=wide)[0])


def test_no_rows():
    out = torch.zeros(0, 16, 8, device=DEVICE)
    launch_linear(out, torch.zeros(8, 8, device=DEVICE), torch.zeros(8, device=DEVICE), out)
    launch_attention(torch.zeros(0, 16, 24, device=DEVICE), out, heads=1)


def test_a_tile_has_whole_samples_or_a_part_of_one():
    for tokens in (1, 3, 16, 33, 64, 65, 256, 4096):
        for columns in (8, 128, 768):
            for itemsize, wide in ((2, False), (2, True), (4, False), (4, True)):
                by = linear_tiles(tokens, columns, itemsize, wide=wide)
                assert by.samples * by.rows in (64, 128)
                assert by.samples == 1 or by.rows >= tokens
                assert by.warps * 16 == by.samples * by.rows

"""The attention block's kernels against float64: every dtype, awkward shapes, far-off scores."""

import math

import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import attention_reference as reference
from fastddpm_kernels import linear
from fastddpm_kernels.attention import AttentionTiles, attention_tiles, launch_attention
from fastddpm_kernels.conv_tiles import FILL, Tile
from fastddpm_kernels.linear import launch_linear, linear_tile
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


def product(x, weight, bias, residual=None, **options):
    made = Guarded((*x.shape[:-1], weight.shape[1]), x.dtype)
    launch_linear(x, weight, bias, made.tensor, residual=residual, **options)
    assert made.intact()
    return made.tensor.double()


def inputs(batch, tokens, k, n, dtype, seed=0):
    weight = random(k, n, dtype=dtype, seed=seed + 1, scale=k**-0.5)
    return random(batch, tokens, k, dtype=dtype, seed=seed), weight, random(n, seed=seed + 2)


def check_product(x, weight, bias, residual=None, *, factor=1.0, **options):
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, residual)]
    factor32 = torch.tensor(factor, dtype=torch.float32).item()  # what the kernel is given
    exact = reference.linear(*wide, factor32)
    made = product(x, weight, bias, residual, factor=factor, **options)
    magnitudes = reference.linear(*(None if tensor is None else tensor.abs() for tensor in wide), abs(factor32))
    bound = 1.01 * store_error(exact, x.dtype) + (x.shape[-1] + 4) * EPS * magnitudes
    if x.dtype == torch.float16:
        bound = bound + 2.0**-25  # half of the smallest subnormal
    assert ((made - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "batch, tokens, k, n",
    [(1, 1, 1, 1), (3, 16, 32, 96), (2, 7, 13, 17), (1, 65, 40, 136), (2, 64, 130, 128), (1, 31, 72, 200)],
)
def test_products_of_every_shape_and_dtype(batch, tokens, k, n, residual, dtype):
    x, weight, bias = inputs(batch, tokens, k, n, dtype)
    check_product(x, weight, bias, random(batch, tokens, n, dtype=dtype, seed=9) if residual else None)


TILES = [Tile(64, 32, 64, 4, 4), Tile(64, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3)]


@pytest.mark.parametrize("tile, factor", list(zip(TILES, (2**-0.5, 1.5, -1.0, 1.0), strict=True)))
def test_products_of_every_tile(tile, factor):
    """Rows and columns that end within a tile, and rows of several samples in one."""
    x, weight, bias = inputs(3, 70, 136, 200, torch.bfloat16)
    residual = random(3, 70, 200, dtype=torch.bfloat16, seed=9)
    check_product(x, weight, bias, residual, factor=factor, tile=tile)


@given(
    batch=st.integers(1, 5),
    tokens=st.integers(1, 70),
    k=st.integers(1, 70),
    n=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    factor=st.sampled_from([1.0, 0.5, -1.5]),
)
def test_products_of_any_shape(batch, tokens, k, n, dtype, factor):
    x, weight, bias = inputs(batch, tokens, k, n, dtype, seed=tokens)
    check_product(x, weight, bias, random(batch, tokens, n, dtype=dtype, seed=9), factor=factor)


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
    made = product(out, weights[1], biases[1], x, factor=2**-0.5)
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
    assert torch.equal(made.tensor.double(), product(x, weight, bias, residual))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, of the NaN put there
@pytest.mark.parametrize("tokens", [16, 48, 96])
def test_a_row_does_not_see_the_others(tokens):
    x, weight, bias = inputs(3, tokens, 72, 64, torch.bfloat16)
    residual = random(3, tokens, 64, dtype=torch.bfloat16, seed=9)
    alone = product(fenced(x[1:2]), weight, bias, fenced(residual[1:2]))[0]
    x[0], residual[2] = math.nan, math.nan
    for order in ([0, 1, 2], [1, 0], [0, 0, 2, 2, 2, 1]):
        together = product(fenced(x[order]), weight, bias, fenced(residual[order]))
        assert torch.equal(together[order.index(1)], alone)


@pytest.mark.gpu  # the interpreter's products are a BLAS's, whose order depends on the shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wider_tiles_change_no_bit(dtype):
    x, weight, bias = inputs(1, 130, 264, 256, dtype)
    residual = random(1, 130, 256, dtype=dtype, seed=9)
    first, *others = [product(x, weight, bias, residual, tile=tile) for tile in TILES]
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("columns", [8, 16, 128, 768])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
def test_only_the_tile_depends_on_the_rows(columns, dtype, residual):
    """Not the step, which is the order of a sum, nor that 64 rows are multiplied at once; no tile leaves a GPU idle."""
    smallest = linear_tile(1, 256, columns, dtype)
    for rows in (1, 64, 1000, 2816, 2817, 100_000):
        by = linear_tile(rows, 256, columns, dtype, residual=residual)
        assert by.k == smallest.k
        assert by.m in (64, 128)
        assert by[:2] == smallest[:2] or math.ceil(rows / by.m) * math.ceil(columns / by.n) >= FILL


def test_wide_tiles_where_there_are_enough_rows():
    chosen = [linear_tile(rows, 256, 768, torch.bfloat16) for rows in (256, 1024, 2048, 4096)]
    assert [tile[:5] for tile in chosen] == [tile[:5] for tile in TILES]
    assert linear_tile(4096, 256, 768, torch.bfloat16, residual=True)[:5] == TILES[2][:5]


def test_the_launcher_takes_that_tile(monkeypatch):
    x, weight, bias = inputs(1, 70, 16, 64, torch.bfloat16)
    asked = []
    monkeypatch.setattr(linear, "linear_tile", lambda *a, **k: asked.append((a, k)) or TILES[1])
    check_product(x, weight, bias)
    check_product(x, weight, bias, random(1, 70, 64, dtype=torch.bfloat16, seed=9))
    assert asked == [((70, 16, 64, torch.bfloat16), {"residual": there}) for there in (False, True)]
    product(x, weight, bias, tile=TILES[0])
    assert len(asked) == 2  # a tile that is given is not asked for


def test_no_rows():
    out = torch.zeros(0, 16, 8, device=DEVICE)
    launch_linear(out, torch.zeros(8, 8, device=DEVICE), torch.zeros(8, device=DEVICE), out)
    launch_attention(torch.zeros(0, 16, 24, device=DEVICE), out, heads=1)

"""The bound of dynamic thresholding: the very order statistics of the x0 that the step sees, by every division."""

import math

import pytest
import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import reference, step_registration
from fastddpm_kernels.reverse_step_kernel import launch_reverse_step
from fastddpm_kernels.threshold import WHOLE, launch_threshold
from helpers import DEVICE, Guarded, fenced, random_table

EPS = 2.0**-24
SHAPES = [(1,), (13,), (3, 5, 7), (4, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLIP = 3.0


def inputs(shape, dtype=torch.float32, *, batch=3, guided=False, learned=False, last=False):
    """x, m and the keywords of guidance, for a model that is guided or learns a variance."""
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(batch, *shape, generator=generator)
    channels = (2 * shape[0] if learned else shape[0], *shape[1:])
    m = torch.randn(2 * batch if guided else batch, *channels, generator=generator).to(dtype)
    m = m.to(memory_format=torch.channels_last) if last else m
    weights = {}
    if guided:
        weights = {"guidance": torch.linspace(1, 7, batch), "rescale": torch.linspace(0.5, 1.1, batch)}
    return fenced(x), fenced(m), {name: fenced(w) for name, w in weights.items()}


def rows(ratios, clip=CLIP):
    """A table with a row of random coefficients for each ratio, and an identity row; float32."""
    table = random_table(len(ratios) + 1, history=0, clip=clip)
    table[: len(ratios), [col.X0_X, col.X0_M]] += 1
    table[: len(ratios), col.RATIO] = torch.tensor(ratios, dtype=torch.float64, device=DEVICE)
    return table.float()


def plain_rows(ratios, clip=math.inf):
    """The same, but x0 is x."""
    table = rows(ratios, clip)
    table[:, col.X0_X], table[:, col.X0_M] = 1, 0
    return table


def bounds(x, m, table, cursor, block=None, **flags):
    made = Guarded((x.shape[0], 2))
    launch_threshold(x, m, table, cursor, made.tensor, block=block, **flags)
    assert made.intact()
    return made.tensor


def step_x0(x, m, table, cursor, learned=False, **flags):
    """x0 before any limit, as the step kernel has it."""
    x0, seeds = torch.empty_like(x), torch.zeros(x.shape[0], dtype=torch.int64, device=DEVICE)
    launch_reverse_step(
        x, m, table, cursor, seeds, cursor * 0, out=torch.empty_like(x), x0=x0, limited=False, noise=False,
        learned=learned, **flags,
    )  # fmt: skip
    return x0


def expected(x0, table, cursor):
    """s, float64 [B], by a sort."""
    ordered = x0.abs().flatten(1).sort(dim=1).values.double()
    row = table[cursor.long()].double()
    position = row[:, col.RATIO] * (ordered.shape[1] - 1)
    low = position.long()
    high = (low + 1).clamp(max=ordered.shape[1] - 1)
    a, b = (ordered.gather(1, i[:, None])[:, 0] for i in (low, high))
    return (a + (position - low) * (b - a)).clamp_min(1).minimum(row[:, col.CLIP])


def cursor_at(*at):
    return torch.tensor(at, dtype=torch.int32, device=DEVICE)


def check(made, s):
    assert ((made[:, 0] - s).abs() <= 2 * EPS * s).all()
    assert torch.equal(made[:, 1], 1 / made[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_dtype_by_every_division(shape, dtype):
    x, m, _ = inputs(shape, dtype)
    table, cursor = rows([0.3, 0.9, 0.995]), cursor_at(2, 0, 1)
    whole = bounds(x, m, table, cursor)
    x0 = step_x0(x, m, table, cursor)
    check(whole, expected(x0, table, cursor))
    said = reference.dynamic_bound(x0, table[cursor.long(), col.RATIO], table[cursor.long(), col.CLIP])
    assert ((whole[:, 0] - said).abs() <= 2 * EPS * said).all()
    for block in (16, 64) if x[0].numel() < 256 else (128,):
        assert torch.equal(bounds(x, m, table, cursor, block), whole)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape, dtype", [((3, 5, 7), torch.float32), ((4, 8, 8), torch.bfloat16)])
def test_every_kind_of_output(shape, dtype, last, guided, learned):
    x, m, weights = inputs(shape, dtype, batch=2, guided=guided, learned=learned, last=last)
    table, cursor = rows([0.6, 0.995], clip=40.0), cursor_at(1, 0)
    flags = dict(weights, learned=learned)
    made = bounds(x, m, table, cursor, **flags)
    check(made, expected(step_x0(x, m, table, cursor, **flags), table, cursor))
    assert (made[:, 0] > 1).all()
    assert torch.equal(bounds(x, m, table, cursor, 16 if shape[0] == 3 else 32, **flags), made)


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("spread", [1.0, 1e20])
def test_the_very_order_statistic(block, spread):
    """Of 1025 elements the ratio k/1024 is the k-th, with a weight of exactly 0."""
    ranks = [1, 511, 1020, 1024]
    x = fenced((1 + spread * torch.rand(4, 1025, generator=torch.Generator().manual_seed(1))) * torch.tensor(-1.0))
    table = plain_rows([k / 1024 for k in ranks])
    made = bounds(x, torch.zeros_like(x), table, cursor_at(0, 1, 2, 3), block)
    ordered = x.abs().sort(dim=1).values
    assert torch.equal(made[:, 0], torch.stack([ordered[b, k] for b, k in enumerate(ranks)]))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so where a GPU would not
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize(
    "values, ratio, s",
    [
        ([2.5] * 70, 0.3, 2.5),  # all equal
        ([0.0] * 70, 0.995, 1.0),
        ([-0.0, 0.0] * 35, 1.0, 1.0),
        ([0.0] * 69 + [-4.0], 1.0, 4.0),
        ([1.0] * 70, 0.5, 1.0),
        ([0.25] * 35 + [3.25] * 35, 0.5, 1.75),  # below 1, and above it: between the two of them
        ([0.5] * 35 + [1.0] * 35, 0.5, 1.0),
        ([1.0 + 2.0**-23] * 70, 0.5, 1.0 + 2.0**-23),  # the least that is above 1
        ([2.0] * 34 + [-3.0] * 36, 34 / 69, 3.0),  # ties on both sides
        ([2.0] * 35 + [2.0 + 2.0**-22] * 35, 1.0, 2.0 + 2.0**-22),  # they differ in the last bit alone
        ([2.0 + 2.0**-21] * 35 + [2.0 + 2.0**-14] * 35, 0.5, 2.0 + 2.0**-22 + 2.0**-15),
        ([2.0] * 35 + [64.0] * 35, 0.5, 33.0),  # the next is in another first digit
        ([1e-40] * 69 + [2.0], 68 / 69, 1.0),
        ([math.inf] * 70, 0.5, math.inf),
        ([2.0] * 69 + [-math.inf], 0.9, 2.0),
        ([2.0] * 69 + [-math.inf], 0.995, math.inf),
        ([2.0] * 69 + [math.inf], 1.0, math.inf),
        ([3.4e38] * 70, 0.5, 3.4e38),
        ([-5.0], 0.7, 5.0),  # n = 1
        ([0.5], 1.0, 1.0),
        ([5.0, -7.0], 0.5, 6.0),
    ],
)
def test_ties_zeros_and_infinities(values, ratio, s, block):
    x = fenced(torch.tensor([values]))
    m = torch.zeros_like(x)
    made = bounds(x, m, plain_rows([ratio]), cursor_at(0), block)
    assert made[0, 0].item() == pytest.approx(s, rel=2 * EPS)
    assert (made[0, 0].item() > 1) == (s > 1)


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("clip", [0.5, 1.0, 2.25, 9.0])
def test_the_bound_is_at_most_the_clip(clip, block):
    x = fenced(torch.linspace(-4, 4, 70)[None])
    made = bounds(x, torch.zeros_like(x), plain_rows([0.99], clip=clip), cursor_at(0), block)
    check(made, expected(x, plain_rows([0.99], clip=clip), cursor_at(0)))
    assert made[0, 0] == clip or clip == 9


@pytest.mark.parametrize("block", [None, 16])
def test_rows_with_and_without_a_ratio_in_one_batch(block):
    x, m, _ = inputs((3, 5, 7), batch=5)
    table = rows([0.9, 0.0, 0.995, 0.0])
    table[3, col.CLIP] = math.inf
    cursor = cursor_at(1, 0, 4, 2, 3)  # 4: the identity row
    m[2] = math.nan
    m[0] = math.nan  # no ratio: not looked at
    made = bounds(x, m, table, cursor, block)
    assert made[[0, 2, 4]].tolist() == [[CLIP, 1], [math.inf, 1], [math.inf, 1]]
    moving = cursor_at(0, 2)
    check(made[[1, 3]], expected(step_x0(x[[1, 3]], m[[1, 3]], table, moving), table, moving))


@pytest.mark.parametrize("block", [None, 16])
def test_an_identity_row_reads_no_model_output(block):
    x, m, _ = inputs((3, 5, 7), batch=1)
    table = plain_rows([0.5])
    table[0, [col.ADVANCE, col.X0_M]] = torch.tensor([0.0, 1.0], device=DEVICE)
    check(bounds(3 * x, m * math.nan, table, cursor_at(0), block), expected(3 * x, table, cursor_at(0)))


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so where a GPU would not
@pytest.mark.parametrize("bad", [-math.nan, math.inf])
@pytest.mark.parametrize("everywhere", [False, True])
def test_what_is_not_finite_stays_in_its_sample(bad, everywhere, block):
    x, m, _ = inputs((3, 5, 7))
    table, cursor = rows([0.9, 0.5, 0.995]), cursor_at(0, 2, 1)
    table[2, col.X0_M] = 1.0
    clean = bounds(x, m, table, cursor, block)
    if everywhere:
        m[1] = bad
    else:
        m[1, 2, 4, 6] = bad
    made = bounds(x, m, table, cursor, block)
    assert torch.equal(made[[0, 2]], clean[[0, 2]])
    if math.isnan(bad):  # it counts as the largest
        assert made[1].isnan().all()  # of 105 elements the one of rank 103.48 is taken
    else:
        assert made[1, 0] == CLIP


def test_neither_slot_nor_company_matter():
    x, m, weights = inputs((3, 5, 7), guided=True)
    table, cursor = rows([0.9, 0.5, 0.995]), cursor_at(0, 2, 1)
    together = bounds(x, m, table, cursor, **weights)
    for b in range(3):
        own = {name: w[b : b + 1].clone() for name, w in weights.items()}
        alone = bounds(x[b : b + 1], m[[b, b + 3]], table, cursor[b : b + 1], **own)
        assert torch.equal(alone[0], together[b])


def test_a_large_sample_is_taken_by_several_programs():
    n = 4 * WHOLE + 9
    x = fenced(torch.randn(1, n, generator=torch.Generator().manual_seed(0)))
    table, cursor = plain_rows([0.995]), cursor_at(0)
    made = bounds(x, x, table, cursor)
    check(made, expected(x, table, cursor))
    assert torch.equal(made, bounds(x, x, table, cursor, block=8192))


def test_no_samples():
    x = torch.zeros(0, 3, device=DEVICE)
    assert bounds(x, x, rows([0.5]), cursor_at()).shape == (0, 2)


@pytest.mark.parametrize("guided, learned", [(False, False), (True, False), (True, True)])
def test_the_step_against_float64(guided, learned):
    """The launch that is behind the op, with all kernels of it."""
    x, m, weights = inputs((4, 8, 8), batch=4, guided=guided, learned=learned)
    table, cursor = rows([0.9, 0.5, 0.0]), cursor_at(0, 1, 2, 3)
    table[:, [col.S_0, col.S_V]] *= 0.1
    seeds, nonfinite = torch.arange(4, device=DEVICE), torch.zeros(4, dtype=torch.int32, device=DEVICE)
    phi = weights.get("rescale")
    read = (weights.get("guidance"), phi, None, None, None, True, True, True, learned, True)
    out, x0 = Guarded((4, 4, 8, 8)), Guarded((4, 4, 8, 8))
    step_registration._launch(x, m, table, cursor, seeds, nonfinite, *read, out=out.tensor, x0=x0.tensor)
    assert out.intact()
    assert x0.intact()

    double = {name: w.double() for name, w in weights.items()}
    z = reference.normal(seeds, (4, 8, 8), step=table[cursor.long(), col.STEP].long(), stream=1, dtype=torch.float64)
    exact = reference.reverse_step(
        x.double(), m.double(), table.double(), cursor, z, dynamic=True, learned=learned, **double
    )
    assert (x0.tensor - exact.x0).abs().max() < 5e-6
    assert (out.tensor - exact.x).abs().max() < 5e-5
    assert (exact.x0[:2].flatten(1).abs().amax(1) == 1).all()
    assert not nonfinite.any()


def test_infinities_are_the_references_too():
    x0 = torch.full((1, 70), 2.0)
    x0[0, :5] = math.inf
    assert reference.dynamic_bound(x0, torch.tensor([0.99]), torch.tensor([5.0])).tolist() == [5.0]


@pytest.mark.parametrize("block", [None, 16])
def test_two_neighbours_that_differ_in_their_last_bits(block):
    """The next element is in the bins of the last digit, above that of the first."""
    values = torch.full((1, 105), 2.0)
    values[0, 52:] = torch.tensor(2.0).view(torch.int32).add(5).view(torch.float32)
    x, table, cursor = fenced(values.view(1, 3, 5, 7)), plain_rows([0.495]), cursor_at(0)
    made = bounds(x, fenced(torch.zeros(1, 3, 5, 7)), table, cursor, block)[0, 0].double()
    exact = expected(x, table, cursor)[0]
    assert 2.0 < exact < values[0, -1]
    assert abs(made - exact) <= 2.0**-22


@pytest.mark.parametrize("block", [None, 16])
def test_a_neighbour_that_is_there_but_once(block):
    """The next element in the order is the only one of its value, in the last digit's last bin or before it."""
    ulp = 2.0**-22  # of numbers in 2 ... 4
    for above in (1, 3, 127):  # of 2.0, whose last digit is 0
        x = fenced(torch.tensor([[2.0] * 35 + [2.0 + above * ulp] + [9.0] * 34]))
        made = bounds(x, torch.zeros_like(x), plain_rows([34.5 / 69]), cursor_at(0), block)
        assert abs(made[0, 0].item() - (2.0 + above * ulp / 2)) <= ulp / 2


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("block", [None, 16])
def test_guidance_without_its_rescale(block, learned):
    x, m, weights = inputs((3, 5, 7), batch=2, guided=True, learned=learned)
    flags = {"guidance": weights["guidance"], "learned": learned}
    table, cursor = rows([0.6, 0.995], clip=40.0), cursor_at(1, 0)
    made = bounds(x, m, table, cursor, block, **flags)
    check(made, expected(step_x0(x, m, table, cursor, **flags), table, cursor))
    assert (made[:, 0] > 1).all()

"""The factor of guidance rescale against float64: every layout and division, constant and far-off outputs."""

import math

import pytest
import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import reference, step_registration
from fastddpm_kernels.guidance_rescale import WHOLE, launch_rescale_factor
from helpers import DEVICE, Guarded, fenced, random_table

EPS = 2.0**-24
SHAPES = [(1,), (13,), (3, 5, 7), (4, 16, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape, dtype=torch.float32, *, batch=3, learned=False, last=False, offset=0.0):
    """Outputs [2 B, ...] with deviations that differ, guidance weights and phi."""
    generator = torch.Generator().manual_seed(len(shape))
    channels = (2 * shape[0] if learned else shape[0], *shape[1:])
    m = torch.randn(2 * batch, *channels, generator=generator)
    m = m * torch.linspace(0.5, 2, 2 * batch).reshape(-1, *[1] * len(shape)) + offset
    m = m.to(dtype).to(memory_format=torch.channels_last) if last else m.to(dtype)
    return fenced(m), fenced(torch.linspace(1.5, 7.5, batch)), fenced(torch.linspace(0.3, 1, batch))


def factors(m, guidance, phi, block=None, **flags):
    made = Guarded(tuple(guidance.shape))
    launch_rescale_factor(m, guidance, phi, made.tensor, block=block, **flags)
    assert made.intact()
    return made.tensor


def expected(m, guidance, phi, learned=False):
    unconditional, conditional = m.double().chunk(2)
    if learned:
        unconditional, conditional = (half.chunk(2, dim=1)[0] for half in (unconditional, conditional))
    guided = reference.guided(conditional, unconditional, guidance.double())
    return reference.rescale_factor(conditional, guided, phi.double())


def check(made, exact, ulps=8):
    assert ((made - exact).abs() <= ulps * EPS * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_and_dtype_by_every_division(shape, dtype):
    m, guidance, phi = inputs(shape, dtype)
    exact = expected(m, guidance, phi)
    for block in (None, 16, 64) if m[0].numel() < 256 else (None, 128):
        check(factors(m, guidance, phi, block), exact)
    if shape != (1,):
        assert exact.unique().numel() == 3


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape, dtype", [((3, 5, 7), torch.float32), ((4, 8, 8), torch.bfloat16)])
def test_every_kind_of_output(shape, dtype, last, learned, block):
    m, guidance, phi = inputs(shape, dtype, learned=learned, last=last)
    if learned:
        m[:, shape[0] :] = math.nan  # the variance does not count
    check(factors(m, guidance, phi, block, learned=learned), expected(m, guidance, phi, learned))


@pytest.mark.parametrize("block", [None, 16])
def test_deviations_that_are_small_beside_the_mean(block):
    """m = 1024 + small, with a weight that makes no rounding: E[m^2] - E[m]^2 would have no right digit."""
    m, guidance, phi = inputs((3, 5, 7))
    m[:] = 1024 + (m * 64).round() * 2.0**-13
    guidance[:] = 2.0
    check(factors(m, guidance, phi, block), expected(m, guidance, phi))
    m[:, 0, 0, 0] = 0.0  # and where the first element is far from the others
    check(factors(m, guidance, phi, block), expected(m, guidance, phi), ulps=64)


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 / 3])
def test_a_constant_output_has_the_factor_one(value, block):
    m, guidance, phi = inputs((3, 5, 7), batch=4)
    m[:] = value
    m[1] = value / 7
    m[2] += torch.arange(105.0, device=DEVICE).reshape(3, 5, 7)  # unconditional alone: the guided output varies
    m[7, 0, 0, 0] += 1.0
    made = factors(m, guidance, phi, block)
    assert made[:2].tolist() == [1.0, 1.0]
    assert made[2] == 1 - phi[2]
    check(made[3:], expected(m, guidance, phi)[3:])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so where a GPU would not
@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_sample(bad, block):
    m, guidance, phi = inputs((3, 5, 7))
    clean = factors(m, guidance, phi, block)
    m[4, 2, 4, 6] = bad  # conditional, of sample 1
    made = factors(m, guidance, phi, block)
    assert torch.equal(made[[0, 2]], clean[[0, 2]])
    assert not made[1].isfinite()


@pytest.mark.parametrize("block", [None, 16])
def test_neither_slot_nor_company_matter(block):
    m, guidance, phi = inputs((3, 5, 7))
    together = factors(m, guidance, phi, block)
    assert torch.equal(together, factors(m, guidance, phi, block))
    for b in range(3):
        alone = factors(m[[b, b + 3]], guidance[b : b + 1].clone(), phi[b : b + 1].clone(), block)
        assert torch.equal(alone[0], together[b])


def test_more_programs_than_are_put_together_at_a_time():
    """The programs' means differ, so that their distances count too."""
    ramp = torch.linspace(0, 3, 4 * 260 * 16)
    m = torch.stack([ramp * 0.5, ramp.flip(0) ** 2])
    m, guidance, phi = fenced(m), torch.tensor([2.0], device=DEVICE), torch.tensor([1.0], device=DEVICE)
    check(factors(m, guidance, phi, 16), expected(m, guidance, phi))


def test_a_large_sample_is_taken_by_several_programs():
    m = fenced(torch.randn(2, 4 * WHOLE + 9, generator=torch.Generator().manual_seed(0)))
    guidance, phi = torch.tensor([3.0], device=DEVICE), torch.tensor([0.7], device=DEVICE)
    check(factors(m, guidance, phi), expected(m, guidance, phi))


def test_no_samples():
    nothing = torch.zeros(0, device=DEVICE)
    assert factors(torch.zeros(0, 3, device=DEVICE), nothing, nothing).shape == (0,)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_the_step_against_float64(last, learned):
    """The launch that is behind the op: the model's output is multiplied with the factor, not with phi."""
    shape, batch = (4, 8, 8), 3
    m, guidance, phi = inputs(shape, learned=learned, last=last)
    x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(9), device="cpu").to(DEVICE)
    table = random_table(4, history=0, noise=False).float()
    table[:, [col.S_0, col.S_V]] *= 0.1
    cursor = torch.tensor([0, 2, 1], dtype=torch.int32, device=DEVICE)
    nonfinite, out = torch.zeros_like(cursor), Guarded((batch, *shape))
    read = (guidance, phi, None, None, None, True, False, False, learned, True)
    given = phi.clone()
    step_registration._launch(x, m, table, cursor, cursor.long(), nonfinite, *read, out=out.tensor)
    assert out.intact()
    assert torch.equal(phi, given)
    exact = reference.reverse_step(
        x.double(),
        m.double(),
        table.double(),
        cursor,
        learned=learned,
        guidance=guidance.double(),
        rescale=phi.double(),
    )
    assert (out.tensor - exact.x).abs().max() < 5e-5
    assert not nonfinite.any()


@pytest.mark.parametrize("value", [0.1, 0.3, 1 / 3])
def test_a_constant_output_has_a_factor_of_1_in_the_reference_too(value):
    """In float32 the deviation of a constant would be its rounding."""
    m = torch.full((2, 3, 32, 32), value)
    phi = torch.tensor([0.7, 1.0])
    assert reference.rescale_factor(m, m * 3.3, phi).tolist() == [1.0, 1.0]

"""Forward noising against float64: bounds, memory, noise, gradients."""

import math

import numpy as np
import pytest
import torch
from fastddpm_kernels import add_noise, q_sample, reference
from fastddpm_kernels.q_sample_kernel import launch_q_sample
from helpers import DEVICE, Guarded, fenced, store_error

from fastddpm import NoiseSchedule

EPS = 2.0**-24
SCHEDULE = NoiseSchedule.linear()
COLUMNS = (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
EXACT = torch.tensor(np.stack(COLUMNS, axis=1), device=DEVICE)
TABLE = EXACT.float()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (13,), (3, 5, 7), (1, 32, 32)])
@pytest.mark.parametrize("draw", [True, False])
def test_against_float64(shape, dtype, draw):
    generator = torch.Generator().manual_seed(1)
    x0 = fenced(torch.randn(3, *shape, generator=generator).to(dtype))
    seeds, t = torch.tensor([4, -5, 2**40], device=DEVICE), torch.tensor([0, 500, 999], device=DEVICE)
    out, noise = Guarded((3, *shape), dtype), Guarded((3, *shape), dtype)
    if draw:
        z = reference.normal(seeds, shape, step=7, stream=2, dtype=torch.float64)
        launch_q_sample(x0, noise.tensor, out.tensor, t, TABLE, seeds, step=7, block=64)
        assert ((noise.tensor - z).abs() <= store_error(z, dtype) * (1 + 1e-3) + 4e-6).all()
    else:
        noise.tensor.copy_(torch.randn(3, *shape, generator=generator))
        z = noise.tensor.double()
        launch_q_sample(x0, noise.tensor, out.tensor, t, TABLE, block=64)
        assert torch.equal(noise.tensor.double(), z)
    assert out.intact()
    assert noise.intact()

    exact = reference.add_noise(x0.double(), z, t, TABLE.double())
    size = reference.add_noise(x0.double().abs(), z.abs(), t, TABLE.double())
    b = TABLE[t, 1].reshape(-1, *[1] * len(shape))
    drawn = 4e-6 * b if draw else 0.0
    bound = 4 * EPS * size + drawn
    assert ((out.tensor - exact).abs() <= bound + store_error(exact.abs() + bound, dtype)).all()


def test_early_time_steps_get_their_noise_in_bfloat16():
    """The coefficients are float32, so that sqrt(1 - alpha_bar) isn't lost where alpha_bar rounds to 1 in bfloat16."""
    x0 = torch.zeros(1, 4096, dtype=torch.bfloat16, device=DEVICE)
    x_t, _ = q_sample(x0, torch.tensor([0], device=DEVICE), TABLE, torch.tensor([1], device=DEVICE))
    assert x_t.float().std().item() == pytest.approx(0.01, rel=0.05)


def test_the_op_draws_the_contracts_noise_whatever_the_company():
    x0 = torch.randn(4, 3, 5, 7, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    t, seeds = torch.tensor([0, 10, 999, 3], device=DEVICE), torch.tensor([1, 2, 3, 4], device=DEVICE)
    x_t, noise = q_sample(x0, t, TABLE, seeds, step=3)
    for b in range(4):
        one = slice(b, b + 1)
        alone = q_sample(x0[one], t[one], TABLE, seeds[one], step=3)
        assert torch.equal(alone[0][0], x_t[b])
        assert torch.equal(alone[1][0], noise[b])
    given, same = q_sample(x0, t, TABLE, seeds, noise=noise)
    assert (given - x_t).abs().max() <= 4 * EPS * 8
    assert same is noise
    last = x0.to(memory_format=torch.channels_last)
    assert torch.equal(q_sample(last, t, TABLE, seeds, step=3)[0], x_t)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_that_is_not_kept(dtype):
    """The same bits of x_t, and no memory written but its own."""
    x0 = fenced(torch.randn(3, 45, generator=torch.Generator().manual_seed(1)).to(dtype))
    before = x0.clone()
    seeds, t = torch.tensor([4, -5, 2**40], device=DEVICE), torch.tensor([0, 500, 999], device=DEVICE)
    out, kept, noise = (Guarded((3, 45), dtype) for _ in range(3))
    launch_q_sample(x0, noise.tensor, kept.tensor, t, TABLE, seeds, step=7, block=64)
    launch_q_sample(x0, None, out.tensor, t, TABLE, seeds, step=7, block=64)
    assert torch.equal(out.tensor, kept.tensor)
    assert torch.equal(x0, before)
    assert out.intact()
    x_t, nothing = q_sample(x0, t, TABLE, seeds, step=7, keep_noise=False)
    assert nothing is None
    assert torch.equal(x_t, q_sample(x0, t, TABLE, seeds, step=7)[0])
    assert q_sample(x0, t, TABLE, seeds, noise=noise.tensor, keep_noise=False)[1] is noise.tensor


def test_gradients():
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    t, seeds, table = torch.tensor([3, 900]), torch.tensor([1, 2]), EXACT.cpu()
    assert torch.autograd.gradcheck(lambda a, z: add_noise(a, z, t, table), (x0, noise))
    for keep in (True, False):
        assert torch.autograd.gradcheck(lambda a, k=keep: q_sample(a, t, table, seeds, keep_noise=k)[0], (x0,))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x0": torch.zeros(2, 4, dtype=torch.int64)}, "x0 is torch.int64"),
        ({"x0": torch.zeros(2, 4, dtype=torch.float64)}, "x0 is torch.float64"),
        ({"t": torch.zeros(2)}, "t is torch.float32"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"of \(2,\)"),
        ({"table": torch.zeros(10, 3)}, r"needed: float32 \[T, 2\]"),
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds is torch.int32"),
        ({"noise": torch.zeros(2, 5)}, r"noise has shape \(2, 5\)"),
    ],
)
def test_bad_arguments(change, words):
    good = dict(
        x0=torch.zeros(2, 4), t=torch.zeros(2, dtype=torch.int64), table=torch.ones(10, 2), seeds=torch.arange(2)
    )
    with pytest.raises(ValueError, match=words):
        q_sample(**{**good, **change})


def test_nan_goes_through():
    x0 = torch.zeros(1, 64, device=DEVICE)
    x0[0, 5] = math.nan
    x_t, _ = q_sample(x0, torch.tensor([5], device=DEVICE), TABLE, torch.tensor([0], device=DEVICE))
    assert x_t.isnan().sum() == 1

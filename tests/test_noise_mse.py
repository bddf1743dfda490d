"""The training loss that draws its noise again: against float64, memory, bits, gradients, and q_sample's own noise."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastddpm_kernels import noise_mse, q_sample, reference
from fastddpm_kernels.noise_mse_kernel import launch_noise_mse
from helpers import DEVICE, Guarded, fenced, store_error
from torch._dynamo.testing import CompileCounterWithBackend

from fastddpm import NoiseSchedule

EPS = 2.0**-24
NORMAL = 4e-6  # the noise contract's: a normal's distance from float64
SCHEDULE = NoiseSchedule.linear()
COLUMNS = (SCHEDULE.sqrt_alphas_cumprod, SCHEDULE.sqrt_one_minus_alphas_cumprod)
TABLE = torch.tensor(np.stack(COLUMNS, axis=1), device=DEVICE).float()
V_TABLE = TABLE * torch.tensor([1.0, -1.0], device=DEVICE)  # v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0
SEEDS = torch.tensor([4, -5, 2**40], device=DEVICE)
T = torch.tensor([0, 500, 999], device=DEVICE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [  # shape of a sample, whether it is channels_last, block
    ((1,), False, 64),
    ((13,), False, 64),
    ((3, 5, 7), True, 64),
    ((1, 32, 32), False, 64),
    ((3, 17, 31), False, 256),
    ((4, 16, 32), True, 512),
]


def randn(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def arranged(shape, last, seed, dtype):
    """Random samples between NaN, contiguous or channels_last."""
    made = randn((3, *shape), seed, dtype)
    return fenced(made.contiguous(memory_format=torch.channels_last) if last else made)


def exactly(m, mixed):
    """(m - target, its error in float32) by float64, from the same words and the same rounded coefficients."""
    z = reference.normal(SEEDS, m.shape[1:], step=7, stream=2, dtype=torch.float64)
    if mixed is None:
        return m.double() - z, NORMAL + EPS * (m.double() - z).abs()
    x0, table = mixed.double(), V_TABLE.double()
    a = table[T, 0].reshape(-1, *[1] * (m.ndim - 1))
    size = m.double().abs() + reference.add_noise(z.abs(), x0.abs(), T, table.abs())
    return m.double() - reference.add_noise(z, x0, T, table), NORMAL * a + 4 * EPS * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, last, block", CASES)
@pytest.mark.parametrize("mixed", [False, True])
def test_against_float64(shape, last, block, dtype, mixed):
    m = arranged(shape, last, 1, dtype)
    x0 = arranged(shape, False, 2, torch.float32) if mixed else None
    given = (m, SEEDS, x0, T if mixed else None, V_TABLE if mixed else None, 7)
    d, error = exactly(m, x0)
    n = math.prod(shape)

    loss = launch_noise_mse(*given, block=block)
    exact = d.square().flatten(1).mean(1)
    # Of n squares: 16 sequential additions in a thread, then a tree over threads, then over the blocks' parts.
    rounding = (16 + 2 * math.log2(4 * block) + n / (4 * block)) * EPS * exact
    bound = (2 * error * d.abs() + error.square()).flatten(1).mean(1) + rounding
    assert loss.dtype == torch.float32
    assert ((loss - exact).abs() <= bound).all()

    grad = torch.tensor([0.25, -3.0, 1e3], device=DEVICE)  # of the size that keeps float16 from its subnormals
    out = Guarded((3, *shape), dtype, channels_last=last)
    assert launch_noise_mse(*given, grad=grad, out=out.tensor, block=block) is out.tensor
    assert out.intact()
    scale = (grad.double() * 2 / n).reshape(-1, *[1] * len(shape))
    bound = scale.abs() * (error + 4 * EPS * d.abs())
    assert ((out.tensor - scale * d).abs() <= bound + store_error((scale * d).abs() + bound, dtype)).all()


def test_the_gradients_bits_depend_on_nothing_else():
    """Not on the block size, the slot, the company or the memory format; the loss's bits on the block size alone."""
    m, x0, grad = randn((3, 3, 8, 12), 1), randn((3, 3, 8, 12), 2), torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    last = m.contiguous(memory_format=torch.channels_last)

    def gradient(output, rows, block):
        given = (SEEDS[rows], x0[rows], T[rows], V_TABLE, 5)
        out = torch.empty_like(output[rows])
        return launch_noise_mse(output[rows], *given, grad=grad[rows], out=out, block=block)

    expected = gradient(m, slice(None), 64)
    losses = launch_noise_mse(m, SEEDS, x0, T, V_TABLE, 5, block=64)
    for output, block in ((m, 32), (m, 256), (last, 64), (last, None)):
        assert torch.equal(gradient(output, slice(None), block), expected)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(gradient(m, one, 64)[0], expected[b])
        assert torch.equal(launch_noise_mse(m[one], SEEDS[one], x0[one], T[one], V_TABLE, 5, block=64)[0], losses[b])
    assert torch.equal(launch_noise_mse(last, SEEDS, x0, T, V_TABLE, 5, block=64), losses)


@pytest.mark.parametrize("step, stream", [(0, 2), (3, 2), (2**31 - 1, 0)])
def test_the_noise_is_that_of_q_sample(step, stream):
    x0 = randn((3, 2, 5, 7), 0)
    x_t, noise = q_sample(x0, T, TABLE, SEEDS, step=step, stream=stream)
    again, nothing = q_sample(x0, T, TABLE, SEEDS, step=step, stream=stream, keep_noise=False)
    assert torch.equal(again, x_t)
    assert nothing is None
    counter = {"step": step, "stream": stream}
    assert (noise_mse(noise, SEEDS, **counter) <= (2 * NORMAL) ** 2).all()
    a, b = TABLE[T].T.reshape(2, 3, 1, 1, 1)
    v = a * noise - b * x0
    assert (noise_mse(v, SEEDS, x0=x0, t=T, table=V_TABLE, **counter) <= (2 * NORMAL) ** 2).all()
    for wrong in ({**counter, "step": 17}, {**counter, "stream": 1}):
        assert (noise_mse(noise, SEEDS, **wrong) > 1).all()
    assert (noise_mse(noise, SEEDS.flip(0), **counter) > 1)[[0, 2]].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_op_is_a_weighted_mse_loss(dtype, last, mixed):
    """The weighted mean and its gradient, against PyTorch's own loss on the stored target."""
    weight, x0 = torch.tensor([0.5, 2.0, 1000.0], device=DEVICE), randn((3, 3, 5, 7), 1)
    m = arranged((3, 5, 7), last, 2, dtype).requires_grad_()
    target = q_sample(x0, T, TABLE, SEEDS, step=4)[1]
    if mixed:
        a, b = TABLE[T].T.reshape(2, 3, 1, 1, 1)
        target = a * target - b * x0
    stored = F.mse_loss(m.float(), target, reduction="none").flatten(1).mean(1)
    given = {"x0": x0, "t": T, "table": V_TABLE} if mixed else {}
    drawn = noise_mse(m, SEEDS, **given, step=4)
    assert drawn.shape == (3,)
    assert drawn.dtype == torch.float32
    assert torch.allclose(drawn, stored, rtol=1e-5, atol=0)
    expected, gradient = (torch.autograd.grad((weight * loss).mean(), m)[0] for loss in (stored, drawn))
    assert gradient.dtype == dtype
    assert gradient.stride() == m.stride()
    assert torch.allclose(gradient.float(), expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_slices_and_single_elements():
    """A model's first channels, neither contiguous nor channels_last; samples without dimensions; no samples."""
    both = randn((3, 4, 5, 7), 0).requires_grad_()
    given = {"x0": randn((3, 5, 7, 2), 1).permute(0, 3, 1, 2), "t": T, "table": V_TABLE}
    loss = noise_mse(both[:, :2], SEEDS, **given)
    assert torch.equal(loss, noise_mse(both[:, :2].contiguous(), SEEDS, **given | {"x0": given["x0"].contiguous()}))
    loss.sum().backward()
    assert (both.grad[:, :2] != 0).all()
    assert (both.grad[:, 2:] == 0).all()
    assert noise_mse(randn((3,), 0), SEEDS).shape == (3,)
    empty = randn((0, 2, 3), 0).requires_grad_()
    none = noise_mse(empty, SEEDS[:0])
    assert none.shape == (0,)
    none.sum().backward()
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("mixed", [False, True])
def test_gradient_in_float64(mixed):
    """The CPU's formula against finite differences, the weights' too."""
    m = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    given = {"x0": torch.ones_like(m), "t": T.cpu(), "table": V_TABLE.cpu().double()} if mixed else {}
    assert noise_mse(m, SEEDS.cpu(), **given).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda m, w: (w * noise_mse(m, SEEDS.cpu(), **given)).mean(), (m, weight))


def test_there_is_no_second_derivative():
    m = randn((3, 5), 0).requires_grad_()
    (gradient,) = torch.autograd.grad(noise_mse(m, SEEDS).mean(), m, create_graph=True)
    with pytest.raises(RuntimeError, match="noise_mse has no second derivative"):
        gradient.square().sum().backward()


def test_a_training_step_compiles_into_one_graph():
    """Whatever the step's number and the batch's size: they may be dynamic."""

    def train(x0, seeds, t, layer, step):
        x_t, _ = q_sample(x0, t, TABLE, seeds, step=step, keep_noise=False)
        return (noise_mse(layer(x_t), seeds, step=step) * 2).mean()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(train, backend=counter, fullgraph=True)
    layer = torch.nn.Conv2d(2, 2, 3, padding=1, device=DEVICE)
    for step, batch in [(0, 3), (1, 3), (2, 2), *((k, 3) for k in range(3, 14))]:
        given = (randn((batch, 2, 5, 7), 0), SEEDS[:batch], T[:batch], layer, step)
        made, expected = compiled(*given), train(*given)
        assert torch.equal(made, expected)
        gradients = [torch.autograd.grad(loss, layer.weight)[0] for loss in (made, expected)]
        assert torch.equal(*gradients)
    assert counter.frame_count <= 4  # one for each size that was 0 or 1, and the general one


def test_nan_stays_in_its_sample():
    m = randn((3, 64), 0)
    m[1, 5] = math.nan
    m.requires_grad_()
    loss = launch_noise_mse(m.detach(), SEEDS)
    assert loss.isnan().tolist() == [False, True, False]
    out = launch_noise_mse(m.detach(), SEEDS, grad=torch.ones(3, device=DEVICE), out=torch.empty_like(m))
    assert out.isnan().nonzero().tolist() == [[1, 5]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_output": torch.zeros(2, 4, dtype=torch.int64)}, "model_output is torch.int64"),
        ({"model_output": torch.zeros(())}, "model_output has no dimension; needed: one row a sample"),
        ({"model_output": torch.zeros(2, 0)}, r"model_output has shape \(2, 0\)"),
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, "seeds is torch.int32"),
        ({"seeds": torch.arange(3)}, r"of \(2,\)"),
        ({"step": -1}, "step is -1"),
        ({"stream": 4}, "stream is 4"),
        ({"x0": torch.zeros(2, 4, dtype=torch.int64)}, "x0 is torch.int64"),
        ({"x0": torch.zeros(2, 5)}, r"x0 has shape \(2, 5\); model_output has \(2, 4\)"),
        ({"x0": torch.zeros(2, 4, requires_grad=True)}, r"give x0.detach\(\)"),
        ({"t": torch.zeros(2)}, "t is torch.float32"),
        ({"table": torch.zeros(10, 3)}, r"needed: float32 \[T, 2\]"),
        ({"x0": None}, "some of x0, t and table are missing"),
        ({"t": None}, "some of x0, t and table are missing"),
        ({"table": None}, "some of x0, t and table are missing"),
        ({"x0": None, "table": None}, "give all three, or none"),
    ],
)
def test_bad_arguments(change, words):
    pairs, t = torch.ones(10, 2), torch.zeros(2, dtype=torch.int64)
    good = dict(model_output=torch.zeros(2, 4), seeds=torch.arange(2), x0=torch.zeros(2, 4), t=t, table=pairs)
    noise_mse(**good)
    with pytest.raises(ValueError, match=words):
        noise_mse(**{**good, **change})

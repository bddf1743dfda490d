"""The step kernel against float64, within its arithmetic's bounds; memory, cursors, noise and non-finite values."""

import math

import pytest
import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import normal, reference, registration, reverse_step, reverse_step_
from fastddpm_kernels.lanes import memory_order
from fastddpm_kernels.reverse_step_kernel import launch_advance, launch_reverse_step
from helpers import DEVICE, Guarded, fenced, random_table, store_error
from trajectories import awkward_model, run

from fastddpm import NoiseSchedule, Sampler, solvers

EPS = 2.0**-24
NORMAL_ERROR = 4e-6
SHAPES = [(1,), (13,), (3, 5, 7), (1, 32, 32)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape, dtype, batch=3, seed=0, channels_last=False):
    generator = torch.Generator().manual_seed(seed)
    x, m, h1, h2, h3 = (torch.randn(batch, *shape, generator=generator) for _ in range(5))
    m = m.to(dtype)
    m = m.to(memory_format=torch.channels_last) if channels_last else m
    return [fenced(v) for v in (x, m, h1, h2, h3)]


def launch(x, m, table, cursor, seeds, *, histories=(), x0=True, **flags):
    """The kernel with guarded outputs: (out, model input, x0, nonfinite), after a look at the guards."""
    shape = tuple(x.shape)
    out, nonfinite = Guarded(shape), Guarded((shape[0],), torch.int32)
    clean = Guarded(shape)
    model_input = Guarded(shape, m.dtype, channels_last=memory_order(m)[0] > 0)
    buffers = dict(out=out.tensor, model_input=model_input.tensor, x0=clean.tensor if x0 else None)
    buffers |= dict(zip(("h1", "h2", "h3"), histories, strict=False))
    launch_reverse_step(x, m, table.float(), cursor, seeds, nonfinite.tensor, **buffers, block=64, **flags)
    assert all(g.intact() for g in (out, clean, model_input, nonfinite))
    return out.tensor, model_input.tensor, clean.tensor, nonfinite.tensor


def exact_step(x, m, table, cursor, z=None, histories=()):
    """float64 from the float32 table, and the sum of the absolute terms of x0 and of the update."""
    table, double = table.float().double(), [v.double() if v is not None else None for v in (x, m, z, *histories)]
    step = reference.reverse_step(double[0], double[1], table, cursor, *double[2:])
    magnitudes = table.abs()
    magnitudes[:, col.CLIP] = math.inf
    absolute = [v.abs() if v is not None else None for v in double]
    return step, reference.reverse_step(absolute[0], absolute[1], magnitudes, cursor, *absolute[2:])


def column(table, cursor, index, like):
    return table[cursor.long(), index].reshape(-1, *[1] * (like.ndim - 1))


def check_against_float64(x, m, table, cursor, seeds, histories=(), *, limited, noise):
    step = table[cursor.long(), col.STEP].long()
    z = reference.normal(seeds, x.shape[1:], step=step, stream=1, dtype=torch.float64) if noise else None
    exact, size = exact_step(x, m, table, cursor, z, histories)
    moved = [fenced(h) for h in histories]
    out, model_input, x0, nonfinite = launch(x, m, table, cursor, seeds, histories=moved, limited=limited, noise=noise)
    noise_error = NORMAL_ERROR * column(table, cursor, col.X_Z, x).abs() if noise else 0.0
    bound = 4 * EPS * size.x + store_error(exact.x, torch.float32) + noise_error
    assert ((out - exact.x).abs() <= bound).all()
    assert ((x0 - exact.x0).abs() <= 4 * EPS * size.x0 + store_error(exact.x0, torch.float32)).all()
    assert not nonfinite.any()

    following = cursor.long() + table[cursor.long(), col.ADVANCE].long()
    c_in = column(table, following, col.C_IN, x)
    scaled = c_in * exact.x
    input_bound = c_in.abs() * bound + 4 * EPS * scaled.abs() + store_error(scaled, m.dtype) * (1 + 1e-3)
    assert ((model_input.double() - scaled).abs() <= input_bound + torch.finfo(m.dtype).tiny).all()

    eager = reference.reverse_step(x, m, table.float(), cursor, None if z is None else z.float(), *histories)
    assert (out - exact.x).abs().max() <= 2 * (eager.x - exact.x).abs().max() + torch.as_tensor(noise_error).max() + EPS
    for new, old in zip(moved, (x0, *histories), strict=False):
        assert torch.equal(new, old)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "limited, noise, history",
    [(True, True, 0), (False, False, 0), (True, False, 1), (False, True, 2), (False, False, 3), (True, True, 3)],
)
def test_every_variant_against_float64(shape, dtype, limited, noise, history):
    x, m, *histories = inputs(shape, dtype)
    table = random_table(6, history=history, noise=noise, clip=0.7 if limited else math.inf)
    cursor = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
    seeds = torch.tensor([5, -6, 2**50], device=DEVICE)
    check_against_float64(x, m, table, cursor, seeds, histories[:history], limited=limited, noise=noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "solver, options", [("ddpm", {}), ("ddpm", {"variance": "fixed_large"}), ("ddim", {"eta": 0.5})]
)
def test_real_tables_against_float64(solver, options, prediction_type, dtype):
    made = solvers.make(solver, NoiseSchedule.linear(), 20, prediction_type=prediction_type, clip=1.0, **options)
    table = torch.tensor(made.with_identity(), device=DEVICE)
    x, m, *_ = inputs((3, 5, 7), dtype, batch=4)
    cursor = torch.tensor([0, 10, 19, 20], dtype=torch.int32, device=DEVICE)
    check_against_float64(x, m, table, cursor, torch.arange(4, device=DEVICE), limited=True, noise=made.stochastic)


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 16, 16)])
def test_channels_last_is_read_and_written_in_place_with_the_same_noise(shape):
    x, m, *_ = inputs(shape, torch.bfloat16)
    _, last, *_ = inputs(shape, torch.bfloat16, channels_last=True)
    assert memory_order(last) == (shape[1] * shape[2], shape[0])
    table = random_table(4, history=0)
    cursor, seeds = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE), torch.arange(3, device=DEVICE)
    plain = launch(x, m, table, cursor, seeds, limited=True, noise=True)
    other = launch(x, last, table, cursor, seeds, limited=True, noise=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


@pytest.mark.parametrize("shape", [(3, 5, 7), (4, 16, 16)])
def test_block_size_slot_and_company_do_not_matter(shape):
    x, m, *_ = inputs(shape, torch.float32, batch=4)
    table = random_table(5, history=0).float()
    cursor, seeds = (
        torch.tensor([0, 2, 1, 3], dtype=torch.int32, device=DEVICE),
        torch.tensor([9, 8, 7, 6], device=DEVICE),
    )
    made = {}
    for block in (64, 256, 1024):
        made[block] = torch.empty_like(x)
        launch_reverse_step(
            x, m, table, cursor, seeds, cursor * 0, out=made[block], limited=True, noise=True, block=block
        )
    assert torch.equal(made[64], made[256])
    assert torch.equal(made[64], made[1024])
    for b in range(4):
        one = slice(b, b + 1)
        alone, of_one = torch.empty_like(x[one]), (x[one], m[one], table, cursor[one], seeds[one])
        launch_reverse_step(*of_one, cursor[one] * 0, out=alone, limited=True, noise=True, block=256)
        assert torch.equal(alone[0], made[256][b])
        assert torch.equal(reverse_step(*of_one)[0][0], reverse_step(x, m, table, cursor, seeds)[0][b])


def test_in_place_is_the_same():
    x, m, *given = inputs((13,), torch.float32)
    histories = dict(zip(("h1", "h2", "h3"), given, strict=True))
    table = random_table(5).float()
    cursor, seeds = torch.tensor([0, 2, 1], dtype=torch.int32, device=DEVICE), torch.arange(3, device=DEVICE)
    out, x0, nonfinite = reverse_step(x, m, table, cursor, seeds, **histories)
    state, moved = x.clone(), {k: h.clone() for k, h in histories.items()}
    flags, model_input = torch.zeros_like(nonfinite), torch.empty_like(x)
    reverse_step_(state, m, table, cursor, seeds, flags, **moved, model_input=model_input)
    assert torch.equal(state, out)
    for new, old in zip(moved.values(), (x0, *given), strict=False):
        assert torch.equal(new, old)
    next_row = cursor.long() + table[cursor.long(), col.ADVANCE].long()
    assert torch.equal(model_input, table[next_row, col.C_IN][:, None] * out)


def test_a_sampler_hands_three_histories_on():
    """Rows of random coefficients, which look back beyond the first row too: there the histories are 0."""
    rows = random_table(7, noise=False)[:-1].cpu().numpy()
    rows[:, [col.S_0, col.S_V]] = 0
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = solvers.StepTable(rows)
    assert table.history == 3

    def model(x, t):
        return torch.from_numpy(awkward_model(x.numpy(), t[0].item()))

    torch.use_deterministic_algorithms(True)  # new memory is then filled with NaN
    try:
        made = Sampler(model, table, state_dtype=torch.float64).sample((2, 3), seeds=0, x_T=x)
    finally:
        torch.use_deterministic_algorithms(False)
    exact = run(table, awkward_model, x.numpy(), torch.zeros(6, 2, 3).numpy())[-1]
    torch.testing.assert_close(made, torch.from_numpy(exact), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("said", [0.5, math.nan, math.inf])
def test_an_identity_row_keeps_the_sample_whatever_the_model_says(said):
    x, m, *_ = inputs((3, 5, 7), torch.float32)
    m.fill_(said)
    table = random_table(4, history=0)
    cursor, seeds = torch.full((3,), 3, dtype=torch.int32, device=DEVICE), torch.arange(3, device=DEVICE)
    out, model_input, _, nonfinite = launch(x, m, table, cursor, seeds, limited=True, noise=True)
    assert torch.equal(out, x)
    assert torch.equal(model_input, x)
    assert not nonfinite.any()
    cpu = reverse_step(x.cpu(), m.cpu(), table.float().cpu(), cursor.cpu(), seeds.cpu())
    assert torch.equal(cpu[0], x.cpu())
    assert not cpu[2].any()


def test_without_a_limit_nothing_is_clipped():
    x, m, *_ = inputs((13,), torch.float32)
    table, cursor, seeds = random_table(4, history=0, clip=0.1), torch.zeros(3, dtype=torch.int32), torch.arange(3)
    x0 = reverse_step(x.cpu(), m.cpu(), table.float().cpu(), cursor, seeds, limited=False)[1]
    assert x0.abs().max() > 0.1
    made = launch(x, m, table, cursor.to(DEVICE), seeds.to(DEVICE), limited=False, noise=True)[2]
    assert (made.cpu() - x0).abs().max() < 1e-5


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_last_step_adds_no_noise(variance):
    made = solvers.ddpm(NoiseSchedule.linear(), variance=variance)
    table = torch.tensor(made.with_identity(), device=DEVICE)
    x, m, *_ = inputs((13,), torch.float32)
    last = torch.full((3,), made.num_rows - 1, dtype=torch.int32, device=DEVICE)
    results = [
        launch(x, m, table, last, torch.arange(3, device=DEVICE) + 1000 * k, limited=False, noise=True)[0]
        for k in range(3)
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    earlier = last - 1
    a, b = (
        launch(x, m, table, earlier, torch.arange(3, device=DEVICE) + k, limited=False, noise=True)[0] for k in (0, 9)
    )
    assert (a != b).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so where a GPU would not
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limited", [True, False])
def test_what_is_not_finite_is_flagged_not_laundered(bad, limited):
    x, m, *_ = inputs((3, 5, 7), torch.float32)
    table = random_table(4, history=0, clip=0.7 if limited else math.inf)
    cursor, seeds = torch.tensor([0, 2, 1], dtype=torch.int32, device=DEVICE), torch.arange(3, device=DEVICE)
    clean = launch(x, m, table, cursor, seeds, limited=limited, noise=True)
    m[1, 2, 4, 6] = bad
    out, _, x0, nonfinite = launch(x, m, table, cursor, seeds, limited=limited, noise=True)
    assert nonfinite.tolist() == [0, 3, 0]
    if math.isnan(bad):
        assert x0[1, 2, 4, 6].isnan()
        assert out[1, 2, 4, 6].isnan()
    for b in (0, 2):
        assert torch.equal(out[b], clean[0][b])
    # The flag keeps the first bad step.
    launch_reverse_step(
        x, m, table.float(), cursor * 0, seeds, nonfinite, out=out, limited=limited, noise=True, block=64
    )
    assert nonfinite.tolist() == [0, 3, 0]
    reference_flag = reverse_step(x.cpu(), m.cpu(), table.float().cpu(), cursor.cpu(), seeds.cpu(), limited=limited)[2]
    assert reference_flag.tolist() == [0, 3, 0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("batch", [1, 130])
def test_advance_moves_each_cursor_and_reads_its_next_time(dtype, batch):
    table = random_table(6).float()
    cursor = torch.arange(batch, dtype=torch.int32, device=DEVICE) % 6
    t = Guarded((batch,), dtype)
    expected = (cursor + 1).clamp(max=5)
    launch_advance(cursor, t.tensor, table, block=64)
    assert torch.equal(cursor, expected)
    assert torch.equal(t.tensor, table[expected.long(), col.T].to(dtype))
    assert t.intact()


def test_the_cpu_op_draws_the_kernels_noise():
    x, m, *_ = inputs((1, 32, 32), torch.float32)
    table = random_table(4, history=0)
    cursor, seeds = torch.tensor([0, 1, 2], dtype=torch.int32), torch.arange(3)
    made = reverse_step(x.cpu(), m.cpu(), table.float().cpu(), cursor, seeds)[0]
    out = launch(x, m, table, cursor.to(DEVICE), seeds.to(DEVICE), limited=True, noise=True)[0]
    assert (made - out.cpu()).abs().max() < 2e-5
    assert normal(seeds, (4,)).shape == (3, 4)


GOOD = dict(
    x=torch.zeros(2, 4),
    model_output=torch.zeros(2, 4),
    table=torch.zeros(3, len(col.COLUMNS)),
    cursor=torch.zeros(2, dtype=torch.int32),
    seeds=torch.zeros(2, dtype=torch.int64),
)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 4, dtype=torch.bfloat16)}, "the state is float32"),
        ({"model_output": torch.zeros(2, 5)}, r"model_output has shape \(2, 5\)"),
        ({"model_output": torch.zeros(2, 4, dtype=torch.int32)}, "model_output is torch.int32"),
        ({"table": torch.zeros(3, 4)}, r"needed: torch.float32 \[rows, 19\]"),
        ({"table": torch.zeros(3, len(col.COLUMNS), dtype=torch.float64)}, "table is torch.float64"),
        ({"cursor": torch.zeros(2, dtype=torch.int64)}, "cursor is torch.int64"),
        ({"cursor": torch.zeros(3, dtype=torch.int32)}, r"of \(2,\)"),
        ({"seeds": torch.zeros(2)}, "seeds is torch.float32"),
        ({"h2": torch.zeros(2, 4)}, "h2 is given without h1"),
        ({"h3": torch.zeros(2, 4), "h1": torch.zeros(2, 4)}, "h3 is given without h2"),
        ({k: torch.zeros(2, 5 if k == "h3" else 4) for k in ("h1", "h2", "h3")}, r"h3 has shape \(2, 5\)"),
        ({"h1": torch.zeros(2, 4, dtype=torch.float64)}, "h1 is torch.float64"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        reverse_step(**{**GOOD, **change})


@pytest.mark.parametrize(
    "change, words",
    [
        ({"nonfinite": torch.zeros(4, dtype=torch.int32)[::2]}, "nonfinite is not contiguous"),
        ({"x": torch.zeros(4, 2).T}, "x is not contiguous"),
        (
            {k: torch.zeros(4, 2).T for k in ("h1", "h2", "h3")} | {"h1": torch.zeros(2, 4), "h2": torch.zeros(2, 4)},
            "h3 is not contiguous",
        ),
        ({"x0": torch.zeros(2, 3)}, r"x0 has shape \(2, 3\)"),
        ({"x0": torch.zeros(2, 4, dtype=torch.bfloat16)}, "x0 and x differ in dtype"),
        ({"model_input": torch.zeros(1, 4)}, r"model_input has shape \(1, 4\)"),
        ({"model_input": torch.zeros(2, 4, dtype=torch.int32)}, "needed: a float dtype"),
        ({"model_input": torch.zeros(4, 2).T}, "model_input is written in place"),
    ],
)
def test_bad_buffers(change, words):
    with pytest.raises(ValueError, match=words):
        reverse_step_(**{**GOOD, "nonfinite": torch.zeros(2, dtype=torch.int32), **change})


def test_the_gpu_is_given_adjacent_elements():
    """An expanded or strided t, cursor or seeds is made contiguous before its pointer is taken."""
    seen = registration.on_its_device(lambda *args: args)
    vectors = (torch.zeros(2, 3), torch.full((1,), 5).expand(3), torch.arange(6)[::2], 7, None)
    made = seen(*vectors)
    assert made[1].stride() == made[2].stride() == (1,)
    assert torch.equal(made[2], vectors[2])
    assert made[0] is vectors[0]


def test_a_memory_layout_that_the_kernel_can_not_read():
    with pytest.raises(ValueError, match="needed: contiguous or channels_last"):
        memory_order(torch.zeros(2, 3, 4, 5).transpose(2, 3))


def test_a_single_element():
    """One sample of one number."""
    table = random_table(3, history=0, noise=False).float()
    x, m = fenced(torch.tensor([[0.25]])), fenced(torch.tensor([[-0.5]]))
    out, at, seeds = Guarded((1, 1)), torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(1).long().to(DEVICE)
    launch_reverse_step(x, m, table, at, seeds, at.clone(), out=out.tensor, limited=True, noise=False)
    exact = reference.reverse_step(x.double(), m.double(), table.double(), at).x
    assert (out.tensor - exact).abs().max() < 1e-6
    assert out.intact()

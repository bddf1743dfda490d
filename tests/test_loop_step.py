"""The step as a loop calls it: the same as `reverse_step_` and `advance_`, with its cursors in two buffers."""

import inspect

import pytest
import torch
from fastddpm_kernels import LoopStep, advance_, reference, reverse_step_, step_loop, step_registration
from fastddpm_kernels import columns as col
from fastddpm_kernels import constants as const
from fastddpm_kernels.reverse_step_kernel import launch_reverse_step
from helpers import DEVICE, Guarded, random_table
from torch import Tensor

from fastddpm import NoiseSchedule, Sampler, solvers
from fastddpm.buffers import NoiseAhead
from fastddpm.errors import InputError

SHAPE, ROWS, BATCH = (3, 4, 6), 5, 3
SEEDS = torch.tensor([5, -6, 2**50], device=DEVICE)


on_both = pytest.mark.parametrize("place", ["cpu", "kernel"])  # no fixture: the mutation test runs these too


def device_of(place: str, monkeypatch) -> torch.device:
    """Have `LoopStep` take the reference, or the kernel (interpreted where there is no GPU)."""
    if place == "kernel":
        monkeypatch.setattr(step_loop, "inplace_step", lambda x: step_registration._reverse_step_inplace_cuda)
    return torch.device("cpu") if place == "cpu" else torch.device(DEVICE)


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(where, *, guided: bool, history: int, whole: bool, given: bool, loop: bool):
    """ROWS + 1 steps of samples that begin at different rows, and end at the identity row: all that is written.

    (But the history: that of a finished sample may hold anything.)
    """
    calls = 2 * BATCH if guided else BATCH
    table = random_table(ROWS + 1, history=history).float().to(where)
    outputs = [values(calls, *SHAPE, seed=i).to(where) for i in range(ROWS + 1)]
    x, following = values(BATCH, *SHAPE, seed=50).to(where), torch.zeros(calls, *SHAPE, device=where)
    t = Guarded((calls,), torch.int64 if whole else torch.float32)
    cursors = Guarded((2, BATCH), torch.int32)
    cursors.tensor[:] = torch.tensor([0, 2, ROWS], dtype=torch.int32)
    flags = torch.zeros(BATCH, dtype=torch.int32, device=where)
    options = {f"h{k}": torch.zeros_like(x) for k in range(1, history + 1)}
    options |= {"guidance": torch.tensor([1.0, 7.5, -0.5], device=where)} if guided else {}
    options |= {"z": values(BATCH, *SHAPE, seed=51).to(where)} if given else {}
    seeds, seen = SEEDS.to(where), []
    if loop:
        step = LoopStep(
            x, table, cursors.tensor.to(where), t.tensor.to(where), seeds, flags, model_input=following, **options
        )
        for i, m in enumerate(outputs):
            step(m)
            seen.append((step.cursor.clone(), step._t.clone()))
            if i == 2:
                before = step.cursor.clone()
                step.turn_back()
                assert torch.equal(step.cursor, before)
    else:
        cursor, own_t = cursors.tensor[0].to(where), t.tensor.to(where)
        for m in outputs:
            reverse_step_(x, m, table, cursor, seeds, flags, model_input=following, **options)
            for half in own_t.split(BATCH):
                at = cursor.clone()
                advance_(at, half, table)
            cursor = at
            seen.append((cursor.clone(), own_t.clone()))
    assert t.intact()
    assert cursors.intact()
    return [x, following, flags, *(v for pair in seen for v in pair)]


@on_both
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("guided, history, given", [(False, 0, False), (True, 3, False), (True, 1, True)])
def test_it_is_reverse_step_and_advance(place, monkeypatch, guided, history, given, whole):
    where = device_of(place, monkeypatch)
    options = dict(guided=guided, history=history, whole=whole, given=given)
    for a, b in zip(run(where, loop=True, **options), run(where, loop=False, **options), strict=True):
        assert a.dtype == b.dtype
        assert (a.double() - b.double()).abs().max() <= 1e-4 * (1 + b.double().abs().max())
    cursor, t = run(where, loop=True, **options)[-2:]
    assert cursor.tolist() == [ROWS] * BATCH
    assert t.tolist() == [0] * len(t)  # the identity row's


@on_both
def test_two_launches_read_and_write_different_cursors(place, monkeypatch):
    """A program of a sample may be late: the cursor that it reads is not written by those before it."""
    where = device_of(place, monkeypatch)
    x = torch.zeros(1, 1, 32, 64, device=where)
    table, cursors = random_table(3, history=0).float().to(where), torch.zeros(2, 1, dtype=torch.int32, device=where)
    step = LoopStep(x, table, cursors, torch.zeros(1, device=where), SEEDS[:1].to(where), cursors[0].clone())
    step(x.clone())
    assert cursors.tolist() == [[0], [1]]
    step(x.clone())
    assert cursors.tolist() == [[2], [1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True])
def test_the_first_of_several_programs_writes_what_is_next(guided, dtype):
    """Two programs a sample, each cursor and time input between guards, and rows that advance by more than one."""
    table = random_table(ROWS + 1, history=0).float()
    table[:, col.ADVANCE] = torch.tensor([1.0, 4.0, 2.0, 1.0, 1.0, 0.0])
    x, calls = values(BATCH, 3, 5, 7, seed=0).to(DEVICE), 2 * BATCH if guided else BATCH
    assert const.chunk(105) > 16
    cursor, following, t = (
        torch.tensor([1, 2, ROWS], dtype=torch.int32, device=DEVICE),
        Guarded((BATCH,), torch.int32),
        Guarded((calls,), dtype),
    )
    options = {"guidance": torch.ones(BATCH, device=DEVICE)} if guided else {}
    m, flags = values(calls, 3, 5, 7, seed=1).to(DEVICE), torch.zeros(BATCH, dtype=torch.int32, device=DEVICE)
    buffers = dict(out=torch.empty_like(x), next_cursor=following.tensor, t=t.tensor)
    launch_reverse_step(x, m, table, cursor, SEEDS, flags, **buffers, limited=True, noise=True, block=16, **options)
    assert following.tensor.tolist() == [5, 4, 5]
    assert t.tensor.tolist() == [0, 10, 0] * (2 if guided else 1)
    assert cursor.tolist() == [1, 2, ROWS]
    assert following.intact()
    assert t.intact()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"cursors": torch.zeros(3, dtype=torch.int32)}, r"cursors have shape \(3,\); needed: \(2, 3\)"),
        ({"cursors": torch.zeros(3, 2, dtype=torch.int32).T}, "contiguous"),
        ({"cursors": torch.zeros(2, 3)}, "cursor is torch.float32"),
        ({"t": torch.zeros(4)}, r"t is .* needed: .*\(3,\)"),
        ({"t": torch.zeros(6)[::2]}, "not contiguous"),
        ({"seeds": torch.zeros(3)}, "seeds is torch.float32"),
        ({"seeds": torch.zeros(6).long()[::2]}, "not contiguous"),
        ({"seeds": None}, "seeds is a NoneType"),
        ({"cursors": [[0, 0, 0], [0, 0, 0]]}, "cursors is a list"),
        ({"cursors": torch.zeros(3, 3, dtype=torch.int32)}, r"cursors have shape \(3, 3\)"),
        ({"t": 0}, "t is a int"),
        ({"x": 0}, "x is a int"),
        ({"guidance": torch.ones(3)}, r"t is .* needed: .*\(6,\)"),
        ({"x": torch.zeros(3, 4)[:, ::2]}, "x is not contiguous"),
        ({"table": torch.zeros(3, 5)}, "table is"),
    ],
)
def test_bad_buffers(change, words):
    good = dict(
        x=torch.zeros(3, 2),
        table=random_table(3).float().cpu(),
        cursors=torch.zeros(2, 3, dtype=torch.int32),
        t=torch.zeros(3),
        seeds=torch.zeros(3, dtype=torch.int64),
        nonfinite=torch.zeros(3, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=words):
        LoopStep(**{**good, **change})


def test_its_options_and_their_defaults_are_those_of_reverse_step_():
    ours, theirs = (inspect.signature(f).parameters for f in (LoopStep, reverse_step_))
    for name in ours.keys() - {"cursors", "t"}:
        assert ours[name].default == theirs[name].default, name
    assert theirs.keys() - ours.keys() == {"model_output", "cursor"}


def test_a_wrong_output_is_refused_and_moves_nothing():
    x, cursors = torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)
    table = random_table(3, history=0).float().cpu()
    step = LoopStep(x, table, cursors, torch.zeros(3), torch.zeros(3).long(), torch.zeros(3, dtype=torch.int32))
    for bad, words in ((torch.zeros(3, 4), "needed: "), (torch.zeros(3, 2).int(), "torch.int32"), (None, "NoneType")):
        with pytest.raises(ValueError, match=words):
            step(bad)
    assert not cursors.any()
    assert not x.any()


# --- noise that is given to `Sampler.sample` --------------------------------------------------------------------------

SCHEDULE = NoiseSchedule.cosine(30)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) + 0.01 * t[:, None, None].to(x.dtype)


def both(x: Tensor, t: Tensor) -> Tensor:
    """With a learned variance."""
    return torch.cat([model(x, t), torch.sin(x)], dim=1)


TABLES = {
    "ddpm": (solvers.ddpm(SCHEDULE, clip=1.0), model),
    "learned": (solvers.ddpm(SCHEDULE, variance="learned_range"), both),
    "history": (solvers.dpm_solver(SCHEDULE, 10, algorithm="sde-dpmsolver++"), model),
    "noiseless": (solvers.ddim(SCHEDULE, 10), model),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_seeds_own_noise_given_back(name):
    table, called = TABLES[name]
    seeds, asked = torch.tensor([3, 4]), []

    def noise(row: int) -> Tensor:
        asked.append(row)
        return reference.normal(seeds, (3, 8), step=row, stream=1)

    sampler = Sampler(called, table)
    given = sampler.sample((2, 3, 8), seeds=[3, 4], noise=noise)
    assert torch.equal(given, sampler.sample((2, 3, 8), seeds=[3, 4]))
    assert asked == list(range(table.num_rows))


def test_no_noise_is_none():
    table, called = TABLES["ddpm"]
    made = Sampler(called, table).sample((2, 3, 8), seeds=0, noise=lambda row: None)
    again = Sampler(called, table).sample((2, 3, 8), seeds=0, noise=lambda row: torch.zeros(2, 3, 8))
    assert torch.equal(made, again)
    assert not torch.equal(made, Sampler(called, table).sample((2, 3, 8), seeds=0))


def test_noise_of_another_dtype_is_converted():
    table, called = TABLES["ddpm"]
    z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = Sampler(called, table).sample((2, 3, 8), seeds=0, noise=lambda row: z)
    assert torch.equal(made, Sampler(called, table).sample((2, 3, 8), seeds=0, noise=lambda row: z.float()))


def test_given_noise_is_for_one_batch():
    table, called = TABLES["ddpm"]
    with pytest.raises(InputError, match="noise is for one batch"):
        Sampler(called, table, batch_size=2).sample((4, 3, 8), seeds=0, noise=lambda row: None)


def test_the_callback_sees_each_row():
    table, called = TABLES["ddpm"]
    seen = []
    sampler = Sampler(called, table)
    made = sampler.sample((2, 3, 8), seeds=0, callback=lambda row, x: seen.append((row, x.clone())))
    states = [step.x for step in sampler.trace((2, 3, 8), seeds=0)]
    assert [row for row, _ in seen] == list(range(table.num_rows))
    assert all(torch.equal(x, state) for (_, x), state in zip(seen, states, strict=True))
    assert torch.equal(made, states[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("most", [1, 2 * 3 * 7, 4 * 2 * 3 * 7, 1 << 20])
def test_noise_made_ahead_is_the_steps_own(most, dtype, monkeypatch):
    monkeypatch.setattr(NoiseAhead, "MOST", most)
    table, seeds, like = TABLES["ddpm"][0], torch.tensor([2**63 - 1, -1]), torch.zeros(2, 3, 7, dtype=dtype)
    made = NoiseAhead(seeds, like, table.num_rows)
    for row in (0, 1, 29, 4, 3, 28):
        expected = reference.normal(seeds, (3, 7), step=row, stream=1, dtype=dtype)
        assert torch.equal(made(row), expected)

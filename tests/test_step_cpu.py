"""The step's CPU implementation: samples at one row and at several, what is not finite, and what goes in and out."""

import itertools
import math

import pytest
import torch
from fastddpm_kernels import LoopStep, advance_, normal, reference, reverse_step, reverse_step_
from fastddpm_kernels import columns as col
from helpers import random_table
from torch import Tensor

ROWS, BATCH, SHAPE = 5, 3, (2, 4, 4)  # whole vectors: of what is left over torch takes exp2 another way
FLAGS = dict(limited=True, dynamic=False, noise=True, learned=False, direct=True)
EVERYTHING = dict(guided=True, learned=True, inpaint=True, history=3, given=True)
VARIANTS = [
    {},
    dict(history=3, given=True),
    dict(guided=True, rescaled=True),
    dict(learned=True, inpaint=True),
    dict(learned=True, given=True),
    EVERYTHING,
]
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
each_limit = pytest.mark.parametrize("limit", ["clip", "dynamic", "none"])


def values(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def table_of(dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows' numbers are not their steps, and every second row is without a ratio."""
    table = random_table(ROWS + 1).cpu()
    table[:, col.STEP] += 10
    table[0:ROWS:2, col.RATIO] = 0.7
    table[:ROWS, col.CLIP] = torch.linspace(1.1, 2, ROWS, dtype=torch.float64)
    return table.to(dtype)


def inputs(
    cursor: list[int], dtype=torch.float32, *, guided=False, rescaled=False, learned=False, inpaint=False, history=0,
    given=False,
):  # fmt: skip
    """The op's arguments for samples at these rows."""
    batch = len(cursor)
    calls, channels = (2 if guided else 1) * batch, (2 if learned else 1) * SHAPE[0]
    made = dict(
        x=values(batch, *SHAPE, seed=0, dtype=dtype),
        model_output=values(calls, channels, *SHAPE[1:], seed=1, dtype=dtype),
        table=table_of(dtype),
        cursor=torch.tensor(cursor, dtype=torch.int32),
        seeds=torch.arange(batch) - 1,
    )
    made |= {f"h{k}": values(batch, *SHAPE, seed=1 + k, dtype=dtype) for k in range(1, history + 1)}
    if guided:
        made["guidance"] = torch.linspace(-1, 7.5, batch, dtype=dtype)
    if rescaled:
        made["rescale"] = torch.linspace(0.2, 1, batch, dtype=dtype)
    if inpaint:
        made["known"] = values(batch, *SHAPE, seed=5, dtype=dtype)
        made["mask"] = values(batch, *SHAPE, seed=6, dtype=dtype) > 0
    if given:
        made["z"] = values(batch, *SHAPE, seed=7, dtype=dtype)
    return made | {"learned": learned}


def limits(limit: str) -> dict[str, bool]:
    return dict(limited=limit != "none", dynamic=limit == "dynamic")


def picked(made: dict, samples: list[int]) -> dict:
    """The arguments of these samples alone."""
    batch = len(made["x"])

    def pick(name, v):
        if not isinstance(v, Tensor) or name == "table":
            return v
        return torch.cat([half[samples] for half in v.split(batch)])

    return {name: pick(name, v) for name, v in made.items()}


# --- samples at one row are those at several --------------------------------------------------------------------------


@each_variant
@each_limit
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_at_one_row_are_those_in_other_company(variant, limit, dtype):
    """Bit for bit: a row's numbers multiply as its tensors do; float64 is made in float64."""
    for row in range(ROWS + 1):
        mixed = inputs([row, row, row, (row + 1) % (ROWS + 1)], dtype, **variant)
        alike = picked(mixed, [0, 1, 2])
        assert reference.common_row(mixed["table"], mixed["cursor"]) is None
        assert reference.common_row(alike["table"], alike["cursor"]) is not None
        expected = reverse_step(**mixed, **limits(limit))
        made = reverse_step(**alike, **limits(limit))
        for a, b in zip(made, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b[:3])
        assert made[0].dtype == made[1].dtype == dtype
        assert made[2].dtype == torch.int32


@each_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dynamic_thresholding_where_all_are_at_one_row(variant, dtype):
    """With a ratio x0 is within 1 and reaches it; without one it is clipped."""
    for row, bound in ((2, 1.0), (3, table_of(dtype)[3, col.CLIP].item())):
        made = inputs([row] * 3, dtype, **variant)
        made["model_output"] *= 20
        x0 = reverse_step(**made, dynamic=True)[1]
        assert ((x0.abs().flatten(1).amax(1) - bound).abs() <= 1e-6).all()


def test_the_common_row():
    table = table_of()

    def of(*cursor: int) -> list[float] | None:
        return reference.common_row(table, torch.tensor(cursor, dtype=torch.int32))

    assert of(2, 2, 2) == table[2].tolist()
    assert of(4) == table[4].tolist()
    assert of(1, 0, 0) is None
    assert of(0, 0, 1) is None
    assert of(0, 1, 0) is None
    assert of() is None


@each_variant
@each_limit
@pytest.mark.parametrize("others", [[], [0, 3]])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_at_the_identity_row_anything_may_stand(variant, limit, others, bad):
    """All at it, or one among others: the sample stays, and nothing is flagged."""
    made = inputs([*others, ROWS, ROWS], **variant)
    for name, v in made.items():
        if name not in ("x", "table", "cursor", "seeds", "mask", "learned"):
            for half in v.split(len(made["x"])):
                half[-2:] = bad
    out, x0, flags = reverse_step(**made, **limits(limit))
    assert torch.equal(out[-2:], made["x"][-2:])
    assert not x0[-2:].isnan().any()
    assert not flags.any()
    assert out.isfinite().all()


@pytest.mark.filterwarnings("ignore:std")  # torch's own, of no samples
@each_variant
@each_limit
def test_no_samples(variant, limit):
    made = inputs([], **variant)
    out, x0, flags = reverse_step(**made, **limits(limit))
    assert out.shape == x0.shape == (0, *SHAPE)
    assert flags.shape == (0,)
    assert flags.dtype == torch.int32
    flags, following = flags.clone(), torch.empty(made["model_output"].shape[0], *SHAPE)
    reverse_step_(**made, nonfinite=flags, model_input=following, **limits(limit))
    made["cursors"] = torch.zeros(2, 0, dtype=torch.int32)
    m, _ = made.pop("model_output"), made.pop("cursor")
    step = LoopStep(**made, t=torch.zeros(len(m)), nonfinite=flags, model_input=following, **limits(limit))
    step(m)
    step.turn_back()
    assert step.cursor.shape == (0,)


# --- what is not finite -----------------------------------------------------------------------------------------------


def test_finite_samples():
    """A sum that overflows says nothing, nor one of infinities that cancel."""
    clean, large = torch.ones(3, 2, 4), torch.full((3, 2, 4), 3e38)
    assert large.sum().isinf()
    for parts in ((clean,), (large,), (clean, large), (large, clean), (-large, large)):
        assert reference.finite_samples(*parts).tolist() == [True, True, True]
    assert reference.finite_samples(clean).dtype == torch.bool
    for bad, sample in itertools.product((math.nan, math.inf, -math.inf), range(3)):
        for like in (clean, large):
            broken = like.clone()
            broken[sample, 1, 3] = bad
            expected = [b != sample for b in range(3)]
            for parts in ((broken,), (clean, broken), (broken, clean), (large, broken), (broken, broken)):
                assert reference.finite_samples(*parts).tolist() == expected, (bad, sample)
    cancel = clean.clone()
    cancel[0, 0, 0], cancel[0, 1, 1] = math.inf, -math.inf
    assert reference.finite_samples(cancel).tolist() == [False, True, True]
    other = clean.clone()
    other[2, 0, 0] = math.nan
    assert reference.finite_samples(cancel, other).tolist() == [False, True, False]
    cancel[0, 1, 1], cancel[1, 1, 1] = 1, -math.inf  # between samples
    assert reference.finite_samples(cancel).tolist() == [False, False, True]
    assert reference.finite_samples(torch.ones(0, 2, 4)).tolist() == []


@pytest.mark.parametrize("limit", [True, False])
@pytest.mark.parametrize("cursor", [[1, 1, 1], [1, 0, 3]])
def test_large_numbers_are_finite_and_infinities_that_cancel_are_not(cursor, limit):
    made = inputs(cursor)
    made["table"][:ROWS, [col.X0_X, col.X0_M]] = torch.tensor([0.0, 1.0])
    made["model_output"].fill_(3e38)
    assert reverse_step(**made, limited=limit)[2].tolist() == [0, 0, 0]
    made["model_output"][1, 0, 0, 0], made["model_output"][1, 1, 2, 2] = math.inf, -math.inf
    flags = reverse_step(**made, limited=limit)[2]
    assert flags.tolist() == [0, cursor[1] + 11, 0]
    assert flags.dtype == torch.int32


@pytest.mark.parametrize("cursor", [[2, 2, 2], [2, 0, 3]])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("guided", [True, False])
def test_a_variance_that_is_not_finite_is_flagged_where_it_is_read(cursor, bad, guided):
    made = inputs(cursor, guided=guided, learned=True)
    made["model_output"][-3:][2, 3, 1, 1] = bad
    assert reverse_step(**made)[2].tolist() == [0, 0, cursor[2] + 11]
    made["model_output"][-3:][0, 2, 1, 1] = bad
    assert reverse_step(**made)[2].tolist() == [cursor[0] + 11, 0, cursor[2] + 11]
    made = inputs(cursor, guided=guided, learned=True)  # and the prediction is looked at as well
    made["model_output"][-3:][1, 0, 1, 1] = bad
    assert reverse_step(**made)[2].tolist() == [0, cursor[1] + 11, 0]
    if guided:  # the unconditional half's variance has no part in the step
        made = inputs(cursor, guided=True, learned=True)
        made["model_output"][:3][2, 3, 1, 1] = bad
        assert not reverse_step(**made)[2].any()


@pytest.mark.parametrize("loop", [True, False])
def test_the_flag_keeps_the_first_bad_step(loop):
    made = inputs([0, 0, 2])
    outputs = [made.pop("model_output") for _ in range(1)] + [made["x"] * 0.5 for _ in range(3)]
    outputs[1][0], outputs[2][2, 0, 0, 0], outputs[2][0] = math.nan, math.inf, math.nan
    made["x"] = made["x"].clone()
    flags, cursors = torch.zeros(3, dtype=torch.int32), torch.stack([made["cursor"]] * 2)
    made["table"][:, [col.X_X, col.X_X0, col.X_M, col.X_Z]] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    cursor, t, seen = made.pop("cursor"), torch.zeros(3), []
    step = LoopStep(**made, cursors=cursors, t=t, nonfinite=flags) if loop else None
    for m in outputs:
        if step is not None:
            step(m)
        else:
            reverse_step_(**made, model_output=m, cursor=cursor, nonfinite=flags)
            advance_(cursor, t, made["table"])
        seen.append(flags.tolist())
    assert seen == [[0, 0, 0], [12, 0, 0], [12, 0, 15], [12, 0, 15]]


# --- what is written in place -----------------------------------------------------------------------------------------


@each_variant
@each_limit
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("cursor", [[1, 1, 1], [0, 3, ROWS]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_and_as_a_loop_calls_it(variant, limit, scaled, cursor, dtype):
    """All buffers, bit for bit what the op returns."""
    made = inputs(cursor, dtype, **variant)
    table, x, m = made["table"], made["x"], made["model_output"]
    calls = (2 if "guidance" in made else 1) * BATCH
    out, x0, flags = reverse_step(**made, **limits(limit))
    row = made["cursor"].long()
    following = row + table[row, col.ADVANCE].long()
    scale = table[following, col.C_IN].reshape(-1, 1, 1, 1) if scaled else 1.0
    histories = {k: made[k] for k in ("h1", "h2", "h3") if k in made}
    for loop in (False, True):
        state = {name: v.clone() for name, v in histories.items()} | {"x": x.clone()}
        clean, bad, t = torch.full_like(x, math.nan), torch.zeros_like(flags), torch.full((calls,), -1)
        model_input = torch.full((calls, *SHAPE), math.nan, dtype=dtype)
        buffers = made | state | dict(nonfinite=bad, model_input=model_input, x0=clean, scaled=scaled) | limits(limit)
        if loop:
            del buffers["model_output"], buffers["cursor"]
            cursors = torch.stack([made["cursor"], made["cursor"] + 90])
            step = LoopStep(**buffers, cursors=cursors, t=t)
            assert step.cursor.data_ptr() == cursors.data_ptr()
            step(m)
            assert step.cursor.data_ptr() == cursors[1].data_ptr()
            assert cursors.tolist() == [cursor, following.tolist()]
            assert t.tolist() == table[following, col.T].long().tolist() * (calls // BATCH)
            step.turn_back()
            assert cursors.tolist() == [following.tolist()] * 2
            assert step.cursor.data_ptr() == cursors.data_ptr()
        else:
            reverse_step_(**buffers)
            assert (made["cursor"].tolist(), t.tolist()) == (cursor, [-1] * calls)
        assert torch.equal(state["x"], out)
        assert torch.equal(clean, x0)
        assert torch.equal(bad, flags)
        assert all(torch.equal(half, scale * out) for half in model_input.split(BATCH))
        newer = dict(zip(("h1", "h2", "h3"), (x0, *histories.values()), strict=False))
        assert all(torch.equal(state[name], newer[name]) for name in histories)


@pytest.mark.parametrize("flag", ["limited", "dynamic", "noise", "direct", "learned"])
@pytest.mark.parametrize("cursor", [[2, 2, 2], [0, 3, 2]])
def test_each_flag_reaches_the_step(flag, cursor):
    """As the op and as a loop calls it the same, and another than without the flag."""
    made = {}
    for value in (True, False):
        given = inputs(cursor, learned=value and flag == "learned")
        del given["learned"]
        x, flags = given["x"].clone(), torch.zeros(3, dtype=torch.int32)
        options = FLAGS | {flag: value}
        made[value] = reverse_step(**given, **options)[0]
        m, at = given.pop("model_output"), given.pop("cursor")
        step = LoopStep(**given | {"x": x}, cursors=torch.stack([at, at]), t=torch.zeros(3), nonfinite=flags, **options)
        step(m)
        assert torch.equal(x, made[value])
    assert not torch.equal(made[True], made[False])


def test_the_noise_is_the_seeds_at_the_rows_step():
    """Stream 1 for the step, stream 3 for what is known; with given noise only the latter."""
    made = inputs([3, 3, 3], torch.float64, inpaint=True)
    row, steps = made["table"][3], torch.tensor([13, 13, 13])
    step_z, known_z = (
        reference.normal(made["seeds"], SHAPE, step=steps, stream=s, dtype=torch.float64) for s in (1, 3)
    )
    out = reverse_step(**made)[0]
    given = reverse_step(**made, z=torch.zeros_like(step_z))[0]
    without = reverse_step(**made, noise=False)[0]
    nothing_read = reverse_step(**made, z=torch.full_like(step_z, math.nan), noise=False)[0]
    mask = made["mask"]
    there = row[col.K_X] * made["known"] + row[col.K_Z] * known_z
    for one in (out, given, without, nothing_read):
        assert (one - there)[mask].abs().max() <= 1e-12
    assert ((out - without) - row[col.X_Z] * step_z)[~mask].abs().max() <= 1e-12
    assert torch.equal(given, without)
    assert torch.equal(nothing_read, without)
    assert torch.equal(reverse_step(**made, z=step_z)[0], out)


def test_a_cursor_comes_to_its_rows_time_in_the_times_own_dtype():
    for dtype in (torch.int64, torch.float32, torch.bfloat16):
        cursor, t = torch.tensor([0, 4, 5], dtype=torch.int32), torch.zeros(3, dtype=dtype)
        advance_(cursor, t, table_of())
        assert cursor.tolist() == [1, 5, 5]
        assert t.tolist() == [40, 0, 0]


def test_a_sample_may_be_one_number():
    """A state of shape [B]: flagged, thresholded and rescaled as any other."""
    x, m, seeds = torch.tensor([1.0, 2.0]), torch.tensor([0.5, torch.nan]), torch.zeros(2, dtype=torch.int64)
    table, cursor = random_table(3, history=0).float().cpu(), torch.zeros(2, dtype=torch.int32)
    table[:, col.RATIO] = 0.5
    both, weights = torch.cat([m, m]), torch.tensor([2.0, 3.0])
    for options in ({}, {"dynamic": True}, {"guidance": weights, "rescale": weights / 10}):
        output = both if "guidance" in options else m
        flags = reverse_step(x, output, table, cursor, seeds, **options)[2]
        assert flags.tolist() == [0, 1]


def test_torchs_defaults_change_nothing():
    """Another default dtype or device is the caller's affair."""
    seeds, table = torch.tensor([3, -4]), random_table(3, history=0).float().cpu()
    x, cursor = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2], dtype=torch.int32)
    same = torch.full_like(cursor, 2)
    noise = normal(seeds, (5,))
    expected = [reverse_step(x, x, table, at, seeds)[0] for at in (cursor, same)]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again = normal(seeds, (5,))
            made = [reverse_step(x, x, table, at, seeds)[0] for at in (cursor, same)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert again.dtype == torch.float32
    assert torch.equal(again, noise)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))

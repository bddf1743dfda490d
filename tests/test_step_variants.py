"""The step kernel's variants against float64: guidance, learned variance, inpainting, bounds, what flags leave out."""

import itertools
import math

import pytest
import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import reference, reverse_step, reverse_step_, step_registration
from fastddpm_kernels.lanes import division, memory_order
from fastddpm_kernels.reverse_step_kernel import launch_reverse_step
from helpers import DEVICE, Guarded, fenced, random_table, store_error
from torch import Tensor

EPS, NORMAL_ERROR, BATCH = 2.0**-24, 4e-6, 3
CURSOR = torch.tensor([0, 3, 4], dtype=torch.int32, device=DEVICE)
SEEDS = torch.tensor([5, -6, 2**50], device=DEVICE)
HISTORY = ("h1", "h2", "h3")


def values(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(
    shape, dtype, *, guided=False, learned=False, history=0, inpaint=False, given_noise=False, last=False
) -> dict[str, Tensor]:
    """The state and whatever else a variant reads, each between NaN."""
    samples, channels = (2 if guided else 1) * BATCH, (2 if learned else 1) * shape[0]
    m = values(samples, channels, *shape[1:], seed=1, dtype=dtype)
    given = {"x": values(BATCH, *shape, seed=0), "m": m.to(memory_format=torch.channels_last) if last else m}
    given |= {f"h{k}": values(BATCH, *shape, seed=2 + k) for k in range(1, history + 1)}
    if inpaint:
        given["known"] = values(BATCH, *shape, seed=5)
    if given_noise:
        given["z"] = values(BATCH, *shape, seed=7)
    given = {name: fenced(v) for name, v in given.items()}
    if inpaint:
        given["mask"] = (values(BATCH, *shape, seed=6) > 0).to(DEVICE)
    if guided:
        given["guidance"] = torch.tensor([1.0, 7.5, -0.5], device=DEVICE)
    return given


def launched(table, *, limited=True, noise=True, learned=False, last=False, block=64, x, m, **read):
    """The kernel's (x', model input, x0, h1', h2', h3'), after a look at the guards."""
    shape = tuple(x.shape)
    histories = {k: fenced(read.pop(k)) for k in HISTORY if k in read}
    out, clean, flags = Guarded(shape), Guarded(shape), Guarded(shape[:1], torch.int32)
    model_input = Guarded((2 * BATCH if "guidance" in read else BATCH, *shape[1:]), m.dtype, channels_last=last)
    buffers = dict(out=out.tensor, model_input=model_input.tensor, x0=clean.tensor, **histories, **read)
    flag = dict(limited=limited, noise=noise, learned=learned)
    launch_reverse_step(x, m, table.float(), CURSOR, SEEDS, flags.tensor, block=block, **buffers, **flag)
    assert all(g.intact() for g in (out, clean, flags, model_input))
    assert not flags.tensor.any()
    return out.tensor, model_input.tensor, clean.tensor, *(histories.get(k) for k in HISTORY)


def column(table, index, like):
    return table.float().double()[CURSOR.long(), index].reshape(-1, *[1] * (like.ndim - 1))


def magnitude_of_prediction(m, guidance, learned):
    """The sum of the absolute terms of the guided m."""
    m = m.double().abs()
    m = m.chunk(2, dim=1)[0] if learned else m
    if guidance is None:
        return m
    unconditional, conditional = m.chunk(2)
    return unconditional + guidance.double().abs().reshape(-1, 1, 1, 1) * (conditional + unconditional)


def check(table, given, *, limited=True, noise=True, learned=False, last=False, block=64):
    """Every output against float64, within the bound of the arithmetic that made it."""
    x, m = given["x"], given["m"]
    read = {k: v for k, v in given.items() if k not in ("x", "m")}
    step = table[CURSOR.long(), col.STEP].long()
    z, known_z = (
        reference.normal(SEEDS, x.shape[1:], step=step, stream=stream, dtype=torch.float64) for stream in (1, 3)
    )
    double = {k: v.double() if v.is_floating_point() else v for k, v in read.items()}
    z = double.pop("z", z)
    flags = dict(limited=limited, learned=learned)
    exact = reference.reverse_step(
        x.double(),
        m.double(),
        table.float().double(),
        CURSOR,
        z if noise else None,
        known_noise=known_z,
        **double,
        **flags,
    )
    c = {name: column(table, i, x) for i, name in enumerate(col.COLUMNS)}
    size_m = magnitude_of_prediction(m, read.get("guidance"), learned) * c["advance"]
    size_x0 = (c["x0_x"] * x).abs() + c["x0_m"].abs() * size_m
    size = (c["x_x"] * x).abs() + c["x_x0"].abs() * size_x0 + c["x_m"].abs() * size_m
    size += sum((c[f"x_{h}"] * read[h]).abs() for h in HISTORY if h in read)
    noise_error = 0.0
    if noise:
        scale = c["x_z"].abs()
        if learned:  # of 2^a an error of a is relative; and ex2 has 2^-22
            v = m.double()[-BATCH:].chunk(2, dim=1)[1] * c["advance"]
            scale = scale * torch.exp2(c["s_0"] + c["s_v"] * v)
            exponent = c["s_0"].abs() + (c["s_v"] * v).abs()
            noise_error = scale * z.abs() * (2.0**-22 + 2 * EPS * exponent)
        noise_error = noise_error + NORMAL_ERROR * scale
        size += scale * z.abs()
    if "known" in read:
        size += (c["k_x"] * read["known"]).abs() + (c["k_z"] * known_z).abs()
        noise_error = noise_error + NORMAL_ERROR * c["k_z"].abs()

    before = {name: tensor.clone() for name, tensor in given.items() if name not in HISTORY}
    out, model_input, x0, *moved = launched(table, **given, **flags, noise=noise, last=last, block=block)
    assert all(torch.equal(given[name], tensor) for name, tensor in before.items())  # only what is an output is written
    bound = 6 * EPS * size + noise_error + store_error(exact.x, torch.float32)
    assert ((out - exact.x).abs() <= bound).all()
    assert ((x0 - exact.x0).abs() <= 6 * EPS * size_x0 + store_error(exact.x0, torch.float32)).all()
    following = CURSOR.long() + table[CURSOR.long(), col.ADVANCE].long()
    scaled = table.float().double()[following, col.C_IN].reshape(-1, 1, 1, 1) * out.double()
    for half in model_input.split(BATCH):
        allowed = 2 * EPS * scaled.abs() + store_error(scaled, m.dtype) * (1 + 1e-3) + torch.finfo(m.dtype).tiny
        assert ((half.double() - scaled).abs() <= allowed).all()
    given_on = {"h1": x0} | {older: read[newer] for newer, older in itertools.pairwise(HISTORY) if older in read}
    for name, history in zip(HISTORY, moved, strict=True):
        assert (history is None) == (name not in read)
        assert history is None or torch.equal(history, given_on[name])


VARIANTS = [
    dict(guided=True),
    dict(learned=True),
    dict(inpaint=True),
    dict(history=3),
    dict(guided=True, learned=True),
    dict(guided=True, inpaint=True, history=1),
    dict(learned=True, inpaint=True, history=2),
    dict(guided=True, learned=True, inpaint=True, history=3),
    dict(given_noise=True),
    dict(guided=True, learned=True, inpaint=True, history=3, given_noise=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v))
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 4, 4)])
def test_a_variant_against_float64(variant, shape, dtype):
    table = random_table(6, history=variant.get("history", 0))
    check(table, inputs(shape, dtype, **variant), learned=variant.get("learned", False))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v))
def test_a_variant_that_fills_its_blocks(variant):
    """32 x 32: the program without masks, as the launcher chooses it."""
    assert division(1024).full
    table = random_table(6, history=variant.get("history", 0))
    given = inputs((1, 32, 32), torch.bfloat16, **variant)
    check(table, given, learned=variant.get("learned", False), block=None)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v))
def test_channels_last_is_the_same(variant):
    learned = variant.get("learned", False)
    table = random_table(6, history=variant.get("history", 0))
    plain = inputs((3, 5, 7), torch.bfloat16, **variant)
    last = inputs((3, 5, 7), torch.bfloat16, **variant, last=True)
    assert memory_order(last["m"])[0] == 35
    made = launched(table, **plain, learned=learned)
    other = launched(table, **last, learned=learned, last=True)
    for a, b in zip(made, other, strict=True):
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("block", [128, 1024])
def test_block_size_does_not_matter(block):
    variant = dict(guided=True, learned=True, inpaint=True, history=3)
    table, given = random_table(6), inputs((3, 5, 7), torch.float32, **variant)
    for a, b in zip(
        launched(table, **given, learned=True), launched(table, **given, learned=True, block=block), strict=True
    ):
        assert torch.equal(a, b)


def test_guidance_of_1_is_the_conditional_model_and_of_0_the_unconditional_one():
    table, given = random_table(6, history=0), inputs((3, 5, 7), torch.float32, guided=True)
    unconditional, conditional = given["m"].chunk(2)
    for weight, m in ((0.0, unconditional), (1.0, conditional)):
        weights = torch.full((BATCH,), weight, device=DEVICE)
        made = launched(table, **given | {"guidance": weights})[0]
        alone = launched(table, x=given["x"], m=fenced(m))[0]
        assert (made - alone).abs().max() <= 1e-5


def test_a_rescaled_prediction_is_multiplied_by_its_factor():
    table, given = random_table(6, history=0), inputs((3, 5, 7), torch.float32, guided=True)
    factor = torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    made = launched(table, **given, rescale=factor)[0]
    unconditional, conditional = given["m"].chunk(2)
    m = reference.guided(conditional, unconditional, given["guidance"]) * factor.reshape(-1, 1, 1, 1)
    assert (made - launched(table, x=given["x"], m=fenced(m))[0]).abs().max() <= 2e-5


def test_a_bound_limits_and_scales():
    table, given = random_table(6, history=0, noise=False), inputs((3, 5, 7), torch.float32)
    bound = torch.tensor([[0.5, 2.0], [0.25, 4.0], [1e9, 1.0]], device=DEVICE)
    raw = launched(table, **given, limited=False, noise=False)[2]
    x0 = launched(table, **given, bound=bound, noise=False)[2]
    s, scale = (b.reshape(-1, 1, 1, 1) for b in bound.unbind(1))
    assert torch.equal(x0, raw.clamp(-s, s) * scale)
    assert x0[0].abs().max() == 1.0


@pytest.mark.parametrize("what", ["direct", "scaled"])
def test_a_flag_leaves_a_term_out(what):
    """Where the column is neutral the result is the same to the bit; where not, the term is gone."""
    table, given = random_table(6, history=0), inputs((3, 5, 7), torch.float32)
    neutral = table.clone()
    neutral[:, col.X_M if what == "direct" else col.C_IN] = 0.0 if what == "direct" else 1.0
    results = {}
    for name, rows, flag in itertools.chain.from_iterable(
        [(f"{n}{f}", r, f) for f in (True, False)] for n, r in (("full", table), ("neutral", neutral))
    ):
        out, model_input = torch.empty_like(given["x"]), torch.empty_like(given["x"])
        flags = {"limited": True, "noise": True, what: flag}
        buffers = dict(out=out, model_input=model_input)
        launch_reverse_step(
            given["x"], given["m"], rows.float(), CURSOR, SEEDS, CURSOR * 0, **buffers, **flags, block=64
        )
        results[name] = model_input
    assert torch.equal(results["neutralTrue"], results["neutralFalse"])
    assert torch.equal(results["fullFalse"], results["neutralFalse"])
    assert not torch.equal(results["fullTrue"], results["fullFalse"])


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy says so where a GPU would not
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_variance_that_is_not_finite_is_flagged(bad):
    table, given = random_table(6, history=0), inputs((3, 5, 7), torch.float32, learned=True)
    given["m"][1, 4, 2, 2] = bad  # channel 1 of v
    flags, out = torch.zeros(BATCH, dtype=torch.int32, device=DEVICE), torch.empty_like(given["x"])
    launch = dict(out=out, limited=True, noise=True, learned=True, block=64)
    launch_reverse_step(given["x"], given["m"], table.float(), CURSOR, SEEDS, flags, **launch)
    assert flags.tolist() == [0, 4, 0]
    on_cpu = reverse_step(
        given["x"].cpu(), given["m"].cpu(), table.float().cpu(), CURSOR.cpu(), SEEDS.cpu(), learned=True
    )
    assert on_cpu[2].tolist() == [0, 4, 0]


def test_a_finished_sample_stays_in_every_variant():
    variant = dict(guided=True, learned=True, inpaint=True, history=3)
    table, given = random_table(6), inputs((3, 5, 7), torch.float32, **variant)
    given["m"].fill_(math.nan)
    out = torch.empty_like(given["x"])
    flags, done = torch.zeros_like(CURSOR), torch.full_like(CURSOR, 5)
    read = {k: v for k, v in given.items() if k not in ("x", "m")}
    launch = dict(out=out, limited=True, noise=True, learned=True, block=64)
    launch_reverse_step(given["x"], given["m"], table.float(), done, SEEDS, flags, **launch, **read)
    assert torch.equal(out, given["x"])
    assert not flags.any()


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_finished_slot_may_hold_anything(dynamic):
    """NaN in the model's output, and so in the factor of its rescale, and in the slot's own weights."""
    table, given = random_table(6, history=0, noise=False), inputs((3, 5, 7), torch.float32, guided=True)
    given["m"][[2, 5]] = math.nan
    cursor = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)  # the last row is the identity
    weights = [torch.tensor([2.0, 3.0, math.nan], device=DEVICE), torch.tensor([0.7, 0.5, math.nan], device=DEVICE)]
    out, flags = torch.empty_like(given["x"]), torch.zeros_like(cursor)
    read = (*weights, None, None, None, True, dynamic, False, False, True)
    step_registration._launch(given["x"], given["m"], table.float(), cursor, SEEDS, flags, *read, out=out)
    assert torch.equal(out[2], given["x"][2])
    assert not flags.any()
    exact = reference.reverse_step(
        given["x"].double(),
        given["m"].double(),
        table.float().double(),
        cursor,
        guidance=weights[0].double(),
        rescale=weights[1].double(),
        dynamic=dynamic,
    )
    assert (out - exact.x).abs().max() <= 1e-4 * exact.x.abs().max()


def test_a_finished_slots_history_and_noise_may_hold_anything():
    table, given = random_table(6), inputs((3, 5, 7), torch.float32, history=3, given_noise=True)
    given["z"].fill_(math.nan)
    given["h1"].fill_(math.nan)
    given["h2"].fill_(math.inf)
    given["h3"].fill_(math.nan)
    done, out = torch.full_like(CURSOR, 5), torch.empty_like(given["x"])
    histories = {k: given[k].clone() for k in HISTORY}
    launch = dict(out=out, z=given["z"], limited=True, noise=True, block=64)
    launch_reverse_step(given["x"], given["m"], table.float(), done, SEEDS, CURSOR * 0, **launch, **histories)
    assert torch.equal(out, given["x"])
    on_cpu = [v.cpu() for v in (given["x"], given["m"], table.float(), done, SEEDS)]
    assert torch.equal(reverse_step(*on_cpu, **{k: given[k].cpu() for k in (*HISTORY, "z")})[0], on_cpu[0])


def test_noise_that_the_table_does_not_ask_for_is_not_read():
    table, given = random_table(6, noise=False), inputs((3, 5, 7), torch.float32, history=3, given_noise=True)
    given["z"].fill_(math.nan)
    made = launched(table, **given, noise=False)
    given.pop("z")
    assert all(torch.equal(a, b) for a, b in zip(made, launched(table, **given, noise=False), strict=True))


@pytest.mark.parametrize("where", ["all", "x", "m"])
def test_tensors_that_begin_anywhere(where):
    """A view one element behind an aligned address: no access may be as wide as it is elsewhere."""

    def shifted(v):
        memory = torch.full((v.numel() + 1,), math.nan, dtype=v.dtype, device=DEVICE)
        return memory[1:].view(v.shape).copy_(v)

    table, given = random_table(6, history=0), inputs((1, 32, 32), torch.bfloat16)
    expected = launched(table, **given, block=None)[0]
    x = shifted(given["x"]) if where != "m" else given["x"]
    m = shifted(given["m"]) if where != "x" else given["m"]
    out = torch.full((x.numel() + 1,), math.nan, device=DEVICE)
    state = out[1:].view(x.shape)
    launch = dict(out=state, limited=True, noise=True)
    launch_reverse_step(x, m, table.float(), CURSOR, SEEDS, CURSOR * 0, **launch)
    assert torch.equal(state, expected)
    assert out[0].isnan()


@pytest.mark.parametrize("last_in", [False, True])
@pytest.mark.parametrize("last_m", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=lambda v: "-".join(v) or "plain")
def test_the_cuda_ops_are_the_cpu_ops(variant, dynamic, last_m, last_in):
    """The registered CUDA functions with the kernels interpreted: all flags, histories, and layouts that differ."""
    learned, guided = variant.get("learned", False), variant.get("guided", False)
    given = inputs((3, 4, 6), torch.float32, **variant, last=last_m)
    table = random_table(6, history=variant.get("history", 0)).float()
    if dynamic:
        table[:5, col.RATIO], table[:5, col.CLIP] = 0.9, 1.4
    rescale = torch.tensor([0.3, 0.9, 0.0], device=DEVICE) if guided else None
    known = [given.get(name) for name in ("known", "mask", "z")]
    read = (given.get("guidance"), rescale, *known, True, dynamic, True, learned, True)

    def run(inplace, plain):
        histories = [given[k].clone() if k in given else None for k in HISTORY]
        state, flags = given["x"].clone(), torch.zeros(BATCH, dtype=torch.int32, device=DEVICE)
        following = torch.zeros(2 * BATCH if guided else BATCH, 3, 4, 6, dtype=torch.float32, device=DEVICE)
        following = following.contiguous(memory_format=torch.channels_last if last_in else torch.contiguous_format)
        x0, rows = torch.zeros_like(state), (given["m"], table, CURSOR, SEEDS)
        made = plain(given["x"], *rows, *histories, *read)
        inplace(state, *rows, *histories, following, x0, flags, *read, True)
        return [*made, state, *histories, following, x0, flags]

    ours = run(step_registration._reverse_step_inplace_cuda, step_registration._reverse_step_cuda)
    theirs = run(step_registration._reverse_step_inplace_cpu, step_registration._reverse_step_cpu)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.stride() == b.stride()
            assert (a.double() - b.double()).abs().max() <= 2e-5 * (1 + b.double().abs().max())


def test_the_step_has_no_derivative_and_says_so():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="reverse_step has no derivative"):
        reverse_step(**CPU | {"x": x})[0].sum().backward()


def test_a_table_without_an_identity_row_where_no_scale_is_asked_for():
    flags, model_input = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3, 4)
    table = torch.zeros(1, len(col.COLUMNS))
    table[0, col.ADVANCE] = table[0, col.X_X] = 1.0
    x = torch.ones(2, 3, 4)
    where = CPU | {"x": x, "table": table}
    reverse_step_(**where, nonfinite=flags, model_input=model_input, scaled=False, noise=False)
    assert torch.equal(model_input, torch.ones(2, 3, 4))


def test_the_known_region_is_its_own_forward_noising():
    """With DDPM's columns, k_x = sqrt(alpha_bar) and k_z = sqrt(1 - alpha_bar), it is q(x_t | x_0) with stream 3."""
    table = random_table(6, history=0)
    table[:, col.K_X], table[:, col.K_Z] = 0.6, 0.8
    given = inputs((3, 5, 7), torch.float32, inpaint=True)
    out = launched(table, **given)[0]
    z = reference.normal(SEEDS, (3, 5, 7), step=table[CURSOR.long(), col.STEP].long(), stream=3, dtype=torch.float64)
    there = 0.6 * given["known"].double() + 0.8 * z
    mask = given["mask"]
    assert ((out - there).abs()[mask] <= 1e-5).all()
    without = launched(table, **{k: v for k, v in given.items() if k not in ("known", "mask")})[0]
    assert torch.equal(out[~mask], without[~mask])


def test_the_op_on_the_cpu_does_what_the_kernel_does():
    variant = dict(guided=True, learned=True, inpaint=True, history=3)
    table, given = random_table(6).float().cpu(), inputs((3, 5, 7), torch.float32, **variant)
    cpu = {k: v.cpu() for k, v in given.items()}
    read = {k: v for k, v in cpu.items() if k not in ("x", "m", *HISTORY)}
    state, histories = cpu["x"].clone(), {k: cpu[k].clone() for k in HISTORY}
    model_input, flags = torch.empty(2 * BATCH, 3, 5, 7), torch.zeros(BATCH, dtype=torch.int32)
    where = (table, CURSOR.cpu(), SEEDS.cpu())
    made = reverse_step(cpu["x"], cpu["m"], *where, **histories, learned=True, **read)
    reverse_step_(state, cpu["m"], *where, flags, **histories, model_input=model_input, learned=True, **read)
    kernel = launched(table.to(DEVICE), **given, learned=True)
    for a, b in zip((state, model_input, made[1], *histories.values()), kernel, strict=True):
        assert (a - b.cpu()).abs().max() <= 1e-4 * (1 + a.abs().max())
    assert torch.equal(made[0], state)


def test_the_launcher_of_the_op_hands_everything_on():
    """The CUDA op's own function, with the kernels interpreted: all of it at once against float64."""
    variant = dict(guided=True, learned=True, inpaint=True, history=3)
    table, given = random_table(6), inputs((3, 5, 7), torch.float32, **variant)
    read = (given["guidance"], None, given["known"], given["mask"], None, True, False, True, True, True)
    out, x0, flags = step_registration._reverse_step_cuda(
        given["x"], given["m"], table.float(), CURSOR, SEEDS, *(given[k] for k in HISTORY), *read
    )
    expected = launched(table, **given, learned=True)
    assert torch.equal(out, expected[0])
    assert torch.equal(x0, expected[2])
    assert not flags.any()


CPU = dict(
    x=torch.zeros(2, 3, 4),
    model_output=torch.zeros(2, 3, 4),
    table=torch.zeros(3, len(col.COLUMNS)),
    cursor=torch.zeros(2, dtype=torch.int32),
    seeds=torch.zeros(2, dtype=torch.int64),
)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"guidance": torch.ones(2)}, r"model_output has shape \(2, 3, 4\); x has \(2, 3, 4\); needed: \(4, 3, 4\)"),
        ({"learned": True}, r"needed: \(2, 6, 4\)"),
        ({"guidance": torch.ones(3), "model_output": torch.zeros(4, 3, 4)}, r"guidance is .* needed: .*\(2,\)"),
        ({"rescale": torch.ones(2)}, "rescale is given without guidance"),
        ({"known": torch.zeros(2, 3, 4)}, "known and mask go together"),
        ({"z": torch.zeros(2, 3)}, r"z has shape \(2, 3\); x has \(2, 3, 4\)"),
        ({"z": torch.zeros(2, 3, 4).double()}, "z is torch.float64; x is torch.float32"),
        ({"known": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 3, 4)}, "mask is torch.float32; needed: torch.bool"),
        ({"known": torch.zeros(2, 3, 4), "mask": torch.zeros(2, 1, 4).bool()}, r"mask has shape \(2, 1, 4\)"),
        ({"x": torch.zeros(2), "model_output": torch.zeros(2), "learned": True}, "a learned variance needs channels"),
        ({"guidance": 7.5, "model_output": torch.zeros(4, 3, 4)}, "guidance is a float; needed: a tensor"),
        ({"x": torch.zeros(())}, "x has no dimension"),
        ({"seeds": None}, "seeds is a NoneType; needed: a tensor"),
        ({"seeds": torch.zeros(2, dtype=torch.int64, device="meta")}, "seeds is on meta; needed: cpu"),
        ({"table": [[0.0]]}, "table is a list; needed: a tensor"),
    ],
)
def test_bad_arguments(change, words):
    with pytest.raises(ValueError, match=words):
        reverse_step(**{**CPU, **change})

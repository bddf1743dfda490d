"""The sampler: closed forms, seeds and batches, what the model is given, and refusals."""

import copy
import math
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import reference

import fastddpm
from fastddpm import NoiseSchedule, Sampler, UNet, solvers
from fastddpm.errors import DeviceError, InputError, NonFiniteError
from fastddpm.seeds import sample_seeds

SCHEDULE = NoiseSchedule.linear()
SHORT = solvers.ddpm(SCHEDULE, 8, clip=1.0)


def gaussian_model(mean: float, std: float, schedule: NoiseSchedule = SCHEDULE):
    """The exact epsilon-model of data distributed as N(mean, std^2): E[eps | x_t]."""
    bar = torch.tensor(schedule.alphas_cumprod)

    def model(x, t):
        a = bar[t].reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * std**2 + 1 - a)

    return model


def closed_form(schedule: NoiseSchedule, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance after all of DDPM's steps with that model, from Ho et al.'s algorithm 2, in Python's floats."""
    m, v = 0.0, 1.0
    for t in reversed(range(schedule.num_steps)):
        bar, beta = float(schedule.alphas_cumprod[t]), float(schedule.betas[t])
        before = float(schedule.alphas_cumprod[t - 1]) if t else 1.0
        # x' = (x - beta / sqrt(1 - bar) eps) / sqrt(alpha) + sigma z, eps = k x + c
        k = math.sqrt(1 - bar) / (bar * std**2 + 1 - bar)
        c = -k * math.sqrt(bar) * mean
        gain = (1 - beta / math.sqrt(1 - bar) * k) / math.sqrt(1 - beta)
        shift = -beta / math.sqrt(1 - bar) * c / math.sqrt(1 - beta)
        m, v = gain * m + shift, gain**2 * v + beta * (1 - before) / (1 - bar)
    return m, v


def test_a_chain_of_1000_steps_has_the_closed_forms_mean_and_variance():
    mean, std = 0.4, 0.3
    exact_mean, exact_variance = closed_form(SCHEDULE, mean, std)
    assert exact_mean == pytest.approx(mean, abs=0.01)  # and that is near the data's
    assert exact_variance == pytest.approx(std**2, rel=0.05)
    x = fastddpm.sample(gaussian_model(mean, std), (64, 1, 16, 16), seed=3)
    n = x.numel()
    assert abs(x.mean().item() - exact_mean) < 4 * std / math.sqrt(n)
    assert abs(x.var().item() - exact_variance) < 4 * math.sqrt(2 / n) * exact_variance


def test_ddim_maps_the_noise_as_in_closed_form():
    """With eta = 0 and the exact model every sample is an affine map of its x_T."""
    table = solvers.ddim(SCHEDULE, 100)
    x_T = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    made = Sampler(gaussian_model(0.4, 0.3), table).sample(x_T.shape, seeds=0, x_T=x_T)
    slope = (made - made.mean()) / (x_T - x_T.mean())
    assert slope.std() < 1e-3
    assert slope.mean().item() == pytest.approx(0.3, rel=0.1)


def by_hand(model, table, x, seeds):
    """The loop of the sampler without its buffers: plain reference steps with the contract's noise."""
    rows = torch.tensor(table.with_identity(), dtype=x.dtype)
    for i in range(table.num_rows):
        cursor = torch.full((len(x),), i)
        t = rows[i, col.T].long().expand(len(x))
        z = reference.normal(seeds, x.shape[1:], step=i, stream=1, dtype=x.dtype)
        x = reference.reverse_step(x, model(x, t), rows, cursor, z).x
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loop_is_the_table_row_by_row(dtype):
    model, shape, seeds = gaussian_model(0.1, 0.5), (3, 2, 5), sample_seeds(7, 3)
    x_T = reference.normal(seeds, shape[1:], step=0, stream=0, dtype=dtype)
    made = Sampler(model, SHORT, state_dtype=dtype).sample(shape, seeds=7)
    assert made.dtype == dtype
    assert torch.equal(made, by_hand(model, SHORT, x_T, seeds))


def test_float32_is_near_float64_after_1000_steps():
    table, model = solvers.ddpm(SCHEDULE, clip=1.0), gaussian_model(0.1, 0.5)
    single, double = (
        Sampler(model, table, state_dtype=dtype).sample((2, 64), seeds=1) for dtype in (torch.float32, torch.float64)
    )
    assert (single - double).abs().max() < 2e-5


@pytest.fixture(scope="module")
def unet() -> UNet:
    torch.manual_seed(0)
    net = UNet(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    )
    return net.eval().requires_grad_(False)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0])


def test_a_seed_makes_the_same_sample_alone_and_in_a_batch_of_16(unet):
    labels = torch.arange(16) % 3
    sampler = Sampler(unet, SHORT)
    seeds = list(range(100, 116))
    together = sampler.sample((16, 1, 8, 8), seeds=seeds, model_kwargs={"class_labels": labels})
    for b in (0, 7, 15):
        alone = sampler.sample((1, 1, 8, 8), seeds=[seeds[b]], model_kwargs={"class_labels": labels[b : b + 1]})
        assert (alone[0] - together[b]).abs().max() <= 1e-3  # level C of the promise


def test_with_a_batch_size_the_same_bytes_for_any_number_and_order(unet):
    sampler = Sampler(unet, SHORT, batch_size=4)
    seeds = [5, 6, 7, 8, 9, 10, 11]
    seven = sampler.sample((7, 1, 8, 8), seeds=seeds, model_kwargs={"class_labels": LABELS})
    for picked in ([0], [3, 1, 6], [6, 5, 4, 3, 2, 1, 0], [2, 2]):
        again = sampler.sample(
            (len(picked), 1, 8, 8), seeds=[seeds[i] for i in picked], model_kwargs={"class_labels": LABELS[picked]}
        )
        assert torch.equal(again, seven[picked])


def test_trace_shows_each_step_of_the_same_run(unet):
    sampler = Sampler(unet, SHORT)
    arguments = dict(seeds=0, model_kwargs={"class_labels": LABELS[:2]})
    steps = list(sampler.trace((2, 1, 8, 8), **arguments))
    assert [s.step for s in steps] == list(range(8))
    assert [s.t for s in steps] == SHORT.timesteps.tolist()
    assert torch.equal(steps[-1].x, sampler.sample((2, 1, 8, 8), **arguments))
    assert all(s.x0.abs().max() <= 1 for s in steps)
    assert len({s.x.data_ptr() for s in steps}) == 8  # copies
    assert torch.equal(steps[-1].x, steps[-1].x0)  # the last posterior mean is x0


def test_what_the_model_is_given():
    seen = []

    def model(x, t, **kwargs):
        seen.append((x.dtype, x.shape, t.dtype, t.tolist(), kwargs))
        return SimpleNamespace(sample=torch.zeros_like(x))

    Sampler(model, SHORT, dtype=torch.bfloat16).sample((2, 4), seeds=0, model_kwargs={"scale": 3})
    assert seen[0] == (torch.bfloat16, (2, 4), torch.int64, [SHORT.timesteps[0]] * 2, {"scale": 3})
    assert [call[3][0] for call in seen] == SHORT.timesteps.tolist()


def test_a_table_with_fractional_times_gives_the_model_floats():
    rows = SHORT.rows.copy()
    rows[:, col.T] += 0.5
    times = []
    Sampler(lambda x, t: times.append(t.clone()) or x, solvers.StepTable(rows)).sample((1, 4), seeds=0)
    assert times[0].dtype == torch.float32
    assert times[0].item() == SHORT.timesteps[0] + 0.5


def test_the_model_input_is_scaled_by_c_in_and_history_moves_on():
    """Two-row table by hand: c_in of each row reaches the model, h1 of row 1 is x0 of row 0."""
    table = solvers.step_table([1.0, 0.0], c_in=[0.5, 0.25], x0_m=1.0, x_x0=[1.0, 0.0], x_h1=[0.0, 2.0])
    inputs = []
    x_T = torch.tensor([[1.0, 2.0]])
    made = Sampler(lambda x, t: inputs.append(x.clone()) or x + 1, table).sample((1, 2), seeds=0, x_T=x_T)
    assert torch.equal(inputs[0], 0.5 * x_T)
    first = 0.5 * x_T + 1
    assert torch.equal(inputs[1], 0.25 * first)
    assert torch.equal(made, 2 * first)


def test_inputs_are_not_written_and_results_stay():
    sampler = Sampler(gaussian_model(0.0, 1.0), SHORT)
    x_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    before = x_T.clone()
    first = sampler.sample((2, 4), seeds=0, x_T=x_T)
    kept = first.clone()
    sampler.sample((2, 4), seeds=1)
    assert torch.equal(x_T, before)
    assert torch.equal(first, kept)
    assert not torch.equal(sampler.sample((2, 4), seeds=1, x_T=x_T), first)  # the step noise is the seed's


def test_250_repeats_are_equal():
    sampler = Sampler(gaussian_model(0.0, 1.0), solvers.ddpm(SCHEDULE, 4))
    first = sampler.sample((3, 10), seeds=5)
    assert all(torch.equal(sampler.sample((3, 10), seeds=5), first) for _ in range(250))


def test_a_sampler_in_two_threads(unet):
    sampler = Sampler(unet, SHORT)
    expected = [
        Sampler(unet, SHORT).sample((2, 1, 8, 8), seeds=s, model_kwargs={"class_labels": LABELS[:2]}) for s in range(4)
    ]
    made = [None] * 4

    def run(s):
        made[s] = sampler.sample((2, 1, 8, 8), seeds=s, model_kwargs={"class_labels": LABELS[:2]})

    threads = [threading.Thread(target=run, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))


def test_tensors_in_dicts_are_rows_too():
    """A batch of 3 in parts of 2, the last one padded: every sample gets its own row of a nested tensor."""

    def model(x, t, cond):
        return x * 0 + cond["y"][0][:, None] * cond["gain"]

    cond = {"y": [torch.tensor([1.0, 2.0, 3.0])], "gain": 0.1}
    x_T = torch.zeros(3, 4)
    one, parts = (
        Sampler(model, solvers.ddim(SCHEDULE, 3), batch_size=size).sample(
            (3, 4), seeds=0, x_T=x_T, model_kwargs={"cond": cond}
        )
        for size in (None, 2)
    )
    assert torch.equal(one, parts)
    assert len(set(one[:, 0].tolist())) == 3


def test_a_converted_model_is_given_its_new_dtype(unet):
    net = copy.deepcopy(unet)
    sampler = Sampler(net, SHORT)
    net.bfloat16()
    assert sampler.sample((1, 1, 8, 8), seeds=0, model_kwargs={"class_labels": LABELS[:1]}).dtype == torch.float32


def test_a_function_around_a_module_is_given_the_modules_dtype():
    net = torch.nn.Linear(4, 4).bfloat16()
    assert Sampler(lambda x, t: net(x), SHORT).sample((2, 4), seeds=0).shape == (2, 4)


def test_a_table_beyond_float32():
    with pytest.raises(fastddpm.FastDDPMError, match="allowed: numbers that float32 holds"):
        solvers.ddpm(NoiseSchedule.from_betas([0.5] * 1000))


def test_no_gradient_is_kept():
    weight = torch.ones(1, requires_grad=True)
    assert not Sampler(lambda x, t: weight * x, SHORT).sample((1, 4), seeds=0).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_an_error_that_names_sample_and_step(bad):
    def model(x, t):
        out = 0.1 * x
        if t[0] == SHORT.timesteps[3]:
            out[1] = bad
        return out

    clean = Sampler(lambda x, t: 0.1 * x, SHORT).sample((3, 4), seeds=0)
    with pytest.raises(NonFiniteError, match=r"sample 1 is not finite from step 3 \(t = 500\) on") as caught:
        Sampler(model, SHORT).sample((3, 4), seeds=0)
    assert caught.value.bad.tolist() == [False, True, False]
    assert torch.equal(caught.value.samples[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(shape=(4,), seeds=0), r"needed: \(batch, ...\)"),
        (dict(shape=(0, 4), seeds=0), "at least 1"),
        (dict(shape=(2, 4.0), seeds=0), "whole numbers"),
        (dict(shape=(2, 4), seeds=2**64), r"0 \.\.\. 2\^64 - 1"),
        (dict(shape=(2, 4), seeds=-1), r"0 \.\.\. 2\^64 - 1"),
        (dict(shape=(2, 4), seeds=[1, 2, 3]), "3 seeds were given for 2 samples"),
        (dict(shape=16, seeds=0), r"shape is 16; needed: \(batch, ...\)"),
        (dict(shape=(2, 4), seeds=0, x_T=torch.zeros(2, 5)), r"x_T has shape \(2, 5\)"),
        (dict(shape=(2, 4), seeds=0, x_T=np.zeros((2, 4))), "x_T is a ndarray"),
        (dict(shape=(2, 4), seeds=0, x_T=torch.zeros(2, 4, dtype=torch.uint8)), "x_T is a torch.uint8"),
        (dict(shape=(2, 4), seeds=0, model_kwargs=[1]), "model_kwargs is a list; needed: a dict"),
        (dict(shape=(2, 4), seeds=0, guidance_scale=2.0, unconditional_kwargs=5), "unconditional_kwargs is a int"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_runs(arguments, words):
    def model(x, t):
        raise AssertionError("the model ran")

    for refused in (Sampler(model, SHORT).sample, Sampler(model, SHORT).trace):  # trace too when it is called
        with pytest.raises(InputError, match=words):
            refused(**arguments)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(model=3), "needed: a callable"),
        (dict(table=[1]), "needed: a StepTable"),
        (dict(graph="always"), "allowed: 'auto'"),
        (dict(state_dtype=torch.float16), "state_dtype is torch.float16"),
        (dict(graph=0), "allowed: 'auto'"),
        (dict(device="gpu"), "device is 'gpu'; allowed: None, 'cpu'"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=2.5), "batch_size is 2.5"),
        (dict(dtype=torch.int32), "floating-point"),
        (dict(model=torch.nn.Linear(2, 2), dtype=torch.bfloat16), "parameters are torch.float32"),
    ],
)
def test_bad_samplers(arguments, words):
    with pytest.raises(InputError, match=words):
        Sampler(**{**dict(model=lambda x, t: x, table=SHORT), **arguments})


def test_a_shape_of_numpy_integers():
    made = Sampler(lambda x, t: x, SHORT).sample((np.int64(2), np.int32(4)), seeds=0)
    assert torch.equal(made, Sampler(lambda x, t: x, SHORT).sample((2, 4), seeds=0))


def test_a_shape_that_the_unet_can_not_take(unet):
    with pytest.raises(InputError, match=r"it takes \(1, H, W\) with H and W multiples of 2"):
        Sampler(unet, SHORT).sample((1, 1, 9, 8), seeds=0)


@pytest.mark.parametrize(
    "output, words", [(None, "returned a NoneType"), (torch.zeros(2, 8), r"returned shape \(2, 8\)")]
)
def test_a_model_that_returns_something_else(output, words):
    with pytest.raises(InputError, match=words):
        Sampler(lambda x, t: output, SHORT).sample((2, 4), seeds=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(DeviceError, match="torch finds no NVIDIA GPU"):
        Sampler(lambda x, t: x, SHORT, device="cuda").sample((2, 4), seeds=0)


def test_the_one_liner():
    model = gaussian_model(0.2, 0.5)
    made = fastddpm.sample(model, (2, 6), solver="ddim", steps=10, seed=4, eta=0.5, clip=2.0)
    table = solvers.ddim(SCHEDULE, 10, eta=0.5, clip=2.0)
    assert torch.equal(made, Sampler(model, table).sample((2, 6), seeds=4))
    with pytest.raises(InputError, match="seed is True"):
        fastddpm.sample(model, (2, 6), seed=True)
    with pytest.raises(fastddpm.FastDDPMError, match="did you mean 'eta'"):
        fastddpm.sample(model, (2, 6), solver="ddim", etaa=0.5)


def test_a_learned_variance_takes_the_models_second_half_of_channels():
    """v = -1 and v = 1 give the samples of the two fixed variances; anything between is between."""

    def learning(v):
        def model(x, t):
            eps = 0.3 * x * torch.cos(t.to(x.dtype)).reshape(-1, 1, 1, 1)
            return torch.cat([eps, torch.full_like(eps, v)], dim=1)

        return model

    table = solvers.ddpm(SCHEDULE, 8, clip=1.0, variance="learned_range")
    for v, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        fixed = solvers.ddpm(SCHEDULE, 8, clip=1.0, variance=variance)
        expected = Sampler(lambda x, t: learning(0.0)(x, t)[:, : x.shape[1]], fixed).sample((2, 3, 4, 4), seeds=[1, 2])
        made = Sampler(learning(v), table).sample((2, 3, 4, 4), seeds=[1, 2])
        assert (made - expected).abs().max() < 1e-5
    with pytest.raises(
        InputError, match=r"shape \(2, 3, 4, 4\) .* needed: \(2, 6, 4, 4\), for a solver with a learned"
    ):
        Sampler(lambda x, t: x, table).sample((2, 3, 4, 4), seeds=0)
    alone = solvers.ddpm(SCHEDULE, 1, variance="learned_range")
    assert Sampler(learning(0.5), alone).sample((2, 3, 4, 4), seeds=0).shape == (2, 3, 4, 4)
    for other in (SHORT, solvers.ddim(SCHEDULE, 8)):  # these have a variance of their own, and drop the model's
        made = Sampler(learning(math.nan), other).sample((2, 3, 4, 4), seeds=0)
        expected = Sampler(lambda x, t: learning(0.0)(x, t)[:, :3], other).sample((2, 3, 4, 4), seeds=0)
        assert torch.equal(made, expected)


def test_dynamic_thresholding_keeps_the_samples_within_1():
    table = solvers.ddim(SCHEDULE, 8, clip=4.0, dynamic_thresholding_ratio=0.9)
    made = Sampler(lambda x, t: -x, table).sample((2, 3, 8, 8), seeds=0)
    assert made.abs().max() <= 1.0
    assert Sampler(lambda x, t: -x, solvers.ddim(SCHEDULE, 8)).sample((2, 3, 8, 8), seeds=0).abs().max() > 10


def test_noise_alone_is_no_start_where_a_table_begins_with_a_picture():
    table = solvers.ddim(SCHEDULE, 1)  # "leading" visits t = 0
    with pytest.warns(UserWarning, match=r"begins where the noise is 0\.01 of the picture.*\"trailing\""):
        Sampler(lambda x, t: x, table).sample((1, 4), seeds=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Sampler(lambda x, t: x, table).sample((1, 4), seeds=0, x_T=torch.zeros(1, 4))
        Sampler(lambda x, t: x, solvers.ddim(SCHEDULE, 1, spacing="trailing")).sample((1, 4), seeds=0)

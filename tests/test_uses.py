"""Inpainting, image to image, interpolation, progressive decoding; traces and first states of every kind of table."""

import math

import numpy as np
import pytest
import torch
from fastddpm_kernels import reference

from fastddpm import NoiseSchedule, Sampler, pictures, solvers
from fastddpm.analytic import GaussianMixture
from fastddpm.errors import ConfigError, InputError
from fastddpm.seeds import sample_seeds
from fastddpm.solvers.levels import Levels
from fastddpm.uses import image_to_image, inpaint, interpolate, noised, progressive_decoding, skipped

SCHEDULE = NoiseSchedule.linear()
TABLE = solvers.ddpm(SCHEDULE, 8, clip=1.0)
SHAPE = (3, 1, 4, 4)
IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 2 - 1
OTHER = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def model(x, t):
    return 0.5 * x + 0.3 * torch.sin(3 * x + 0.01 * t.to(x.dtype).reshape(-1, 1, 1, 1))


def noise(seeds, step, stream, dtype=torch.float32):
    return reference.normal(sample_seeds(seeds, SHAPE[0]), SHAPE[1:], step=step, stream=stream, dtype=dtype)


# --- inpainting -------------------------------------------------------------------------------------------------------

HALF = torch.arange(4)[:, None] < 2  # [4, 1]: the upper half


@pytest.mark.parametrize("table", [TABLE, solvers.ddim(SCHEDULE, 8), solvers.dpm_solver(SCHEDULE, 6)])
def test_where_the_mask_is_set_the_state_is_the_known_sample_noised_to_each_level(table):
    sampler = Sampler(model, table, state_dtype=torch.float64)
    steps = list(sampler.trace(SHAPE, seeds=5, known=IMAGE, mask=HALF))
    for i, step in enumerate(steps):
        expected = table["k_x"][i] * IMAGE.double() + table["k_z"][i] * noise(5, i, 3, torch.float64)
        assert (step.x[:, :, :2] - expected[:, :, :2]).abs().max() < 1e-12
        assert (step.x[:, :, 2:] - expected[:, :, 2:]).abs().max() > 0.01
    made = inpaint(Sampler(model, table), IMAGE, HALF, seeds=5)
    assert torch.equal(made[:, :, :2], IMAGE[:, :, :2])
    assert (made - steps[-1].x).abs().max() < 1e-4


def test_a_mask_that_is_nowhere_set_changes_nothing_and_hides_what_is_there():
    sampler = Sampler(model, TABLE)
    plain = sampler.sample(SHAPE, seeds=1)
    nothing = torch.full(SHAPE, math.nan)
    assert torch.equal(inpaint(sampler, nothing, torch.tensor(False), seeds=1), plain)
    known = torch.where(HALF, IMAGE, math.nan)
    assert torch.equal(inpaint(sampler, known, HALF, seeds=1), inpaint(sampler, IMAGE, HALF, seeds=1))


def test_an_inpainted_sample_does_not_depend_on_the_others():
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(2)) < 0.5
    sampler, seeds = Sampler(model, TABLE, batch_size=2), [7, 8, 9]
    made = inpaint(sampler, IMAGE, mask, seeds=seeds)
    for picked in ([2], [1, 0], [0, 2, 1]):
        again = inpaint(sampler, IMAGE[picked], mask[picked], seeds=[seeds[i] for i in picked])
        assert torch.equal(again, made[picked])
    assert torch.equal(made[mask], IMAGE[mask])


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(known=IMAGE), "known and mask go together"),
        (dict(mask=HALF), "known and mask go together"),
        (dict(known=IMAGE, mask=HALF.float()), r"mask is torch.float32; needed: torch.bool"),
        (dict(known=IMAGE > 0, mask=HALF), "known is torch.bool"),
        (dict(known=IMAGE[:2], mask=HALF), r"known has shape \(2, 1, 4, 4\), shape is \(3, 1, 4, 4\)"),
        (dict(known=IMAGE, mask=HALF[None, None, None]), r"mask has shape \(1, 1, 1, 4, 1\)"),
        (dict(known=IMAGE / 0, mask=HALF), "known is NaN or infinite in places where the mask"),
    ],
)
def test_what_can_not_be_inpainted(given, words):
    with pytest.raises(InputError, match=words):
        Sampler(model, TABLE).sample(SHAPE, seeds=0, **given)


def test_inpainting_needs_a_table_that_knows_its_levels():
    table = solvers.step_table([1.0, 0.0], x0_m=1.0, x_x0=1.0)
    with pytest.raises(InputError, match="this one has no k_x and k_z"):
        inpaint(Sampler(model, table), IMAGE, HALF, seeds=0)


# --- from pictures ----------------------------------------------------------------------------------------------------


def test_skipped():
    assert [skipped(50, s) for s in (1, 1.0, 0.6, 0.58, 0.5, 0.02, 0.001)] == [0, 0, 20, 21, 25, 49, 49]
    assert skipped(1, 0.3) == 0
    for wrong in (0, -0.5, 1.1, True, "half"):
        with pytest.raises(InputError, match="allowed: a number above 0 and up to 1"):
            skipped(50, wrong)
    with pytest.raises(InputError, match="steps is 0"):
        skipped(0, 0.5)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "repaint", "dpm_solver", "unipc", "plms", "deis", "euler", "heun"])
def test_a_noised_picture_is_at_the_level_of_the_tables_first_row(solver):
    """q(x_t | x_0) with the seeds' own initial noise; and with the model that knows the picture it comes back."""
    table = solvers.make(solver, SCHEDULE, 24, start=12)
    alpha, sigma = table.start
    assert 0.1 < sigma / alpha < 60
    x_T = noised(IMAGE.double(), table, 4)
    assert torch.equal(x_T, alpha * IMAGE.double() + sigma * noise(4, 0, 0, torch.float64))

    def knows(x, t):  # eps of a data set of one picture, for tables whose model's input is the state of variance 1
        bar = torch.tensor(SCHEDULE.alphas_cumprod)[t.long()].reshape(-1, 1, 1, 1).to(x.dtype)
        return (x - bar.sqrt() * IMAGE) / (1 - bar).sqrt()

    made = image_to_image(Sampler(knows, table, state_dtype=torch.float64), IMAGE.double(), seeds=4)
    assert (made - IMAGE).abs().max() < 0.02


def test_image_to_image_is_sampling_from_there():
    table = solvers.ddim(SCHEDULE, 20, start=skipped(20, 0.5), eta=0.5)
    sampler = Sampler(model, table)
    made = image_to_image(sampler, IMAGE, seeds=[1, 2, 3])
    assert torch.equal(made, sampler.sample(SHAPE, seeds=[1, 2, 3], x_T=noised(IMAGE, table, [1, 2, 3])))
    one = image_to_image(sampler, IMAGE[1:2], seeds=[2])
    assert (one - made[1:2]).abs().max() < 1e-5
    kept = image_to_image(sampler, IMAGE, seeds=[1, 2, 3], mask=HALF)
    assert torch.equal(kept[:, :, :2], IMAGE[:, :, :2])
    assert not torch.equal(kept[:, :, 2:], IMAGE[:, :, 2:])
    with pytest.raises(TypeError, match="multiple values for keyword argument 'x_T'"):
        image_to_image(sampler, IMAGE, seeds=0, x_T=IMAGE)


def test_strength_says_how_much_of_the_picture_is_left():
    """Of a mixture's sample: at a low strength it stays in its component, at 1 it is drawn anew."""
    mixture = GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.1, 0.1], [0.5, 0.5])
    start = mixture.sample(400, seed=0).float()
    stays = {}
    for strength in (0.1, 1.0):
        table = solvers.ddpm(SCHEDULE, 50, start=skipped(50, strength))
        made = image_to_image(Sampler(mixture.model(SCHEDULE), table), start, seeds=0)
        stays[strength] = (mixture.component(made) == mixture.component(start)).float().mean().item()
    assert stays[0.1] > 0.97
    assert 0.4 < stays[1.0] < 0.6


def test_interpolation_mixes_the_noised_pictures():
    """Ho et al., figure 8, by hand; the ends are what image_to_image makes of each."""
    sampler = Sampler(model, solvers.ddpm(SCHEDULE, 20, start=8))
    made = interpolate(sampler, IMAGE, OTHER, seeds=6, weights=5)
    assert made.shape == (5, *SHAPE)
    assert torch.equal(made[0], image_to_image(sampler, IMAGE, seeds=6))
    assert torch.equal(made[4], image_to_image(sampler, OTHER, seeds=6))
    alpha, sigma = sampler.table.start
    x_t, other = (alpha * image + sigma * noise(6, 0, 0) for image in (IMAGE, OTHER))
    expected = sampler.sample(SHAPE, seeds=6, x_T=0.75 * x_t + 0.25 * other)
    assert (made[1] - expected).abs().max() < 1e-4
    assert torch.equal(interpolate(sampler, IMAGE, OTHER, seeds=6, weights=[0.25])[0], made[1])
    for weights in (0, 1, [], 0.5, None, "ab", [0.5, math.nan]):
        with pytest.raises(InputError, match="weights: needed"):
            interpolate(sampler, IMAGE, OTHER, seeds=0, weights=weights)
    with pytest.raises(InputError, match="needed: the same"):
        interpolate(sampler, IMAGE, OTHER[:2], seeds=0)
    with pytest.raises(InputError, match="differ in dtype"):
        interpolate(sampler, IMAGE.double(), OTHER, seeds=0)
    for use in (inpaint, interpolate):
        with pytest.raises(InputError, match="the picture is a list"):
            use(sampler, [1.0], HALF, seeds=0)


def test_uses_are_guided_too():
    def labelled(x, t, label):
        return model(x, t) + 0.1 * label.reshape(-1, 1, 1, 1)

    sampler = Sampler(labelled, solvers.ddim(SCHEDULE, 10, start=4))
    label = torch.tensor([1.0, 2.0, 3.0])
    given = dict(guidance_scale=[1.0, 2.0, 4.0], unconditional_kwargs={"label": 0.0}, model_kwargs={"label": label})
    x_T = noised(IMAGE, sampler.table, 0)
    expected = sampler.sample(SHAPE, seeds=0, x_T=x_T, **given)
    assert torch.equal(image_to_image(sampler, IMAGE, seeds=0, **given), expected)
    assert torch.equal(interpolate(sampler, IMAGE, OTHER, seeds=0, weights=[0.0], **given)[0], expected)
    assert not torch.equal(image_to_image(sampler, IMAGE, seeds=0, model_kwargs={"label": label}), expected)
    inpainted = sampler.sample(SHAPE, seeds=0, known=IMAGE, mask=HALF, **given)
    assert torch.equal(inpaint(sampler, IMAGE, HALF, seeds=0, **given), inpainted)


@pytest.mark.parametrize("wrong", [IMAGE.byte(), IMAGE.half(), IMAGE.numpy(), torch.zeros(4)])
def test_what_is_no_picture(wrong):
    with pytest.raises(InputError, match=r"needed: a float32 tensor \[B, ...\]"):
        noised(wrong, TABLE, 0)


# --- traces -----------------------------------------------------------------------------------------------------------


def test_progressive_decoding_keeps_some_moments():
    sampler = Sampler(model, TABLE)
    steps = progressive_decoding(sampler, SHAPE, seeds=0, moments=3)
    assert [s.step for s in steps] == [0, 4, 7]
    assert torch.equal(steps[-1].x0, sampler.sample(SHAPE, seeds=0))
    assert [s.step for s in progressive_decoding(sampler, SHAPE, seeds=0, moments=100)] == list(range(8))
    assert [s.step for s in progressive_decoding(sampler, SHAPE, seeds=0, moments=1)] == [7]
    strip = pictures.filmstrip([s.x0 for s in steps], captions=[f"t = {s.t:g}" for s in steps])
    assert strip.width > strip.height * 0.5
    with pytest.raises(InputError, match="moments is 0"):
        progressive_decoding(sampler, SHAPE, seeds=0, moments=0)


@pytest.mark.parametrize("state", ["vp", "ve"])
def test_a_trace_shows_x0_also_where_the_table_predicts_noise(state):
    """DDIM written for eps: x' = alpha'/alpha (x - sigma eps) + sigma' eps; the same states and x_0 as for x_0."""
    levels = Levels.of(SCHEDULE, 10, spacing="linspace", prediction_type="epsilon", state=state)
    alpha, sigma = levels.alpha, levels.sigma
    ratio = alpha[1:] / alpha[:-1]
    common = dict(
        c_in=levels.c_in,
        k_x=alpha[1:],
        k_z=sigma[1:],
        start=levels.start,
        init_noise_sigma=levels.init_noise_sigma,
    )
    of_noise = solvers.step_table(
        levels.t,
        x0_x=levels.eps_x,
        x0_m=levels.eps_m,
        x_x=ratio,
        x_x0=sigma[1:] - ratio * sigma[:-1],
        history_of="epsilon",
        **common,
    )
    of_x0 = solvers.step_table(
        levels.t,
        x0_x=levels.x0_x,
        x0_m=levels.x0_m,
        x_x=sigma[1:] / sigma[:-1],
        x_x0=alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1],
        **common,
    )
    ours, theirs = (list(Sampler(model, t, state_dtype=torch.float64).trace(SHAPE, seeds=2)) for t in (of_noise, of_x0))
    for a, b in zip(ours, theirs, strict=True):
        assert (a.x - b.x).abs().max() < 1e-9 * b.x.abs().max()
        assert (a.x0 - b.x0).abs().max() < 1e-9 * b.x0.abs().max()
    assert len({s.x0.data_ptr() for s in ours}) == 10  # copies


def test_the_first_state_is_scaled_noise_and_a_given_one_is_taken_as_it_is():
    table = solvers.step_table([1.0], c_in=0.5, x0_m=1.0, x_x0=1.0, start=(1.0, 80.0), init_noise_sigma=80.0)
    seen = []
    sampler = Sampler(lambda x, t: seen.append(x.clone()) or x, table)
    sampler.sample(SHAPE, seeds=3)
    sampler.sample(SHAPE, seeds=3, x_T=IMAGE)
    assert torch.equal(seen[0], 0.5 * (80 * noise(3, 0, 0)))
    assert torch.equal(seen[1], 0.5 * IMAGE)


def test_a_start_that_is_not_there():
    with pytest.raises(ConfigError, match="start is 50"):
        solvers.ddim(SCHEDULE, 50, start=50)
    assert np.array_equal(solvers.ddim(SCHEDULE, 50, start=20).timesteps, solvers.ddim(SCHEDULE, 50).timesteps[20:])

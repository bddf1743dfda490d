"""diffusers' pipelines (0.42.1): `accelerate` gives the same pictures from the same generator."""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DModel,
)
from PIL import Image

import fastddpm
from fastddpm.errors import ConfigError, InputError, NonFiniteError
from fastddpm.integrations import loops
from fastddpm.schedule import NoiseSchedule
from fastddpm.solvers.ddim import ddim_table
from fastddpm.solvers.ddpm import posterior_table
from fastddpm.solvers.strides import Strides
from fastddpm.unet_config import UNetConfig

CLOSE = 1e-4


def unet_of(**fields):
    torch.manual_seed(0)
    defaults = {
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**defaults, **fields}).eval()


@pytest.fixture(scope="module")
def unet():
    return unet_of()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A DDPMPipeline's folder, 32x32, with random weights; the last layer's are small, see `test_rounding`."""
    path = tmp_path_factory.mktemp("pipeline")
    unet = unet_of(sample_size=32)
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(path)
    return path


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline(kind, unet, scheduler):
    pipe = kind(unet, scheduler)
    pipe.scheduler = scheduler
    return quiet(pipe)


def drawn(pipe, steps=20, batch=2, **call):
    """Two calls from one generator: the second picture shows whether it was drawn from as often as in diffusers."""
    generator = torch.Generator().manual_seed(3)
    call = {"output_type": "np", "num_inference_steps": steps, **call}
    return np.concatenate([pipe(batch, generator=generator, **call).images for _ in range(2)])


def with_variance(variance_type):
    scheduler = DDPMScheduler()
    scheduler.variance_type = variance_type
    return scheduler


def same_pictures(pipe, **call):
    theirs = drawn(pipe, **call)
    assert fastddpm.accelerate(pipe) is pipe
    ours = drawn(pipe, **call)
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, atol=CLOSE, rtol=0)
    assert theirs.std() > 0.03


def test_a_saved_pipeline_in_one_line(folder):
    stock = quiet(DDPMPipeline.from_pretrained(folder))
    pipe = fastddpm.accelerate(quiet(DDPMPipeline.from_pretrained(folder)))
    ours, theirs = drawn(pipe), drawn(stock)
    assert ours.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(ours, theirs, atol=CLOSE, rtol=0)


def test_saved_again_diffusers_reads_it(folder, tmp_path):
    pipe = fastddpm.accelerate(quiet(DDPMPipeline.from_pretrained(folder)))
    pictures = drawn(pipe, steps=5)
    pipe.save_pretrained(tmp_path)
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        saved, first = (json.loads((path / name).read_text()) for path in (tmp_path, folder))
        saved.pop("_name_or_path", None)
        assert saved == first
    stock = quiet(DDPMPipeline.from_pretrained(tmp_path))
    assert type(stock) is DDPMPipeline
    np.testing.assert_allclose(drawn(stock, steps=5), pictures, atol=CLOSE, rtol=0)


def test_rounding(unet):
    """DDIM with eta = 0 and a clip amplifies rounding where random weights are clipped much: ours as much as theirs."""

    def error(pipe):
        return np.abs(drawn(pipe, eta=0.0) - exact).max()

    double = DDIMScheduler()
    double.alphas_cumprod = double.alphas_cumprod.double()
    x, exact = torch.Generator().manual_seed(3), []
    wide = copy.deepcopy(unet).double()
    double.set_timesteps(20)
    for _ in range(2):
        state = torch.randn(2, 3, 16, 16, generator=x).double()
        for t in double.timesteps:
            with torch.no_grad():
                state = double.step(wide(state, t).sample, t, state).prev_sample
        exact.append((state / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
    exact = np.concatenate(exact)
    pipe = pipeline(DDIMPipeline, unet, DDIMScheduler())
    theirs = error(pipe)
    assert error(fastddpm.accelerate(pipe)) < 3 * theirs + CLOSE


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_saved_pipeline_as_ddim(folder, eta):
    same_pictures(quiet(DDIMPipeline.from_pretrained(folder)), eta=eta)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"steps_offset": 1},
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"clip_sample": False},
        {"thresholding": True, "sample_max_value": 2.0},
        {"num_train_timesteps": 333, "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "sample", "beta_schedule": "scaled_linear", "clip_sample_range": 0.7},
        {"trained_betas": np.linspace(1e-3, 0.05, 100).tolist(), "num_train_timesteps": 100},
    ],
    ids=str,
)
def test_every_config_gives_the_same_pictures(unet, config):
    same_pictures(pipeline(DDPMPipeline, unet, DDPMScheduler(**config)), steps=6)
    for call in ({"eta": 0.5}, {"eta": 0.0, "use_clipped_model_output": True}):
        same_pictures(pipeline(DDIMPipeline, unet, DDIMScheduler(**config)), steps=6, **call)


@pytest.mark.parametrize(
    "kind, scheduler, steps",
    [
        (DDPMPipeline, DDPMScheduler(variance_type="fixed_large", steps_offset=3), 6),
        (DDPMPipeline, DDPMScheduler(variance_type="fixed_small_log"), 6),
        (DDPMPipeline, with_variance("fixed_large"), 6),
        (DDPMPipeline, DDPMScheduler(beta_schedule="sigmoid"), 6),
        (DDPMPipeline, DDPMScheduler(beta_schedule="laplace", prediction_type="v_prediction"), 6),
        (DDPMPipeline, DDPMScheduler(num_train_timesteps=20), 20),
        (DDPMPipeline, DDPMScheduler(), 1),
        (DDPMPipeline, DDIMScheduler(clip_sample=False), 6),
        (DDIMPipeline, DDIMScheduler(set_alpha_to_one=False, clip_sample=False), 6),
        (DDIMPipeline, DDIMScheduler(timestep_spacing="trailing", clip_sample=False), 7),
    ],
)
def test_more_schedulers(unet, kind, scheduler, steps):
    same_pictures(pipeline(kind, unet, scheduler), steps=steps)


def test_a_scheduler_may_be_put_in_later(unet):
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, DDPMScheduler()))
    drawn(pipe, steps=6)
    pipe.scheduler = DDIMScheduler(clip_sample=False)
    stock = pipeline(DDPMPipeline, unet, DDIMScheduler(clip_sample=False))
    np.testing.assert_allclose(drawn(pipe, steps=6), drawn(stock, steps=6), atol=CLOSE, rtol=0)
    pipe.scheduler = EulerDiscreteScheduler()
    with pytest.raises(ConfigError, match="a EulerDiscreteScheduler; accelerate takes"):
        pipe(1)


def test_a_unet_may_be_put_in_later(unet):
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, DDPMScheduler()))
    first = drawn(pipe, steps=5)
    other = copy.deepcopy(unet)
    with torch.no_grad():
        other.conv_out.weight.mul_(0.5)
    pipe.unet = other
    second = drawn(pipe, steps=5)
    assert np.abs(second - first).max() > 0.01
    np.testing.assert_allclose(second, drawn(pipeline(DDPMPipeline, other, DDPMScheduler()), steps=5), atol=CLOSE)


def test_generators_of_all_kinds(unet):
    scheduler = DDPMScheduler()
    stock = pipeline(DDPMPipeline, unet, scheduler)
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, scheduler))

    def run(p, generators):
        torch.manual_seed(11)
        return p(2, generator=generators, num_inference_steps=6, output_type="np").images

    def each():
        return [torch.Generator().manual_seed(s) for s in (1, 2)]

    np.testing.assert_allclose(run(pipe, None), run(stock, None), atol=CLOSE, rtol=0)
    np.testing.assert_allclose(run(pipe, each()), run(stock, each()), atol=CLOSE, rtol=0)
    np.testing.assert_allclose(run(pipe, each()[:1]), run(stock, each()[:1]), atol=CLOSE, rtol=0)
    with pytest.raises(InputError, match="2 generators were given for 3 pictures"):
        pipe(3, generator=each())


def test_seeds_make_the_noise_and_nothing_is_drawn(unet):
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, DDPMScheduler()), seeds=4)
    call = {"num_inference_steps": 6, "output_type": "np"}
    before = torch.get_rng_state()
    three = pipe(3, seeds=[5, 6, 7], **call).images
    four = pipe(2, **call).images
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(pipe(1, seeds=[6], **call).images[0], three[1], atol=CLOSE)
    np.testing.assert_array_equal(pipe(2, seeds=4, **call).images, four)
    # it is the sampler's own result
    table = fastddpm.solvers.ddpm(NoiseSchedule.linear(), 6, clip=1.0)
    x = fastddpm.Sampler(unet, table).sample((2, 3, 16, 16), seeds=4)
    np.testing.assert_allclose(four, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), atol=CLOSE)
    # a generator goes before the pipeline's seeds, and not with the call's
    stock = pipeline(DDPMPipeline, unet, DDPMScheduler())
    np.testing.assert_allclose(drawn(pipe, steps=6), drawn(stock, steps=6), atol=CLOSE, rtol=0)
    with pytest.raises(InputError, match="seeds and generator are both given"):
        pipe(1, seeds=0, generator=torch.Generator())
    # without the pipeline's seeds, torch's noise again
    fastddpm.accelerate(pipe)
    assert np.abs(pipe(1, **call).images - pipe(1, **call).images).max() > 0.01


def test_a_learned_variance():
    """Theirs takes the root of the variance's logarithm, a NaN; so it is compared with the paper's."""
    unet = unet_of(out_channels=6)
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, DDPMScheduler(variance_type="learned_range")))
    table = fastddpm.solvers.ddpm(NoiseSchedule.linear(), 5, clip=1.0, variance="learned_range")
    x = fastddpm.Sampler(unet, table).sample((2, 3, 16, 16), seeds=4)
    images = pipe(2, seeds=4, num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), atol=CLOSE, rtol=0)
    torch.manual_seed(0)
    drawn = [torch.randn(2, 3, 16, 16) for _ in range(5)]  # x_T, and for all steps but the last
    x = fastddpm.Sampler(unet, table).sample(
        drawn[0].shape, seeds=0, x_T=drawn[0], noise=[*drawn[1:], None].__getitem__
    )
    images = pipe(2, generator=torch.manual_seed(0), num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1), atol=CLOSE, rtol=0)


def test_outputs(unet):
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, DDPMScheduler()))
    out = pipe(2, seeds=0, num_inference_steps=3)
    assert isinstance(out, ImagePipelineOutput)
    assert [type(i) for i in out.images] == [Image.Image] * 2
    assert out.images[0].size == (16, 16)
    tensors = pipe(2, seeds=0, num_inference_steps=3, output_type="pt", return_dict=False)
    assert isinstance(tensors, tuple)
    assert tensors[0].shape == (2, 3, 16, 16)
    np.testing.assert_allclose(np.asarray(out.images[0]) / 255, tensors[0][0].permute(1, 2, 0), atol=0.003)
    half = pipeline(DDPMPipeline, copy.deepcopy(unet).to(torch.bfloat16), DDPMScheduler())
    theirs = half(2, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images
    fastddpm.accelerate(half)
    ours = half(2, generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="pt").images
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours - theirs).abs().mean() < 0.02
    assert half(1, seeds=0, num_inference_steps=3).images[0].size == (16, 16)


def test_the_progress_bar_is_the_pipelines(unet, capsys):
    pipe = fastddpm.accelerate(DDPMPipeline(unet, DDPMScheduler()))
    pipe.set_progress_bar_config(desc="drawing")
    pipe(1, seeds=0, num_inference_steps=3)
    assert "drawing: 100%" in (said := capsys.readouterr().err)
    assert "3/3" in said
    pipe.set_progress_bar_config(disable=True)
    pipe(1, seeds=0, num_inference_steps=3)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_the_signature_is_kept(unet, kind):
    stock = inspect.signature(kind.__call__).parameters
    ours = inspect.signature(type(fastddpm.accelerate(kind(unet, DDPMScheduler()))).__call__).parameters
    assert list(ours) == [*stock, "seeds", "class_labels"]
    assert all(ours[name].default == p.default and ours[name].kind == p.kind for name, p in stock.items())


def test_it_stays_what_it_was(unet):
    pipe = fastddpm.accelerate(quiet(DDPMPipeline(unet, DDPMScheduler())))
    assert isinstance(pipe, DDPMPipeline)
    assert repr(pipe) == repr(DDPMPipeline(unet, DDPMScheduler()))
    assert set(pipe.components) == {"unet", "scheduler"}
    pipe(1, seeds=0, num_inference_steps=2)
    twin = copy.deepcopy(pipe)
    np.testing.assert_array_equal(drawn(twin, steps=3), drawn(pipe, steps=3))
    assert len(pipe.scheduler.timesteps) == 3


def test_classes_and_our_own_unet(unet):
    classes = unet_of(num_class_embeds=4)
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, classes, DDPMScheduler()))
    call = {"seeds": [1, 1], "num_inference_steps": 4, "output_type": "pt"}
    both = pipe(2, class_labels=[0, 3], **call).images
    assert (both[0] - both[1]).abs().max() > 1e-3
    torch.testing.assert_close(pipe(2, class_labels=3, **call).images[0], both[1], atol=CLOSE, rtol=0)
    for labels, message in (
        (None, "the unet has 4 classes; give class_labels"),
        ([0], "allowed: a whole number, or 2 of them"),
        ([0.5, 1.0], "allowed: a whole number, or 2 of them"),
        ([0, 4], r"allowed: whole numbers in 0 \.\.\. 3"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(2, class_labels=labels, **call)
    own = fastddpm.UNet(UNetConfig.from_diffusers(classes.config)).eval()
    own.load_state_dict(classes.state_dict())
    ours = fastddpm.accelerate(quiet(DDPMPipeline(own, DDPMScheduler())))
    torch.testing.assert_close(ours(2, class_labels=[0, 3], **call).images, both, atol=CLOSE, rtol=0)
    plain = fastddpm.accelerate(pipeline(DDPMPipeline, unet, DDPMScheduler()))
    with pytest.raises(InputError, match="the unet has no classes"):
        plain(1, class_labels=0)


def test_what_cannot_be_kept_is_refused(unet):
    class Own(DDPMPipeline):
        def __call__(self, batch_size=1):
            """Another loop."""

    class Inherited(DDPMPipeline):
        """The same loop."""

    class Stepping(DDPMScheduler):
        def step(self, *args, **kwargs):
            """Another step."""

    with pytest.raises(ConfigError, match=r"can't know the loop of Own; it takes diffusers' DDPMPipeline"):
        fastddpm.accelerate(Own(unet, DDPMScheduler()))
    with pytest.raises(ConfigError, match="can't know the loop of UNet2DModel"):
        fastddpm.accelerate(unet)
    patched = DDIMScheduler()
    patched.step = lambda *args, **kwargs: None
    for scheduler in (EulerDiscreteScheduler(), Stepping(), patched):
        with pytest.raises(ConfigError, match=f"a {type(scheduler).__name__}; accelerate takes"):
            fastddpm.accelerate(DDPMPipeline(unet, scheduler))
    with pytest.raises(ConfigError, match="accelerate was given a int"):
        fastddpm.accelerate(3)
    same_pictures(pipeline(Inherited, unet, DDPMScheduler()), steps=4)
    odd = fastddpm.accelerate(pipeline(DDIMPipeline, unet, DDPMScheduler()))
    with pytest.raises(ConfigError, match="the scheduler is a DDPMScheduler; a DDIMPipeline needs a DDIMScheduler"):
        odd(1)


@pytest.mark.parametrize(
    "scheduler, message",
    [
        (DDPMScheduler(variance_type="fixed_large_log"), "variance_type is 'fixed_large_log'"),
        (DDPMScheduler(variance_type="learned"), "variance_type is 'learned'"),
        (with_variance("fixed_small_log"), "variance_type is 'fixed_small_log', in its config 'fixed_small'"),
        (DDPMScheduler(prediction_type="flow"), "prediction_type is 'flow'"),
        (DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"), "terminal SNR of zero"),
    ],
)
def test_schedulers_that_are_refused(unet, scheduler, message):
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, scheduler))
    with pytest.raises(ConfigError, match=message):
        pipe(1, seeds=0, num_inference_steps=4)


def test_more_that_is_refused_in_the_call(unet):
    pipe = fastddpm.accelerate(pipeline(DDIMPipeline, unet, DDIMScheduler()))
    with pytest.raises(ConfigError, match=r"eta is 1\.5"):
        pipe(1, eta=1.5, num_inference_steps=3)
    with pytest.raises(ValueError, match="cannot be larger than"):
        pipe(1, num_inference_steps=2000)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod * 0.5
    with pytest.raises(ConfigError, match="alphas_cumprod don't belong to its betas"):
        pipe(1)
    pipe.scheduler = DDIMScheduler()
    pipe.scheduler.final_alpha_cumprod = torch.tensor(0.98)
    with pytest.raises(ConfigError, match="final_alpha_cumprod isn't its config's"):
        pipe(1)
    pipe.scheduler = DDIMScheduler()
    pipe.unet = copy.deepcopy(unet)
    pipe.unet._hf_hook = object()
    with pytest.raises(ConfigError, match="offloaded"):
        pipe(1)
    pipe.unet = unet_of(sample_size=None)
    with pytest.raises(ConfigError, match="no sample_size"):
        pipe(1)
    pipe.unet = unet_of(sample_size=(8, 16))
    assert pipe(1, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 8, 16)
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError):
        pipe(1, num_inference_steps=2)


def test_the_tables_are_the_solvers_own():
    schedule = NoiseSchedule.cosine(100)
    theirs = Strides.of(schedule, 9, "leading")
    strides = loops.strides_between(schedule, theirs.t, [*theirs.t[1:], -1])
    tables = [
        (
            posterior_table(strides, strides.t != 0, variance=v, clip=1.0),
            fastddpm.solvers.ddpm(schedule, 9, variance=v, clip=1.0),
        )
        for v in ("fixed_small", "fixed_large", "learned_range")
    ]
    for eta in (0.0, 0.4, 1.0):
        for clipped in (False, True):
            options = {"eta": eta, "use_clipped_model_output": clipped, "prediction_type": "v_prediction"}
            tables.append((ddim_table(strides, **options), fastddpm.solvers.ddim(schedule, 9, **options)))
    for ours, expected in tables:
        np.testing.assert_allclose(ours.rows, expected.rows, rtol=1e-9, atol=1e-11)

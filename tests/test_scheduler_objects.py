"""The drop-in schedulers as objects (diffusers 0.42.1): waits, compiled code, seeds, changes, copies, files."""

import copy
import pickle
import sys
import threading

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import (  # noqa: E402
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from schedulers import Waits, each  # noqa: E402

from fastddpm.errors import InputError  # noqa: E402
from fastddpm.integrations import diffusers as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning", "ignore:invalid value:RuntimeWarning")


# --- no waiting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [False, True])
@each
def test_no_step_waits_for_the_device(stock, fused, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    x = torch.randn(2, 3, 4, 4)
    counts = []
    for scheduler in (fused(), stock()):
        scheduler.set_timesteps(10)
        with Waits() as waits:
            for t in scheduler.timesteps:
                scheduler.step(x, t, x)
        counts.append(len(waits.names))
    assert counts[0] == 0
    assert counts[1] > 0  # so that the test would see some


@each
def test_what_diffusers_does_itself_waits_neither(stock, fused):
    config = {"variance_type": "learned"} if stock is not DDIMScheduler else {"prediction_type": "epsilon"}
    scheduler = fused(**config)
    scheduler.set_timesteps(10)
    x = torch.randn(2, 3, 4, 4).half()
    m = torch.cat([x, x], dim=1) if stock is DDPMScheduler else x
    with Waits() as waits:
        for t in scheduler.timesteps:
            scheduler.step(m, t, x)
    assert not [name for name in waits.names if name != "_to_copy"]


@each
def test_compiled_code_is_one_frame(stock, fused):
    from torch._dynamo.testing import CompileCounter

    for config in ({"algorithm_type": "sde-dpmsolver++"}, {}) if stock is DPMSolverMultistepScheduler else ({},):
        scheduler = fused(**config)

        def start(scheduler=scheduler):
            scheduler.set_timesteps(4)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            torch.manual_seed(0)

        def trajectory(x, scheduler=scheduler):
            for t in scheduler.timesteps:
                x = scheduler.step(0.3 * x, t, x, return_dict=False)[0]
            return x

        x = torch.randn(2, 3, 4, 4)
        torch._dynamo.reset()
        counter = CompileCounter()
        start()
        made = torch.compile(trajectory, backend=counter, fullgraph=True)(x)
        start()
        assert torch.equal(made, trajectory(x))
        assert counter.frame_count == 1


# --- counter-based noise ----------------------------------------------------------------------------------------------


@each
def test_counter_noise_belongs_to_the_sample(stock, fused, monkeypatch):
    config = {"algorithm_type": "sde-dpmsolver++"} if stock is DPMSolverMultistepScheduler else {}
    given = {"eta": 1.0} if stock is DDIMScheduler else {}
    scheduler = fused(**config)
    x, m = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)

    def run(seeds, rows):
        scheduler.use_counter_noise(seeds)
        scheduler.set_timesteps(5)
        y = x[rows]
        for t in scheduler.timesteps:
            y = scheduler.step(m[rows], t, y, **given).prev_sample
        return y

    together = run([5, 6, 7], slice(None))
    assert torch.equal(run([6], slice(1, 2)), together[1:2])
    assert not torch.equal(run([8], slice(1, 2)), together[1:2])
    monkeypatch.setattr(fused, "_kernel_devices", ("cpu",))
    torch.testing.assert_close(run([5, 6, 7], slice(None)), together, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="2 seeds were given for 3"):
        run([1, 2], slice(None))
    scheduler.use_counter_noise(0)
    with pytest.raises(InputError, match="generator"):
        scheduler.step(m, scheduler.timesteps[0], x, generator=torch.Generator(), **given)
    with pytest.raises(InputError, match="seed is -1"):
        scheduler.use_counter_noise(-1)
    assert "seeds" not in str(scheduler.config)


def test_counter_noise_is_the_samplers():
    """The same trajectory as `fastddpm.Sampler`'s from the same seeds."""
    import fastddpm

    scheduler = ours.FusedDDPMScheduler()
    scheduler.use_counter_noise([3, 4])
    scheduler.set_timesteps(10)
    x_T = torch.randn(2, 1, 4, 4)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * x, t, x).prev_sample
    table = fastddpm.solvers.ddpm(fastddpm.NoiseSchedule.linear(), 10, clip=1.0)
    there = fastddpm.Sampler(lambda y, t: 0.1 * y, table).sample((2, 1, 4, 4), seeds=[3, 4], x_T=x_T)
    torch.testing.assert_close(x, there, rtol=1e-4, atol=1e-4)


def test_a_refusal_where_diffusers_draws():
    scheduler = ours.FusedDDPMScheduler(variance_type="learned")
    scheduler.use_counter_noise(0)
    scheduler.set_timesteps(5)
    with pytest.raises(InputError, match="diffusers itself"):
        scheduler.step(torch.randn(1, 6, 4, 4), 800, torch.randn(1, 3, 4, 4))


# --- changes, threads -------------------------------------------------------------------------------------------------


def test_a_changed_scheduler_is_noticed():
    a, b = DDPMScheduler(), ours.FusedDDPMScheduler()
    m, x = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    for scheduler in (a, b):
        scheduler.set_timesteps(10)
        scheduler.step(m, 900, x)
        scheduler.register_to_config(prediction_type="v_prediction")
        scheduler.variance_type = "fixed_large"
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**0.9
    one, other = (s.step(m, 900, x, generator=torch.Generator().manual_seed(0)).prev_sample for s in (a, b))
    assert torch.equal(one, other)


@each
@pytest.mark.parametrize("name", ["timesteps", "alphas_cumprod"])
def test_a_change_in_place_is_noticed(stock, fused, name):
    name = "sigmas" if stock is DPMSolverMultistepScheduler and name == "alphas_cumprod" else name
    m, x, made = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), []
    for scheduler in (stock(), fused()):
        scheduler.set_timesteps(10)
        scheduler.step(m, scheduler.timesteps[0], x)
        getattr(scheduler, name).sub_(7) if name == "timesteps" else getattr(scheduler, name).mul_(0.9)
        made.append(
            scheduler.step(m, scheduler.timesteps[1], x, generator=torch.Generator().manual_seed(0)).prev_sample
        )
    assert torch.equal(*made)


@each
def test_a_subclass_may_replace_parts_of_the_step(stock, fused):
    def halved(base):
        class Half(base):
            def _get_variance(self, *args, **kwargs):
                return super()._get_variance(*args, **kwargs) / 2

            def convert_model_output(self, *args, **kwargs):
                return super().convert_model_output(*args, **kwargs) / 2

        return Half()

    given = {"eta": 1.0} if stock is DDIMScheduler else {}
    m, x, made = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), []
    for scheduler in (halved(stock), halved(fused), fused()):
        scheduler.set_timesteps(10)
        made.append(scheduler.step(m, scheduler.timesteps[2], x, generator=torch.Generator().manual_seed(0), **given))
    assert torch.equal(made[0].prev_sample, made[1].prev_sample)
    assert not torch.equal(made[0].prev_sample, made[2].prev_sample)


@each
def test_another_default_device(stock, fused):
    m, x, made = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3), []
    for scheduler in (stock(), fused()):
        with torch.device("meta"):
            scheduler.set_timesteps(10)
        made.append(
            scheduler.step(m, scheduler.timesteps[2], x, generator=torch.Generator().manual_seed(0)).prev_sample
        )
    assert torch.equal(*made)


def test_threads_with_different_etas():
    stock, fused = DDIMScheduler(), ours.FusedDDIMScheduler()
    m, x, z = (torch.randn(1, 1, 4, 4) for _ in range(3))
    for scheduler in (stock, fused):
        scheduler.set_timesteps(10)
    wrong = []

    def run(eta):
        given = {"eta": eta, "variance_noise": z if eta else None}
        expected = stock.step(m, 500, x, **given).prev_sample
        wrong.append(sum(not torch.equal(fused.step(m, 500, x, **given).prev_sample, expected) for _ in range(500)))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=run, args=(eta,)) for eta in (0.0, 1.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == [0, 0]


@each
def test_a_copy_looks_at_its_own_time_steps(stock, fused):
    """A time step is known by its address; a copy's are elsewhere, and another tensor may be where the first's were."""
    scheduler = fused()
    scheduler.set_timesteps(10)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        plan = twin._planned()
        assert plan.locate(twin.timesteps[3]) == 3
        assert plan.locate(torch.tensor(12345)) is None
        assert plan.locate(scheduler.timesteps[3]) == 3
        scheduler.timesteps[3] = 7  # no item of the copy's
        assert plan.locate(scheduler.timesteps[3]) is None
        changed = copy.deepcopy(scheduler)  # whose tensors don't count the change
        assert changed._planned().host[3] == 7
        scheduler.set_timesteps(10)


def test_compiled_code_off_the_schedule():
    scheduler, stock = ours.FusedDDIMScheduler(), DDIMScheduler()
    for s in (scheduler, stock):
        s.set_timesteps(10)
    m, x = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 4, 4)
    torch._dynamo.reset()
    step = torch.compile(lambda m, t, x: scheduler.step(m, t, x, return_dict=False)[0], backend="eager")
    for t in (500, 501, 950, 3):
        assert torch.equal(step(m, torch.tensor(t), x), stock.step(m, t, x).prev_sample)


# --- as an object of diffusers ----------------------------------------------------------------------------------------


@each
def test_config_saving_and_copies(stock, fused, tmp_path):
    for other in (DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler, diffusers.EulerDiscreteScheduler):
        made, expected = (c.from_config(other(beta_end=0.01).config) for c in (fused, stock))
        ignored = ("_class_name", "_use_default_values")
        same = [{k: v for k, v in s.config.items() if k not in ignored} for s in (made, expected)]
        assert same[0] == same[1]
    scheduler = fused(num_train_timesteps=500)
    scheduler.save_pretrained(tmp_path)
    assert fused.from_pretrained(tmp_path).config.num_train_timesteps == 500
    assert stock.from_pretrained(tmp_path).config.num_train_timesteps == 500
    assert isinstance(scheduler, stock)
    assert set(stock().compatibles) == set(scheduler.compatibles)
    assert fused.__module__ == "fastddpm.integrations.diffusers"
    scheduler.set_timesteps(5)
    x = torch.randn(1, 2, 3, 3)
    for twin in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        made = [
            s.step(x, int(s.timesteps[0]), x, generator=torch.Generator().manual_seed(0)) for s in (twin, scheduler)
        ]
        scheduler.set_timesteps(5)
        assert torch.equal(made[0].prev_sample, made[1].prev_sample)


def test_a_pipeline_saves_and_loads_it(tmp_path):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet, DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        draw = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=4, generator=draw, output_type="np").images

    expected = picture(pipe)
    pipe.scheduler = ours.FusedDDPMScheduler.from_config(pipe.scheduler.config)
    assert (picture(pipe) == expected).all()
    pipe.save_pretrained(tmp_path)
    again = DDPMPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is ours.FusedDDPMScheduler
    assert abs(picture(again) - expected).max() < 1e-4
    pipe = DDIMPipeline(unet, again.scheduler)  # diffusers makes a stock one of any scheduler that this is given
    assert type(pipe.scheduler) is DDIMScheduler
    config = tmp_path / "scheduler"
    pipe.scheduler = DDPMScheduler.from_pretrained(config)  # what to do for those who have no fastddpm
    pipe.save_pretrained(tmp_path)
    assert "fastddpm" not in (tmp_path / "model_index.json").read_text()
    assert "Fused" not in (config / "scheduler_config.json").read_text()

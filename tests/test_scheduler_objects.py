"""The drop-in schedulers as objects of diffusers (0.42.1): devices, threads, copies, files."""

import copy
import pickle
import sys
import threading

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel  # noqa: E402
from schedulers import PAIRS, SIGMAS, each, noisy, quiet, walk  # noqa: E402

from fastddpm.integrations import diffusers as ours  # noqa: E402

pytestmark = quiet


# --- devices, threads, copies -----------------------------------------------------------------------------------------


@each
def test_another_default_device(stock, fused):
    (config, given), made = noisy(stock), []
    for scheduler in (stock(**config), fused(**config)):
        with torch.device("meta"):
            if stock not in SIGMAS:  # these of diffusers' then mix devices
                scheduler.set_timesteps(10)
        scheduler.set_timesteps(10)
        made.append(walk(scheduler, torch.ones(2, 1, 3, 3), scheduler.timesteps[:3], **given))
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
        changed = copy.deepcopy(scheduler)  # it has no plan but what it makes
        assert changed._planned().host[3] == 7
        scheduler.set_timesteps(10)


# --- as an object of diffusers ----------------------------------------------------------------------------------------


@each
def test_config_saving_and_copies(stock, fused, tmp_path):
    for other in (diffusers.PNDMScheduler, *PAIRS):
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
    x = walk(scheduler, torch.ones(1, 2, 3, 3), scheduler.timesteps[:1])
    twins = copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler
    made = [walk(twin, x, twin.timesteps[1:]) for twin in twins]
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[1], made[2])


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

"""A scheduler config beside the weights decides how they are sampled, as diffusers would."""

import json

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler

from fastddpm import solvers
from fastddpm.errors import CheckpointError, ConfigError
from fastddpm.pretrained import SchedulerConfig, find_scheduler_config
from fastddpm.schedule import NoiseSchedule

AGREES = {"use_clipped_model_output": True}  # not diffusers' default: see SchedulerConfig.table


def rows(*args, **options):
    return solvers.make(*args, **options).rows


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
def test_the_defaults_are_those_of_diffusers(scheduler):
    for config in ({}, dict(scheduler().config)):
        read = SchedulerConfig.from_diffusers(config)
        linear = NoiseSchedule.linear()
        np.testing.assert_array_equal(read.table("ddim", 20).rows, rows("ddim", linear, 20, clip=1.0, **AGREES))
        np.testing.assert_array_equal(read.table("ddpm", 20).rows, rows("ddpm", linear, 20, clip=1.0))


def test_every_field_reaches_the_table(tmp_path):
    theirs = DDPMScheduler(
        num_train_timesteps=500,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample_range=2.0,
        timestep_spacing="trailing",
        variance_type="fixed_large",
    )
    theirs.save_pretrained(tmp_path)
    read = SchedulerConfig.from_folder(tmp_path)
    cosine = NoiseSchedule.cosine(500)
    common = {"prediction_type": "v_prediction", "clip": 2.0, "spacing": "trailing"}
    expected = rows("ddpm", cosine, 10, variance="fixed_large", **common)
    np.testing.assert_array_equal(read.table("ddpm", 10).rows, expected)
    expected = rows("ddim", cosine, 10, eta=0.5, **common, **AGREES)
    np.testing.assert_array_equal(read.table("ddim", 10, eta=0.5).rows, expected)
    # what the caller says goes first
    expected = rows("ddpm", cosine, 10, variance="fixed_small", **{**common, "clip": None})
    np.testing.assert_array_equal(read.table("ddpm", 10, variance="fixed_small", clip=None).rows, expected)


def test_diffusers_own_ddim_is_one_option_away():
    read = SchedulerConfig.from_diffusers({})
    stock = read.table("ddim", 10, use_clipped_model_output=False)
    np.testing.assert_array_equal(stock.rows, rows("ddim", NoiseSchedule.linear(), 10, clip=1.0))
    unclipped = SchedulerConfig.from_diffusers({"clip_sample": False}).table("ddim", 10)
    np.testing.assert_array_equal(unclipped.rows, rows("ddim", NoiseSchedule.linear(), 10))


def test_no_clip_and_the_logarithm_of_fixed_small():
    read = SchedulerConfig.from_diffusers({"clip_sample": False, "variance_type": "fixed_small_log"})
    expected = rows("ddpm", NoiseSchedule.linear(), 10, variance="fixed_small")
    np.testing.assert_array_equal(read.table("ddpm", 10).rows, expected)


@pytest.mark.parametrize("place", ["scheduler_config.json", "scheduler/scheduler_config.json"])
def test_the_config_is_found_in_either_layout(tmp_path, place):
    assert find_scheduler_config(tmp_path) is None
    assert SchedulerConfig.from_folder(tmp_path).schedule.num_steps == 1000
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"num_train_timesteps": 7}))
    assert find_scheduler_config(tmp_path) == path
    assert SchedulerConfig.from_folder(tmp_path).schedule.num_steps == 7


def test_a_pipelines_unet_folder_has_the_scheduler_beside_it(tmp_path):
    for name in ("scheduler", "unet", "vae"):
        (tmp_path / name).mkdir()
    config = tmp_path / "scheduler" / "scheduler_config.json"
    config.write_text("{}")
    assert find_scheduler_config(tmp_path / "unet") == config
    assert find_scheduler_config(tmp_path / "vae") is None


@pytest.mark.parametrize(
    "config, message",
    [
        ({"thresholding": 1}, "thresholding is 1; allowed: true or false"),
        ({"steps_offset": 1}, "steps_offset is 1"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one is False"),
        ({"clip_sample": "yes"}, "clip_sample is 'yes'"),
        ({"clip_sample_range": -1}, "clip is -1"),
        ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
        ({"timestep_spacing": ["leading"]}, "spacing is"),
        ({"beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ({"variance_type": "learned"}, "variance_type is 'learned'; solver ddpm takes 'fixed_small'"),
        ({"variance_type": ["fixed_small"]}, "variance_type is"),
    ],
)
def test_what_cannot_be_sampled_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig.from_diffusers(config).table("ddpm", 10)


def test_ddim_does_not_mind_a_learned_variance():
    assert SchedulerConfig.from_diffusers({"variance_type": "learned_range"}).table("ddim", 10).num_rows == 10


@pytest.mark.parametrize("text", ["{", "[]", '{"beta_start": NaN}', '{"beta_start": 1, "beta_start": 2}'])
def test_a_damaged_config_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / "scheduler_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json"):
        SchedulerConfig.from_folder(tmp_path)

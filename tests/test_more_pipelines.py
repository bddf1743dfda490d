"""`accelerate`: DPM-Solver in a DDPMPipeline, consistency models, pickles and dtypes (diffusers 0.42.1)."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
)
from test_pipelines import CLOSE, drawn, pipeline, quiet, same_pictures, unet_of

import fastddpm
from fastddpm.errors import ConfigError
from fastddpm.integrations.diffusers import FusedDPMSolverMultistepScheduler


@pytest.fixture(scope="module")
def unet():
    unet = unet_of()
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.3)
    return unet


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"solver_order": 1},
        {"solver_order": 3, "solver_type": "heun", "use_karras_sigmas": True},
        {"solver_order": 3, "prediction_type": "v_prediction", "lower_order_final": False},
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        {"prediction_type": "sample", "timestep_spacing": "leading", "steps_offset": 1},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    ],
    ids=str,
)
def test_dpm_solver_in_a_ddpm_pipeline(unet, config):
    for steps in (1, 16 if config.get("solver_order") == 3 else 6):
        same_pictures(pipeline(DDPMPipeline, unet, DPMSolverMultistepScheduler(**config)), steps=steps)
    same_pictures(pipeline(DDPMPipeline, unet, FusedDPMSolverMultistepScheduler(**config)), steps=6)


def test_dpm_solver_with_seeds_and_what_has_no_table(unet):
    scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++")
    pipe = fastddpm.accelerate(pipeline(DDPMPipeline, unet, scheduler))
    call = {"num_inference_steps": 5, "output_type": "np"}
    both = pipe(2, seeds=[3, 4], **call).images
    np.testing.assert_allclose(pipe(1, seeds=[4], **call).images[0], both[1], atol=CLOSE)
    assert np.abs(both[0] - both[1]).max() > 0.01
    pipe.scheduler = DPMSolverMultistepScheduler(thresholding=True)
    with pytest.raises(ConfigError, match="has no table"):
        drawn(pipe, steps=5)


def consistency(unet, **config):
    return quiet(ConsistencyModelPipeline(unet, CMStochasticIterativeScheduler(**config)))


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"num_inference_steps": 3},
        {"num_inference_steps": None, "timesteps": [22, 7, 0]},
        {"latents": torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)},
    ],
    ids=lambda call: " ".join(call) or "defaults",
)
@pytest.mark.parametrize("config", [{}, {"clip_denoised": False, "s_noise": 1.01, "sigma_max": 10.0}], ids=str)
def test_consistency_models(call, config):
    same_pictures(consistency(unet_of(), **config), **{"steps": 1, **call})


def test_callbacks_and_classes_of_consistency_models():
    stock = consistency(unet_of(num_class_embeds=4, time_embedding_type="positional"))
    pipe = fastddpm.accelerate(copy.copy(stock))
    for labels in (None, [0, 3], torch.tensor([1, 2])):
        seen = []
        for p in (stock, pipe):
            seen.append([])
            given = {"generator": torch.Generator().manual_seed(0), "output_type": "pt", "num_inference_steps": 5}
            torch.manual_seed(0)

            def callback(i, t, x, calls=seen[-1]):
                calls.append((i, float(t), x))

            images = p(2, labels, callback=callback, callback_steps=2, **given).images
            seen[-1].append((-1, 0.0, images))
        assert [c[:2] for c in seen[0]] == [c[:2] for c in seen[1]]
        for (*_, one), (*_, other) in zip(*seen, strict=True):
            torch.testing.assert_close(other, one, atol=2e-3, rtol=1e-4)  # sigma is 80 at first
    with pytest.raises(ValueError, match="callback_steps"):
        pipe(1, callback_steps=0)
    with pytest.raises(ValueError, match="output_type"):
        pipe(1, output_type="latent")
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(ConfigError, match="a ConsistencyModelPipeline needs a CMStochasticIterativeScheduler"):
        pipe(1)


def test_consistency_models_with_seeds(unet):
    pipe = fastddpm.accelerate(consistency(unet), seeds=3)
    both = pipe(2, num_inference_steps=3, output_type="np", seeds=[3, 4]).images
    one = pipe(1, num_inference_steps=3, output_type="np", seeds=[4]).images
    np.testing.assert_allclose(one[0], both[1], atol=CLOSE)
    assert len(pipe(2).images) == 2


@pytest.mark.parametrize("kind", [DDPMPipeline, DDIMPipeline])
def test_pickles(unet, kind):
    pipe = fastddpm.accelerate(pipeline(kind, unet, DDIMScheduler(clip_sample=False)), seeds=3)
    pictures = drawn(pipe, steps=3)
    for twin in (pickle.loads(pickle.dumps(pipe)), copy.copy(pipe), copy.deepcopy(pipe)):
        assert type(twin) is type(pipe)
        assert fastddpm.accelerate(twin, seeds=3) is twin
        np.testing.assert_array_equal(drawn(twin, steps=3), pictures)


def test_a_pipeline_in_float64(unet):
    pipe = pipeline(DDPMPipeline, copy.deepcopy(unet).double(), DDPMScheduler())
    theirs = drawn(pipe, steps=4)
    ours = drawn(fastddpm.accelerate(pipe), steps=4)
    assert ours.dtype == theirs.dtype == np.float64
    np.testing.assert_allclose(ours, theirs, atol=CLOSE)
    pipe.to(torch.float32)
    assert drawn(pipe, steps=4).dtype == np.float32

"""denoising-diffusion-pytorch (2.3.4, with einops 0.8.2): `accelerate` gives its own pictures.

The package's samplers need torch and einops alone, but it imports what its Trainer needs. Of that, torchvision has no
build for every torch; so what doesn't import stands empty here while the package is imported: no test trains.
"""

import copy
import importlib
import pickle
import sys
from unittest import mock

import pytest
import torch

import fastddpm
from fastddpm.errors import ConfigError

TRAINERS = ("torchvision", "accelerate", "ema_pytorch", "pytorch_fid.fid_score", "pytorch_fid.inception")


def imported():
    """denoising_diffusion_pytorch, with empty modules for the parts of its Trainer that don't import."""
    pytest.importorskip("einops", reason="pip install --no-deps einops denoising-diffusion-pytorch")
    empty = []
    for name in TRAINERS:
        try:
            importlib.import_module(name)
        except Exception:  # torchvision's own build fails with a RuntimeError where it is for another torch
            top = name.partition(".")[0]
            for part in {top, name}:
                if part not in sys.modules:
                    sys.modules[part] = mock.MagicMock()
                    empty.append(part)
    try:
        return pytest.importorskip(
            "denoising_diffusion_pytorch",
            reason="pip install --no-deps einops denoising-diffusion-pytorch (its torchvision may replace torch)",
        )
    finally:
        for part in empty:
            del sys.modules[part]


ddp = imported()


def diffusion_of(self_condition=False, **options):
    torch.manual_seed(0)
    model = ddp.Unet(8, dim_mults=(1, 2), self_condition=self_condition, attn_heads=1, attn_dim_head=8).eval()
    return ddp.GaussianDiffusion(model, image_size=8, **{"timesteps": 12, **options}).eval()


def pictures(diffusion, *args, **kwargs):
    """Two batches in a row, from torch's generator at one seed: the second one shows how often it was drawn from."""
    torch.manual_seed(7)
    return torch.cat([diffusion.sample(*args, **kwargs) for _ in range(2)])


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
@pytest.mark.parametrize("self_condition", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling_timesteps": 7},
        {"beta_schedule": "cosine", "sampling_timesteps": 11, "ddim_sampling_eta": 0.5},
        {"beta_schedule": "linear", "timesteps": 24, "sampling_timesteps": 7, "ddim_sampling_eta": 1.0},
    ],
    ids=str,
)
def test_the_pictures_are_its_own(objective, self_condition, options):
    diffusion = diffusion_of(self_condition, objective=objective, **options)
    theirs = pictures(diffusion, 2)
    assert fastddpm.accelerate(diffusion) is diffusion
    ours = pictures(diffusion, 2)
    assert ours.shape == theirs.shape == (4, 3, 8, 8)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert theirs.std() > 0.1


def test_it_is_what_tells_the_model_its_last_x0():
    diffusion = fastddpm.accelerate(diffusion_of(True, sampling_timesteps=5))
    told = pictures(diffusion, 2)
    diffusion.self_condition = False
    assert (pictures(diffusion, 2) - told).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [12, 7])
def test_all_time_steps_are_returned(steps):
    diffusion = diffusion_of(sampling_timesteps=steps)
    theirs = pictures(diffusion, 2, return_all_timesteps=True)
    ours = pictures(fastddpm.accelerate(diffusion), 2, return_all_timesteps=True)
    assert ours.shape == (4, steps + 1, 3, 8, 8)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_its_own_range_where_it_does_not_normalize():
    diffusion = diffusion_of(auto_normalize=False, sampling_timesteps=5)
    theirs = pictures(diffusion, 2)
    assert theirs.min() < -0.1
    torch.testing.assert_close(pictures(fastddpm.accelerate(diffusion), 2), theirs, atol=1e-4, rtol=0)


def test_options_may_be_changed_later():
    diffusion = fastddpm.accelerate(diffusion_of())
    pictures(diffusion, 1)
    stock = diffusion_of(sampling_timesteps=6, ddim_sampling_eta=0.3)
    diffusion.sampling_timesteps, diffusion.is_ddim_sampling, diffusion.ddim_sampling_eta = 6, True, 0.3
    torch.testing.assert_close(pictures(diffusion, 2), pictures(stock, 2), atol=1e-4, rtol=0)


def test_seeds_make_the_noise_and_nothing_is_drawn():
    diffusion = fastddpm.accelerate(diffusion_of(sampling_timesteps=6, ddim_sampling_eta=1.0))
    before = torch.get_rng_state()
    images = diffusion.sample(3, seeds=[5, 6, 7])
    assert torch.equal(torch.get_rng_state(), before)
    assert images.min() >= 0
    assert images.max() <= 1
    torch.testing.assert_close(diffusion.sample(1, seeds=[6]), images[1:2], atol=1e-4, rtol=0)
    states = diffusion.sample(3, return_all_timesteps=True, seeds=[5, 6, 7])
    torch.testing.assert_close(states[:, -1], images, atol=1e-6, rtol=0)
    assert 0.7 < (states[:, 0] * 2 - 1).std() < 1.3
    again = fastddpm.accelerate(diffusion, seeds=[5, 6, 7])
    assert again is diffusion
    torch.testing.assert_close(diffusion.sample(3), images, atol=1e-6, rtol=0)


def test_a_copy_a_state_dict_and_training_are_as_before():
    diffusion = diffusion_of(sampling_timesteps=5)
    names = list(diffusion.state_dict())
    fastddpm.accelerate(diffusion).sample(1)
    twin = copy.deepcopy(diffusion)  # as EMA makes one
    torch.testing.assert_close(pictures(twin, 2), pictures(diffusion, 2), atol=1e-6, rtol=0)
    assert list(diffusion.state_dict()) == names
    assert isinstance(diffusion, ddp.GaussianDiffusion)
    assert type(diffusion).__name__ == "GaussianDiffusion"
    diffusion.train()(torch.rand(2, 3, 8, 8)).backward()
    assert diffusion.model.final_conv.weight.grad.abs().max() > 0


class Shrunk(torch.nn.Module):
    channels = out_dim = 1
    self_condition = True

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, time, told=None):
        assert time.dtype == torch.int64
        return self.scale * (x if told is None else x - 0.1 * told) + 1e-3 * time[:, None, None, None]


def test_a_pickle_is_accelerated_too(tmp_path):  # of a model that pickles, as the package's Unet doesn't
    diffusion = ddp.GaussianDiffusion(Shrunk(), image_size=8, timesteps=20, sampling_timesteps=5)
    fastddpm.accelerate(diffusion, seeds=3)
    expected = diffusion.sample(2)
    torch.save(diffusion, tmp_path / "diffusion.pt")
    loaded = torch.load(tmp_path / "diffusion.pt", weights_only=False)
    for twin in (loaded, pickle.loads(pickle.dumps(diffusion))):
        assert type(twin) is type(diffusion)
        assert torch.equal(twin.sample(2), expected)


def test_interpolation_is_its_own():
    diffusion, (one, other) = diffusion_of(), torch.rand(2, 2, 3, 8, 8)
    made = []
    for each in (diffusion, fastddpm.accelerate(copy.deepcopy(diffusion))):
        torch.manual_seed(1)
        made.append(each.interpolate(one, other, t=6, lam=0.3))
    assert torch.equal(*made)


def test_any_model_with_its_arguments():
    diffusion = ddp.GaussianDiffusion(Shrunk(), image_size=(4, 6), timesteps=20)
    theirs = pictures(diffusion, 2)
    torch.testing.assert_close(pictures(fastddpm.accelerate(diffusion), 2), theirs, atol=1e-4, rtol=0)


def test_other_diffusions_are_refused():
    model = ddp.Unet(8, dim_mults=(1, 2), learned_variance=True)
    learned = ddp.LearnedGaussianDiffusion(model, image_size=8, timesteps=10)
    with pytest.raises(ConfigError, match=r"LearnedGaussianDiffusion samples \(its p_mean_variance"):
        fastddpm.accelerate(learned)
    with pytest.raises(ConfigError, match="can't know how a Unet samples"):
        fastddpm.accelerate(model)

    class Own(ddp.GaussianDiffusion):
        """Changes nothing of the sampling."""

    own = Own(ddp.Unet(8, dim_mults=(1, 2)), image_size=8, timesteps=5)
    assert fastddpm.accelerate(own).sample(1).shape == (1, 3, 8, 8)
    own.sampling_timesteps, own.is_ddim_sampling, own.ddim_sampling_eta = 2, True, 2.0
    with pytest.raises(ConfigError, match=r"eta is 2\.0"):
        own.sample(1)
    own.sampling_timesteps = 0
    with pytest.raises(ConfigError, match=r"sampling_timesteps is 0; allowed: an integer in 1 \.\.\. 5"):
        own.sample(1)
    with pytest.raises(ConfigError, match="weights are float64"):
        own.double().p_sample_loop((1, 3, 8, 8))

"""guided-diffusion's sampling loops: the same calls, on `GaussianDiffusion.of(diffusion)`. Needs nothing but fastddpm.

The model here is the shipped one, made to return x_0 from the v that it predicts; yours goes in as it is.
"""

import numpy as np
import torch

import fastddpm
from fastddpm.integrations.guided_diffusion import GaussianDiffusion
from fastddpm.pretrained import DEFAULT, SchedulerConfig

schedule = SchedulerConfig.from_folder(DEFAULT).schedule
unet = fastddpm.UNet.from_pretrained(DEFAULT, dtype=torch.float32)
alpha = torch.tensor(schedule.sqrt_alphas_cumprod).float()[:, None, None, None]
sigma = torch.tensor(schedule.sqrt_one_minus_alphas_cumprod).float()[:, None, None, None]


def model(x, t, y):
    return alpha[t] * x - sigma[t] * unet(x, t, class_labels=y)


def darker(x, t, y):
    """The gradient of log p(y | x): any function of x will do."""
    return -0.02 * torch.sigmoid(4 * x)


# With their object it is GaussianDiffusion.of(diffusion).
diffusion = GaussianDiffusion(schedule.betas, "start_x", "fixed_large", use_timesteps="15")
shape, given = (2, 1, 32, 32), {"y": torch.tensor([1, 8])}
torch.manual_seed(0)
images = diffusion.p_sample_loop(model, shape, model_kwargs=given)
guided = diffusion.ddim_sample_loop(model, shape, model_kwargs=given, cond_fn=darker, seeds=[3, 4])
plain = diffusion.ddim_sample_loop(model, shape, model_kwargs=given, seeds=[3, 4])
print("p_sample_loop:", tuple(images.shape), "in", [round(float(v), 2) for v in images.aminmax()])
print("mean of the pictures:", np.round(plain.mean(dim=(1, 2, 3)).numpy(), 3))
print("the same noise, with cond_fn:", np.round(guided.mean(dim=(1, 2, 3)).numpy(), 3))

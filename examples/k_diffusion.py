"""k-diffusion's and ComfyUI's samplers: one import. Needs nothing but fastddpm.

The model here is the shipped one behind D(x; sigma), what k-diffusion's wrappers make of a network.
"""

import torch

import fastddpm
from fastddpm import k_sampling as sampling  # the line; was: from k_diffusion import sampling
from fastddpm.pretrained import DEFAULT, SchedulerConfig

schedule = SchedulerConfig.from_folder(DEFAULT).schedule
unet = fastddpm.UNet.from_pretrained(DEFAULT, dtype=torch.float32)
log_sigmas = torch.tensor(-0.5 * schedule.log_snr).float()


def model(x, sigma, label):
    """x_0 from x = x_0 + sigma eps, by a network that predicts v."""
    t = (sigma.log()[:, None] - log_sigmas).abs().argmin(dim=1)
    norm = torch.sqrt(1 + sigma**2)[:, None, None, None]
    return x / norm**2 - sigma[:, None, None, None] / norm * unet(x / norm, t, class_labels=label)


low, high = log_sigmas[[0, -1]].exp().tolist()
sigmas = sampling.get_sigmas_karras(12, low, high)
torch.manual_seed(0)
x, label = torch.randn(2, 1, 32, 32) * sigmas[0], {"label": torch.tensor([1, 8])}


def show(step):
    if step["i"] % 4 == 0:
        print(f"  step {step['i']}: sigma {float(step['sigma']):7.3f}, x_0's deviation {step['denoised'].std():.2f}")


images = sampling.sample_dpmpp_2m(model, x, sigmas, label, callback=show, disable=True)
print("sample_dpmpp_2m:", [round(float(v), 2) for v in images.aminmax()])
images = sampling.sample_euler_ancestral(model, x, sigmas, label, disable=True)  # torch's random numbers, as there
images = sampling.sample_euler_ancestral(model, x, sigmas, label, disable=True, seeds=[3, 4])  # or one seed a picture
print("sample_euler_ancestral:", [round(float(v), 2) for v in images.aminmax()])

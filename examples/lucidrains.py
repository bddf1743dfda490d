"""lucidrains' denoising-diffusion-pytorch: ``accelerate(diffusion).sample(16)``. Needs that package."""

import sys
import time

import torch

import fastddpm

try:
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
    print(f"denoising-diffusion-pytorch doesn't import ({error}): pip install it", file=sys.stderr)
    sys.exit(77)

torch.manual_seed(0)
model = Unet(16, dim_mults=(1, 2), self_condition=True).eval()  # or one that you trained
diffusion = GaussianDiffusion(model, image_size=16, timesteps=100, sampling_timesteps=20)


def drawn():
    torch.manual_seed(1)
    start = time.perf_counter()
    return diffusion.sample(4), time.perf_counter() - start


theirs, before = drawn()

fastddpm.accelerate(diffusion)  # the line

ours, after = drawn()
print(f"stock {before:.2f} s, accelerated {after:.2f} s, largest difference {(ours - theirs).abs().max():.1e}")
print("one seed a picture:", tuple(diffusion.sample(2, seeds=[3, 4]).shape))

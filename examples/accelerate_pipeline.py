"""A diffusers pipeline, accelerated in one line: the same pictures from the same generator. Needs diffusers."""

import sys
import tempfile
import time

import torch

import fastddpm

try:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
except ImportError:
    print("diffusers isn't installed: pip install diffusers", file=sys.stderr)
    sys.exit(77)

torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=32,
    layers_per_block=1,
    block_out_channels=(32, 32),
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
temporary = tempfile.TemporaryDirectory()
folder = temporary.name  # or one that you have
DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    images = pipe(2, generator=generator, num_inference_steps=20, output_type="pt").images
    return images, time.perf_counter() - start


theirs, before = drawn(DDPMPipeline.from_pretrained(folder))

pipe = fastddpm.accelerate(DDPMPipeline.from_pretrained(folder))  # the line

ours, after = drawn(pipe)
print(f"diffusers {before:.2f} s, accelerated {after:.2f} s, largest difference {(ours - theirs).abs().max():.1e}")
print("a picture of its own seed, whatever else is drawn:", pipe(2, seeds=[3, 4], num_inference_steps=20).images)

"""A diffusers pipeline with a fused scheduler: the same picture, in less of the scheduler's time."""

import sys
import time

import torch

try:
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
except ImportError:
    print("needs diffusers: pip install diffusers", file=sys.stderr)
    sys.exit(77)

from fastddpm.integrations.diffusers import FusedDDIMScheduler

torch.manual_seed(0)
blocks = dict(down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"))
unet = UNet2DModel(sample_size=16, block_out_channels=(16, 16), layers_per_block=1, norm_num_groups=4, **blocks)
pipe = DDPMPipeline(unet, DDIMScheduler())  # random weights; or DDPMPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)


def draw():
    return pipe(num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="np").images


before = draw()
pipe.scheduler = FusedDDIMScheduler.from_config(pipe.scheduler.config)  # this line is all
print("the same picture:", bool((draw() == before).all()))

m, x = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
for scheduler in (DDIMScheduler(), pipe.scheduler):
    scheduler.set_timesteps(50)
    start = time.perf_counter()
    for t in scheduler.timesteps:
        scheduler.step(m, t, x)
    print(f"{type(scheduler).__name__}: {(time.perf_counter() - start) / 50 * 1e6:.0f} us a step")

pipe.scheduler.use_counter_noise([1, 2])  # optional: each sample's noise depends on its own seed alone
pair = torch.randn(2, 3, 16, 16)
both = pipe.scheduler.step(pair, 500, pair, eta=1.0).prev_sample
pipe.scheduler.use_counter_noise([2])
alone = pipe.scheduler.step(pair[1:], 500, pair[1:], eta=1.0).prev_sample
print("a sample's noise in another batch:", "the same" if torch.equal(both[1:], alone) else "another")

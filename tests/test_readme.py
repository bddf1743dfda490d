"""The README's Python runs, and what it points to is there."""

import re
from pathlib import Path

import pytest
import torch

import fastddpm

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_the_ten_lines_run():
    code = re.search(r"```python\n(.*?)```", TEXT, re.S).group(1)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    images = names["images"]
    assert images.shape == (4, 1, 32, 32)
    assert images.abs().max() <= 1.01
    assert images.flatten(1).std(dim=1).min() > 0.2  # pictures, not a flat grey
    assert (images - names["x"]).abs().max() == 0  # the trace ends in the same samples


def test_the_examples_of_solvers_guidance_and_uses_run():
    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[1]
    shape = (4, 1, 8, 8)
    one, other = torch.rand(2, 1, 1, 8, 8)
    names = dict(fastddpm=fastddpm, schedule=fastddpm.NoiseSchedule.linear(), shape=shape, one=one, other=other)
    names |= dict(labels=torch.arange(4), picture=torch.rand(shape), keep=torch.rand(8, 8) > 0.5)
    names |= dict(model=lambda x, t, class_labels=None: 0.9 * x, log_prob=lambda x, t, y: -x.square().flatten(1).sum(1))
    exec(compile(code, "README.md", "exec"), names)
    assert names["guided"](torch.rand(shape), torch.zeros(4, dtype=torch.int64), y=names["labels"]).shape == shape


def test_the_lines_for_diffusers_run():
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    code = re.findall(r"```python\n(.*?)```", TEXT, re.S)[2]
    blocks = dict(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))
    unet = UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    names = {"pipe": DDIMPipeline(unet, DDIMScheduler())}
    names["pipe"].set_progress_bar_config(disable=True)
    exec(compile(code, "README.md", "exec"), names)
    assert names["pipe"](num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(((?!http)[^)]+)\)", TEXT))))
def test_links(name):
    assert (ROOT / name).exists()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in TEXT
    assert "TODO" not in TEXT

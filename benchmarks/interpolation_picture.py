"""Pictures between two pictures, as figure 8 of Ho et al. 2020, with the shipped weights.

python benchmarks/interpolation_picture.py      # writes docs/interpolation.png
"""

from __future__ import annotations

from pathlib import Path

import torch

from fastddpm import Sampler, UNet, pictures, uses
from fastddpm.pretrained import DEFAULT, SchedulerConfig

OUT = Path(__file__).resolve().parent.parent / "docs" / "interpolation.png"
PAIRS = ((0, 6), (3, 8), (6, 2), (5, 7))  # T-shirt and shirt, dress and bag, shirt and pullover, sandal and sneaker
NO_CLASS, STRENGTH = 10, 0.25


def main() -> None:
    """Draw a picture of each class, and what lies between the pairs: the ends are the pictures themselves."""
    unet, config = UNet.from_pretrained(DEFAULT), SchedulerConfig.from_folder(DEFAULT)
    drawn = Sampler(unet, config.table("ddim", 20)).sample(
        (10, 1, 32, 32),
        seeds=3,
        model_kwargs={"class_labels": torch.arange(10)},
        guidance_scale=2.0,
        unconditional_kwargs={"class_labels": NO_CLASS},
    )
    first, second = (drawn[list(side)] for side in zip(*PAIRS, strict=True))
    sampler = Sampler(unet, config.table("ddpm", 40, start=uses.skipped(40, STRENGTH)))
    no_class = {"class_labels": torch.full((len(PAIRS),), NO_CLASS)}
    between = uses.interpolate(sampler, first, second, seeds=1, weights=7, model_kwargs=no_class)
    made = torch.cat([first[None], between, second[None]])  # [9, pairs, 1, 32, 32]
    pictures.grid(made.transpose(0, 1).flatten(0, 1).numpy(), columns=len(made), scale=2).save(OUT)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

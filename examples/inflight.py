"""Continuous batching: users who come and go share one running batch, each with a solver and steps of their own."""

import asyncio

import torch

import fastddpm
from fastddpm.errors import BusyError
from fastddpm.pretrained import DEFAULT

unet = fastddpm.UNet.from_pretrained(DEFAULT).eval()
common = {"prediction_type": "v_prediction", "clip": 1.0}
users = [  # who comes after how many seconds, and asks for what
    ("Ada", 0.0, {"seed": 0, "solver": "ddpm", "steps": 20, "model_kwargs": {"class_labels": 0}}),
    ("Bea", 0.0, {"seed": 1, "solver": "unipc", "steps": 8, "model_kwargs": {"class_labels": 8}, "guidance_scale": 2}),
    ("Cid", 0.1, {"seed": 2, "solver": "dpm_solver", "steps": 10, "model_kwargs": {"class_labels": 9}}),
    ("Dan", 0.2, {"seed": 3, "solver": "ddim", "steps": 12, "use_clipped_model_output": True}),
]


async def serve(sampler: fastddpm.InflightSampler, name: str, comes: float, request: dict) -> None:
    await asyncio.sleep(comes)
    try:
        future = sampler.submit(**request, **common, timeout=0)
    except BusyError as error:  # a server would answer 503
        print(name, error)
        return
    picture = await asyncio.wrap_future(future)  # a client that goes away cancels it, and frees its slot
    print(f"{name}: {request['solver']}, {request['steps']} steps, mean {picture.mean():+.3f}")


async def main() -> None:
    # the shipped weights know ten classes, and an eleventh for "none"
    given = dict(model_kwargs={"class_labels": 10}, unconditional_kwargs={"class_labels": 10})
    with fastddpm.InflightSampler(unet, (1, 32, 32), slots=3, **given) as sampler:
        await asyncio.gather(*(serve(sampler, *user) for user in users))
        print(f"{sampler.counts.steps} calls of the model, {sampler.utilisation:.0%} of the slots in use")


torch.set_num_threads(1)
asyncio.run(main())

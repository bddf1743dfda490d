"""The reverse step with classifier-free guidance: two model outputs in, and the next model input twice out."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cases import Case, Shape, generator
from benchmarks.step_cases import StepInputs, Steps

GUIDANCE = 7.5  # Stable Diffusion's
APART = 0.2  # deviation of m_c - m_u, so that the guided output, of deviation 1.8, is near a model's


class Guided(Steps):
    """A step on m = m_u + w (m_c - m_u) (Ho & Salimans 2022, eq. 6, with w = 1 + theirs).

    The peer is what diffusers' pipelines do around `DDIMScheduler.step`: chunk, combine, step, cat; but in float32, and
    the next input is rounded before it is doubled, which spares it traffic.
    """

    BYTES = 16  # 4 + 2 * 2 read, as many written
    TRAFFIC = "x and both model outputs read, x' and both next model inputs written"

    def inputs(self, shape: Shape, seed: int) -> StepInputs:
        """The unguided step's; the conditional output behind the unconditional one."""
        given = super().inputs(shape, seed)
        g = generator(self.device, seed + 1_000_003)
        apart = APART * torch.randn(shape, device=self.device, generator=g)
        m = torch.cat([given.m, (given.m + apart).to(torch.bfloat16)])
        weights = torch.full((shape[0],), GUIDANCE, device=self.device)
        return replace(given, m=m, model_input=torch.empty_like(m), guidance=weights)

    def prediction(self, m: Tensor) -> Tensor:
        """The guided output."""
        unconditional, conditional = m.chunk(2)
        return unconditional + GUIDANCE * (conditional - unconditional)

    def stacked(self, x: Tensor) -> Tensor:
        """Twice."""
        return torch.cat([x, x])


def guided_step(device: torch.device, *, with_compile: bool) -> Case:
    """DDIM's step without noise at t = 480, guided."""
    title = f"DDIM step, guidance {GUIDANCE}"
    return Guided("ddim", 50, 25, device).case("guided_step", title, with_compile=with_compile)

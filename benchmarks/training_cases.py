"""What a training step does around its model: x_t, the loss of the model's output, and the loss's gradient in it.

The model is left out; its output is given, in float32. 16 bytes an element are the least: x_0 read and x_t written
before the model, its output read and the gradient written behind it, the noise drawn again there. Autograd calls for
the loss and for its gradient one after the other, so our ops read the output twice: 20, and at best 80 % of the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastddpm_kernels import noise_mse, normal, q_sample
from torch import Tensor

from benchmarks.cases import Case, Contender, Role, Shape, coefficients, compile_modes, compiled, generator, ours
from benchmarks.cases import roof as copy_contender
from benchmarks.gate import Gate, parts
from benchmarks.noise_cases import ATOL, TRAINING, Forward, ForwardInputs
from benchmarks.step_cases import Noise

Outputs = tuple[Tensor, Tensor, Tensor]  # x_t, the loss [], its gradient in the model's output
Work = Callable[["TrainingInputs"], Outputs]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class TrainingInputs(ForwardInputs):
    """And what the model made of x_t; here no function of it."""

    m: Tensor  # float32 [B, ...], requires a gradient


def with_gradient(loss: Callable[[], Tensor], m: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient in m, which goes on into the model: nothing is accumulated."""
    with torch.enable_grad():
        value = loss()
    return value, torch.autograd.grad(value, m)[0]


class Training(Forward):
    """|eps - m|^2 (Ho et al. 2020, eq. 14), averaged, where x_t is drawn by eq. 4."""

    BYTES = 16
    TRAFFIC = "x_0 and the model's output read, x_t and the gradient written, once each"

    def inputs(self, shape: Shape, seed: int) -> TrainingInputs:
        """A standard normal output."""
        given = super().inputs(shape, seed)
        m = torch.randn(shape, device=self.device, generator=generator(self.device, seed + 1_000_003))
        return TrainingInputs(**vars(given), m=m.requires_grad_())

    def training(self, call: Work, role: Role, noise: Noise) -> Contender:
        """With the gate that belongs to where it has its noise from."""
        return Contender(call, role, lambda gate, shape: self.check_training(gate, shape, call, noise))

    def check_training(self, gate: Gate, shape: Shape, call: Work, noise: Noise) -> None:
        """Compare one call with float64, fed the same noise: torch's replayed by its seed, ours by the contract.

        What nothing else can draw is solved for from the gradient: x_t and the loss must then be of that noise.
        """
        given = self.inputs(shape, 1)
        m = given.m.detach()
        half = m.numel() / 2  # the gradient is (m - eps) / half
        torch.manual_seed(2)
        x_t, loss, gradient = (v.detach().clone() for v in call(given))
        if noise == "replayed":
            torch.manual_seed(2)
            z = torch.randn(shape, device=self.device)
        elif noise == "contract":
            z = normal(given.seeds, shape[1:], stream=TRAINING)
        else:
            z = m.double() - gradient.double() * half
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows in parts(shape):
            a, b = (coefficients(c, m) for c in self.exact[given.t[rows]].unbind(1))
            gate.near("x_t", x_t[rows], a * given.x0[rows].double() + b * z[rows].double(), ATOL)
            off = m[rows].double() - z[rows].double()
            gate.near("the gradient, scaled", gradient[rows].double() * half, off, ATOL)
            total += off.square().sum()
        gate.near("the loss", loss, total / m.numel(), ATOL)
        if noise == "own":
            gate.standard_normal("noise", z)
            gate.independent("noise", z, m.double() - call(given)[2].double() * half)

    # --- contenders ---------------------------------------------------------------------------------------------------

    def stored(self, noising: Callable[[ForwardInputs], tuple[Tensor, Tensor]], loss: Loss = F.mse_loss) -> Work:
        """The noise is a tensor: written with x_t, read by the loss."""

        def call(given: TrainingInputs) -> Outputs:
            x_t, noise = noising(given)
            return x_t, *with_gradient(lambda: loss(given.m, noise), given.m)

        return call

    def compile(self, mode: str) -> Contender:
        """Two compiled functions: the model is between them, so nothing can fuse x_t's making with the loss.

        In one function Inductor would; no training step lets it.
        """
        work = self.stored(self.compiled(mode), compiled(lambda m, noise: F.mse_loss(m, noise), mode))

        def call(given: TrainingInputs) -> Outputs:
            if self.device.type == "cuda":  # else the second one's CUDA graph may write over the first one's results
                torch.compiler.cudagraph_mark_step_begin()
            return work(given)

        return self.training(call, "compile", "own")

    def redrawn(self, given: TrainingInputs) -> Outputs:
        """Our ops: the noise is a tensor nowhere."""
        x_t, _ = q_sample(given.x0, given.t, self.table, given.seeds, stream=TRAINING, keep_noise=False)
        return x_t, *with_gradient(lambda: noise_mse(given.m, given.seeds, stream=TRAINING).mean(), given.m)


def training_loss(device: torch.device, *, with_compile: bool) -> Case:
    """Noising, loss and gradient; the variant of ours stores its noise and leaves the loss to PyTorch."""
    work = Training(device)
    made = {
        "eager": work.training(work.stored(work.eager), "eager", "replayed"),
        "diffusers": work.training(work.stored(work.diffusers()), "peer", "replayed"),
    }
    if with_compile:
        made |= {name: work.compile(mode) for name, mode in compile_modes(device).items()}
    made[ours(device)] = work.training(work.redrawn, "ours", "contract")
    made[f"{ours(device)}, noise stored"] = work.training(work.stored(work.fused), "variant", "contract")
    made["copy"] = copy_contender(work.inputs)
    title = "Training: noising, loss and its gradient"
    return Case("training_loss", title, work.BYTES, work.TRAFFIC, work.inputs, made)

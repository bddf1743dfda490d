"""Forward noising with its noise stored (12 bytes an element), and noise alone (4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastddpm_kernels import normal, q_sample, reference
from torch import Tensor

from benchmarks.cases import Case, Contender, Role, Shape, coefficients, compile_modes, compiled, copy, generator, ours
from benchmarks.cases import roof as copy_contender
from benchmarks.gate import Gate, parts
from fastddpm.schedule import NoiseSchedule

ATOL = 2e-5  # of x_t in about [-6, 6], and of diffusers' alpha_bar, a product in float32
NORMAL_ATOL = 4e-6  # of our normals, by the noise contract
TRAINING = 2  # the stream of the noise contract
Outputs = tuple[Tensor, Tensor]


@dataclass
class ForwardInputs:
    """Clean samples, each with its own time step."""

    x0: Tensor  # float32 [B, ...]
    t: Tensor  # int64 [B]
    seeds: Tensor  # int64 [B]
    noise: Tensor  # float32 [B, ...], for who doesn't draw it
    scratch: Outputs


class Forward:
    """q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t) (Ho et al. 2020, eq. 4), linear schedule."""

    BYTES = 12
    TRAFFIC = "x_0 read, x_t and the noise written"

    def __init__(self, device: torch.device) -> None:
        schedule = NoiseSchedule.linear()
        columns = (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        self.device = device
        self.exact = torch.stack([torch.tensor(c, device=device) for c in columns], dim=1)  # float64 [T, 2]
        self.table = self.exact.float()

    def inputs(self, shape: Shape, seed: int) -> ForwardInputs:
        """Uniform in [-1, 1], time steps over the whole schedule."""
        g = generator(self.device, seed)
        return ForwardInputs(
            x0=torch.rand(shape, device=self.device, generator=g) * 2 - 1,
            t=torch.randint(0, len(self.table), (shape[0],), device=self.device, generator=g),
            seeds=torch.arange(shape[0], device=self.device) + seed * 1_000_003,
            noise=torch.randn(shape, device=self.device, generator=g),
            scratch=copy(shape, self.BYTES, self.device, seed),
        )

    def contender(self, call: Callable[[ForwardInputs], Outputs], role: Role) -> Contender:
        """All of them return (x_t, noise): float64 is fed that noise, which is tested for being normal."""

        def check(gate: Gate, shape: Shape) -> None:
            torch.manual_seed(2)
            given = self.inputs(shape, 1)
            x_t, noise = call(given)
            for rows in parts(shape):
                a, b = (coefficients(c, x_t) for c in self.exact[given.t[rows]].unbind(1))
                gate.near("x_t", x_t[rows], a * given.x0[rows].double() + b * noise[rows].double(), ATOL)
            gate.standard_normal("noise", noise)
            first = noise.clone()  # a compiled function may write its next result there
            if role not in ("ours", "variant"):  # whose noise is a function of the seeds, so the same again
                gate.independent("noise", first, call(given)[1])

        return Contender(call, role, check)

    def eager(self, given: ForwardInputs) -> Outputs:
        """The formula in PyTorch, coefficients from the table on the device."""
        noise = torch.randn_like(given.x0)
        a, b = (coefficients(c, noise) for c in self.table[given.t].unbind(1))
        return a * given.x0 + b * noise, noise

    def diffusers(self) -> Callable[[ForwardInputs], Outputs]:
        """As its training scripts do it."""
        from diffusers import DDPMScheduler

        scheduler = DDPMScheduler(num_train_timesteps=1000)

        def call(given: ForwardInputs) -> Outputs:
            noise = torch.randn_like(given.x0)
            return scheduler.add_noise(given.x0, noise, given.t), noise

        return call

    def compiled(self, mode: str) -> Callable[[ForwardInputs], Outputs]:
        """The eager formula, compiled."""
        table = self.table

        def forward(x0: Tensor, t: Tensor) -> Outputs:
            noise = torch.randn_like(x0)
            a, b = (coefficients(c, x0) for c in table[t].unbind(1))
            return a * x0 + b * noise, noise

        function = compiled(forward, mode)
        return lambda given: function(given.x0, given.t)

    def fused(self, given: ForwardInputs) -> Outputs:
        """Our op, drawing."""
        return q_sample(given.x0, given.t, self.table, given.seeds, stream=TRAINING)

    def fused_given(self, given: ForwardInputs) -> Outputs:
        """Our op, reading the noise instead of drawing and storing it: the same traffic, no Philox."""
        return q_sample(given.x0, given.t, self.table, given.seeds, noise=given.noise)


def forward_noising(device: torch.device, *, with_compile: bool) -> Case:
    """x_t and its noise, both stored, as a training step needs them."""
    work = Forward(device)
    made = {"eager": work.contender(work.eager, "eager"), "diffusers": work.contender(work.diffusers(), "peer")}
    if with_compile:
        modes = compile_modes(device).items()
        made |= {name: work.contender(work.compiled(mode), "compile") for name, mode in modes}
    made[ours(device)] = work.contender(work.fused, "ours")
    made[f"{ours(device)}, noise given"] = work.contender(work.fused_given, "variant")
    made["copy"] = copy_contender(work.inputs)
    return Case("q_sample", "Forward noising, noise stored", work.BYTES, work.TRAFFIC, work.inputs, made)


@dataclass
class NormalInputs:
    """Which noise to make."""

    shape: Shape
    seeds: Tensor  # int64 [B]
    scratch: Outputs


def noise_alone(device: torch.device, *, with_compile: bool) -> Case:
    """torch.randn against noise by the contract; nothing is read, so a copy of the same bytes is no strict roof."""
    bytes_per_element = 4

    def inputs(shape: Shape, seed: int) -> NormalInputs:
        seeds = torch.arange(shape[0], device=device) + seed * 1_000_003
        return NormalInputs(shape, seeds, copy(shape, bytes_per_element, device, seed))

    def eager(given: NormalInputs) -> Tensor:
        return torch.randn(given.shape, device=device)

    def fused(given: NormalInputs) -> Tensor:
        return normal(given.seeds, given.shape[1:])

    def check_eager(gate: Gate, shape: Shape) -> None:
        torch.manual_seed(2)
        gate.standard_normal("noise", eager(inputs(shape, 1)))

    def check_fused(gate: Gate, shape: Shape) -> None:
        given = inputs(shape, 1)
        z = fused(given)
        for rows in parts(shape):
            exact = reference.normal(given.seeds[rows], shape[1:], step=0, stream=0, dtype=torch.float64)
            gate.near("noise", z[rows], exact, NORMAL_ATOL)
        gate.standard_normal("noise", z)

    made = {
        "eager": Contender(eager, "eager", check_eager),
        ours(device): Contender(fused, "ours", check_fused),
        "copy": copy_contender(inputs),
    }
    title = "Standard normal noise (eager: torch.randn)"
    return Case("normal", title, bytes_per_element, "the noise written", inputs, made)

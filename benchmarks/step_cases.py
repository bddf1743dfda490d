"""The reverse step, float32 state, bfloat16 model: reads x and the model's output, writes x' and the next model input.

All contenders do that same work to float32 accuracy. Hence the peers get the model's output in
float32: given it in bfloat16, diffusers rounds its products with coefficients to 8 bits, and x' is off by 2e-3 (DDPM)
or 1e-2 (DDIM).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from fastddpm_kernels import columns as col
from fastddpm_kernels import normal, reverse_step_
from torch import Tensor

from benchmarks.cases import Case, Contender, Role, Shape, coefficients, compile_modes, compiled, copy, generator, ours
from benchmarks.cases import roof as copy_contender
from benchmarks.gate import Gate, parts
from fastddpm import solvers
from fastddpm.schedule import NoiseSchedule

CLIP = 1.0
ATOL = 2e-5  # of a state in about [-4, 4]; terms of 15 in float32, and diffusers' float32 coefficients
BFLOAT16 = 2.0**-8  # relative error of a store
Noise = Literal["none", "replayed", "contract", "own"]
Outputs = tuple[Tensor, Tensor]


@dataclass
class StepInputs:
    """A batch at one row of the table, and what is written in place."""

    x: Tensor  # float32 [B, ...]
    m: Tensor  # bfloat16 [B, ...]
    model_input: Tensor  # bfloat16 [B, ...]
    cursor: Tensor  # int32 [B]
    seeds: Tensor  # int64 [B]
    nonfinite: Tensor  # int32 [B]
    scratch: Outputs
    guidance: Tensor | None = None  # float32 [B]; then m and model_input have 2 B samples, the unconditional ones first


@dataclass(frozen=True)
class Update:
    """One row as the papers write it: x0 = clip(x0_x x + x0_m m), x' = x_x x + x_x0 x0 + x_m m + sigma z."""

    x0_x: float
    x0_m: float
    x_x: float
    x_x0: float
    x_m: float
    sigma: float

    def __call__(self, x: Tensor, m: Tensor, z: Tensor | None) -> Tensor:
        """x', in x's dtype; a term whose coefficient is 0 isn't computed."""
        x0 = (self.x0_x * x + self.x0_m * m).clamp(-CLIP, CLIP)
        out = self.x_x0 * x0
        for c, term in ((self.x_x, x), (self.x_m, m), (self.sigma, z)):
            if c != 0.0 and term is not None:
                out = out + c * term
        return out


def update(schedule: NoiseSchedule, t: int, s: int, *, ancestral: bool) -> Update:
    """From time step t to s: DDPM (Ho et al. 2020, eq. 7), or DDIM with eta = 0 (Song et al. 2020, eq. 12)."""
    bar, bar_s = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[s])
    x0_x, x0_m = 1.0 / math.sqrt(bar), -math.sqrt((1.0 - bar) / bar)
    if not ancestral:
        return Update(x0_x, x0_m, 0.0, math.sqrt(bar_s), math.sqrt(1.0 - bar_s), 0.0)
    alpha, keep = bar / bar_s, (1.0 - bar_s) / (1.0 - bar)
    x_x0 = math.sqrt(bar_s) * (1.0 - alpha) / (1.0 - bar)
    return Update(x0_x, x0_m, math.sqrt(alpha) * keep, x_x0, 0.0, math.sqrt(keep * (1.0 - alpha)))


class Steps:
    """One step of one solver on one device: its inputs, its table, its contenders."""

    BYTES = 12  # 4 + 2 read, 4 + 2 written
    TRAFFIC = "x and the model's output read, x' and the next model input written"

    def __init__(self, solver: str, steps: int, row: int, device: torch.device) -> None:
        schedule = NoiseSchedule.linear()
        made = solvers.make(solver, schedule, steps, clip=CLIP)
        self.row, self.device, self.noisy = row, device, made.stochastic
        # What the op is told of the table, so that it is the variant that the sampler runs
        told = ("limited", "dynamic", "learned", "direct", "scaled")
        self.told: dict[str, Any] = {name: getattr(made, name) for name in told}
        self.t, s = (int(made.timesteps[r]) for r in (row, row + 1))
        self.update = update(schedule, self.t, s, ancestral=solver == "ddpm")
        rows = torch.tensor(made.with_identity(), dtype=torch.float32, device=device)
        # Behind the table the same row without its noise, and an identity row: there a compiled step, which draws noise
        # of its own, has a known result
        silent = rows[row].clone()
        silent[col.X_Z] = 0.0
        self.table, self.silent = torch.cat([rows, silent[None], rows[-1:]]), len(rows)

    def inputs(self, shape: Shape, seed: int) -> StepInputs:
        """A state as it is half-way, the model's output, every sample at the same row."""
        g = generator(self.device, seed)
        x, m = (torch.randn(shape, device=self.device, generator=g) for _ in range(2))
        m = m.to(torch.bfloat16)
        batch = shape[0]
        return StepInputs(
            x=x,
            m=m,
            model_input=torch.empty_like(m),
            cursor=torch.full((batch,), self.row, dtype=torch.int32, device=self.device),
            seeds=torch.arange(batch, device=self.device) + seed * 1_000_003,
            nonfinite=torch.zeros(batch, dtype=torch.int32, device=self.device),
            scratch=copy(shape, self.BYTES, self.device, seed),
        )

    def prediction(self, m: Tensor) -> Tensor:
        """What the solver takes from the model's output, in its dtype."""
        return m

    def stacked(self, x: Tensor) -> Tensor:
        """The model's batch of the states."""
        return x

    def contender(self, call: Callable[[StepInputs], Outputs], role: Role, noise: Noise = "none") -> Contender:
        """With the gate that belongs to where it has its noise from."""
        return Contender(call, role, lambda gate, shape: self.check(gate, shape, call, noise))

    def check(self, gate: Gate, shape: Shape, call: Callable[[StepInputs], Outputs], noise: Noise) -> None:
        """Compare one call with float64, fed the same noise: torch's replayed by its seed, ours by the contract.

        A compiled function draws noise that nothing else can draw: its formula is compared at the row without noise,
        and at the row with it the noise is solved for, and tested.
        """
        given = self.inputs(shape, 1)
        x, m = given.x.clone(), given.m
        if noise == "own":
            given.cursor.fill_(self.silent)
        torch.manual_seed(2)
        state, model_input = call(given)
        z = None
        if noise == "replayed":
            torch.manual_seed(2)
            z = torch.randn(shape, device=self.device)
        elif noise == "contract":
            z = normal(given.seeds, shape[1:], step=self.row, stream=1)
        for rows in parts(shape):
            predicted = self.prediction(split(m, shape[0], rows).double())
            expected = self.update(x[rows].double(), predicted, None if z is None else z[rows].double())
            gate.near("x'", state[rows], expected, ATOL)
            following = split(model_input, shape[0], rows)
            gate.near("the next model input", following, self.stacked(expected), ATOL, BFLOAT16)
        if noise == "own":
            mean = self.update(x.double(), self.prediction(m.double()), None)
            drawn = [(call(self.inputs(shape, 1))[0].double() - mean) / self.update.sigma for _ in range(2)]
            for draw in drawn:
                gate.standard_normal("noise", draw)
            gate.independent("noise", *drawn)

    # --- contenders ---------------------------------------------------------------------------------------------------

    def eager(self, given: StepInputs) -> Outputs:
        """The formula in PyTorch, coefficients as Python numbers."""
        z = torch.randn_like(given.x) if self.noisy else None
        x = self.update(given.x, self.prediction(given.m.float()), z)
        return x, self.stacked(x.to(torch.bfloat16))

    def compile(self, mode: str) -> Contender:
        """The same formula as one compiled function, coefficients from the table on the device."""
        noisy, table, prediction, stacked = self.noisy, self.table, self.prediction, self.stacked
        terms = [(col.X_X, self.update.x_x), (col.X_M, self.update.x_m)]
        used = [column for column, value in terms if value != 0.0]

        def step(x: Tensor, m: Tensor, cursor: Tensor) -> Outputs:
            row, m = table[cursor], prediction(m.float())

            def c(index: int) -> Tensor:
                return coefficients(row[:, index], x)

            x0 = (c(col.X0_X) * x + c(col.X0_M) * m).clamp(-CLIP, CLIP)
            out = c(col.X_X0) * x0
            for column in used:
                out = out + c(column) * (x if column == col.X_X else m)
            if noisy:
                out = out + c(col.X_Z) * torch.randn_like(x)
            return out, stacked((coefficients(table[cursor + 1, col.C_IN], x) * out).to(torch.bfloat16))

        function = compiled(step, mode)

        def call(given: StepInputs) -> Outputs:
            return function(given.x, given.m, given.cursor)

        return self.contender(call, "compile", "own" if noisy else "none")

    def fused(self, *, noise: bool) -> Callable[[StepInputs], Outputs]:
        """Our op over the buffers that stay."""

        def call(given: StepInputs) -> Outputs:
            reverse_step_(
                given.x,
                given.m,
                self.table,
                given.cursor,
                given.seeds,
                given.nonfinite,
                model_input=given.model_input,
                guidance=given.guidance,
                noise=noise,
                **self.told,
            )
            return given.x, given.model_input

        return call

    def diffusers(self, *, t_on_device: bool = False) -> Callable[[StepInputs], Outputs]:
        """The scheduler's step as its documentation loops, ``for t in scheduler.timesteps``; some pipelines move t."""
        from diffusers import DDIMScheduler, DDPMScheduler

        scheduler = (DDPMScheduler if self.noisy else DDIMScheduler)(num_train_timesteps=1000, clip_sample=True)
        scheduler.set_timesteps(len(self.table) - 3, device=self.device if t_on_device else None)
        t = scheduler.timesteps[self.row]
        if int(t) != self.t:
            raise RuntimeError(f"diffusers is at t = {int(t)}, we are at {self.t}")

        def call(given: StepInputs) -> Outputs:
            x = scheduler.step(self.prediction(given.m.float()), t, given.x).prev_sample
            return x, self.stacked(scheduler.scale_model_input(x, t).to(torch.bfloat16))

        return call

    def case(self, name: str, title: str, *, with_compile: bool) -> Case:
        """All contenders of this step."""
        drawn: Noise = "replayed" if self.noisy else "none"
        made = {
            "eager": self.contender(self.eager, "eager", drawn),
            "diffusers": self.contender(self.diffusers(), "peer", drawn),
        }
        if self.device.type == "cuda":
            made["diffusers, t on the GPU"] = self.contender(self.diffusers(t_on_device=True), "peer", drawn)
        if with_compile:
            made |= {name: self.compile(mode) for name, mode in compile_modes(self.device).items()}
        fused = ours(self.device)
        made[fused] = self.contender(self.fused(noise=self.noisy), "ours", "contract" if self.noisy else "none")
        if self.noisy:
            made[f"{fused}, noise=False"] = self.contender(self.fused(noise=False), "variant")
        made["copy"] = copy_contender(self.inputs)
        return Case(name, title, self.BYTES, self.TRAFFIC, self.inputs, made)


def split(stacked: Tensor, batch: int, rows: slice) -> Tensor:
    """Those rows of each batch in a stack of batches."""
    return torch.cat([part[rows] for part in stacked.split(batch)])


def ddpm_step(device: torch.device, *, with_compile: bool) -> Case:
    """DDPM's ancestral step at t = 500 of 1000; our op without its noise shows the price of Philox."""
    return Steps("ddpm", 1000, 499, device).case("ddpm_step", "DDPM step", with_compile=with_compile)


def ddim_step(device: torch.device, *, with_compile: bool) -> Case:
    """DDIM's step without noise at t = 480, the 26th of 50."""
    return Steps("ddim", 50, 25, device).case("ddim_step", "DDIM step, no noise", with_compile=with_compile)

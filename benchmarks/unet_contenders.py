"""Whole reverse steps of DDPM with a UNet, as each contender does them: network, update, noise.

- E, eager: diffusers' network and scheduler, as its pipeline calls them;
- G: the network under a CUDA graph, the scheduler eager;
- C1, the documented recipe: the network under torch.compile(mode="max-autotune"), the scheduler eager;
- C2, the strongest compile that we know: network, update and noise in one function, the time step on the device,
  channels_last, compiled with one of `FLAGS`, and ten steps of it in a CUDA graph of ours;
- ours: `Sampler` over `engine.compile`.

All have the same weights, float32 states but for E, G and C1 (the pipeline's state has the network's dtype), and the
same table: DDPM's, x_0 clipped. Each draws noise of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, UNet2DModel
from fastddpm_kernels.columns import X0_M, X0_X, X_M, X_X, X_X0, X_Z
from torch import Tensor

from benchmarks.race import graphed
from fastddpm import Sampler, engine, solvers
from fastddpm.schedule import NoiseSchedule
from fastddpm.unet import UNet

TRAINED = 1000  # time steps of the schedule
TOGETHER = 10  # steps in a graph, as `Sampler` has them
# Inductor's options beside max-autotune's own, the likeliest first; "trees" are its own CUDA graphs.
FLAGS: dict[str, dict[str, Any]] = {
    "max-autotune": {},
    "conv_1x1_as_mm": {"conv_1x1_as_mm": True},
    "freezing": {"freezing": True},
    "freezing, conv_1x1_as_mm": {"freezing": True, "conv_1x1_as_mm": True},
    "no coordinate descent": {"coordinate_descent_tuning": False},
    "no epilogue fusion": {"epilogue_fusion": False},
    "cuDNN alone": {"max_autotune_conv_backends": "ATEN"},
    "trees": {"triton.cudagraphs": True},
}


@dataclass(frozen=True)
class Setting:
    """What all contenders share.

    Attributes:
        net: float32, on the device.
        x, t: input [B, C, H, W] and time step of `predict`, which is compared with float64.
        steps: of a run, evenly spaced over the schedule.
    """

    net: UNet
    x: Tensor
    t: int
    steps: int

    @property
    def batch(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def theirs(self, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format) -> UNet2DModel:
        """diffusers' network with the same weights."""
        made = UNet2DModel(**dict(self.net.config.to_diffusers())).eval().requires_grad_(False)
        made.load_state_dict(self.net.state_dict())
        return made.to(device=self.device, dtype=dtype).to(memory_format=layout)

    def exact(self, samples: int = 4) -> Tensor:
        """The network's output at the first samples, float64."""
        t = torch.full((min(samples, self.batch),), self.t, device=self.device)
        return copy.deepcopy(self.net).double()(self.x[:samples].double(), t)


class Contender(Protocol):
    """One way; all that compiles or captures happens in `prepare`."""

    def prepare(self) -> None:
        """Be ready to run."""

    def predict(self) -> Tensor:
        """The network's output at the setting's x and t."""

    def run(self) -> Tensor:
        """All steps of a run, from noise."""


class Eager:
    """E: diffusers' pipeline, without its progress bar. The base of those that only replace the network's call."""

    def __init__(
        self, setting: Setting, dtype: torch.dtype, layout: torch.memory_format = torch.contiguous_format
    ) -> None:
        self.setting, self.dtype, self.layout = setting, dtype, layout
        self.model = setting.theirs(dtype, layout)
        self.scheduler = DDPMScheduler(num_train_timesteps=TRAINED)
        self.scheduler.set_timesteps(setting.steps)
        self.noise = torch.randn_like(setting.x).to(dtype)

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        """The network."""
        return self.model(x, t).sample

    def prepare(self) -> None:
        self.run()

    def predict(self) -> Tensor:
        return self.call(self.setting.x.to(self.dtype), torch.tensor(self.setting.t))

    def run(self) -> Tensor:
        x = self.noise
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.call(x, t), t, x).prev_sample
        return x


class Graph(Eager):
    """G: the network replayed. The input is copied to where the graph reads it; t is written there by a kernel."""

    def prepare(self) -> None:
        self.x = self.noise.contiguous(memory_format=self.layout)
        self.t = torch.zeros((), dtype=torch.int64, device=self.setting.device)
        self.out = torch.empty_like(self.noise)
        self.replay = graphed(lambda: self.out.copy_(self.model(self.x, self.t).sample))
        self.run()

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.copy_(x)
        self.t.fill_(int(t))
        self.replay()
        return self.out


class Documented(Eager):
    """C1. The time steps that the network is given are on the device, or Inductor would use no graph."""

    def __init__(self, setting: Setting, compiled: Callable[..., Any] | None = None) -> None:
        super().__init__(setting, torch.bfloat16, torch.channels_last)
        # Never a batch that varies: what a compiler makes of another contender's batch before would be slower.
        self.fast = (compiled or torch.compile)(self.model, mode="max-autotune", fullgraph=True, dynamic=False)

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        on_device = t.to(self.setting.device)
        return self.fast(x.contiguous(memory_format=torch.channels_last), on_device).sample


class Whole:
    """C2: a step is one compiled function, in place, that reads its row by a cursor on the device.

    Behind the table's rows stands one more that makes the state the network's output, exactly: 64 * (output / 64), for
    outputs within 64. So what is compared with float64 is the compiled step itself.
    """

    def __init__(self, setting: Setting, flags: str, compiled: Callable[..., Any] | None = None) -> None:
        self.setting, self.flags = setting, flags
        self.trees = "triton.cudagraphs" in FLAGS[flags]
        self.model = setting.theirs(torch.bfloat16, torch.channels_last)
        table = solvers.ddpm(NoiseSchedule.linear(), setting.steps, clip=1.0)
        names = (X0_X, X0_M, X_X, X_X0, X_M, X_Z)
        rows = [*torch.tensor(table.rows[:, names]).tolist(), [0.0, 1 / 64, 0.0, 64.0, 0.0, 0.0]]
        self.rows = torch.tensor(rows, dtype=torch.float32, device=setting.device)
        times = [*(int(t) for t in table.timesteps), setting.t]
        self.times = torch.tensor(times, device=setting.device)
        self.x = torch.randn_like(setting.x).contiguous(memory_format=torch.channels_last)
        self.cursor = torch.zeros(1, dtype=torch.int64, device=setting.device)
        self.fast = (compiled or self._compile)(self.step)
        self.replays: dict[int, Callable[[], None]] = {}

    def _compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs") | FLAGS[self.flags]
        return torch.compile(function, fullgraph=True, dynamic=False, options=options)

    def step(self, x: Tensor, cursor: Tensor, rows: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """The state after the cursor's row, and the next cursor; in place, but for Inductor's graphs, which can't."""
        x0_x, x0_m, x_x, x_x0, x_m, x_z = rows.index_select(0, cursor)[0].unbind()
        m = self.model(x.to(torch.bfloat16), times.index_select(0, cursor)).sample.float()
        x0 = (x0_x * x + x0_m * m).clamp(-1.0, 1.0)
        after = x_x * x + x_x0 * x0 + x_m * m + x_z * torch.randn_like(x)
        return (after, cursor + 1) if self.trees else (x.copy_(after), cursor.add_(1))

    def _advance(self, steps: int = 1) -> None:
        for _ in range(steps):
            if self.trees:
                torch.compiler.cudagraph_mark_step_begin()
            x, cursor = self.fast(self.x, self.cursor, self.rows, self.times)
            if self.trees:
                self.x.copy_(x)
                self.cursor.copy_(cursor)

    def prepare(self) -> None:
        # Dynamo asks Inductor's config, not the options: without this a frozen network's weights would stay arguments.
        with torch._inductor.config.patch(freezing=FLAGS[self.flags].get("freezing", False)):
            self.predict()
        if self.setting.cuda and not self.trees:
            for n in self.lengths:
                self.cursor.zero_()  # of the warm-up
                self.replays[n] = graphed(partial(self._advance, n), warmups=1)
        self.run()

    @property
    def lengths(self) -> list[int]:
        """Steps of the graphs, the longest first."""
        return [n for n in (TOGETHER, 1) if n <= self.setting.steps]

    def predict(self) -> Tensor:
        self.x.copy_(self.setting.x)
        self.cursor.fill_(self.setting.steps)
        self._advance()
        return self.x.clone()

    def run(self) -> Tensor:
        self.x.normal_()
        self.cursor.zero_()
        left = self.setting.steps
        while left:
            n = next((n for n in self.lengths if n <= left and n in self.replays), 1)
            self.replays.get(n, self._advance)()
            left -= n
        return self.x


class Ours:
    """`Sampler` over the engine."""

    def __init__(self, setting: Setting, kernels: bool | None = None) -> None:
        self.setting = setting
        height, width = setting.x.shape[2:]
        self.fast = engine.compile(
            setting.net, batch=setting.batch, size=(height, width), dtype=torch.bfloat16, kernels=kernels
        )
        self.sampler = Sampler(self.fast, solvers.ddpm(NoiseSchedule.linear(), setting.steps, clip=1.0))

    def prepare(self) -> None:
        self.run()

    def predict(self) -> Tensor:
        t = torch.full((self.setting.batch,), self.setting.t, device=self.setting.device)
        return self.fast(self.setting.x, t)

    def run(self) -> Tensor:
        return self.sampler.sample(tuple(self.setting.x.shape), seeds=0)


def all_of(setting: Setting) -> Mapping[str, Callable[[], Contender]]:
    """What makes each, by name, on a GPU; C2 is chosen among its flags by `unet_race`."""
    return {
        "E bfloat16": lambda: Eager(setting, torch.bfloat16),
        "E tf32": lambda: Eager(setting, torch.float32),
        "G bfloat16": lambda: Graph(setting, torch.bfloat16, torch.channels_last),
        "ours": lambda: Ours(setting),
        "ours, PyTorch's kernels": lambda: Ours(setting, kernels=False),
        "C1": lambda: Documented(setting),
    }

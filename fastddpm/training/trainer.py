"""The trainer: one step of denoising (Ho et al. 2020, arXiv 2006.11239, algorithm 1) at a time.

The network computes in bfloat16; the weights that the optimiser changes, their moving average and the loss are float32.
A step is a function of the state and the step's number, so a run can be stopped and taken up anywhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastddpm_kernels import q_sample
from torch import Tensor, nn

from ..checkpoint import UNetConfig
from ..errors import CheckpointError, ConfigError
from ..schedule import NoiseSchedule
from ..unet import ResBlock, SelfAttention, UNet
from .batches import Batch, Batches, time_step_edges
from .data import ImageSet

SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid")
PRECISIONS = ("bf16", "float32")
PREDICTIONS = ("v_prediction", "epsilon")
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, by its own names
NULL_CLASSES = 1  # behind the data's classes, for dropped labels


@dataclass(frozen=True)
class TrainConfig:
    """How to train: with the data and the architecture, all that decides the weights. Raises `ConfigError`.

    Attributes:
        batch_size: images a step.
        lr: AdamW's learning rate after the warm-up, before the decay.
        ema: decay of the weights' moving average, which is what is saved; shorter at first, (1 + s)/(10 + s) at step s.
        class_dropout: how often a label is replaced by the null class.
        schedule: the `NoiseSchedule`'s name; 1000 steps.
        density: distribution of the time steps, "uniform" or "cosine"; see `time_step_edges`.
        seed: 0 ... 2^64 - 1; of the initial weights, the order, the dropped labels, the time steps and the noise.
        precision: what the network computes in, "bf16" or "float32".
        prediction: what it learns: "v_prediction", which is sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0
            (Salimans and Ho 2022, arXiv 2202.00512, section 4), or "epsilon", as Ho et al. From v, x_0 follows without
            a division by sqrt(alpha_bar): where an epsilon-network is 4 % wrong at t = 980, its x_0 is wrong by 5.
        weight_decay, clip_norm: AdamW's weight decay; the largest norm of the gradient.
    """

    batch_size: int = 64
    lr: float = 1.2e-3
    ema: float = 0.999
    class_dropout: float = 0.1
    schedule: str = "linear"
    density: str = "cosine"
    seed: int = 0
    precision: str = "bf16"
    prediction: str = "v_prediction"
    weight_decay: float = 0.01
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            "batch_size": (1 <= self.batch_size <= 1 << 20, "1 ... 1048576"),
            "lr": (0 < self.lr <= 1, "above 0, at most 1"),
            "ema": (0 <= self.ema < 1, "0 or more, below 1"),
            "class_dropout": (0 <= self.class_dropout <= 1, "0 ... 1"),
            "schedule": (self.schedule in SCHEDULES, ", ".join(SCHEDULES)),
            "seed": (0 <= self.seed < 1 << 64, "0 ... 2^64 - 1"),
            "precision": (self.precision in PRECISIONS, ", ".join(PRECISIONS)),
            "prediction": (self.prediction in PREDICTIONS, ", ".join(PREDICTIONS)),
            "weight_decay": (0 <= self.weight_decay <= 10, "0 ... 10"),
            "clip_norm": (self.clip_norm > 0, "above 0"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ConfigError(f"training: {name} is {getattr(self, name)!r}; allowed: {allowed}")
        time_step_edges(self.noise_schedule(), self.density)

    def noise_schedule(self) -> NoiseSchedule:
        """The schedule that `schedule` names, with its defaults."""
        made: NoiseSchedule = getattr(NoiseSchedule, self.schedule)()
        return made


@dataclass(frozen=True)
class Budget:
    """When training ends: after so many steps, or minutes, whichever is first. Raises `ConfigError` without either."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ConfigError("no end of the training is given: give minutes or steps")
        if (self.steps is not None and self.steps < 1) or (
            self.minutes is not None and not 0 < self.minutes < math.inf
        ):
            raise ConfigError(f"steps is {self.steps}, minutes {self.minutes}; allowed: above 0")

    def progress(self, step: int, seconds: float) -> float:
        """The part of the training that is over: 0 ... 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate(self, step: int, progress: float) -> float:
        """Factor of the learning rate: linear warm-up over 200 steps (a tenth of a short run), then half a cosine."""
        warm_up = min(200, self.steps // 10 + 1) if self.steps else 200
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * progress))


def fresh_unet(config: UNetConfig, seed: int) -> UNet:
    """A float32 network with seeded weights whose residual branches and output are zero, so that it starts at 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed & (1 << 63) - 1)
        model = UNet(config)
    last: list[nn.Conv2d | nn.Linear] = [model.conv_out]
    last += [m.conv2 for m in model.modules() if isinstance(m, ResBlock)]
    last += [m.to_out[0] for m in model.modules() if isinstance(m, SelfAttention)]  # type: ignore[misc]
    for layer in last:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return model


class Trainer:
    """Network, optimiser and moving average, and the step that changes them.

    Args:
        data: images of a size that the network takes; labels where it is class-conditional.
        unet: the architecture; ``num_class_embeds`` is the data's classes and one more, the null class.
        config: see `TrainConfig`.
        device: "cpu", or "cuda", where the network runs under bfloat16 autocast.

    Raises `InputError` where data and architecture don't fit.
    """

    def __init__(self, data: ImageSet, unet: UNetConfig, config: TrainConfig, device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        self.schedule = config.noise_schedule()
        edges = time_step_edges(self.schedule, config.density)
        self.batches = Batches(data, config.batch_size, edges, class_dropout=config.class_dropout, seed=config.seed)
        self.master = fresh_unet(unet, config.seed)
        self.master.check_shape(data.images.shape[1:])
        self._check_classes(unet.num_class_embeds, data)
        self.master.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bf16_copy = config.precision == "bf16" and self.device.type == "cpu"
        self.net = copy.deepcopy(self.master).bfloat16() if self.bf16_copy else self.master
        self.net.train()
        self.parameters = dict(self.master.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True
        )
        a, b = self.schedule.sqrt_alphas_cumprod, self.schedule.sqrt_one_minus_alphas_cumprod
        table = torch.stack([torch.tensor(a), torch.tensor(b)], dim=1)  # .tensor copies: the arrays are read-only
        self.table = table.float().to(self.device)  # [T, 2]
        self.steps = 0

    @staticmethod
    def _check_classes(embeds: int | None, data: ImageSet) -> None:
        wanted = None if data.labels is None else data.num_classes + NULL_CLASSES
        if embeds != wanted:
            raise ConfigError(
                f"num_class_embeds is {embeds}; this data set needs {wanted} (its classes and a null class)"
            )

    def step(self, rate: float = 1.0) -> Tensor:
        """Train one step with the learning rate times `rate`; returns the loss, float32 [], on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * rate
        loss = self.loss(self.batches[self.steps])
        torch.autograd.backward(loss)
        parameters: list[Tensor] = list(self.parameters.values())
        working: list[Tensor] = list(self.net.parameters())
        if self.bf16_copy:
            for p, w in zip(parameters, working, strict=True):
                p.grad = None if w.grad is None else w.grad.float()
        nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.net.zero_grad()
        with torch.no_grad():
            decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.ema.values()), parameters, 1 - decay)
            if self.bf16_copy:
                torch._foreach_copy_(working, parameters)
        self.steps += 1
        return loss.detach()

    def loss(self, batch: Batch) -> Tensor:
        """|eps - eps_theta(x_t, t)|^2 (Ho et al. 2020, eq. 14), or the same of v, averaged: float32 []."""
        x0 = batch.images.to(self.device).float() / 127.5 - 1
        t, seeds = batch.t.to(self.device), batch.seeds.to(self.device)
        labels = None if batch.labels is None else batch.labels.to(self.device)
        x, noise = q_sample(x0, t, self.table, seeds, step=self.steps)
        x = x.to(self.net.dtype).contiguous(memory_format=torch.channels_last)
        on_gpu = self.device.type == "cuda" and self.config.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu):
            predicted = self.net(x, t, labels)
        if self.config.prediction == "epsilon":
            return F.mse_loss(predicted.float(), noise)
        a, b = self.table[t].T[:, :, None, None, None]
        return F.mse_loss(predicted.float(), a * noise - b * x0)

    def averaged(self) -> UNet:
        """A copy of the network with the moving average of the weights, float16, on the CPU: what is saved."""
        with torch.device("meta"):
            model = UNet(self.master.config)
        weights = {name: p.to("cpu", torch.float16).contiguous() for name, p in self.ema.items()}
        model.load_state_dict(weights, assign=True)
        return model.eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """All tensors that the next step depends on, float32, on the CPU, by name."""
        made = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        made |= {f"ema.{name}": p for name, p in self.ema.items()}
        for name, p in self.parameters.items():
            kept = self.optimizer.state[p]
            made |= {f"{m}.{name}": kept[m] if kept else torch.zeros_like(p) for m in MOMENTS}
        return {name: tensor.cpu().contiguous() for name, tensor in made.items()}

    def load_state(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up what `state` gave after `steps` steps. Raises `CheckpointError` where it is of another network."""
        expected = {name: tensor.shape for name, tensor in self.state().items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            raise CheckpointError("the training state is not of this network")
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"model.{name}"])
                self.ema[name].copy_(tensors[f"ema.{name}"])
            if self.bf16_copy:
                for w, p in zip(self.net.parameters(), self.parameters.values(), strict=True):
                    w.copy_(p)
        self.optimizer.state.clear()
        for name, p in self.parameters.items():
            moments = {m: torch.empty_like(p).copy_(tensors[f"{m}.{name}"]) for m in MOMENTS}
            count = torch.tensor(float(steps), device=self.device)
            self.optimizer.state[p] = {"step": count, **moments}
        self.steps = steps

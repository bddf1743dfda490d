"""What step number s trains on: images, labels, time steps and noise seeds, each a function of (seed, s) alone.

So a run that was stopped goes on as if it had not been, and nothing but the step's number has to be kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from ..seeds import sample_seeds
from .data import ImageSet

# What the random numbers are for: with the run's seed, the key of NumPy's Philox. Its counter is the step (or epoch).
ORDER, DROPOUT, TIMES, SHUFFLE = range(4)
DENSITIES = ("uniform", "cosine")


def time_step_edges(schedule: NoiseSchedule, density: str) -> NDArray[np.float64]:
    """The distribution of the training time steps as edges in [0, 1], float64 [T + 1]: P(t) = edges[t + 1] - edges[t].

    ``"uniform"``: every time step alike (Ho et al. 2020, algorithm 1). ``"cosine"``: the log-SNR l has the density that
    it has under the cosine schedule alpha_bar(u) = cos^2(pi u / 2) with u uniform (Nichol and Dhariwal 2021,
    arXiv 2102.09672, eq. 17, s = 0), where u(l) = 2/pi arctan(exp(-l/2)). A linear schedule then spends fewer steps on
    nearly pure noise. It is no importance sampling of Ho's loss: the loss itself is weighted so (Kingma and Gao 2023,
    arXiv 2303.00848, section 3).

    Raises `ConfigError` for another density.
    """
    if density == "uniform":
        return np.linspace(0.0, 1.0, schedule.num_steps + 1)
    if density != "cosine":
        raise ConfigError(f"density of time steps is {density!r}; allowed: {', '.join(DENSITIES)}")
    u = 2 / np.pi * np.arctan(np.exp(-schedule.log_snr / 2))
    return np.concatenate([[0.0], (u[1:] + u[:-1]) / 2, [1.0]])


@dataclass(frozen=True)
class Batch:
    """One step's examples, on the CPU.

    Attributes:
        images: uint8 [B, C, H, W].
        labels: int64 [B], the null class where the label was dropped; None for images without labels.
        t: int64 [B], 0-based time steps.
        seeds: int64 [B], the noise seeds; with the step's number they fix the noise.
    """

    images: Tensor
    labels: Tensor | None
    t: Tensor
    seeds: Tensor


class Batches:
    """Every step's batch, by number.

    Epochs are permutations of the data one after another; a batch may span two. Labels become `data.num_classes`, the
    null class, with probability `class_dropout` (Ho and Salimans 2022, arXiv 2207.12598). Time steps follow
    `edges` (see `time_step_edges`), stratified: each of B equal slices of the distribution gives one time step of
    the batch, which lowers the variance of the loss (Kingma et al. 2021, arXiv 2107.00630, appendix I.1).
    """

    def __init__(
        self, data: ImageSet, batch_size: int, edges: NDArray[np.float64], *, class_dropout: float, seed: int
    ) -> None:
        self.data, self.batch_size, self.edges = data, batch_size, edges
        self.class_dropout, self.seed = class_dropout, seed
        self._seeds = sample_seeds(seed, batch_size)
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def random(self, purpose: int, counter: int) -> np.random.Generator:
        """The generator of one purpose at one step (or epoch)."""
        key = np.array([self.seed, purpose], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], np.uint64)))

    def indices(self, step: int) -> NDArray[np.int64]:
        """Which images step number `step` trains on: int64 [B]."""
        position = step * self.batch_size + np.arange(self.batch_size)
        epoch, place = position // len(self.data.images), position % len(self.data.images)
        made = np.empty_like(place)
        for number in np.unique(epoch):
            if number != self._epoch:
                self._order = self.random(ORDER, int(number)).permutation(len(self.data.images))
                self._epoch = int(number)
            made[epoch == number] = self._order[place[epoch == number]]
        return made

    def times(self, step: int) -> NDArray[np.int64]:
        """Time steps of step number `step`: int64 [B], one from each of B slices, in random order."""
        slices = self.random(SHUFFLE, step).permutation(self.batch_size)
        r = (slices + self.random(TIMES, step).random(self.batch_size)) / self.batch_size
        return np.clip(np.searchsorted(self.edges, r, side="right") - 1, 0, len(self.edges) - 2)

    def __getitem__(self, step: int) -> Batch:
        index = torch.from_numpy(self.indices(step))
        labels = None
        if self.data.labels is not None:
            dropped = self.random(DROPOUT, step).random(self.batch_size) < self.class_dropout
            labels = self.data.labels[index].masked_fill(torch.from_numpy(dropped), self.data.num_classes)
        return Batch(self.data.images[index], labels, torch.from_numpy(self.times(step)), self._seeds)

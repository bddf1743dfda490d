"""Data with a perfect model in closed form, a mixture of Gaussians: what a sampler makes of it can be checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .edm import EDMSchedule
from .errors import ConfigError
from .schedule import NoiseSchedule

Model = Callable[[Tensor, Tensor], Tensor]


class GaussianMixture:
    """sum_k w_k N(mu_k, s_k^2 I) in D dimensions, and the exact predictions of a model trained on it.

    Under x_t = alpha x_0 + sigma eps component k becomes N(alpha mu_k, (alpha^2 s_k^2 + sigma^2) I), so
    E[x_0 | x_t] is a sum over the components (a posterior mean each, weighted by its posterior probability).

        mixture = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.5]], stds=[0.2, 0.3], weights=[0.4, 0.6])
        x = fastddpm.sample(mixture.model(schedule), (10_000, 2), schedule=schedule, solver="ddim", steps=50)

    Args:
        means: [K, D].
        stds: [K], each s_k above 0.
        weights: [K], above 0; they are divided by their sum.

    Raises:
        ConfigError: for shapes that don't fit each other, or a deviation or weight that isn't above 0.
    """

    def __init__(self, means: Sequence[Sequence[float]], stds: Sequence[float], weights: Sequence[float]) -> None:
        self.means, self.stds, w = (torch.as_tensor(v, dtype=torch.float64) for v in (means, stds, weights))
        if self.means.ndim != 2 or self.stds.shape != w.shape or self.stds.shape != self.means.shape[:1]:
            raise ConfigError(
                f"a mixture of K Gaussians has means [K, D], stds [K] and weights [K]; given: "
                f"{list(self.means.shape)}, {list(self.stds.shape)}, {list(w.shape)}"
            )
        if not (self.stds > 0).all() or not (w > 0).all():
            raise ConfigError("a mixture's deviations and weights must be above 0")
        self.weights = w / w.sum()

    def mean(self) -> Tensor:
        """The data's mean, float64 [D]."""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """The data's covariance, float64 [D, D]."""
        off = self.means - self.mean()
        within = (self.weights * self.stds**2).sum() * torch.eye(off.shape[1], dtype=torch.float64)
        return within + (self.weights[:, None] * off).T @ off

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """n draws from the data itself, float64 [n, D]."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * noise

    def component(self, x: Tensor) -> Tensor:
        """Which component a clean sample most probably is of, int64 [B]."""
        return self._posterior(x.double(), torch.tensor(1.0), torch.tensor(0.0))[0].argmax(1)

    def predicted_x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t = x], [B, D] in x's dtype; `alpha` and `sigma` are [B, 1] or numbers as tensors."""
        posterior, means = self._posterior(x.double(), alpha.double(), sigma.double())
        return (posterior[..., None] * means).sum(1).to(x.dtype)

    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Each component's probability [B, K] and posterior mean [B, K, D]."""
        mu, s, w = (v.to(x.device) for v in (self.means, self.stds, self.weights))
        variance = (alpha * s) ** 2 + sigma**2  # [B, K]
        off = x[:, None, :] - alpha.reshape(-1, 1, 1) * mu  # [B, K, D]
        log_p = w.log() - 0.5 * off.square().sum(-1) / variance - 0.5 * mu.shape[1] * variance.log()
        gain = alpha * s**2 / variance
        return torch.softmax(log_p, dim=1), mu + gain[..., None] * off

    def model(self, schedule: NoiseSchedule | EDMSchedule, prediction_type: str | None = None) -> Model:
        """The perfect model(x, t) of this data: x [B, D] and t [B], which may lie between the time steps.

        Args:
            schedule: what the model pretends to be trained with. A `NoiseSchedule` is interpolated linearly in
                log(sigma / alpha); with an `EDMSchedule` t is sigma.
            prediction_type: "epsilon" (None), "v_prediction" or "sample"; "sample" alone with an `EDMSchedule`.

        Raises:
            ConfigError: for another prediction type.
        """
        edm = isinstance(schedule, EDMSchedule)
        kind = prediction_type or ("sample" if edm else "epsilon")
        allowed = ("sample",) if edm else ("epsilon", "v_prediction", "sample")
        if kind not in allowed:
            raise ConfigError(f"prediction_type is {kind!r}; allowed here: {', '.join(map(repr, allowed))}")

        def perfect(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = _scales(schedule, t)
            x0 = self.predicted_x0(x, alpha, sigma).double()
            eps = (x.double() - alpha * x0) / sigma
            return {"sample": x0, "epsilon": eps, "v_prediction": alpha * eps - sigma * x0}[kind].to(x.dtype)

        return perfect


def _scales(schedule: NoiseSchedule | EDMSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) at the times t, float64 [B, 1]."""
    times = t.detach().cpu().double().numpy()
    if isinstance(schedule, EDMSchedule):
        sigma = times
        alpha = np.ones_like(sigma)
    else:
        log_sigma = np.interp(times, np.arange(schedule.num_steps), -0.5 * schedule.log_snr)
        alpha = np.exp(-0.5 * np.logaddexp(0.0, 2.0 * log_sigma))
        sigma = np.exp(-0.5 * np.logaddexp(0.0, -2.0 * log_sigma))
    return tuple(torch.from_numpy(v).to(t.device)[:, None] for v in (alpha, sigma))  # type: ignore[return-value]

"""EDM's stochastic sampler, algorithm 2 of arXiv 2206.00364, as it stands there, and k-diffusion's variants of it."""

from __future__ import annotations

import itertools
import math

import numpy as np


def algorithm_2(
    denoise, x, sigmas, noise, method="heun", *, eta=0.0, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0
):
    """x_hat of each step, the state at which the model is first evaluated in it, and then x_N; and the noise added.

    `noise` [2, steps, *x.shape] is for the churn and for ancestral sampling. Methods: "euler", "heun", or "midpoint",
    k-diffusion's dpm_2. The noise is [steps + 1, *x.shape]: before each step all that was added since the model was
    last evaluated.
    """
    states, added, ancestral = [], [], 0.0
    for i, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(s_churn / (len(sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma + gamma * sigma
        churn = math.sqrt(hat**2 - sigma**2) * s_noise * noise[0][i]
        x = x + churn
        states.append(x)
        added.append(churn + ancestral)
        up = eta * math.sqrt(following**2 * (hat**2 - following**2) / hat**2)
        end = math.sqrt(following**2 - up**2)
        slope = (x - denoise(x, hat)) / hat
        if end > 0 and method == "heun":
            there = x + (end - hat) * slope
            slope = (slope + (there - denoise(there, end)) / end) / 2
        if end > 0 and method == "midpoint":
            middle = math.sqrt(hat * end)
            there = x + (middle - hat) * slope
            slope = (there - denoise(there, middle)) / middle
        ancestral = up * s_noise * noise[1][i]
        x = x + (end - hat) * slope + ancestral
    return np.array([*states, x]), np.array([*added, np.zeros_like(x) + ancestral])


def denoiser(schedule, model, quantize=True):
    """D(x; sigma) of an epsilon-model of a `NoiseSchedule`, with the nearest time step, as k-diffusion wraps it."""
    sigmas = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)

    def denoise(x, sigma):
        if quantize:
            t = float(np.abs(np.log(sigma / sigmas)).argmin())
        else:
            t = float(np.interp(np.log(sigma), np.log(sigmas), np.arange(len(sigmas))))
        return x - sigma * model(x / math.sqrt(sigma**2 + 1), t)

    return denoise


def edm_denoiser(model, data=0.5):
    """D(x; sigma) of arXiv 2206.00364, eq. 7 and table 1."""

    def denoise(x, sigma):
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(data**2 + sigma**2)
        return skip * x + out * model(x / math.sqrt(sigma**2 + data**2), math.log(sigma) / 4)

    return denoise


def drawn(table, added, rows_a_step):
    """What the rows of a table must draw for its noise to be `added`, and the number of the row that ends each step."""
    ends = np.minimum(rows_a_step * np.arange(1, len(added)) - 1, table.num_rows - 1)
    noise = np.zeros((table.num_rows, *added.shape[1:]))
    for row, lift in zip(ends, added[1:], strict=True):
        noise[row] = lift / table["x_z"][row] if table["x_z"][row] else lift
    return noise, ends

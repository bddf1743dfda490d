"""The noise of k-diffusion's samplers: torch's own, a Brownian path of torchsde, and what ComfyUI makes of its seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from ._k_call import Call, NoiseSampler, comfy_sampling, comfy_seed


class BrownianTreeNoiseSampler:
    """Noise of a Brownian path (torchsde): the same path whatever the steps through it, for one seed.

    Args:
        x: whose shape, dtype and device the noise has.
        sigma_min, sigma_max: ends of the path.
        seed: an integer; a list of one a sample; None: drawn from torch's global random numbers.
        transform: from sigma to the path's time.
        cpu: the path is drawn on the CPU, the same whatever the device of x; ComfyUI's argument.

    Raises:
        ConfigError: where torchsde isn't installed, or for a list of seeds that isn't one a sample.
    """

    def __init__(
        self,
        x: Tensor,
        sigma_min: float | Tensor,
        sigma_max: float | Tensor,
        seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] = lambda sigma: sigma,
        cpu: bool = False,
    ) -> None:
        try:
            from torchsde import BrownianTree
        except ImportError as error:
            raise ConfigError(
                "the noise of this sampler is by default a Brownian path of torchsde, as in k-diffusion, and torchsde "
                "isn't installed; give noise_sampler=lambda sigma, sigma_next: torch.randn_like(x), or seeds=0, or "
                "install it"
            ) from error
        self.transform, self._cpu = transform, cpu
        first, last = self._time(sigma_min), self._time(sigma_max)
        self._batched, self._sign = isinstance(seed, Sequence), 1.0 if first < last else -1.0
        if isinstance(seed, Sequence) and len(seed) != len(x):
            raise ConfigError(f"seed has {len(seed)} integers for {len(x)} samples; allowed: one, or one a sample")
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        start = torch.zeros_like(x[0] if self._batched else x, device="cpu" if cpu else x.device)
        self._trees = [
            BrownianTree(min(first, last), start, max(first, last), entropy=s)
            for s in (seed if isinstance(seed, Sequence) else [seed])
        ]
        self._device = x.device

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """Standard normal noise, shaped as x: the path's increment between the two, over its deviation."""
        start, end = self._time(sigma), self._time(sigma_next)
        path = torch.stack([tree(min(start, end), max(start, end)) for tree in self._trees])
        increment = path if self._batched else path[0]
        noise: Tensor = increment * (self._sign if start < end else -self._sign) / (end - start).abs().sqrt()
        return noise.to(self._device)

    def _time(self, sigma: float | Tensor) -> Tensor:
        time = self.transform(torch.as_tensor(sigma))
        return time.cpu() if self._cpu else time


def fresh(call: Call) -> NoiseSampler:
    """New normal numbers for each step: torch's global ones, or those that ComfyUI makes of its seed."""
    x, seed = call.x, comfy_seed(call)
    if seed is None:
        return lambda sigma, sigma_next: torch.randn_like(x)
    generator = torch.Generator(x.device).manual_seed(seed + int(x.device.type == "cpu"))
    return lambda sigma, sigma_next: torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def brownian(call: Call, eta: float = 1.0) -> NoiseSampler | None:
    """A `BrownianTreeNoiseSampler` of the sigmas; one of ComfyUI's seed is drawn on the CPU. None where eta is 0.

    The seed is drawn from torch's global random numbers where there is none, also where eta is 0, as k-diffusion does.
    """
    seed, cpu = comfy_seed(call), comfy_sampling(call.model) is not None
    drawn = int(torch.randint(0, 2**63 - 1, []).item()) if seed is None else seed
    if not eta:
        return None
    sigmas = torch.as_tensor(call.sigmas)
    return BrownianTreeNoiseSampler(call.x, sigmas[sigmas > 0].min(), sigmas.max(), drawn, cpu=cpu)

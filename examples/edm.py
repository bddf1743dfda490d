"""Networks of EDM, net(x, sigma, class_labels): `edm_sampler`. Needs nothing but fastddpm.

The network here is the shipped one with EDM's attributes; one of EDM's pickles, loaded as it says, goes in as it is.
"""

import math

import torch

import fastddpm
from fastddpm.integrations.edm import edm_sampler
from fastddpm.pretrained import DEFAULT, SchedulerConfig


class Network(torch.nn.Module):
    """D(x; sigma) of a network that predicts v; class_labels are one-hot, as EDM's."""

    img_channels, img_resolution = 1, 32

    def __init__(self) -> None:
        super().__init__()
        self.unet = fastddpm.UNet.from_pretrained(DEFAULT, dtype=torch.float32)
        log_snr = SchedulerConfig.from_folder(DEFAULT).schedule.log_snr
        self.register_buffer("levels", torch.tensor(-0.5 * log_snr).exp())
        self.sigma_min, self.sigma_max = float(self.levels[0]), float(self.levels[-1])

    def nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma.log().reshape(-1, 1) - self.levels.log()).abs().argmin(dim=1)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.levels[self.nearest(sigma)].reshape(sigma.shape)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        x, s = x.float(), sigma.float().reshape(-1, 1, 1, 1)
        norm = torch.sqrt(1 + s**2)
        v = self.unet(x / norm, self.nearest(sigma), class_labels=class_labels.argmax(dim=1))
        return x / norm**2 - s / norm * v


net, labels = Network().eval(), torch.eye(10)[[1, 8]]
torch.manual_seed(0)
images = edm_sampler(net, torch.randn(2, 1, 32, 32), labels, num_steps=8)
print("float64, Heun, 15 evaluations:", images.dtype, [round(float(v), 2) for v in images.aminmax()])
churn = {"S_churn": 10.0, "S_min": 0.05, "S_max": math.inf, "S_noise": 1.003}
images = edm_sampler(net, None, labels, num_steps=8, seeds=range(2), dtype=torch.float32, **churn)
print("float32, with churn, a seed a picture:", [round(float(v), 2) for v in images.aminmax()])

"""Anything that can be called as model(x, t, **kwargs) is a model: four forms of one give the same samples."""

import functools

import torch

import fastddpm


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 2)
        self.layers = torch.nn.Sequential(torch.nn.Linear(5, 64), torch.nn.SiLU(), torch.nn.Linear(64, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.cat([x, self.embedding(label), t[:, None] / 1000], dim=1))


torch.manual_seed(0)
network, labels = Network().eval(), torch.arange(8)

# torch.export: exported as the sampler calls it, the condition by its name, and for any batch
batch = torch.export.Dim("batch", min=2)
rows = {name: {0: batch} for name in ("x", "t", "label")}
x, t, label = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
exported = torch.export.export(network, (x, t), {"label": label}, dynamic_shapes=rows).module()

schedule = fastddpm.NoiseSchedule.linear()
table = fastddpm.solvers.dpm_solver(schedule, 10, prediction_type="sample")
given = {"label": labels}
for name, model, kwargs in (
    ("nn.Module", network, given),
    ("torch.export", exported, given),
    ("functools.partial", functools.partial(network, label=labels), {}),
    ("lambda", lambda x, t: network(x, t, labels), {}),
):
    points = fastddpm.Sampler(model, table).sample((8, 2), seeds=0, model_kwargs=kwargs)
    print(f"{name:18}", points[0].tolist())

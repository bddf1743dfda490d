"""A network exported to ONNX, sampled from with ONNX Runtime. Random weights; needs onnxruntime."""

import io
import sys
import warnings

import torch

import fastddpm
from fastddpm.integrations import onnx

try:
    import onnxruntime
except ImportError:
    sys.exit(print("onnxruntime isn't installed", file=sys.stderr) or 77)


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(torch.nn.functional.silu(self.first(x) + t[:, None, None, None] / 1000))


torch.manual_seed(0)
network, file = Network(), io.BytesIO()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch, which has a second exporter, that needs onnxscript
    batch = {"x": {0: "batch"}, "t": {0: "batch"}}
    inputs = (torch.zeros(2, 3, 16, 16), torch.zeros(2, dtype=torch.int64))
    torch.onnx.export(network, inputs, file, dynamo=False, input_names=["x", "t"], dynamic_axes=batch)

session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
model = onnx.model(session)

settings = {"shape": (4, 3, 16, 16), "solver": "ddim", "steps": 20, "seed": 0, "clip": 1.0}
images = fastddpm.sample(model, **settings)
same = fastddpm.sample(network, **settings)
print(f"{list(images.shape)}, largest difference to torch's {float((images - same).abs().max()):.1e}")

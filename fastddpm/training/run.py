"""A training run in a folder: who it belongs to, saving, going on, the loss curve, and the loop.

The folder is a weights folder (``config.json``, ``diffusion_pytorch_model.safetensors``, ``scheduler_config.json``,
as diffusers has them) with ``training.json``, which says what run it is; ``training_state.safetensors``, from which it
goes on; ``loss.csv`` and ``loss.png``. Every file is replaced as a whole: a kill at any moment leaves a good one.
"""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from ..checkpoint import CONFIG_NAME, WEIGHTS_NAME, UNetConfig, read_json, write_atomically, write_json
from ..errors import CheckpointError, NonFiniteError, OutputError
from .data import ImageSet
from .trainer import NULL_CLASSES, Budget, TrainConfig, Trainer

IDENTITY, STATE, SCHEDULER = "training.json", "training_state.safetensors", "scheduler_config.json"
LOSS_TABLE, LOSS_CURVE = "loss.csv", "loss.png"
WRITTEN = (IDENTITY, STATE, SCHEDULER, CONFIG_NAME, WEIGHTS_NAME, LOSS_TABLE, LOSS_CURVE)  # all that a run writes
NULL_CLASS = "_null_class"  # in config.json: the class of dropped labels; diffusers ignores keys with an underscore
LOG_EVERY = 100  # steps a row of loss.csv


class OtherRunError(OutputError):
    """The output directory holds another run, or something that is no run."""

    exit_code = 4


@dataclass
class Log:
    """The course of a run, kept with its state.

    Attributes:
        rows: (step, mean loss since the row before, learning rate, seconds of training), one each 100 steps.
        total, count: sum and number of the losses since the last row.
        seconds: time that training took, over all its parts.
    """

    rows: list[tuple[int, float, float, float]] = field(default_factory=list)
    total: float = 0.0
    count: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Mean loss of the last row, or of the steps so far where there is none yet."""
        if self.rows:
            return self.rows[-1][1]
        return self.total / self.count if self.count else math.nan

    def add(self, step: int, loss: float, lr: float) -> None:
        """Count one step's loss. Raises `NonFiniteError` for NaN or infinity."""
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss became {loss} at step {step}: lower the learning rate; the state saved last is intact"
            )
        self.total, self.count = self.total + loss, self.count + 1
        if step % LOG_EVERY == 0:
            self.rows.append((step, self.total / self.count, lr, self.seconds))
            self.total, self.count = 0.0, 0

    def csv(self) -> bytes:
        """The rows with a header line."""
        lines = [f"{step},{loss:.6f},{lr:.6g},{seconds:.1f}" for step, loss, lr, seconds in self.rows]
        return "\n".join(["step,loss,learning_rate,seconds", *lines, ""]).encode()


def identity(data: ImageSet, unet: UNetConfig, config: TrainConfig) -> dict[str, Any]:
    """What makes a run the same run: data, architecture and training; not its end, which may be put off."""
    return {"format": 1, "data": data.fingerprint(), "unet": asdict(unet), "training": asdict(config)}


class Run:
    """A folder that a run is kept in: taken up where it holds the same run, begun where it is new or empty.

    Raises `OtherRunError` where the folder holds anything else (or the same run and `resume` is false),
    `CheckpointError` where its state is damaged, `OutputError` where it can't be written.
    """

    def __init__(self, folder: Path, trainer: Trainer, data: ImageSet, *, resume: bool = True) -> None:
        self.folder, self.trainer, self.log = folder, trainer, Log()
        # As it will be read back: tuples are lists in JSON
        self.identity = json.loads(json.dumps(identity(data, trainer.master.config, trainer.config)))
        self.resumed_at: int | None = None
        if self._is_new():
            write_json(folder / IDENTITY, self.identity)
        else:
            self._check_same(resume)
            if os.path.exists(folder / STATE):
                self._load()
        self._remove_partial_files()

    def _is_new(self) -> bool:
        # os.path's answer is "no" where pathlib raises (no permission, name too long); writing then says why
        there = os.path.exists(self.folder)
        if there and not os.path.isdir(self.folder):
            raise OtherRunError(f"{self.folder} is a file; give a new directory")
        try:
            held = {p.name for p in self.folder.iterdir()} if there else set()
        except OSError as error:
            raise OutputError(f"can't read {self.folder}: {error.strerror}") from error
        held = {name for name in held if not name.startswith(".")}
        if held and IDENTITY not in held:
            raise OtherRunError(f"{self.folder} holds {min(held)} and no training run; give a new directory")
        return not held

    def _check_same(self, resume: bool) -> None:
        found = _flat(read_json(self.folder / IDENTITY))
        mine = _flat(self.identity)
        different = [name for name in sorted(found.keys() | mine.keys()) if found.get(name) != mine.get(name)]
        if different:
            name = different[0]
            raise OtherRunError(
                f"{self.folder} holds another run: {name} is {_short(found.get(name))} there, {_short(mine.get(name))} "
                f"here; give another directory, or that run's options"
            )
        if not resume:
            raise OtherRunError(f"{self.folder} holds this run already; give another directory, or let it go on")

    def _load(self) -> None:
        try:
            with safe_open(self.folder / STATE, framework="pt") as file:
                meta = json.loads((file.metadata() or {})["run"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a handle, not a dict)
            rows = [(int(step), float(loss), float(lr), float(s)) for step, loss, lr, s in meta["rows"]]
            log = Log(rows, float(meta["total"]), int(meta["count"]), float(meta["seconds"]))
            self.trainer.load_state(tensors, int(meta["steps"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, CheckpointError) as error:
            reason = (str(error).splitlines() or ["damaged"])[0]
            raise CheckpointError(
                f"{self.folder / STATE} is no state of this run ({reason}); delete it to begin anew"
            ) from error
        self.log, self.resumed_at = log, self.trainer.steps

    def _remove_partial_files(self) -> None:
        """What a killed process left: temporary files of `write_atomically`, which nobody reads."""
        try:
            for path in self.folder.glob(".*.*"):
                if path.name.startswith(tuple(f".{name}." for name in WRITTEN)):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"can't clear {self.folder} of partial files: {error.strerror}") from error

    def save(self) -> None:
        """Write state, weights (the moving average, float16), configs and loss.csv.

        Where the network knows classes, config.json has "_null_class" too: the one that dropped labels became.
        Raises `OutputError`; `NonFiniteError` where a weight is NaN or beyond float16; nothing is written then.
        """
        log, weights = self.log, self.trainer.averaged()
        for name, weight in weights.state_dict().items():
            if not weight.isfinite().all():
                raise NonFiniteError(
                    f"{name} became infinite or NaN by step {self.trainer.steps}: lower the learning rate; "
                    f"the state saved last is intact"
                )
        meta = {"steps": self.trainer.steps, "rows": log.rows, "total": log.total, "count": log.count}
        # One key: with several, safetensors orders them differently in each process
        text = json.dumps({**meta, "seconds": log.seconds})
        write_atomically(self.folder / STATE, save(self.trainer.state(), metadata={"run": text}))
        weights.save_pretrained(self.folder)
        if (classes := weights.config.num_class_embeds) is not None:
            config = read_json(self.folder / CONFIG_NAME)
            write_json(self.folder / CONFIG_NAME, {**config, NULL_CLASS: classes - NULL_CLASSES})
        write_json(self.folder / SCHEDULER, scheduler_config(self.trainer))
        write_atomically(self.folder / LOSS_TABLE, log.csv())

    def train(
        self,
        budget: Budget,
        *,
        save_minutes: float = 5.0,
        stop: Callable[[], bool] = lambda: False,
        progress: bool = False,
    ) -> bool:
        """Train until the budget is used up; True then, False where `stop` said so before. The state is saved.

        Raises `NonFiniteError` where the loss becomes NaN, and leaves the state saved last; `OutputError`.
        """
        log, trainer = self.log, self.trainer
        saved = last = time.monotonic()
        bar = tqdm(total=100, disable=not progress, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        with bar:
            while (done := budget.progress(trainer.steps, log.seconds)) < 1.0 and not stop():
                rate = budget.rate(trainer.steps, done)
                loss = float(trainer.step(rate))
                now = time.monotonic()
                log.seconds, last = log.seconds + now - last, now
                log.add(trainer.steps, loss, trainer.config.lr * rate)
                bar.update(100 * budget.progress(trainer.steps, log.seconds) - bar.n)
                bar.set_postfix_str(f"step {trainer.steps}, loss {log.loss:.4f}", refresh=False)
                if now - saved > 60 * save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()
        return done >= 1.0


def scheduler_config(trainer: Trainer) -> Mapping[str, Any]:
    """The ``scheduler_config.json`` of the weights: diffusers' DDPMScheduler."""
    return {
        "_class_name": "DDPMScheduler",
        **trainer.schedule.to_diffusers(),
        "prediction_type": trainer.config.prediction,
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }


def write_loss_curve(run: Run) -> Path | None:
    """Draw loss.png, where matplotlib is installed; None where it is not, or where there is no row yet."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not run.log.rows:
        return None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([row[0] for row in run.log.rows], [row[1] for row in run.log.rows], linewidth=1)
    axes.set(xlabel="step", ylabel=f"loss (mean of {LOG_EVERY} steps)", yscale="log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(run.folder / LOSS_CURVE, buffer.getvalue())
    return run.folder / LOSS_CURVE


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Inside, the first SIGINT is a request: the function says if there was one. The second one interrupts as usual."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(_number: int, _frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _flat(value: Mapping[str, Any]) -> dict[str, Any]:
    """Nested names in one: {"training": {"lr": 1}} -> {"lr": 1}."""
    made: dict[str, Any] = {}
    for name, inner in value.items():
        made.update(_flat(inner) if isinstance(inner, dict) else {name: inner})
    return made


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."

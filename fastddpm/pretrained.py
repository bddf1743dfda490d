"""A trained model as a folder: the UNet and, beside it, the scheduler config that says how to sample from it.

The folder has diffusers' layout: a UNet's ``config.json`` and ``diffusion_pytorch_model.safetensors`` with a
``scheduler_config.json`` beside them, or a pipeline's ``unet/`` and ``scheduler/``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import solvers
from .checkpoint import CONFIG_NAME, read_json
from .errors import ConfigError
from .schedule import NoiseSchedule
from .solvers import StepTable

SCHEDULER_NAME = "scheduler_config.json"
SHIPPED = Path(__file__).parent / "weights"
DEFAULT = SHIPPED / "fashion-mnist"

# Fields of diffusers' schedulers for which fastddpm has one value; the others have no effect on the two solvers.
_FIXED = {"steps_offset": 0, "set_alpha_to_one": True}
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler")
_VARIANCES = {  # diffusers' name -> ours; its fixed_small_log is fixed_small, computed by way of the logarithm
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
}


@dataclass(frozen=True)
class SchedulerConfig:
    """What a ``scheduler_config.json`` says: the schedule, and the options of the solver.

    Attributes:
        schedule: the noise schedule that the model was trained with.
        options: prediction_type, clip and spacing, as every solver takes them.
        variance_type: diffusers' name of the variance, which only some solvers use.
    """

    schedule: NoiseSchedule
    options: Mapping[str, Any]
    variance_type: object

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Read the fields of diffusers' DDPM and DDIM schedulers, with their defaults.

        Raises `ConfigError` for what can't be sampled here, another scheduler's config among it: its defaults, or the
        very process, are others.
        """
        kind = config.get("_class_name", "DDPMScheduler")
        if kind not in _SCHEDULERS:
            raise ConfigError(
                f"scheduler config: _class_name is {kind!r}; allowed: {', '.join(map(repr, _SCHEDULERS))}"
            )
        for name, only in _FIXED.items():
            if config.get(name, only) != only:
                raise ConfigError(f"scheduler config: {name} is {config[name]!r}; fastddpm has {only!r} alone")
        clips = config.get("clip_sample", True)
        if not isinstance(clips, bool):
            raise ConfigError(f"scheduler config: clip_sample is {clips!r}; allowed: true or false")
        options = {
            "prediction_type": config.get("prediction_type", "epsilon"),
            "clip": config.get("clip_sample_range", 1.0) if clips else None,
            "spacing": config.get("timestep_spacing", "leading"),
        }
        thresholds = config.get("thresholding", False)
        if not isinstance(thresholds, bool):
            raise ConfigError(f"scheduler config: thresholding is {thresholds!r}; allowed: true or false")
        if thresholds:  # in diffusers too it goes before the clip
            options["clip"] = config.get("sample_max_value", 1.0)
            options["dynamic_thresholding_ratio"] = config.get("dynamic_thresholding_ratio", 0.995)
        return cls(
            schedule=NoiseSchedule.from_diffusers(config),
            options=options,
            variance_type=config.get("variance_type", "fixed_small"),
        )

    @classmethod
    def from_folder(cls, folder: str | Path) -> SchedulerConfig:
        """Read the folder's scheduler config; where it has none: diffusers' defaults (Ho et al. 2020, clipped).

        Raises `CheckpointError` for a file that isn't JSON, `ConfigError` for what can't be sampled here.
        """
        path = find_scheduler_config(Path(folder))
        return cls.from_diffusers({} if path is None else read_json(path))

    def table(self, solver: str, steps: int | None = None, **options: object) -> StepTable:
        """The table of `solver` for this model; `options` go before what the config says.

        What the config says and the solver has no option for (a clip of x_0, where it extrapolates noise) is left out;
        and its spacing, which was chosen for ddpm and ddim, where the solver has another one by default.
        Where x_0 is clipped, ddim takes the noise that agrees with it (``use_clipped_model_output=True``): with the
        default of `solvers.ddim` and diffusers a model that is often clipped gives grey pictures.

        Raises `ConfigError` as `solvers.make` does, or where `solver` has not the model's variance.
        """
        known = solvers.options(solver)
        usual = {name: value for name, value in self.options.items() if name in known}
        if known.get("spacing") != "leading":
            usual.pop("spacing", None)
        given = {**usual, **options}
        if "variance" in known and "variance" not in given:
            kind = self.variance_type
            if not isinstance(kind, str) or kind not in _VARIANCES:
                raise ConfigError(
                    f"scheduler config: variance_type is {kind!r}; solver {solver} takes "
                    f"{', '.join(map(repr, _VARIANCES))}. Solver ddim needs none"
                )
            given["variance"] = _VARIANCES[kind]
        if "use_clipped_model_output" in known:
            given.setdefault("use_clipped_model_output", given["clip"] is not None)
        return solvers.make(solver, self.schedule, steps, **given)


def find_scheduler_config(folder: Path) -> Path | None:
    """The ``scheduler_config.json`` that belongs to a weights folder, or None."""
    for place in (folder / SCHEDULER_NAME, folder / "scheduler" / SCHEDULER_NAME):
        if os.path.isfile(place):
            return place
    folder = Path(os.path.realpath(folder))
    beside = folder.parent / "scheduler" / SCHEDULER_NAME  # of a pipeline whose unet/ was named
    return beside if folder.name == "unet" and os.path.isfile(beside) else None


def null_class(folder: Path, embeddings: int) -> int | None:
    """Which of a UNet's class embeddings stands for "no class", or None: the config's ``_null_class``.

    `fastddpm train` writes it; diffusers passes over keys that begin with an underscore. Raises `ConfigError` for one
    that the UNet has not.
    """
    place = next((f for f in (folder, folder / "unet") if os.path.isfile(f / CONFIG_NAME)), folder)
    null = read_json(place / CONFIG_NAME).get("_null_class")
    if null is not None and (isinstance(null, bool) or null not in range(embeddings) or embeddings < 2):
        raise ConfigError(f"UNet config: _null_class is {null!r}; allowed: none, or one of {embeddings} (at least 2)")
    return null


def shipped() -> tuple[str, ...]:
    """The names of the weights in the package."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob(f"*/{CONFIG_NAME}")))

"""``fastddpm train``: the options, and what is said on the screen."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli import INTERRUPTED, debug_option, json_option

if TYPE_CHECKING:
    from ..checkpoint import UNetConfig
    from .data import ImageSet
    from .run import Run

MAX_LEVELS = 8  # of a `UNetConfig`


class Integers(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on only
    """Whole numbers separated by commas."""

    name = "integers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(word) for word in value.split(",") if word.strip())
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 32,48,96", param, ctx)


def architecture(data: ImageSet, widths: tuple[int, ...], layers: int, attention: tuple[int, ...]) -> UNetConfig:
    """The UNet for padded square images: `widths` by level, attention at these sides; or `ConfigError`."""
    from ..checkpoint import UNetConfig
    from ..errors import ConfigError

    channels, side = data.images.shape[1], data.images.shape[2]
    sides = [side >> level for level in range(len(widths))]
    if wrong := [a for a in attention if a not in sides]:
        raise ConfigError(f"attention is asked for at {wrong[0]} x {wrong[0]}; the levels have the sides {sides}")
    kinds = ["Attn" if s in attention else "" for s in sides]
    return UNetConfig(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=math.gcd(8, *widths),
        attention_head_dim=None,
        num_class_embeds=data.num_classes + 1 if data.labels is not None else None,
    )


@click.command()
@click.option(
    "--data", required=True, type=click.Path(path_type=Path), help="idx files, a folder of pictures, or .npz."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for weights, state and loss curve.")
@click.option("--minutes", type=float, help="Train so long (60, if --steps is not given either).")
@click.option("--steps", type=int, help="Train so many steps.")
@click.option("--batch-size", type=int, default=64, show_default=True)
@click.option("--lr", type=float, default=1.2e-3, show_default=True, help="Learning rate of AdamW.")
@click.option("--ema", type=float, default=0.999, show_default=True, help="Decay of the weights' moving average.")
@click.option("--class-dropout", type=float, default=0.1, show_default=True, help="How often a label is left out.")
@click.option("--size", type=int, help="Pad images to this side (default: the next that the network takes).")
@click.option("--widths", type=Integers(), default="32,48,96,160", show_default=True, help="Channels by level.")
@click.option("--layers", type=int, default=1, show_default=True, help="Residual blocks a level.")
@click.option("--attention", type=Integers(), default="", help="Sides of the levels with self-attention, e.g. 16,8.")
@click.option("--schedule", default="linear", show_default=True, help="linear, scaled_linear, cosine or sigmoid.")
@click.option("--density", default="cosine", show_default=True, help="Of the time steps: uniform or cosine.")
@click.option(
    "--prediction", default="v_prediction", show_default=True, help="What is learnt: v_prediction or epsilon."
)
@click.option("--precision", default="auto", show_default=True, help="bf16, float32, or auto: bf16 where it is fast.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--resume/--no-resume", default=True, help="Go on with the run in --out, or refuse to.")
@json_option
@debug_option
@click.pass_context
def train(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Train a UNet on images. Stops with Ctrl-C, and goes on when called again."""
    result = run_training(options, as_json)
    if as_json:
        click.echo(json.dumps(result))
    else:
        say_result(result)
    if result["interrupted"]:
        ctx.exit(INTERRUPTED)


def run_training(options: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Everything from the options to the saved run; returns what is reported."""
    import torch

    from .. import runtime
    from ..errors import ConfigError
    from .data import load_images
    from .run import Run, interruption, write_loss_curve
    from .trainer import Budget, TrainConfig, Trainer

    minutes = 60.0 if options["minutes"] is None and options["steps"] is None else options["minutes"]
    budget = Budget(options["steps"], minutes)
    names = ("batch_size", "lr", "ema", "class_dropout", "schedule", "density", "seed", "precision", "prediction")
    device = runtime.choose_device(options["device"])
    if options["precision"] == "auto":
        fast = runtime.choose_dtype("auto", device) == torch.bfloat16
        options = {**options, "precision": "bf16" if fast else "float32"}
    config = TrainConfig(**{name: options[name] for name in names})
    if (levels := len(options["widths"])) > MAX_LEVELS:
        raise ConfigError(f"{levels} widths are given; allowed: 1 ... {MAX_LEVELS}, one for each level")
    data = load_images(options["data"]).padded(2 ** max(0, levels - 1), options["size"])
    unet = architecture(data, options["widths"], options["layers"], options["attention"])
    run = Run(options["out"], Trainer(data, unet, config, device.type), data, resume=options["resume"])
    if not quiet:
        say_start(run, data)
    before = run.trainer.steps
    with interruption() as stop:
        finished = run.train(budget, stop=stop, progress=sys.stderr.isatty())
    curve = write_loss_curve(run)
    return {
        **report(run),
        "new_steps": run.trainer.steps - before,
        "images": len(data.images),
        "loss_curve": str(curve) if curve else None,
        "interrupted": not finished,
    }


def report(run: Run) -> dict[str, Any]:
    """Where a run stands."""
    return {
        "folder": str(run.folder),
        "steps": run.trainer.steps,
        "minutes": round(run.log.seconds / 60, 3),
        "loss": run.log.loss if math.isfinite(run.log.loss) else None,
        "parameters": sum(p.numel() for p in run.trainer.parameters.values()),
        "device": run.trainer.device.type,
        "precision": run.trainer.config.precision,
    }


def say_start(run: Run, data: ImageSet) -> None:
    """Data, network and where the run stands, on one line each."""
    n, channels, height, width = data.images.shape
    classes = f"{data.num_classes} classes" if data.labels is not None else "no labels"
    click.echo(f"{n} images, {channels} x {height} x {width}, {classes}", err=True)
    parameters, trainer = sum(p.numel() for p in run.trainer.parameters.values()), run.trainer
    where = f"{trainer.device.type}, {trainer.config.precision}"
    click.echo(f"{parameters / 1e6:.2f} million parameters on {where}", err=True)
    if run.resumed_at is not None:
        click.echo(f"going on at step {run.resumed_at} of the run in {run.folder}", err=True)


def say_result(result: dict[str, Any]) -> None:
    """What was done, where it lies, and what to do with it."""
    loss = "-" if result["loss"] is None else f"{result['loss']:.4f}"
    what = "interrupted after" if result["interrupted"] else "trained"
    if not result["new_steps"] and not result["interrupted"]:
        what = "nothing to do, the run is complete:"
    click.echo(f"{what} {result['steps']} steps in {result['minutes']:.1f} minutes, loss {loss}: {result['folder']}")
    if result["loss_curve"] is None and result["steps"] >= 100:
        click.echo("no picture of the loss curve: matplotlib is not installed (pip install matplotlib)", err=True)
    click.echo(f"look at it with: fastddpm sample --weights {result['folder']}")

"""The command line: ``fastddpm sample | train | info``.

Nothing but click is imported until a command runs, so that ``--help`` is quick. Every error that fastddpm raises on
purpose is one line on stderr and its own exit code (`fastddpm.errors`); ``--debug`` shows where it came from.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import click

from . import __version__
from .errors import DeviceError, FastDDPMError

_LAZY = {"train": ("fastddpm.training.command", "train", "Train a UNet on your images.")}
_ORDER = ("sample", "train", "solvers", "info")
INTERRUPTED = 130


class Cli(click.Group):
    """A group whose errors are one line each, and which imports a command of `_LAZY` when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_ORDER)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _LAZY:
            return super().get_command(ctx, cmd_name)
        module, name, _ = _LAZY[cmd_name]
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        helps = {name: help for name, (_, _, help) in _LAZY.items()}
        rows = [(name, helps.get(name) or self.commands[name].get_short_help_str(80)) for name in _ORDER]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        # Before torch is imported: its CPU threads must not spin while they wait. Beside other work on two cores, 16
        # pictures of 50 steps took about 24 s spinning and 4 s so (the load was not held equal).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            result = super().main(*args, **kwargs)
        except click.ClickException as error:
            usage = error if isinstance(error, click.UsageError) else None
            path = usage.ctx.command_path if usage and usage.ctx else "fastddpm"
            message = " ".join(error.format_message().split())
            click.echo(f"error: {message.rstrip('.')} (see {path} --help)", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(result if isinstance(result, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exc()
            line, code = _in_one_line(error)
            click.echo(f"error: {line}", err=True)
            ctx.exit(code)


def _in_one_line(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    text = " ".join(str(error).split())
    if isinstance(error, FastDDPMError):
        return text, error.exit_code
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "there is not enough memory for so many at once; use a smaller batch", DeviceError.exit_code
    return f"{type(error).__name__}: {text} (not expected: --debug shows where, please report it)", 1


def _note_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().params["debug"] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_note_debug, help="Show the trace of an error."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")


@click.group("fastddpm", cls=Cli, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the trace of an error.")
@click.version_option(__version__, prog_name="fastddpm", message="%(prog)s %(version)s")
@click.pass_context
def main(ctx: click.Context, debug: bool) -> None:
    """Sample from diffusion models, fast: DDPM and DDIM with fused kernels.

    "fastddpm sample" draws pictures with a model that is in the package: a grid of clothes from Fashion-MNIST. On an
    NVIDIA GPU it runs Triton kernels in a CUDA graph, elsewhere plain PyTorch; a seed means the same noise everywhere.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of a UNet in diffusers' layout, as fastddpm train writes it.  [default: the Fashion-MNIST model]",
)
@click.option("--num", type=int, default=16, show_default=True, metavar="N", help="How many pictures.")
@click.option(
    "--solver", default="ddim", show_default=True, metavar="NAME", help="The sampler; fastddpm solvers lists them."
)
@click.option("--steps", type=int, default=50, show_default=True, metavar="N", help="Steps of the solver.")
@click.option("--eta", type=float, metavar="X", help="Noise of ddim: 0 (none) to 1 (as much as ddpm).  [default: 0]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another option of the solver, as order=3 or spacing=karras; may be given again.",
)
@click.option(
    "--guidance", type=float, metavar="W", help="Classifier-free guidance towards the class; 1: none.  [default: 1]"
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="0 to 2^64 - 1.")
@click.option("--class", "label", type=int, metavar="N", help="Pictures of this class alone.  [default: each in turn]")
@click.option(
    "--out", type=click.Path(path_type=Path), default="samples.png", show_default=True, metavar="FILE", help="The grid."
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a filmstrip too: the first pictures on their way from noise, each in two rows, "
    "the state and the picture that the model sees in it.",
)
@click.option(
    "--batch",
    type=int,
    metavar="N",
    help="Compute so many at once. With one value of it, a picture has the same bytes whatever --num is."
    "  [default: all, at most 64]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Precision of the network; auto: bfloat16 where the hardware has it.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto: on an NVIDIA GPU where there is one.",
)
@json_option
@debug_option
def sample(as_json: bool, **options: Any) -> None:
    """Draw pictures with a trained model and write them as a grid.

    The PNG says in its text chunks how it was made: seed, steps, solver, version.

    \b
    Examples:
      fastddpm sample
      fastddpm sample --num 64 --seed 7 --class 8 --out bags.png
      fastddpm sample --solver ddpm --steps 250 --trace filmstrip.png
      fastddpm sample --solver dpm_solver --steps 10 --set order=3 --set spacing=karras
      fastddpm sample --weights my-model --json
    """
    from .sampling import Request, run

    result = run(Request(**options), progress=sys.stderr.isatty())
    for note in result.pop("notes"):
        click.echo(f"note: {note}", err=True)
    if as_json:
        _print_json(result)
        return
    files = " and ".join(str(result[name]) for name in ("out", "trace") if result[name])
    click.echo(f"wrote {files}")
    plural = "s" if result["num"] > 1 else ""
    click.echo(
        f"{result['num']} picture{plural}, {result['steps']} steps of {result['solver']}, seed {result['seed']}: "
        f"{result['seconds']:.2f} s, {result['images_per_second']:.1f} images/s"
    )
    click.echo(f"on {result['path']}")


@main.command()
@json_option
@debug_option
def solvers(as_json: bool) -> None:
    """List the solvers with their options and what these are by default."""
    from . import solvers

    known = {name: solvers.options(name) for name in solvers.names()}
    if as_json:
        _print_json({name: dict(options) for name, options in known.items()})
        return
    for name, options in known.items():
        click.echo(f"{name}: {solvers.summary(name)}")
        click.echo(f"    {' '.join(f'{option}={default}' for option, default in options.items())}")


@main.command()
@json_option
@debug_option
def info(as_json: bool) -> None:
    """Say which versions there are, the device, and the path that sampling takes."""
    import platform

    from . import pretrained, runtime

    device = runtime.choose_device()
    facts = {
        "fastddpm": __version__,
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
        "triton": _version("triton"),
        "device": device.type,
        "path": runtime.describe(device, runtime.choose_dtype("auto", device)),
        "weights": list(pretrained.shipped()),
    }
    if as_json:
        _print_json(facts)
        return
    for name, value in facts.items():
        said = ", ".join(value) or "none" if isinstance(value, list) else value or "not installed"
        click.echo(f"{name:<10}{said}")


def _print_json(value: object) -> None:
    click.echo(json.dumps(_in_json(value), allow_nan=False))


def _in_json(value: Any) -> Any:
    """`value` for JSON, which has no infinite numbers: these as text, "inf", which ``--set`` reads again."""
    if isinstance(value, dict):
        return {name: _in_json(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_in_json(v) for v in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

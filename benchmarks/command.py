"""How the benchmarks' commands end: an error is one line on stderr, and an exit code."""

from __future__ import annotations

from collections.abc import Sequence

import click

from fastddpm.errors import FastDDPMError


def run(command: click.Command, words: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 2 for wrong usage or input, 5 for the disk, 130 interrupted."""
    try:
        command.main(args=None if words is None else list(words), standalone_mode=False)
    except click.ClickException as error:
        click.echo(f"error: {' '.join(error.format_message().split()).rstrip('.')} (see --help)", err=True)
        return error.exit_code
    except FastDDPMError as error:
        click.echo(f"error: {' '.join(str(error).split())}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    return 0

"""``python -m fastddpm`` is the command ``fastddpm``."""

from .cli import main

main(prog_name="fastddpm")

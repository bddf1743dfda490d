"""Solvers: functions of (schedule, steps, options) that return a `StepTable`. Pure NumPy.

A new solver is a function in a file of its own and a line in `_SOLVERS`; no kernel and no loop changes.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable

from ..errors import ConfigError
from ..schedule import NoiseSchedule
from .ddim import ddim
from .ddpm import ddpm
from .deis import deis
from .dpm import dpm_solver
from .dpm2 import dpm2
from .dpm_singlestep import dpm_solver_singlestep
from .euler import euler, euler_ancestral
from .heun import heun
from .inversion import ddim_inversion
from .langevin import annealed_langevin
from .lcm import consistency, lcm
from .plms import plms
from .predictor_corrector import predictor_corrector
from .repaint import repaint
from .retimed import retimed
from .table import StepTable, step_table
from .unipc import unipc

__all__ = [
    "StepTable",
    "annealed_langevin",
    "consistency",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm2",
    "dpm_solver",
    "dpm_solver_singlestep",
    "euler",
    "euler_ancestral",
    "heun",
    "lcm",
    "make",
    "names",
    "options",
    "plms",
    "predictor_corrector",
    "repaint",
    "retimed",
    "step_table",
    "summary",
    "unipc",
]

_SOLVERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver": dpm_solver,
    "dpm_solver_singlestep": dpm_solver_singlestep,
    "unipc": unipc,
    "plms": plms,
    "deis": deis,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "lcm": lcm,
    "consistency": consistency,
    "repaint": repaint,
    "annealed_langevin": annealed_langevin,
    "predictor_corrector": predictor_corrector,
    "ddim_inversion": ddim_inversion,
}


def names() -> tuple[str, ...]:
    """The solvers' names, as `make` takes them."""
    return tuple(_SOLVERS)


def options(name: str) -> dict[str, object]:
    """A solver's options with their defaults; raises `ConfigError` for an unknown solver."""
    parameters = inspect.signature(_solver(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def summary(name: str) -> str:
    """What a solver is, in a line; raises `ConfigError` for an unknown solver."""
    return (inspect.getdoc(_solver(name)) or "").partition("\n")[0]


def make(name: str, schedule: NoiseSchedule, steps: int | None = None, **given: object) -> StepTable:
    """The table of the solver `name`: ``make("ddim", schedule, 50, eta=0.5)`` is ``ddim(schedule, 50, eta=0.5)``.

    Raises `ConfigError` for a solver or an option that doesn't exist (the nearest name is in the message), and what
    the solver raises.
    """
    solver = _solver(name)
    known = options(name)
    for option in given:
        if option not in known:
            raise ConfigError(f"solver {name} has no option {option!r}{_nearest(option, known)}")
    return solver(schedule, steps, **given)


def _solver(name: str) -> Callable[..., StepTable]:
    if not isinstance(name, str) or name not in _SOLVERS:
        raise ConfigError(f"there is no solver {name!r}{_nearest(str(name), _SOLVERS)}")
    return _SOLVERS[name]


def _nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message that refuses `word`: did you mean ...? and all that is allowed."""
    known = list(known)
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} Allowed: {', '.join(map(repr, known))}"

"""Checks of options that several solvers have: the value, or one line that says what is allowed."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError


def check_order(order: object) -> int:
    """`order` as an int; `ConfigError` unless it is 1, 2 or 3."""
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or not 1 <= order <= 3:
        raise ConfigError(f"order is {order!r}; allowed: 1, 2 or 3")
    return int(order)


def check_flag(name: str, value: object) -> None:
    """`ConfigError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; allowed: True or False")


def check_number(name: str, value: object, below: float) -> float:
    """`value` as a float; `ConfigError` unless it is a number between 0 and `below`, neither included."""
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not 0 < value < below:  # type: ignore[operator]
        raise ConfigError(f"{name} is {value!r}; allowed: a number above 0 and below {below:g}")
    return float(value)  # type: ignore[arg-type]


def check_count(name: str, value: object, least: int, most: int) -> int:
    """`value` as an int; `ConfigError` unless it is an integer in least ... most."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise ConfigError(f"{name} is {value!r}; allowed: an integer in {least} ... {most}")
    return int(value)

"""Checks of the types and ranges of values that were read from JSON, before anything computes with them.

A check takes a value and its name, and raises ValueError: "its step is 'x', expected a whole number".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from hvdlm.io.untrusted_input import shown

Check = Callable[[Any, str], None]
MOST = 2**53
"""JSON readers keep whole numbers exact up to here."""


def refuse(value: Any, name: str, expected: str) -> NoReturn:
    """Raise the ValueError of a value that isn't as ``expected``."""
    got = shown(repr(value) if isinstance(value, str) else value)
    raise ValueError(f"its {shown(name)} is {got}, expected {expected}")


def count(low: int = 0, high: int = MOST) -> Check:
    """Return the check of a whole number from ``low`` to ``high``; a bool is none."""

    def check(value: Any, name: str) -> None:
        if type(value) is not int or not low <= value <= high:
            refuse(value, name, f"a whole number, {low} or more")

    return check


def number(low: float = -math.inf, finite: bool = True) -> Check:
    """Return the check of a number, ``low`` or more; it may be NaN or infinite unless ``finite``."""

    def check(value: Any, name: str) -> None:
        good = type(value) is float or (type(value) is int and abs(value) <= MOST)
        if not good or (finite and not math.isfinite(value)) or value < low:
            refuse(value, name, "a number" if low == -math.inf else f"a number, {low:g} or more")

    return check


def text(value: Any, name: str) -> None:
    """Check that ``value`` is text."""
    if not isinstance(value, str):
        refuse(value, name, "text")


def flag(value: Any, name: str) -> None:
    """Check that ``value`` is true or false."""
    if type(value) is not bool:
        refuse(value, name, "true or false")


def or_null(check: Check) -> Check:
    """Return the check of a value that may be null, too."""
    return lambda value, name: None if value is None else check(value, name)


def list_of(check: Check, least: int = 0, most: int = MOST) -> Check:
    """Return the check of a list of ``least`` to ``most`` values, each of which ``check`` accepts."""

    def check_list(value: Any, name: str) -> None:
        if not isinstance(value, list) or not least <= len(value) <= most:
            refuse(value, name, "a list" if most == MOST else f"a list of {least} to {most} values")
        for item in value:
            check(item, f"{name}[]")

    return check_list


def mapping_of(check: Check | None = None) -> Check:
    """Return the check of a mapping whose values ``check`` accepts; None: any values."""

    def check_mapping(value: Any, name: str) -> None:
        if not isinstance(value, dict):
            refuse(value, name, "a mapping")
        for key, item in value.items() if check else ():
            check(item, f"{name}.{key}")  # type: ignore[misc]

    return check_mapping


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Return the check of a mapping with ``required`` and ``optional`` entries; it may have others."""

    def check_fields(value: Any, name: str) -> None:
        mapping_of()(value, name or "content")
        for key, check in {**required, **(optional or {})}.items():
            path = f"{name}.{key}" if name else key
            if key in value:
                check(value[key], path)
            elif key in required:
                raise ValueError(f"it has no {path}")

    return check_fields

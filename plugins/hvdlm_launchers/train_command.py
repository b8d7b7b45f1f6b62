"""Reads a training command: the options after ``-m hvdlm``, and the value that one of them has."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hvdlm.configuration.parsing import read_yaml


def train_arguments(command: list[str]) -> list[str] | None:
    """Return the arguments after ``-m hvdlm [train]``, or None if ``command`` runs something else."""
    starts = [index for index, pair in enumerate(itertools.pairwise(command)) if pair == ("-m", "hvdlm")]
    if not starts:
        return None
    arguments = command[starts[0] + 2 :]
    if not arguments or arguments[0].startswith("-"):
        return arguments
    return arguments[1:] if arguments[0] == "train" else None


def option_value(command: list[str], key: str) -> str | None:
    """Return the last value that ``command`` gives the option ``key`` ("log.run"), itself or in a --config file.

    Raises:
        HvdlmError: such a file can't be read.
    """
    result = None
    for index, word in enumerate(command):
        name, sign, value = word.partition("=")
        if not sign:
            value = command[index + 1] if index + 1 < len(command) else ""
        if name == f"--{key}":
            result = value
        elif name == "--config":
            result = _value_in_file(Path(value), key) or result
    return result


def _value_in_file(path: Path, key: str) -> str | None:
    value: Any = read_yaml(path)
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return None if value is None else str(value)

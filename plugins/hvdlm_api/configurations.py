"""Configurations and options given in Python, as arguments of the command line: both are checked by the same parser."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from hvdlm.config import Config
from hvdlm.configuration import parsing, schema, validation
from hvdlm.errors import HvdlmError

_COMMANDS = {"help", "config", "print_config"}  # options of the command line alone, which print and exit
Source = Config | Mapping[str, Any] | str | os.PathLike[str]


def load_config(sources: Iterable[Source]) -> Config:
    """Return the configuration that ``sources`` give, of which later ones override earlier ones (``Config.load``).

    Raises:
        HvdlmError: an unknown option, a wrong type, or an unreadable file.
    """
    return parsing.parse_config(as_arguments(sources))


def as_arguments(sources: Iterable[Source], files: Iterable[Path] = ()) -> list[str]:
    """Return ``sources`` as arguments of the command line; ``files``: YAML files that they override.

    Raises:
        HvdlmError: a source is of another type, or has a name or a value that no option has.
    """
    contents = [_content(source) for source in sources]
    # Plugins, which a source may name, have options whose values are mappings, not sections.
    read = [*files, *(Path(content) for content in contents if isinstance(content, str))]
    core = schema.types_of({"": Config})
    sections = parsing.plugin_options(_arguments(contents, core), [parsing.read_yaml(path) for path in read])
    return _arguments(contents, core | schema.types_of(sections))


def _arguments(contents: Iterable[dict[str, Any] | str], known: Mapping[str, Any]) -> list[str]:
    arguments: list[str] = []
    for content in contents:
        if isinstance(content, str):
            arguments += ["--config", content]
            continue
        for name in _COMMANDS & content.keys():
            raise HvdlmError(schema.unknown(name, known))
        arguments += parsing.as_options(content, known, "")
    return arguments


def _content(source: Any) -> dict[str, Any] | str:
    """Return the options of a configuration or a mapping, or the path of a file.

    All attributes of a configuration count: one that it doesn't declare was misspelled where it was assigned.
    """
    if isinstance(source, Config):
        validation.one_length(source.train)  # of several options, the last one counts
        options = dict(vars(source))
        return _plain(options.pop("plugin_options"), "") | _plain(options, "")
    if isinstance(source, Mapping):
        return _plain(source, "")
    return path_of(source, "hvdlm.Config.load takes paths of YAML files, configurations and mappings of options")


def path_of(value: Any, expectation: str) -> str:
    """Return a path as text; raise HvdlmError with the ``expectation`` where it is none."""
    if isinstance(value, str | os.PathLike) and isinstance(path := os.fspath(value), str):
        return path
    raise HvdlmError(f"{expectation}, got {_kind(value)}.")


def _plain(value: Any, name: str) -> Any:
    """Return a value as JSON has it: paths as text, numbers and arrays of numpy as Python's, sections as mappings."""
    if is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), name)
    if value is None or isinstance(value, str | int | float):
        return value
    return path_of(value, f"--{name}: expected text, a path, a number, true or false, or a list or mapping of these")


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"

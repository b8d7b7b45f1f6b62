"""Dataclasses from the content of YAML files and back, by their type hints."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from hvdlm.errors import nearest
from hvdlm.io.untrusted_input import shown


def build(kind: Any, value: Any, where: str = "") -> Any:
    """Return ``value`` of a YAML file as a ``kind``, by its type hints; ``where``: the field that holds it.

    Raises:
        ValueError: the first field that is wrong, missing or unknown.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else build(arguments[0], value, where)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, not {_named(value)}")
        return tuple(build(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, not {_named(value)}")
        return {name: build(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    return _build_scalar(kind, value, where)


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the file'} must be a mapping, not {_named(value)}")
    hints, prefix = get_type_hints(kind), f"{where}." if where else ""
    for name in value:
        if name not in hints:
            raise ValueError(
                f"{prefix}{shown(name, 30)} is unknown; {shown(nearest(str(name), hints).rstrip('.'), 300)}"
            )
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in value:
            raise ValueError(f"{prefix}{item.name} is missing")
    return kind(**{name: build(hints[name], item, f"{prefix}{name}") for name, item in value.items()})


def _build_scalar(kind: type, value: Any, where: str) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{where} must be text, not {_named(value)}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where} must be true or false, not {_named(value)}")
        return value
    if isinstance(value, str):  # YAML 1.1 reads 1e9, without a point and a sign, as text
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{where} must be a number, not {_named(value)}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where} must be a number, not {_named(value)}")
    if not math.isfinite(value) or value < 0 or (kind is int and value != int(value)):
        raise ValueError(
            f"{where} must be {'a whole' if kind is int else 'a finite'} number of at least 0, not {value}"
        )
    return kind(value)


def _named(value: Any) -> str:
    return shown(repr(value))


def plain(value: Any) -> Any:
    """Return what YAML can write: mappings, lists and plain values, without fields that have their defaults."""
    if dataclasses.is_dataclass(value):
        fields = {}
        for item in dataclasses.fields(value):
            own = getattr(value, item.name)
            default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
            if own != default:
                fields[item.name] = plain(own)
        return fields
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value

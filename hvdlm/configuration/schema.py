"""The names and types of all options, from the dataclasses, for errors that say what to write instead."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input

Options = typing.TypeVar("Options")
_LONGEST = 80  # characters of an unknown key that are compared with known ones
_PHRASES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list such as [a, b]",
    dict: "a mapping such as {a: 1, b: 2}",
}


def types_of(classes: Mapping[str, type]) -> dict[str, Any]:
    """Return {key: its type} of every option; ``classes`` maps a section ("" for the top level) to its dataclass."""
    types_by_key: dict[str, Any] = {}
    for section, kind in classes.items():
        for name, hint in typing.get_type_hints(kind).items():
            key = f"{section}.{name}" if section else name
            if dataclasses.is_dataclass(hint):
                types_by_key.update(types_of({key: typing.cast(type, hint)}))
            else:
                types_by_key[key] = hint
    return types_by_key


def expectation(hint: Any) -> str:
    """Return a description of the values that an option of this type takes."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (typing.Union, types.UnionType):
        phrases = [expectation(a) for a in arguments if a is not type(None)]
        return " or ".join([*phrases, "null"] if type(None) in arguments else phrases)
    return _PHRASES.get(origin or hint, "another value")


def advice(key: str, known: Iterable[str]) -> str:
    """Return a suggestion for the unknown ``key``: what it is called here, or the closest name."""
    from hvdlm import plugins

    for translate in plugins.extensions("option_names"):
        if elsewhere := translate(key):
            return str(elsewhere)
    names = sorted({*known, *(name.split(".")[0] for name in known)})
    last = {name.rsplit(".", 1)[-1]: name for name in names}
    # A section that was forgotten: of several that have such an option, the first.
    close = [name for name in known if name.rpartition(".")[2] == key][:1]
    close = close or difflib.get_close_matches(key, names, 1, 0.6)
    close = close or [last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, 1, 0.6)]
    return f"did you mean --{close[0]}?" if close else "python -m hvdlm --help all lists all options."


def unknown(key: str, known: Iterable[str]) -> str:
    """Return the error about an option that doesn't exist, or whose plugin isn't loaded."""
    section = key.partition(".")[0]
    if not any(name.partition(".")[0] == section for name in known):
        from hvdlm import plugins  # which imports every installed plugin, only for this error

        brought = plugins.not_loaded("options", section)
        if brought:
            return f"--{untrusted_input.shown(key)}: there is no section {section} yet; {brought}"
    return f"--{untrusted_input.shown(key)}: there is no such option; {advice(key[:_LONGEST], known)}"


def wrong_value(key: str, value: Any, hint: Any) -> str:
    """Return the error about a value of the wrong type."""
    shown = (
        "null" if value in (None, "None") else untrusted_input.shown(repr(value) if isinstance(value, str) else value)
    )
    near = ""
    if typing.get_origin(hint) is typing.Literal:
        close = difflib.get_close_matches(str(value), [str(a) for a in typing.get_args(hint)], 1)
        near = f"; did you mean {close[0]}?" if close else ""
    return f"--{key}: got {shown}, expected {expectation(hint)}{near or '.'}"


def whole_numbers(arguments: Sequence[str], known: Mapping[str, Any]) -> list[str]:
    """Return ``arguments`` with 1e3 written 1000, where an option takes a whole number."""
    result = list(arguments)
    for index, argument in enumerate(result):
        name, sign, value = argument.partition("=")
        if int not in (hint := known.get(name.removeprefix("--")), *typing.get_args(hint)):
            continue
        if sign:
            result[index] = f"{name}={_as_whole_number(value)}"
        elif index + 1 < len(result):
            result[index + 1] = _as_whole_number(result[index + 1])
    return result


def _as_whole_number(text: str) -> str:
    """Return 1e3, 1.5e6 or 1000.0 as digits, any other text as it is."""
    if not re.fullmatch(r"\d{1,20}(\.\d{0,20})?(e\+?\d{1,2})?", text, re.I):
        return text
    number = Decimal(text)
    return str(int(number)) if number == int(number) else text


def check_mapping(content: Mapping[str, Any], known: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Check the keys of a YAML file's content, before its values are parsed.

    Raises:
        HvdlmError: an unknown key, an option where a section is meant or the reverse, or null where it can't be.
    """
    for name, value in content.items():
        key = f"{prefix}{name}"
        if any(other.startswith(f"{key}.") for other in known):
            if not isinstance(value, Mapping):
                got = untrusted_input.shown(repr(value))
                raise HvdlmError(f"{where}: {key} is a section, got {got}: write for example {example(key, known)}.")
            check_mapping(value, known, where, f"{key}.")
        elif key not in known:
            raise HvdlmError(f"{where}: {unknown(key, known)}")
        elif value is None and "null" not in expectation(known[key]):
            raise HvdlmError(f"{where}: {wrong_value(key, None, known[key])}")
        elif not isinstance(value, str | None) and expectation(known[key]) in ("text", "text or null"):
            raise HvdlmError(f"{where}: {wrong_value(key, value, known[key])}")


def instance(kind: type[Options], values: Any, section: str) -> Options:
    """Return the options of ``section`` that a run stored, each of its type; ``kind``: their dataclass.

    Raises:
        HvdlmError: ``values`` is no mapping, holds an unknown option, or one of another type.
    """
    known = types_of({section: kind})
    check_mapping({section: values}, known, "its configuration")
    for name, value in values.items():
        if not _is_of(value, known[f"{section}.{name}"]):
            raise HvdlmError(
                f"its configuration: {wrong_value(f'{section}.{name}', value, known[f'{section}.{name}'])}"
            )
    return kind(**values)


def _is_of(value: Any, hint: Any) -> bool:
    """Return whether a value of JSON is of the type ``hint`` of an option; whole numbers are numbers, bools are not."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return any(type(value) is type(other) and value == other for other in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, other) for other in arguments)
    if origin is list:
        return isinstance(value, list) and all(_is_of(item, arguments[0]) for item in value)
    return type(value) in (int, float) if hint is float else type(value) is (origin or hint)


def example(section: str, known: Mapping[str, Any]) -> str:
    """Return how the options of a section are given."""
    key = next(key for key in known if key.startswith(f"{section}."))
    return f"--{key} ..., or in YAML {section}: {{{key.removeprefix(section + '.')}: ...}}"

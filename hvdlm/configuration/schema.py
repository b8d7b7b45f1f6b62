"""What options there are and what each takes, read off the dataclasses: for errors that say what to write instead."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input

_LONGEST = 80  # characters of a key, of which the nearest known one is searched
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
    found: dict[str, Any] = {}
    for section, kind in classes.items():
        for name, hint in typing.get_type_hints(kind).items():
            key = f"{section}.{name}" if section else name
            if dataclasses.is_dataclass(hint):
                found.update(types_of({key: typing.cast(type, hint)}))
            else:
                found[key] = hint
    return found


def expectation(hint: Any) -> str:
    """Return what an option of this type takes, as part of a sentence."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (typing.Union, types.UnionType):
        phrases = [expectation(a) for a in arguments if a is not type(None)]
        return " or ".join([*phrases, "null"] if type(None) in arguments else phrases)
    return _PHRASES.get(origin or hint, "another value")


def advice(key: str, known: Iterable[str]) -> str:
    """Return what may have been meant by ``key``."""
    names = sorted({*known, *(name.split(".")[0] for name in known)})
    last = {name.rsplit(".", 1)[-1]: name for name in names}
    # A section that was forgotten: of several that have such an option, the first.
    close = [name for name in known if name.rpartition(".")[2] == key][:1]
    close = close or difflib.get_close_matches(key, names, 1, 0.6)
    close = close or [last[n] for n in difflib.get_close_matches(key.rsplit(".", 1)[-1], last, 1, 0.6)]
    return f"did you mean --{close[0]}?" if close else "python -m hvdlm --help lists all options."


def unknown(key: str, known: Iterable[str]) -> str:
    """Return the sentence about an option that doesn't exist."""
    return f"--{untrusted_input.shown(key)}: there is no such option; {advice(key[:_LONGEST], known)}"


def wrong_value(key: str, value: Any, hint: Any) -> str:
    """Return the sentence about a value of the wrong type."""
    shown = (
        "null" if value in (None, "None") else untrusted_input.shown(repr(value) if isinstance(value, str) else value)
    )
    near = ""
    if typing.get_origin(hint) is typing.Literal:
        close = difflib.get_close_matches(str(value), [str(a) for a in typing.get_args(hint)], 1)
        near = f"; did you mean {close[0]}?" if close else ""
    return f"--{key}: got {shown}, expected {expectation(hint)}{near or '.'}"


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


def example(section: str, known: Mapping[str, Any]) -> str:
    """Return how the options of a section are given."""
    key = next(key for key in known if key.startswith(f"{section}."))
    return f"--{key} ..., or in YAML {section}: {{{key.removeprefix(section + '.')}: ...}}"

"""Loads untrusted YAML: mappings, lists and plain values only, in bounded time and memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.untrusted_input import shown

_MAX_EVENTS = 20_000
_MAX_DEPTH = 32
_SCALARS = (float, bool, type(None))
_TAG = "tag:yaml.org,2002:"
# Escapes by which file names that are not UTF-8 are written; libyaml, behind the faster loaders, refuses them.
# 1:30:00 is 5400 in YAML 1.1.
_SIXTIETHS = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def load(text: str, loader: Callable[[str], Any]) -> Any:
    """Return the content of YAML ``text``, parsed by ``loader``.

    Raises:
        ValueError: it isn't YAML, or holds anything but mappings with text keys, lists, text and numbers.
    """
    untrusted_input.guarded(lambda: _check_events(text, _Meaning()))
    if _SURROGATE.search(text):
        import yaml

        loader = yaml.safe_load
    # yaml raises its own errors and, for values that it can't construct, any other.
    content = untrusted_input.guarded(lambda: loader(text))
    _check(content)
    return content


class _Meaning:
    """Checks that no value of a text is lost or read as another: keys given twice, numbers in sixtieths."""

    def __init__(self) -> None:
        self._open: list[dict[str, Any]] = []  # the mappings and lists around an event

    def see(self, event: Any) -> None:
        """Take the next event; raise ValueError where its value isn't what it looks like."""
        import yaml

        if isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
        elif isinstance(event, yaml.NodeEvent):
            value, plain = (event.value, event.implicit[0]) if isinstance(event, yaml.ScalarEvent) else (None, False)
            if self._open and self._open[-1]["mapping"]:
                self._see_in_mapping(self._open[-1], value)
            if value is not None and plain and _SIXTIETHS.fullmatch(value):
                raise ValueError(f"{shown(value)} would be read as minutes and seconds: write a number, or quote it")
            if isinstance(event, yaml.CollectionStartEvent):
                mapping = isinstance(event, yaml.MappingStartEvent)
                self._open.append({"mapping": mapping, "keys": set(), "is_key": True})

    def _see_in_mapping(self, mapping: dict[str, Any], value: str | None) -> None:
        if mapping["is_key"] and value is not None:
            if value in mapping["keys"]:
                raise ValueError(f"{shown(value)} is given twice: remove one")
            mapping["keys"].add(value)
        mapping["is_key"] = not mapping["is_key"]


def _check_events(text: str, meaning: _Meaning | None = None) -> None:
    """Check the events of ``text``, and their ``meaning``, before any value is constructed.

    Raises:
        ValueError: it has tags (for objects), too many values, too deep nesting, or aliases, which could expand beyond
            memory.
        yaml.YAMLError: it isn't YAML.
    """
    import yaml

    depth, anchors = 0, set()
    parser = yaml.SafeLoader if _SURROGATE.search(text) else getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for number, event in enumerate(yaml.parse(text, Loader=parser)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if number > _MAX_EVENTS or depth > _MAX_DEPTH:
            raise ValueError(f"it has more than {_MAX_EVENTS} values, or nests deeper than {_MAX_DEPTH} levels")
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) and anchor in anchors:
            raise ValueError(f"aliases (*{shown(anchor)}) are not allowed: write the values out")
        anchors.add(anchor)
        if str(tag).startswith(_TAG):
            raise ValueError(f"tags ({shown(tag)}) are not allowed: write plain values")
        if meaning is not None:
            meaning.see(event)


def _check(value: Any) -> None:
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise ValueError(f"a key is not text: {shown(repr(name))}")
            _check(item)
    elif isinstance(value, list):
        for item in value:
            _check(item)
    elif isinstance(value, str):
        _check_text(value)
    elif not isinstance(value, _SCALARS) and not (type(value) is int and abs(value) < 2**63):
        raise ValueError(f"a value is neither text nor a number: {shown(repr(value))}")


def _check_text(text: str) -> None:
    """Check text as YAML, too: it is parsed once more where an option takes more than text."""
    import yaml

    if "\0" in text:
        raise ValueError("a text holds a NUL character, which no file name or option has")
    try:
        _check_events(text_decoding.without_surrogates(text))
    except yaml.YAMLError:
        pass  # it will stay text

"""YAML of which nothing can be made but mappings, lists and plain values, in bounded time and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown

_EVENTS = 20_000
_DEPTH = 32
_PLAIN = (float, bool, type(None))
_TAG = "tag:yaml.org,2002:"


def load(text: str, loader: Callable[[str], Any]) -> Any:
    """Return what ``loader`` makes of YAML ``text``.

    Raises:
        ValueError: it isn't YAML, or holds more than mappings with names, lists, text and figures.
    """
    untrusted_input.guarded(lambda: _survey(text))
    # yaml raises errors of its own and, on values that it can't make, any other.
    content = untrusted_input.guarded(lambda: loader(text))
    _check(content)
    return content


def _survey(text: str) -> None:
    """Look at the events that ``text`` is made of, before anything is made of them.

    Raises:
        ValueError: it asks for objects, its parts are too many, too deep in each other, or stand for other parts, which
            may be more than there is memory.
        yaml.YAMLError: it isn't YAML.
    """
    import yaml

    depth, anchors = 0, set()
    for number, event in enumerate(yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if number > _EVENTS or depth > _DEPTH:
            raise ValueError(f"it has more than {_EVENTS} parts, or more than {_DEPTH} in each other")
        anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) and anchor in anchors:
            raise ValueError(f"aliases (*{shown(anchor)}) are not taken: write out what they stand for")
        anchors.add(anchor)
        if str(tag).startswith(_TAG):
            raise ValueError(f"tags ({shown(tag)}) are not taken: write plain values")


def _check(value: Any) -> None:
    if isinstance(value, dict):
        for name, one in value.items():
            if not isinstance(name, str):
                raise ValueError(f"a name is no text: {shown(repr(name))}")
            _check(one)
    elif isinstance(value, list):
        for one in value:
            _check(one)
    elif isinstance(value, str):
        _check_text(value)
    elif not isinstance(value, _PLAIN) and not (type(value) is int and abs(value) < 2**63):
        raise ValueError(f"a value is neither text nor a figure: {shown(repr(value))}")


def _check_text(text: str) -> None:
    """Check a value as if it were YAML: as such it is read once more, where an option takes more than text."""
    import yaml

    try:
        _survey(text)
    except yaml.YAMLError:
        pass  # so it stays text

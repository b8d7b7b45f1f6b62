"""Bounds how much longer a Hugging Face tokenizer.json can make text: chained replacements could exhaust memory."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any


def expansion(description: Mapping[str, Any]) -> float:
    """Return an upper bound of how many times longer text may get before it is encoded, or after it is decoded.

    Raises:
        ValueError: it holds invalid base64.
    """
    return max(_expansion(description.get(name)) for name in ("normalizer", "pre_tokenizer", "decoder"))


def _expansion(component: Any) -> float:
    """Return the product over all components that are applied one after the other."""
    if isinstance(component, list):
        return math.prod(map(_expansion, component))
    if not isinstance(component, dict):
        return 1.0
    return _single_expansion(component) * math.prod(map(_expansion, component.values()))


def _single_expansion(component: Mapping[str, Any]) -> float:
    """Return the bound of one component, recognised by its keys: the library accepts some without a type."""
    content, prepended, charsmap = (component.get(name) for name in ("content", "prepend", "precompiled_charsmap"))
    factor = {"BertNormalizer": 3.0, "ByteLevel": 2.0}.get(str(component.get("type")), 1.0)
    if isinstance(content, str):
        pattern = component.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match between any two characters.
        factor *= max(1.0, len(content) / len(plain)) if isinstance(plain, str) and plain else 1.0 + len(content)
    if isinstance(prepended, str):  # once for every segment between two added tokens
        factor *= 1.0 + len(prepended)
    return factor * (_longest(charsmap) if isinstance(charsmap, str) else 1.0)


def _longest(charsmap: str) -> float:
    """Return the bytes of the longest replacement: they follow the trie and its length, each ended by a zero byte."""
    data = base64.b64decode(charsmap)
    return float(max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0) or 1)

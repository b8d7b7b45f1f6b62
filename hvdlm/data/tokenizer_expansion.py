"""How much longer a Hugging Face tokenizer.json may make text: what replaces can be chained until memory ends."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any


def growth(description: Mapping[str, Any]) -> float:
    """Return an upper bound of how many times longer text may get before it is encoded, or after it is decoded.

    Raises:
        ValueError: it holds base64 that is none.
    """
    return max(_growth(description.get(part)) for part in ("normalizer", "pre_tokenizer", "decoder"))


def _growth(part: Any) -> float:
    """Return the product over all that is applied one after the other."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1.0
    return _own(part) * math.prod(map(_growth, part.values()))


def _own(part: Mapping[str, Any]) -> float:
    """Return what one part does, told by its keys: the library takes some that don't name their type."""
    content, prepended, charsmap = (part.get(name) for name in ("content", "prepend", "precompiled_charsmap"))
    factor = {"BertNormalizer": 3.0, "ByteLevel": 2.0}.get(str(part.get("type")), 1.0)
    if isinstance(content, str):
        pattern = part.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        # A regular expression may match between any two characters.
        factor *= max(1.0, len(content) / len(plain)) if isinstance(plain, str) and plain else 1.0 + len(content)
    if isinstance(prepended, str):  # once for every part between two added tokens
        factor *= 1.0 + len(prepended)
    return factor * (_longest(charsmap) if isinstance(charsmap, str) else 1.0)


def _longest(charsmap: str) -> float:
    """Return the bytes of the longest replacement: after its length and a trie they follow, each ended by a zero."""
    data = base64.b64decode(charsmap)
    return float(max(map(len, data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")), default=0) or 1)

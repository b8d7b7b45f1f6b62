"""Kinds of tokenizers: what ``data.tokenizer`` names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hvdlm.data.tokenizer_base import Tokenizer


class TokenizerKind(Protocol):
    """Makes tokenizers of one kind: most often the class of these tokenizers, with both as static methods."""

    def train(self, texts: Iterable[str], size: int | None) -> Tokenizer:
        """Return a tokenizer trained on ``texts``; ``size``: ``data.vocab_size``."""

    def load(self, description: Mapping[str, Any]) -> Tokenizer:
        """Return the tokenizer that ``Tokenizer.to_json`` described; the description is untrusted.

        Raises:
            KeyError, TypeError, ValueError, HvdlmError: it is damaged.
        """

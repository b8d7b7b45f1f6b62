"""Tokenizers of plugins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from hvdlm.data.tokenizer_base import Tokenizer


class TokenizerKind(Protocol):
    """A kind of tokenizer: a class or module that makes tokenizers, subclasses of ``tokenizer_base.Tokenizer``."""

    def train(self, texts: Iterable[str], size: int | None) -> Tokenizer:
        """Return a tokenizer for ``texts``; ``size``: ``data.vocab_size``."""

    def from_json(self, value: Mapping[str, Any]) -> Tokenizer:
        """Return the tokenizer that ``Tokenizer.to_json`` described; its ``kind`` is the name of the entry point.

        Raises:
            ValueError: the description, which is untrusted, is wrong.
        """

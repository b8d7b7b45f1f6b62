"""What a language model needs of a tokenizer and of a corpus."""

from __future__ import annotations

from hvdlm.config import DataConfig
from hvdlm.data.token_files import Tokens
from hvdlm.data.tokenizer_base import Tokenizer, spells_special
from hvdlm.errors import HvdlmError
from hvdlm.io.text_decoding import without_surrogates


def required_ids(tokenizer: Tokenizer, data: DataConfig) -> int:
    """Return how many ids a model needs for all texts: special tokens that don't occur in them need no embedding."""
    if not data.split_special_tokens:
        return tokenizer.vocab
    added = [*tokenizer.prefix, *tokenizer.suffix] if data.add_special_tokens else []
    separator = without_surrogates(data.separator)
    if spells_special(tokenizer, separator):
        added += tokenizer.encode(separator, special=True).tolist()
    return max(tokenizer.text_vocab, 1 + max(added, default=-1))


def require_length(tokens: Tokens, context: int, split: str) -> None:
    """Check that a split holds at least one window."""
    if len(tokens) < context + 1:
        raise HvdlmError(
            f"{split} split has {len(tokens)} tokens, fewer than data.context + 1 = {context + 1}: "
            "give more text or a smaller --data.context."
        )

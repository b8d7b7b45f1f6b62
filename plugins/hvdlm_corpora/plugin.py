"""Hooks: training on texts (``--data.path book.txt``, ``--data.mixture``) and the tokenizers char, word and bpe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hvdlm import hookimpl

if TYPE_CHECKING:
    from hvdlm.config import DataConfig
    from hvdlm.protocols.data_preparer import DataPreparer
    from hvdlm.protocols.tokenizer_kind import TokenizerKind


@hookimpl
def hvdlm_data_preparer(data: DataConfig) -> DataPreparer:
    """Return the preparer of texts, whatever ``data`` is: sentences say what can't be read."""
    from hvdlm_corpora.preparer import TextPreparer

    return TextPreparer()


@hookimpl
def hvdlm_tokenizers() -> Mapping[str, TokenizerKind]:
    """Return the tokenizers of characters, of words, and of Hugging Face."""
    from hvdlm_corpora.bpe_tokenizer import BPETokenizer
    from hvdlm_corpora.tokenizers import CharTokenizer, WordTokenizer

    return {"char": CharTokenizer, "word": WordTokenizer, "bpe": BPETokenizer}

"""Texts with the documents in them: where special tokens (BOS, EOS, separators) are added when they are encoded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hvdlm.data.tokenizer_base import Tokenizer, spells_special
from hvdlm_corpora.source_chunks import SourceChunk, SourcePosition

_SEARCHED = 512  # special tokens that are looked for: an expression of all in a hostile tokenizer would take minutes


@dataclass(frozen=True)
class SpecialTokens:
    """The options on special tokens; see ``DataConfig``.

    Attributes:
        separator: the text after every record; where it spells special tokens, it stands for them.
        add: whether what the tokenizer adds to a document is added.
        split: whether documents that spell special tokens hold plain text.
    """

    separator: str = "\n"
    add: bool = True
    split: bool = True


@dataclass(frozen=True)
class Passage:
    """A text of one source, about a megabyte.

    Attributes:
        text: the documents in it, or a part of one, each followed by the separator where the source holds records.
        begins: whether a document begins where it begins.
        ends: characters before the end of every document that ends in it.
        options: how special tokens are treated.
    """

    text: str
    begins: bool
    ends: tuple[int, ...]
    options: SpecialTokens

    def __len__(self) -> int:
        """Return the number of characters."""
        return len(self.text)


def passages(
    chunks: Iterable[tuple[SourceChunk, int]], first: bool, options: SpecialTokens
) -> Iterator[tuple[Passage, SourcePosition, int]]:
    """Yield the chunks of a source as passages, with their ends and the numbers that came with the chunks.

    A source that doesn't hold records is one document. ``first``: whether it begins with the first chunk.
    """
    before: tuple[SourceChunk, int] | None = None
    for chunk in chunks:
        if before is not None:
            yield _passage(before[0], first, False, options), before[0].end, before[1]
            first = False
        before = chunk
    if before is not None:
        yield _passage(before[0], first, True, options), before[0].end, before[1]


def _passage(chunk: SourceChunk, first: bool, last: bool, options: SpecialTokens) -> Passage:
    if chunk.record_ends:
        return Passage(chunk.text, True, chunk.record_ends, options)
    return Passage(chunk.text, first, (len(chunk.text),) if last else (), options)


def encode(tokenizer: Tokenizer, passage: Passage | str) -> np.ndarray:
    """Return the ids of a passage, int32 ``[n]``; raise HvdlmError where it can't be written with the vocabulary."""
    if isinstance(passage, str):
        return tokenizer.encode(passage)
    segments = _segments(tokenizer, passage)
    ids = [tokenizer.encode(segment, special) if isinstance(segment, str) else segment for segment, special in segments]
    return ids[0] if len(ids) == 1 else np.concatenate([np.zeros(0, np.int32), *ids])


def spelled(tokenizer: Tokenizer, options: SpecialTokens) -> re.Pattern[str] | None:
    """Return an expression of the special tokens that documents might spell in vain, None where there are none."""
    tokens = [re.escape(token) for token in tokenizer.special[:_SEARCHED] if token]
    return re.compile("|".join(tokens)) if tokens and options.split else None


def bytes_before(tokenizer: Tokenizer, passage: Passage, count: int) -> int:
    """Return how many bytes of a passage its first ``count`` ids stand for."""
    size = 0
    for segment, special in _segments(tokenizer, passage):
        ids = tokenizer.encode(segment, special) if isinstance(segment, str) else segment
        if count < len(ids):
            return size + (tokenizer.bytes_before(segment, count, special) if isinstance(segment, str) else 0)
        size += len(segment.encode()) if isinstance(segment, str) else 0
        count -= len(ids)
    return size


def preserved(tokenizer: Tokenizer, passage: Passage) -> bool:
    """Return whether decoding restores a passage's text, but for blanks at its ends."""
    return tokenizer.decode(tokenizer.encode(passage.text).tolist()).strip() == passage.text.strip()


def _segments(tokenizer: Tokenizer, passage: Passage) -> Iterator[tuple[str | np.ndarray, bool]]:
    """Yield texts, with whether they may spell special tokens, and added ids, in order."""
    options = passage.options
    separator = options.separator
    control = spells_special(tokenizer, separator)
    prefix, suffix = (np.array(ids if options.add else (), np.int32) for ids in (tokenizer.prefix, tokenizer.suffix))
    if not (control or len(prefix) or len(suffix)):  # in one go, so that tokens may lie across documents
        yield passage.text, not options.split
        return
    start, begins = 0, passage.begins
    for end in passage.ends:
        if begins:
            yield prefix, False
        rest = end + len(separator)
        yield passage.text[start : end if control else rest], not options.split
        yield suffix, False
        if control:
            yield passage.text[end:rest], True
        start, begins = rest, True
    if passage.text[start:]:
        if begins:
            yield prefix, False
        yield passage.text[start:], not options.split
